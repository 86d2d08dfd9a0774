import math

import numpy as np
import pytest
from scipy import stats

from ldam_plugins.benchmark.statistics import holm, mean_interval, paired_comparison

# Table values of Student's t, 97.5 %, by degrees of freedom.
T = {1: 12.706205, 2: 4.302653, 4: 2.776445, 9: 2.262157}


@pytest.mark.parametrize("df", T)
def test_interval_is_the_textbook_one(df):
    values = np.random.default_rng(df).normal(30, 2, df + 1).tolist()
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / df)
    interval = mean_interval(values)
    assert interval.mean == pytest.approx(mean)
    assert interval.half_width == pytest.approx(T[df] * deviation / math.sqrt(df + 1), rel=1e-6)
    assert interval.n == df + 1


def test_interval_covers_the_truth_as_often_as_it_says():
    samples = np.random.default_rng(0).normal(5.0, 3.0, (4000, 3))
    intervals = [mean_interval(row) for row in samples]
    covered = np.mean([abs(i.mean - 5.0) <= i.half_width for i in intervals])
    assert covered == pytest.approx(0.95, abs=0.012)


def test_one_value_has_no_interval():
    assert mean_interval([7.0]) == (7.0, None, 1)
    with pytest.raises(ValueError, match="`values` must be at least one"):
        mean_interval([])
    with pytest.raises(ValueError, match="`confidence`"):
        mean_interval([1.0], confidence=1.0)


def test_paired_test_is_that_of_scipy():
    random = np.random.default_rng(1)
    first, second = random.normal(30, 1, 6), random.normal(28, 1, 6)
    result = paired_comparison(first, second)
    assert result.p_value == pytest.approx(stats.ttest_rel(second, first).pvalue)
    low, high = stats.ttest_rel(second, first).confidence_interval()
    mean, half, pairs = result.difference
    assert (mean - half, mean + half, pairs) == pytest.approx((low, high, 6))


def test_detectable_difference_is_found_in_four_of_five_experiments():
    random = np.random.default_rng(2)
    detectable = paired_comparison([0.0, 0.0, 0.0], [-1.0, 0.0, 1.0]).detectable  # spread 1
    differences = random.normal(detectable, 1.0, (20_000, 3))
    found = stats.ttest_1samp(differences, 0.0, axis=1).pvalue < 0.05
    assert np.mean(found) == pytest.approx(0.8, abs=0.012)


@pytest.mark.parametrize(("pairs", "tests"), [(3, 3), (5, 8), (10, 8), (10, 40)])
def test_detectable_difference_is_found_in_four_of_five_experiments_after_holm(pairs, tests):
    """One real difference among others that are none, decided as the tables decide."""
    values = np.random.default_rng(3).normal(size=pairs)
    values = (values - values.mean()) / values.std(ddof=1)  # spread 1
    detectable = paired_comparison(np.zeros(pairs), values, tests).detectable
    experiments = np.random.default_rng(4).normal(size=(4000, tests, pairs))
    experiments[:, 0] += detectable
    p_values = stats.ttest_1samp(experiments, 0.0, axis=2).pvalue
    found = np.mean([holm(row.tolist())[0] < 0.05 for row in p_values])
    assert 0.785 < found < 0.835  # sampling error 0.0063; other rows that are found help a little


def test_many_tests_at_once_need_a_larger_difference():
    first, second = [30.0, 31.0], [28.0, 30.5]
    found = [paired_comparison(first, second, tests).detectable for tests in (1, 2, 40, 1000)]
    assert found == sorted(found)
    assert np.isfinite(found).all()
    assert found[1] / found[0] == pytest.approx(2, rel=0.05)  # a t of one degree has 1 / t tails
    with pytest.raises(ValueError, match="`tests` must be an integer >= 1, got 0"):
        paired_comparison(first, second, 0)


@pytest.mark.parametrize("differences", [[-2.0], [-2.0, -2.0], [0.0, 0.0, 0.0], [0.1 + 0.2, 0.3]])
def test_no_test_without_a_spread(differences):
    first = [30.0] * len(differences)
    result = paired_comparison(first, np.add(first, differences))
    assert (result.p_value, result.detectable) == (None, None)
    assert result.difference.mean == pytest.approx(differences[0])


def test_unequal_lengths_are_refused():
    with pytest.raises(ValueError, match=r"as long as `first` \(1\), got 2"):
        paired_comparison([1.0], [1.0, 2.0])


def test_holm_is_that_of_r():
    # p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm") in R
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([None, 0.5, 0.6]) == [None, 1.0, 1.0]
    assert holm([]) == []
