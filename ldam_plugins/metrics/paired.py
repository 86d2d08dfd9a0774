"""Whether one classifier does better than another on the same test samples, told from noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from ldam_plugins._validation import invalid
from ldam_plugins.counts import label_array
from ldam_plugins.metrics.intervals import LEVEL, generator

REPLICATES = 10_000
"""Draws of the interval and of the test of a mean over classes."""
_ELEMENTS = 1 << 22
_TAILS = (0.5 - LEVEL / 2, 0.5 + LEVEL / 2)


class PairedDifference(NamedTuple):
    """Accuracy of the second classifier less that of the first, over some samples.

    Args:
        samples: How many there are.
        gained: Samples that only the second one gets right.
        lost: Samples that only the first one gets right.
        difference: In shares of 1; over several classes, in the mean over them if it is balanced.
        low: Lower end of its 95 % interval.
        high: Upper end.
        p_value: Of the hypothesis that it makes no difference which of the two classifies a sample.
    """

    samples: int
    gained: int
    lost: int
    difference: float
    low: float
    high: float
    p_value: float


def paired_difference(
    labels: Any, first: Any, second: Any, *, classes: Any | None = None, balanced: bool = True
) -> PairedDifference:
    """Compare what two classifiers predict for the same test samples.

    A sample that both get right, or both wrong, says nothing of which is better. Of class c, with
    ``n_c`` samples, ``g_c`` only the second gets right and ``l_c`` only the first. The balanced
    difference is the mean of ``(g_c - l_c) / n_c`` over the classes with samples; the other one is
    ``sum(g - l) / sum(n)``.

    The interval is a bootstrap stratified by class: of each ``n_c - 1`` samples are drawn and
    weigh ``n_c / (n_c - 1)``, since as many as ``n_c`` would vary too little; half a sample gained
    and half a sample lost are added, without which a class in which nothing changes would have an
    interval of no width. The p-value of one
    class, or of a difference that is not balanced, is McNemar's exact one; that of the balanced
    difference is its counterpart for several classes: under the hypothesis each of the ``g_c +
    l_c`` samples is gained or lost with probability one half, and p is the share of such draws in
    which the balanced difference is as far from 0 as the one seen, or farther.

    Args:
        labels: Class index of each sample (N,).
        first: Class index that the first classifier predicts (N,).
        second: Likewise the second.
        classes: Class indices that count. Default: all.
        balanced: Whether each class counts once, or each sample.

    Raises:
        TypeError: class indices that are not integers.
        ValueError: lengths that differ, or no sample that counts.

    Source: McNemar, Psychometrika 12, 1947; the interval as in
    :class:`~ldam_plugins.metrics.intervals.ClassBootstrap`.

    Example:
        >>> found = paired_difference([0] * 8 + [1] * 2, [0] * 8 + [0] * 2, [0] * 7 + [1] * 3)
        >>> found.gained, found.lost, round(found.difference, 4), round(found.p_value, 1)
        (2, 1, 0.4375, 0.5)
    """
    truth, ours, theirs = (label_array(each) for each in (labels, first, second))
    for name, each in (("first", ours), ("second", theirs)):
        if len(each) != len(truth):
            raise invalid(name, f"of {len(truth)} samples, as `labels`", f"{len(each)} samples")
    kept = np.ones(len(truth), bool) if classes is None else np.isin(truth, classes)
    if not kept.any():
        raise invalid("labels", "with samples of the classes that count", "none")
    truth, ours, theirs = truth[kept], ours[kept], theirs[kept]
    strata, of_class = np.unique(truth, return_inverse=True)
    samples = np.bincount(of_class)
    gained = np.bincount(of_class[(theirs == truth) & (ours != truth)], minlength=len(strata))
    lost = np.bincount(of_class[(ours == truth) & (theirs != truth)], minlength=len(strata))
    shares = 1 / (samples * len(strata)) if balanced else np.full(len(strata), 1 / len(truth))
    difference = float(shares @ (gained - lost))
    draws = _drawn(samples, gained, lost, shares)
    low, high = np.clip(np.quantile(draws, _TAILS), -1.0, 1.0)
    if len(strata) == 1 or not balanced:
        p_value = _mcnemar(int(gained.sum()), int(lost.sum()))
    else:
        p_value = _stratified_mcnemar(gained + lost, shares, difference)
    return PairedDifference(
        len(truth),
        int(gained.sum()),
        int(lost.sum()),
        difference,
        float(low),
        float(high),
        p_value,
    )


def class_differences(labels: Any, first: Any, second: Any) -> dict[int, PairedDifference]:
    """:func:`paired_difference` of each class that has test samples; p-values are uncorrected."""
    return {
        index: paired_difference(labels, first, second, classes=[index])
        for index in np.unique(label_array(labels)).tolist()
    }


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P-values corrected for their number, so that any false alarm has the stated probability.

    Sorted ascending, ``p_(i)`` becomes ``max_{j <= i} min(1, (m - j + 1) p_(j))``. None, where no
    test was made, stays None and does not count.

    Source: Holm, Scandinavian Journal of Statistics 6, 1979.

    Example:
        >>> holm([0.04, 0.01, None])
        [0.04, 0.02, None]
    """
    # By hand, since scipy has no Holm, and statsmodels' multipletests collects all garbage in each
    # call, which takes 0.1 s in a process that has imported torch.
    order = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for done, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - done) * p))
        corrected[place] = largest
    return corrected


def _drawn(
    samples: np.ndarray, gained: np.ndarray, lost: np.ndarray, shares: np.ndarray
) -> np.ndarray:
    """The difference in each bootstrap sample, (R,)."""
    rng = generator(samples, gained, lost)
    drawn = np.zeros(REPLICATES)
    for n, more, less, share in zip(samples, gained, lost, shares, strict=True):
        draws = max(1, n - 1)
        odds = (more + 0.5) / (n + 1), (less + 0.5) / (n + 1), (n - more - less) / (n + 1)
        counts = rng.multinomial(draws, odds, REPLICATES)
        drawn += share * (counts[:, 0] - counts[:, 1]) * (n / draws)
    return drawn


def _mcnemar(gained: int, lost: int) -> float:
    if gained + lost == 0:
        return 1.0
    return float(stats.binomtest(gained, gained + lost).pvalue)


def _stratified_mcnemar(differing: np.ndarray, shares: np.ndarray, difference: float) -> float:
    if not differing.any():
        return 1.0
    rng, size = generator(differing, shares), max(1, _ELEMENTS // len(differing))
    parts = []
    for start in range(0, REPLICATES, size):  # of many classes not all draws fit into memory
        shape = (min(size, REPLICATES - start), len(differing))
        parts.append((2 * rng.binomial(differing, 0.5, shape) - differing) @ shares)
    drawn = np.concatenate(parts)
    as_far = np.count_nonzero(np.abs(drawn) >= abs(difference) - 1e-12)
    return float((as_far + 1) / (REPLICATES + 1))
