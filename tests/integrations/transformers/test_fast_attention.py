"""Fast dropout in models of transformers on a CPU: what it computes and what it leaves alone."""

import json
import math
from functools import partial

import pytest
import torch
from hf_samples import TEXT_MODELS, make_data, make_model, make_trainer, tensors
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForSequenceClassification

from ldam_plugins import DRWCallback
from ldam_plugins.integrations.transformers import fast_attention
from ldam_plugins.integrations.transformers.fast_attention import (
    ATTENTION,
    attention_forward,
    use_fast_dropout,
)
from ldam_plugins.kernels import dropout as kernel

N, H, L, D = 3, 2, 6, 5
FAST = [name for name in TEXT_MODELS if make_model(name).config._attn_implementation == "sdpa"]


@pytest.fixture
def layer():
    layer = nn.Module()
    layer.is_causal = False
    return layer


def attention_inputs(dtype=torch.float32):
    """Queries, keys and values as a layer makes them, and a mask that hides keys of two texts."""
    parts = [torch.randn(N, L, H, D).to(dtype).transpose(1, 2) for _ in range(3)]
    lengths = torch.tensor([6, 2, 4])
    mask = (torch.arange(L) < lengths[:, None])[:, None, None, :].expand(N, 1, L, L)
    return [part.requires_grad_() for part in parts], mask


def drawn(layer, parts, mask, dropout):
    """Output, and which probabilities were kept: values of the unit vectors show them."""
    query, key, value = parts
    state = torch.get_rng_state()
    output, _ = attention_forward(layer, query, key, value, mask, dropout)
    torch.set_rng_state(state)
    units = torch.eye(L, dtype=value.dtype).expand(N, H, L, L)
    shown, _ = attention_forward(layer, query, key, units, mask, dropout)
    return output, shown.transpose(1, 2) > 0


def oracle(parts, mask, kept, dropout):
    """The formula of the docstring, in float64."""
    query, key, value = (part.double() for part in parts)
    scores = (query @ key.mT / math.sqrt(D)).masked_fill(~mask, -math.inf)
    share = round(dropout * 32768) / 32768
    return (scores.softmax(-1) * kept / (1 - share) @ value).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.97])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_is_that_of_the_formula_with_its_gradient(layer, dtype, dropout, masked):
    parts, mask = attention_inputs(dtype)
    mask = mask if masked else None
    output, kept = drawn(layer, parts, mask, dropout)
    assert output.dtype == dtype
    assert 0 < kept.sum() < kept.numel()
    everywhere = torch.ones(N, 1, L, L, dtype=torch.bool) if mask is None else mask
    expected = oracle(parts, everywhere, kept, dropout)
    tolerance = 2e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)

    direction = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, parts, direction)
    found = torch.autograd.grad(output, parts, direction.to(dtype))
    for ours, theirs in zip(found, wanted, strict=True):
        scale = theirs.double().abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=4 * tolerance * scale)


def test_attention_takes_the_scale_it_is_given(layer):
    (query, key, value), mask = attention_inputs()
    torch.manual_seed(3)
    plain, _ = attention_forward(layer, query, key, value, mask, 0.3)
    torch.manual_seed(3)
    scaled, _ = attention_forward(layer, query * 2, key, value, mask, 0.3, 0.5 / math.sqrt(D))
    torch.testing.assert_close(scaled, plain)


def test_blocks_change_nothing(layer, monkeypatch):
    parts, mask = attention_inputs()
    found = []
    for block in (1, 2 * H * L * L, 1 << 20):
        monkeypatch.setattr(kernel, "_BLOCK", block)
        torch.manual_seed(5)
        output, _ = attention_forward(layer, *parts, mask, 0.4)
        found.append([output, *torch.autograd.grad(output.square().sum(), parts)])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


def test_autocast_changes_the_type_of_the_inputs_alone(layer):
    parts, mask = attention_inputs()
    narrow = [part.bfloat16() for part in parts]
    found = []
    for enabled, inputs in ((True, parts), (False, narrow)):
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output, _ = attention_forward(layer, *inputs, mask, 0.3)
            found.append([output, *torch.autograd.grad(output.float().square().sum(), parts)])
    assert found[0][0].dtype == torch.bfloat16
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_a_nan_stays_one(layer):
    (query, key, value), mask = attention_inputs()
    query = query.detach().index_fill(0, torch.tensor(0), math.nan)
    output, _ = attention_forward(layer, query, key, value, mask, 0.5)
    assert output[0].isnan().all()
    assert not output[1:].isnan().any()


def left_to_sdpa():
    (query, key, value), mask = attention_inputs()
    blind = mask.clone()
    blind[1, 0, 2] = False
    additive = torch.zeros(mask.shape).masked_fill(~mask, -1e4)
    bias = torch.randn(1, H, L, L)
    wide = [part.double() for part in (query, key, value)]
    return {
        "no dropout": ([query, key, value, mask, 0.0], {}),
        "all dropped": ([query, key, value, mask, 1.0], {}),
        "query without key": ([query, key, value, blind, 0.5], {}),
        "additive mask": ([query, key, value, additive, 0.5], {}),
        "causal": ([query, key, value, None, 0.5], {"is_causal": True}),
        "float64": ([*wide, mask, 0.5], {}),
        "position bias": ([query, key, value, mask, 0.5], {"position_bias": bias}),
    }


@pytest.mark.parametrize("case", left_to_sdpa())
def test_the_rest_is_left_to_sdpa(case, layer):
    arguments, options = left_to_sdpa()[case]
    torch.manual_seed(1)
    expected, _ = fast_attention.sdpa_attention_forward(layer, *arguments, **options)
    torch.manual_seed(1)
    found, _ = attention_forward(layer, *arguments, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    assert case == "all dropped" or not found.isnan().any()


def test_grouped_queries_are_left_to_sdpa(layer):
    (query, key, value), mask = attention_inputs()
    layer.num_key_value_groups = 2
    query = query.repeat(1, 2, 1, 1)
    found, _ = attention_forward(layer, query, key, value, mask, 0.5)
    assert found.shape == (N, L, 2 * H, D)


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_models_evaluate_as_before_and_save_nothing_of_it(name, tmp_path):
    inputs, _ = tensors(make_data(name))
    inputs["attention_mask"][3, 5:] = 0
    model = make_model(name, dropout=0.3).eval()
    keys = list(model.state_dict())
    expected = model(**inputs).logits
    assert use_fast_dropout(model) is (name in FAST)
    assert use_fast_dropout(model) is (name in FAST)  # twice is once
    assert not any(type(module) is nn.Dropout for module in model.modules())
    torch.testing.assert_close(model(**inputs).logits, expected)
    assert list(model.state_dict()) == keys

    model.save_pretrained(tmp_path)
    assert ATTENTION not in json.dumps(json.loads((tmp_path / "config.json").read_text()))
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert reloaded.config._attn_implementation != ATTENTION
    torch.testing.assert_close(reloaded(**inputs).logits, expected)


def test_most_models_are_fast():
    assert {"Bert", "DistilBert", "Roberta", "ModernBert", "Electra"} <= set(FAST)


@pytest.mark.parametrize("name", ["Bert", "DistilBert", "ModernBert", "Electra"])
def test_models_train_with_it(name, monkeypatch):
    calls = []
    apply = kernel._DropoutAttention.apply
    monkeypatch.setattr(
        kernel._DropoutAttention, "apply", lambda *a: calls.append(a[4]) or apply(*a)
    )
    inputs, _ = tensors(make_data(name))
    model = make_model(name, dropout=0.3).train()
    use_fast_dropout(model)
    torch.manual_seed(2)
    first = model(**inputs).logits
    assert calls
    assert set(calls) == {0.3}
    torch.manual_seed(2)
    torch.testing.assert_close(model(**inputs).logits, first)
    assert not torch.allclose(model(**inputs).logits, first)


def test_a_checkpointed_layer_draws_the_same_again(layer):
    parts, mask = attention_inputs()
    found = []
    for run in (attention_forward, partial(checkpoint, attention_forward, use_reentrant=False)):
        torch.manual_seed(4)
        output, _ = run(layer, *parts, mask, 0.3)
        found.append([output, *torch.autograd.grad(output.square().sum(), parts)])
    torch.testing.assert_close(found[1], found[0])


def test_compiled_code_draws_as_torch_does():
    inputs, _ = tensors(make_data())
    model = make_model(dropout=0.3).train()
    torch.manual_seed(6)
    expected = model(**inputs).logits
    use_fast_dropout(model)
    compiled = torch.compile(model, backend="eager")
    torch.manual_seed(6)
    torch.testing.assert_close(compiled(**inputs).logits, expected)


def test_a_trainer_with_it_is_repeated_by_its_seed(tmp_path):
    losses = []
    for run in range(2):
        model = make_model(dropout=0.3)
        use_fast_dropout(model)
        trainer = make_trainer(tmp_path / str(run), model, make_data(), [DRWCallback(start=1)])
        trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("empty", ["texts", "queries", "all"])
def test_an_empty_batch_has_an_empty_output(layer, empty):
    texts, length = (0, L) if empty == "texts" else (N, 0)
    query = torch.randn(texts, H, length, D, requires_grad=True)
    key, value = (torch.randn(texts, H, 0 if empty == "all" else L, D) for _ in range(2))
    output, _ = attention_forward(layer, query, key, value, None, dropout=0.1)
    assert output.shape == (texts, length, H, D)
    output.sum().backward()
    assert query.grad.shape == query.shape
