"""What all losses share: the checks of a batch, the weights of its rows, and its mean."""

from __future__ import annotations

from typing import NamedTuple, TypedDict, Unpack

import torch
from torch import Tensor

from ldam_plugins._tensor_checks import check_logits, check_target
from ldam_plugins._validation import check_choice, invalid
from ldam_plugins.kernels.chunked_cosines import ChunkedCosines
from ldam_plugins.kernels.cross_entropy import cross_entropy, reduce_rows, row_weights
from ldam_plugins.kernels.dispatch import match_tensor_kind

REDUCTIONS = ("mean", "sum", "none")


class CommonOptions(TypedDict, total=False):
    """Keywords that all losses of this package take as functions.

    Attributes:
        weight: (C,) factors of the terms of each class. Default: None, ones.
        ignore_index: Index of the rows that count nowhere. Default: -100.
        reduction: ``"mean"`` (the default), ``"sum"`` or ``"none"``. The mean is torch's: for
            class indices ``sum(w_y l) / sum(w_y)``, for soft targets ``sum(l) / N``, and the mean
            of nothing is 0 (torch: nan).
    """

    weight: Tensor | None
    ignore_index: int
    reduction: str


class Batch(NamedTuple):
    """A batch whose arguments are checked, and how its loss is weighted and averaged."""

    logits: Tensor
    target: Tensor
    weight: Tensor | None
    ignore_index: int
    reduction: str

    def at_target(self, values: Tensor) -> Tensor:
        """Entries (N,) of ``values`` (N, C) at class indices; all of them for soft targets."""
        if self.target.ndim == 2:
            return values
        index = self.target.masked_fill(self.target == self.ignore_index, 0)
        return values.gather(1, index.unsqueeze(1)).squeeze(1)

    def per_class(self, name: str, values: Tensor) -> Tensor:
        """Values (C,) of the argument ``name``, as :func:`per_class` makes them."""
        return per_class(name, values, self.logits)

    def reduce(self, terms: Tensor) -> Tensor:
        """The loss from terms: (N,) ``l_y`` at class indices, or (N, C) ``l_c`` for soft targets.

        The loss of a row is ``w_y l_y`` for class indices and ``sum_c w_c q_c l_c`` for soft
        targets q.
        """
        _, target, weight, ignore_index, reduction = self
        if target.ndim == 2:
            rows = (terms * target * (1 if weight is None else weight)).sum(dim=1)
        else:
            ignored = target == ignore_index
            if weight is not None:
                terms = terms * weight.gather(0, target.masked_fill(ignored, 0))
            rows = terms.masked_fill(ignored, 0)
        return reduce_rows(rows, target, weight, ignore_index, reduction)

    def cross_entropy(self, logits: Tensor) -> Tensor:
        """Cross-entropy of other logits (N, C), such as adjusted ones."""
        return cross_entropy(logits, *self[1:])


def check_batch(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Batch:
    """The batch of a loss, after checks; the logits keep their dtype.

    Args:
        logits: (N, C) floating, as the head gives them: those of a cosine head hold its scale.
        target: Class indices (N,) int64, or soft targets (N, C) floating (mixup, cutmix, label
            smoothing), which need not sum to 1.
        weight: See :class:`CommonOptions`, as the others.
        ignore_index: Likewise.
        reduction: Likewise.

    Raises:
        TypeError: ``logits`` or ``target`` of a wrong dtype.
        ValueError: shapes that do not fit, or an unknown reduction.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    check_logits(logits)
    check_target(target, logits)
    target = match_tensor_kind(target, logits)
    if target.ndim == 2:
        target = target.to(widened(logits.dtype))
    weight = None if weight is None else per_class("weight", weight, logits)
    return Batch(logits, target, weight, ignore_index, reduction)


def prepare(logits: Tensor, target: Tensor, **common: Unpack[CommonOptions]) -> Batch:
    """As :func:`check_batch`, with the logits in the precision the loss is computed in."""
    batch = check_batch(logits, target, **common)
    return Batch(logits.to(widened(logits.dtype)), *batch[1:])


def per_class(name: str, values: Tensor, logits: Tensor | ChunkedCosines) -> Tensor:
    """Values (C,) on the device of the logits, in the precision the loss is computed in."""
    if values.shape != logits.shape[1:]:
        expected = f"of shape ({logits.shape[1]},), one value per logit"
        raise invalid(name, expected, tuple(values.shape))
    values = match_tensor_kind(values, logits)
    return values.to(device=logits.device, dtype=widened(logits.dtype))


def mean_denominator(target: Tensor, weight: Tensor | None, ignore_index: int = -100) -> Tensor:
    """What the mean divides by: ``sum(w_y)`` for class indices, N for soft targets (0-d).

    The denominators of the parts of a batch add up to that of the whole. So dividing the parts'
    ``reduction="sum"`` losses by it gives one update however the batch is cut.
    """
    dtype = wide_default()
    if target.ndim == 2:
        return target.new_full((), target.shape[0], dtype=dtype)
    if weight is not None:
        weight = match_tensor_kind(weight, target)
        weight = weight.to(widened(weight.dtype))
    return row_weights(target, weight, ignore_index, dtype).sum()


def wide_default() -> torch.dtype:
    """Torch's default dtype, or float32 where that has 16 bits: 257 rows would be 256."""
    return widened(torch.get_default_dtype())


def widened(dtype: torch.dtype) -> torch.dtype:
    """The precision a loss of such logits is computed in: that of the logits, float32 at least."""
    return torch.float32 if dtype.itemsize < 4 else dtype
