"""Torch's cross-entropy with a mean of nothing that is 0, and what such a mean divides by."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldam_plugins.kernels.dispatch import can_inspect_values


def cross_entropy(
    logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str
) -> Tensor:
    """``F.cross_entropy``, but the mean of nothing is 0 (torch: nan).

    Args:
        logits: (N, C) in the precision to compute in.
        target: (N,) int64, or soft targets (N, C) in that precision.
        weight: (C,) in that precision, or None for ones.
        ignore_index: Index of the rows that count nowhere; soft targets have none.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
    """
    may_inspect = can_inspect_values(logits, target, weight)
    if target.ndim == 2 and weight is not None and may_inspect and _are_ones(weight):
        weight = None  # torch would multiply (N, C) by it, twice
    options: dict[str, Any] = {} if target.ndim == 2 else {"ignore_index": ignore_index}
    if reduction == "mean" and not may_inspect:
        rows = F.cross_entropy(logits, target, weight, reduction="none", **options)
        return reduce_rows(rows, target, weight, ignore_index, reduction)
    loss = F.cross_entropy(logits, target, weight, reduction=reduction, **options)
    if reduction == "mean" and math.isnan(loss.item()):
        total = F.cross_entropy(logits, target, weight, reduction="sum", **options)
        return _mean(total, target, weight, ignore_index)
    return loss


def _are_ones(weight: Tensor) -> bool:
    """Whether they change nothing, and ask for no gradient."""
    return not weight.requires_grad and bool((weight == 1).all())


def reduce_rows(
    rows: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int, reduction: str
) -> Tensor:
    """Mean or sum (0-d) of the losses of the rows (N,), or the rows as they are.

    The mean divides by ``sum(w_y)`` for indices and by N for soft targets; the mean of nothing
    is 0.
    """
    if reduction == "none":
        return rows
    total = rows.sum()
    return total if reduction == "sum" else _mean(total, target, weight, ignore_index)


def _mean(total: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """The total divided by the denominator of the mean, or by 1 where no row counts."""
    if target.ndim == 2:
        return total / target.new_full((), target.shape[0], dtype=total.dtype).clamp_min(1)
    return total / sum_or_one(row_weights(target, weight, ignore_index, total.dtype))


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


def sum_or_one(weights: Tensor) -> Tensor:
    """Sum of the rows' weights (0-d), whichever its sign; 1 where no row counts."""
    return weights.sum() + (weights == 0).all()
