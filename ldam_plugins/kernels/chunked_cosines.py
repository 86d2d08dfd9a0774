"""Cosine logits over very many classes that never exist all at once.

The (N, C) logits of a million classes take a gigabyte for a batch of 256, and so does each of the
handful of tensors that a loss makes of them. Here the loss goes over some classes at a time: the
forward pass keeps one number a row, the backward pass makes the logits anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import register_pytree_node

from ldam_plugins._validation import invalid
from ldam_plugins.kernels.dispatch import can_inspect_values, runs_eagerly, supports_custom_autograd

CHUNK_ELEMENTS = 1 << 22
"""Of the logits, and of the weight rows, at a time: 16 MiB in float32."""
SMALLEST_LENGTH = 1e-12
"""Shorter vectors have no direction: their logits are constants, 0 where the vector is 0."""


def autocasts(device: str) -> bool:
    """Whether autocast is on for this type of device."""
    try:  # not is_autocast_available: compilers before torch 2.12 stop there
        return torch.is_autocast_enabled(device)
    except RuntimeError:  # a device without autocast
        return False


def full_precision(device: str) -> AbstractContextManager[Any]:
    """No autocast, where there is any."""
    return torch.autocast(device, enabled=False) if autocasts(device) else nullcontext()


@dataclass(eq=False)
class ChunkedCosines:
    """The logits ``scale * cos(angle)`` that a chunked cosine head stands for, not yet computed.

    What a head made by ``use_cosine_head(model, chunked=True)`` returns in training mode; the
    losses of :func:`ldam_plugins.create_loss` whose ``takes_chunked_head`` is True take it in
    place of logits.
    Wrappers (DistributedDataParallel, FSDP) find both tensors in it, by which they know when the
    backward pass begins and which parameters take part.

    Attributes:
        features: (N, H).
        weight: (C, H), the class directions, as :func:`followed` gives those of a parameter.
        scale: s.

    Raises:
        TypeError: any function of torch is called with it.
    """

    features: Tensor
    weight: Tensor
    scale: float

    @property
    def shape(self) -> tuple[int, int]:
        """(N, C) of the logits."""
        return self.features.shape[0], self.weight.shape[0]

    @property
    def ndim(self) -> int:
        """2, as of logits."""
        return 2

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the logits: float32 at least."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return torch.promote_types(wide, self.features.dtype)

    @property
    def device(self) -> torch.device:
        """The device of the features."""
        return self.features.device

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> NoReturn:
        hint = (
            "A chunked cosine head has no logits in training mode. Use a loss of create_loss with "
            "`takes_chunked_head`, outside the model (without `labels` for transformers); or "
            "model.eval(), or use_cosine_head(model, chunked=False)."
        )
        name = getattr(func, "__name__", repr(func))
        raise invalid(f"input of {name}", "a tensor", cls.__name__, hint=hint, error=TypeError)

    def cross_entropy(self, target: Tensor, shift: Tensor | None = None) -> Tensor:
        """``F.cross_entropy(z - shift * one_hot(target), target, reduction="none")``, (N,).

        Peak memory, gradients not counted, is a few times ``CHUNK_ELEMENTS``; derivatives of first
        order only. Transforms of torch.func and tensor subclasses (``DTensor``) get the definition,
        with all logits at once and derivatives of every order.

        Args:
            target: (N,) int64 in 0..C-1.
            shift: (C,) what is taken off a target's logit, without gradient; None: nothing.

        Raises:
            IndexError: a target out of range (of plain tensors on a CPU; others are checked by
                the kernels, which need not wait for the values).
            ValueError: FSDP has freed the weight since the forward pass.
        """
        _check_held(self.weight)
        classes = self.shape[1]
        if can_inspect_values(target) and target.numel():
            lowest, highest = (int(value) for value in target.aminmax())
            if not 0 <= lowest <= highest < classes:
                expected = f"class indices in 0..{classes - 1}"
                found = f"indices from {lowest} to {highest}"
                raise invalid("target", expected, found, error=IndexError)
        with full_precision(self.device.type):
            features = self.features.to(self.dtype)
            if shift is None:
                at_target = torch.zeros_like(target, dtype=self.dtype)
            else:
                at_target = shift.to(self.dtype).gather(0, target)
            given = features, self.weight, target, at_target, self.scale
            if supports_custom_autograd(features, self.weight, target):
                rows: Tensor = _ChunkedCrossEntropy.apply(*given)
            else:
                rows = _cross_entropy_by_definition(*given)
        return rows


def cosine_logits(features: Tensor, rows: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``scale`` times the cosines (..., C) of features (..., H) to rows (C, H); features' lengths.

    A zero vector has no direction to learn; its gradient would be of size 1 / norm.
    """
    lengths, row_lengths = _lengths(features), _lengths(rows)
    rates = scale / lengths.clamp_min(SMALLEST_LENGTH).unsqueeze(-1)
    logits = F.linear(features, rows) * rates / row_lengths.clamp_min(SMALLEST_LENGTH)
    directed = (lengths > SMALLEST_LENGTH).unsqueeze(-1) & (row_lengths > SMALLEST_LENGTH)
    return torch.where(directed, logits, logits.detach()), lengths


def _cross_entropy_by_definition(
    features: Tensor, weight: Tensor, target: Tensor, shift: Tensor, scale: float
) -> Tensor:
    logits, _ = cosine_logits(features, weight.to(features.dtype), scale)
    shifted = logits.scatter_add(1, target.unsqueeze(1), -shift.unsqueeze(1))
    return F.cross_entropy(shifted, target, reduction="none")


register_pytree_node(
    ChunkedCosines,
    lambda cosines: ([cosines.features, cosines.weight], cosines.scale),
    lambda tensors, scale: ChunkedCosines(*tensors, scale),  # type: ignore[call-arg]
    serialized_type_name="ldam_plugins.kernels.chunked_cosines.ChunkedCosines",
)


def followed(weight: Tensor) -> Tensor:
    """The same memory as the output of an operation, from which autograd leads back to it."""
    if torch.compiler.is_compiling() or not supports_custom_autograd(weight):
        return weight.view_as(weight)
    alias: Tensor = _Followed.apply(weight)
    return alias


class _Followed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return weight.data  # no view to autograd: FSDP warns of views that a module returns

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def _check_held(weight: Tensor) -> None:
    if runs_eagerly(weight) and weight.numel() and not weight.untyped_storage().size():
        expected = "False under FSDP that frees the head's weight after its forward pass"
        hint = "The loss needs it until the backward pass: shard the module that holds the head"
        hint += " with `reshard_after_forward=False`, or call"
        hint += " use_cosine_head(model, chunked=False)."
        raise invalid("chunked", expected, True, hint=hint)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, target: Tensor, shift: Tensor, scale: float
    ) -> Tensor:
        rates = scale / _lengths(features).clamp_min(SMALLEST_LENGTH)
        scaled = features * rates.unsqueeze(1)
        top = features.new_full((len(features),), -torch.inf)
        total, at_target = torch.zeros_like(top), torch.zeros_like(top)
        for chunk in _chunks(scaled, weight):
            logits, _, _ = _logits(scaled, weight[chunk])
            index, inside = _shift_(logits, target, shift, chunk)
            at_target = torch.where(inside, logits.gather(1, index).squeeze(1), at_target)
            higher = torch.maximum(top, logits.amax(1))
            total *= (top - higher).exp_()
            total += logits.sub_(higher.unsqueeze(1)).exp_().sum(1)
            top = higher
        ctx.save_for_backward(features, weight, target, shift, rates, top, total)
        return (top - at_target) + total.log()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with full_precision(gradient.device.type):
            of_features, of_weight = _gradients(
                ctx.needs_input_grad[1], gradient, *ctx.saved_tensors
            )
        return of_features, of_weight, None, None, None


def _gradients(
    trains_weight: bool,
    gradient: Tensor,
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    shift: Tensor,
    rates: Tensor,
    top: Tensor,
    total: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the features and of the weight."""
    scaled = features * rates.unsqueeze(1)
    gradient = torch.where(_lengths(features) > SMALLEST_LENGTH, gradient, 0)
    of_scaled = torch.zeros_like(features)
    of_weight = torch.empty_like(weight) if trains_weight else None
    for chunk in _chunks(scaled, weight):
        logits, rows, lengths = _logits(scaled, weight[chunk])
        cosines = logits.clone()
        index, inside = _shift_(logits, target, shift, chunk)
        slope = logits.sub_(top.unsqueeze(1)).exp_()
        slope *= (gradient / total).unsqueeze(1)
        slope.scatter_add_(1, index, torch.where(inside, -gradient, 0).unsqueeze(1))
        # The length of a row takes no part, so the gradient has no component along the row.
        along = cosines.mul_(slope).sum(0) / lengths
        slope *= torch.where(lengths > SMALLEST_LENGTH, 1 / lengths, 0)
        of_scaled.addmm_(slope, rows)
        if of_weight is not None:
            part = torch.mm(slope.t(), scaled)
            along = torch.where(lengths > SMALLEST_LENGTH, along / lengths, 0)
            of_weight[chunk] = part.addcmul_(rows, along.unsqueeze(1), value=-1)
    return _through_length(of_scaled, scaled, rates), of_weight


def _through_length(of_scaled: Tensor, scaled: Tensor, rates: Tensor) -> Tensor:
    """Gradient of the features from that of their multiples of one length."""
    squared = scaled.square().sum(1, keepdim=True)
    along = (of_scaled * scaled).sum(1, keepdim=True) / squared.clamp_min(SMALLEST_LENGTH)
    return (of_scaled - along * scaled) * rates.unsqueeze(1)


def _chunks(features: Tensor, weight: Tensor) -> Iterator[slice]:
    size = max(1, CHUNK_ELEMENTS // max(1, *features.shape))
    return (slice(start, start + size) for start in range(0, len(weight), size))


def _logits(scaled: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (N, c) of some classes, their weight rows (c, H) and the lengths of those (c,)."""
    rows = weight.to(scaled.dtype)
    lengths = _lengths(rows).clamp_min(SMALLEST_LENGTH)
    return torch.mm(scaled, rows.t()).div_(lengths), rows, lengths


def _shift_(logits: Tensor, target: Tensor, shift: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
    """Take the shift off those targets that are in the chunk: their columns, and which are."""
    place = target - chunk.start
    inside = (place >= 0) & (place < logits.shape[1])
    index = place.clamp(0, logits.shape[1] - 1).unsqueeze(1)
    logits.scatter_add_(1, index, torch.where(inside, -shift, 0).unsqueeze(1))
    return index, inside


def _lengths(vectors: Tensor) -> Tensor:
    return torch.linalg.vector_norm(vectors, dim=-1)
