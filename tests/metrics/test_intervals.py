"""Intervals: against scipy, and how often they hold the truth."""

import json

import numpy as np
import pytest
from scipy import stats

from ldam_plugins import ClassCounts
from ldam_plugins.metrics import long_tail_metrics
from ldam_plugins.metrics.intervals import (
    ClassBootstrap,
    class_intervals,
    ranking_intervals,
    wilson,
)
from ldam_plugins.metrics.ranking import Ranking


def test_wilson_is_that_of_scipy():
    for n in (1, 2, 10, 357):
        for k in {0, 1, n // 2, n}:
            expected = stats.binomtest(k, n).proportion_ci(method="wilson")
            assert wilson(k, n) == pytest.approx(list(expected), abs=1e-12)
    expected = stats.binomtest(3, 10).proportion_ci(0.995, method="wilson")
    assert wilson(3, 10, tests=10) == pytest.approx(list(expected), abs=1e-12)
    assert wilson([0, 3], [0, 10]).shape == (2, 2)
    assert np.isnan(wilson([0, 3], [0, 10])[0]).all()


@pytest.mark.parametrize("n", [10, 20, 50, 300])
def test_wilson_holds_the_truth_in_93_to_97_percent_on_average(n):
    k = np.arange(n + 1)
    low, high = wilson(k, n).T
    truths = np.linspace(0.05, 0.95, 181)
    held = [stats.binom.pmf(k, n, p)[(low <= p) & (p <= high)].sum() for p in truths]
    assert 0.93 <= np.mean(held) <= 0.97


def drawn_intervals(truth, samples, rng):
    """The intervals on a test set drawn from probabilities (C, C) of predictions."""
    matrix = np.stack([rng.multinomial(n, row) for n, row in zip(samples, truth, strict=True)])
    true, predicted = np.nonzero(matrix)
    bootstrap = ClassBootstrap(samples, true, predicted, matrix[true, predicted])
    counts = ClassCounts([500] * len(samples))
    return class_intervals(counts, np.diag(matrix), matrix.sum(0), bootstrap)


def coverage(classes, samples, runs, seed=0):
    """How often the intervals hold the truth, over accuracies of 0.05 to 0.95."""
    rng = np.random.default_rng(seed)
    held = {}
    for accuracy in rng.uniform(0.05, 0.95, runs):
        truth = np.full((classes, classes), (1 - accuracy) / (classes - 1))
        np.fill_diagonal(truth, accuracy)
        expected = (truth * samples[:, None]).sum(0)
        precision, f1 = accuracy * samples / expected, 2 * accuracy * samples / (samples + expected)
        known = {
            "balanced_accuracy": [accuracy],
            "macro_f1": [f1.mean()],
            "macro_precision": [precision.mean()],
            "weighted_f1": [f1 @ samples / samples.sum()],
            "per_class_accuracy": [accuracy] * classes,
            "per_class_precision": precision,
            "per_class_f1": f1,
            "worst_class_accuracy": [accuracy],
        }
        found = drawn_intervals(truth, samples, rng)
        for name, values in known.items():
            intervals = found[name] if name.startswith("per_class") else [found[name]]
            for value, ends in zip(values, intervals, strict=True):
                if ends is not None:
                    held.setdefault(name, []).append(ends[0] <= value <= ends[1])
    return {name: np.mean(found) for name, found in held.items()}


@pytest.mark.parametrize(
    ("classes", "samples", "runs"),
    [
        (2, [20, 20], 400),
        (4, [20, 20, 20, 20], 400),
        (4, [20, 40, 100, 300], 400),
        *(
            pytest.param(classes, samples, 3000, marks=pytest.mark.exhaustive)
            for classes, samples in (
                (2, [20, 20]),
                (2, [20, 200]),
                (10, [20] * 10),
                (40, [20] * 40),
            )
        ),
    ],
)
def test_bootstrap_holds_the_truth_from_20_samples_a_class(classes, samples, runs, monkeypatch):
    if runs < 1000:  # enough for a look
        monkeypatch.setattr("ldam_plugins.metrics.intervals.REPLICATES", (200, 500))
    noise = 0 if runs > 1000 else 3 * (0.95 * 0.05 / runs) ** 0.5 - 0.012
    found = coverage(classes, np.array(samples), runs)
    selected = found.pop("worst_class_accuracy")
    assert selected > 0.94  # of all classes at once, so of the worst one too
    for name, share in found.items():
        assert 0.93 - noise <= share <= 0.97 + noise, (name, share)


def test_a_class_without_an_error_has_an_interval_and_the_estimate_is_inside():
    logits = 5 * np.eye(3)[np.repeat(range(3), 25)]
    found = long_tail_metrics(logits, np.repeat(range(3), 25), [9] * 3, detailed=True)
    intervals = found["intervals"]
    for name in ("balanced_accuracy", "macro_f1", "weighted_precision"):
        low, high = intervals[name]
        assert 0.9 < low < 0.99
        assert high == found[name] == 1
    for name in ("precision", "f1", "accuracy"):
        assert all(0.8 < low < 0.99 for low, _ in intervals[f"per_class_{name}"]), name
    assert intervals["balanced_error"] == pytest.approx(
        [100 * (1 - end) for end in intervals["balanced_accuracy"][::-1]]
    )


def test_the_half_samples_do_not_add_up_over_classes():
    labels = np.repeat(range(50), 20)
    logits = np.eye(50)[np.where(np.arange(1000) % 20 == 0, (labels + 1) % 50, labels)]
    found = long_tail_metrics(logits, labels, [9] * 50, detailed=True)
    for name in ("balanced_accuracy", "macro_f1", "weighted_precision", "few"):
        assert np.mean(found["intervals"][name]) == pytest.approx(found[name], abs=0.006)
        assert np.ptp(found["intervals"][name]) < 0.035


def test_one_sample_less_is_drawn_so_that_the_variance_is_that_of_the_mean():
    samples, true = np.array([5, 9]), np.array([0, 0, 1])
    bootstrap = ClassBootstrap(samples, true, np.array([0, 1, 1]), np.array([3, 2, 9]))
    assert set(np.unique(bootstrap.correct[0])) == {0, 1.25, 2.5, 3.75, 5}
    assert (bootstrap.predicted.sum(axis=0) == 14).all()
    share = 3.5 / 6
    expected = share * (1 - share) / 4
    assert (bootstrap.correct[0] / 5).var() == pytest.approx(expected, rel=0.1)


def test_a_class_that_is_never_predicted_has_no_precision_in_the_bootstrap_either():
    labels = np.repeat(range(3), 30)
    found = long_tail_metrics(np.eye(3)[labels * 0], labels, [9] * 3, detailed=True)
    low, high = found["intervals"]["macro_precision"]
    assert found["macro_precision"] == pytest.approx(1 / 9)
    assert 0.1 < low < high < 0.125
    assert found["intervals"]["per_class_precision"][1:] == [None, None]


def rows(samples, classes=6, seed=0):
    generator = np.random.default_rng(seed)
    labels = np.repeat(range(len(samples)), samples)
    logits = generator.normal(size=(len(labels), classes))
    logits[np.arange(len(labels)), labels] += 1.2
    return logits, labels


def test_every_interval_holds_its_estimate_and_is_json():
    logits, labels = rows([60, 50, 40, 30, 20, 25])
    found = long_tail_metrics(logits, labels, [500, 300, 50, 40, 9, 8], detailed=True)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    intervals = found["intervals"]
    plain = {"level", "replicates", "few_examples", "worst_class_selection_bias"}
    for name in set(intervals) - plain:
        values, ends = found[name], intervals[name]
        pairs = zip(values, ends, strict=True) if isinstance(values, list) else [(values, ends)]
        for value, (low, high) in pairs:
            assert low <= value <= high, name
            assert low < high, name
    said = {name for name, value in found.items() if isinstance(value, float)} - {"nll", "ece"}
    assert said <= set(intervals)
    assert (intervals["level"], intervals["few_examples"]) == (0.95, [])
    plain_metrics = long_tail_metrics(logits, labels, [500, 300, 50, 40, 9, 8])
    assert plain_metrics.items() <= found.items()
    assert {"intervals", "confusion"} == set(found) - set(plain_metrics)


def test_few_examples_are_named_where_a_bootstrap_needs_more():
    logits, labels = rows([60, 50, 40, 30, 19, 25])
    found = long_tail_metrics(logits, labels, [500, 300, 50, 40, 9, 8], detailed=True)
    few = set(found["intervals"]["few_examples"])
    assert few >= {"balanced_error", "balanced_accuracy", "train_prior_error", "macro_f1", "few"}
    assert few >= {"per_class_precision", "per_class_f1", "weighted_recall"}
    assert not few & {"many", "medium", "top1_error", "top5_accuracy", "per_class_accuracy"}
    alone = long_tail_metrics(logits, labels, [500, 300, 50, 40, 9, 40], detailed=True)
    assert "few" not in alone["intervals"]["few_examples"]  # Wilson's, of one class
    assert alone["intervals"]["few"] == alone["intervals"]["per_class_accuracy"][4]


@pytest.mark.parametrize(
    ("samples", "few"),
    [
        ([60, 19], {"auroc", "average_precision", "per_class_average_precision", "macro_f1"}),
        ([60, 49], {"auroc", "average_precision", "per_class_average_precision"}),
        ([50, 199], {"average_precision", "per_class_average_precision"}),
        ([200, 200], set()),
    ],
)
def test_the_ranking_of_two_classes_needs_more_examples(samples, few):
    found = long_tail_metrics(*rows(samples, 2), [9, 5], detailed=True)["intervals"]
    assert few <= set(found["few_examples"])
    assert bool(few) == bool(found["few_examples"])
    assert ("auroc" in few) == ("auroc" in found["few_examples"])


def average_precision_of(distance, samples):
    """The average precision of the second of two normal distributions, by integration."""
    at = np.linspace(-8, 12, 20_001)
    recall, false = stats.norm.sf(at - distance), stats.norm.sf(at)
    share = samples[1] / sum(samples)
    hits = share * recall
    precision = hits / np.maximum(hits + (1 - share) * false, 1e-300)
    return -np.trapezoid(precision, recall)


def ranked_coverage(samples, distance, runs, monkeypatch):
    """How often the intervals of AUROC and of either average precision hold the truth."""
    monkeypatch.setattr("ldam_plugins.metrics.intervals.REPLICATES", (200, 200))
    rng = np.random.default_rng(0)
    truth = [stats.norm.cdf(distance / 2**0.5)]
    truth += [average_precision_of(distance, pair) for pair in (samples[::-1], samples)]
    held = []
    for _ in range(runs):
        scores = np.concatenate([rng.normal(0, 1, samples[0]), rng.normal(distance, 1, samples[1])])
        found = ranking_intervals(Ranking(scores, np.repeat([0, 1], samples)))
        ends = [found["auroc"], *found["per_class_average_precision"]]
        held.append([low <= true <= high for true, (low, high) in zip(truth, ends, strict=True)])
    return np.mean(held, axis=0)


def test_intervals_of_a_ranking_hold_the_truth_where_they_are_not_marked(monkeypatch):
    """0.95 of 150 test sets, less three deviations of that share, 0.018."""
    auroc, first, second = ranked_coverage((200, 200), 1.5, 150, monkeypatch)
    assert min(auroc, first, second) > 0.895
    auroc, *_ = ranked_coverage((50, 50), 1.5, 150, monkeypatch)
    assert auroc > 0.895


def test_average_precision_is_marked_where_its_interval_is_too_narrow(monkeypatch):
    _, first, _ = ranked_coverage((200, 20), 3.0, 100, monkeypatch)
    assert first < 0.85


def test_the_bias_of_precision_does_not_outgrow_its_interval_over_many_classes(monkeypatch):
    """Over 200 classes it is 0.008, of a deviation of 0.008."""
    monkeypatch.setattr("ldam_plugins.metrics.intervals.REPLICATES", (100, 100))
    rng = np.random.default_rng(0)
    truth = np.full((200, 200), 0.3 / 199)
    np.fill_diagonal(truth, 0.7)
    samples = np.full(200, 20)
    counts = ClassCounts([500] * 200)
    held = []
    for _ in range(60):
        correct = rng.binomial(20, 0.7, 200)
        wrong = rng.integers(1, 200, (20 - correct).sum())
        true = np.repeat(range(200), 20 - correct)
        pairs = np.concatenate(
            [true * 200 + (true + wrong) % 200, np.repeat(range(0, 40_000, 201), correct)]
        )
        codes, found = np.unique(pairs, return_counts=True)
        bootstrap = ClassBootstrap(samples, *np.divmod(codes, 200), found)
        predicted = np.bincount(pairs % 200, minlength=200)
        low, high = class_intervals(counts, correct, predicted, bootstrap)["macro_precision"]
        held.append(low <= 0.7 <= high)
    assert np.mean(held) > 0.95 - 3 * (0.95 * 0.05 / 60) ** 0.5


def test_selection_makes_the_worst_of_equal_classes_look_worse():
    rng = np.random.default_rng(0)
    truth, samples = np.full((10, 10), 0.3 / 9), np.full(10, 40)
    np.fill_diagonal(truth, 0.7)
    found = [drawn_intervals(truth, samples, rng) for _ in range(30)]
    bias = np.mean([each["worst_class_selection_bias"] for each in found])
    least = rng.binomial(40, 0.7, (1000, 10)).min(axis=1).mean() / 40 - 0.7
    assert least < bias < 0.5 * least  # the estimate is on the low side
    alone = drawn_intervals(np.array([[0.5, 0.5], [0.0, 1.0]]), np.array([400, 400]), rng)
    assert alone["worst_class_selection_bias"] == pytest.approx(0, abs=0.01)


def test_groups_have_both_errors_with_intervals():
    logits, labels = rows([60, 50, 40])
    groups = np.where(np.arange(150) % 3 == 0, "left", "right")
    found = long_tail_metrics(logits[:, :3], labels, [9] * 3, groups=groups, detailed=True)
    assert list(found["by_group"]) == ["left", "right"]
    few = {name: group["few_examples"] for name, group in found["by_group"].items()}
    assert few == {"left": ["balanced_error"], "right": []}  # 20, 17 and 13 samples; 40, 33 and 27
    for name, group in found["by_group"].items():
        mine = groups == name
        alone = long_tail_metrics(logits[mine][:, :3], labels[mine], [9] * 3, detailed=True)
        for error in ("top1_error", "balanced_error"):
            assert group[error] == pytest.approx(alone[error])
            expected = pytest.approx(alone["intervals"][error], abs=2.5)
            assert group["intervals"][error] == expected
        assert group["samples"] == mine.sum()
        assert group["classes"] == 3
    assert "by_group" not in long_tail_metrics(logits, labels, [9] * 6, detailed=True)


def test_groups_of_ignored_rows_and_of_other_length():
    logits, labels = rows([5, 5])
    labels[:5] = -100
    found = long_tail_metrics(logits, labels, [9] * 6, groups=[1] * 5 + [2] * 5, detailed=True)
    assert {name: group["samples"] for name, group in found["by_group"].items()} == {"2": 5}
    with pytest.raises(ValueError, match=r"`groups` must be of shape \(10,\).*\(9,\)"):
        long_tail_metrics(logits, labels, [9] * 6, groups=["a"] * 9)


def test_fewer_bootstrap_samples_of_very_many_classes():
    found = long_tail_metrics(np.zeros((2, 40_000)), [0, 1], [9] * 40_000, detailed=True)
    assert found["intervals"]["replicates"] == 200
