"""Putting the cosine head on, folding it back, and the state dict that serves both."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldam_plugins.heads import (
    CosineConv2d,
    CosineLinear,
    cosine_heads,
    fold_cosine_head,
    folded_state_dict,
    use_cosine_head,
)


class Net(nn.Module):
    """Features of varying length, dropout, and one or two heads whose logits are averaged."""

    def __init__(self, heads=1, dropout=0.0, classes=5, shared=True):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 16), nn.ReLU())
        self.other = self.body if shared else nn.Sequential(nn.Linear(6, 16), nn.ReLU())
        self.drop = nn.Dropout(dropout)
        self.heads = nn.ModuleList(nn.Linear(16, classes) for _ in range(heads))
        self.num_classes = classes

    def forward(self, x):
        features = (self.drop(self.body(x)), self.drop(self.other(x)))
        pairs = zip(features, self.heads, strict=False)
        return torch.stack([head(part) for part, head in pairs]).mean(0)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def examples(n=200):
    return torch.randn(n, 6) * torch.randn(n, 1).exp()


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


def test_the_layer_is_replaced_where_it_was():
    model = Net().eval()
    old = model.heads[0]
    old.requires_grad_(False)
    model.alias = old
    other = model.body
    assert use_cosine_head(model, 16.0) is model
    head = model.heads[0]
    assert isinstance(head, CosineLinear)
    assert (head.in_features, head.out_features, head.scale) == (16, 5, 16.0)
    assert head.bias is None
    assert model.alias is head
    assert model.body is other
    assert not head.training
    assert not head.weight.requires_grad
    assert cosine_heads(model) == {"heads.0": head}
    assert set(model.state_dict()) >= {"heads.0.weight", "heads.0.cosine_moments"}
    folded = fold_cosine_head(model).heads[0]
    assert type(folded) is nn.Linear
    assert model.alias is folded
    assert not folded.training
    assert not folded.weight.requires_grad
    assert cosine_heads(model) == {}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv2d])
def test_a_lone_layer_comes_back_as_it_was(kind, bias):
    size = (16, 5) if kind is nn.Linear else (16, 5, 1)
    layer = kind(*size, bias=bias, dtype=torch.bfloat16)
    cosine = use_cosine_head(layer, head="")
    assert isinstance(cosine, CosineLinear if kind is nn.Linear else CosineConv2d)
    folded = fold_cosine_head(cosine)
    assert type(folded) is kind
    assert repr(folded) == repr(layer)
    states = folded.state_dict(), layer.state_dict()
    assert [*states[0]] == [*states[1]]
    for new, old in zip(*(state.values() for state in states), strict=True):
        assert (new.shape, new.dtype) == (old.shape, old.dtype)
    assert not bias or folded.bias.eq(0).all()


def test_folding_draws_no_random_numbers():
    model = use_cosine_head(Net())
    state = torch.random.get_rng_state()
    fold_cosine_head(model)
    assert torch.random.get_rng_state().equal(state)


def test_old_directions_are_kept_only_when_asked():
    model = Net()
    old = model.heads[0].weight.detach().clone()
    model.heads[0].weight.data[2] = 0
    kept = use_cosine_head(copy.deepcopy(model), init="keep").heads[0].weight
    same = kept.eq(old).all(dim=1).tolist()
    assert same == [True, True, False, True, True]
    assert kept[2].norm().item() == pytest.approx(1, rel=1e-5)
    fresh = use_cosine_head(model).heads[0].weight
    assert F.cosine_similarity(fresh, old).abs().max() < 0.9
    with pytest.raises(ValueError, match="`init` must be one of 'random', 'keep'"):
        use_cosine_head(model, init="kept")


def test_a_second_use_changes_nothing_or_says_what_to_do():
    model = use_cosine_head(Net(heads=2), 20.0, head="heads.1")
    head = model.heads[1]
    assert use_cosine_head(model, 20).heads[1] is head
    assert type(model.heads[0]) is nn.Linear
    with pytest.raises(ValueError, match=r"`scale` must be 20, got 30.0.*fold_cosine_head"):
        use_cosine_head(model)
    assert use_cosine_head(model, 20.0, head=["heads.0", "heads.1"]).heads[1] is head
    assert list(cosine_heads(model)) == ["heads.0", "heads.1"]


def test_layers_without_plain_float_weights_are_refused():
    normed = Net()
    nn.utils.parametrizations.weight_norm(normed.heads[0])
    lazy = nn.Sequential(nn.LazyLinear(5))
    for model in (normed, lazy):
        with pytest.raises(TypeError, match=r"holds its weights as floats, got '\w*Linear'"):
            use_cosine_head(model)


@pytest.mark.parametrize("scale", [0, -3.0, float("nan"), True, "30"])
def test_a_bad_scale_is_refused_before_anything_changes(scale):
    model = Net()
    with pytest.raises((ValueError, TypeError), match="`scale` must be"):
        use_cosine_head(model, scale)
    assert cosine_heads(model) == {}


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
        ([torch.full((2, 6), torch.nan)], ValueError, "examples with finite logits"),
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


def ordinary(model):
    model.heads[0] = nn.Linear(16, 5)


def adapted(model):
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["heads.0"], r=2), model)


@pytest.mark.parametrize("change", [ordinary, adapted])
@pytest.mark.parametrize(
    "carry", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_a_head_that_is_replaced_stops_the_training(change, carry):
    x = examples(4)
    model = carry(use_cosine_head(Net()))
    model(x)
    change(model)
    with pytest.raises(ValueError, match=r"heads\.0"):
        model(x)
    with torch.no_grad():
        model(x)
    model.eval()(x)


def test_a_head_that_is_put_on_again_or_folded_trains():
    x = examples(4)
    model = use_cosine_head(Net())
    ordinary(model)
    use_cosine_head(model)(x)
    folded = fold_cosine_head(model)
    assert not folded._forward_pre_hooks
    ordinary(folded)
    folded(x)


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_model_trains_without_no_head_either(fullgraph):
    torch.compiler.reset()
    x = examples(4)
    model = use_cosine_head(Net())
    compiled = torch.compile(model, backend="eager", fullgraph=fullgraph)
    torch.testing.assert_close(compiled(x), model(x))
    ordinary(model)
    with pytest.raises(Exception, match=r"exception|heads\.0"):
        compiled(x)


def test_a_model_compiled_before_is_compiled_anew():
    torch.compiler.reset()
    x = examples(4)
    model = Net()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(x)
    assert use_cosine_head(compiled) is compiled
    expected = 30 * F.normalize(model.body(x)) @ F.normalize(model.heads[0].weight).T
    logits = compiled(x)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    logits.sum().backward()
    assert model.heads[0].weight.grad.abs().sum() > 0
    ordinary(model)
    with pytest.raises(ValueError, match=r"heads\.0"):
        model(x)


def test_a_weight_that_another_module_shares_is_not_parted():
    model = nn.Sequential(nn.Embedding(5, 16), nn.Linear(16, 16), nn.Linear(16, 5, bias=False))
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match=r"'2' has a weight of its own, got \"that of '0'\""):
        use_cosine_head(model)
    model[2].weight = nn.Parameter(model[0].weight.detach().clone())
    assert list(cosine_heads(use_cosine_head(model))) == ["2"]


@pytest.mark.parametrize("training", [True, False])
def test_gradients_of_each_example_by_torch_func(training):
    model = use_cosine_head(Net()).train(training)
    x, target = examples(6), torch.arange(6) % 5
    weight = model.heads[0].weight.detach()
    before = model.heads[0].cosine_moments.clone()

    def loss(weight, features, label):
        logits = torch.func.functional_call(model, {"heads.0.weight": weight}, features[None])
        return F.cross_entropy(logits, label[None])

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))
    got = each(weight, x, target)
    assert model.heads[0].cosine_moments.equal(before)
    expected = []
    for features, label in zip(x, target, strict=True):
        rows = weight.clone().requires_grad_()
        logits = 30 * F.normalize(model.body(features), dim=0) @ F.normalize(rows).T
        expected += torch.autograd.grad(F.cross_entropy(logits, label), rows)
    torch.testing.assert_close(got, torch.stack(expected), rtol=1e-4, atol=1e-5)
