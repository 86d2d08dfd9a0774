"""How sure the metrics of a test set are: 95 % intervals, over other test samples of its kind.

They say nothing of other trainings: for that there are seeds. Shares have Wilson's interval, what
is averaged over classes or made of several shares a bootstrap stratified by class.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import numpy as np

from ldam_plugins.counts import ClassCounts
from ldam_plugins.metrics.class_scores import averages, class_scores
from ldam_plugins.metrics.ranking import Ranking

LEVEL = 0.95
FEW_EXAMPLES = 20
"""With fewer test samples of a class a bootstrap is too narrow."""
FEW_RANKED = {"auroc": 50, "average_precision": 200, "per_class_average_precision": 200}
"""With fewer test samples of one of two classes these intervals are too narrow.

Of two normal distributions 0 to 3 deviations apart AUROC's holds the truth in 90 to 95 % of test
sets with 20 samples of the rarer class and 93 to 96 % with 50; that of average precision in 84 to
94 % with 20, 89 to 95 % with 50, 91 to 94 % with 100 and 93 to 94 % with 200.
"""
REPLICATES = (200, 2000)
"""Fewest and most bootstrap samples; fewer than the most only where memory or time forbids it."""

_ELEMENTS = 1 << 22
_TAILS = (0.5 - LEVEL / 2, 0.5 + LEVEL / 2)


def wilson(successes: Any, samples: Any, tests: int = 1) -> np.ndarray:
    """Wilson's score interval of a share, (..., 2).

    ``(p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)`` with ``p`` the share of
    ``n`` samples; NaN where there is no sample.

    Args:
        successes: Of each share.
        samples: Out of how many.
        tests: How many such intervals hold at once with 95 % (Bonferroni).

    Source: Wilson, Journal of the American Statistical Association 22, 1927.

    Example:
        >>> wilson(9, 10).round(3)
        array([0.596, 0.982])
    """
    # By hand, since scipy has it for one share at a time, 0.4 to 0.6 ms each.
    z = NormalDist().inv_cdf(1 - (1 - LEVEL) / 2 / tests)
    n = np.where(np.asarray(samples) > 0, samples, np.nan).astype(float)
    p = np.asarray(successes) / n
    middle, width = p + z**2 / (2 * n), z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    ends = np.stack([middle - width, middle + width], axis=-1) / (1 + z**2 / n)[..., None]
    return np.clip(ends, 0.0, 1.0)


def replicates(elements: int) -> int:
    """How many bootstrap samples are drawn of something that has so many elements."""
    return int(np.clip(_ELEMENTS // max(1, elements), *REPLICATES))


class ClassBootstrap:
    """Test sets drawn anew, class by class, from what each class was predicted as.

    For class c with ``n_c`` test samples, of which ``k_cj`` are predicted as j, ``n_c - 1``
    predictions are drawn with probabilities ``(k_cj + a_cj) / (n_c + 1)``, and count ``n_c / (n_c -
    1)`` each, since as many as ``n_c`` would vary too little. ``a_c`` is one sample, half of it
    right and half wrong in the way the class errs: without it a class that makes no error would
    have an interval of no width, and at 20 samples a class those of precision and F1 would hold the
    truth in 87 to 91 % of test sets instead of 95. The draws follow from the counts alone.
    ``expected_correct`` and ``expected_predicted`` (C,) are the means that they are drawn around.

    Args:
        samples: Test samples of each class, (C,).
        true, predicted, counts: The entries of the confusion matrix that are not 0, by class, (P,).

    Source: drawing one less, McCarthy and Snowden, Vital and Health Statistics 2-95, 1985.
    """

    def __init__(
        self, samples: np.ndarray, true: np.ndarray, predicted: np.ndarray, counts: np.ndarray
    ) -> None:
        self.samples = samples
        self.size = replicates(len(samples))
        self._rng = generator(true, predicted, counts)
        shape = (len(samples), self.size)
        self.correct, self.predicted = np.zeros(shape), np.zeros(shape)
        self.expected_correct, self.expected_predicted = np.zeros((2, len(samples)))
        bounds = np.searchsorted(true, np.arange(len(samples) + 1))
        for index in np.flatnonzero(samples):
            part = slice(bounds[index], bounds[index + 1])
            self._draw(int(index), predicted[part], counts[part])

    def _draw(self, index: int, predicted: np.ndarray, counts: np.ndarray) -> None:
        """Add the samples of a class to those that are drawn."""
        wrong = predicted != index
        kinds, errors = predicted[wrong], counts[wrong]
        total, right = int(counts.sum()), int(counts[~wrong].sum())
        if len(self.samples) == 1:
            shares = np.array([1.0])
        elif len(kinds):
            shares = np.array([right + 0.5, *(errors + 0.5 * errors / errors.sum())]) / (total + 1)
        else:
            shares = np.array([right + 0.5, 0.5]) / (total + 1)
        shares = shares / shares.sum()
        self.expected_correct[index] = total * shares[0]
        self.expected_predicted[index] += total * shares[0]
        if len(kinds):
            self.expected_predicted[kinds] += total * shares[1:]
        elif len(shares) > 1:
            other = np.arange(len(self.samples)) != index
            self.expected_predicted[other] += total * shares[1] / (len(self.samples) - 1)
        draws = max(1, total - 1)
        drawn = self._rng.multinomial(draws, shares, size=self.size).T
        self.correct[index] = drawn[0] * (total / draws)
        self.predicted[index] += self.correct[index]
        if len(kinds):
            self.predicted[kinds] += drawn[1:] * (total / draws)
        elif len(drawn) > 1:  # errors that none is known of: as any other class
            where = np.repeat(np.arange(self.size), drawn[1])
            other = self._rng.integers(0, len(self.samples) - 1, len(where))
            np.add.at(self.predicted, (other + (other >= index), where), total / draws)


def generator(*arrays: np.ndarray) -> np.random.Generator:
    """Random numbers that follow from integers or floats, so that no two test sets share them."""
    return np.random.default_rng([zlib.crc32(array.tobytes()) for array in arrays])


def interval_of_mean(
    drawn: np.ndarray, value: float, weights: np.ndarray, bias: float = 0.0
) -> list[float]:
    """The interval of an average over classes: quantiles of ``drawn``, moved.

    The half samples that :class:`ClassBootstrap` adds pull every class towards one half, which does
    not matter to one class and adds up over many. They are taken back but for the share of one
    class. So is the bias of the average, which is next to nothing beside the spread of one class
    and outgrows that of many: precision is a ratio, and that of 20 samples a class is up to 0.8
    points too high on average, which is half a standard deviation over 40 classes. Such an interval
    is widened up to the estimate where it would not reach it.

    Args:
        drawn: The average in each bootstrap sample.
        value: In the test set.
        weights: Of the classes in it, (K,), which sum to 1: they count as ``1 / sum(w^2)``.
        bias: By what the average of bootstrap samples exceeds that of what they are drawn from.
    """
    moved = (drawn.mean() - value + bias) * (1 - (weights**2).sum())
    low, high = np.clip(np.quantile(drawn, _TAILS) - moved, 0.0, 1.0)
    if bias:
        low, high = min(low, value), max(high, value)
    return [float(low), float(high)]


def class_intervals(
    class_counts: ClassCounts,
    correct: np.ndarray,
    predicted: np.ndarray,
    bootstrap: ClassBootstrap,
) -> dict[str, Any]:
    """The intervals of all that follows from a confusion matrix; see :func:`.long_tail_metrics`."""
    samples, seen = bootstrap.samples, bootstrap.samples > 0
    present = samples + predicted > 0
    scores = class_scores(correct, samples, predicted)
    drawn = class_scores(bootstrap.correct, samples[:, None], bootstrap.predicted)
    drawn.precision[predicted == 0] = 0.0  # as it is in the test set
    recalls = wilson(correct, samples)
    found: dict[str, Any] = {"level": LEVEL, "replicates": bootstrap.size}
    found["top1_error"] = _as_error(wilson(correct.sum(), samples.sum()).tolist())
    sets = {"balanced_accuracy": seen}
    sets |= {name: _mask(ids, seen) for name, ids in class_counts.groups().items()}
    for name, mask in sets.items():
        found[name] = _of_mean(scores.recall[mask], drawn.recall[mask], recalls[mask])
    found["balanced_error"] = _as_error(found["balanced_accuracy"])
    shares = class_counts.counts[seen] / class_counts.counts[seen].sum()
    prior = float(shares @ scores.recall[seen])
    prior_interval = interval_of_mean(shares @ drawn.recall[seen], prior, shares)
    found["train_prior_error"] = _as_error(prior_interval)
    value = averages(scores, samples, present)
    weights = {"macro": _even(int(present.sum())), "weighted": samples / samples.sum()}
    origin = class_scores(bootstrap.expected_correct, samples, bootstrap.expected_predicted)
    origin.precision[predicted == 0] = 0.0
    truth = averages(origin, samples, present)
    for name, each in averages(drawn, samples, present).items():
        own = weights[name.partition("_")[0]]
        bias = 0.0 if name.endswith("recall") else float(each.mean() - truth[name])
        found[name] = interval_of_mean(each, float(value[name]), own, bias)
    found |= _worst_class(correct, samples, drawn.recall)
    found["per_class_accuracy"] = _listed(recalls, seen)
    for name, each, known in (
        ("precision", drawn.precision, predicted > 0),
        ("f1", drawn.f1, present),
    ):
        found[f"per_class_{name}"] = _listed(np.quantile(each, _TAILS, axis=1).T, known)
    found["few_examples"] = few_examples(found, class_counts, samples)
    return found


def few_examples(
    found: Mapping[str, Any], class_counts: ClassCounts, samples: np.ndarray
) -> list[str]:
    """Names of the bootstrap intervals that are too narrow, a class having too few test samples."""
    few = (samples > 0) & (samples < FEW_EXAMPLES)
    groups = {  # the interval of one class is no bootstrap
        name: bool(few[ids].any()) and np.count_nonzero(samples[ids]) > 1
        for name, ids in class_counts.groups().items()
    }
    shares = {"level", "replicates", "top1_error", "worst_class_accuracy", "per_class_accuracy"}
    shares |= {"worst_class_selection_bias"}
    return [
        name
        for name, interval in found.items()
        if name not in shares and interval is not None and groups.get(name, bool(few.any()))
    ]


def _worst_class(correct: np.ndarray, samples: np.ndarray, drawn: np.ndarray) -> dict[str, Any]:
    """The interval of the accuracy that is least, and what it is too low by.

    The class with the least accuracy was chosen for it, so part of it is bad luck. Its interval is
    one of those that hold for all classes at once. The bias is the mean, over the bootstrap
    samples, of what the class that is worst there has less there than in the test set.
    """
    seen = np.flatnonzero(samples)
    accuracy = correct[seen] / samples[seen]
    worst = seen[accuracy.argmin()]
    places = drawn[seen].argmin(axis=0)
    # The truth of a bootstrap sample is what it was drawn from, half a sample to either side.
    truth = (correct[seen] + 0.5) / (samples[seen] + 1)
    bias = drawn[seen][places, np.arange(drawn.shape[1])] - truth[places]
    return {
        "worst_class_accuracy": wilson(correct[worst], samples[worst], len(seen)).tolist(),
        "worst_class_selection_bias": float(bias.mean()),
    }


def ranking_intervals(ranking: Ranking) -> dict[str, Any]:
    """The intervals of AUROC and the average precision of either class.

    Normal on the logit scale, with the deviation there of a bootstrap stratified by class: the
    quantiles of the bootstrap itself hold average precision in 83 to 91 % of test sets with 20
    samples of a class. These are too narrow, too, with few samples: see :data:`FEW_RANKED`. Where
    all pairs are in order it has no spread, and Wilson's interval of as
    many hits as the smaller class has samples stands in.

    Source: Boyd, Eng and Page, ECML PKDD 2013 (average precision).
    """
    rng, fewest = generator(*ranking.counts), min(int(each.sum()) for each in ranking.counts)
    size = replicates(sum(int(each.sum()) for each in ranking.counts) // 12)
    drawn = np.array([ranking.resampled(rng).flat() for _ in range(size)]).T
    found = map(_logit_interval, drawn, ranking.areas().flat(), [fewest] * len(drawn))
    auroc, *precisions = found
    return {"auroc": auroc, "per_class_average_precision": precisions}


def few_ranked(fewest: int) -> list[str]:
    """Names of the intervals of two classes that are too narrow at so many samples of one."""
    return [name for name, least in FEW_RANKED.items() if fewest < least]


def _logit_interval(drawn: np.ndarray, value: float, samples: int) -> list[float]:
    """``value +- z sd(drawn)`` on the scale ``log (x m + 1/2) / ((1 - x) m + 1/2)``, m samples."""
    scaled, middle = (
        np.log((x * samples + 0.5) / ((1 - x) * samples + 0.5)) for x in (drawn, np.array(value))
    )
    if scaled.std() < 1e-9:
        low, high = wilson(round(value * samples), samples)
        return [float(low), float(high)]
    half = NormalDist().inv_cdf(_TAILS[1]) * float(scaled.std())
    ends = 1 / (1 + np.exp(-(middle + np.array([-half, half]))))
    return [float(end) for end in np.clip(((samples + 1) * ends - 0.5) / samples, 0.0, 1.0)]


def mean_of_shares(correct: np.ndarray, samples: np.ndarray) -> list[float]:
    """The interval of the mean of some classes' accuracies, each of its own samples."""
    n = samples[:, None]
    size = (len(samples), replicates(len(samples)))
    draws = np.maximum(n - 1, 1)
    rng = generator(correct, samples)
    drawn = rng.binomial(draws, (correct[:, None] + 0.5) / (n + 1), size=size) / draws
    return _of_mean(correct / samples, drawn, wilson(correct, samples)) or [0.0, 1.0]


def _of_mean(values: np.ndarray, drawn: np.ndarray, shares: np.ndarray) -> list[float] | None:
    """The interval of a mean of shares; that of the share where it is one, None where none."""
    if len(values) < 2:
        return shares[0].tolist() if len(values) else None
    return interval_of_mean(drawn.mean(axis=0), float(values.mean()), _even(len(values)))


def _even(classes: int) -> np.ndarray:
    return np.full(classes, 1 / classes)


def _as_error(share: list[float] | None) -> list[float]:
    """The interval of the error in % of a share that is right."""
    low, high = share or (0.0, 1.0)
    return [100.0 * (1.0 - high), 100.0 * (1.0 - low)]


def _mask(ids: list[int], seen: np.ndarray) -> np.ndarray:
    mask = np.zeros(len(seen), dtype=bool)
    mask[ids] = True
    return mask & seen


def _listed(ends: np.ndarray, known: np.ndarray) -> list[list[float] | None]:
    return [pair if there else None for pair, there in zip(ends.tolist(), known, strict=True)]
