import numpy as np
import pytest

from ldam_plugins import ClassCounts
from ldam_plugins.metrics import long_tail_metrics
from ldam_plugins.reports.class_table import class_rows, per_class_table, printable, summary

COUNTS = ClassCounts([30, 500, 5, 500], class_names=["fox", "cat", "lynx", "dog"])
TEST = {
    "top1_error": 33.125,
    "balanced_accuracy": 0.6,
    "worst_class_accuracy": 0.25,
    "per_class_accuracy": [0.75, 0.75, None, 0.25],
    "many": 0.5,
    "medium": 0.75,
    "few": None,
    "nll": 1.25,
    "ece": 0.125,
}


def many_classes(count):
    return {**TEST, "per_class_accuracy": [0.5] * count}, ClassCounts(range(count + 10, 10, -1))


def test_rows_go_from_head_to_tail_and_equal_counts_in_class_order():
    rows = class_rows(TEST, COUNTS)
    assert [row.name for row in rows] == ["cat", "dog", "fox", "lynx"]
    assert [row.class_id for row in rows] == [1, 3, 0, 2]
    assert rows[1][:5] == (3, "dog", 500, "many", 0.25)
    assert rows[3][:5] == (2, "lynx", 5, "few", None)
    assert set(rows[1][5:]) == {None}  # older metrics


def test_unnamed_classes_are_shown_by_index():
    assert [row.name for row in class_rows(TEST, ClassCounts([4, 3, 2, 1]))] == list("0123")


def test_other_number_of_classes_is_refused():
    with pytest.raises(ValueError, match=r"`per_class_accuracy` must be one.*2 classes, got 4"):
        class_rows(TEST, ClassCounts([4, 3]))


def test_summary_words_every_metric():
    assert dict(summary(TEST, COUNTS)) == {
        "balanced error": "41.67 %",
        "train-prior error": "49.27 %",
        "top-1 error": "33.12 %",
        "worst class accuracy": "25.00 %",
        "many (> 100), 2 classes": "50.00 %",
        "medium (20..100), 1 class": "75.00 %",
        "few (< 20), 1 class": "-",
        "cross-entropy (nll)": "1.2500",
        "calibration error (ece)": "0.1250",
    }


def test_table_has_every_class_and_metric():
    lines = per_class_table(TEST, COUNTS).splitlines()
    assert lines[2].split() == ["cat", "500", "many", "75.00", "%"]
    assert lines[5].split() == ["lynx", "5", "few", "-"]
    assert lines[6] == ""
    assert len(lines) == 7 + 9


def test_table_of_thirty_classes_is_whole_and_of_more_is_cut():
    whole = per_class_table(*many_classes(30)).splitlines()
    assert len(whole) == 2 + 30 + 1 + 9
    cut = per_class_table(*many_classes(31)).splitlines()
    assert len(cut) == 2 + 31 + 1 + 9
    assert cut[17].startswith("... 1 more classes")
    assert [cut[row].split()[0] for row in (2, 16, 18, 32)] == ["0", "14", "16", "30"]


def test_odd_limit_shows_more_of_the_head():
    lines = per_class_table(*many_classes(10), max_rows=3).splitlines()
    assert [line.split()[0] for line in lines[2:6]] == ["0", "1", "...", "9"]
    with pytest.raises(ValueError, match="`max_rows` must be an integer >= 2, got 1"):
        per_class_table(TEST, COUNTS, max_rows=1)


def test_names_cannot_break_the_terminal():
    counts = ClassCounts([9, 8, 7, 6], class_names=["a\x1b[31m\nb", "y", "z", "x" * 99])
    table = per_class_table(TEST, counts)
    assert "\x1b" not in table
    assert "a\N{REPLACEMENT CHARACTER}[31m\N{REPLACEMENT CHARACTER}b" in table
    assert "x" * 37 + "... " in table
    assert "x" * 38 not in table


def test_names_that_look_like_numbers_stay_as_they_are():
    names = ["1e5", "007", "2.50", "3"]
    table = per_class_table(TEST, ClassCounts([9, 8, 7, 6], class_names=names))
    assert [line.split()[0] for line in table.splitlines()[2:6]] == names


def test_printable_keeps_what_fits():
    assert printable("x" * 40) == "x" * 40
    assert printable("x" * 41) == "x" * 37 + "..."
    assert printable("猫 ñ") == "猫 ñ"


def test_table_and_summary_of_detailed_metrics():
    counts = ClassCounts([300, 30, 3], class_names=["cat", "fox", "lynx"], few_below=4)
    labels = np.repeat(range(3), [40, 30, 10])
    logits = np.eye(3)[(labels + (np.arange(80) % 4 == 0)) % 3]
    test = long_tail_metrics(logits, labels, counts, detailed=True)
    lines = per_class_table(test, counts).splitlines()
    assert lines[0].split("  ")[0] == "class"
    assert lines[0].split()[-5:] == ["95", "%", "interval", "precision", "F1"]
    low, high = test["intervals"]["per_class_accuracy"][0]
    cells = ["cat", "300", "many", "40", "75.00", "%", f"{100 * low:.1f}..{100 * high:.1f}"]
    precision, f1 = (100 * test[f"per_class_{name}"][0] for name in ("precision", "f1"))
    assert lines[2].split() == [*cells, f"{precision:.2f}", "%", f"{f1:.2f}", "%"]
    said = dict(summary(test, counts))
    low, high = test["intervals"]["balanced_error"]
    words = f"{test['balanced_error']:.2f} % ({low:.1f}..{high:.1f}, few examples: too narrow)"
    assert said["balanced error"] == words
    low, high = test["intervals"]["worst_class_accuracy"]
    assert said["worst class accuracy: fox"] == f"73.33 % ({100 * low:.1f}..{100 * high:.1f})"
    bias = -100 * test["intervals"]["worst_class_selection_bias"]
    assert said["worst class: too low, being picked, by"] == f"{bias:.1f} points"
    assert "few (< 4), 1 class" in said
    assert "too narrow" not in said["few (< 4), 1 class"]
    assert {"macro F1", "weighted precision"} <= set(said)
    assert "AUROC" not in said
    two = long_tail_metrics(logits[:70, :2], labels[:70], counts.counts[:2], detailed=True)
    assert {"AUROC", "average precision of the rarer class"} <= {
        name for name, _ in summary(two, ClassCounts(counts.counts[:2]))
    }
