"""Tables of an experiment: all runs as one flat table, and summaries of its settings in text."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import isclose
from typing import Any

import numpy as np
import pandas as pd
from tabulate import tabulate

from ldam_plugins.benchmark.captions import Caption, pair_caption, row_caption
from ldam_plugins.benchmark.comparisons import comparisons
from ldam_plugins.benchmark.decomposition import decompositions
from ldam_plugins.benchmark.records import UNKNOWN, Record, errors_of, test_metrics
from ldam_plugins.benchmark.regret import regrets
from ldam_plugins.benchmark.settings import (
    ABSENT,
    by_setting,
    head_of,
    heads_of_losses,
    option_value,
    shown,
    tuned_values,
    varying_options,
)
from ldam_plugins.benchmark.statistics import Interval, mean_interval
from ldam_plugins.schedules import KINDS

_METRICS = (
    "top1_error",
    "balanced_error",
    "train_prior_error",
    "balanced_accuracy",
    "worst_class_accuracy",
    "many",
    "medium",
    "few",
    "nll",
    "ece",
)
_LATER_METRICS = (
    *(f"{mean}_{name}" for mean in ("macro", "weighted") for name in ("precision", "recall", "f1")),
    "top5_accuracy",
    "auroc",
    "average_precision",
)
"""Columns that are there if a record has them: older ones have none."""
"""Columns of the flat table that are of the test set."""

# Title of a column of the summaries: the metric, what it is multiplied by, and decimal places.
_COLUMNS = {
    "balanced error %": ("balanced_error", 1.0, 1),
    "train-prior error %": ("train_prior_error", 1.0, 1),
    "top-1 error %": ("top1_error", 1.0, 1),
    "many: accuracy %": ("many", 100.0, 1),
    "medium: accuracy %": ("medium", 100.0, 1),
    "few: accuracy %": ("few", 100.0, 1),
    "worst class: accuracy %": ("worst_class_accuracy", 100.0, 1),
    "macro F1 %": ("macro_f1", 100.0, 1),
    "AUROC %": ("auroc", 100.0, 1),
    "average precision %": ("average_precision", 100.0, 1),
    "ece": ("ece", 1.0, 3),
}
_BALANCED = "balanced error % (= top-1)"
"""The first of them where the classes of the test set are of one size."""

VIEWS = {"balanced_error": "Balanced error", "train_prior_error": "Train-prior error"}
"""The two errors of which there are matrices, see :func:`.error_views`."""

Row = dict[str, str]
"""A line of a table of text, by the titles of its columns."""


def tidy_table(records: Sequence[Record]) -> pd.DataFrame:
    """One row a run: what varies, seed, metrics, seconds, machine, versions and the command."""
    names = varying_options(records)
    rows = [
        {
            "name": record["name"],
            **{name: _scalar(option_value(record, name)) for name in names},
            "seed": record["options"]["seed"],
            **{f"tuned_{name}": _scalar(v) for name, v in tuned_values(record).items()},
            **{metric: test[metric] for metric in _METRICS},
            **{name: record["test"][name] for name in _LATER_METRICS if name in record["test"]},
            "train_seconds": record["train_seconds"],
            "device": record["device"],
            "mixed_precision": record.get("mixed_precision", UNKNOWN),
            **{f"version_{name}": version for name, version in record["versions"].items()},
            "command": record["command"],
        }
        for runs in by_setting(records).values()
        for record, test in zip(runs, map(test_metrics, runs), strict=True)
    ]
    # As objects, integers stay integers in a column that has no value in some rows.
    return pd.DataFrame(rows, dtype=object)


def _scalar(value: Any) -> Any:
    return shown(value) if isinstance(value, tuple) else value


def range_rows(records: Sequence[Record]) -> list[Row]:
    """One row a setting: mean (least..largest over the seeds) of the metrics."""
    return _rows_of(records, spread)


def interval_rows(records: Sequence[Record]) -> list[Row]:
    """One row a setting: mean and 95 % t-interval over the seeds of the metrics."""
    return _rows_of(records, lambda values, digits: worded(mean_interval(values), digits))


def _rows_of(records: Sequence[Record], summarise: Callable[[list[float], int], str]) -> list[Row]:
    names, columns = varying_options(records), _columns(records)
    tuned = any(tuned_values(record) for record in records)
    rows = []
    for setting, runs in by_setting(records).items():
        row = dict(zip(names, map(shown, setting), strict=True))
        row |= {"head": head_of(runs[0]), "seeds": str(len(runs))}
        row |= {"tuned to": _tuned_to(runs)} if tuned else {}
        tests = [test_metrics(run) for run in runs]
        for title, (metric, factor, digits) in columns.items():
            values = [test.get(metric) for test in tests]
            known = [factor * value for value in values if value is not None]
            row[title] = summarise(known, digits) if len(known) == len(values) else ABSENT
        rows.append(row)
    return rows


def equal_test_classes(records: Iterable[Record]) -> bool:
    """Whether the classes of the test sets are of one size, so that top-1 and balanced error agree.

    Read off the two errors: records do not hold the sizes.
    """
    tests = map(test_metrics, records)
    return all(isclose(t["top1_error"], t["balanced_error"], abs_tol=1e-6) for t in tests)


def _columns(records: Sequence[Record]) -> dict[str, tuple[str, float, int]]:
    """Columns of the summaries, without groups that no class is in, and without one error twice."""
    columns = {
        title: column
        for title, column in _COLUMNS.items()
        if any(test_metrics(record).get(column[0]) is not None for record in records)
    }
    if not equal_test_classes(records):
        return columns
    del columns["top-1 error %"]
    return {_BALANCED: columns.pop("balanced error %"), **columns}


def _tuned_to(runs: Sequence[Record]) -> str:
    """What was chosen for the runs of a row, by name."""
    chosen = [
        ", ".join(f"{name} {shown(value)}" for name, value in tuned_values(run).items())
        for run in runs
    ]
    return "; ".join(dict.fromkeys(filter(None, chosen))) or ABSENT


def error_matrices(
    records: Sequence[Record], view: str = "balanced_error"
) -> dict[str, pd.DataFrame]:
    """Balanced error in % by loss and schedule, for each combination of the other options.

    Or, with ``view``, the other of :func:`.error_views`.

    Where the runs of a loss differ in their head, the head is one of the other options, so a table
    has one head. Combinations in which nothing can be compared along both ways are left out: they
    have one loss, or no loss with two schedules.

    Returns:
        By title of the combination, a row a loss and a column a schedule; a cell is an
        :class:`.Interval` over the seeds, or NaN where there is no run.
    """
    cells = [
        (title, loss, schedule, mean_interval(errors_of(runs, view)))
        for title, loss, schedule, runs in _titled(records)
    ]
    table = pd.DataFrame(cells, columns=["title", "loss", "schedule", "error"])
    matrices = {}
    for title, part in table.groupby("title", sort=False):
        matrix = part.pivot(index="loss", columns="schedule", values="error")
        if 1 < len(matrix) < len(part):
            matrices[title] = matrix[[kind for kind in KINDS if kind in matrix]]
    return matrices


def matrix_records(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The runs of each of :func:`error_matrices`, by its title."""
    found: dict[str, list[Record]] = defaultdict(list)
    for title, _, _, runs in _titled(records):
        found[title] += runs
    return found


def matrix_heads(records: Sequence[Record]) -> dict[str, dict[str, str]]:
    """The head of each loss in each of :func:`error_matrices`, by its title."""
    return {title: heads_of_losses(runs) for title, runs in matrix_records(records).items()}


def matrix_captions(records: Sequence[Record]) -> dict[str, Caption]:
    """The caption of each of :func:`error_matrices`, by its title."""
    names = varying_options(records)
    return {title: row_caption(runs, names) for title, runs in matrix_records(records).items()}


def _titled(records: Sequence[Record]) -> Iterator[tuple[str, str, str, list[Record]]]:
    """Title of the other options, loss, schedule and runs of each setting."""
    names = varying_options(records)[2:]
    for (loss, schedule, *others), runs in by_setting(records).items():
        values = dict(zip(names, others, strict=True))
        if "head" in values:
            values["head"] = head_of(runs[0])
        title = ", ".join(f"{name} {shown(value)}" for name, value in values.items())
        yield title, loss, schedule, runs


def matrix_rows(matrix: pd.DataFrame, heads: Mapping[str, str] | None = None) -> list[Row]:
    """One of :func:`error_matrices` as text: a row a loss and a column a schedule.

    ``heads`` names the head of each loss; there is no such column without it.
    """
    text = matrix.map(_matrix_cell, na_action="ignore").fillna(ABSENT)
    if heads is not None:
        text.insert(0, "head", text.index.map(heads))
    return text.reset_index().to_dict("records")


def grid_rows(records: Sequence[Record]) -> list[Row]:
    """Balanced error in %: a row a head and loss with its options, a column a schedule.

    Logits that were adjusted to another class prior after training (``posthoc_tau``) have columns
    of their own. Unlike :func:`error_matrices` it is one table, whatever else varies.
    """
    names = varying_options(records)
    others = [name for name in names[2:] if name not in ("head", "posthoc_tau")]
    rows: dict[tuple[str, ...], Row] = {}
    for runs in by_setting(records).values():
        options = runs[0]["options"]
        titles = {"head": head_of(runs[0]), "loss": options["loss"]}
        titles |= {name: shown(options[name]) for name in others}
        row = rows.setdefault(tuple(titles.values()), titles)
        row[_column(options)] = worded(mean_interval(errors_of(runs)))
    columns = sorted({_column(record["options"]) for record in records}, key=_column_order)
    order = sorted(rows, key=lambda key: (key[0] == "cosine", *key[1:]))
    header = ["head", "loss", *others, *columns]
    return [{title: rows[key].get(title, ABSENT) for title in header} for key in order]


def _column(options: Mapping[str, Any]) -> str:
    """The schedule of a run, and what was done to its logits after training."""
    tau = options.get("posthoc_tau")
    return f"{options['schedule']}, adjusted afterwards" if tau else str(options["schedule"])


def _column_order(title: str) -> tuple[int, str]:
    return KINDS.index(title.partition(",")[0]), title


def comparison_rows(records: Sequence[Record], baseline: str = "erm") -> list[Row]:
    """One row for each of :func:`.comparisons`, with what it says in words."""
    return [
        {
            "method": entry.method,
            "against": entry.baseline,
            "pairs": str(entry.paired.difference.n),
            "head": entry.heads,
            "difference in balanced error, points": worded(entry.paired.difference, sign="+"),
            "sd of differences": _points(entry.paired.deviation),
            "p": _p_value(entry.paired.p_value),
            "p (Holm)": _p_value(entry.corrected),
            "detectable": _points(entry.paired.detectable),
            "says": entry.verdict,
            "difference in train-prior error": worded(entry.prior, sign="+"),
        }
        for entry in comparisons(records, baseline)
    ]


def comparison_caption(records: Sequence[Record], baseline: str = "erm") -> Caption:
    """The caption of :func:`comparison_rows`."""
    unlike = {
        f"{entry.method} against {entry.baseline}": entry.unlike
        for entry in comparisons(records, baseline)
    }
    return pair_caption(records, unlike)


def decomposition_rows(experiments: Mapping[str, Sequence[Record]]) -> list[Row]:
    """One row for each of :func:`.decompositions` of each experiment, with their seeds."""
    return [
        {
            "experiment": ", ".join(
                [name, *(f"{o} {value}" for o, value in found.options.items())]
            ),
            "max_margin": shown(found.max_margin),
            "seeds": str(found.first.n),
            "CE, linear head": worded(found.first),
            "cosine head": worded(found.head, sign="+"),
            "margin": worded(found.margin, sign="+"),
            "deferred weights": worded(found.deferral, sign="+"),
            "LDAM-DRW": worded(found.last),
            "weights from the start instead": (
                worded(found.from_the_start, sign="+") if found.from_the_start else ABSENT
            ),
        }
        for name, records in experiments.items()
        for found in decompositions(records)
    ]


def regret_rows(records: Sequence[Record], choice: Mapping[str, str]) -> list[Row]:
    """One row for each of :func:`.regrets`, and one of their mean and the most."""
    found = regrets(records, choice)
    best = f"best of {max(each.tried for each in found)} %"
    rows = [
        {
            "set": each.dataset,
            "training samples": str(each.samples),
            "classes": str(each.classes),
            "balanced error %": _points(each.error),
            best: _points(each.best_error),
            "the best has": ", ".join(f"{name} {value}" for name, value in each.best.items()),
            "more error, points": _points(each.points),
        }
        for each in found
    ]
    points = [each.points for each in found]
    last = dict.fromkeys(rows[0], ABSENT) | {
        "set": f"mean of {len(found)}",
        "balanced error %": _points(float(np.mean([each.error for each in found]))),
        best: _points(float(np.mean([each.best_error for each in found]))),
        "more error, points": f"{np.mean(points):.1f} (at most {max(points):.1f})",
    }
    return [*rows, last]


def markdown(rows: Sequence[Row]) -> str:
    """Rows as a table in GitHub's Markdown; a dash stands for no row."""
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True) or ABSENT


def worded(interval: Interval, digits: int = 1, sign: str = "") -> str:
    """An interval as ``17.4 ± 3.3``, without the second part where there is one seed."""
    mean = f"{interval.mean:{sign}.{digits}f}"
    return mean if interval.half_width is None else f"{mean} ± {interval.half_width:.{digits}f}"


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean and range of the values of several seeds."""
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def _matrix_cell(interval: Interval) -> str:
    return f"{worded(interval)} (n = {interval.n})"


def _points(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.1f}"


def _p_value(value: float | None) -> str:
    if value is None:
        return ABSENT
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
