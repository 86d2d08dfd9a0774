"""Low-rank adapters of PEFT on image models, merged into their weights before they are saved."""

from __future__ import annotations

import re
from importlib.util import find_spec

import torch
from timm.layers import Conv2dSame
from torch import nn

from ldam_plugins._validation import invalid
from ldam_plugins.heads import cosine_heads, find_head
from ldam_plugins.heads.folding import evaluation_mode
from ldam_plugins.heads.freezing import evaluate_frozen

# Kinds whose output is linear in the weight as it is stored, and that PEFT makes adapters of.
# Subclasses are left out: those with standardised weights are neither.
_LINEAR = (nn.Linear, nn.Conv2d, Conv2dSame)


def add_adapters(
    model: nn.Module, rank: int, alpha: float, input_size: tuple[int, ...]
) -> nn.Module:
    """Freeze ``model`` but for its classifier and new adapters: ``W + alpha / rank * B A``.

    ``B`` is zero at first, so the model begins as it is. The classifier is trained whole. Batch
    normalisation keeps its statistics, as its weights are frozen. Take :func:`merged` of the result
    before it is saved.

    Args:
        model: A classifier of images with its head, of timm or another library.
        rank: Rank of ``B A``, at least 1.
        alpha: Scale of the adapters.
        input_size: (channels, height, width) of its images.

    Returns:
        The model of PEFT around ``model``, whose layers are changed in place.

    Raises:
        ModuleNotFoundError: PEFT is not installed.
        ValueError: no layer of the model can have an adapter, or its names are those of PEFT.
    """
    if find_spec("peft") is None:
        hint = "Run `pip install peft`."
        raise invalid("lora_rank", "0 without PEFT", rank, hint=hint, error=ModuleNotFoundError)
    from peft import LoraConfig, get_peft_model

    name = type(model).__name__
    if any("base_layer" in part.split(".") for part, _ in model.named_modules()):
        expected = "0 for a model with a part called `base_layer`, PEFT's own name"
        raise invalid("lora_rank", expected, rank, hint=f"{name} has one.")
    heads = tuple(cosine_heads(model)) or find_head(model)
    layers = adaptable_layers(model, input_size)
    if not layers:
        expected = "0 for a model without a linear layer or an undivided convolution"
        raise invalid("lora_rank", expected, rank, hint=f"{name} has none but its classifier.")
    # A pattern: a list of names would also match the ends of longer names.
    pattern = "|".join(map(re.escape, layers))
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, target_modules=pattern))
    for head in heads:
        model.get_submodule(head).requires_grad_(True)
    evaluate_frozen(model)
    return adapted


def merged(model: nn.Module) -> nn.Module:
    """The model of :func:`add_adapters` without adapters, their product added to its weights.

    A model without adapters is returned as it is.
    """
    merge = getattr(model, "merge_and_unload", None)
    return merge() if callable(merge) else model


def adaptable_layers(model: nn.Module, input_size: tuple[int, ...]) -> list[str]:
    """Names of the layers that can have an adapter, but for the classifier.

    They are the linear layers and the convolutions of one group and without dilation that a forward
    pass calls: where a model uses the weight alone, as BEiT does in its attention, an adapter on
    the layer would do nothing.

    Args:
        model: A classifier of images.
        input_size: (channels, height, width) of its images.
    """
    heads = set(cosine_heads(model)) or set(find_head(model))
    called: list[str] = []
    hooks = [
        layer.register_forward_hook(lambda module, args, output, name=name: called.append(name))
        for name, layer in model.named_modules()
        if name not in heads and _can_be_adapted(layer)
    ]
    parameter = next(model.parameters())
    try:
        with torch.no_grad(), evaluation_mode(model):
            model(torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype))
    finally:
        for hook in hooks:
            hook.remove()
    return list(dict.fromkeys(called))


def _can_be_adapted(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        shape = (layer.groups, layer.dilation, layer.padding_mode)
        return type(layer) in _LINEAR and shape == (1, (1, 1), "zeros")
    return type(layer) in _LINEAR
