"""The page of a classifier that was re-balanced: what it was, what it is, what that costs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ldam_plugins.counts import ClassCounts
from ldam_plugins.metrics.intervals import FEW_EXAMPLES
from ldam_plugins.reports.class_table import class_rows, ends, group_titles, percent
from ldam_plugins.reports.html import Plot, render
from ldam_plugins.reports.model_card import complete_card
from ldam_plugins.reports.run_report import REPORT_FILE
from ldam_plugins.training.files import write_atomic
from ldam_plugins.training.history import read_metrics

CHANGE_FILE, RELIABILITY_FILE = "class_change.png", "reliability.png"
PARTS = {"test": "test set", "validation": "held-out part"}
"""What a model may be measured on, in words."""
_MAX_TABLE_ROWS = 1000
_BEST = 12


class MetricRow(NamedTuple):
    """A metric before and after, with its intervals, and by how much it rose; all worded."""

    name: str
    before: str
    after: str
    difference: str


HEADINGS = ("", "before", "after", "difference")
"""Of :class:`MetricRow`."""


def metric_rows(
    metrics: Mapping[str, Any], counts: ClassCounts, part: str = "test"
) -> list[MetricRow]:
    """The figures that tell a re-balanced or calibrated model from what it was.

    Args:
        metrics: Of a run: ``before``, ``rebalance`` and ``part``.
        counts: Training samples per class.
        part: What it was measured on, ``"test"`` or ``"validation"``.
    """
    return [*_shares(metrics, counts, part), *_calibration(metrics, part)]


def _shares(metrics: Mapping[str, Any], counts: ClassCounts, part: str) -> Iterator[MetricRow]:
    names = {
        "balanced_accuracy": "balanced accuracy",
        **{
            group: f"{title}, {len(ids)} {'class' if len(ids) == 1 else 'classes'}"
            for (group, title), ids in zip(
                group_titles(counts).items(), counts.groups().values(), strict=True
            )
        },
        "accuracy": f"accuracy on the {PARTS[part]}'s own mix",
    }
    differences = metrics["rebalance"]["differences"]
    for name, title in names.items():
        pair = [_share(metrics[each], name) for each in ("before", part)]
        if None in pair:
            continue
        old, new = (f"{percent(share)} ({ends(interval)})" for share, interval in pair)
        yield MetricRow(title, old, new, points(differences[name]))


def _share(found: Mapping[str, Any], name: str) -> Any:
    if name == "accuracy":
        low, high = found["intervals"]["top1_error"]
        return 1 - found["top1_error"] / 100, [1 - high / 100, 1 - low / 100]
    if found[name] is None:
        return None
    return found[name], found["intervals"][name]


def points(difference: list[float]) -> str:
    """A difference of shares with its interval: ``+3.1 (+1.0 to +5.2)``, in points."""
    value, low, high = (100 * number for number in difference)
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def _calibration(metrics: Mapping[str, Any], part: str) -> Iterator[MetricRow]:
    titles = {
        "nll": "cross-entropy (nll), target mix",
        "ece": "calibration error (ece), target mix",
        "classwise_ece": "class-wise calibration error, target mix",
    }
    pair = [metrics[each]["calibration"] for each in ("before", part)]
    for name, title in titles.items():
        old, new = (f"{each[name]:.4f} ({ends(each['intervals'][name], 1, 4)})" for each in pair)
        yield MetricRow(title, old, new, f"{pair[1][name] - pair[0][name]:+.4f}")


def verdict(metrics: Mapping[str, Any], part: str = "test") -> list[str]:
    """What was done and what it brought, in sentences; ``part`` as for :func:`metric_rows`."""
    done = metrics["rebalance"]
    strength = "" if done["strength"] is None else f" of strength {done['strength']:.4g}"
    if done["method"] == "none":
        told = ["The head is left as it is."]
    else:
        told = [f"The head was changed by {done['method']}{strength}."]
    if done["choice"] is not None:
        told.append(done["choice"]["verdict"])
    value, low, high = (100 * number for number in done["differences"]["balanced_accuracy"])
    sure = "more" if low > 0 or high < 0 else "no more"
    if done["method"] != "none":
        told.append(
            f"On the {PARTS[part]} balanced accuracy changed by {value:+.1f} points ({low:+.1f} to"
            f" {high:+.1f}), which is {sure} than noise."
        )
    if "many" in done["differences"] and done["method"] != "none":
        told.append(f"The classes with many samples: {points(done['differences']['many'])} points.")
    if done["temperature"] is None:
        told.append(
            "The logits of the classes have scales of their own, which fit the probabilities to the"
            " target mix of classes."
        )
    elif done["temperature"] != 1:
        told.append(
            f"The logits were divided by {done['temperature']:.3g}, which fits the probabilities to"
            " the target mix of classes."
        )
    return told


def change_plots(
    metrics: Mapping[str, Any],
    counts: ClassCounts,
    part: str = "test",
    files: tuple[str, str] = (CHANGE_FILE, RELIABILITY_FILE),
) -> list[Plot]:
    """Accuracy of the classes and reliability before and after.

    Args:
        metrics: As for :func:`metric_rows`.
        counts: Likewise.
        part: Likewise.
        files: Names of the two.
    """
    from ldam_plugins.reports.change_plots import class_change, reliability

    before, after = (class_rows(metrics[each], counts) for each in ("before", part))
    bins = [metrics[each]["calibration"]["bins"] for each in ("before", part)]
    return [
        Plot(
            files[0],
            "Accuracy of the classes",
            *(class_change(before, after, dark=dark) for dark in (False, True)),
        ),
        Plot(
            files[1],
            "Reliability",
            *(reliability(*bins, dark=dark) for dark in (False, True)),
        ),
    ]


def write_rebalance_report(output_dir: str | os.PathLike[str]) -> Path:
    """Write ``report.html`` of a re-balanced model with its plots inside, and the plots as PNG.

    A pure function of ``metrics.json`` in ``output_dir``; the card of the model there is completed.
    The page needs no network and no script,
    and follows the reader's light or dark setting.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: there is no ``metrics.json``.
    """
    folder = Path(output_dir)
    metrics = read_metrics(folder)
    counts = ClassCounts(
        metrics["class_counts"], metrics.get("class_names"), **metrics["group_limits"]
    )
    before, after = (class_rows(metrics[part], counts) for part in ("before", "test"))
    plots = change_plots(metrics, counts)
    for plot in plots:
        write_atomic(folder / plot.file, plot.light)
    rows = list(zip(before, after, strict=True))
    choice = metrics["rebalance"]["choice"]
    page = render(
        "rebalance.html.jinja",
        title=f"{metrics['options']['model']} on {metrics['options']['dataset']}, re-balanced",
        subtitle=f"{len(counts)} classes, imbalance ratio {counts.imbalance_ratio:.4g}; measured on"
        f" {sum(metrics['test']['per_class_samples'])} test samples",
        verdict=verdict(metrics),
        metrics=metric_rows(metrics, counts),
        plots=plots,
        rows=rows[:_MAX_TABLE_ROWS],
        left_out=max(0, len(rows) - _MAX_TABLE_ROWS),
        percent=percent,
        ends=ends,
        few_examples=FEW_EXAMPLES,
        by="" if choice is None else choice["by"].replace("_", " "),
        candidates=[] if choice is None else _candidates(choice),
        options=metrics["options"],
        machine={"device": metrics["device"], **metrics["versions"]},
        command=metrics.get("command"),
    )
    write_atomic(folder / REPORT_FILE, page)
    complete_card(folder)
    return folder / REPORT_FILE


def _candidates(choice: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """A line a candidate, the best first, and that of the head as it is in any case."""
    ordered = sorted(choice["candidates"], key=lambda each: -each["gain"][0])
    shown = ordered[:_BEST]
    kept = next((each for each in choice["candidates"] if each["method"] == "none"), None)
    if kept is not None and kept not in shown:
        shown.append(kept)
    return [
        (
            each["method"],
            "-" if each["strength"] is None else f"{each['strength']:.4g}",
            f"{each['log_loss']:.4f}",
            percent(each["accuracy"]),
            points(each["accuracy_gain"]),
        )
        for each in shown
    ]
