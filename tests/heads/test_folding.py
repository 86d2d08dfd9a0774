"""Folding a cosine head: in memory, for given inputs, and in a state dict."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from head_models import Net, examples
from torch import nn

from ldam_plugins.heads import CosineLinear, fold_cosine_head, folded_state_dict, use_cosine_head
from ldam_plugins.heads.folding import plain_layer


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def layer():
    return CosineLinear(6, 4, scale=30.0)


def trained(model, x, steps=3):
    """Put the head on and take a few real steps, so that weights and moments are not initial."""
    model = use_cosine_head(model).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    target = torch.randint(5, (len(x),))
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
    return model.eval()


def divergence(cosine, linear):
    """Mean Kullback-Leibler divergence of the linear from the cosine probabilities, in nats."""
    p, q = cosine.double().log_softmax(-1), linear.double().log_softmax(-1)
    return F.kl_div(q, p, reduction="batchmean", log_target=True).item()


def test_folding_draws_no_random_numbers():
    model = use_cosine_head(Net())
    state = torch.random.get_rng_state()
    fold_cosine_head(model)
    assert torch.random.get_rng_state().equal(state)


def test_what_has_no_cosine_head_cannot_be_folded():
    for function in (fold_cosine_head, folded_state_dict):
        with pytest.raises(ValueError, match=r"one with a cosine head, got 'Net'.*use_cosine_head"):
            function(Net())
        with pytest.raises(TypeError, match=r"a torch.nn.Module, got 'dict'"):
            function({})


@pytest.mark.parametrize("steps", [0, 3])
def test_folding_keeps_the_largest_logit(steps):
    x = examples(2000).double()
    model = trained(Net().double(), x, steps)
    cosine = model(x)
    linear = fold_cosine_head(model)(x)
    assert cosine.argmax(1).unique().numel() > 1
    assert linear.argmax(1).equal(cosine.argmax(1))
    ratio = linear / cosine
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-9, atol=0)


def test_heads_on_the_same_features_keep_the_largest_mean_logit():
    x = examples(2000)
    model = trained(Net(heads=2), x)
    cosine = model(x)
    assert fold_cosine_head(model)(x).argmax(1).equal(cosine.argmax(1))


def test_heads_on_different_features_keep_each_its_own_largest_logit():
    x = examples(2000)
    model = trained(Net(heads=2, shared=False), x)
    features = model.body(x), model.other(x)
    cosine = [head(part) for head, part in zip(model.heads, features, strict=True)]
    mean = model(x)
    fold_cosine_head(model)
    for head, part, logits in zip(model.heads, features, cosine, strict=True):
        assert head(part).argmax(1).equal(logits.argmax(1))
    # What cannot be promised: the mean of two heads is no longer one factor away.
    assert 0.6 < (model(x).argmax(1) == mean.argmax(1)).double().mean() < 1


def test_inputs_give_the_closest_probabilities_of_any_scale():
    x = examples()
    model = trained(Net(dropout=0.5), x)
    other = copy.deepcopy(model)
    cosine = model(x)
    best = divergence(cosine, fold_cosine_head(model, inputs=[x[:150], x[150:]])(x))
    from_training = fold_cosine_head(other)(x)
    factors = torch.linspace(0.2, 5, 481).tolist()
    assert best <= min(divergence(cosine, from_training * f) for f in factors) * (1 + 1e-6)
    assert best < divergence(cosine, from_training) * 0.9


class Dictionary(Net):
    """The same classifier in the manner of transformers."""

    def forward(self, x, labels=None):
        assert not self.training
        return {"loss": None, "logits": super().forward(x)}


@pytest.mark.parametrize("form", ["tensor", "loader", "mapping"])
def test_inputs_come_as_the_model_takes_them(form):
    x, y = examples(), torch.zeros(200)
    model = use_cosine_head(Net() if form != "mapping" else Dictionary(), head="heads.0")
    model.body.eval()
    batch = {"tensor": x, "loader": [x, y], "mapping": {"x": x, "labels": y}}[form]
    fold_cosine_head(model, inputs=iter([batch]))
    assert (model.training, model.body.training) == (True, False)
    reference = use_cosine_head(Net())
    reference.load_state_dict({**model.state_dict(), "heads.0.cosine_moments": torch.zeros(2)})
    cosine, linear = reference.eval()(x), Net.forward(model.eval(), x)
    factors = (0.9, 0.99, 1.01, 1.1)
    assert all(divergence(cosine, linear) < divergence(cosine, linear * f) for f in factors)


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ([], ValueError, "`inputs` must be at least one batch"),
        ([torch.randn(2, 7)], RuntimeError, "shapes"),
        ([torch.full((2, 6), torch.nan)], ValueError, "finite logits.* got 'NaN or infinite"),
        ([{"x": torch.randn(2, 6)}], TypeError, "an output with `logits`, got 'str'"),
    ],
)
def test_bad_inputs_leave_the_model_as_it_was(inputs, error, message):
    model = use_cosine_head(Net())
    head = model.heads[0]
    if error is TypeError:
        model.forward = lambda x: "logits"
    with pytest.raises(error, match=message):
        fold_cosine_head(model, inputs=inputs)
    assert model.heads[0] is head
    assert all(module.training for module in model.modules())
    assert not head._forward_hooks


@pytest.mark.parametrize("bias", [True, False])
def test_one_state_dict_serves_the_stock_model_and_the_cosine_model(bias):
    x = examples()
    stock = Net()
    if not bias:
        stock.heads[0] = nn.Linear(16, 5, bias=False)
    model = trained(copy.deepcopy(stock), x)
    before = copy.deepcopy(model.state_dict())
    state = folded_state_dict(model)
    result = stock.load_state_dict(state, strict=False)
    assert result.missing_keys == []
    assert result.unexpected_keys == ["heads.0.cosine_moments", "heads.0.cosine_weight"]
    again = use_cosine_head(copy.deepcopy(stock))
    again.load_state_dict(state)
    assert all(again.state_dict()[key].equal(value) for key, value in before.items())
    assert all(model.state_dict()[key].equal(value) for key, value in before.items())
    assert ("heads.0.bias" in state) is bias
    twice = folded_state_dict(model, state)
    assert all(twice[key].equal(value) for key, value in state.items())
    assert stock(x).equal(fold_cosine_head(model)(x))


def test_gathered_tensors_can_be_folded_in_place_of_the_models_own():
    model, other = use_cosine_head(Net()), use_cosine_head(Net())
    expected = folded_state_dict(other)
    state = folded_state_dict(model, other.state_dict())
    assert list(state) == list(expected)
    assert all(state[key].equal(value) for key, value in expected.items())
    lone = CosineLinear(4, 3)
    assert set(folded_state_dict(lone)) == {"weight", "bias", "cosine_weight", "cosine_moments"}


def test_one_batch_already_gives_the_best_scale(layer):
    torch.manual_seed(3)
    features = torch.randn(400, 6) * torch.rand(400, 1).add(0.5)
    logits = layer(features)
    folded = plain_layer(layer)
    unit = folded.weight / folded.weight.norm(dim=1, keepdim=True)
    lengths = features.norm(dim=1)

    def length_error(k):
        return (k * lengths - 30).square().mean()

    def logit_error(k):
        return (k * features @ unit.T - logits).square().mean()

    best = folded.weight.norm(dim=1)[0].item()
    others = [best * factor for factor in (0.5, 0.8, 0.9, 0.97, 0.99, 1.01, 1.03, 1.1, 1.25, 2)]
    assert all(length_error(best) < length_error(k) for k in others)
    assert all(logit_error(best) < logit_error(k) for k in others if abs(k / best - 1) > 0.05)


def test_without_moments_features_of_unit_mean_square_are_assumed(layer):
    lengths = plain_layer(layer).weight.norm(dim=1)
    torch.testing.assert_close(lengths, torch.full((4,), 30 / math.sqrt(6)))
