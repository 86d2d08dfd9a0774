"""Classes from head to tail with their accuracy, and the table printed at the end of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate

from ldam_plugins._validation import check_int, invalid
from ldam_plugins.counts import FEW_BELOW, MANY_ABOVE, ClassCounts
from ldam_plugins.metrics.views import error_views

GROUP_NAMES = {
    "many": f"many (> {MANY_ABOVE})",
    "medium": f"medium ({FEW_BELOW}..{MANY_ABOVE})",
    "few": f"few (< {FEW_BELOW})",
}
_NAME_WIDTH = 40
_ABSENT = "-"


class ClassRow(NamedTuple):
    """One class of a run; ``accuracy`` in 0..1, None without a test sample."""

    class_id: int
    name: str
    samples: int
    group: str
    accuracy: float | None


def class_rows(test: Mapping[str, Any], class_counts: ClassCounts) -> list[ClassRow]:
    """Every class with its training samples, group and accuracy, from head to tail.

    Args:
        test: Metrics as of :func:`.long_tail_metrics`.
        class_counts: Training samples per class; unnamed classes are shown by index.

    Raises:
        ValueError: another number of accuracies than of classes.
    """
    accuracies = test["per_class_accuracy"]
    if len(accuracies) != len(class_counts):
        expected = f"one accuracy for each of the {len(class_counts)} classes"
        raise invalid("per_class_accuracy", expected, len(accuracies))
    names = class_counts.class_names or [str(index) for index in range(len(class_counts))]
    group_of = {index: group for group, ids in class_counts.groups().items() for index in ids}
    columns = zip(names, class_counts.counts.tolist(), accuracies, strict=True)
    rows = [
        ClassRow(index, name, samples, group_of[index], accuracy)
        for index, (name, samples, accuracy) in enumerate(columns)
    ]
    return sorted(rows, key=lambda row: -row.samples)


def summary(test: Mapping[str, Any], class_counts: ClassCounts) -> list[tuple[str, str]]:
    """Name and worded value of each metric of the whole test set; accuracies in %."""
    views = error_views(test["per_class_accuracy"], class_counts)  # older runs did not record them
    sizes = {group: len(ids) for group, ids in class_counts.groups().items()}
    groups = [
        (f"{GROUP_NAMES[group]}, {size} {'class' if size == 1 else 'classes'}", test[group])
        for group, size in sizes.items()
    ]
    return [
        ("balanced error", f"{views['balanced_error']:.2f} %"),
        ("train-prior error", f"{views['train_prior_error']:.2f} %"),
        ("top-1 error", f"{test['top1_error']:.2f} %"),
        ("worst class accuracy", percent(test["worst_class_accuracy"])),
        *((name, percent(value)) for name, value in groups),
        ("cross-entropy (nll)", f"{test['nll']:.4f}"),
        ("calibration error (ece)", f"{test['ece']:.4f}"),
    ]


def percent(share: float | None) -> str:
    """A share in 0..1 as ``83.10 %``, or a dash where there is none."""
    return _ABSENT if share is None else f"{100 * share:.2f} %"


def per_class_table(
    test: Mapping[str, Any], class_counts: ClassCounts, *, max_rows: int = 30
) -> str:
    """The table of a run: classes from head to tail, below it the metrics of the whole test set.

    Args:
        test: Metrics as of :func:`.long_tail_metrics`.
        class_counts: Training samples per class, with names if there are any.
        max_rows: With more classes than that, the first and last ones only, at least 2.

    Raises:
        ValueError: another number of accuracies than of classes.

    Example:
        >>> counts = ClassCounts([500, 5], class_names=["cat", "lynx"])
        >>> test = {"top1_error": 40.0, "worst_class_accuracy": 0.5}
        >>> test |= {"per_class_accuracy": [1.0, 0.5], "nll": 0.6269, "ece": 0.1308}
        >>> print(per_class_table(test | {"many": 1.0, "medium": None, "few": 0.5}, counts))
        class      training samples  group      accuracy
        -------  ------------------  -------  ----------
        cat                     500  many       100.00 %
        lynx                      5  few         50.00 %
        <BLANKLINE>
        balanced error                25.00 %
        train-prior error              0.50 %
        top-1 error                   40.00 %
        worst class accuracy          50.00 %
        many (> 100), 1 class        100.00 %
        medium (20..100), 0 classes         -
        few (< 20), 1 class           50.00 %
        cross-entropy (nll)            0.6269
        calibration error (ece)        0.1308
    """
    lines = _shortened([_cells(row) for row in class_rows(test, class_counts)], max_rows)
    headers = ("class", "training samples", "group", "accuracy")
    align = ("left", "right", "left", "right")
    table = tabulate(lines, headers, colalign=align, disable_numparse=True)
    return f"{table}\n\n{_aligned(summary(test, class_counts))}"


def kept_table(before: ClassCounts, after: ClassCounts, *, max_rows: int = 30) -> str:
    """Training samples kept and left out of each class, from the largest kept class down.

    Args:
        before: Training samples per class of the whole set.
        after: Those that are kept, of the same classes; their names are shown if there are any.
        max_rows: With more classes than that, the first and last ones only, at least 2.

    Raises:
        ValueError: another number of classes, or more of a class kept than there are.

    Example:
        >>> print(kept_table(ClassCounts([9, 9]), ClassCounts([9, 3], class_names=["cat", "lynx"])))
        class      kept    left out
        -------  ------  ----------
        cat           9           0
        lynx          3           6
        <BLANKLINE>
        12 of 18 training samples are kept, 6 are left out.
    """
    if len(before) != len(after):
        raise invalid("after", f"counts of {len(before)} classes", len(after))
    left = before.counts - after.counts
    if left.min() < 0:
        raise invalid("after", "at most what there is of each class", left.tolist())
    names = after.class_names or [str(index) for index in range(len(after))]
    order = np.argsort(-after.counts, kind="stable")
    cells = [(printable(names[c]), str(after.counts[c]), str(left[c])) for c in order]
    headers, align = ("class", "kept", "left out"), ("left", "right", "right")
    table = tabulate(_shortened(cells, max_rows), headers, colalign=align, disable_numparse=True)
    sizes = f"{after.total} of {before.total} training samples are kept"
    return f"{table}\n\n{sizes}, {left.sum()} are left out."


def _shortened(lines: Sequence[tuple[str, ...]], max_rows: int) -> list[tuple[str, ...]]:
    check_int("max_rows", max_rows, low=2)
    if len(lines) <= max_rows:
        return list(lines)
    head, tail = max_rows - max_rows // 2, max_rows // 2
    gap = (f"... {len(lines) - max_rows} more classes", *["..."] * (len(lines[0]) - 1))
    return [*lines[:head], gap, *lines[-tail:]]


def _cells(row: ClassRow) -> tuple[str, str, str, str]:
    return printable(row.name), str(row.samples), row.group, percent(row.accuracy)


def _aligned(pairs: Sequence[tuple[str, str]]) -> str:
    align = ("left", "right")
    return tabulate(pairs, tablefmt="plain", colalign=align, disable_numparse=True)


def printable(name: str, width: int = _NAME_WIDTH) -> str:
    """A class name on one line of at most ``width`` signs, without control characters."""
    text = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in name)
    return text if len(text) <= width else f"{text[: width - 3]}..."
