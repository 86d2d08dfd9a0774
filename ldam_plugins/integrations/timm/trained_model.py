"""Classifiers of timm that were trained by anyone: their model, classes and preprocessing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError
from timm.data import resolve_data_config
from timm.models import resolve_model_input_args
from timm.utils.checkpoint_saver import load_checkpoint_metadata
from torch import nn

from ldam_plugins._validation import invalid, quoted

CHECKPOINTS = ("model_best.pth.tar", "last.pth.tar")
"""What timm's ``train.py`` leaves; the first there is counts."""
_SUFFIXES = (".pth.tar", ".pth", ".tar")


@dataclass(frozen=True)
class TrainedImageModel:
    """A model that timm has made and loaded.

    Args:
        model: In evaluation mode, on the CPU.
        class_names: In the order of its logits; None where nothing says it. Models of ``train.py``
            are such: their classes are the class folders in the order of timm's reader.
        data_config: How images become its input, as of timm's ``resolve_data_config``.
    """

    model: nn.Module
    class_names: tuple[str, ...] | None
    data_config: Mapping[str, Any]


def checkpoint_in(folder: str | os.PathLike[str]) -> Path | None:
    """The checkpoint that timm's ``train.py`` left in its output folder; None if there is none."""
    return next((Path(folder, name) for name in CHECKPOINTS if Path(folder, name).is_file()), None)


def is_checkpoint(path: str | os.PathLike[str]) -> bool:
    """Whether it is a file as timm's ``train.py`` writes them, by its name."""
    return Path(path).is_file() and os.fspath(path).endswith(_SUFFIXES)


def load_trained(source: str | os.PathLike[str]) -> TrainedImageModel:
    """Load a classifier that was trained already, with its weights and as it was evaluated.

    Args:
        source: A name of timm (``resnet18.a1_in1k``, ``hf-hub:...``, ``local-dir:...``), or a
            checkpoint of timm's ``train.py`` (``model_best.pth.tar``), read with
            ``weights_only=True``. Of one with averaged weights those are taken, as timm does.

    Raises:
        ValueError: timm cannot make or load it.
    """
    if is_checkpoint(source):
        return _of_checkpoint(Path(source))
    try:
        model = timm.create_model(os.fspath(source), pretrained=True)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise _not_loaded(source, error) from error
    names = model.pretrained_cfg.get("label_names")
    if isinstance(names, Mapping):  # by the index of the class, which may come as text
        by_index = {int(index): str(name) for index, name in names.items()}
        whole = sorted(by_index) == list(range(model.num_classes))
        names = [by_index[index] for index in range(model.num_classes)] if whole else None
    known = None if not names else tuple(map(str, names))
    return TrainedImageModel(model.eval(), known, resolve_data_config({}, model=model))


def _of_checkpoint(path: Path) -> TrainedImageModel:
    try:
        found = load_checkpoint_metadata(str(path))
        given = vars(found["args"])
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        expected = "a checkpoint of timm's train.py, which says how it was trained"
        hint = f"It cannot be read as such ({error}). Weights alone become a model folder by"
        hint += " timm.models.save_for_hf(model, folder): give local-dir:FOLDER."
        raise invalid("model", expected, str(path), hint=hint) from error
    try:
        # As train.py does: only models of a fixed size take an image size.
        options = resolve_model_input_args(
            given["model"], given, **(given.get("model_kwargs") or {})
        )
        options |= {"num_classes": given["num_classes"], "global_pool": given.get("gp")}
        model = timm.create_model(
            checkpoint_path=str(path),
            **{name: value for name, value in options.items() if value is not None},
        )
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise _not_loaded(path, error) from error
    return TrainedImageModel(model.eval(), None, resolve_data_config(given, model=model))


def _not_loaded(source: str | os.PathLike[str], error: Exception) -> Exception:
    forms = ("a run folder", "local-dir:FOLDER", "model_best.pth.tar", "resnet18.a1_in1k")
    is_name = ":" not in os.fspath(source) and not Path(source).exists()
    hint = "There is no such file or folder. " if is_name else ""
    told = " ".join(str(error).split()).rstrip(".")
    hint += f"timm says: {told}. It takes such as {quoted(forms)}."
    return invalid("model", "a model that timm can make and load", os.fspath(source), hint=hint)
