import numpy as np
import pytest

from ldam_plugins import long_tail_counts, long_tail_indices


def authors_choice(targets, ratio, kind, seed):
    """The rule of the paper's data set class, written out."""
    classes = np.unique(targets)
    largest = len(targets) / len(classes)
    sizes = []
    for c in range(len(classes)):
        if kind == "exp":
            sizes.append(int(largest * (1 / ratio) ** (c / (len(classes) - 1.0))))
        else:
            sizes.append(int(largest if c < len(classes) // 2 else largest / ratio))
    np.random.seed(seed)
    kept = []
    for c, size in zip(classes, sizes, strict=True):
        of_class = np.where(targets == c)[0]
        np.random.shuffle(of_class)
        kept.extend(of_class[:size].tolist())
    return kept


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (100, [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]),
        (10, [5000, 3871, 2997, 2320, 1796, 1391, 1077, 834, 645, 500]),
    ],
)
def test_counts_of_cifar10_lt(ratio, expected):
    assert long_tail_counts(5000, 10, ratio).tolist() == expected


def test_step_profile_is_half_and_half():
    assert long_tail_counts(5000, 10, 100, "step").tolist() == [5000] * 5 + [50] * 5
    assert long_tail_counts(30, 3, 10, "step").tolist() == [30, 3, 3]


def test_none_profile_and_ratio_one_keep_all():
    assert long_tail_counts(7, 3, 100, "none").tolist() == [7, 7, 7]
    assert long_tail_counts(7, 3, 1).tolist() == [7, 7, 7]


@pytest.mark.parametrize("profile", ["exp", "step"])
@pytest.mark.parametrize(("classes", "ratio", "seed"), [(10, 100, 0), (10, 10, 3), (100, 50, 7)])
def test_indices_are_the_authors(profile, classes, ratio, seed):
    targets = np.random.default_rng(5).permutation(np.repeat(np.arange(classes), 200))
    ours = long_tail_indices(targets, ratio, profile, seed)
    assert ours.tolist() == authors_choice(targets, ratio, profile, seed)


def test_indices_leave_the_global_generator_alone():
    np.random.seed(1)
    expected = np.random.random()
    np.random.seed(1)
    long_tail_indices([0, 1] * 50, 5)
    assert np.random.random() == expected


def test_none_keeps_every_index_in_order():
    assert long_tail_indices([1, 0, 1, 0], profile="none").tolist() == [0, 1, 2, 3]


def kept_of(sizes, *args, **options):
    """Samples that each class keeps of a set with classes of these sizes."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    kept = long_tail_indices(labels, *args, **options)
    assert len(set(kept.tolist())) == len(kept)
    return np.bincount(labels[kept], minlength=len(sizes)).tolist()


@pytest.mark.parametrize(
    ("sizes", "ratio", "profile", "expected"),
    [
        # 300, 300 * 100 ** -0.25 = 94.9, 30, 9.5 and 3 from the largest class to the smallest
        ([300, 150, 80, 50, 20], 100, "exp", [300, 94, 30, 9, 3]),
        ([20, 50, 80, 150, 300], 100, "exp", [3, 9, 30, 94, 300]),
        ([80, 300, 20, 50, 150], 100, "exp", [30, 300, 3, 9, 94]),
        # classes of one size rank by index
        ([50, 100, 50, 100], 8, "exp", [25, 100, 12, 50]),
        ([20, 50, 80, 150, 300], 10, "step", [20, 30, 30, 150, 300]),
        # a natural tail that is steeper than the profile stays as it is
        ([2, 900, 6], 3, "exp", [2, 900, 6]),
        ([20, 50, 80, 150, 300], 1, "exp", [20, 50, 80, 150, 300]),
        ([7], 100, "exp", [7]),
    ],
)
def test_classes_of_different_sizes_rank_by_size_and_keep_no_more_than_they_have(
    sizes, ratio, profile, expected
):
    assert kept_of(sizes, ratio, profile) == expected


@pytest.mark.parametrize("profile", ["exp", "step"])
def test_a_larger_class_never_keeps_less_than_a_smaller_one(profile):
    random = np.random.default_rng(3)
    for _ in range(50):
        sizes = random.integers(40, 400, random.integers(2, 12)).tolist()
        kept = kept_of(sizes, random.uniform(1, 40), profile)
        by_size = sorted(range(len(sizes)), key=lambda c: (-sizes[c], c))
        assert [kept[c] for c in by_size] == sorted(kept, reverse=True)
        assert max(kept) == max(sizes)
        assert all(np.less_equal(kept, sizes))


def test_order_by_index_is_the_authors_rule_on_sets_of_any_sizes():
    assert kept_of([10, 2, 6], 2, class_order="index") == [6, 2, 3]
    targets = np.random.default_rng(5).permutation(np.repeat(np.arange(5), [20, 50, 80, 150, 300]))
    ours = long_tail_indices(targets, 100, class_order="index")
    assert ours.tolist() == authors_choice(targets, 100, "exp", 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: long_tail_counts(50, 10, 51), r"`ratio` must be small enough.*at most 50"),
        (lambda: long_tail_counts(50, 10, 0.5), r"`ratio` must be .*>= 1, got 0\.5"),
        (lambda: long_tail_counts(50, 10, 10, "expo"), r"'expo'\. Did you mean 'exp'"),
        (lambda: long_tail_counts(0, 10, 10), r"`n_max`"),
        (lambda: long_tail_indices([], 10), r"at least one label"),
        (lambda: long_tail_indices([0, 1], 0), r"`ratio`"),
        (lambda: long_tail_indices([0, 2], 1), r"no training sample in class 1"),
        (lambda: long_tail_indices([0, 0, 2, 2], 9), r"no training sample in class 1"),
        (lambda: long_tail_indices([0, 0, 0, 1], 4), r"`ratio` must be small.*at most 3"),
        (lambda: long_tail_indices([0, 1], class_order="sizes"), r"`class_order`.*mean 'size'"),
        (lambda: long_tail_indices([0, 1], 1, seed=-1), r"`seed`"),
        (lambda: long_tail_indices([0, 5], 1, num_classes=2), r"5 in row 1"),
    ],
)
def test_bad_profiles_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("profile", ["exp", "step"])
def test_the_tail_of_whole_multiples_is_exact(profile):
    """In floating point 4900 * 49 ** -1 is a little below 100."""
    for ratio in range(1, 300):
        for smallest in (1, 2, 50, 100):
            kept = long_tail_counts(ratio * smallest, 10, ratio, profile)
            assert kept[0] == ratio * smallest
            assert kept[-1] == smallest


def floor_by_integers(n_max, ratio, place, last):
    """The largest k with ``k <= n_max * ratio ** -(place / last)``, by integers alone."""
    low, high = 0, n_max
    while low < high:
        middle = (low + high + 1) // 2
        if middle**last * ratio**place <= n_max**last:
            low = middle
        else:
            high = middle - 1
    return low


@pytest.mark.parametrize("n_max", [5000, 500, 4900, 1280, 99])
@pytest.mark.parametrize("ratio", [2, 10, 16, 49, 64])
@pytest.mark.parametrize("classes", [2, 3, 5, 10])
def test_counts_are_those_of_exact_arithmetic(n_max, ratio, classes):
    last = classes - 1
    exact = [floor_by_integers(n_max, ratio, place, last) for place in range(classes)]
    assert long_tail_counts(n_max, classes, ratio).tolist() == exact


@pytest.mark.parametrize("ratio", [10, 20, 50, 100, 200])
@pytest.mark.parametrize(("n_max", "classes"), [(5000, 10), (500, 100), (1000, 20), (1310, 77)])
def test_counts_are_the_authors_where_theirs_are_exact(n_max, classes, ratio):
    authors = [int(n_max * (1 / ratio) ** (c / (classes - 1))) for c in range(classes)]
    exact = [floor_by_integers(n_max, ratio, c, classes - 1) for c in range(classes)]
    ours = long_tail_counts(n_max, classes, ratio).tolist()
    assert ours == exact
    differ = [(a, o) for a, o in zip(authors, ours, strict=True) if a != o]
    assert all(a == o - 1 for a, o in differ)  # lost to rounding


def test_a_decimal_ratio_is_meant_as_it_is_written():
    assert long_tail_counts(11, 2, 1.1).tolist() == [11, 10]
    assert long_tail_counts(333, 2, 33.3, "step").tolist() == [333, 10]


def test_many_even_classes_are_no_work():
    assert set(long_tail_counts(5000, 100_000, ratio=1)) == {5000}
