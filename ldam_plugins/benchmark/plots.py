"""Plots of an experiment: error by method, accuracy from head to tail, loss by schedule."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.markers import CARETLEFTBASE, CARETRIGHTBASE

from ldam_plugins._validation import invalid
from ldam_plugins.benchmark.records import Record, errors_of
from ldam_plugins.benchmark.settings import (
    Setting,
    by_setting,
    method_title,
    shown,
    varying_options,
)
from ldam_plugins.benchmark.statistics import Interval, mean_interval
from ldam_plugins.benchmark.tables import error_matrices
from ldam_plugins.reports.plots import png
from ldam_plugins.reports.style import WIDTH, ink, schedule_color
from ldam_plugins.schedules import KINDS

_DIGEST_KEY = "Results"
_COLUMNS = 3
_TITLE_WIDTH = 30
_STRETCHES = 25
"""With more classes than that, a curve shows the means of so many stretches of them."""


def digest(records: Sequence[Record]) -> str:
    """What a plot was drawn from; it is in the plot's file under ``Results``."""
    drawn = sorted(
        json.dumps([record["name"], record["options"], record["test"]], sort_keys=True)
        for record in records
    )
    return hashlib.sha256("\n".join(drawn).encode()).hexdigest()


def error_plot(records: Sequence[Record], *, dark: bool = False) -> bytes:
    """Balanced error of each method: mean, 95 % t-interval, and the seeds as small dots; PNG."""
    return _drawn(_draw_errors, records, dark)


def class_curves(records: Sequence[Record], *, dark: bool = False) -> bytes:
    """Accuracy of the classes from head to tail: a panel a loss, a line a schedule; PNG.

    Each line is the mean over the seeds. In every panel plain cross-entropy is drawn dotted.
    """
    return _drawn(_draw_curves, records, dark)


def heat_map(records: Sequence[Record], *, dark: bool = False) -> bytes:
    """Balanced error by loss and schedule, a panel for each combination of other options; PNG.

    Raises:
        ValueError: the records make no such matrix.
    """
    if not error_matrices(records):
        expected = "of two losses, one of them with two schedules"
        raise invalid("records", expected, sorted(by_setting(records)))
    return _drawn(_draw_matrices, records, dark)


PLOTS = {
    "errors": ("Balanced error by method", error_plot),
    "curves": ("Accuracy per class, from head to tail", class_curves),
    "heat_map": ("Balanced error, %, by loss and schedule", heat_map),
}
"""Title and function of each plot."""


def _drawn(
    draw: Callable[[Sequence[Record], bool], Figure], records: Sequence[Record], dark: bool
) -> bytes:
    return png(lambda: draw(records, dark), dark, {_DIGEST_KEY: digest(records)})


def _draw_errors(records: Sequence[Record], dark: bool) -> Figure:
    names = varying_options(records)
    methods = [
        (mean_interval(errors_of(runs)), errors_of(runs), method_title(names, setting), setting)
        for setting, runs in by_setting(records).items()
    ]
    methods.sort(key=lambda method: method[0].mean)
    figure = Figure(figsize=(WIDTH, 1.1 + 0.26 * len(methods)))
    axis = figure.subplots()
    for place, (interval, errors, _, setting) in enumerate(methods):
        color = schedule_color(setting[1], dark)
        axis.plot(errors, [place] * len(errors), ".", color=color, alpha=0.6, markersize=6)
        width = interval.half_width
        axis.errorbar(interval.mean, place, xerr=width, fmt="o", color=color, capsize=3)
    labels = [f"{title} (n = {interval.n})" for interval, _, title, _ in methods]
    axis.set_yticks(range(len(methods)), labels, parse_math=False, fontsize=8.5)
    axis.set_ylim(len(methods) - 0.4, -0.6)
    axis.grid(axis="x", linewidth=0.6)
    limits = _limits([error for method in methods for error in method[1]])
    axis.set_xlim(*limits)
    for place, (interval, _, _, setting) in enumerate(methods):
        _mark_cut_ends(axis, place, interval, limits, schedule_color(setting[1], dark))
    axis.set_xlabel("balanced error, %: mean, 95 % interval over n seeds, and each seed")
    return figure


def _limits(values: Sequence[float]) -> tuple[float, float]:
    """What shows the values; an interval of two or three seeds may be too wide to be whole."""
    low, high = min(values), max(values)
    room = max(0.35 * (high - low), 1.0)
    return max(0.0, low - room), min(100.0, high + room)


def _mark_cut_ends(
    axis: Axes, place: int, interval: Interval, limits: tuple[float, float], color: str
) -> None:
    """An arrowhead at each end of the plot past which an interval goes on."""
    width = interval.half_width or 0.0
    if interval.mean - width < limits[0]:
        axis.plot(limits[0], place, marker=CARETLEFTBASE, color=color, clip_on=False)
    if interval.mean + width > limits[1]:
        axis.plot(limits[1], place, marker=CARETRIGHTBASE, color=color, clip_on=False)


def _draw_curves(records: Sequence[Record], dark: bool) -> Figure:
    names, settings = varying_options(records), by_setting(records)
    panels: dict[Setting, dict[str, list[Record]]] = defaultdict(dict)
    for (loss, schedule, *others), runs in settings.items():
        panels[(loss, *others)][schedule] = runs
    axes, figure = _panels(len(panels), 2.6)
    for axis, ((loss, *others), lines) in zip(axes, panels.items(), strict=False):
        plain = settings.get(("ce", "none", *others))
        if plain and loss != "ce":
            axis.plot(*_curve(plain), ":", color=ink(dark), linewidth=1.2, label="ce / none")
        for schedule in sorted(lines, key=KINDS.index):
            axis.plot(
                *_curve(lines[schedule]), color=schedule_color(schedule, dark), label=schedule
            )
        axis.set_title(_panel_title([loss], names, others), parse_math=False)
        axis.set_ylim(-3, 103)
        axis.grid(axis="y", linewidth=0.6)
    figure.supylabel("accuracy, %", fontsize=9)
    figure.supxlabel("classes, from the most to the fewest training samples", fontsize=9)
    labelled = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labelled.values(), labelled, loc="outside upper right", ncols=7, fontsize=9)
    return figure


def _curve(runs: Sequence[Record]) -> tuple[np.ndarray, np.ndarray]:
    """Places from head to tail, and mean accuracy over the runs there in %."""
    curves = []
    for run in runs:
        order = np.argsort(-np.asarray(run["class_counts"]), kind="stable")
        curves.append(np.array(run["test"]["per_class_accuracy"], dtype=float)[order])
    mean = 100 * np.mean(curves, axis=0)
    seen = np.flatnonzero(~np.isnan(mean))
    stretches = np.array_split(seen, min(len(seen), _STRETCHES))
    places = [part.mean() for part in stretches]
    return np.array(places), np.array([mean[part].mean() for part in stretches])


def _draw_matrices(records: Sequence[Record], dark: bool) -> Figure:
    matrices = error_matrices(records)
    losses = list(dict.fromkeys(loss for matrix in matrices.values() for loss in matrix.index))
    means = {
        title: matrix.map(lambda interval: interval.mean, na_action="ignore").astype(float)
        for title, matrix in matrices.items()
    }
    all_means = pd.concat(means.values())
    limits = all_means.min(axis=None), all_means.max(axis=None)
    axes, figure = _panels(len(matrices), 0.9 + 0.36 * len(losses), columns=1)
    for axis, (title, matrix) in zip(axes, matrices.items(), strict=False):
        _draw_matrix(axis, matrix.reindex(losses), means[title].reindex(losses), limits)
        axis.set_title(title, parse_math=False)
    note = "balanced error, %: mean ± half of the 95 % interval; lighter is less error"
    figure.suptitle(note, fontsize=9)
    return figure


def _draw_matrix(
    axis: Axes, intervals: pd.DataFrame, means: pd.DataFrame, limits: tuple[float, float]
) -> None:
    middle = sum(limits) / 2
    for row, column in np.argwhere(means.notna().to_numpy()):
        mean, half_width, _ = intervals.iloc[row, column]
        text = f"{mean:.1f}" if half_width is None else f"{mean:.1f} ± {half_width:.1f}"
        color = "#ffffff" if mean > middle else "#000000"
        axis.text(column, row, text, ha="center", va="center", color=color, fontsize=8.5)
    axis.imshow(means, cmap="viridis_r", vmin=limits[0], vmax=limits[1], aspect="auto")
    axis.set_xticks(range(len(means.columns)), means.columns)
    axis.set_yticks(range(len(means)), means.index)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def _panels(count: int, height: float, columns: int = _COLUMNS) -> tuple[list[Axes], Figure]:
    """Axes for so many panels, those left over hidden."""
    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(WIDTH, 0.6 + height * rows))
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    return axes, figure


def _panel_title(parts: Sequence[str], names: Sequence[str], others: Sequence[object]) -> str:
    given = zip(names[2:], others, strict=True)
    title = ", ".join([*parts, *(f"{name}\u00a0{shown(v)}" for name, v in given if v is not None)])
    return fill(title, _TITLE_WIDTH, break_long_words=False)
