"""Thresholds, against scikit-learn and scipy, and their promises in simulations."""

import json

import numpy as np
import pytest
from scipy.stats import beta, binom
from sklearn.metrics import f1_score, precision_recall_curve, precision_score, recall_score

from ldam_plugins.posthoc.thresholds import (
    Thresholds,
    choose_abstention,
    choose_threshold,
    clopper_pearson,
    needed_samples,
    threshold_figures,
    weights_digest,
)


def samples(seed, count=200, digits=None):
    """Scores and classes of two classes, a fifth positive; with few digits there are ties."""
    rng = np.random.default_rng(seed)
    positive = rng.random(count) < 0.2
    scores = rng.beta(np.where(positive, 4, 2), np.where(positive, 2, 5))
    return (scores if digits is None else scores.round(digits)), positive


def figures_at(scores, positive, threshold):
    called = scores >= threshold
    return (
        precision_score(positive, called, zero_division=0),
        recall_score(positive, called),
        f1_score(positive, called),
    )


@pytest.mark.parametrize("digits", [None, 1])
@pytest.mark.parametrize("seed", range(5))
def test_aims_are_reached_as_by_scikit_learn(seed, digits):
    scores, positive = samples(seed, digits=digits)
    precision, recall, _ = precision_recall_curve(positive, scores)
    precision, recall = precision[:-1], recall[:-1]  # the last one calls nothing
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    expected = {
        ("f1", None): f1.max(),
        ("precision", 0.6): recall[precision >= 0.6].max(),
        ("recall", 0.8): precision[recall >= 0.8].max(),
    }
    for (aim, at_least), best in expected.items():
        found = choose_threshold(scores, positive, aim, at_least=at_least)
        reached = figures_at(scores, positive, found.threshold)
        assert (found.precision, found.recall, found.f1) == pytest.approx(reached)
        value = {"f1": found.f1, "precision": found.recall, "recall": found.precision}[aim]
        assert value == pytest.approx(best)
        if at_least is not None:
            assert (found.precision if aim == "precision" else found.recall) >= at_least
        assert not np.isclose(scores, found.threshold, atol=1e-9).any()  # between two scores


@pytest.mark.parametrize("costs", [(1, 1), (1, 5), (10, 1), (1, 0), (0, 1)])
def test_costs_are_the_least_of_all_thresholds(costs):
    scores, positive = samples(7)

    def cost(threshold):
        called = scores >= threshold
        return (costs[0] * (called & ~positive) + costs[1] * (positive & ~called)).mean()

    found = choose_threshold(scores, positive, "cost", costs=costs)
    assert found.cost == pytest.approx(cost(found.threshold))
    assert found.cost == pytest.approx(min(map(cost, [0, *scores, 2])))
    assert threshold_figures(scores, positive, found.threshold, costs=costs)["cost"] == found.cost
    if costs == (1, 0):
        assert found.precision is None  # nothing is called positive
        assert found.recall == 0


def test_figures_have_exact_intervals():
    scores, positive = samples(3)
    found = threshold_figures(scores, positive, 0.5)
    assert [found[k] for k in ("precision", "recall", "f1")] == pytest.approx(
        figures_at(scores, positive, 0.5)
    )
    hits, called = int((positive & (scores >= 0.5)).sum()), int((scores >= 0.5).sum())
    low, high = (
        beta.ppf(0.025, hits, called - hits + 1),
        beta.ppf(0.975, hits + 1, called - hits),
    )
    assert found["intervals"]["precision"] == pytest.approx([low, high])
    assert found["intervals"]["recall"] == pytest.approx(clopper_pearson(hits, positive.sum()))
    assert threshold_figures(scores, positive, 1.1)["precision"] is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"aim": "auc"}, "`aim` must be one of"),
        ({"aim": "precision"}, "`at_least` must be"),
        ({"aim": "precision", "at_least": 0.99}, r"0\.99\. At most 0\.\d+ is reached on 200"),
        ({"aim": "cost"}, "`costs` must be those of a false positive"),
        ({"aim": "cost", "costs": (0, 0)}, "`costs` must be"),
        ({"scores": np.full(200, 1.5)}, r"`scores` must be probabilities in \[0, 1\], got 1.5"),
        ({"scores": np.full(3, 0.5)}, r"`scores` must be of shape \(200,\)"),
        ({"positive": np.ones(200, bool)}, "true of some samples and false of others, got '200"),
    ],
)
def test_bad_input_of_thresholds(given, message):
    scores, positive = samples(0)
    if given.get("aim") == "precision":
        positive = positive.copy()
        positive[scores.argmax()] = False
        scores = scores.round(1)
    with pytest.raises((ValueError, TypeError), match=message):
        choose_threshold(**{"scores": scores, "positive": positive, **given})


def errors_of(shape, confidence):
    """Probability that an answer of this confidence is wrong."""
    if shape == "falling":
        return 0.5 * (1 - confidence)
    if shape == "worst at the top":  # surest where it errs: no monotone relation
        return np.where(confidence > 0.9, 0.3, 0.02 + 0.4 * (1 - confidence) ** 2)
    return np.where(np.sin(12 * confidence) > 0, 0.25, 0.0)


def true_risk(shape, threshold, digits):
    grid = (np.arange(100_000) + 0.5) / 100_000
    grid = grid if digits is None else grid.round(digits)
    kept = grid[grid >= threshold]
    return errors_of(shape, kept).mean()


@pytest.mark.parametrize("digits", [None, 1])
@pytest.mark.parametrize("shape", ["falling", "worst at the top", "in waves"])
def test_the_risk_among_the_answered_is_kept_as_often_as_promised(shape, digits):
    risk, level, tries = 0.12, 0.8, 400
    rng = np.random.default_rng(0)
    kept, naive, answered = 0, 0, []
    for _ in range(tries):
        confidence = rng.random(500)
        confidence = confidence if digits is None else confidence.round(digits)
        correct = rng.random(500) >= errors_of(shape, confidence)
        found = choose_abstention(confidence, correct, risk, level=level)
        answered.append(found.answered)
        kept += found.threshold is None or true_risk(shape, found.threshold, digits) <= risk
        order = np.argsort(-confidence, kind="stable")
        wrong = np.cumsum(~correct[order]) / np.arange(1, 501)
        last = np.flatnonzero(wrong <= risk)
        naive += not len(last) or true_risk(shape, confidence[order][last[-1]], digits) <= risk
    sampling = 3 * np.sqrt(level * (1 - level) / tries)
    assert kept / tries >= level - sampling
    assert naive <= kept
    if digits is None:
        assert naive / tries < level - sampling  # without the bound the promise is not kept
    if shape == "falling":
        assert np.mean(answered) > 0.2 * 500


def test_abstention_is_by_the_bound_of_clopper_and_pearson():
    rng = np.random.default_rng(1)
    confidence = rng.random(800)
    correct = rng.random(800) >= 0.3 * (1 - confidence)
    found = choose_abstention(confidence, correct, 0.1)
    order = np.argsort(-confidence)
    assert found.answered == (confidence >= found.threshold).sum()
    assert found.errors == (~correct[order])[: found.answered].sum()
    upper = beta.ppf(1 - 0.05 / 2, found.errors + 1, found.answered - found.errors)
    assert upper <= 0.1
    more = (~correct[order])[: found.answered + 1].sum()
    assert binom.cdf(more, found.answered + 1, 0.1) > 0.05 / 2


def test_too_few_samples_answer_nothing():
    needed = needed_samples(0.05)
    assert (1 - 0.05) ** needed <= 0.025 < (1 - 0.05) ** (needed - 1)
    # As many as are needed, all of them right, are one test at the whole level.
    sure = np.linspace(0, 1, needed)
    assert choose_abstention(sure, np.ones(needed, bool), 0.05).answered == needed
    assert choose_abstention(sure[1:], np.ones(needed - 1, bool), 0.05).threshold is None
    assert choose_abstention(sure, np.zeros(needed, bool), 0.05).threshold is None
    with pytest.raises(ValueError, match=r"`risk` must be in \(0, 1\)"):
        choose_abstention(sure, np.ones(needed, bool), 0.0)


def test_equal_confidences_are_answered_together():
    confidence = np.repeat([0.9, 0.5], 100)
    correct = np.concatenate([np.ones(100, bool), np.arange(100) < 50])
    found = choose_abstention(confidence, correct, 0.1)
    assert (found.answered, found.errors) == (100, 0)
    assert 0.5 < found.threshold <= 0.9


def test_decisions():
    p = np.array([[0.7, 0.3], [0.8, 0.2], [0.1, 0.9], [1.0, 0.0]])
    plain = Thresholds(("no", "yes")).decide(p)
    assert plain.answers.tolist() == [0, 0, 1, 0]
    assert plain.confidence == pytest.approx([0.7, 0.8, 0.9, 1.0])
    assert not plain.abstained.any()
    found = Thresholds(("no", "yes"), "yes", 0.25, abstain_below=0.6).decide(p)
    assert found.answers.tolist() == [1, 0, 1, 0]
    odds = np.array([0.3 / 0.7, 0.2 / 0.8, 9.0]) / (0.25 / 0.75)
    shifted = odds / (1 + odds)
    assert found.confidence == pytest.approx([*np.maximum(shifted, 1 - shifted), 1.0])
    assert found.abstained.tolist() == [True, True, False, False]
    turned = Thresholds(("yes", "no"), "yes", 0.25).decide(p[:, ::-1])
    assert turned.answers.tolist() == [0, 1, 0, 1]
    assert Thresholds(("no", "yes"), "yes", 0.0).decide(p).answers.tolist() == [1, 1, 1, 1]
    assert Thresholds(("no", "yes"), "yes", 1.5).decide(p).answers.tolist() == [0, 0, 0, 0]


def test_they_are_saved_and_loaded(tmp_path):
    made = Thresholds(("no", "yes"), "yes", 0.25, 0.6, weights="ab", facts={"samples": 3})
    made.save(tmp_path / "t.json")
    assert Thresholds.load(tmp_path / "t.json") == made
    assert json.loads((tmp_path / "t.json").read_text())["threshold"] == 0.25
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a file that recipes/thresholds\.py wrote"):
        Thresholds.load(tmp_path / "t.json")
    with pytest.raises(ValueError, match="two, if one has a threshold"):
        Thresholds(("a", "b", "c"), "a", 0.3)
    with pytest.raises(ValueError, match="`positive` must be one of"):
        Thresholds(("a", "b"), "d", 0.3)


def test_weights_are_known_by_their_content(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = weights_digest(tmp_path)
    (tmp_path / "README.md").write_text("no weights")
    assert weights_digest(tmp_path) == before
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert weights_digest(tmp_path) != before
    with pytest.raises(ValueError, match="a folder with weights"):
        weights_digest(tmp_path / "README.md")
