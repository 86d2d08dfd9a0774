"""Plots of a model before and after a change: accuracy from head to tail, and reliability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ldam_plugins.reports.class_table import ClassRow
from ldam_plugins.reports.plots import png
from ldam_plugins.reports.style import CURVE, PAGE, WIDTH, ink

_MARKED = 60
_MEANS = 30


def class_change(
    before: Sequence[ClassRow], after: Sequence[ClassRow], *, dark: bool = False
) -> bytes:
    """Accuracy of each class before and after, from head to tail; of many classes its means.

    Args:
        before: As of :func:`~ldam_plugins.reports.class_table.class_rows`.
        after: The same classes in the same order.
        dark: For a dark page.

    Returns:
        PNG.
    """
    return png(lambda: _draw_change(before, after, dark), dark)


def reliability(
    before: Mapping[str, Any], after: Mapping[str, Any], *, dark: bool = False
) -> bytes:
    """Accuracy over confidence, in bins, before and after; on the diagonal both are equal.

    Args:
        before: ``bins`` of :func:`~ldam_plugins.posthoc.calibration_error`.
        after: Likewise.
        dark: For a dark page.

    Returns:
        PNG.
    """
    return png(lambda: _draw_reliability(before, after, dark), dark)


def _draw_change(before: Sequence[ClassRow], after: Sequence[ClassRow], dark: bool) -> Figure:
    figure = Figure(figsize=(WIDTH, 3.4))
    axis = figure.subplots()
    pairs = np.array(
        [
            [np.nan if row.accuracy is None else 100 * row.accuracy for row in rows]
            for rows in (before, after)
        ]
    )
    place = np.arange(pairs.shape[1])
    kept = ~np.isnan(pairs[0])
    place, pairs = place[kept], pairs[:, kept]
    if len(place) > _MARKED:
        parts = [part for part in np.array_split(np.arange(len(place)), _MEANS) if len(part)]
        place = np.array([place[part].mean() for part in parts])
        pairs = np.array([[row[part].mean() for part in parts] for row in pairs])
        axis.set_title("Means of neighbouring classes")
    else:
        axis.vlines(place, *pairs, color=PAGE[dark]["line"], linewidth=3)
    soft, strong = PAGE[dark]["soft"], CURVE[dark]
    axis.plot(place, pairs[0], "o", color=soft, markerfacecolor="none", label="before")
    axis.plot(place, pairs[1], "o", color=strong, label="after")
    axis.set(
        xlabel="classes, from the most to the fewest training samples",
        ylabel="accuracy, %",
        ylim=(-4, 104),
    )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(axis="y", linewidth=0.6)
    figure.legend(loc="outside upper right", ncols=2, fontsize=9)
    return figure


def _draw_reliability(before: Mapping[str, Any], after: Mapping[str, Any], dark: bool) -> Figure:
    figure = Figure(figsize=(WIDTH, 3.4))
    for axis, title, bins in zip(
        figure.subplots(1, 2, sharey=True), ("before", "after"), (before, after), strict=True
    ):
        rows = zip(bins["confidence"], bins["accuracy"], bins["share"], strict=True)
        known = [row for row in rows if row[2]]
        axis.plot([0, 100], [0, 100], "--", color=ink(dark), linewidth=1)
        axis.scatter(
            [100 * row[0] for row in known],
            [100 * row[1] for row in known],
            s=[20 + 400 * row[2] for row in known],
            color=CURVE[dark],
            alpha=0.8,
        )
        axis.set(title=title, xlabel="confidence, %", xlim=(-4, 104), ylim=(-4, 104))
        axis.grid(linewidth=0.6)
        if axis.get_subplotspec().is_first_col():
            axis.set_ylabel("accuracy, %")
    return figure
