import numpy as np
import pytest
from scipy import stats

from ldam_plugins.metrics.paired import class_differences, paired_difference


def pair(rng, sizes, first, second):
    """Labels of classes of some sizes, and two predictions with some accuracy in each class."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    right = [rng.random(len(labels)) < np.take(each, labels) for each in (first, second)]
    wrong = (labels + 1) % len(sizes)
    return labels, *(np.where(each, labels, wrong) for each in right)


def test_counts_and_difference():
    labels = np.repeat([0, 1, 2], [4, 2, 1])
    first = np.array([0, 0, 0, 1, 1, 0, 2])
    second = np.array([0, 1, 1, 0, 1, 1, 0])
    found = paired_difference(labels, first, second)
    assert (found.samples, found.gained, found.lost) == (7, 2, 3)
    assert found.difference == pytest.approx((-1 / 4 + 1 / 2 - 1) / 3)
    plain = paired_difference(labels, first, second, balanced=False)
    assert plain.difference == pytest.approx(-1 / 7)
    assert plain.p_value == pytest.approx(stats.binomtest(2, 5).pvalue)
    some = paired_difference(labels, first, second, classes=[0, 1])
    assert (some.samples, some.difference) == (6, pytest.approx((-1 / 4 + 1 / 2) / 2))
    by_class = class_differences(labels, first, second)
    assert {c: (d.gained, d.lost) for c, d in by_class.items()} == {0: (1, 2), 1: (1, 0), 2: (0, 1)}
    assert by_class[0].p_value == pytest.approx(stats.binomtest(1, 3).pvalue)


def test_the_same_predictions_are_no_difference():
    found = paired_difference([0, 1, 1] * 50, [0, 0, 1] * 50, [0, 0, 1] * 50)
    assert (found.difference, found.p_value) == (0, 1)
    assert -0.05 < found.low < 0 < found.high < 0.05


def test_the_stratified_test_is_mcnemars_where_classes_are_of_one_size():
    rng = np.random.default_rng(0)
    labels, first, second = pair(rng, [200] * 4, [0.6] * 4, [0.68] * 4)
    balanced = paired_difference(labels, first, second)
    plain = paired_difference(labels, first, second, balanced=False)
    assert balanced.difference == pytest.approx(plain.difference)
    assert balanced.p_value == pytest.approx(plain.p_value, abs=0.01)
    # scipy's bootstrap of the same: mean of the differences, one sample after another
    gain = (second == labels).astype(float) - (first == labels)
    expected = stats.bootstrap((gain,), np.mean, method="percentile", rng=1).confidence_interval
    assert (balanced.low, balanced.high) == pytest.approx(tuple(expected), abs=0.005)


def test_intervals_and_tests_hold_in_95_percent_of_test_sets():
    rng = np.random.default_rng(1)
    sizes, first, second = [150, 60, 25, 20], [0.95, 0.8, 0.5, 0.3], [0.9, 0.8, 0.6, 0.5]
    true = np.subtract(second, first).mean()
    covered, told = 0, 0
    for _ in range(120):
        found = paired_difference(*pair(rng, sizes, first, second))
        covered += found.low <= true <= found.high
        told += paired_difference(*pair(rng, sizes, first, first)).p_value < 0.05
    assert 0.9 <= covered / 120 <= 0.99
    assert told / 120 <= 0.1


def test_bad_input_is_named():
    with pytest.raises(
        ValueError, match="`second` must be of 2 samples, as `labels`, got '3 samples'"
    ):
        paired_difference([0, 1], [0, 1], [0, 1, 1])
    with pytest.raises(ValueError, match="samples of the classes that count"):
        paired_difference([0, 1], [0, 1], [0, 1], classes=[5])
    with pytest.raises(TypeError):
        paired_difference([0.5, 1], [0, 1], [0, 1])
