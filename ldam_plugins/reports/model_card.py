"""The README of a saved model as a model card: front matter for hubs, and what people should know.

The form is that of Hugging Face's hub, which timm and transformers share: YAML in front, as
``huggingface_hub.ModelCard`` reads and writes it, Markdown below.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ldam_plugins.counts import ClassCounts
from ldam_plugins.metrics.intervals import FEW_EXAMPLES
from ldam_plugins.reports.class_table import (
    ClassRow,
    class_rows,
    ends,
    group_titles,
    percent,
    printable,
    summary,
)
from ldam_plugins.reports.html import render
from ldam_plugins.schedules import DeferredSchedule
from ldam_plugins.training.files import write_atomic
from ldam_plugins.training.history import read_metrics

CARD_FILE, MODEL_FOLDER = "README.md", "model"
PLACE = "PATH/OF/THIS/FOLDER"
"""Stands for the folder of a model in the lines that load it."""
TO_BE_WRITTEN = "To be written by who"
"""With this a card begins what no run can know."""
_FIRST_SECTION = "## Intended use"
_MOST_CLASSES = 100
_SETTINGS = (
    *("model", "loss", "head", "schedule", "start", "max_margin", "scale", "tau", "gamma"),
    *("epochs", "batch_size", "lr", "opt", "weight_decay", "seed", "method", "strength"),
    *("target_prior", "freeze", "lora_rank", "image_size", "max_length", "augment"),
    *("aug", "cutout", "erasing"),
)
_TASKS = {"image-classification": "images", "text-classification": "texts"}


def write_card(
    folder: str | os.PathLike[str],
    text: str,
    *,
    library: str,
    task: str,
    base_model: str | None = None,
) -> None:
    """Write the ``README.md`` of a saved model, with the front matter that hosts read.

    Args:
        folder: Of the model.
        text: Markdown: what the model is, and the lines that load it from :data:`PLACE`.
        library: ``"timm"`` or ``"transformers"``.
        task: ``"image-classification"`` or ``"text-classification"``.
        base_model: What it was trained on from. Only the id of a model on a hub is written.
    """
    data = ModelCardData(
        library_name=library,
        pipeline_tag=task,
        base_model=base_model if is_hub_id(base_model) else None,
        tags=[library, "long-tailed", "class-imbalance"],
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text.strip()}\n")
    write_atomic(Path(folder, CARD_FILE), str(card).encode())


def complete_card(output_dir: str | os.PathLike[str]) -> Path | None:
    """Add data, results, recipe, limits and citation to the card of a run's model.

    They are read from ``metrics.json``; the results stand in the front matter, too, as the
    ``model-index`` of hubs. A card that has them already, and may have been worked on by a person
    since, is left alone, and so is a README that :func:`write_card` did not write.

    Args:
        output_dir: Folder of a run, whose model is in ``model/``.

    Returns:
        The path of the card; None where there is none to complete.
    """
    path = Path(output_dir) / MODEL_FOLDER / CARD_FILE
    if not path.is_file() or not path.read_bytes().startswith(b"---"):
        return None
    card = ModelCard.load(path)
    task = card.data.get("pipeline_tag")
    if task not in _TASKS or _FIRST_SECTION in card.text:
        return None
    metrics = read_metrics(output_dir)
    limits = metrics.get("group_limits", {})
    counts = ClassCounts(metrics["class_counts"], metrics.get("class_names"), **limits)
    part = "validation" if metrics["test"] is None else "test"
    if metrics.get(part) is None:
        return None
    data_set = str(metrics["options"].get("dataset", "unknown"))
    if is_hub_id(data_set):
        card.data["datasets"] = [data_set]
    card.data["metrics"] = ["accuracy", "f1"]
    card.data["model_name"] = Path(output_dir).resolve().name
    card.data["eval_results"] = [*_results(metrics[part], counts, task, data_set, part)]
    text = render("model_card.md.jinja", **_facts(metrics, counts, part, _TASKS[task], data_set))
    card.text = f"{card.text.rstrip()}\n\n{text.decode()}"
    write_atomic(path, str(card).encode())
    return path


def is_hub_id(name: str | None) -> bool:
    """Whether a name is that of a model or data set on a hub: ``owner/name``, and no path here."""
    if name is None or name.count("/") != 1 or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _results(
    found: Mapping[str, Any], counts: ClassCounts, task: str, data_set: str, part: str
) -> Iterator[EvalResult]:
    titles = {f"Accuracy, {title}": name for name, title in group_titles(counts).items()}
    values = {
        ("Accuracy", "accuracy"): 1 - found["top1_error"] / 100,
        ("Balanced accuracy", "balanced_accuracy"): found.get("balanced_accuracy"),
        ("Macro F1", "f1"): found.get("macro_f1"),
        **{(title, "accuracy"): found.get(name) for title, name in titles.items()},
    }
    shown = data_set if is_hub_id(data_set) else Path(data_set).name
    for (name, kind), value in values.items():
        if value is not None:
            yield EvalResult(
                task_type=task,
                dataset_type=shown,
                dataset_name=shown,
                dataset_split=part,
                metric_type=kind,
                metric_name=name,
                metric_value=round(value, 4),
            )


def _facts(
    metrics: Mapping[str, Any], counts: ClassCounts, part: str, kind: str, data_set: str
) -> dict[str, Any]:
    """What the template is filled with."""
    from ldam_plugins.reports.run_report import data_notes, verdict

    options, found = metrics["options"], metrics[part]
    rows = class_rows(found, counts)
    changed = None
    if "rebalance" in metrics:
        from ldam_plugins.reports.rebalance_report import verdict as change_verdict

        changed = change_verdict(metrics, part)
    return {
        "to_be_written": TO_BE_WRITTEN,
        "kind": kind,
        "data_set": data_set if is_hub_id(data_set) else Path(data_set).name,
        "counts": counts,
        "part": {"test": "test samples", "validation": "held-out training samples"}[part],
        "tested": sum(found.get("per_class_samples", ())),
        "held_out": metrics.get("held_out"),
        "cut": options.get("profile", "none") != "none",
        "options": options,
        "notes": [_plain(note) for note in data_notes(metrics.get("data", {}))],
        "verdict": _plain(verdict(found, counts)),
        "summary": [(_plain(name), value) for name, value in summary(found, counts)],
        "rows": [*_class_lines(rows)],
        "left_out": max(0, len(rows) - _MOST_CLASSES),
        "detailed": "intervals" in found,
        "limits": [*_limits(rows, counts, found)],
        "by_group": found.get("by_group"),
        "changed": changed and [_plain(sentence) for sentence in changed],
        "settings": _settings(options),
        "command": metrics.get("command"),
        "versions": {name: version for name, version in metrics["versions"].items() if version},
        "device": metrics["device"],
        "minutes": f"{metrics['train_seconds'] / 60:.1f}",
        "uses_paper": _uses_paper(options),
    }


def _class_lines(rows: Sequence[ClassRow]) -> Iterator[tuple[str, ...]]:
    half = _MOST_CLASSES // 2
    shown = rows if len(rows) <= _MOST_CLASSES else [*rows[:half], *rows[-half:]]
    for row in shown:
        tested = "-" if row.tested is None else str(row.tested)
        accuracy, interval = percent(row.accuracy), ends(row.accuracy_interval)
        yield _plain(printable(row.name)), str(row.samples), row.group, tested, accuracy, interval


def _limits(
    rows: Sequence[ClassRow], counts: ClassCounts, found: Mapping[str, Any]
) -> Iterator[str]:
    """What of the figures says where not to trust the model."""
    few = [row for row in rows if row.group == "few"]
    if few:
        yield (
            f"{len(few)} of {len(rows)} classes had fewer than {counts.few_below} training samples;"
            f" their mean accuracy is {percent(found.get('few'))}."
        )
    never = [row.name for row in rows if row.accuracy == 0]
    if never:
        yield f"Never right in the {_named('class', never)}."
    untested = [row.name for row in rows if row.accuracy is None]
    if untested:
        yield f"Nothing is known of the {_named('class', untested)} without a test sample."
    small = [row.name for row in rows if row.tested and row.tested < FEW_EXAMPLES]
    if small:
        count = "1 class" if len(small) == 1 else f"{len(small)} classes"
        yield f"{count} had fewer than {FEW_EXAMPLES} test samples: little is known of these."
    yield (
        f"Its probabilities are off by {found['ece']:.3f} on average (ece) on samples with the"
        " classes as often as there; with other shares of the classes they may be off by more."
    )


def _named(noun: str, names: Sequence[str], most: int = 10) -> str:
    shown = ", ".join(_plain(printable(name)) for name in names[:most])
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{noun if len(names) == 1 else f'{len(names)} {noun}es'} {shown}{more}"


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that say most of how a model was trained or changed."""
    return {k: options[k] for k in _SETTINGS if options.get(k) or (k == "seed" and k in options)}


def _uses_paper(options: Mapping[str, Any]) -> bool:
    """Whether the loss or the schedule is that of the paper on LDAM."""
    deferred = DeferredSchedule(options.get("schedule") or "none").is_deferred
    return deferred or str(options.get("loss")).startswith("ldam")


def _plain(text: str) -> str:
    """Text that means itself in a table of Markdown."""
    escaped = re.sub(r"([\\`*_|\[\]#$])", r"\\\1", " ".join(text.split()))
    return escaped.replace("&", "&amp;").replace("<", "&lt;")
