"""The cosine layers, linear and 1x1 convolution, and the cosine heads that a model has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldam_plugins._validation import check_real, invalid
from ldam_plugins.choices import DEFAULT_SCALE
from ldam_plugins.kernels.chunked_cosines import (
    ChunkedCosines,
    autocasts,
    cosine_logits,
    followed,
    full_precision,
)

_MOMENT_RATE = 0.01
"""Weight of a new batch in the running means: they reach back over about 100 batches."""
_ROUNDING = 1.001


class CosineHead(nn.Module):
    """What both cosine layers share. Each also inherits from the torch layer that it replaces."""

    weight: Tensor
    cosine_moments: Tensor
    scale: float
    folded_bias: bool

    @property
    def cosine_weight(self) -> Tensor:
        """The weight, under the name that its exact copy has in a folded state dict.

        torch gathers the state dict of a sharded model by looking up every name on the module.
        """
        return self.weight

    def reset_parameters(self) -> None:
        """Draw class directions as the paper does: uniform in a cube, then of unit length."""
        weight = self.weight
        with torch.no_grad():
            rows = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
            weight.copy_(F.normalize(rows.uniform_(-1, 1).flatten(1)).view_as(weight))
        moments = torch.zeros(2, dtype=torch.float32, device=weight.device)
        self.register_buffer("cosine_moments", moments)

    def extra_repr(self) -> str:
        """Show the scale after what the replaced layer shows."""
        return f"{super().extra_repr()}, scale={self.scale:g}"

    def _cosines(self, features: Tensor) -> Tensor:
        """Return ``scale`` times the cosines, (..., C), of features (..., H) to the weight rows."""
        device = features.device.type
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        wide = torch.promote_types(wide, features.dtype)
        narrow = wide if autocasts(device) else features.dtype
        with full_precision(device):
            vectors, rows = features.to(wide), self.weight.flatten(1).to(wide)
            logits, lengths = cosine_logits(vectors, rows, self.scale)
        if self.training and lengths.numel():
            self._observe(lengths)
        return logits.to(narrow)

    @torch.no_grad()
    def _observe(self, lengths: Tensor) -> None:
        """Update the running means of the features' length and squared length.

        Nothing is recorded under the transforms of torch.func, which allow no side effects.
        """
        if torch._C._are_functorch_transforms_active():
            return
        moments = self.cosine_moments
        # transformers leaves a buffer uninitialised if the checkpoint lacks it: start from 0 then.
        kept = torch.where(plausible_moments(moments), moments, 0.0)
        seen = torch.stack((lengths.mean(), lengths.square().mean())).to(kept.dtype)
        seen = torch.where(seen.isfinite().all(), seen, kept)
        # torch.jit.trace ignores no_grad; without detach the buffer would keep the graph alive.
        moments.copy_(kept.lerp(seen, _MOMENT_RATE).detach())

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move and cast as torch does, but keep the moments in float32.

        In half precision the small steps of the running means would be rounded away.
        """
        moments = self.cosine_moments
        super()._apply(fn, recurse)
        if self.cosine_moments.dtype != torch.float32:
            self.cosine_moments = moments.to(self.cosine_moments.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load a state dict of this layer or one by `folded_state_dict`.

        The moments may be missing: they are 0 (unknown) then. A sharded layer that is loaded from
        whole tensors takes the folded weight, which has the same directions: torch distributes
        only the tensors whose names it knows, so the exact weight stays on one process.
        """
        entries = dict(state_dict)
        weight, moments = f"{prefix}weight", f"{prefix}cosine_moments"
        exact = entries.pop(f"{prefix}cosine_weight", None)
        if exact is None or (is_sharded(self.weight) and not is_sharded(exact)):
            exact = entries.get(weight)
        if exact is not None:
            entries[weight] = exact
            entries.setdefault(moments, torch.zeros(2, device=exact.device))
        bias = entries.pop(f"{prefix}bias", None)
        if bias is not None and bool(bias.any()):
            error_msgs.append(
                f"`{prefix}bias` must be zero for a cosine head, which has no bias: the checkpoint"
                f" holds an ordinary layer. Load it first, then call use_cosine_head(model,"
                f" init='keep') to start from its class directions."
            )
        entries.setdefault(moments, self.cosine_moments)
        super()._load_from_state_dict(
            entries, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


class CosineLinear(CosineHead, nn.Linear):
    """``z[c] = scale * cos(angle(x, w[c]))``: a linear layer on unit vectors, without bias.

    Norms and products are computed in float32 at least, under autocast too. The logits are float32
    under autocast and otherwise have the dtype of the features. A zero feature vector or a zero
    weight row gives logits of 0 and no gradient.

    In training the buffer ``cosine_moments`` keeps running means of the features' norm and squared
    norm over about the last 100 batches: they set the scale of the folded layer. Both start at 0
    and only their ratio is used, so one batch is enough.

    Args:
        in_features: H, size of the last dimension of the input (..., H).
        out_features: C, size of the last dimension of the output (..., C).
        scale: s; the logits lie in [-s, s].
        folded_bias: Whether the ordinary layer it folds into has a (zero) bias.
        chunked: In training mode return :class:`.ChunkedCosines` instead of logits, for very many
            classes.
        device: As in ``nn.Linear``.
        dtype: As in ``nn.Linear``.

    The class directions start uniform in a cube and of unit length. Source: Cao et al., 2019,
    arXiv 1906.07413, section 3.2.

    Example:
        >>> head = CosineLinear(8, 3, scale=30.0)
        >>> bool(head(torch.randn(5, 8)).abs().max() <= 30.001)
        True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        scale: float = DEFAULT_SCALE,
        *,
        folded_bias: bool = True,
        chunked: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=False, device=device, dtype=dtype)
        self.scale = check_real("scale", scale, low=0.0, low_open=True)
        self.folded_bias = folded_bias
        self.chunked = chunked

    def forward(self, input: Tensor) -> Any:
        """Return the logits (..., C) of the features ``input`` (..., H).

        Raises:
            ValueError: the head is chunked and in training mode, and ``input`` is not (N, H) or
                the weight is sharded (tensor parallel).
        """
        if not (self.chunked and self.training):
            return self._cosines(input)
        if hasattr(self.weight, "ds_id"):  # partitioned again before the loss needs it
            raise invalid("chunked", "False under DeepSpeed's ZeRO-3", True)
        if input.ndim != 2:
            expected = "of shape (N, H) for a chunked head"
            raise invalid("input", expected, tuple(input.shape))
        if is_sharded(self.weight):
            raise invalid("chunked", "False where the head's weight is sharded", True)
        cosines = ChunkedCosines(input, followed(self.weight), self.scale)
        if len(input):
            self._observe(torch.linalg.vector_norm(input.to(cosines.dtype), dim=-1))
        return cosines

    def extra_repr(self) -> str:
        """Show whether the head is chunked."""
        return f"{super().extra_repr()}{', chunked=True' if self.chunked else ''}"


class CosineConv2d(CosineHead, nn.Conv2d):
    """`CosineLinear` at every position of a map: (N, H, h, w) features to (N, C, h, w) logits."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        scale: float = DEFAULT_SCALE,
        *,
        folded_bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, 1, bias=False, device=device, dtype=dtype)
        self.scale = check_real("scale", scale, low=0.0, low_open=True)
        self.folded_bias = folded_bias

    def forward(self, input: Tensor) -> Tensor:
        """Return the logits (..., C, h, w) of the features ``input`` (..., H, h, w)."""
        return self._cosines(input.movedim(-3, -1)).movedim(-1, -3)


Cosine = CosineLinear | CosineConv2d


def cosine_heads(model: nn.Module) -> dict[str, Cosine]:
    """Return the cosine heads of ``model`` by dotted name; empty if there are none.

    Raises:
        TypeError: ``model`` is not a module.
    """
    if not isinstance(model, nn.Module):
        raise invalid("model", "a torch.nn.Module", type(model).__name__, error=TypeError)
    modules = model.named_modules()
    return {name: part for name, part in modules if isinstance(part, (CosineLinear, CosineConv2d))}


def cosine_layer(layer: nn.Linear | nn.Conv2d, scale: float, *, keep: bool) -> Cosine:
    """Build the cosine layer that takes the place of ``layer``, with its rows if ``keep``."""
    weight = layer.weight
    kind = CosineConv2d if isinstance(layer, nn.Conv2d) else CosineLinear
    outputs, inputs = weight.shape[:2]
    bias = layer.bias is not None
    new = kind(inputs, outputs, scale, folded_bias=bias, device=weight.device, dtype=weight.dtype)
    if keep:  # a zero row would get no gradient, so it takes a random direction
        old, drawn = weight.data.flatten(1), new.weight.data.flatten(1)
        rows = torch.where(old.any(dim=1, keepdim=True), old, drawn)
        new.weight.data.copy_(rows.view_as(weight))
    new.weight.requires_grad_(weight.requires_grad)
    return new.train(layer.training)


def layer_sizes(layer: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    """Number of features H and of outputs C, as the layer was built.

    The shape of its weight may say less, where a wrapper keeps a part of it only.
    """
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    return layer.in_features, layer.out_features


def submodule_or_none(model: nn.Module, name: str) -> nn.Module | None:
    """The submodule of ``model`` with this dotted name (``""``: itself), None if there is none."""
    part: Any = model
    for step in name.split(".") if name else ():
        part = getattr(part, step, None)
    return part


def replace_layers(model: nn.Module, layers: Mapping[Any, nn.Module]) -> nn.Module:
    """Put each new layer wherever the old one is registered.

    Returns:
        ``model``; if ``model`` itself is replaced, its new layer.
    """
    if model in layers:
        return layers[model]
    places = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if m in layers]
    for name, old in places:
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, layers[old])
    return model


def check_unpartitioned(name: str, layer: nn.Linear | nn.Conv2d, weight: Tensor) -> None:
    """Check that ``weight``, the layer's own or a gathered one, has every row and column.

    Between two uses DeepSpeed's ZeRO-3 leaves an empty tensor in place of a weight, FSDP1 a part of
    a flat tensor, and a loader of tensor-parallel models some of the rows.

    Raises:
        ValueError: some are missing.
    """
    inputs, outputs = layer_sizes(layer)
    whole = (outputs, inputs, 1, 1) if isinstance(layer, nn.Conv2d) else (outputs, inputs)
    if tuple(weight.shape) != whole:
        expected = f"one whose head {name!r} has its whole weight, {whole}, on every process"
        hint = "It is partitioned, as by DeepSpeed's ZeRO-3: use ZeRO-2 or FSDP2, put the head"
        hint += " on before the model is partitioned, and save what is gathered:"
        hint += " folded_state_dict(model, accelerator.get_state_dict(model))."
        raise invalid("model", expected, tuple(weight.shape), hint=hint)


def is_sharded(weight: Tensor) -> bool:
    """Whether ``weight`` is a DTensor (asked by an attribute, as importing the class is slow)."""
    return hasattr(weight, "device_mesh")


def plausible_moments(moments: Tensor) -> Tensor:
    """Whether the two can be a mean of lengths and of their squares: ``(E|x|)^2 <= E|x|^2``."""
    first, second = moments.unbind()
    return second.isfinite() & (first.square() <= second * _ROUNDING)
