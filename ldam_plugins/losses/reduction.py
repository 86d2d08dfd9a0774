"""What the losses of this package share: checks, precision, weights, means."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldam_plugins._validation import check_choice, check_logits, check_target, invalid
from ldam_plugins.kernels.chunked_cosines import ChunkedCosines
from ldam_plugins.kernels.dispatch import beside, can_inspect_values

REDUCTIONS = ("mean", "sum", "none")


def mean_denominator(target: Tensor, weight: Tensor | None, ignore_index: int = -100) -> Tensor:
    """What ``reduction="mean"`` divides by: ``sum(w_y)`` for indices, N for masses (0-d).

    Sums over the parts of a batch to the denominator of the whole, so dividing the parts'
    ``reduction="sum"`` losses by it gives one update however the batch is cut.
    """
    dtype = wide_default()
    if target.ndim == 2:
        return target.new_full((), target.shape[0], dtype=dtype)
    if weight is not None:
        weight = beside(weight, target)
        weight = weight.to(widened(weight.dtype))
    return row_weights(target, weight, ignore_index, dtype).sum()


def wide_default() -> torch.dtype:
    """Torch's default dtype, or float32 where that has 16 bits: 257 rows would be 256."""
    return widened(torch.get_default_dtype())


def checked_target(logits: Tensor, target: Tensor, reduction: str) -> Tensor:
    """The target, after checks of what all losses are given; see the functional module."""
    check_choice("reduction", reduction, REDUCTIONS)
    check_logits(logits)
    check_target(target, logits)
    return beside(target, logits)


def prepare(
    logits: Tensor, target: Tensor, weight: Tensor | None, reduction: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Checked arguments in the precision the loss is computed in."""
    target = checked_target(logits, target, reduction)
    logits = logits.to(widened(logits.dtype))
    if target.ndim == 2:
        target = target.to(logits.dtype)
    return logits, target, None if weight is None else per_class("weight", weight, logits)


def widened(dtype: torch.dtype) -> torch.dtype:
    """The precision a loss of such logits is computed in: that of the logits, or float32."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def per_class(name: str, values: Tensor, logits: Tensor | ChunkedCosines) -> Tensor:
    """Values (C,) on the device of the logits, in the precision the loss is computed in."""
    if values.shape != logits.shape[1:]:
        expected = f"of shape ({logits.shape[1]},), one value per logit"
        raise invalid(name, expected, tuple(values.shape))
    return beside(values, logits).to(device=logits.device, dtype=widened(logits.dtype))


def row_weights(
    target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    """Weight of each row (N,): that of its class, or 0 where it is ignored."""
    return index_and_weight(target, weight, ignore_index, dtype)[1]


def index_and_weight(
    target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Class of each row (N,), 0 where it is ignored, and its weight (N,), 0 there too."""
    ignored = target == ignore_index
    any_ignored = not can_inspect_values(target, weight) or bool(ignored.any())
    index = target.masked_fill(ignored, 0) if any_ignored else target
    if weight is None:
        return index, (~ignored).to(dtype)
    rows = weight.gather(0, index)
    return index, rows.masked_fill(ignored, 0) if any_ignored else rows


def at_target(values: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The entries (N,) of ``values`` (N, C) at the target, of rows that are ignored at 0."""
    index = target.masked_fill(target == ignore_index, 0)
    return values.gather(1, index.unsqueeze(1)).squeeze(1)


def weigh(terms: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """Loss of each row (N,) from its terms: (N,) at the target, or (N, C) for masses."""
    if target.ndim == 2:
        return (terms * target * (1 if weight is None else weight)).sum(dim=1)
    ignored = target == ignore_index
    if weight is not None:
        terms = terms * weight.gather(0, target.masked_fill(ignored, 0))
    return terms.masked_fill(ignored, 0)


def torch_cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str
) -> Tensor:
    """Torch's, but for the mean of nothing, which is 0."""
    may_read = can_inspect_values(logits, target, weight)
    if target.ndim == 2 and weight is not None and may_read and _are_ones(weight):
        weight = None  # torch would multiply (N, C) by it, twice
    options: dict[str, Any] = {} if target.ndim == 2 else {"ignore_index": ignore_index}
    if reduction == "mean" and not may_read:
        rows = F.cross_entropy(logits, target, weight, reduction="none", **options)
        return reduce_rows(rows, target, weight, ignore_index, reduction)
    loss = F.cross_entropy(logits, target, weight, reduction=reduction, **options)
    if reduction == "mean" and math.isnan(loss.item()):
        total = F.cross_entropy(logits, target, weight, reduction="sum", **options)
        return total / _divisor(target, weight, ignore_index, total.dtype)
    return loss


def _are_ones(weight: Tensor) -> bool:
    """Whether they change nothing, and ask for no gradient."""
    return not weight.requires_grad and bool((weight == 1).all())


def reduce_rows(
    rows: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str
) -> Tensor:
    """Sum or mean of the rows' losses (N,), or the rows as they are."""
    if reduction == "none":
        return rows
    total = rows.sum()
    if reduction == "sum":
        return total
    return total / _divisor(target, weight, ignore_index, total.dtype)


def _divisor(
    target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> Tensor:
    """The denominator of the mean, 1 where there is nothing."""
    if target.ndim == 2:
        return mean_denominator(target, None).to(dtype).clamp_min(1)
    return sum_or_one(row_weights(target, weight, ignore_index, dtype))


def sum_or_one(weights: Tensor) -> Tensor:
    """Sum of the rows' weights, whatever its sign; 1 where none of them counts (0-d)."""
    return weights.sum() + (weights == 0).all()
