"""How sure a mean over seeds is, and whether two methods differ by more than noise."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, stats

from ldam_plugins._validation import check_int, check_real, invalid
from ldam_plugins.metrics.paired import holm

__all__ = ["Interval", "PairedComparison", "holm", "mean_interval", "paired_comparison"]

CONFIDENCE = 0.95
_POWER = 0.8


class Interval(NamedTuple):
    """A mean over ``n`` seeds with its confidence interval ``mean +- half_width``.

    ``half_width`` is None with one seed, of which no spread is known.
    """

    mean: float
    half_width: float | None
    n: int


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Mean and Student's t interval, ``mean +- t(1 - alpha / 2, n - 1) * s / sqrt(n)``.

    It holds for values that are independent and about normal, as results of different seeds are
    taken to be. With two seeds t is 12.7 and with three 4.3: such intervals are wide by right.

    Args:
        values: One value a seed, at least one.
        confidence: Coverage of the interval, in (0, 1).

    Raises:
        ValueError: no value, or ``confidence`` out of range.

    Example:
        >>> interval = mean_interval([1.0, 2.0, 3.0])
        >>> interval.mean, round(interval.half_width, 3), interval.n
        (2.0, 2.484, 3)
    """
    check_real("confidence", confidence, low=0, high=1, low_open=True, high_open=True)
    if not len(values):
        raise invalid("values", "at least one", list(values))
    mean, n = float(np.mean(values)), len(values)
    if n == 1:
        return Interval(mean, None, 1)
    error = float(np.std(values, ddof=1)) / n**0.5
    return Interval(mean, float(stats.t.ppf((1 + confidence) / 2, n - 1)) * error, n)


class PairedComparison(NamedTuple):
    """Two methods on the same seeds: the mean of ``second - first``.

    Args:
        difference: Mean difference with its 95 % interval; ``n`` is the number of pairs.
        p_value: Of the two-sided paired t-test; None where none can be made: one pair, or pairs
            that all differ by the same amount, whose spread is then unknown and not zero.
        detectable: Difference that is found in 80 % of such experiments or more, were the spread
            the one seen here; None where there is no test. Found is what is below 5 % after
            :func:`holm`.
        deviation: Standard deviation of the differences; None with one pair.
    """

    difference: Interval
    p_value: float | None
    detectable: float | None
    deviation: float | None


def paired_comparison(
    first: Sequence[float], second: Sequence[float], tests: int = 1
) -> PairedComparison:
    """Paired t-test of two methods that ran on the same seeds and long tails.

    Pairing takes out what the seeds have in common, if anything: the choice of the kept samples,
    the order of the data. What a test with few pairs cannot see is in ``detectable``.

    Args:
        first: One value a seed.
        second: The other method's values, of the same seeds in the same order.
        tests: How many tests :func:`holm` corrects together, this one among them. It rejects the
            smallest of their p-values at ``0.05 / tests``, others later and at more, so that
            ``detectable`` holds whatever the others find.

    Raises:
        ValueError: no values, not as many of the one as of the other, or ``tests`` below 1.

    Example:
        >>> result = paired_comparison([30.0, 31.0, 29.0], [27.0, 27.5, 26.5])
        >>> result.difference.mean, round(result.p_value, 4)
        (-3.0, 0.0091)
    """
    if len(first) != len(second):
        raise invalid("second", f"as long as `first` ({len(first)})", len(second))
    check_int("tests", tests, low=1)
    differences = np.subtract(second, first)
    interval = mean_interval(differences.tolist())
    if interval.n == 1:
        return PairedComparison(interval, None, None, None)
    spread = float(np.std(differences, ddof=1))
    if spread <= 1e-9 * max(1.0, abs(interval.mean)):
        return PairedComparison(interval, None, None, spread)
    p_value = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return PairedComparison(interval, p_value, _detectable(spread, interval.n, tests), spread)


def _detectable(spread: float, pairs: int, tests: int) -> float:
    """Difference that the t-test at 5 % over ``tests`` finds with a probability of 80 %."""
    # statsmodels' solve_power computes the same, but stops up to 5e-6 from the solution.
    critical = stats.t.isf((1 - CONFIDENCE) / 2 / tests, pairs - 1)

    def shortfall(effect: float) -> float:
        return float(stats.nct.sf(critical, pairs - 1, effect)) - _POWER

    # The effect is the mean over its standard error; it is below 3 * critical for any df.
    return float(optimize.brentq(shortfall, 0.0, 3 * critical)) * spread / pairs**0.5
