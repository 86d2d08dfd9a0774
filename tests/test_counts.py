from collections import Counter
from fractions import Fraction
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Image

from ldam_plugins import ClassCounts, create_loss

CIFAR_LT = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
COLUMN = Dataset.from_dict({"label": [0, None, 1]})["label"]


def exact_weights(counts, one_minus_beta):
    """Effective-number weights in exact rational arithmetic."""
    beta = 1 - one_minus_beta
    raw = [one_minus_beta / (1 - beta**n) for n in counts]
    return [float(len(counts) * w / sum(raw)) for w in raw]


def test_margins_follow_the_fourth_root():
    margins = ClassCounts([1600, 81, 1]).margins(0.5, dtype=torch.float64)
    assert margins.tolist() == pytest.approx([0.5 / 1600**0.25, 0.5 / 3, 0.5], rel=1e-15)
    assert ClassCounts([1600, 81, 1]).margins().dtype == torch.float32


def test_weights_equal_exact_arithmetic():
    weights = ClassCounts(CIFAR_LT).weights(0.9999, dtype=torch.float64)
    # 0.9999 as the float it is, not as the decimal.
    expected = exact_weights(CIFAR_LT, 1 - Fraction(0.9999))
    assert weights.tolist() == pytest.approx(expected, rel=1e-12)


def test_weights_of_the_authors_on_cifar10_lt():
    weights = ClassCounts(CIFAR_LT).weights(0.9999)
    beta, counts = 0.9999, np.array(CIFAR_LT)
    raw = (1 - beta) / (1 - np.power(beta, counts))
    assert weights.tolist() == pytest.approx((raw / raw.sum() * 10).tolist(), rel=1e-6)


@pytest.mark.parametrize("gap", [1e-12, 1e-9, 1e-4])
def test_weights_keep_their_digits_near_one(gap):
    beta, counts = 1 - gap, [10**9, 10**6, 1000, 2, 1]
    weights = ClassCounts(counts).weights(beta, dtype=torch.float64)
    from mpmath import mp, mpf

    with mp.workdps(60):
        raw = [(1 - mpf(beta)) / (1 - mpf(beta) ** n) for n in counts]
        expected = [float(len(counts) * w / sum(raw)) for w in raw]
    assert weights.tolist() == pytest.approx(expected, rel=1e-11)


def test_weights_at_the_ends_of_beta():
    counts = ClassCounts([1000, 10])
    assert counts.weights(0.0).tolist() == [1.0, 1.0]
    nearly_inverse = counts.weights(1 - 1e-12, dtype=torch.float64)
    assert (nearly_inverse[1] / nearly_inverse[0]).item() == pytest.approx(100, rel=1e-8)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9999, 1 - 1e-12])
def test_weights_sum_to_the_number_of_classes(beta):
    assert ClassCounts(CIFAR_LT).weights(beta).sum().item() == pytest.approx(10, rel=1e-6)


def test_groups_at_their_borders():
    groups = ClassCounts([101, 100, 20, 19]).groups()
    assert groups == {"many": [0], "medium": [1, 2], "few": [3]}


def test_limits_of_groups_may_be_others():
    counts = ClassCounts([51, 50, 5, 4], list("abcd"), many_above=50, few_below=5)
    assert counts.groups() == {"many": [0], "medium": [1, 2], "few": [3]}
    plain = ClassCounts([51, 50, 5, 4], list("abcd"))
    again = plain.with_limits(many_above=50, few_below=5)
    assert (again, again.class_names) == (counts, counts.class_names)
    assert again != plain
    assert ClassCounts([9, 5], many_above=7, few_below=8).groups()["medium"] == []
    for limits, message in {
        (5, 7): r"`few_below` must be <= many_above \+ 1 = 6, got 7",
        (-1, 0): "`many_above` must be an integer >= 0",
        (9, 2.5): "`few_below` must be an integer",
    }.items():
        with pytest.raises((TypeError, ValueError), match=message):
            plain.with_limits(many_above=limits[0], few_below=limits[1])


def test_prior_and_totals():
    counts = ClassCounts([6, 3, 1], class_names=["a", "b", "c"])
    assert counts.prior(dtype=torch.float64).tolist() == pytest.approx([0.6, 0.3, 0.1])
    assert (counts.total, counts.imbalance_ratio, len(counts)) == (10, 6.0, 3)
    assert counts.class_names == ("a", "b", "c")


def test_counts_cannot_be_changed_from_outside():
    source = np.array([3, 2])
    counts = ClassCounts(source)
    source[0] = 99
    assert counts.counts.tolist() == [3, 2]
    with pytest.raises(ValueError, match="read-only"):
        counts.counts[0] = 1


@pytest.mark.parametrize(
    "labels",
    [
        [0, 1, 1, 2],
        (0, 1, 1, 2),
        np.array([0, 1, 1, 2], dtype=np.uint8),
        torch.tensor([0, 1, 1, 2]),
        Dataset.from_dict({"label": [0, 1, 1, 2]})["label"],
        np.array([0, 1, 1, 2], dtype=object),
    ],
    ids=["list", "tuple", "array", "tensor", "column", "objects"],
)
def test_from_labels_of_every_kind(labels):
    assert ClassCounts.from_labels(labels).counts.tolist() == [1, 2, 1]


def test_from_labels_reads_no_image():
    features = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    rows = {"image": [{"bytes": b"no image", "path": None}] * 3, "label": [0, 1, 1]}
    column = Dataset.from_dict(rows, features=features)["label"]
    assert ClassCounts.from_labels(column).counts.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ClassCounts([]), ValueError, r"`counts` must be one count per class"),
        (lambda: ClassCounts([3, 0, 2, 0]), ValueError, r"class 1, 3\. .*remove the class"),
        (lambda: ClassCounts([3, 0], ["cat", "dog"]), ValueError, r"class 'dog'"),
        (lambda: ClassCounts([3, -1]), ValueError, r">= 1 in every class, got '-1 in 1'"),
        (lambda: ClassCounts([3.0, 1.5]), TypeError, r"`counts` must be integers, got .*3\.0"),
        (lambda: ClassCounts([[1, 2]]), ValueError, r"one-dimensional"),
        (lambda: ClassCounts([1, 2], ["a"]), ValueError, r"one name for each of the 2 counts"),
        (lambda: ClassCounts([1]).weights(1.0), ValueError, r"`beta` must be in \[0, 1\), got 1"),
        (lambda: ClassCounts([1]).weights(-0.1), ValueError, r"got -0\.1"),
        (lambda: ClassCounts([1]).margins(-1), ValueError, r"`max_margin` must be .*>= 0"),
        (lambda: ClassCounts([1]).margins("big"), TypeError, r"`max_margin`.*'big'"),
        (lambda: ClassCounts([1]).margins(float("nan")), ValueError, r"finite"),
        (lambda: ClassCounts.from_labels([]), ValueError, r"at least one label"),
        (lambda: ClassCounts.from_labels(["a"]), TypeError, r"Map class names"),
        (lambda: ClassCounts.from_labels([0.0]), TypeError, r"`labels` must be integers"),
        (lambda: ClassCounts.from_labels([0, 3], 3), ValueError, r"in 0\.\.2, got '3 in row 1'"),
        (lambda: ClassCounts.from_labels([0, -1]), ValueError, r"'-1 in row 1'"),
        (lambda: ClassCounts.from_labels([0, 2]), ValueError, r"no training sample in class 1"),
        (lambda: ClassCounts.from_labels([0], 0), ValueError, r"`num_classes`"),
        (lambda: ClassCounts.from_labels([0, 1], 3, ["a"]), ValueError, r"each of the 3 counts"),
        (lambda: ClassCounts.from_labels([1, 2, 3]), ValueError, r"class 0\. .*subtract 1"),
        (lambda: ClassCounts.from_labels([1, 2, 3], 3), ValueError, r"3 in row 2.*subtract 1"),
        (lambda: ClassCounts.from_labels([0, 5, 9]), ValueError, r"return_inverse=True"),
        (lambda: ClassCounts.from_labels([0.0, 1.0]), TypeError, r"np\.asarray.*astype\(int\)"),
        (lambda: ClassCounts.from_labels([True]), TypeError, r"np\.asarray.*astype\(int\)"),
        (lambda: ClassCounts.from_labels([0, None]), ValueError, r"None in row 1.*Leave out"),
        (lambda: ClassCounts.from_labels([0.0, np.nan]), ValueError, r"nan in row 1.*Leave out"),
        (lambda: ClassCounts.from_labels([[0], [1]]), ValueError, r"squeeze.*np\.ravel"),
        (lambda: ClassCounts.from_labels([[0, 1], [1]]), TypeError, r"index of one class"),
        (lambda: ClassCounts.from_labels([[0.5, 0.5]]), TypeError, r"Soft labels"),
        (lambda: ClassCounts.from_labels({"a": 0}), ValueError, r"one-dimensional"),
        (lambda: ClassCounts.from_labels(torch.ones(2).bfloat16()), TypeError, r"astype\(int\)"),
        (lambda: ClassCounts.from_labels(COLUMN), ValueError, r"None in row 1.*Leave out"),
    ],
)
def test_bad_counts_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    "labels",
    [
        np.asarray([1, 2, 2, 3]) - 1,
        np.unique([4, 7, 7, 9], return_inverse=True)[1],
        np.asarray([0.0, 1.0, 1.0, 2.0]).astype(int),
        np.ravel([[0], [1], [1], [2]]),
        torch.tensor([[0], [1], [1], [2]]).squeeze(-1),
        [torch.tensor(0), torch.tensor(1), torch.tensor(1), torch.tensor(2)],
    ],
)
def test_the_way_out_of_each_error_leads_to_counts(labels):
    assert ClassCounts.from_labels(labels).counts.tolist() == [1, 2, 1]


class TestCountsByClass:
    """Counts that come with their classes are put in class order, or refused."""

    LABELS = pd.Series([2] * 16 + [0] * 6 + [1] * 2)
    IN_ORDER: ClassVar = [6, 2, 16]

    @pytest.mark.parametrize(
        "count",
        [
            lambda labels: labels.value_counts(),
            lambda labels: labels.value_counts(ascending=True),
            lambda labels: labels.value_counts(sort=False),
            lambda labels: labels.astype("Int64").value_counts(),
            lambda labels: labels.astype("int64[pyarrow]").value_counts(),
            lambda labels: labels.astype("category").value_counts(),
            lambda labels: labels.where(labels >= 0).astype(float).value_counts(),
            lambda labels: labels.groupby(labels).size().sort_values(),
            lambda labels: pd.Series([6, 2, 16]),
            lambda labels: pd.Series([6, 2, 16]).index.map({0: 6, 1: 2, 2: 16}),
            lambda labels: Counter(labels.tolist()),
            lambda labels: labels.value_counts().to_dict(),
            lambda labels: Counter(labels.to_numpy()),
        ],
    )
    def test_in_class_order(self, count):
        counts = count(self.LABELS)
        assert ClassCounts(counts).counts.tolist() == self.IN_ORDER
        assert create_loss("ldam", counts).class_counts.counts.tolist() == self.IN_ORDER

    @pytest.mark.parametrize(
        ("count", "shown"),
        [
            (lambda labels: labels.map({0: "a", 1: "b", 2: "c"}).value_counts(), r"\['c', 'a'"),
            (lambda labels: labels.astype(str).value_counts(), r"\['2', '0', '1'\]"),
            (lambda labels: (labels + 1).value_counts(), r"\[3, 1, 2\]"),
            (lambda labels: labels.replace({1: 3}).value_counts(), r"\[2, 0, 3\]"),
            (lambda labels: pd.Series([3, 4], index=[0, 0]), r"\[0, 0\]"),
            (lambda labels: pd.Series([3, 4], index=["a", 0]), r"\['a', 0\]"),
            (lambda labels: labels.value_counts(bins=2), r"\[Interval"),
            (lambda labels: pd.DataFrame({"a": labels}).value_counts(), r"\[\(2,\)"),
            (lambda labels: {"a": 3, "b": 4}, r"\['a', 'b'\]"),
            (lambda labels: Counter("aab"), r"\['a', 'b'\]"),
        ],
    )
    def test_other_classes_are_refused(self, count, shown):
        wanted = rf"`counts` must be indexed by the classes 0\.\..*got {shown}.*from_labels"
        with pytest.raises(ValueError, match=wanted):
            ClassCounts(count(self.LABELS))

    def test_tables_and_shares_are_refused(self):
        for table in (
            self.LABELS.value_counts().to_frame(),
            self.LABELS.value_counts().reset_index(),
        ):
            with pytest.raises(ValueError, match=r"one-dimensional, got 'DataFrame'.*the column"):
                ClassCounts(table)
        with pytest.raises(TypeError, match="`counts` must be integers"):
            ClassCounts(self.LABELS.value_counts(normalize=True))

    def test_a_class_without_samples_is_named(self):
        counts = self.LABELS.value_counts().reindex(range(4), fill_value=0)
        with pytest.raises(ValueError, match="no training sample in class 3"):
            ClassCounts(counts)
