"""Cross-entropy with a margin at the target entry, in one pass forward and one backward.

The definition, ``F.cross_entropy(z - shift * one_hot(y), y)``, reads and writes an (N, C) tensor
more than plain cross-entropy does. Here what is kept for the backward pass is the gradient but for
one factor a row, so it takes less time and memory than ``F.cross_entropy`` of the bare logits.
Only for CPUs and for tensors whose values can be read: compilers fuse the definition themselves.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_ELEMENTS = 1 << 18
"""Done at a time: 1 MiB in float32, to stay in the cache of a core."""
FEWEST_ELEMENTS = 1 << 18
"""Below, the definition is faster: it takes fewer calls."""


def margin_cross_entropy(
    logits: Tensor, index: Tensor, shift: Tensor, coefficient: Tensor
) -> Tensor:
    """``sum(coefficient * cross_entropy(z - shift * one_hot(index), index))``, 0-d.

    Args:
        logits: (N, C) floating, on the CPU.
        index: (N, 1) int64 in 0..C-1.
        shift: (N, 1) what is taken off the target entry, in the dtype the loss is computed in.
        coefficient: (N,) in that dtype; where it is 0 the row is 0, whatever its logits are.
    """
    loss: Tensor = _MarginCrossEntropy.apply(logits, index, shift, coefficient)[0]
    return loss


class _MarginCrossEntropy(torch.autograd.Function):
    """The loss, and ``softmax(shifted z) - one_hot`` in the dtype of the logits.

    The second output is there to be kept: as an output it has a derivative of its own, which
    makes the backward pass differentiable without the logits.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, index: Tensor, shift: Tensor, coefficient: Tensor
    ) -> tuple[Tensor, Tensor]:
        residual = torch.empty_like(logits, memory_format=torch.contiguous_format)
        probability = _softmax_into(residual, logits, index, shift)
        rows = _row_losses(probability, logits, index, shift)
        residual.scatter_(1, index, (probability - 1).to(residual.dtype))
        ctx.save_for_backward(residual, index, coefficient)
        ctx.save_for_forward(residual, index, coefficient)
        ctx.set_materialize_grads(False)
        return (rows * coefficient).masked_fill_(coefficient == 0, 0).sum(), residual

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


def _row_chunks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    size = max(1, CHUNK_ELEMENTS // tensors[0].shape[1])
    if len(tensors[0]) <= size:
        return (tensors,)
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _softmax_into(out: Tensor, logits: Tensor, index: Tensor, shift: Tensor) -> Tensor:
    """Write the softmax of the shifted logits into ``out``; return that of the target (N, 1)."""
    rows = max(1, CHUNK_ELEMENTS // logits.shape[1])
    same = out.dtype == shift.dtype
    scratch = shift.new_empty(() if same else (min(rows, len(logits)), logits.shape[1]))
    probabilities = []
    for z, i, d, softmax in _row_chunks(logits, index, -shift, out):
        wide = softmax if same else scratch[: len(z)]
        wide.copy_(z).scatter_add_(1, i, d)
        torch.softmax(wide, 1, out=wide)
        probabilities.append(wide.gather(1, i))
        if not same:
            softmax.copy_(wide)
    return probabilities[0] if len(probabilities) == 1 else torch.cat(probabilities)


def _row_losses(probability: Tensor, logits: Tensor, index: Tensor, shift: Tensor) -> Tensor:
    """``-log(probability)`` (N,); one that underflows has lost its digits and is made anew."""
    smallest = 2**20 * torch.finfo(shift.dtype).tiny
    rows = probability.squeeze(1).log().neg_()
    if probability.min().item() < smallest:
        lost = probability.squeeze(1) < smallest
        shifted = logits[lost].to(shift.dtype).scatter_add_(1, index[lost], -shift[lost])
        rows[lost] = F.cross_entropy(shifted, index[lost, 0], reduction="none")
    return rows


def _scaled(residual: Tensor, factors: Tensor) -> Tensor:
    """``residual * factors``, rounded once."""
    if residual.dtype == factors.dtype:
        return residual * factors
    if torch.is_grad_enabled():
        return (residual * factors).to(residual.dtype)
    out = torch.empty_like(residual)
    for part, factor, place in _row_chunks(residual, factors, out):
        place.copy_(part * factor)
    return out


def _softmax_product(residual: Tensor, index: Tensor, vector: Tensor) -> Tensor:
    """Derivative of the softmax times ``vector``."""
    softmax = residual.scatter_add(1, index, torch.ones_like(index, dtype=residual.dtype))
    product = softmax * vector
    return product - softmax * product.sum(1, keepdim=True)
