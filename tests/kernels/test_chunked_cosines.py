"""A cosine head without logits against the plain one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldam_plugins import ClassCounts, create_loss, list_losses, use_cosine_head
from ldam_plugins.kernels import chunked_cosines as chunked
from ldam_plugins.losses import loss_class

CLASSES, FEATURES, ROWS = 23, 6, 10
COUNTS = ClassCounts(range(5, 5 + CLASSES))
ABLE = [name for name in list_losses() if loss_class(name).takes_chunked_head]


@pytest.fixture(autouse=True, params=[1 << 22, 40, 1], ids=["whole", "chunks", "one by one"])
def _chunk(request, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK_ELEMENTS", request.param)


def heads(dtype=torch.float64):
    """The same head, plain and chunked."""
    plain = use_cosine_head(nn.Linear(FEATURES, CLASSES, dtype=dtype))
    twin = copy.deepcopy(plain)
    assert use_cosine_head(twin, chunked=True) is twin
    return plain, twin


def batch(dtype=torch.float64):
    target = torch.arange(ROWS) * 2 % CLASSES
    target[3] = -100
    return torch.randn(ROWS, FEATURES, dtype=dtype), target


def results(head, criterion, features, target, *more):
    features = features.clone().requires_grad_()
    value = criterion(head(features), target, *more)
    factors = torch.linspace(1, 2, value.numel(), dtype=value.dtype).view_as(value)
    return value, *torch.autograd.grad((value * factors).sum(), (features, head.weight))


@pytest.mark.parametrize("name", ABLE)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_value_and_gradients_are_those_of_the_plain_head(name, reduction):
    plain, twin = heads()
    with torch.no_grad():
        for head in (plain, twin):
            head.weight[4] = 0
            head.weight[5] *= 7
    features, target = batch()
    features[1] = 0
    criterion = create_loss(name, COUNTS, reduction=reduction).double()
    criterion.weight.copy_(COUNTS.weights(0.9, dtype=torch.float64))
    expected = results(plain, criterion, features, target)
    for got, wanted in zip(results(twin, criterion, features, target), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13)
    assert torch.equal(plain.cosine_moments, twin.cosine_moments)


def test_float32_and_16_bit():
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        plain, twin = heads(torch.float32)
        features, target = batch(dtype)
        criterion = create_loss("ldam", COUNTS)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            expected = results(plain, criterion, features, target)
            got = results(twin, criterion, features, target)
        for ours, wanted in zip(got, expected, strict=True):
            assert ours.dtype == wanted.dtype
            torch.testing.assert_close(ours, wanted, rtol=bound, atol=bound * 10)


def test_parts_add_up_with_a_denominator():
    plain, twin = heads()
    features, target = batch()
    criterion = create_loss("ldam", COUNTS)
    whole = criterion.denominator(target)
    expected = criterion(plain(features), target)
    parts = [criterion(twin(features[s]), target[s], whole) for s in (slice(0, 4), slice(4, 10))]
    torch.testing.assert_close(sum(parts), expected, rtol=1e-12, atol=0)


def test_trainer_form():
    plain, twin = heads()
    features, target = batch()
    criterion = create_loss("ldam", COUNTS)
    got, expected = (
        criterion.compute_loss_func({"logits": head(features)}, target, 10)
        for head in (twin, plain)
    )
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


def test_nothing_to_average_is_zero():
    _, twin = heads()
    criterion = create_loss("ldam", COUNTS)
    for rows in (0, 3):
        features = torch.randn(rows, FEATURES, dtype=torch.float64, requires_grad=True)
        loss = criterion(twin(features), torch.full((rows,), -100))
        gradients = torch.autograd.grad(loss, (features, twin.weight))
        assert loss.item() == 0
        assert all(gradient.abs().sum() == 0 for gradient in gradients)


def test_frozen_weight():
    _, twin = heads()
    twin.weight.requires_grad_(False)
    features, target = batch()
    features.requires_grad_()
    create_loss("ce", COUNTS)(twin(features), target).backward()
    assert features.grad.abs().max() > 0
    assert twin.weight.grad is None


def test_evaluation_gives_logits():
    plain, twin = heads()
    features, _ = batch()
    assert torch.equal(twin.eval()(features), plain.eval()(features))
    assert "chunked=True" in repr(twin)
    assert use_cosine_head(twin).chunked
    assert not use_cosine_head(twin, chunked=False).chunked
    assert not use_cosine_head(nn.Linear(2, 2)).chunked


def test_other_uses_are_refused():
    _, twin = heads()
    features, target = batch()
    for name in set(list_losses()) - set(ABLE):
        named = f"{loss_class(name).__name__}.*Only {', '.join(ABLE[:-1])} and {ABLE[-1]} do"
        with pytest.raises(TypeError, match=named):
            create_loss(name, COUNTS)(twin(features), target)
    with pytest.raises(TypeError, match=r"input of cross_entropy.*chunked=False"):
        F.cross_entropy(twin(features), target)
    with pytest.raises(ValueError, match="`target` must be int64 class indices"):
        create_loss("ce", COUNTS)(twin(features), torch.ones(ROWS, CLASSES))
    for label in (CLASSES, -1):
        with pytest.raises(IndexError, match=str(label)):
            create_loss("ldam", COUNTS)(twin(features), torch.full((ROWS,), label))
    with pytest.raises(ValueError, match=r"`input` must be of shape \(N, H\)"):
        twin(features[None])
    with pytest.raises(ValueError, match=r"`chunked`.*convolution"):
        use_cosine_head(nn.Sequential(nn.Conv2d(3, 4, 1)), head="0", chunked=True)
