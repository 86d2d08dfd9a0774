"""The cosine layers: values, gradients, edge cases, moments, dtypes, state dicts, compilation."""

import copy
import io
import math

import pytest
import torch
from torch import nn

from ldam_plugins.heads.folding import plain_layer
from ldam_plugins.heads.layers import CosineConv2d, CosineLinear


def cosine_by_loops(features, rows, scale):
    """Return z (N, C), dz/dx and dz/dw (N, C, H), one class and example at a time."""
    logits, by_feature, by_row = [], [], []
    for x in features.tolist():
        length = math.sqrt(sum(a * a for a in x))
        for w in rows.tolist():
            row_length = math.sqrt(sum(a * a for a in w))
            cosine = sum(a * b for a, b in zip(x, w, strict=True)) / (length * row_length)
            logits.append(scale * cosine)
            unit_x, unit_w = [a / length for a in x], [a / row_length for a in w]
            pairs = list(zip(unit_x, unit_w, strict=True))
            by_feature.append([scale * (b - cosine * a) / length for a, b in pairs])
            by_row.append([scale * (a - cosine * b) / row_length for a, b in pairs])
    shape = (len(features), len(rows), -1)
    parts = (logits, by_feature, by_row)
    z, dx, dw = (torch.tensor(p, dtype=torch.float64).reshape(shape) for p in parts)
    return z.squeeze(-1), dx, dw


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return CosineLinear(6, 4, scale=30.0)


def test_values_and_gradients_equal_the_loops():
    torch.manual_seed(1)
    layer = CosineLinear(5, 3, scale=17.0, dtype=torch.float64)
    layer.weight.data.mul_(torch.tensor([[0.2], [1.0], [40.0]]))
    features = (torch.randn(4, 5, dtype=torch.float64) * 3).requires_grad_()
    upstream = torch.randn(4, 3, dtype=torch.float64)
    logits = layer(features)
    (logits * upstream).sum().backward()
    z, dx, dw = cosine_by_loops(features, layer.weight, 17.0)
    torch.testing.assert_close(logits, z, rtol=1e-12, atol=1e-12)
    expected = (upstream[:, :, None] * dx).sum(1)
    torch.testing.assert_close(features.grad, expected, rtol=1e-12, atol=1e-12)
    expected = (upstream[:, :, None] * dw).sum(0)
    torch.testing.assert_close(layer.weight.grad, expected, rtol=1e-12, atol=1e-12)


def test_tokens_and_places_are_rows_of_their_own(layer):
    tokens = torch.randn(2, 7, 6)
    rows = torch.stack([layer(tokens[:, i]) for i in range(7)], dim=1)
    torch.testing.assert_close(layer(tokens), rows)
    conv = CosineConv2d(6, 4)
    conv.weight.data.copy_(layer.weight.data.view(4, 6, 1, 1))
    maps = tokens[:, :6].reshape(2, 6, 6).unflatten(1, (2, 3)).permute(0, 3, 1, 2)
    torch.testing.assert_close(conv(maps).permute(0, 2, 3, 1).flatten(1, 2), layer(tokens[:, :6]))
    torch.testing.assert_close(conv(maps[0]), conv(maps)[0])


def test_zero_vectors_give_zero_logits_and_no_gradient(layer):
    layer.weight.data[2] = 0
    features = torch.randn(3, 6)
    features[1] = 0
    features.requires_grad_()
    logits = layer(features)
    logits.square().sum().backward()
    (layer(features).sum() * 5).backward()
    assert logits[1].eq(0).all()
    assert logits[:, 2].eq(0).all()
    assert features.grad[1].eq(0).all()
    assert layer.weight.grad[2].eq(0).all()
    assert features.grad[0].abs().sum() > 0
    assert features.grad.isfinite().all()
    assert layer.weight.grad.isfinite().all()
    assert layer.cosine_moments.isfinite().all()


def test_tiny_and_huge_features_keep_their_direction(layer):
    features = torch.randn(3, 6)
    for factor in (1e-8, 1e15):
        torch.testing.assert_close(layer(features * factor), layer(features))


def test_starts_with_unit_rows_in_every_direction():
    torch.manual_seed(0)
    rows = CosineLinear(16, 4000).weight.detach()
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(4000))
    assert rows.mean(0).abs().max() < 0.02
    torch.testing.assert_close(rows.T @ rows / 4000, torch.eye(16) / 16, atol=0.01, rtol=0)
    torch.manual_seed(0)
    assert CosineLinear(16, 4000).weight.equal(rows)
    half = CosineConv2d(8, 3, dtype=torch.bfloat16)
    assert half.weight.dtype == torch.bfloat16
    assert half.cosine_moments.dtype == torch.float32


def test_autocast_gives_float32_logits_of_the_rounded_features(layer):
    features = torch.randn(5, 6).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = layer(features)
        logits.sum().backward()
    exact, _, _ = cosine_by_loops(features.double(), layer.weight.double(), 30.0)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, exact.float(), rtol=1e-5, atol=1e-5)
    assert layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_layer_answers_in_its_dtype_from_float32_norms(layer, dtype):
    layer = layer.to(dtype)
    features = (torch.randn(5, 6) * 1000).to(dtype)
    logits = layer(features)
    exact, _, _ = cosine_by_loops(features.double(), layer.weight.double(), 30.0)
    assert logits.dtype == dtype
    assert logits.equal(exact.float().to(dtype))


def test_casting_and_moving_leave_the_moments_in_float32(layer):
    layer(torch.randn(50, 6))
    moments = layer.cosine_moments.clone()
    for cast in (nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float):
        assert cast(layer).cosine_moments.dtype == torch.float32
        assert layer.cosine_moments.equal(moments)
    assert layer.to("meta").cosine_moments.is_meta


def test_meta_layers_give_shapes():
    layer = CosineLinear(6, 4, device="meta")
    assert layer(torch.empty(2, 3, 6, device="meta")).shape == (2, 3, 4)
    assert plain_layer(layer).weight.is_meta


def test_moments_are_means_over_batches_that_forget_slowly(layer):
    batches = [torch.randn(9, 6) * (i + 1) for i in range(5)]
    first, second = 0.0, 0.0
    for batch in batches:
        layer(batch)
        lengths = [math.sqrt(sum(a * a for a in x)) for x in batch.tolist()]
        first += 0.01 * (sum(lengths) / 9 - first)
        second += 0.01 * (sum(a * a for a in lengths) / 9 - second)
    assert layer.cosine_moments.tolist() == pytest.approx([first, second], rel=1e-5)


def test_moments_stand_still_outside_training_and_skip_what_is_not_finite(layer):
    layer(torch.randn(9, 6))
    moments = layer.cosine_moments.clone()
    layer.eval()(torch.randn(9, 6) * 7)
    layer.train()(torch.full((2, 6), torch.inf))
    layer(torch.full((2, 6), torch.nan))
    layer(torch.empty(0, 6))
    assert layer.cosine_moments.equal(moments)


def test_an_average_of_models_averages_the_moments_in_place(layer):
    average = copy.deepcopy(layer)
    for _ in range(3):
        layer(torch.randn(20, 6))
        for kept, new in zip(
            average.state_dict().values(), layer.state_dict().values(), strict=True
        ):
            assert kept.is_floating_point()
            kept.lerp_(new, 0.5)
    scale, other = (plain_layer(part).weight.norm(dim=1)[0].item() for part in (average, layer))
    assert scale == pytest.approx(other, rel=0.1)
    assert average.cosine_moments.abs().sum() > 0


def test_states_survive_saving_loading_and_pickling(layer):
    layer(torch.randn(9, 6))
    other = CosineLinear(6, 4)
    assert other.load_state_dict(layer.state_dict()).missing_keys == []
    stored = io.BytesIO()
    torch.save(layer, stored)
    stored.seek(0)
    for copied in (other, torch.load(stored, weights_only=False), copy.deepcopy(layer)):
        assert copied.weight.equal(layer.weight)
        assert copied.cosine_moments.equal(layer.cosine_moments)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_without_moments_makes_them_unknown_again(layer, assign):
    layer(torch.randn(9, 6))
    plain = {"weight": torch.randn(4, 6)}
    layer.load_state_dict(plain, assign=assign)
    assert layer.weight.equal(plain["weight"])
    assert layer.cosine_moments.eq(0).all()


def test_a_partial_state_leaves_the_layer_alone(layer):
    layer(torch.randn(9, 6))
    before = copy.deepcopy(layer.state_dict())
    assert layer.load_state_dict({}, strict=False).missing_keys == ["weight"]
    assert all(before[key].equal(value) for key, value in layer.state_dict().items())


def test_a_bias_that_would_be_lost_is_an_error_even_when_not_strict(layer):
    state = nn.Linear(6, 4).state_dict()
    with pytest.raises(RuntimeError, match=r"`bias` must be zero.*init='keep'"):
        layer.load_state_dict(state, strict=False)
    state["bias"].zero_()
    layer.load_state_dict(state)
    assert layer.weight.equal(state["weight"])


def test_training_compiles_to_one_graph(layer):
    torch.compiler.reset()
    reference = copy.deepcopy(layer)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    for _ in range(3):
        features = torch.randn(9, 6)
        torch.testing.assert_close(compiled(features), reference(features))
    assert len(graphs) == 1
    assert layer.cosine_moments.equal(reference.cosine_moments)


@pytest.mark.parametrize("left_over", [[1e22, 1e36], [float("nan"), 1.0], [5.0, torch.inf], [2, 1]])
def test_moments_that_were_never_set_start_anew(layer, left_over):
    """As transformers leaves the buffers that a checkpoint lacks in classes of its own."""
    fresh, features = copy.deepcopy(layer), torch.randn(9, 6)
    layer.cosine_moments.copy_(torch.tensor(left_over))
    assert plain_layer(layer).weight.equal(plain_layer(fresh).weight)
    layer(features)
    fresh(features)
    assert layer.cosine_moments.equal(fresh.cosine_moments)


@pytest.mark.parametrize("scale", [0, -1.0, math.nan, math.inf])
def test_a_scale_must_be_finite_and_positive(scale):
    with pytest.raises(ValueError, match="`scale` must be a finite number > 0"):
        CosineLinear(6, 4, scale)
    with pytest.raises(ValueError, match="`scale`"):
        CosineConv2d(6, 4, scale)


def test_the_scale_is_shown():
    assert "bias=False, scale=12.5" in repr(CosineConv2d(6, 4, 12.5))
