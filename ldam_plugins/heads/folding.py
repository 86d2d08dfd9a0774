"""Folding: a cosine head becomes the ordinary layer that was there before.

It is done in memory (`fold_cosine_head`), in a state dict (`folded_state_dict`), in every state
dict that the model gives from now on (`fold_when_saved`), or before a method that fuses layers
(`fold_before_fusing`). timm's and transformers' own loaders read the folded layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ldam_plugins._validation import DIVERGED, invalid
from ldam_plugins.heads.finder import refuse_adapted
from ldam_plugins.heads.guard import guards_of, modules_around, remove_guards
from ldam_plugins.heads.layers import (
    Cosine,
    CosineConv2d,
    check_unpartitioned,
    cosine_heads,
    is_sharded,
    plausible_moments,
    replace_layers,
)
from ldam_plugins.kernels.chunked_cosines import SMALLEST_LENGTH

_FUSING_METHODS = ("fuse", "reparameterize", "switch_to_deploy")
_WIDEST_FACTOR = 2.0**20


def fold_cosine_head(
    model: nn.Module, *, inputs: Iterable[Tensor | Sequence[Any] | Mapping[str, Any]] | None = None
) -> nn.Module:
    """Turn every cosine head of ``model`` into an ordinary layer again, in place.

    The new weight is ``k * w[c] / |w[c]|``; the bias, if the replaced layer had one, is zero. For
    features x the cosine head gives ``s * w.x / (|w| |x|)``, the folded one ``k * w.x / |w|``.
    They differ by one positive factor per example, so the largest logit is the same on every input
    (up to the rounding of the model's dtype), whatever k is. The probabilities depend on k:

    * after training ``k = s * E|x| / E|x|^2``, which minimises ``E (k|x| - s)^2``. The means are
      over about the last 100 training batches, dropout included;
    * with ``inputs`` this k is multiplied by the factor with the smallest mean Kullback-Leibler
      divergence of the folded model's probabilities from the cosine model's on these inputs, both
      in evaluation mode. Use this where dropout acts on the features, or nothing was trained;
    * with neither ``k = s / sqrt(H)``, right for features of unit mean square.

    Several heads whose logits are averaged: where the heads read the same features
    (EfficientFormer, SwiftFormer) they have the same k, and the averages differ by one factor too.
    Where they read different features (DeiT's two tokens, CrossViT's two branches, VOLO's auxiliary
    head), linear layers cannot weigh the heads as the cosines do. Each head keeps its own largest
    logit, but that of the average may differ where the heads disagree and the norms vary. The same
    holds for logits that are averaged over positions after the head.

    Args:
        model: A model on which `use_cosine_head` was called.
        inputs: Some batches as the model takes them, on its device: a tensor, a mapping of keyword
            arguments, or a sequence whose first entry is the tensor, as data loaders give. A few
            hundred examples are enough; their logits are kept in memory.

    Returns:
        ``model``; if ``model`` itself is the head, the new layer.

    Raises:
        TypeError: the model's output on ``inputs`` is neither a tensor nor holds ``logits``.
        ValueError: no cosine head is there, an adapter sits on it, it is sharded (FSDP2, ZeRO-3),
            or ``inputs`` holds no example or none with a finite, non-zero logit.

    Example:
        >>> from ldam_plugins.heads import use_cosine_head
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
    remove_guards(model)
    _remove_folding_methods(model)
    return replace_layers(model, layers)


def folded_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return a state dict that both the stock architecture and ``model`` can load.

    Each head's ``weight`` is the folded one, ``bias`` is zero where the stock layer has one, and
    the exact weight is added as ``cosine_weight``. Nothing else changes. A loader that ignores
    unknown keys, as ``from_pretrained`` does, gets the folded model; a model with cosine heads gets
    the exact tensors back, bit for bit.

    For a sharded model (FSDP2) every process must call it, and it returns sharded tensors. For a
    model partitioned by DeepSpeed's ZeRO-3 pass ``accelerator.get_state_dict(model)``.

    Args:
        model: A model with cosine heads.
        state_dict: Its tensors, where they were gathered already. Default: ``model.state_dict()``.

    Raises:
        ValueError: no cosine head is there, an adapter sits on it, or its weight is partitioned.
    """
    heads = _required_heads(model)
    state = dict(model.state_dict() if state_dict is None else state_dict)
    for name, head in heads.items():
        prefix = f"{name}." if name else ""
        if f"{prefix}cosine_weight" in state:  # folded already, by `fold_when_saved`
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


def fold_when_saved(model: nn.Module) -> None:
    """Make ``model.state_dict()`` return cosine heads as `folded_state_dict` does, from now on.

    Then everything that saves the model writes one that the stock ``from_pretrained`` loads, with
    the same largest logit, and from which a cosine head gets its exact tensors back. Calling it
    twice changes nothing.
    """
    for head in cosine_heads(model).values():
        if not getattr(head, "folds_when_saved", False):
            head.register_state_dict_post_hook(_fold_entries)
            # An attribute of the head, as a copy of the head has a copy of the hook.
            head.folds_when_saved = True  # type: ignore[assignment]


def _fold_entries(
    head: nn.Module, state_dict: dict[str, Tensor], prefix: str, metadata: dict[str, Any]
) -> None:
    own = {name: state_dict[prefix + name] for name in ("weight", "cosine_moments")}
    state_dict.update({prefix + k: v for k, v in folded_state_dict(head, own).items()})


def fold_before_fusing(model: nn.Module) -> None:
    """Make methods that fuse layers for inference fold the cosine heads first.

    Such methods of modules around a head (timm's RepViT, LeViT) read its weight as that of an
    ordinary layer. Calling it twice changes nothing.
    """
    _remove_folding_methods(model)
    for name in cosine_heads(model):
        for module in modules_around(model, name):
            for method in _FUSING_METHODS:
                if callable(getattr(type(module), method, None)):
                    setattr(module, method, _FoldThenCall(module, method))


class _FoldThenCall:
    """The method ``method`` of ``module``, with the cosine heads inside folded first."""

    def __init__(self, module: nn.Module, method: str) -> None:
        self.module, self.method = module, method

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Fold, then do what the method does.

        The guards stay: the fused model is for inference, and to train it would lose the margins.
        """
        if cosine_heads(self.module):
            guards = list(guards_of(self.module))
            fold_cosine_head(self.module)
            for module, guard in guards:
                module.register_forward_pre_hook(guard)
        return getattr(type(self.module), self.method)(self.module, *args, **kwargs)


def _remove_folding_methods(model: nn.Module) -> None:
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if isinstance(value, _FoldThenCall):
                delattr(module, name)


def plain_layer(head: Cosine) -> nn.Linear | nn.Conv2d:
    """Build the folded layer; on the meta device at first, so that no random number is drawn."""
    exact = head.weight
    outputs, inputs = exact.shape[:2]
    layer: nn.Linear | nn.Conv2d
    if isinstance(head, CosineConv2d):
        layer = nn.Conv2d(inputs, outputs, 1, bias=head.folded_bias, device="meta")
    else:
        layer = nn.Linear(inputs, outputs, bias=head.folded_bias, device="meta")
    trains = exact.requires_grad
    layer.weight = nn.Parameter(folded_weight(head, exact.detach(), head.cosine_moments), trains)
    if head.folded_bias:
        layer.bias = nn.Parameter(exact.detach().new_zeros(outputs), trains)
    return layer.train(head.training)


def folded_weight(head: Cosine, weight: Tensor, moments: Tensor) -> Tensor:
    """Return ``k * w[c] / |w[c]|`` (see `fold_cosine_head`), k from the moments if they are known.

    Args:
        head: The head, whose scale is s.
        weight: Its weight, (C, H) or (C, H, 1, 1); may be a DTensor.
        moments: (2,), ``E|x|`` and ``E|x|^2`` up to a common factor; zeros where unknown.
    """
    rows = weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
    first, second = moments.to(rows.dtype).to(rows.device).unbind()
    unit = torch.full_like(first, head.scale / math.sqrt(rows.shape[1]))
    known = plausible_moments(moments) & (second > 0)
    factor = torch.where(known.to(first.device), head.scale * first / second, unit)
    lengths = torch.linalg.vector_norm(rows, dim=-1)
    unit_rows = rows / lengths.clamp_min(SMALLEST_LENGTH).unsqueeze(-1)
    return (factor * unit_rows).to(weight.dtype).view_as(weight)


def logits_of_both(
    model: nn.Module, layers: Mapping[Any, nn.Module], inputs: Iterable[Any]
) -> tuple[Tensor, Tensor]:
    """Run ``inputs`` through the cosine model and the folded model; return the (N, C) logits.

    Args:
        model: A model with cosine heads.
        layers: The folded layer of each of them.
        inputs: Batches, see :func:`fold_cosine_head`.

    Raises:
        TypeError: the model's output is neither a tensor nor holds ``logits``.
        ValueError: ``inputs`` holds no example, or none with a finite, non-zero logit.
    """
    pairs = []
    with torch.no_grad(), evaluation_mode(model):
        for batch in inputs:
            cosine = _logits(model, batch)
            hooks = [head.register_forward_hook(_output_of(new)) for head, new in layers.items()]
            try:
                pairs.append((cosine, _logits(model, batch)))
            finally:
                for hook in hooks:
                    hook.remove()
    if not pairs:
        raise invalid("inputs", "at least one batch", inputs)
    cosine, linear = (torch.cat(part).float() for part in zip(*pairs, strict=True))
    if not (linear.isfinite().all() and cosine.isfinite().all() and linear.any()):
        finite = bool(linear.isfinite().all() and cosine.isfinite().all())
        found = "zeros alone" if finite else "NaN or infinite logits"
        raise invalid("inputs", "examples with finite logits, not all zero", found, hint=DIVERGED)
    return cosine, linear


def _output_of(layer: nn.Module) -> Any:
    """A forward hook that replaces a head's output by that of ``layer``."""
    return lambda module, args, output: layer(*args)


def _logits(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        output = model(**batch)
    else:
        output = model(batch if isinstance(batch, Tensor) else batch[0])
    logits = output.get("logits") if isinstance(output, Mapping) else output
    if not isinstance(logits, Tensor):
        expected = "batches on which the model gives a tensor or an output with `logits`"
        raise invalid("inputs", expected, type(output).__name__, error=TypeError)
    return logits.flatten(0, -2)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into evaluation mode, and each of its modules back into its own at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def matching_scale(cosine: Tensor, linear: Tensor) -> float:
    """Return the factor f with the smallest mean KL(softmax(cosine) || softmax(f * linear)).

    The divergence is convex in f. Its derivative is the mean logit under the second distribution
    less that under the first; its zero is found by bisection of log(f), from 2^-20 to 2^20.

    Args:
        cosine: (N, C) logits of the cosine model.
        linear: (N, C) logits of the folded model.
    """
    expected = (cosine.softmax(-1) * linear).sum(-1)
    low, high = 1 / _WIDEST_FACTOR, _WIDEST_FACTOR
    while high / low > 1 + 1e-6:
        middle = math.sqrt(low * high)
        slope = ((middle * linear).softmax(-1) * linear).sum(-1) - expected
        low, high = (low, middle) if slope.mean() >= 0 else (middle, high)
    return math.sqrt(low * high)


def mean_over_shards(moments: Tensor, weight: Tensor) -> Tensor:
    """The moments, averaged over the processes where ``weight`` is sharded over them (FSDP2).

    Each process has seen batches of its own, but every shard must be scaled by the same k. All
    processes must call it.
    """
    if not is_sharded(weight):
        return moments
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(weight, DTensor)
    mesh = weight.device_mesh
    local = moments.to(weight.device) / mesh.size()
    return DTensor.from_local(local, mesh, [Partial()] * mesh.ndim).full_tensor()


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
