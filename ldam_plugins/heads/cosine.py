"""The cosine head, put onto any timm, transformers or plain classifier.

LDAM's margins are distances between normalised features and normalised class weights, so the
classifier must give ``s * cos(angle)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ldam_plugins._validation import check_choice, check_real, invalid
from ldam_plugins.choices import DEFAULT_SCALE, HEAD_INITS
from ldam_plugins.heads.finder import find_head, refuse_adapted
from ldam_plugins.heads.folding import fold_before_fusing
from ldam_plugins.heads.guard import check_replaceable, guard_heads
from ldam_plugins.heads.layers import (
    Cosine,
    CosineLinear,
    check_unpartitioned,
    cosine_heads,
    cosine_layer,
    replace_layers,
)


def use_cosine_head(
    model: nn.Module,
    scale: float = DEFAULT_SCALE,
    *,
    head: str | Sequence[str] | None = None,
    init: str = "random",
    chunked: bool | None = None,
) -> nn.Module:
    """Replace the classifier of ``model`` by a cosine head, ``z = scale * cos(angle)``.

    The layer, or every layer of a model with several heads, is replaced in place: same name,
    device, dtype, mode and ``requires_grad``. Call it after the pretrained weights are loaded,
    before the optimizer is made, which must hold the new parameter, and before the model is wrapped
    for parallel training. A compiled model is compiled anew.
    A model that has the head already, with the same scale, is returned as it is.

    From then on the model checks before every forward pass that trains that the head is still
    there. If `reset_classifier`, quantisation or an adapter has taken its place, an error is
    raised, as the margins would be applied to ordinary logits. Methods of modules around the head
    that fuse layers for inference (``fuse``, ``reparameterize``) fold it first. After
    `fold_cosine_head` neither holds any more.

    Args:
        model: A timm or transformers classifier, or any module whose last layer is linear.
        scale: s, the largest possible logit; the margin loss must have the same scale.
        head: Dotted names of the layers, where `find_head` does not find the right ones.
        init: ``"random"`` rows of length 1, as the paper's, or ``"keep"`` the weight rows of the
            old head (not its bias), for instance where that was trained for the same classes; rows
            of zeros become random. The length of a row changes no logit, but how far a step turns
            it: with Adam by an angle that falls as 1 / length, with SGD as 1 / length squared. A
            new ``nn.Linear`` has rows of 0.58, whatever its size.
        chunked: For very many classes: in training mode the head returns no logits but a
            :class:`.ChunkedCosines`, from which the losses ``ce``, ``ldam`` and
            ``uniform_margin`` are computed for some classes at a time. In evaluation mode it
            returns logits. The loss must be outside the model: pass no ``labels`` to transformers'
            models (a Trainer with ``compute_loss_func`` does not). Default: an existing head stays
            as it is, a new one returns logits.

    Returns:
        ``model``; if ``model`` itself is the layer, the new layer.

    Raises:
        TypeError: an argument of the wrong type, or a head without floating-point weights.
        ValueError: the head is not found or not certain (see `find_head`), a cosine head of
            another scale is there, ``scale`` is not a finite number above 0, ``chunked`` is
            asked of a convolution, the head's weight is also another module's, or the model is
            wrapped or sharded already (DistributedDataParallel, FSDP, DeepSpeed).

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> use_cosine_head(model)[2]
        CosineLinear(in_features=4, out_features=3, bias=False, scale=30)
    """
    scale = check_real("scale", scale, low=0.0, low_open=True)
    check_choice("init", init, HEAD_INITS)
    names = tuple(cosine_heads(model)) if head is None else ()
    names = names or find_head(model, head)
    refuse_adapted(names)
    found: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    plain = {name: layer for name, layer in found.items() if not isinstance(layer, Cosine)}
    for name, layer in found.items():
        if name in plain:
            _check_plain(name, layer)
        else:
            _check_same_scale(name, layer, scale)
    check_replaceable(model, plain)
    new: dict[nn.Module, nn.Module] = {}
    for name, layer in found.items():
        if name in plain:
            layer = new.setdefault(layer, cosine_layer(layer, scale, keep=init == "keep"))
        _set_chunked(name, layer, chunked)
    result = replace_layers(model, new)
    guard_heads(result)
    fold_before_fusing(result)
    return result


def attach_cosine_head(model: nn.Module, scale: float) -> bool:
    """Put a cosine head with the old head's directions on ``model``, unless it has one.

    The rows of the old head are kept and scaled to length 1. So a model that was trained with a
    cosine head and saved with the folded one predicts the same classes as before, and one with an
    untrained classifier gets random directions.

    Returns:
        Whether the head was put on now.

    Raises:
        ValueError: the head is not found (see :func:`use_cosine_head`), or has another scale.
    """
    new = not cosine_heads(model)
    try:
        use_cosine_head(model, scale, init="keep")
    except ValueError as error:
        hint = f"Call use_cosine_head(model, scale={scale:g}, head=...) before Trainer(...)."
        raise ValueError(f"{error} {hint}") from error
    if new:
        for head in cosine_heads(model).values():
            rows = head.weight.data
            rows.copy_(F.normalize(rows.flatten(1).float()).view_as(rows))
    return new


def _check_same_scale(name: str, layer: Cosine, scale: float) -> None:
    if layer.scale != scale:
        hint = f"The head {name!r} is there with that scale: ask for the same, or call"
        hint += " fold_cosine_head(model) first and then put on a new one."
        raise invalid("scale", f"{layer.scale:g}", scale, hint=hint)


def _set_chunked(name: str, layer: Cosine, chunked: bool | None) -> None:
    if isinstance(layer, CosineLinear):
        layer.chunked = layer.chunked if chunked is None else chunked
    elif chunked:
        expected = f"False where the head {name!r} is a convolution"
        raise invalid("chunked", expected, chunked)


def _check_plain(name: str, layer: nn.Linear | nn.Conv2d) -> None:
    weight = dict(layer.named_parameters(recurse=False)).get("weight")
    if weight is None or torch.nn.parameter.is_lazy(weight) or not weight.is_floating_point():
        expected = f"a model whose head {name!r} holds its weights as floats"
        hint = "Load a quantised head in full, run a batch through a lazy one, or remove the"
        hint += " parametrization (weight norm, pruning) first."
        raise invalid("model", expected, type(layer).__name__, hint=hint, error=TypeError)
    check_unpartitioned(name, layer, weight)
