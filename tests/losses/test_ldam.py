"""LDAM, and its form with one margin for all classes."""

import pytest
import torch
import torch.nn.functional as F

from ldam_plugins import ClassCounts, LDAMLoss
from ldam_plugins.counts import DEFAULT_MAX_MARGIN
from ldam_plugins.losses import UniformMarginLoss, ldam_loss
from ldam_plugins.losses.ldam import DEFAULT_SCALE

COUNTS = ClassCounts([5000, 1077, 232, 50])
CLASSES = len(COUNTS)
SCALE = 30.0


def batch():
    logits = 5 * torch.randn(16, CLASSES, dtype=torch.float64)
    return logits, torch.randint(CLASSES, (16,))


@pytest.mark.parametrize("weighted", [False, True])
def test_paper_formula_on_cosines(weighted):
    torch.manual_seed(1)
    features = torch.randn(12, 7, dtype=torch.float64, requires_grad=True)
    directions = torch.randn(CLASSES, 7, dtype=torch.float64, requires_grad=True)
    target = torch.randint(CLASSES, (12,))
    criterion = LDAMLoss(COUNTS, max_margin=0.5, scale=SCALE).double()
    if weighted:
        criterion.weight.copy_(COUNTS.weights(dtype=torch.float64))

    def cosines():
        return F.normalize(features, dim=1) @ F.normalize(directions, dim=1).T

    total, weight_sum = 0, 0
    for cos, y in zip(cosines(), target.tolist(), strict=True):
        delta = 0.5 * (COUNTS.counts[y] / COUNTS.counts.min()) ** -0.25
        top = torch.exp(SCALE * (cos[y] - delta))
        rest = sum(torch.exp(SCALE * cos[j]) for j in range(CLASSES) if j != y)
        total = total - criterion.weight[y] * torch.log(top / (top + rest))
        weight_sum = weight_sum + criterion.weight[y]
    expected = total / weight_sum
    got = criterion(SCALE * cosines(), target)
    assert got.item() == pytest.approx(expected.item(), rel=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(got, (features, directions)),
        torch.autograd.grad(expected, (features, directions)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)


def test_soft_targets_take_the_margin_in_proportion():
    logits, _ = batch()
    target_probs = torch.softmax(torch.randn(16, CLASSES, dtype=torch.float64), dim=1)
    margins = COUNTS.margins(dtype=torch.float64)
    expected = F.cross_entropy(logits - SCALE * margins * target_probs, target_probs)
    torch.testing.assert_close(ldam_loss(logits, target_probs, margins), expected)


def test_vmap_of_grad():
    logits, target = batch()
    margins = COUNTS.margins(dtype=torch.float64)
    single = lambda z, y: ldam_loss(z[None], y[None], margins)  # noqa: E731
    got = torch.func.vmap(torch.func.grad(single))(logits, target)
    logits.requires_grad_()
    loss = ldam_loss(logits, target, margins, reduction="sum")
    torch.testing.assert_close(got, torch.autograd.grad(loss, logits)[0])


def test_buffers_keep_their_precision():
    exact = COUNTS.margins(dtype=torch.float64)
    loss = LDAMLoss(COUNTS)
    assert (loss.weight.dtype, loss.margins.dtype) == (torch.float32, torch.float32)
    assert LDAMLoss(COUNTS).half().margins.dtype == torch.float32
    assert LDAMLoss(COUNTS).double().weight.dtype == torch.float64
    logits, target = batch()
    expected = ldam_loss(logits, target, exact)
    assert loss(logits, target).item() == expected.item()  # float64 logits, float32 module


def test_defaults_are_the_papers():
    assert (DEFAULT_MAX_MARGIN, DEFAULT_SCALE) == (0.5, 30.0)
    for loss in (LDAMLoss(COUNTS), UniformMarginLoss(COUNTS)):
        assert (loss.max_margin, loss.scale) == (0.5, 30.0)


def test_what_it_says_of_itself():
    for loss in (LDAMLoss, UniformMarginLoss):
        assert loss.needs_cosine_head
        assert loss.takes_chunked_head
        assert not loss.corrects_prior


def test_equal_counts_have_one_margin():
    logits, target = batch()
    equal = [7] * CLASSES
    assert LDAMLoss(equal)(logits, target) == UniformMarginLoss(COUNTS)(logits, target)


def test_repr_tells_the_options():
    assert "max_margin=0.3, scale=20.0" in repr(LDAMLoss(COUNTS, 0.3, 20))


LOGITS, TARGET = torch.zeros(2, CLASSES), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LDAMLoss(COUNTS, max_margin=-1), r"`max_margin`"),
        (lambda: LDAMLoss(COUNTS, scale=0), r"`scale` must be .*> 0, got 0"),
        (lambda: ldam_loss(LOGITS, TARGET, torch.ones(3)), r"`margins`.*\(4,\)"),
        (lambda: ldam_loss(LOGITS, TARGET, torch.ones(4), scale=0), r"`scale`"),
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
