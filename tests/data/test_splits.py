import warnings
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ldam_plugins.data import SingleSampleWarning, stratified_split

LABELS = st.lists(st.integers(0, 6), min_size=1, max_size=80).map(np.array)
SHARES = st.floats(0.001, 0.999)
SEEDS = st.integers(0, 2**32 - 1)


def split(labels, share, seed=0):
    """The split, with or without the warning of classes with a single sample."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SingleSampleWarning)
        return stratified_split(labels, share, seed=seed)


def can_be_split(labels):
    return max(Counter(labels.tolist()).values()) > 1


@given(LABELS, SHARES, SEEDS)
def test_each_class_is_in_both_parts_in_its_share(labels, share, seed):
    assume(can_be_split(labels))
    kept, held_out = split(labels, share, seed)
    assert sorted([*kept, *held_out]) == list(range(len(labels)))
    for part in (kept, held_out):
        assert part.dtype == np.int64
        assert part.tolist() == sorted(part)
    in_kept, in_held_out = Counter(labels[kept].tolist()), Counter(labels[held_out].tolist())
    for label, count in Counter(labels.tolist()).items():
        assert in_kept[label] + in_held_out[label] == count
        if count == 1:
            assert in_kept[label] == 1
        else:
            assert in_kept[label] > 0
            assert in_held_out[label] > 0
            only_one = in_held_out[label] == 1 or in_kept[label] == 1
            assert only_one or abs(in_held_out[label] - share * count) <= 0.5 + 1e-9


@given(LABELS, SHARES, SEEDS)
def test_the_split_of_a_class_depends_on_its_own_samples_only(labels, share, seed):
    assume(can_be_split(labels))
    _, held_out = split(labels, share, seed)
    again = split(labels, share, seed)[1]
    assert again.tolist() == held_out.tolist()
    for label in set(labels.tolist()):
        members = np.flatnonzero(labels == label)
        if len(members) > 1:
            _, alone = split(np.full(len(members), label), share, seed)
            assert members[alone].tolist() == [i for i in held_out if labels[i] == label]


def test_the_choice_is_the_same_on_every_machine():
    labels = np.arange(40) % 3
    _, held_out = stratified_split(labels, 0.2)
    assert held_out.tolist() == [6, 14, 16, 21, 25, 29, 32, 33, 37]
    _, other = stratified_split(labels, 0.2, seed=1)
    assert other.tolist() == [1, 8, 14, 18, 19, 20, 22, 33, 39]


@pytest.mark.parametrize(
    ("count", "share", "held_out"),
    [
        (100, 0.1, 10),
        (5, 0.1, 1),  # 0.5
        (24, 0.1, 2),
        (25, 0.1, 3),  # half up
        (50, 0.29, 15),  # 14.5; as a float it is a little less
        (4, 0.01, 1),
        (4, 0.99, 3),
        (2, 0.9, 1),
        (1000, 1e-7, 1),
    ],
)
def test_sizes_are_rounded_but_never_to_nothing(count, share, held_out):
    kept, found = stratified_split([0] * count, share)
    assert (len(kept), len(found)) == (count - held_out, held_out)


def test_single_samples_stay_in_training_and_their_classes_are_named():
    labels = [0, 0, 2, 3, 0, 3, 4]
    with pytest.warns(SingleSampleWarning, match=r"with a single sample: 2, 4$") as caught:
        kept, held_out = stratified_split(labels, 0.5)
    assert caught[0].filename == __file__
    assert {2, 6} <= set(kept.tolist())
    assert np.setdiff1d(labels, np.array(labels)[held_out]).tolist() == [2, 4]


def test_splits_without_single_samples_do_not_warn():
    stratified_split([0, 0, 2, 2], 0.5)


def test_labels_are_not_changed():
    labels = np.array([1, 0, 1, 0, 1])
    stratified_split(labels, 0.3)
    assert labels.tolist() == [1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ("labels", "options", "error", "message"),
    [
        ([0, 0], {"share": 0}, ValueError, r"`share` must be in \(0, 1\), got 0"),
        ([0, 0], {"share": 1.0}, ValueError, r"`share` must be in \(0, 1\), got 1\.0"),
        ([0, 0], {"share": float("nan")}, ValueError, r"`share` must be in \(0, 1\), got nan"),
        ([0, 0], {"share": "0.1"}, TypeError, r"`share` must be in \(0, 1\)"),
        ([0, 0], {"share": 0.1, "seed": -1}, ValueError, "`seed` must be an integer >= 0"),
        ([0, 0], {"share": 0.1, "seed": 2**32}, ValueError, "`seed` must be an integer >= 0"),
        ([0, 0], {"share": 0.1, "seed": 0.5}, TypeError, "`seed` must be an integer"),
        ([], {"share": 0.1}, ValueError, "`labels` must be at least one label, got 'none'"),
        ([0, 1, 3], {"share": 0.1}, ValueError, "`labels` must be of a class with two samples"),
        ([0, -1, 0], {"share": 0.1}, ValueError, "-1 in row 1"),
        ([0.5, 0.5], {"share": 0.1}, TypeError, "`labels`"),
    ],
)
def test_bad_splits_are_refused(labels, options, error, message):
    with pytest.raises(error, match=message):
        stratified_split(labels, **options)
