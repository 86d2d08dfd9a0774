"""Plots of a run as PNG: training curve, and accuracy of the classes from head to tail."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from ldam_plugins.reports.class_table import GROUP_NAMES, ClassRow, printable
from ldam_plugins.reports.style import CURVE, FONT, GROUPS, PAGE, WIDTH, ink

NAMED_CLASSES = 100
"""Up to so many classes each gets a bar and its name, beyond that a place on the axis."""

CONFUSED_CLASSES = 30
"""Up to so many classes their confusion matrix is drawn."""

_MEANS = 40
_MARKED_EPOCHS = 40
_PANEL_HEIGHTS = (2.8, 4.6, 6.4)


def training_curve(
    history: Sequence[Mapping[str, Any]], *, selected: int | None = None, dark: bool = False
) -> bytes:
    """Training loss over the epochs with the switches marked; below it the errors, if measured.

    Args:
        history: Rows as of :func:`~ldam_plugins.training.history.read_history`, at least one.
        selected: The epoch that is the result, if it was selected; it is marked.
        dark: For a dark page.

    Returns:
        PNG.
    """
    return png(lambda: _draw_training(history, selected, dark), dark)


def class_profile(
    rows: Sequence[ClassRow], titles: Mapping[str, str] | None = None, *, dark: bool = False
) -> bytes:
    """Accuracy and training samples (log axis) of each class, from head to tail.

    Args:
        rows: As of :func:`~ldam_plugins.reports.class_table.class_rows`.
        titles: Of the groups, as of :func:`~ldam_plugins.reports.class_table.group_titles`; their
            names unless told.
        dark: For a dark page.

    Returns:
        PNG.
    """
    draw = _draw_named if len(rows) <= NAMED_CLASSES else _draw_ranked
    titles = titles or {name: name for name in GROUP_NAMES}
    return png(lambda: draw(rows, titles, dark), dark)


def confusion_plot(
    rows: Sequence[ClassRow], confusion: Mapping[str, Sequence[int]], *, dark: bool = False
) -> bytes:
    """What each class is predicted as: samples, and as colour their share of the class.

    Args:
        rows: As of :func:`~ldam_plugins.reports.class_table.class_rows`, at most
            :data:`CONFUSED_CLASSES`: the order of the classes.
        confusion: As ``confusion`` of :func:`.long_tail_metrics`.
        dark: For a dark page.

    Returns:
        PNG.
    """
    return png(lambda: _draw_confusion(rows, confusion, dark), dark)


def reliability(
    confidence: np.ndarray, right: np.ndarray, *, bins: int, dark: bool = False
) -> bytes:
    """How often predictions are right that were made with a confidence, in bins of equal width.

    Args:
        confidence: Largest probability of each sample (N,).
        right: Whether its prediction is right (N,).
        bins: How many, as of the calibration error.
        dark: For a dark page.

    Returns:
        PNG.
    """
    return png(lambda: _draw_reliability(confidence, right, bins, dark), dark)


def reliability_bins(
    confidence: np.ndarray, right: np.ndarray, bins: int
) -> tuple[np.ndarray, np.ndarray]:
    """Samples in each bin of confidence, and the share of them that are right (NaN of none).

    Args:
        confidence: Largest probability of each sample (N,).
        right: Whether its prediction is right (N,).
        bins: How many, of equal width; a confidence on an edge is in the bin below, as in the
            calibration error.
    """
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    hits = np.bincount(place, right, minlength=bins)
    return count, np.divide(hits, count, out=np.full(bins, np.nan), where=count > 0)


def png(draw: Callable[[], Figure], dark: bool, metadata: Mapping[str, str] | None = None) -> bytes:
    """What ``draw`` draws, in the style of all plots; ``metadata`` goes into the file.

    The user's own matplotlib settings neither show in the plot nor are changed.
    """
    card, text, line = (PAGE[dark][part] for part in ("card", "ink", "line"))
    filled = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    inked = ("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor")
    outlined = ("axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    style = {
        **dict.fromkeys(filled, card),
        **dict.fromkeys(inked, text),
        **dict.fromkeys(outlined, line),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlelocation": "left",
        "axes.titlesize": 10.0,
        "axes.axisbelow": True,
        "font.family": FONT,
        "font.size": 10.0,
        "figure.constrained_layout.use": True,
        "legend.frameon": False,
        "savefig.dpi": 150.0,
    }
    content = io.BytesIO()
    with matplotlib.style.context(style, after_reset=True):
        draw().savefig(content, format="png", metadata=metadata)
    return content.getvalue()


def _draw_training(
    history: Sequence[Mapping[str, Any]], selected: int | None, dark: bool
) -> Figure:
    named = {"val_error": "Validation error, %", "test_error": "Test error, %"}
    errors = {
        column: title
        for column, title in named.items()
        if any(row[column] is not None for row in history)
    }
    panels = {"train_loss": "Training loss", **errors}
    figure = Figure(figsize=(WIDTH, _PANEL_HEIGHTS[len(panels) - 1]))
    axes = list(figure.subplots(len(panels), sharex=True, squeeze=False).flat)
    line = {"markersize": 3.5, "color": CURVE[dark]}
    switches = [row for before, row in pairwise(history) if row["stage"] != before["stage"]]
    for axis, (column, title) in zip(axes, panels.items(), strict=True):
        measured = [row for row in history if row[column] is not None]
        values = [row[column] for row in measured]
        marker = "o" if len(values) <= _MARKED_EPOCHS else ""
        axis.plot([row["epoch"] for row in measured], values, marker=marker, **line)
        last = f"{values[-1]:.4g}" if values else "none"
        axis.set_title(f"{title} (last value: {last})")
        axis.grid(axis="y", linewidth=0.6)
        for row in switches:
            axis.axvline(row["epoch"] - 0.5, linestyle="--", linewidth=1, color=ink(dark))
        if selected is not None:
            axis.axvline(selected, linestyle=":", linewidth=1.5, color=ink(dark))
    stages = ", ".join(f"{row['stage']} from epoch {row['epoch']}" for row in switches)
    note = f"dashed: {stages}" if switches else f"all epochs: {history[0]['stage']}"
    note += "" if selected is None else f"; dotted: selected, epoch {selected}"
    axes[0].set_title(note, loc="right", fontsize=9, parse_math=False)
    axes[-1].set_xlabel("epoch, counted from 0")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    return figure


def _draw_named(rows: Sequence[ClassRow], titles: Mapping[str, str], dark: bool) -> Figure:
    figure = Figure(figsize=(WIDTH, 1.3 + 0.21 * len(rows)))
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    places = range(len(rows))
    colors = [GROUPS[dark][row.group] for row in rows]
    shares = [_percent_or_nan(row) for row in rows]
    texts = ["no test sample" if np.isnan(share) else f"{share:.0f}" for share in shares]
    bars = left.barh(places, np.nan_to_num(shares), color=colors)
    left.bar_label(bars, texts, padding=3, fontsize=8)
    left.set(xlim=(0, 112), xticks=range(0, 101, 25), title="Accuracy, %")
    samples = [row.samples for row in rows]
    bars = right.barh(places, samples, color=colors, log=True)
    right.bar_label(bars, padding=3, fontsize=8)
    right.set(xlim=(0.8, 4 * max(samples)), title="Training samples (log)")
    left.set_yticks(places, [_label(row) for row in rows], parse_math=False, fontsize=8.5)
    left.set_ylim(len(rows) - 0.4, -0.6)
    for axis in (left, right):
        axis.grid(axis="x", linewidth=0.6)
        axis.tick_params(axis="y", length=0)
    _legend(figure, rows, titles, dark)
    return figure


def _draw_ranked(rows: Sequence[ClassRow], titles: Mapping[str, str], dark: bool) -> Figure:
    figure = Figure(figsize=(WIDTH, 5.4))
    top, bottom = figure.subplots(2, sharex=True, height_ratios=(3, 2))
    for group in GROUP_NAMES:
        places = [place for place, row in enumerate(rows) if row.group == group]
        if not places:
            continue
        color = GROUPS[dark][group]
        accuracy = [_percent_or_nan(rows[place]) for place in places]
        top.plot(places, accuracy, ".", color=color, markersize=3, alpha=0.35)
        samples = [rows[place].samples for place in places]
        bottom.fill_between(places, samples, 0.8, color=color, step="mid", linewidth=0.8)
    top.plot(*_local_means(rows), color=ink(dark), linewidth=1.6)
    top.set(ylim=(-4, 104), title="Accuracy, %: each class (dots) and their local mean (line)")
    bottom.set(yscale="log", title="Training samples (log)", xlim=(-0.5, len(rows) - 0.5))
    bottom.set(xlabel=f"{len(rows)} classes, from the most to the fewest training samples")
    for axis in (top, bottom):
        axis.grid(axis="y", linewidth=0.6)
    _legend(figure, rows, titles, dark)
    return figure


def _percent_or_nan(row: ClassRow) -> float:
    return np.nan if row.accuracy is None else 100 * row.accuracy


def _local_means(rows: Sequence[ClassRow]) -> tuple[list[float], list[float]]:
    """Centre and mean accuracy of stretches of neighbouring classes that have test samples."""
    values = np.array([_percent_or_nan(row) for row in rows])
    seen = np.flatnonzero(~np.isnan(values))
    parts = [part for part in np.array_split(seen, _MEANS) if len(part)]
    return [float(part.mean()) for part in parts], [float(values[part].mean()) for part in parts]


def _legend(
    figure: Figure, rows: Sequence[ClassRow], titles: Mapping[str, str], dark: bool
) -> None:
    present = [group for group in GROUP_NAMES if any(row.group == group for row in rows)]
    handles = [Patch(color=GROUPS[dark][group], label=titles[group]) for group in present]
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), fontsize=9)


def _draw_confusion(
    rows: Sequence[ClassRow], confusion: Mapping[str, Sequence[int]], dark: bool
) -> Figure:
    place = {row.class_id: index for index, row in enumerate(rows)}
    matrix = np.zeros((len(rows), len(rows)), dtype=int)
    pairs = zip(confusion["true"], confusion["predicted"], confusion["samples"], strict=True)
    for true, predicted, samples in pairs:
        matrix[place[true], place[predicted]] = samples
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = 2.2 + 0.29 * len(rows)
    figure = Figure(figsize=(WIDTH, max(side, 4.0)))
    axis = figure.subplots()
    colors = "Blues_r" if dark else "Blues"
    size = max(6.5, 11 - len(rows) / 4)  # points: as large as the cells allow
    axis.imshow(np.ma.masked_where(matrix == 0, shares), cmap=colors, vmin=0, vmax=1)
    for row, column in np.argwhere(matrix):
        light = (shares[row, column] > 0.5) != dark
        color = "#ffffff" if light else "#000000"
        axis.text(
            column, row, matrix[row, column], ha="center", va="center", color=color, fontsize=size
        )
    names = [_label(row) for row in rows]
    axis.set_xticks(range(len(rows)), names, rotation=90, parse_math=False, fontsize=8)
    axis.set_yticks(range(len(rows)), names, parse_math=False, fontsize=8)
    axis.tick_params(length=0)
    axis.set(xlabel="predicted", ylabel="class, from head to tail")
    return figure


def _draw_reliability(confidence: np.ndarray, right: np.ndarray, bins: int, dark: bool) -> Figure:
    figure = Figure(figsize=(WIDTH, 3.4))
    accuracy, share = figure.subplots(1, 2, width_ratios=(1, 1))
    edges = np.linspace(0, 1, bins + 1)
    count, share_right = reliability_bins(confidence, right, bins)
    seen = count > 0
    middle, color = (edges[:-1] + edges[1:]) / 2, CURVE[dark]
    accuracy.bar(middle[seen], 100 * share_right[seen], width=0.9 / bins, color=color)
    accuracy.plot([0, 1], [0, 100], color=ink(dark), linestyle="--", linewidth=1)
    accuracy.set(title="Right, %, by confidence (dashed: as sure as right)", xlabel="confidence")
    share.bar(middle, 100 * count / len(confidence), width=0.9 / bins, color=color)
    share.set(title="Share of the samples, %", xlabel="confidence")
    for axis in (accuracy, share):
        axis.set_xlim(0, 1)
        axis.grid(axis="y")
    return figure


def _label(row: ClassRow) -> str:
    """The class name, or its index where the plot's font lacks a sign of it."""
    name = printable(row.name, width=32)
    return name if all(ord(sign) in _font_signs() for sign in name) else f"class {row.class_id}"


@cache
def _font_signs() -> frozenset[int]:
    return frozenset(get_font(findfont(FONT)).get_charmap())
