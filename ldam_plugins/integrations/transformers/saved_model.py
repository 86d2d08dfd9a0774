"""The classifier that a text run leaves behind: measured as anyone loads it, and described."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ldam_plugins._validation import invalid
from ldam_plugins.counts import ClassCounts
from ldam_plugins.data.streams import StreamedTexts
from ldam_plugins.metrics import MetricAccumulator, Predictions
from ldam_plugins.reports.model_card import write_card

if TYPE_CHECKING:
    from datasets import Dataset

_TEXTS_AT_ONCE = 1024
_ROOM = 1.3  # weights and the activations of a batch, in weights

logger = logging.getLogger(__name__)

_OWN_CODE = """
The architecture is no part of transformers: its code lies in this folder, and it loads with
`trust_remote_code=True`.
"""
_README = """# {name}

A text classifier of {classes} classes, trained by the recipe `text_lt.py` of ldam_plugins.
It loads without that package:

```python
from transformers import pipeline

classify = pipeline("text-classification", model="PATH/OF/THIS/FOLDER"{trust})
classify(["a text", "another"], truncation=True)
```
{own_code}
`truncation=True` cuts longer texts to the {length} tokens the model was trained on. `test` in the
run's `metrics.json` was measured on what lies here: these weights, this tokenizer, truncated, in
float32.
"""


def measure_saved(
    folder: str | os.PathLike[str],
    texts: Dataset | StreamedTexts,
    class_counts: ClassCounts,
    *,
    batch_size: int = 64,
    detailed: bool = False,
    examples: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Metrics of the model in ``folder`` on ``texts``, as anyone gets them who loads it.

    Model and tokenizer come from the folder through their Auto classes, the texts are truncated
    as the tokenizer says, and all is computed in float32. The processes of a training share the
    texts; each must see the folder, and all get the same metrics. A model that finds no room on the
    device, as those trained in shards may not, is measured on the CPU.

    Args:
        folder: What ``save_pretrained`` of model and tokenizer wrote.
        texts: Columns ``text`` and ``label``, class c being the c-th output; and ``group``, where
            there is one.
        class_counts: Training texts per class; they define the groups, and where they have names
            the model must have the same ones.
        batch_size: Texts a forward pass.
        detailed: Whether to give intervals, the confusion matrix and the groups as well.
        examples: Name of each text (N,). With them the answer has ``predictions``, the columns of
            :class:`~ldam_plugins.metrics.Predictions`.

    Returns:
        As of :func:`.long_tail_metrics`.

    Raises:
        ValueError: the model has other classes than ``class_counts``, or another order of them.
    """
    state = PartialState()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    _check_classes(model.config.id2label, class_counts)
    device = _place(model.eval(), state.device)
    metrics, predictions = MetricAccumulator(class_counts), Predictions(len(class_counts))
    first, step = state.process_index, state.num_processes
    parts = _parts(texts, first, step)
    for chosen, batch, labels, groups in _batches(parts, tokenizer, batch_size):
        with torch.inference_mode():
            logits = model(**{name: rows.to(device) for name, rows in batch.items()}).logits
        metrics.update(logits.cpu(), labels, groups)
        if examples is not None:
            predictions.update([first + step * index for index in chosen], logits, labels)
    (metrics, predictions), *others = gather_object([(metrics, predictions)])
    for more_metrics, more_predictions in others:
        metrics.merge(more_metrics)
        predictions.merge(more_predictions)
    found = metrics.compute(detailed=detailed)
    if examples is not None:
        found["predictions"] = predictions.columns(examples)
    return found


def describe_saved(
    folder: str | os.PathLike[str], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write the ``README.md`` of a saved classifier: how to load it, and what it needs.

    Args:
        folder: What ``save_pretrained`` of model and tokenizer wrote.
        model: What was saved there.
        tokenizer: Likewise.
    """
    own_code = any(Path(folder).glob("*.py"))
    text = _README.format(
        name=type(model).__name__,
        classes=model.config.num_labels,
        trust=", trust_remote_code=True" if own_code else "",
        own_code=_OWN_CODE if own_code else "",
        length=tokenizer.model_max_length,
    )
    write_card(
        folder,
        text,
        library="transformers",
        task="text-classification",
        base_model=model.name_or_path,
    )


def _check_classes(id2label: Mapping[int, str], class_counts: ClassCounts) -> None:
    if len(id2label) != len(class_counts):
        expected = f"one of {len(class_counts)} classes, as the class counts"
        raise invalid("model", expected, f"{len(id2label)} classes")
    names = tuple(id2label[index] for index in range(len(id2label)))
    if class_counts.class_names not in (None, names):
        expected = f"one of the classes {class_counts.class_names}, in this order"
        raise invalid("model", expected, names)


def _place(model: torch.nn.Module, device: torch.device) -> torch.device:
    """Move the model to the device if it fits; return where it is."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        needed = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        free, _ = torch.cuda.mem_get_info(device)
        if needed * _ROOM > free:
            logger.warning(
                f"The saved model needs {needed / 2**30:.1f} GiB and {device} has"
                f" {free / 2**30:.1f} GiB left: it is measured on the CPU."
            )
            return torch.device("cpu")
    model.to(device)
    return device


def _parts(
    texts: Dataset | StreamedTexts, process: int, processes: int
) -> Iterator[Mapping[str, Sequence[Any]]]:
    """The columns of this process's texts, some rows at a time."""
    if isinstance(texts, StreamedTexts):
        own = islice(texts, process, None, processes)
        while rows := list(islice(own, _TEXTS_AT_ONCE)):
            yield {column: [row[column] for row in rows] for column in rows[0]}
        return
    part = texts.select(range(process, len(texts), processes))
    for begin in range(0, len(part), _TEXTS_AT_ONCE):
        yield part[begin : begin + _TEXTS_AT_ONCE]


def _batches(
    parts: Iterable[Mapping[str, Sequence[Any]]], tokenizer: PreTrainedTokenizerBase, size: int
) -> Iterator[tuple[list[int], Mapping[str, Tensor], Sequence[int], Sequence[str] | None]]:
    """Rows, tokens, labels and groups of some texts at a time, those of like length together."""
    seen = 0
    for rows in parts:
        tokens = tokenizer(rows["text"], truncation=True)
        order = sorted(range(len(rows["text"])), key=lambda i: len(tokens["input_ids"][i]))
        for start in range(0, len(order), size):
            chosen = order[start : start + size]
            batch = {name: [column[i] for i in chosen] for name, column in tokens.items()}
            groups = [rows["group"][i] for i in chosen] if "group" in rows else None
            labels = [rows["label"][i] for i in chosen]
            places = [seen + index for index in chosen]
            yield places, tokenizer.pad(batch, return_tensors="pt"), labels, groups
        seen += len(order)
