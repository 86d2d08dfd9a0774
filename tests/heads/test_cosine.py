"""Putting the cosine head on: where it goes, what it keeps, and what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from head_models import Net, examples, ordinary
from torch import nn

from ldam_plugins.heads import (
    CosineConv2d,
    CosineLinear,
    cosine_heads,
    fold_cosine_head,
    use_cosine_head,
)
from ldam_plugins.heads.cosine import attach_cosine_head
from ldam_plugins.heads.finder import class_count


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


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


def test_a_head_is_attached_once_with_the_old_directions_of_length_1():
    model = Net()
    old = model.heads[0].weight.detach().clone()
    assert class_count(model) is None
    assert attach_cosine_head(model, 20.0)
    head = model.heads[0]
    assert (head.scale, class_count(model)) == (20.0, 5)
    torch.testing.assert_close(head.weight, F.normalize(old))
    assert not attach_cosine_head(model, 20.0)
    assert model.heads[0] is head
    with pytest.raises(ValueError, match=r"`scale` must be 20.*head=\.\.\."):
        attach_cosine_head(model, 30.0)
