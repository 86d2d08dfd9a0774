"""What a run leaves behind for people: ``report.html`` and its plots, from the run's own files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ldam_plugins.counts import ClassCounts
from ldam_plugins.metrics import ECE_BINS
from ldam_plugins.metrics.intervals import FEW_EXAMPLES
from ldam_plugins.reports.class_table import (
    TOO_NARROW,
    ClassRow,
    class_rows,
    ends,
    group_titles,
    percent,
    printable,
    summary,
)
from ldam_plugins.reports.comparison import (
    CLASSES_FILE,
    read_baseline,
    worded_parts,
    write_baseline,
)
from ldam_plugins.reports.html import Plot, render
from ldam_plugins.reports.mistakes import read_mistakes, read_predictions
from ldam_plugins.reports.model_card import complete_card
from ldam_plugins.schedules import DeferredSchedule
from ldam_plugins.training.files import write_atomic
from ldam_plugins.training.history import read_confusion, read_history, read_metrics

REPORT_FILE, CURVE_FILE, PROFILE_FILE = "report.html", "training_curve.png", "class_profile.png"
CONFUSION_FILE, RELIABILITY_FILE = "confusion.png", "reliability.png"
CHANGE_FILES = ("class_change.png", "reliability_change.png")
BINS_FILE = "reliability.csv"
_MAX_TABLE_ROWS = 1000
_NAMED = 20
_MAX_CONFUSED = 20


def write_report(
    output_dir: str | os.PathLike[str], *, baseline: str | os.PathLike[str] | None = None
) -> Path:
    """Write ``report.html`` with its plots inside, the same plots as PNG, and its tables as CSV.

    A pure function of what the run wrote into ``output_dir``, so it can be run again at any time.
    Figures on held-out training samples (``validation`` in the metrics) stand below those on the
    test set, and in their place where ``test`` is None. The page needs no network and no script,
    and follows the reader's light or dark setting. Without an epoch in the history there is no
    training curve, nor of a model that was evaluated alone. The card of the model, if there is one
    in ``model/``, is completed (:func:`~ldam_plugins.reports.model_card.complete_card`).

    Args:
        output_dir: Folder of the run.
        baseline: A run, or a CSV of predictions, that it is compared with on the same samples; kept
            as ``baseline.csv``, which later reports of the run show, too.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: ``metrics.json``, ``history.csv`` or the predictions of the baseline are
            missing.
        ValueError: a file does not hold what a run writes, or the baseline not what it can be
            compared with.
    """
    folder = Path(output_dir)
    metrics = read_metrics(folder)
    evaluated = "evaluated" in metrics  # a model that was trained elsewhere
    history = [] if evaluated else read_history(folder)
    limits = metrics.get("group_limits", {})
    counts = ClassCounts(metrics["class_counts"], metrics.get("class_names"), **limits)
    part = "test"
    test, validation = metrics["test"], _validation(metrics, counts)
    when = "" if evaluated else f" {_measured(metrics.get('selection'))}"
    how = f"plain cross-entropy and accuracy{when}"
    measured = f"Measured on the test set with {how}."
    if evaluated:
        measured = f"{metrics['evaluated']}, measured with {how}."
    if test is None and validation is not None:
        measured = f"{validation[0]} With {how}; the test set was left alone."
        part, test, validation = "validation", metrics["validation"], None
    rows, confusion = class_rows(test, counts), read_confusion(folder, counts, part)
    predictions = read_predictions(folder, part)
    _write_tables(folder, rows, predictions)
    if baseline is not None:
        write_baseline(folder, baseline, part)
    plots = _draw(
        history, rows, group_titles(counts), metrics.get("selection"), confusion, predictions
    )
    change = _change(metrics, counts, part)
    for plot in [*plots, *change["change_plots"]]:
        write_atomic(folder / plot.file, plot.light)
    page = render(
        "report.html.jinja",
        title=_title(metrics["options"]),
        subtitle=_subtitle(metrics["options"], counts),
        verdict=verdict(test, counts),
        summary=summary(test, counts),
        measured=measured,
        baseline=_baseline(folder),
        validation=validation,
        plots=plots,
        **change,
        rows=_shortened(rows),
        left_out=len(rows) - _MAX_TABLE_ROWS,
        percent=percent,
        ends=ends,
        detailed="intervals" in test,
        few_examples=FEW_EXAMPLES,
        confused=_confused(confusion, counts),
        by_group=_by_group(test.get("by_group", {})),
        mistakes=read_mistakes(folder),
        said=data_notes(metrics.get("data", {})),
        how="How it was measured" if evaluated else "How it was trained",
        options=metrics["options"],
        machine={**_images(metrics.get("images")), **_machine(metrics)},
        command=metrics.get("command"),
    )
    write_atomic(folder / REPORT_FILE, page)
    complete_card(folder)
    return folder / REPORT_FILE


def _write_tables(folder: Path, rows: Sequence[ClassRow], predictions: pd.DataFrame | None) -> None:
    """What the page shows of the classes and of the confidence, as CSV."""
    from ldam_plugins.reports.plots import reliability_bins

    tables = {CLASSES_FILE: pd.DataFrame(_class_records(rows))}
    if predictions is not None:
        confidence = predictions["probability"].to_numpy()
        count, right = reliability_bins(confidence, _right(predictions), ECE_BINS)
        edges = [index / ECE_BINS for index in range(ECE_BINS + 1)]
        columns = {"above": edges[:-1], "up_to": edges[1:], "samples": count, "right": right}
        tables[BINS_FILE] = pd.DataFrame(columns)
    for file, table in tables.items():
        csv = table.to_csv(index=False, float_format="%.7g", lineterminator="\n")
        write_atomic(folder / file, csv.encode("utf-8", "backslashreplace"))


def _class_records(rows: Sequence[ClassRow]) -> Iterator[dict[str, Any]]:
    """A class a record; of each interval its ends."""
    for row in rows:
        record = {"class": row.name, "training_samples": row.samples, "group": row.group}
        record["test_samples"] = row.tested
        for name in ("accuracy", "precision", "f1"):
            low, high = getattr(row, f"{name}_interval") or (None, None)
            record |= {name: getattr(row, name), f"{name}_low": low, f"{name}_high": high}
        yield record


def _right(predictions: pd.DataFrame) -> np.ndarray:
    return (predictions["label"] == predictions["predicted"]).to_numpy()


def _baseline(folder: Path) -> dict[str, Any] | None:
    """The run against another one, if it was compared."""
    found = read_baseline(folder)
    if found is None:
        return None
    return {"name": found.name, "verdict": found.verdict, "rows": worded_parts(found)}


def _draw(
    history: Sequence[Mapping[str, Any]],
    rows: Sequence[ClassRow],
    titles: Mapping[str, str],
    selection: Mapping[str, Any] | None,
    confusion: Mapping[str, Sequence[int]] | None,
    predictions: pd.DataFrame | None,
) -> list[Plot]:
    from ldam_plugins.reports import plots

    drawn = []
    if history:
        selected = selection["epoch"] if selection else None
        curves = [
            plots.training_curve(history, selected=selected, dark=dark) for dark in (False, True)
        ]
        drawn.append(Plot(CURVE_FILE, "Training curve", *curves))
    profiles = [plots.class_profile(rows, titles, dark=dark) for dark in (False, True)]
    drawn.append(Plot(PROFILE_FILE, "Accuracy and training samples per class", *profiles))
    if confusion is not None and len(rows) <= plots.CONFUSED_CLASSES:
        matrices = [plots.confusion_plot(rows, confusion, dark=dark) for dark in (False, True)]
        drawn.append(Plot(CONFUSION_FILE, "Confusion matrix, samples", *matrices))
    if predictions is not None:
        confidence = predictions["probability"].to_numpy()
        right = _right(predictions)
        diagrams = [
            plots.reliability(confidence, right, bins=ECE_BINS, dark=dark) for dark in (False, True)
        ]
        drawn.append(Plot(RELIABILITY_FILE, "How sure, and how often right", *diagrams))
    return drawn


def _change(metrics: Mapping[str, Any], counts: ClassCounts, part: str) -> dict[str, Any]:
    """What the last step of the training has changed: sentences, figures and plots."""
    if "rebalance" not in metrics or "before" not in metrics:
        return {"changed": [], "metrics": [], "change_plots": []}
    from ldam_plugins.reports import rebalance_report

    return {
        "changed": rebalance_report.verdict(metrics, part),
        "metrics": rebalance_report.metric_rows(metrics, counts, part),
        "change_plots": rebalance_report.change_plots(metrics, counts, part, CHANGE_FILES),
    }


def verdict(test: Mapping[str, Any], counts: ClassCounts) -> str:
    """What matters of a run, in a few sentences: the classes, the head and the tail, the worst."""
    names = counts.class_names or [str(index) for index in range(len(counts))]
    accuracies = [share for share in test["per_class_accuracy"] if share is not None]
    interval = test.get("intervals", {}).get("balanced_accuracy")
    known = f" (95 % interval {ends(interval)})" if interval else ""
    right = percent(test["balanced_accuracy"])
    parts = [f"{right} of the test samples are classified right, each class counting once{known}"]
    many, few = (test.get(group) for group in ("many", "few"))
    if many is not None and few is not None:
        parts.append(
            f"{percent(many)} in classes with more than {counts.many_above} training samples, "
            f"{percent(few)} in those with fewer than {counts.few_below}"
        )
    text = f"{': '.join(parts)}."
    none = sum(share == 0 for share in accuracies)
    if none:
        text += f" Of {none} {'class' if none == 1 else 'classes'} none is right."
    elif len(accuracies) > 1 and "worst_class" in test:
        worst = printable(names[test["worst_class"]])
        text += f" The worst class is {worst}, {percent(test['worst_class_accuracy'])}."
    return text


def data_notes(data: Mapping[str, Any]) -> list[str]:
    """What a run noted of its data, ``data`` of its metrics, in sentences."""
    columns = [f"{argument}: {name!r}." for argument, name in data.get("columns", {}).items()]
    left_out = [f"Left out: {count} {what}." for what, count in data.get("left_out", {}).items()]
    return [*columns, *data.get("said", left_out)]


def _confused(
    confusion: Mapping[str, Sequence[int]] | None, counts: ClassCounts
) -> list[tuple[str, str, int, str]]:
    """The largest errors: class, what it is taken for, samples, and share of the class."""
    if confusion is None:
        return []
    names = counts.class_names or [str(index) for index in range(len(counts))]
    tested: Counter[int] = Counter()
    for true, samples in zip(confusion["true"], confusion["samples"], strict=True):
        tested[true] += samples
    pairs = zip(confusion["true"], confusion["predicted"], confusion["samples"], strict=True)
    wrong = sorted((pair for pair in pairs if pair[0] != pair[1]), key=lambda pair: -pair[2])
    return [
        (names[true], names[predicted], samples, percent(samples / tested[true]))
        for true, predicted, samples in wrong[:_MAX_CONFUSED]
    ]


def _by_group(groups: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """A line a group, the largest error first: name, samples, classes, both errors."""
    ordered = sorted(groups.items(), key=lambda item: -item[1]["top1_error"])
    return [
        (
            name,
            str(group["samples"]),
            str(group["classes"]),
            *(_group_error(group, error) for error in ("top1_error", "balanced_error")),
        )
        for name, group in ordered[:_MAX_TABLE_ROWS]
    ]


def _group_error(group: Mapping[str, Any], error: str) -> str:
    few = f", {TOO_NARROW}" if error in group.get("few_examples", ()) else ""
    return f"{group[error]:.2f} % ({ends(group['intervals'][error], 1)}{few})"


def _title(options: Mapping[str, Any]) -> str:
    return f"{options.get('model', 'model')} on {options.get('dataset', 'data')}"


def _subtitle(options: Mapping[str, Any], counts: ClassCounts) -> str:
    """Loss, schedule, long tail and length of a run; an option that is not there is left out."""
    given = {name: value for name, value in options.items() if value is not None}
    deferred = DeferredSchedule(given.get("schedule", "none")).is_deferred
    start = f" from {given['start']}" if deferred else ""
    wordings = {
        "loss": "loss {loss}",
        "schedule": "schedule {schedule}" + start,
        "epochs": "{epochs} epochs",
        "seed": "seed {seed}",
    }
    parts = [text.format(**given) for name, text in wordings.items() if name in given]
    tail = f"{counts.total} training samples in {len(counts)} classes"
    return ", ".join([*parts, f"{tail}, imbalance ratio {counts.imbalance_ratio:.4g}"])


def _measured(selection: Mapping[str, Any] | None) -> str:
    """Of which epoch the model is, and why."""
    if selection is None:
        return "after the last epoch"
    name = selection["metric"].replace("_", " ")
    text = f"after epoch {selection['epoch']} (counted from 0), which had the best {name} on the"
    text += f" held-out samples, {selection['score']:.4g}"
    if earlier := selection["better_before"]:
        text += f"; epoch {earlier['epoch']}, before the switch, had {earlier['score']:.4g}"
    return text


def _validation(
    metrics: Mapping[str, Any], counts: ClassCounts
) -> tuple[str, list[tuple[str, str]]] | None:
    """How many samples were held out, and the metrics on them; None if none were."""
    if "validation" not in metrics:
        return None
    held_out = metrics["held_out"]
    share = f"{held_out['samples']} of {held_out['samples'] + counts.total} training samples"
    without = [printable(name) for name in held_out["classes_without"]]
    named = ", ".join([*without[:_NAMED], *(["..."] if len(without) > _NAMED else [])])
    rest = f" Classes of which none is held out: {len(without)} ({named})." if without else ""
    return f"Measured on {share} that were held out.{rest}", summary(metrics["validation"], counts)


def _shortened(rows: list[ClassRow]) -> list[ClassRow | None]:
    """The rows of the page's table, None standing for those left out."""
    if len(rows) <= _MAX_TABLE_ROWS:
        return [*rows]
    half = _MAX_TABLE_ROWS // 2
    return [*rows[:half], None, *rows[-half:]]


def _images(record: Mapping[str, Any] | None) -> dict[str, str]:
    """Augmentation and evaluation of the images of a run, if there are any."""
    if record is None:
        return {}
    kind, *rest = record["augmentation"].items()
    details = ", ".join(f"{name} {value}" for name, value in rest)
    config = record["evaluation"]
    size = " x ".join(map(str, config["input_size"]))
    crop = f"{config['interpolation']}, cropped by {config.get('processor')}"
    if config["crop_pct"] is not None:
        crop = f"{config['crop_mode']} crop {config['crop_pct']:g}, {config['interpolation']}"
    return {"augmentation": f"{kind[1]} ({details})", "evaluated images": f"{size}, {crop}"}


def _machine(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Device, speed and versions of a run."""
    minutes, seconds = divmod(round(metrics["train_seconds"]), 60)
    versions = {name: version or "not installed" for name, version in metrics["versions"].items()}
    return {
        "device": metrics["device"],
        "mixed precision": metrics.get("mixed_precision", "unknown"),
        "time": f"{minutes} min {seconds} s",
        "speed": f"{metrics['examples_per_second']:.4g} examples/s",
        **versions,
    }
