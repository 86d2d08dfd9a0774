"""Classifiers of transformers that were trained by anyone, of texts or of images."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from ldam_plugins._validation import invalid
from ldam_plugins.reports.model_card import write_card

TEXTS, IMAGES = "texts", "images"
_KINDS: Mapping[str, tuple[str, Any, Any]] = {
    "ForSequenceClassification": (TEXTS, AutoModelForSequenceClassification, AutoTokenizer),
    "ForImageClassification": (IMAGES, AutoModelForImageClassification, AutoImageProcessor),
}
_README = """# {title}

The {kind} of `{source}` with another head; all else is as it was, and so is its licence.

```python
from transformers import pipeline

classify = pipeline("{task}-classification", model="PATH/OF/THIS/FOLDER"{trust})
classify{call}
```

`metrics.json` of the run has what was done to the head, and the figures before and after.
"""
_UNNAMED = re.compile(r"LABEL_\d+")


@dataclass(frozen=True)
class TrainedModel:
    """A classifier that transformers has loaded.

    Args:
        model: In evaluation mode, in the dtype of its weights.
        processor: Its tokenizer or image processor.
        kind: ``"texts"`` or ``"images"``.
        class_names: In the order of its logits; None where its config has none but ``LABEL_0``.
    """

    model: PreTrainedModel
    processor: Any
    kind: str
    class_names: tuple[str, ...] | None

    def save(self, folder: str | os.PathLike[str], *, title: str, source: str) -> None:
        """Write model and processor as their host does, and a README that says how to load them.

        Args:
            folder: Where to.
            title: Heading of the README.
            source: The model whose head was changed.
        """
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        task = "text" if self.kind == TEXTS else "image"
        own_code = any(Path(folder).glob("*.py"))
        readme = _README.format(
            title=title,
            kind=type(self.model).__name__,
            source=source,
            task=task,
            trust=", trust_remote_code=True" if own_code else "",
            call='(["a text"], truncation=True)' if task == "text" else '("IMAGE")',
        )
        write_card(
            folder,
            readme,
            library="transformers",
            task=f"{task}-classification",
            base_model=source,
        )

    def collate_images(self, batch: list[tuple[Any, int]]) -> dict[str, Any]:
        """Pairs of RGB images and classes as the model's input, with ``labels``."""
        images, labels = zip(*batch, strict=True)
        inputs = dict(self.processor(images=list(images), return_tensors="pt"))
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        return {**inputs, "labels": torch.tensor(labels)}


def load_trained(source: str | os.PathLike[str]) -> TrainedModel:
    """Load a text or image classifier of transformers with its tokenizer or image processor.

    No code that comes with a model is run.

    Args:
        source: A folder that ``save_pretrained`` or a Trainer wrote, or a hub id.

    Raises:
        ValueError: it cannot be loaded, lacks its tokenizer or image processor, is no classifier of
            texts or images, or one of several labels a sample.
    """
    source = os.fspath(source)
    config = _loaded(AutoConfig, source)
    name = (config.architectures or ["none"])[0]
    ending = next((each for each in _KINDS if name.endswith(each)), None)
    if ending is None:
        expected = f"a classifier, whose config names a model ...{' or ...'.join(_KINDS)}"
        raise invalid("model", expected, f"{source}, a {name}")
    if config.problem_type not in (None, "single_label_classification"):
        raise invalid("model", "one of one label a sample", config.problem_type)
    kind, auto_model, auto_processor = _KINDS[ending]
    model = _loaded(auto_model, source, dtype="auto")
    processor = _loaded(auto_processor, source)
    if kind == TEXTS and Path(source).is_dir():
        _check_tokenizer(processor, Path(source))
    names = tuple(str(config.id2label[index]) for index in range(config.num_labels))
    unnamed = all(_UNNAMED.fullmatch(each) for each in names)
    return TrainedModel(model.eval(), processor, kind, None if unnamed else names)


def _check_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Refuse a folder without a tokenizer, for which transformers makes one that knows no word."""
    names = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if not any((folder / name).is_file() for name in names):
        hint = f"Save it there: tokenizer.save_pretrained({str(folder)!r})."
        raise invalid("model", "a folder with its tokenizer", str(folder), hint=hint)


def _loaded(auto: Any, source: str, **options: Any) -> Any:
    try:
        return auto.from_pretrained(source, trust_remote_code=False, **options)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        checkpoints = sorted(each.name for each in Path(source).glob("checkpoint-*"))
        hint = "" if Path(source).exists() else "There is no such folder. "
        hint += f"transformers says: {' '.join(str(error).split())}"
        if checkpoints:
            hint = f"Give one of its checkpoints, such as {Path(source, checkpoints[-1])}."
        expected = "a folder of transformers with model and tokenizer, or a hub id"
        raise invalid("model", expected, source, hint=hint) from error
