"""Tables of an experiment, and which differences between methods are more than noise."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from tabulate import tabulate

from ldam_plugins._validation import check_choice
from ldam_plugins.benchmark.grid import METHODS
from ldam_plugins.benchmark.records import (
    ABSENT,
    Record,
    Setting,
    by_setting,
    errors_of,
    head_of,
    method_title,
    option_value,
    shown,
    varying_options,
)
from ldam_plugins.benchmark.statistics import (
    CONFIDENCE,
    Interval,
    PairedComparison,
    holm,
    mean_interval,
    paired_comparison,
)
from ldam_plugins.losses.registry import list_losses
from ldam_plugins.schedules import KINDS

# Name of a column: the metric, what it is multiplied by, and decimal places.
_COLUMNS = {
    "top-1 error %": ("top1_error", 1.0, 1),
    "balanced accuracy %": ("balanced_accuracy", 100.0, 1),
    "worst class %": ("worst_class_accuracy", 100.0, 1),
    "ece": ("ece", 1.0, 3),
}
_TAIL_OPTIONS = ("dataset", "profile", "ratio", "subset_seed")


class Comparison(NamedTuple):
    """A method against a baseline: titles, the paired test, and its p-value after Holm.

    ``heads`` is the method's head, and the baseline's where that is another one.
    """

    baseline: str
    method: str
    paired: PairedComparison
    corrected: float | None
    heads: str = ABSENT

    @property
    def verdict(self) -> str:
        """Whether the difference is more than noise, at 5 % after the correction."""
        if self.corrected is None:
            return "no test: one pair" if self.paired.difference.n == 1 else "no test: no spread"
        if self.corrected >= 1 - CONFIDENCE:
            return "not told from noise"
        return "less error" if self.paired.difference.mean < 0 else "more error"


Row = dict[str, str]
"""A line of a table, by the titles of its columns."""


def range_rows(records: Sequence[Record]) -> list[Row]:
    """One row a setting: mean (least..largest over the seeds) of the metrics."""
    return _rows_of(records, spread)


def interval_rows(records: Sequence[Record]) -> list[Row]:
    """One row a setting: mean and 95 % t-interval over the seeds of the metrics."""
    return _rows_of(records, lambda values, digits: worded(mean_interval(values), digits))


def _rows_of(records: Sequence[Record], summarise: Callable[[list[float], int], str]) -> list[Row]:
    names = varying_options(records)
    rows = []
    for setting, runs in by_setting(records).items():
        row = dict(zip(names, map(shown, setting), strict=True))
        row |= {"head": head_of(runs[0]), "seeds": str(len(runs))}
        for title, (metric, factor, digits) in _COLUMNS.items():
            row[title] = summarise([factor * run["test"][metric] for run in runs], digits)
        rows.append(row)
    return rows


def matrix_rows(
    cells: Mapping[tuple[str, str], Interval], heads: Mapping[str, str] | None = None
) -> list[Row]:
    """A row a loss and a column a schedule, of one of :func:`error_matrices`.

    ``heads`` names the head of each loss; there is no such column without it.
    """
    losses = dict.fromkeys(loss for loss, _ in cells)
    schedules = [kind for kind in KINDS if any(kind == schedule for _, schedule in cells)]
    return [
        {"loss": loss}
        | ({} if heads is None else {"head": heads[loss]})
        | {kind: _matrix_cell(cells.get((loss, kind))) for kind in schedules}
        for loss in losses
    ]


def comparisons(records: Sequence[Record], baseline: str = "erm") -> list[Comparison]:
    """Every method against a baseline on the same seeds and long tail, in balanced error.

    Negative differences are less error than the baseline's. P-values and detectable differences are
    corrected for the number of tests in the answer.

    Args:
        records: Of one experiment.
        baseline: A name of ``METHODS`` or ``loss/schedule``, in which ``*`` is the method's own:
            ``"*/none"`` compares each schedule with none under the same loss. Of several settings
            of the baseline the one with the method's other options is taken, if there is one,
            else each; options after colons choose among them, a dash standing for the loss's
            default: ``"ldam_drw:max_margin=-:start=80"``.

    Raises:
        ValueError: an unknown baseline.
    """
    names, settings = varying_options(records), by_setting(records)
    expected, options = read_baseline(baseline, records[0]["options"])
    chosen = [s for s, runs in settings.items() if _has(runs[0], options)]
    found = []
    for setting, runs in settings.items():
        for base in _bases(chosen, setting, expected):
            pairs = _pairs(settings[base], runs)
            if pairs:
                titles = (method_title(names, base), method_title(names, setting))
                heads = dict.fromkeys(head_of(record) for record in reversed(pairs[0]))
                first, second = map(errors_of, zip(*pairs, strict=True))
                found.append((titles, " against ".join(heads), first, second))
    p_values = [paired_comparison(first, second).p_value for *_, first, second in found]
    tests = sum(p is not None for p in p_values) or 1
    return [
        Comparison(*titles, paired_comparison(first, second, tests), corrected, heads)
        for (titles, heads, first, second), corrected in zip(found, holm(p_values), strict=True)
    ]


def read_baseline(baseline: str, known: Collection[str]) -> tuple[tuple[str, str], dict[str, str]]:
    """What a baseline, as of :func:`comparisons`, says: loss and schedule, and other options.

    Args:
        baseline: To be read.
        known: Names of the options it may choose by.

    Raises:
        ValueError: it names no method, loss, schedule or option.
    """
    name, *entries = baseline.split(":")
    if "/" in name:
        loss, _, schedule = name.partition("/")
        check_choice("loss in baseline", loss, [*list_losses(), "*"])
        check_choice("schedule in baseline", schedule, [*KINDS, "*"])
    else:
        _, loss, schedule = METHODS[check_choice("baseline", name, METHODS)]
    pairs = [entry.partition("=") for entry in entries]
    options = {check_choice("option in baseline", name, known): value for name, _, value in pairs}
    return (loss, schedule), options


def _has(record: Record, options: Mapping[str, str]) -> bool:
    """Whether a run has what a baseline says after its colons."""
    return all(shown(option_value(record, name)) == value for name, value in options.items())


def _bases(
    settings: Collection[Setting], setting: Setting, expected: tuple[str, str]
) -> list[Setting]:
    pattern = [own if want == "*" else want for want, own in zip(expected, setting, strict=False)]
    bases = [base for base in settings if list(base[:2]) == pattern]
    if setting in bases:
        return []  # the baseline itself, or another setting of it
    return [base for base in bases if base[2:] == setting[2:]] or bases


def _pairs(first: Sequence[Record], second: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Runs of the two that saw the same training samples and the same seed."""

    def same(record: Record) -> tuple[Any, ...]:
        options = (record["options"].get(name) for name in (*_TAIL_OPTIONS, "seed"))
        return (*options, *record["class_counts"])

    others = {same(record): record for record in second}
    return [(record, others[same(record)]) for record in first if same(record) in others]


def comparison_rows(records: Sequence[Record], baseline: str = "erm") -> list[Row]:
    """One row for each of :func:`comparisons`, with what it says in words."""
    return [
        {
            "method": entry.method,
            "against": entry.baseline,
            "pairs": str(entry.paired.difference.n),
            "head": entry.heads,
            "difference in balanced error, points": worded(entry.paired.difference, sign="+"),
            "p": _p_value(entry.paired.p_value),
            "p (Holm)": _p_value(entry.corrected),
            "detectable": _points(entry.paired.detectable),
            "says": entry.verdict,
        }
        for entry in comparisons(records, baseline)
    ]


def ratio_rows(timings: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row for each timing of ``recipes/speed.py``: seconds, and their ratio."""
    return [
        {
            "section": timing["section"],
            "what": timing["what"],
            "peer": timing["peer"],
            "ours": f"{timing['ours_seconds']:.3g} s",
            "theirs": f"{timing['peer_seconds']:.3g} s",
            "ratio": _ratio(timing),
            "note": timing["note"],
        }
        for timing in timings
    ]


def ratio_matrix(timings: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Ratios of timings named ``"what, size, dtype"``: a row a size and dtype, a column a what."""
    found: dict[str, Row] = {}
    for timing in timings:
        what, _, place = timing["what"].partition(", ")
        found.setdefault(place, {"": place})[what] = _ratio(timing)
    return list(found.values())


def _ratio(timing: Mapping[str, Any]) -> str:
    """Median, least and largest ratio over the turns."""
    return "{ratio_median:.2f} ({ratio_min:.2f}..{ratio_max:.2f})".format_map(timing)


def markdown(rows: Sequence[Row]) -> str:
    """Rows as a table in GitHub's Markdown; a dash stands for no row."""
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True) or ABSENT


def worded(interval: Interval, digits: int = 1, sign: str = "") -> str:
    """An interval as ``17.4 ± 3.3``, without the second part where there is one seed."""
    mean = f"{interval.mean:{sign}.{digits}f}"
    return mean if interval.half_width is None else f"{mean} ± {interval.half_width:.{digits}f}"


def spread(values: list[float], digits: int = 1) -> str:
    """Mean and range of the values of several seeds."""
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def _matrix_cell(interval: Interval | None) -> str:
    return ABSENT if interval is None else f"{worded(interval)} (n = {interval.n})"


def _points(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.1f}"


def _p_value(value: float | None) -> str:
    if value is None:
        return ABSENT
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
