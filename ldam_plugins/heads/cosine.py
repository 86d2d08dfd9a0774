"""The cosine head: put onto any timm, transformers or plain classifier, and folded back.

LDAM's margins are distances between normalised features and normalised class weights, so the
classifier must give ``s * cos(angle)``. Folding turns a trained cosine head into the ordinary
layer that was there before, which the host's own loader reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldam_plugins._validation import check_choice, check_real, invalid
from ldam_plugins.heads.finder import find_head, refuse_adapted
from ldam_plugins.heads.folding import logits_of_both, matching_scale
from ldam_plugins.heads.guard import (
    check_replaceable,
    cosine_heads,
    keep_in_place,
    let_go,
)
from ldam_plugins.heads.layers import (
    Cosine,
    CosineLinear,
    check_unpartitioned,
    cosine_layer,
    folded_weight,
    is_sharded,
    mean_over_shards,
    plain_layer,
)


def use_cosine_head(
    model: nn.Module,
    scale: float = 30.0,
    *,
    head: str | Sequence[str] | None = None,
    init: Literal["random", "keep"] = "random",
    chunked: bool | None = None,
) -> nn.Module:
    """Replace the classifier of ``model`` by a cosine head, ``z = scale * cos(angle)``.

    The layer, or all layers of a model with several heads, is replaced in place under its own
    name, on its device, in its dtype, mode and ``requires_grad``. Call it after the pretrained
    weights are loaded and before the optimizer is made, which must know the new parameter, and
    before a wrapper that trains in parallel is put around the model (a compiled model may have
    been wrapped: it is compiled anew).
    A model that has the head already, with the same scale, is returned as it is.

    From then on the model checks before every forward pass that trains that the head is in its
    place: `reset_classifier`, quantising or an adapter that takes its place ends in an error, as
    margins would meet ordinary logits. Methods that fuse layers for inference (``fuse``,
    ``reparameterize``) of modules around the head fold it first. Folding ends all this.

    Args:
        model: A timm or transformers classifier, or any module whose last layer is linear.
        scale: s, the length of the logits; the margin loss must be told the same scale.
        head: Dotted names of the layers, where `find_head` does not find the right ones.
        init: ``"random"`` directions, or ``"keep"`` the weight rows of the old head (not its
            bias), where that was trained for the same classes; rows of zeros become random.
        chunked: For very many classes: in training mode the head returns no logits but a
            :class:`.ChunkedCosines`, from which the losses ``ce``,
            ``ldam`` and ``uniform_margin`` are computed some classes at a time. In evaluation
            mode it returns logits. The loss must be outside the model: give transformers' models
            no ``labels`` (a Trainer with ``compute_loss_func`` does not). Default: a head that is
            there stays as it is, a new one returns logits.

    Returns:
        ``model``; if ``model`` itself is the layer, the new layer.

    Raises:
        TypeError: an argument of the wrong type, or a head without floating-point weights.
        ValueError: the head is not found or not settled (see `find_head`), a cosine head of
            another scale is there, ``scale`` is not a finite number above 0, ``chunked`` is
            asked of a convolution, the head's weight is also another module's, or the model is
            wrapped or sharded already (DistributedDataParallel, FSDP, DeepSpeed).

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> use_cosine_head(model)[2]
        CosineLinear(in_features=4, out_features=3, bias=False, scale=30)
    """
    scale = check_real("scale", scale, low=0.0, low_open=True)
    check_choice("init", init, ("random", "keep"))
    names = (tuple(cosine_heads(model)) if head is None else ()) or find_head(model, head)
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
    result = _replaced(model, new)
    keep_in_place(result, tuple(cosine_heads(result)), fold_cosine_head)
    return result


def fold_cosine_head(
    model: nn.Module, *, inputs: Iterable[Tensor | Sequence[Any] | Mapping[str, Any]] | None = None
) -> nn.Module:
    """Turn every cosine head of ``model`` into an ordinary layer again, in place.

    The new weight is ``k * w[c] / |w[c]|``; the bias, if the replaced layer had one, is zero. For
    features x the cosine head gives ``s * w.x / (|w| |x|)``, the folded one ``k * w.x / |w|``:
    one positive factor per example apart, so the largest logit is the same on every input (up
    to the rounding of the model's dtype), whatever k is. It scales the probabilities:

    * from training: ``k = s * E|x| / E|x|^2``, which minimises ``E (k|x| - s)^2``, with the norms
      met in the last 100 or so training batches, dropout included;
    * from ``inputs``: the factor on top of that with the least mean Kullback-Leibler divergence
      of the folded model's probabilities from the cosine model's on these inputs, both in
      evaluation mode. Use this where dropout acts on the features, or nothing was trained;
    * with neither: ``k = s / sqrt(H)``, right for features of unit mean square.

    Models that combine several heads: where the heads read the same features (EfficientFormer,
    SwiftFormer) they have the same k and their mean is the same up to one factor too. Where they
    read different ones (DeiT's two tokens, CrossViT's two branches, VOLO's auxiliary head), no
    linear layers can weigh them as the cosines do: each head keeps its own largest logit,
    but the combination may differ where the heads disagree and the norms vary. The same holds
    for logits that are averaged over places after the head.

    Args:
        model: A model on which `use_cosine_head` was called.
        inputs: Some batches as the model takes them, on its device: a tensor, a mapping of keyword
            arguments, or a sequence whose first entry is the tensor, as loaders give. A few
            hundred examples are enough; their logits are kept in memory.

    Returns:
        ``model``; if ``model`` itself is the head, the new layer.

    Raises:
        TypeError: the model's output on ``inputs`` is neither a tensor nor holds ``logits``.
        ValueError: no cosine head is there, an adapter sits on it, it is sharded (FSDP2, ZeRO-3),
            or ``inputs`` holds no example or none with a finite, non-zero logit.

    Example:
        >>> model = use_cosine_head(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)))
        >>> fold_cosine_head(model)[2]
        Linear(in_features=4, out_features=3, bias=True)
    """
    heads = _required_heads(model)
    _check_whole(heads)
    layers = {head: plain_layer(head) for head in heads.values()}
    if inputs is not None:
        factor = matching_scale(*logits_of_both(model, layers, inputs))
        for layer in layers.values():
            layer.weight.data.mul_(factor)
    let_go(model)
    return _replaced(model, layers)


def folded_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return a state dict that both the stock architecture and ``model`` can load.

    Each head's ``weight`` is the folded one, ``bias`` is zero where the stock layer has one, and
    the exact weight is added as ``cosine_weight``; all else is untouched. A host that ignores
    keys it does not know, as ``from_pretrained`` does, gets the folded model; a model with cosine
    heads takes back the exact tensors, bit for bit.

    Of a sharded model (FSDP2) it is collective and gives sharded tensors. Of one partitioned by
    DeepSpeed's ZeRO-3 give it ``accelerator.get_state_dict(model)``.

    Args:
        model: A model with cosine heads.
        state_dict: Its tensors, where they were gathered elsewhere; ``model.state_dict()`` if not.

    Raises:
        ValueError: no cosine head is there, an adapter sits on it, or its weight is partitioned.
    """
    heads = _required_heads(model)
    state = dict(model.state_dict() if state_dict is None else state_dict)
    for name, head in heads.items():
        prefix = f"{name}." if name else ""
        if f"{prefix}cosine_weight" in state:  # folded already, as DRWCallback has models saved
            continue
        exact = state[f"{prefix}weight"]
        check_unpartitioned(name, head, exact)
        state[f"{prefix}cosine_weight"] = exact
        moments = mean_over_shards(state[f"{prefix}cosine_moments"], exact)
        state[f"{prefix}cosine_moments"] = moments
        state[f"{prefix}weight"] = folded_weight(head, exact, moments)
        if head.folded_bias:
            state[f"{prefix}bias"] = exact.new_zeros(len(exact))
    return state


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


def _replaced(model: nn.Module, layers: Mapping[Any, nn.Module]) -> nn.Module:
    """Put the new modules wherever the old ones are registered; return what is then the model."""
    if model in layers:
        return layers[model]
    places = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if m in layers]
    for name, old in places:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layers[old])
    return model


def _required_heads(model: nn.Module) -> dict[str, Cosine]:
    heads = cosine_heads(model)
    if not heads:
        hint = "Call use_cosine_head(model) before training."
        raise invalid("model", "one with a cosine head", type(model).__name__, hint=hint)
    refuse_adapted(heads)
    return heads


def _check_whole(heads: Mapping[str, Cosine]) -> None:
    for name, head in heads.items():
        if is_sharded(head.weight):
            hint = "Gather folded_state_dict(model) and load it into the stock architecture."
            expected = f"whole on every process, its head {name!r} at least"
            raise invalid("model", expected, "a sharded one", hint=hint)
        check_unpartitioned(name, head, head.weight)
