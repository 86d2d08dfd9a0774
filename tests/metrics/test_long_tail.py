import json
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, f1_score, log_loss, recall_score

from ldam_plugins import ClassCounts
from ldam_plugins.metrics.long_tail import (
    ECE_BINS,
    MetricAccumulator,
    _exact_parts,
    long_tail_metrics,
)

KEYS = [
    "top1_error",
    "balanced_error",
    "train_prior_error",
    "balanced_accuracy",
    "worst_class_accuracy",
    "worst_class",
    "per_class_accuracy",
    "many",
    "medium",
    "few",
    "nll",
    "ece",
    *(f"{mean}_{name}" for mean in ("macro", "weighted") for name in ("precision", "recall", "f1")),
    "per_class_precision",
    "per_class_f1",
    "per_class_samples",
    "top5_accuracy",
]
COUNTS = ClassCounts([500, 101, 100, 20, 19, 1])


def make_rows(rows=400, classes=6, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, classes, (rows,), generator=generator)
    labels[:classes] = torch.arange(classes)
    logits = torch.randn(rows, classes, generator=generator)
    logits[torch.arange(rows), labels] += 1.0
    return logits.to(dtype), labels


def softmax(logits):
    return logits.double().softmax(dim=1).numpy()


def naive_ece(probabilities, labels):
    gap = 0.0
    for b in range(ECE_BINS):
        low, high = b / ECE_BINS, (b + 1) / ECE_BINS
        inside = [row for row in range(len(labels)) if low < max(probabilities[row]) <= high]
        if inside:
            confidence = sum(max(probabilities[row]) for row in inside) / len(inside)
            hits = sum(np.argmax(probabilities[row]) == labels[row] for row in inside)
            gap += len(inside) / len(labels) * abs(hits / len(inside) - confidence)
    return gap


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_against_scikit_learn(dtype):
    logits, labels = make_rows(dtype=dtype)
    result = long_tail_metrics(logits, labels, COUNTS)
    predicted, probabilities = logits.argmax(1), softmax(logits)
    recalls = recall_score(labels, predicted, average=None)
    assert list(result) == KEYS
    assert result["top1_error"] == pytest.approx(100 * (predicted != labels).double().mean().item())
    assert result["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, predicted))
    assert result["per_class_accuracy"] == pytest.approx(recalls.tolist())
    assert result["worst_class_accuracy"] == pytest.approx(recalls.min())
    assert result["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert result["nll"] == pytest.approx(log_loss(labels, probabilities), rel=1e-12)
    assert result["ece"] == pytest.approx(naive_ece(probabilities, labels.tolist()), rel=1e-12)
    assert result["ece"] > 0.01


def test_groups_are_those_of_the_training_counts_at_their_boundaries():
    logits, labels = make_rows()
    result = long_tail_metrics(logits, labels, COUNTS)
    accuracy = result["per_class_accuracy"]
    assert result["many"] == pytest.approx(np.mean(accuracy[0:2]))
    assert result["medium"] == pytest.approx(np.mean(accuracy[2:4]))
    assert result["few"] == pytest.approx(np.mean(accuracy[4:6]))


def test_a_class_counts_once_in_its_group_however_many_test_samples_it_has():
    logits = torch.eye(2)[[0] * 9 + [0]]
    result = long_tail_metrics(logits, torch.tensor([0] * 9 + [1]), [300, 200])
    assert result["many"] == result["balanced_accuracy"] == 0.5
    assert result["top1_error"] == pytest.approx(10.0)


def test_class_without_test_sample_is_none_and_in_no_mean():
    logits = torch.tensor([[2.0, 0, 0], [2.0, 0, 0]])
    result = long_tail_metrics(logits, [0, 1], [500, 50, 5])
    assert result["per_class_accuracy"] == [1.0, 0.0, None]
    assert result["balanced_accuracy"] == 0.5
    assert (result["many"], result["medium"], result["few"]) == (1.0, 0.0, None)
    assert result["macro_f1"] == f1_score([0, 1], [0, 0], average="macro") == 1 / 3
    right = long_tail_metrics(logits, [0, 0], [500, 50, 5])
    assert right["worst_class_accuracy"] == 1.0


def test_result_is_strict_json():
    logits, labels = make_rows()
    result = long_tail_metrics(logits, labels % 5, COUNTS)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    plain = [key for key in KEYS if not key.startswith("per_class") and key != "worst_class"]
    assert all(type(result[key]) is float for key in plain)
    assert [type(value) for value in result["per_class_accuracy"]] == [float] * 5 + [type(None)]


def test_ignored_rows_count_nowhere_even_when_they_are_nan():
    logits, labels = make_rows()
    kept = long_tail_metrics(logits[::2], labels[::2], COUNTS)
    logits[1::2] = float("nan")
    labels[1::2] = -100
    assert long_tail_metrics(logits, labels, COUNTS) == kept
    labels[1::2] = 7
    assert long_tail_metrics(logits, labels, COUNTS, ignore_index=7) == kept


@pytest.mark.parametrize(
    "convert",
    [
        lambda logits, labels: (logits.numpy(), labels.numpy()),
        lambda logits, labels: (logits.tolist(), labels.tolist()),
        lambda logits, labels: (logits.T.contiguous().T, labels[:, None].expand(-1, 2)[:, 0]),
        lambda logits, labels: (logits.numpy()[::-1][::-1], labels.int().numpy()[::-1][::-1]),
        lambda logits, labels: (logits, labels.to(torch.uint8)),
    ],
    ids=["arrays", "lists", "strided", "reversed", "uint8"],
)
def test_arrays_lists_and_strides_give_the_same(convert):
    logits, labels = make_rows(dtype=torch.float64)
    expected = long_tail_metrics(logits, labels, COUNTS)
    assert long_tail_metrics(*convert(logits, labels), COUNTS) == expected


def test_read_only_array_is_taken_and_left_alone():
    array = np.array([[2.0, 0.0], [0.0, 2.0]], dtype=np.float32)
    array.flags.writeable = False
    assert long_tail_metrics(array, np.array([0, 1]), [5, 5])["top1_error"] == 0.0


def test_logits_that_need_a_gradient_are_taken():
    logits = torch.zeros(2, 2, requires_grad=True)
    assert long_tail_metrics(logits * 1, [0, 1], [5, 5])["nll"] == pytest.approx(math.log(2))


def test_of_equal_logits_the_first_is_the_prediction():
    result = long_tail_metrics(torch.zeros(3, 3), [0, 1, 2], [9, 9, 9])
    assert result["per_class_accuracy"] == [1.0, 0.0, 0.0]


def test_certain_predictions_fall_into_the_last_bin():
    logits = torch.tensor([[1e4, 0.0], [0.0, 1e4], [1e4, 0.0], [1e4, 0.0]])
    result = long_tail_metrics(logits, [0, 1, 0, 1], [9, 9])
    assert result["ece"] == 0.25
    assert result["nll"] == 2500.0


def test_minus_infinity_masks_classes_that_are_not_the_label():
    masked = torch.tensor([[0.0, 0.0, -math.inf]])
    assert long_tail_metrics(masked, [1], [9, 9, 9])["nll"] == pytest.approx(math.log(2))


@pytest.mark.parametrize("parts", [2, 3, 50])
def test_parts_in_any_order_give_the_same_bits(parts):
    logits, labels = make_rows(rows=401)
    expected = long_tail_metrics(logits, labels, COUNTS)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(parts))
    fed, merged = MetricAccumulator(COUNTS), MetricAccumulator(COUNTS)
    for rows in order.tensor_split(parts):
        fed.update(logits[rows], labels[rows])
        part = MetricAccumulator(COUNTS)
        part.update(logits[rows], labels[rows])
        merged.merge(pickle.loads(pickle.dumps(part)))
    assert fed.compute() == expected
    assert merged.compute() == expected
    assert fed._nll == merged._nll


def test_rows_alone_or_together_give_the_same_bits_on_several_threads():
    threads = torch.get_num_threads()
    logits = 3 * torch.randn(40, 100_000, generator=torch.Generator().manual_seed(2))
    counts = np.full(100_000, 30)
    labels = torch.arange(40)
    torch.set_num_threads(2)
    try:
        one_by_one = MetricAccumulator(counts)
        for row in range(40):
            one_by_one.update(logits[row : row + 1], labels[row : row + 1])
        assert one_by_one.compute() == long_tail_metrics(logits, labels, counts)
    finally:
        torch.set_num_threads(threads)


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32)), st.randoms())
def test_exact_parts_keep_the_exact_sum_in_any_order(values, random):
    parts = _exact_parts([], values)
    assert sum(map(Fraction, parts)) == sum(map(Fraction, values))
    random.shuffle(values)
    middle = len(values) // 2
    assert _exact_parts(_exact_parts([], values[:middle]), values[middle:]) == parts
    assert len(parts) <= 12


def test_chunks_of_rows_do_not_matter(monkeypatch):
    logits, labels = make_rows()
    labels[::3] = -100
    expected = long_tail_metrics(logits, labels, COUNTS)
    monkeypatch.setattr("ldam_plugins.metrics.rows._CHUNK_ELEMENTS", 40)
    assert long_tail_metrics(logits, labels, COUNTS) == expected


def test_hundred_thousand_classes_need_no_square_matrix():
    classes = 100_000
    logits, labels = torch.zeros(16, classes), torch.arange(16) * 1000
    logits[torch.arange(16), labels] = 50.0
    result = long_tail_metrics(logits, labels, np.full(classes, 5))
    assert result["few"] == 1.0
    assert sum(value is not None for value in result["per_class_accuracy"]) == 16


def test_one_class():
    result = long_tail_metrics(torch.zeros(3, 1), [0, 0, 0], [7])
    assert (result["top1_error"], result["nll"], result["ece"]) == (0.0, 0.0, 0.0)


def test_empty_batch_adds_nothing():
    logits, labels = make_rows()
    accumulator = MetricAccumulator(COUNTS)
    accumulator.update(torch.zeros(0, 6), torch.zeros(0, dtype=torch.long))
    accumulator.update(logits, labels)
    accumulator.update(logits[:0], [])
    assert accumulator.compute() == long_tail_metrics(logits, labels, COUNTS)


def test_reset_forgets():
    logits, labels = make_rows()
    accumulator = MetricAccumulator(COUNTS)
    accumulator.update(logits, (labels + 1) % 6)
    accumulator.reset()
    accumulator.update(logits, labels)
    assert accumulator.compute() == long_tail_metrics(logits, labels, COUNTS)


def test_compute_may_be_called_between_updates():
    logits, labels = make_rows()
    accumulator = MetricAccumulator(COUNTS)
    accumulator.update(logits[:200], labels[:200])
    assert accumulator.compute() == long_tail_metrics(logits[:200], labels[:200], COUNTS)
    accumulator.update(logits[200:], labels[200:])
    assert accumulator.compute() == long_tail_metrics(logits, labels, COUNTS)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("logits", "labels", "error", "message"),
    [
        (torch.zeros(2, 3), [0, 1], ValueError, r"`logits` must be of shape \(N, 2\).*\(2, 3\)"),
        (torch.zeros(2), [0, 1], ValueError, r"`logits` must be of shape.*\(2,\)"),
        ([[1.0, 2.0], [1.0]], [0, 1], ValueError, "`logits` .*rows of different lengths"),
        (torch.zeros(2, 2).long(), [0, 1], TypeError, "`logits` must be a floating.*int64"),
        ([["a", "b"]], [0], TypeError, "`logits` must be floating-point"),
        (torch.tensor([[0, 0], [NAN, 0]]), [0, 1], ValueError, "finite, got 'NaN in row 1'"),
        (torch.tensor([[INF, 0.0]]), [0], ValueError, "an infinite value in row 0"),
        (torch.tensor([[0.0, -INF]]), [1], ValueError, "an infinite value in row 0"),
        (torch.zeros(2, 2), [0, 2], ValueError, r"`labels` must be class indices in 0\.\.1.*2 in"),
        (torch.zeros(2, 2), [-100, -1], ValueError, "-1 in row 1"),
        (torch.zeros(2, 2), [0, 1, 1], ValueError, r"`labels` must be of shape \(2,\).*\(3,\)"),
        (torch.zeros(2, 2), torch.eye(2), ValueError, r"`labels`.*\(2, 2\).*labels\.argmax\(-1\)"),
        (torch.zeros(2, 2), [0.0, 1.0], TypeError, "`labels` must be integers"),
        (torch.zeros(2, 2), ["cat", "dog"], TypeError, "`labels` must be integers"),
        (torch.zeros(2, 2), [-100, -100], ValueError, r"`labels`.*-100 \(ignore_index\).*one row"),
        (torch.zeros(0, 2), [], ValueError, "at least one row"),
    ],
)
def test_bad_input(logits, labels, error, message):
    with pytest.raises(error, match=message):
        long_tail_metrics(logits, labels, [50, 5])


def test_nan_is_named_by_its_row_among_ignored_ones_and_leaves_the_sums_alone(monkeypatch):
    monkeypatch.setattr("ldam_plugins.metrics.rows._CHUNK_ELEMENTS", 12)
    logits, labels = make_rows()
    accumulator = MetricAccumulator(COUNTS)
    accumulator.update(logits, labels)
    before = accumulator.compute()
    logits[7], labels[:7] = NAN, -100
    with pytest.raises(ValueError, match="NaN in row 7"):
        accumulator.update(logits, labels)
    assert accumulator.compute() == before


def test_merge_refuses_other_classes_and_other_ignored_labels():
    with pytest.raises(ValueError, match="`other` must be an accumulator for"):
        MetricAccumulator([5, 5]).merge(MetricAccumulator([5, 6]))
    with pytest.raises(ValueError, match="ignore_index -100"):
        MetricAccumulator([5, 5]).merge(MetricAccumulator([5, 5], ignore_index=-1))


@pytest.mark.parametrize(
    ("shape", "hint"), [((60, 1), r"squeeze\(-1\)"), ((60, 6), "argmax"), ((60, 7), "a token")]
)
def test_labels_of_two_axes_are_told_what_they_are(shape, hint):
    logits, _ = make_rows(rows=60)
    with pytest.raises(ValueError, match=rf"`labels` must be .*{hint}"):
        long_tail_metrics(logits, torch.zeros(shape, dtype=torch.int64), COUNTS)
