"""Precision, recall, F1, top-5, confusion and areas, with scikit-learn as the oracle."""

import numpy as np
import pytest
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    precision_recall_fscore_support,
    roc_auc_score,
    top_k_accuracy_score,
)

from ldam_plugins.metrics import MetricAccumulator, long_tail_metrics
from ldam_plugins.metrics.ranking import Ranking


def make_rows(classes, rows=300, seed=0, left_out=()):
    """Logits and labels of which some classes have no sample, though they may be predicted."""
    generator = np.random.default_rng(seed)
    kept = np.setdiff1d(np.arange(classes), left_out)
    labels = generator.choice(kept, rows, p=np.arange(1, len(kept) + 1) / sum(range(len(kept) + 1)))
    logits = generator.normal(size=(rows, classes))
    logits[np.arange(rows), labels] += 1.0
    return logits, labels


@pytest.mark.parametrize(
    ("classes", "left_out"),
    [(2, ()), (3, (1,)), (7, ()), (30, (0, 12, 29)), (400, tuple(range(360, 400)))],
)
def test_scores_of_classes_and_their_averages(classes, left_out):
    logits, labels = make_rows(classes, left_out=left_out)
    predicted = logits.argmax(1)
    found = long_tail_metrics(logits, labels, [50] * classes)
    for average in ("macro", "weighted"):
        values = precision_recall_fscore_support(
            labels, predicted, average=average, zero_division=0
        )
        for name, value in zip(("precision", "recall", "f1"), values, strict=False):
            assert found[f"{average}_{name}"] == pytest.approx(value, rel=1e-12), name
    each = precision_recall_fscore_support(
        labels, predicted, labels=range(classes), average=None, zero_division=np.nan
    )
    for name, values in zip(("precision", "accuracy", "f1", "samples"), each, strict=True):
        expected = [None if np.isnan(value) else pytest.approx(value) for value in values]
        assert found[f"per_class_{name}"] == expected, name
    if left_out:  # where a class is predicted that has no test sample, recall 0/0 counts as 0
        assert set(left_out) & set(predicted)
        assert found["macro_recall"] < found["balanced_accuracy"]
    else:
        assert found["macro_recall"] == pytest.approx(found["balanced_accuracy"])


@pytest.mark.parametrize("classes", [6, 40])
def test_top5(classes):
    logits, labels = make_rows(classes, left_out=(2,))
    expected = top_k_accuracy_score(labels, logits, k=5, labels=range(classes))
    assert long_tail_metrics(logits, labels, [9] * classes)["top5_accuracy"] == expected
    assert 0.2 < expected < 1


def test_top5_counts_equal_logits_as_the_prediction_does_and_needs_six_classes():
    found = long_tail_metrics(np.zeros((8, 8)), range(8), [9] * 8)
    assert found["top5_accuracy"] == 5 / 8
    assert long_tail_metrics(np.zeros((6, 8)), [5] * 6, [9] * 8)["top5_accuracy"] == 0
    assert "top5_accuracy" not in long_tail_metrics(np.zeros((5, 5)), range(5), [9] * 5)


@pytest.mark.parametrize("classes", [2, 9])
def test_confusion(classes):
    logits, labels = make_rows(classes)
    found = long_tail_metrics(logits, labels, [9] * classes, detailed=True)["confusion"]
    matrix = np.zeros((classes, classes), dtype=int)
    matrix[found["true"], found["predicted"]] = found["samples"]
    assert (matrix == confusion_matrix(labels, logits.argmax(1))).all()
    assert min(found["samples"]) > 0


def test_confusion_of_many_classes_holds_what_occurs():
    classes = 20_000
    logits = np.zeros((4, classes), dtype=np.float32)
    logits[range(4), [3, 17_000, 3, 19_999]] = 1.0
    labels = [3, 5, 3, 19_999]
    found = long_tail_metrics(logits, labels, [9] * classes, detailed=True)
    assert found["confusion"] == {
        "true": [3, 5, 19_999],
        "predicted": [3, 17_000, 19_999],
        "samples": [2, 1, 1],
    }


@pytest.mark.parametrize("rounding", [0.01, 1.0])
def test_areas_of_two_classes_with_and_without_ties(rounding):
    logits, labels = make_rows(2, seed=3)
    logits = np.round(logits / rounding) * rounding
    scores = logits[:, 1] - logits[:, 0]
    found = long_tail_metrics(logits, labels, [9, 5])
    assert found["auroc"] == pytest.approx(roc_auc_score(labels, scores), rel=1e-12)
    each = [average_precision_score(labels == c, scores * (2 * c - 1)) for c in (0, 1)]
    assert found["per_class_average_precision"] == pytest.approx(each, rel=1e-12)
    assert each[0] != pytest.approx(each[1])
    assert found["average_precision"] == found["per_class_average_precision"][1]
    assert long_tail_metrics(logits, labels, [9, 9])["average_precision"] == pytest.approx(each[1])
    assert long_tail_metrics(logits, labels, [5, 9])["average_precision"] == pytest.approx(each[0])


def test_areas_are_none_where_a_class_has_no_test_sample_and_left_out_with_more_classes():
    names = {"auroc", "average_precision", "per_class_average_precision"}
    found = long_tail_metrics(np.zeros((3, 2)), [1, 1, 1], [9, 9], detailed=True)
    assert {found[name] for name in names} == {None}
    assert not names & set(found["intervals"])
    assert not names & set(long_tail_metrics(np.zeros((3, 3)), [0, 1, 2], [9] * 3))


def test_infinite_logits_and_certain_ones_keep_their_order():
    logits = np.array([[0, 800.0], [0, 900.0], [0, -np.inf], [-np.inf, 0]])
    assert long_tail_metrics(logits, [0, 1, 0, 1], [9, 9])["auroc"] == 1.0


def test_bootstrap_samples_are_within_the_classes_and_weigh_as_scikit_learn_does():
    logits, labels = make_rows(2, rows=60)
    scores = np.round(logits[:, 1] - logits[:, 0], 1)
    drawn = Ranking(scores, labels).resampled(np.random.default_rng(4))
    generator, weights = np.random.default_rng(4), np.zeros(60)
    order = np.argsort(scores, kind="stable")
    for label in (0, 1):
        rows = order[labels[order] == label]
        weights += np.bincount(rows[generator.integers(0, len(rows), len(rows))], minlength=60)
    assert drawn.auroc == pytest.approx(roc_auc_score(labels, scores, sample_weight=weights))
    expected = average_precision_score(labels, scores, sample_weight=weights)
    assert drawn.average_precision[1] == pytest.approx(expected)


@pytest.mark.parametrize("classes", [2, 9])
def test_everything_is_the_same_to_the_bit_in_parts_of_any_order(classes):
    logits, labels = make_rows(classes, rows=120)
    groups = np.array(["a", "b", "camera 3"])[np.arange(120) % 3]
    expected = long_tail_metrics(logits, labels, [9] * classes, groups=groups, detailed=True)
    order = np.random.default_rng(1).permutation(120)
    merged = MetricAccumulator([9] * classes)
    for rows in np.array_split(order, 7):
        part = MetricAccumulator([9] * classes)
        part.update(logits[rows[:3]], labels[rows[:3]], groups[rows[:3]])
        part.update(logits[rows[3:]], labels[rows[3:]], groups[rows[3:]])
        merged.merge(part)
    assert merged.compute(detailed=True) == expected
    assert list(merged.compute(detailed=True)["by_group"]) == ["a", "b", "camera 3"]
