"""Classes from head to tail with their accuracy, and the table printed at the end of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate

from ldam_plugins._validation import check_int, invalid
from ldam_plugins.choices import FEW_BELOW, MANY_ABOVE
from ldam_plugins.counts import ClassCounts
from ldam_plugins.metrics.views import error_views

GROUP_NAMES = ("many", "medium", "few")
_NAME_WIDTH = 40
_ABSENT = "-"
TOO_NARROW = "few examples: too narrow"
"""Stands with a bootstrap interval where a class has too few test samples for it."""


class ClassRow(NamedTuple):
    """One class of a run; shares in 0..1, None where there are none.

    Runs of before intervals were recorded have none, and no test samples, precision and F1 either.
    """

    class_id: int
    name: str
    samples: int
    group: str
    accuracy: float | None
    tested: int | None = None
    precision: float | None = None
    f1: float | None = None
    accuracy_interval: Sequence[float] | None = None
    precision_interval: Sequence[float] | None = None
    f1_interval: Sequence[float] | None = None


def class_rows(test: Mapping[str, Any], class_counts: ClassCounts) -> list[ClassRow]:
    """Every class with its training samples, group, accuracy and so on, from head to tail.

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
    intervals = test.get("intervals", {})
    unknown = [None] * len(names)
    columns = zip(
        names,
        class_counts.counts.tolist(),
        map(group_of.get, range(len(names))),
        accuracies,
        *(test.get(f"per_class_{name}", unknown) for name in ("samples", "precision", "f1")),
        *(intervals.get(f"per_class_{name}", unknown) for name in ("accuracy", "precision", "f1")),
        strict=True,
    )
    rows = [ClassRow(index, *values) for index, values in enumerate(columns)]
    return sorted(rows, key=lambda row: -row.samples)


def group_titles(class_counts: ClassCounts | None = None) -> dict[str, str]:
    """The groups of classes with their limits, by name: ``many (> 100)`` and so on."""
    many, few = MANY_ABOVE, FEW_BELOW
    if class_counts is not None:
        many, few = class_counts.many_above, class_counts.few_below
    return {
        "many": f"many (> {many})",
        "medium": f"medium ({few}..{many})",
        "few": f"few (< {few})",
    }


def summary(test: Mapping[str, Any], class_counts: ClassCounts) -> list[tuple[str, str]]:
    """Name and worded value of each metric of the whole test set, with its interval if known."""
    views = error_views(test["per_class_accuracy"], class_counts)  # older runs did not record them
    errors = {
        "balanced error": "balanced_error",
        "train-prior error": "train_prior_error",
        "top-1 error": "top1_error",
    }
    titles = group_titles(class_counts)
    sizes = {group: len(ids) for group, ids in class_counts.groups().items()}
    shares = {
        "top-5 accuracy": "top5_accuracy",
        **{
            f"{titles[group]}, {size} {'class' if size == 1 else 'classes'}": group
            for group, size in sizes.items()
        },
        "macro F1": "macro_f1",
        "macro precision": "macro_precision",
        "weighted F1": "weighted_f1",
        "weighted precision": "weighted_precision",
        "AUROC": "auroc",
        "average precision of the rarer class": "average_precision",
    }
    return [
        *(
            (title, f"{({**test, **views})[name]:.2f} %{_interval(test, name, 1)}")
            for title, name in errors.items()
        ),
        *_worst_class(test, class_counts),
        *(
            (title, percent(test[name]) + _interval(test, name, 100))
            for title, name in shares.items()
            if name in test
        ),
        ("cross-entropy (nll)", f"{test['nll']:.4f}"),
        ("calibration error (ece)", f"{test['ece']:.4f}"),
    ]


def _worst_class(test: Mapping[str, Any], class_counts: ClassCounts) -> Iterator[tuple[str, str]]:
    """The least accuracy, of which class it is, and what it is too low by, being the least."""
    name, value = "worst_class_accuracy", percent(test["worst_class_accuracy"])
    names, index = class_counts.class_names, test.get("worst_class")
    known = "" if index is None else f": {printable(names[index]) if names else index}"
    yield f"worst class accuracy{known}", value + _interval(test, name, 100)
    bias = test.get("intervals", {}).get("worst_class_selection_bias")
    if bias is not None:
        yield "worst class: too low, being picked, by", f"{max(0.0, -100 * bias):.1f} points"


def _interval(test: Mapping[str, Any], name: str, factor: float) -> str:
    """`` (20.13..30.20)``, with a warning where it is too narrow; empty where there is none."""
    intervals = test.get("intervals", {})
    if intervals.get(name) is None:
        return ""
    warning = f", {TOO_NARROW}" if name in intervals["few_examples"] else ""
    return f" ({ends(intervals[name], factor)}{warning})"


def ends(interval: Sequence[float] | None, factor: float = 100, digits: int = 1) -> str:
    """The ends of an interval: ``20.1..30.2``, or a dash where there is none."""
    if interval is None:
        return _ABSENT
    low, high = interval
    return f"{factor * low:.{digits}f}..{factor * high:.{digits}f}"


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
    columns = {name: each for name, each in _COLUMNS.items() if each.known(test)}
    cells = [
        tuple(each.cell(row) for each in columns.values()) for row in class_rows(test, class_counts)
    ]
    align = ["left" if each.left else "right" for each in columns.values()]
    table = tabulate(
        _shortened(cells, max_rows), list(columns), colalign=align, disable_numparse=True
    )
    return f"{table}\n\n{_aligned(summary(test, class_counts))}"


class _Column(NamedTuple):
    """A column of the table of a run; there where the metrics have what it shows."""

    cell: Callable[[ClassRow], str]
    needs: str = "per_class_accuracy"
    left: bool = False

    def known(self, test: Mapping[str, Any]) -> bool:
        return self.needs in test


_COLUMNS = {
    "class": _Column(lambda row: printable(row.name), left=True),
    "training samples": _Column(lambda row: str(row.samples)),
    "group": _Column(lambda row: row.group, left=True),
    "test samples": _Column(lambda row: str(row.tested), "per_class_samples"),
    "accuracy": _Column(lambda row: percent(row.accuracy)),
    "95 % interval": _Column(lambda row: ends(row.accuracy_interval), "intervals"),
    "precision": _Column(lambda row: percent(row.precision), "per_class_precision"),
    "F1": _Column(lambda row: percent(row.f1), "per_class_f1"),
}


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


def _aligned(pairs: Sequence[tuple[str, str]]) -> str:
    align = ("left", "right")
    return tabulate(pairs, tablefmt="plain", colalign=align, disable_numparse=True)


def printable(name: str, width: int = _NAME_WIDTH) -> str:
    """A class name on one line of at most ``width`` signs, without control characters."""
    text = "".join(sign if sign.isprintable() else "\N{REPLACEMENT CHARACTER}" for sign in name)
    return text if len(text) <= width else f"{text[: width - 3]}..."
