"""What is true of every loss."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from exact_losses import exact_row
from torch import nn
from torch._dynamo.testing import CompileCounter

from ldam_plugins import ClassCounts, LDAMLoss, create_loss, list_losses

COUNTS = ClassCounts([5000, 1077, 232, 50])
CLASSES = 4


def batch(rows=16, dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    logits = 5 * torch.randn(rows, CLASSES, generator=generator, dtype=dtype)
    return logits, torch.randint(CLASSES, (rows,), generator=generator)


@pytest.fixture(params=list_losses())
def name(request):
    return request.param


@pytest.fixture(params=[False, True], ids=["plain", "weighted"])
def criterion(name, request):
    loss = create_loss(name, COUNTS).double()
    if request.param:
        loss.weight.copy_(COUNTS.weights(0.999, dtype=torch.float64))
    return loss


def test_value_equals_the_definition(name, criterion):
    logits, target = batch()
    rows = [
        float(exact_row(name, COUNTS.counts.tolist(), z, y, 0.5)[0])
        for z, y in zip(logits.tolist(), target.tolist(), strict=True)
    ]
    w = [criterion.weight[y].item() for y in target]
    weighted = [wi * li for wi, li in zip(w, rows, strict=True)]
    criterion.reduction = "none"
    assert criterion(logits, target).tolist() == pytest.approx(weighted, rel=1e-12, abs=1e-13)
    criterion.reduction = "sum"
    assert criterion(logits, target).item() == pytest.approx(sum(weighted), rel=1e-12)
    criterion.reduction = "mean"
    assert criterion(logits, target).item() == pytest.approx(sum(weighted) / sum(w), rel=1e-12)


def test_gradient_is_right(criterion):
    logits, target = batch(rows=5)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: criterion(z, target), (logits,), eps=1e-7)


def test_one_hot_targets_equal_indices(criterion):
    logits, target = batch()
    target_probs = F.one_hot(target, CLASSES).double()
    criterion.reduction = "none"
    expected, got = criterion(logits, target), criterion(logits, target_probs)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("ignore_index", [-100, 255, 2])
def test_ignored_rows_count_nowhere(name, ignore_index):
    logits, target = batch()
    target[target == ignore_index] = 0
    ignored = torch.arange(16) % 3 == 0
    logits.requires_grad_()
    loss = create_loss(name, COUNTS, ignore_index=ignore_index)
    loss.weight.copy_(COUNTS.weights())
    marked = torch.where(ignored, ignore_index, target)
    got, expected = loss(logits, marked), loss(logits[~ignored], target[~ignored])
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
    (gradient,) = torch.autograd.grad(got, logits)
    assert gradient[ignored].abs().max() == 0
    loss.reduction = "none"
    assert loss(logits, marked)[ignored].abs().max() == 0


def test_nothing_to_average_is_zero_with_zero_gradient(criterion):
    for rows in (0, 3):
        logits = torch.randn(rows, CLASSES, dtype=torch.float64, requires_grad=True)
        loss = criterion(logits, torch.full((rows,), -100))
        assert loss.item() == 0
        assert torch.autograd.grad(loss, logits)[0].abs().sum() == 0


def test_parts_add_up_to_the_whole(criterion):
    logits, target = batch()
    target[5] = -100
    whole = criterion.denominator(target)
    parts = [criterion(logits[s], target[s], whole) for s in (slice(0, 3), slice(3, 16))]
    assert sum(parts).item() == pytest.approx(criterion(logits, target).item(), rel=1e-12)
    denominators = [criterion.denominator(target[s]) for s in (slice(0, 3), slice(3, 16))]
    assert sum(denominators).item() == pytest.approx(whole.item(), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_are_computed_in_float32(name, dtype):
    logits, target = batch()
    loss = create_loss(name, COUNTS)
    low = logits.to(dtype).requires_grad_()
    got = loss(low, target)
    assert got.dtype == torch.float32
    assert got.item() == loss(low.float(), target).item()
    got.backward()
    assert low.grad.dtype == dtype


def test_autocast_changes_nothing(criterion):
    logits, target = batch(dtype=torch.float32)
    expected = criterion(logits, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert criterion(logits, target).item() == expected.item()


@pytest.mark.parametrize("size", [1e4, 1e-4])
def test_extreme_logits_stay_finite(name, size):
    logits = (size * torch.tensor([[1.0, -1, 1, 0], [-1, 1, 0, 1]])).requires_grad_()
    loss = create_loss(name, COUNTS)(logits, torch.tensor([1, 3]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


def test_one_class(name):
    logits = torch.randn(3, 1, requires_grad=True)
    loss = create_loss(name, [5])(logits, torch.zeros(3, dtype=torch.int64))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, logits)[0].abs().max() == 0


def test_caller_keeps_his_logits(criterion):
    logits, target = batch()
    before = logits.clone()
    criterion(logits, target)
    assert torch.equal(logits, before)


def test_compiled_is_the_same_in_one_graph_for_all_weights(name):
    torch._dynamo.reset()
    counter = CompileCounter()
    loss = create_loss(name, COUNTS)
    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    logits, target = batch(dtype=torch.float32)
    for weights in (COUNTS.weights(0), COUNTS.weights()):
        loss.weight.copy_(weights)
        torch.testing.assert_close(compiled(logits, target), loss(logits, target))
    assert counter.frame_count == 1


def test_weight_is_saved_and_the_module_copies():
    loss = LDAMLoss(COUNTS)
    assert torch.equal(loss.weight, torch.ones(CLASSES))
    loss.weight.copy_(COUNTS.weights())
    assert list(loss.state_dict()) == ["weight"]
    assert list(loss.parameters()) == []
    for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert torch.equal(twin.weight, loss.weight)


def test_mean_weight_is_that_of_a_training_sample():
    loss = LDAMLoss(COUNTS)
    assert loss.mean_weight().item() == pytest.approx(1)
    loss.weight.copy_(COUNTS.weights())
    samples = COUNTS.weights().repeat_interleave(torch.tensor(COUNTS.counts))
    assert loss.mean_weight().item() == pytest.approx(samples.mean().item(), rel=1e-5)


class TestTrainerForm:
    """`compute_loss_func`: what transformers.Trainer calls."""

    def test_sum_over_items_times_mean_weight(self, criterion):
        logits, target = batch()
        criterion.reduction = "sum"
        total = criterion(logits, target).item()
        criterion.reduction = "mean"
        got = criterion.compute_loss_func({"logits": logits}, target, torch.tensor(64)).item()
        assert got == pytest.approx(total / (64 * criterion.mean_weight().item()), rel=1e-6)

    @pytest.mark.parametrize("items", [16, None, torch.tensor(16), torch.tensor([[16]])])
    def test_items_in_every_form(self, items):
        logits, target = batch()
        loss = create_loss("ldam", COUNTS)
        got = loss.compute_loss_func((logits,), target, items).item()
        assert got == pytest.approx(loss(logits, target).item(), rel=1e-6)

    def test_data_parallel_multiplies_by_its_devices(self):
        logits, target = batch()
        loss = create_loss("ldam", COUNTS)
        got = loss.compute_loss_func((logits,), target, torch.tensor([[16], [16]])).item()
        assert 2 * got == pytest.approx(loss(logits, target).item(), rel=1e-6)

    def test_soft_targets_are_counted_by_entries(self):
        logits, target = batch()
        target_probs = F.one_hot(target, CLASSES).double()
        loss = create_loss("ldam", COUNTS)
        got = loss.compute_loss_func((logits,), target_probs, torch.tensor(16 * CLASSES)).item()
        assert got == pytest.approx(loss(logits, target).item(), rel=1e-6)

    def test_evaluation_is_plain_cross_entropy(self, criterion):
        logits, target = batch()
        with torch.no_grad():
            got = criterion.compute_loss_func({"logits": logits}, target, 16).item()
        assert got == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-6)

    def test_missing_labels(self):
        with pytest.raises(ValueError, match=r"`labels` must be a tensor.*Name the label column"):
            create_loss("ce", COUNTS).compute_loss_func({"logits": batch()[0]}, None, 4)


def test_moves_with_a_parent():
    parent = nn.ModuleDict({"loss": LDAMLoss(COUNTS)}).to("meta")
    assert parent["loss"].weight.is_meta


LOGITS, TARGET = torch.zeros(2, CLASSES), torch.zeros(2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: create_loss("ldam", []), ValueError, r"`counts`"),
        (lambda: LDAMLoss(COUNTS, reduction="avg"), ValueError, r"`reduction`.*'avg'"),
        (lambda: LDAMLoss(COUNTS, ignore_index=1.5), TypeError, r"`ignore_index`"),
        (lambda: LDAMLoss([3, 2])(LOGITS, TARGET), ValueError, r"\(N, 2\).*got \(2, 4\)"),
        (lambda: LDAMLoss(COUNTS)(LOGITS[0], TARGET), ValueError, r"`logits`"),
        (lambda: LDAMLoss(COUNTS)(LOGITS.long(), TARGET), TypeError, r"floating-point"),
        (lambda: LDAMLoss(COUNTS)(LOGITS, TARGET.float()), TypeError, r"target\.long\(\)"),
        (lambda: LDAMLoss(COUNTS)(LOGITS, TARGET.int()), TypeError, r"target\.long\(\)"),
        (lambda: LDAMLoss(COUNTS)(LOGITS, LOGITS.long()), TypeError, r"target\.float\(\)"),
        (lambda: LDAMLoss(COUNTS)(LOGITS, TARGET[:1]), ValueError, r"\(2,\) or \(2, 4\)"),
        (lambda: LDAMLoss(COUNTS)(LOGITS, TARGET + 4), (IndexError, RuntimeError), r"4"),
        (
            lambda: LDAMLoss(COUNTS, reduction="sum")(LOGITS, TARGET, 3.0),
            ValueError,
            r"`denominator`",
        ),
    ],
)
def test_bad_input_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
