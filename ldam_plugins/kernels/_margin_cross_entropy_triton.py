# ruff: noqa: ANN001, ANN202
# mypy: allow-untyped-defs
# Triton reads the annotations of a kernel, and knows only its own.
"""Cross-entropy with a margin at the target on a GPU, as one kernel forward and one backward.

On a GPU the definition, ``F.cross_entropy(z - shift * one_hot(y), y)``, is a dozen small kernels,
and their launches take longer than their arithmetic. Here a program a row reads the logits once
forward and once backward, and keeps one number a row.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldam_plugins.kernels.cross_entropy import sum_or_one

LARGEST_BLOCK = 4096
"""Entries of a row that a program holds at a time."""


def margin_cross_entropy(
    logits: Tensor,
    target: Tensor,
    margins: Tensor,
    scale: float,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """See :func:`.margin_cross_entropy.margin_cross_entropy`; class indices, on a GPU."""
    rows, row_weight = rows_and_weights(logits, target, margins, scale, weight, ignore_index)
    if reduction == "none":
        return rows
    total = rows.sum()
    return total / sum_or_one(row_weight) if reduction == "mean" else total


def rows_and_weights(
    logits: Tensor,
    target: Tensor,
    margins: Tensor,
    scale: float,
    weight: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    """``w_y (log sum_c exp z_c - z_y)`` of each row after ``z_y -= scale * margins[y]``, and w_y.

    Rows whose target is ``ignore_index`` or whose weight is 0 have the loss 0, whichever their
    logits are.

    Returns:
        Both (N,), in the dtype of ``margins``; the weights have no gradient.
    """
    if margins.dtype == torch.float64:  # a kernel gets plain numbers in float32
        margins, scale = margins * scale, 1.0
    loss, row_weight, *_ = _MarginCrossEntropy.apply(
        logits, target, margins, weight, scale, ignore_index
    )
    return loss, row_weight


class _MarginCrossEntropy(torch.autograd.Function):
    """Losses and weights of the rows, and both parts of their ``log sum exp`` to be kept."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        margins: Tensor,
        weight: Tensor | None,
        scale: float,
        ignore_index: int,
    ) -> tuple[Tensor, ...]:
        logits = logits.contiguous()
        target, margins = target.contiguous(), margins.contiguous()
        weight = None if weight is None else weight.contiguous()
        rows = [margins.new_empty(len(logits)) for _ in range(4)]
        loss, row_weight, highest, log_total = rows
        if len(logits):
            with torch.cuda.device_of(logits):
                _forward_kernel[(len(logits),)](
                    logits,
                    target,
                    margins,
                    margins if weight is None else weight,
                    loss,
                    row_weight,
                    highest,
                    log_total,
                    logits.shape[1],
                    scale,
                    ignore_index,
                    WEIGHTED=weight is not None,
                    BLOCK=_block(logits.shape[1]),
                )
        ctx.save_for_backward(logits, target, margins, row_weight, highest, log_total)
        ctx.save_for_forward(logits, target, margins, row_weight)
        ctx.scale = scale
        ctx.mark_non_differentiable(row_weight, highest, log_total)
        ctx.set_materialize_grads(False)
        return loss, row_weight, highest, log_total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return (None,) * 6
        logits, target, margins, row_weight, highest, log_total = ctx.saved_tensors
        if torch.is_grad_enabled():
            factor = (gradient * row_weight).unsqueeze(1)
            residual = _residual(logits, target, margins, row_weight, ctx.scale)
            product = torch.where(factor == 0, 0, residual * factor)
            return (product.to(logits.dtype), *(None,) * 5)
        out = torch.empty_like(logits)
        if len(logits):
            with torch.cuda.device_of(logits):
                _backward_kernel[(len(logits),)](
                    logits,
                    target,
                    margins,
                    row_weight,
                    highest,
                    log_total,
                    gradient,
                    gradient.stride(0),
                    out,
                    logits.shape[1],
                    ctx.scale,
                    BLOCK=_block(logits.shape[1]),
                )
        return (out, *(None,) * 5)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        logits, target, margins, row_weight = ctx.saved_tensors
        residual = _residual(logits, target, margins, row_weight, ctx.scale)
        rows = torch.where(row_weight == 0, 0, row_weight * (residual * tangent).sum(1))
        return rows, None, None, None


def _residual(
    logits: Tensor, target: Tensor, margins: Tensor, row_weight: Tensor, scale: float
) -> Tensor:
    """``softmax - one_hot`` of the shifted logits by operations that have derivatives."""
    index = target.masked_fill(row_weight == 0, 0)
    one_hot = torch.zeros_like(logits, dtype=margins.dtype).scatter_(1, index.unsqueeze(1), 1)
    return (logits.to(margins.dtype) - scale * margins * one_hot).softmax(1) - one_hot


@cache
def _block(classes: int) -> int:
    return min(LARGEST_BLOCK, triton.next_power_of_2(classes))


@triton.jit(debug=True)  # the checks of the target are a part of it
def _forward_kernel(
    logits,
    target,
    margins,
    weight,
    loss,
    row_weight,
    highest,
    log_total,
    classes,
    scale,
    ignore_index,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    index = tl.load(target + row)
    counts = index != ignore_index
    tl.device_assert((index >= 0) & (index < classes) | (index == ignore_index), "target class")
    w = tl.load(weight + index, mask=counts, other=0) if WEIGHTED else counts
    w = w.to(loss.dtype.element_ty)
    shift = tl.load(margins + index, mask=counts, other=0) * scale
    places = tl.arange(0, BLOCK)
    top = tl.full((BLOCK,), float("-inf"), loss.dtype.element_ty)
    total = tl.zeros((BLOCK,), loss.dtype.element_ty)
    for first in range(0, classes, BLOCK):
        column = first + places
        z = tl.load(logits + row * classes + column, mask=column < classes, other=float("-inf"))
        z = tl.where(column == index, z.to(top.dtype) - shift, z.to(top.dtype))
        higher = tl.maximum(top, z, propagate_nan=tl.PropagateNan.ALL)
        # Lanes that have met nothing but -inf so far: -inf - -inf would be nan.
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(top - safe) + tl.exp(z - safe)
        top = higher
    best = tl.max(top, 0)
    rest = tl.log(tl.sum(total * tl.exp(top - best), 0))
    own = tl.load(logits + row * classes + index, mask=counts, other=0).to(top.dtype) - shift
    # Not best + rest, which would lose digits of the rest where the logits are large.
    tl.store(highest + row, best)
    tl.store(log_total + row, rest)
    tl.store(row_weight + row, w)
    tl.store(loss + row, tl.where(w == 0, 0.0, w * (best - own + rest)))


@triton.jit
def _backward_kernel(
    logits,
    target,
    margins,
    row_weight,
    highest,
    log_total,
    gradient,
    gradient_stride,
    out,
    classes,
    scale,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    w = tl.load(row_weight + row)
    index = tl.load(target + row)
    shift = tl.load(margins + index, mask=w != 0, other=0) * scale
    factor = w * tl.load(gradient + row * gradient_stride)
    best, rest = tl.load(highest + row), tl.load(log_total + row)
    places = tl.arange(0, BLOCK)
    for first in range(0, classes, BLOCK):
        column = first + places
        inside = column < classes
        z = tl.load(logits + row * classes + column, mask=inside, other=0).to(w.dtype)
        z = tl.where(column == index, z - shift, z)
        residual = tl.exp(z - best - rest) - tl.where(column == index, 1.0, 0.0)
        value = tl.where(w == 0, 0.0, residual * factor)
        tl.store(out + row * classes + column, value.to(out.dtype.element_ty), mask=inside)
