"""The fast path of ldam_loss against the definition it stands for."""

import math

import pytest
import torch
import torch.nn.functional as F

from ldam_plugins.kernels import _margin_cross_entropy_cpu as fast
from ldam_plugins.losses import ldam_loss

CLASSES, SCALE = 7, 30.0
MARGINS = torch.linspace(0.1, 0.5, CLASSES, dtype=torch.float64)
WEIGHT = torch.linspace(0.5, 2, CLASSES, dtype=torch.float64)


@pytest.fixture(autouse=True, params=[1 << 18, 3 * CLASSES], ids=["whole", "chunks"])
def _fast_at_any_size(request, monkeypatch):
    monkeypatch.setattr(fast, "FEWEST_ELEMENTS", 0)
    monkeypatch.setattr(fast, "CHUNK_ELEMENTS", request.param)


# torch itself scripts its derivatives when forward mode is first used.
scripted = pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")


def batch(rows=16, size=5.0):
    return size * torch.randn(rows, CLASSES, dtype=torch.float64), torch.arange(rows) % CLASSES


def definition(logits, target, **options):
    shift = SCALE * MARGINS * F.one_hot(target.clamp_min(0), CLASSES)
    return F.cross_entropy(logits - shift, target, **options)


def loss(logits, target, **options):
    return ldam_loss(logits, target, MARGINS, scale=SCALE, **options)


def assert_agree(logits, target, defined, path, **options):
    """The loss takes the path, and has the value and the gradient of the definition."""
    before = logits.clone()
    pair = [z.requires_grad_() for z in (logits, logits.clone())]
    got, expected = loss(pair[0], target, **options), defined(pair[1], target, **options)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    ours, theirs = torch.autograd.grad(3 * got, pair[0]), torch.autograd.grad(3 * expected, pair[1])
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    assert path in got.grad_fn.name()
    assert torch.equal(logits, before)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weighted"])
@pytest.mark.parametrize("size", [0.01, 5.0, 300.0, 1e4])
def test_value_and_gradient(reduction, weight, size):
    logits, target = batch(size=size)
    target[::4] = -100
    assert_agree(logits, target, definition, "OfIndices", weight=weight, reduction=reduction)


def test_confident_rows_keep_their_digits_in_float32():
    target = torch.arange(CLASSES)
    logits = (20 * torch.eye(CLASSES)).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    got, expected = loss(logits, target), definition(exact, target)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)
    ours, theirs = torch.autograd.grad(got, logits)[0], torch.autograd.grad(expected, exact)[0]
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-7)


@scripted
def test_derivatives_of_every_order():
    logits, target = batch(rows=4)
    target[1] = -100
    logits.requires_grad_()
    function = lambda z: loss(z, target, weight=WEIGHT)  # noqa: E731
    assert torch.autograd.gradcheck(function, logits, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, logits)


def test_graph_can_be_used_twice():
    logits, target = batch()
    logits.requires_grad_()
    value = loss(logits, target)
    first, second = (torch.autograd.grad(value, logits, retain_graph=True) for _ in range(2))
    assert torch.equal(first[0], second[0])


@scripted
def test_transforms_take_the_definition():
    logits, target = batch()
    hessian = torch.func.hessian(lambda z: loss(z[None], target[:1]))(logits[0])
    expected = torch.func.hessian(lambda z: definition(z[None], target[:1]))(logits[0])
    torch.testing.assert_close(hessian, expected)


def target_probs(rows=16):
    """Mixed labels; those of one row are all 0."""
    q = torch.rand(rows, CLASSES, dtype=torch.float64).softmax(1)
    q[0] = 0
    return q


def definition_of_target_probs(logits, q, **options):
    return F.cross_entropy(logits - SCALE * MARGINS * q, q, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weighted"])
@pytest.mark.parametrize("size", [0.01, 5.0, 300.0, 1e4])
def test_value_and_gradient_at_target_probs(reduction, weight, size):
    logits, q = batch(size=size)[0], target_probs()
    given = q.clone()
    options = {"weight": weight, "reduction": reduction}
    assert_agree(logits, q, definition_of_target_probs, "OfTargetProbs", **options)
    assert torch.equal(q, given)


@scripted
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weighted"])
def test_derivatives_of_every_order_at_target_probs(weight):
    logits, q = batch(rows=4)[0].requires_grad_(), target_probs(4)
    function = lambda z: loss(z, q, weight=weight)  # noqa: E731
    assert torch.autograd.gradcheck(function, logits, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, logits)


def test_learned_target_probs_get_gradients():
    logits, q = batch()[0], target_probs().requires_grad_()
    got = torch.autograd.grad(loss(logits, q), q)[0]
    again = q.detach().requires_grad_()
    expected = torch.autograd.grad(definition_of_target_probs(logits, again), again)[0]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", ["indices", "soft"])
def test_gradients_of_several_factors_at_once(kind):
    logits, target = batch()
    logits.requires_grad_()
    value = loss(logits, target if kind == "indices" else target_probs())
    factors = torch.tensor([1.0, -2.0], dtype=torch.float64)
    (both,) = torch.autograd.grad(value, logits, factors, retain_graph=True, is_grads_batched=True)
    (one,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(both, factors[:, None, None] * one)


@pytest.mark.parametrize("kind", ["indices", "soft"])
def test_a_gradient_may_be_written_into(kind):
    """What a backward pass gave is the caller's: the next one gives the right values again."""
    logits, target = batch()
    logits.requires_grad_()
    value = loss(logits, target if kind == "indices" else target_probs())
    gradients = []
    for again in (True, True, False):
        (got,) = torch.autograd.grad(value, logits, retain_graph=again)
        gradients.append(got.clone())
        got.zero_()
    assert all(torch.equal(got, gradients[0]) for got in gradients)


@pytest.mark.parametrize("kind", ["indices", "soft"])
def test_gradients_add_up_where_logits_are_a_leaf(kind):
    logits, target = batch()
    logits.requires_grad_()
    target = target if kind == "indices" else target_probs()
    (once,) = torch.autograd.grad(loss(logits, target), logits)
    value = loss(logits, target)
    value.backward(retain_graph=True)
    value.backward()
    torch.testing.assert_close(logits.grad, 2 * once)


@pytest.mark.parametrize("kind", ["indices", "soft"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradient_is_rounded_from_float32(dtype, kind):
    logits, target = batch(rows=64)
    target = target if kind == "indices" else target_probs(64).float()
    low = logits.to(dtype).requires_grad_()
    wide = low.detach().float().requires_grad_()
    torch.testing.assert_close(loss(low, target), loss(wide, target), rtol=1e-6, atol=0)
    ours = torch.autograd.grad(loss(low, target), low)[0]
    theirs = torch.autograd.grad(loss(wide, target), wide)[0]
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.float(), theirs, rtol=torch.finfo(dtype).eps / 2, atol=1e-7)


def test_loss_scaling_keeps_small_gradients_of_float16():
    logits = torch.tensor([[18.0, 0.0]], dtype=torch.float16, requires_grad=True)
    value = ldam_loss(logits, torch.tensor([0]), torch.tensor([0.0, 0.0]))
    (gradient,) = torch.autograd.grad(value * 2**16, logits)
    assert gradient[0, 1].item() == pytest.approx(2**16 / (1 + math.exp(18)), rel=1e-3)


def test_learned_margins_get_gradients():
    logits, target = batch()
    learned = MARGINS.clone().requires_grad_()
    ldam_loss(logits, target, learned).backward()
    # d loss / d margin = scale * mean(1 - p_y): positive where the class has a sample.
    assert learned.grad.min() > 0


@pytest.mark.parametrize("label", [CLASSES, -1])
def test_labels_out_of_range_are_refused(label):
    logits, target = batch()
    target[2] = label
    with pytest.raises((IndexError, RuntimeError), match=str(label)):
        loss(logits, target)


def test_export():
    module = type("M", (torch.nn.Module,), {"forward": lambda self, z, y: loss(z, y)})()
    logits, target = batch()
    exported = torch.export.export(module, (logits, target)).module()
    torch.testing.assert_close(exported(logits, target), loss(logits, target))
