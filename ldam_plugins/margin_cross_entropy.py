"""Cross-entropy with a margin at the target entry, in one pass forward and one backward.

The definition, ``F.cross_entropy(z - shift * one_hot(y), y)``, reads and writes an (N, C) tensor
more than plain cross-entropy does. Here what is kept for the backward pass is the gradient but for
one factor a row, so it takes less time and memory than ``F.cross_entropy`` of the bare logits.
Only for CPUs and for tensors whose values can be read: compilers fuse the definition themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 1 << 18
"""Done at a time: 1 MiB in float32, to stay in the cache of a core."""
FEWEST_ELEMENTS = 3 << 16
"""Below, the definition is faster: it takes fewer calls."""


def margin_cross_entropy(
    logits: Tensor, index: Tensor, addend: Tensor, coefficient: Tensor
) -> Tensor:
    """``sum(coefficient * cross_entropy(z + addend * one_hot(index), index))``, 0-d.

    Args:
        logits: (N, C) floating, on the CPU.
        index: (N, 1) int64 in 0..C-1.
        addend: (N, 1) what is added to the target entry, in the dtype the loss is computed in.
        coefficient: (N,) in that dtype; where it is 0 the row is 0, whatever its logits are.
    """
    loss: Tensor = _MarginCrossEntropy.apply(logits, index, addend, coefficient)[0]
    return loss


class _MarginCrossEntropy(torch.autograd.Function):
    """The loss, and ``softmax(shifted z) - one_hot`` in the dtype of the logits.

    The second output is there to be kept: as an output it has a derivative of its own, which
    makes the backward pass differentiable without the logits.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, index: Tensor, addend: Tensor, coefficient: Tensor
    ) -> tuple[Tensor, Tensor]:
        residual = torch.empty_like(logits, memory_format=torch.contiguous_format)
        probability = _residual_into(residual, logits, index, addend)
        loss = _loss(probability, logits, index, addend, coefficient)
        ctx.save_for_backward(residual, index, coefficient)
        ctx.save_for_forward(residual, index, coefficient)
        ctx.set_materialize_grads(False)
        return loss, residual

    @staticmethod
    def backward(
        ctx: Any, loss_gradient: Tensor | None, residual_gradient: Tensor | None
    ) -> tuple[Tensor | None, None, None, None]:
        residual, index, coefficient = ctx.saved_tensors
        gradient = None
        if loss_gradient is not None:
            gradient = _scaled(residual, (loss_gradient * coefficient).unsqueeze(1))
        if residual_gradient is not None:
            through = _softmax_product(residual, index, residual_gradient)
            gradient = through if gradient is None else gradient + through
        return gradient, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor, Tensor]:
        residual, index, coefficient = ctx.saved_tensors
        loss = (coefficient.unsqueeze(1) * residual * tangent).sum()
        return loss, _softmax_product(residual, index, tangent)


def _rows_at_once(logits: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // logits.shape[1])


def _row_chunks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    size = _rows_at_once(tensors[0])
    if len(tensors[0]) <= size:
        return (tensors,)
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _scratch(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Room for a chunk of rows in another precision."""
    rows = min(_rows_at_once(like), len(like))
    return torch.empty((rows, like.shape[1]), dtype=dtype)


def _residual_into(out: Tensor, logits: Tensor, index: Tensor, addend: Tensor) -> Tensor:
    """Write ``softmax - one_hot`` of the shifted logits; return the target's softmax (N, 1)."""
    same = out.dtype == addend.dtype
    scratch = out if same else _scratch(logits, addend.dtype)
    minus_one = torch.full_like(addend, -1)
    probabilities = []
    for z, i, d, one, residual in _row_chunks(logits, index, addend, minus_one, out):
        wide = residual if same else scratch[: len(z)]
        torch.softmax(wide.copy_(z).scatter_add_(1, i, d), 1, out=wide)
        probabilities.append(wide.gather(1, i))
        wide.scatter_add_(1, i, one)
        if not same:
            residual.copy_(wide)
    return probabilities[0] if len(probabilities) == 1 else torch.cat(probabilities)


def _loss(
    probability: Tensor, logits: Tensor, index: Tensor, addend: Tensor, coefficient: Tensor
) -> Tensor:
    """``-sum(coefficient * log(probability))``."""
    log_p = probability.squeeze(1).log()
    smallest = 2**20 * torch.finfo(log_p.dtype).tiny
    if not probability.min().item() >= smallest:  # underflow loses digits, and there may be nan
        lost = ~(probability.squeeze(1) >= smallest)
        shifted = logits[lost].to(log_p.dtype).scatter_add_(1, index[lost], addend[lost])
        log_p[lost] = -F.cross_entropy(shifted, index[lost, 0], reduction="none")
    loss = (log_p * coefficient).sum().neg_()
    if not math.isfinite(loss.item()):
        return (log_p * coefficient).masked_fill_(coefficient == 0, 0).sum().neg_()
    return loss


def _scaled(residual: Tensor, factors: Tensor) -> Tensor:
    """``residual * factors``, rounded once."""
    if residual.dtype == factors.dtype:
        return residual * factors
    if torch.is_grad_enabled():
        return (residual * factors).to(residual.dtype)
    out = torch.empty_like(residual)
    scratch = _scratch(residual, factors.dtype)  # torch is slow where the two dtypes differ
    for part, factor, place in _row_chunks(residual, factors, out):
        place.copy_(scratch[: len(part)].copy_(part).mul_(factor))
    return out


def _softmax_product(residual: Tensor, index: Tensor, vector: Tensor) -> Tensor:
    """Derivative of the softmax times ``vector``."""
    softmax = residual.scatter_add(1, index, torch.ones_like(index, dtype=residual.dtype))
    product = softmax * vector
    return product - softmax * product.sum(1, keepdim=True)
