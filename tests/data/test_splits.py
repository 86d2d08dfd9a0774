import warnings
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ldam_plugins.data import SingleSampleWarning, stratified_split
from ldam_plugins.data.splits import Examples, part_of, read_split, save_split, share_or_name

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


@pytest.mark.parametrize(("count", "expected"), [(3, [1, 1, 1]), (2, [1, 0, 1]), (10, [7, 1, 2])])
@pytest.mark.parametrize("share", [0.2, 0.9])
def test_a_class_of_three_is_in_each_of_three_parts(count, expected, share):
    labels = np.array([0] * count + [1] * 20)
    kept, test = stratified_split(labels, share, min_kept=2)
    parts = [kept[rows] for rows in split(labels[kept], 0.1)]
    found = [int((labels[part] == 0).sum()) for part in (*parts, test)]
    assert sum(found) == count
    assert [size > 0 for size in found] == [size > 0 for size in expected]
    if share == 0.2:
        assert found == expected


# Groups

GROUPED = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), min_size=2, max_size=80)


def split_groups(labels, groups, share, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SingleSampleWarning)
        return stratified_split(labels, share, groups=groups, **options)


@given(GROUPED, SHARES, SEEDS)
def test_no_group_is_divided_and_no_class_leaves_training(pairs, share, seed):
    labels, groups = np.array(pairs).T
    groups_of = [{g for c, g in pairs if c == label} for label in range(6)]
    free = {g for _, g in pairs} - {g for own in groups_of if len(own) == 1 for g in own}
    assume(free and can_be_split(labels))
    kept, held_out = split_groups(labels, groups, share, seed=seed)
    assert sorted([*kept, *held_out]) == list(range(len(labels)))
    assert not set(groups[kept]) & set(groups[held_out])
    assert set(labels[kept]) == set(labels)
    again = split_groups(labels, [f"patient {g}" for g in groups], share, seed=seed)
    assert again[1].tolist() == held_out.tolist()


def deviation(labels, held_out, share):
    counts = np.bincount(labels)
    return (
        ((np.bincount(labels[held_out], minlength=len(counts)) - share * counts) ** 2) / counts
    ).sum()


@pytest.mark.parametrize("seed", range(4))
def test_groups_are_nearer_to_the_shares_than_a_fold_of_scikit_learn(seed):
    from sklearn.model_selection import StratifiedGroupKFold

    random = np.random.RandomState(seed)
    labels = np.unique(random.zipf(1.6, 800) % 8, return_inverse=True)[1]
    groups = random.zipf(1.5, 800) % 60
    _, held_out = split_groups(labels, groups, 0.2, seed=seed)
    folds = StratifiedGroupKFold(5, shuffle=True, random_state=seed).split(labels, labels, groups)
    theirs = [deviation(labels, fold, 0.2) for _, fold in folds]
    assert deviation(labels, held_out, 0.2) < np.median(theirs)
    assert set(labels[held_out]) == set(labels)


def test_a_class_in_two_groups_is_in_both_parts():
    """However far from the share: group 9 has the only other samples of the rare class."""
    labels = np.array([0] * 100 + [1, 1])
    groups = np.array([*range(9)] * 11 + [9] + [8, 9])
    kept, held_out = stratified_split(labels, 0.1, groups=groups)
    assert (labels[kept].tolist().count(1), labels[held_out].tolist().count(1)) == (1, 1)


def test_a_class_in_one_group_stays_and_is_named():
    labels = [0, 0, 1, 1, 0, 0]
    with pytest.warns(SingleSampleWarning, match=r"classes in too few groups: 1$") as caught:
        kept, held_out = stratified_split(labels, 0.3, groups=["a", "b", "b", "b", "c", "a"])
    assert caught[0].filename == __file__
    assert set(kept.tolist()) >= {1, 2, 3}
    assert len(held_out)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (["a"] * 4, "`groups` must be several, got 'one group of 4 samples'"),
        (["a"] * 3, "`groups` must be one for each of 4 samples, got 3"),
        (["a", "a", "b", "b"], "`groups` must be several of a class, got '2 groups'"),
    ],
)
def test_bad_groups_are_refused(groups, message):
    with pytest.raises(ValueError, match=message):
        stratified_split([0, 0, 1, 1], 0.5, groups=groups)


# The record of a split

NAMES = ["a,b.png", "NA", "\u732b.png", "d"]
WHOLE = Examples(NAMES, np.array([0, 0, 1, 1]), ("ant", "bee"), np.array(["p", "p", "q", "q"]))


def test_a_split_is_saved_and_read(tmp_path):
    file = tmp_path / "split.csv"
    parts = {"train": [0, 1, 3], "test": [2], "validation": [1]}
    divided = {part: part_of(WHOLE, np.array(rows)) for part, rows in parts.items()}
    save_split(file, divided)
    save_split(file, divided)  # as a run that is resumed does
    assert read_split(str(file), WHOLE).tolist() == ["train", "validation", "test", "train"]
    backwards = part_of(WHOLE, np.array([3, 2]))
    assert read_split(str(file), backwards).tolist() == ["train", "test"]
    assert file.read_text(encoding="utf-8").splitlines()[0] == "example,class,part,group"
    other = {"train": part_of(WHOLE, np.array([0, 1])), "test": part_of(WHOLE, np.array([3]))}
    message = r"1 are gone: '\u732b.png'; 2 are in another part or class: 'NA', 'd'\. Restore"
    with pytest.raises(ValueError, match=message):
        save_split(file, other)


def test_a_split_of_other_data_is_refused(tmp_path):
    file = tmp_path / "split.csv"
    save_split(file, {"train": part_of(WHOLE, np.array([0, 1, 2]))})
    with pytest.raises(ValueError, match=r"`split_file` .*1 of 4 examples are not in it.*'d'"):
        read_split(str(file), WHOLE)
    with pytest.raises(ValueError, match=r"'NA' is of class 'ant' there, and of 'bee' now"):
        read_split(str(file), Examples(["NA"], np.array([1]), ("ant", "bee")))
    for name, content in (("gone.csv", None), ("bad.csv", "a,b\n1,2\n")):
        if content:
            (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=r"`split_file` must be a split.csv that a run left"):
            read_split(str(tmp_path / name), WHOLE)


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (0.2, 0.2),
        ("0.2", 0.2),
        (".5", 0.5),
        ("test", "test"),
        ("test[:10%]", "test[:10%]"),
        (None, None),
    ],
)
def test_a_part_is_a_share_or_a_name(value, part):
    assert share_or_name("test_split", value) == part


@pytest.mark.parametrize("value", ["0", "1", 1, 1.5, "nan", "-0.1", "20"])
def test_numbers_that_are_no_share(value):
    with pytest.raises(ValueError, match=r"`test_split` must be in \(0, 1\), got"):
        share_or_name("test_split", value)
