"""Cross-entropy with margins on a CPU, in one pass forward and at most one backward.

The definition reads and writes an (N, C) tensor more than plain cross-entropy does. Here the
forward pass computes the gradient too and keeps it, which takes less time and memory than
``F.cross_entropy`` of the bare logits. Only for tensors whose values can be read: compilers fuse
the definition themselves. Not for float16, where a gradient may be too small to be kept before the
scale of the loss is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldam_plugins.kernels.cross_entropy import index_and_weight, sum_or_one
from ldam_plugins.kernels.dispatch import any_requires_grad, can_inspect_values

CHUNK_ELEMENTS = 1 << 18
"""Done at a time: 1 MiB in float32, to stay in the cache of a core."""
FEWEST_ELEMENTS = 3 << 15
"""Below, the definition is faster: it takes fewer calls."""


def is_faster(
    logits: Tensor,
    target: Tensor,
    margins: Tensor,
    scale: float,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> bool:
    """Whether this form can compute a loss of these, and does it faster than the definition."""
    others = target, margins, weight
    if reduction == "none" or not can_inspect_values(logits, *others):
        return False
    large = logits.numel() >= FEWEST_ELEMENTS and logits.dtype != torch.float16
    return large and not any_requires_grad(*others)


def margin_cross_entropy(
    logits: Tensor,
    target: Tensor,
    margins: Tensor,
    scale: float,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    """See :func:`.margin_cross_entropy.margin_cross_entropy`; mean or sum, 0-d, on a CPU."""
    loss: Tensor
    if target.ndim == 2:
        factors = margins.new_ones(1) if weight is None else weight
        factors = factors / (-len(target) if reduction == "mean" else -1)
        loss, _ = _OfTargetProbs.apply(logits, target, margins * -scale, factors)
        return loss
    index, row_weight = index_and_weight(target, weight, ignore_index, margins.dtype)
    divisor = sum_or_one(row_weight).item() if reduction == "mean" else 1.0
    addend = (margins.gather(0, index) * -scale).unsqueeze(1)
    coefficient = row_weight / (divisor or 1.0)
    loss, _ = _OfIndices.apply(logits, index.unsqueeze(1), addend, coefficient)
    return loss if divisor else loss / divisor


class _KeepsGradient(torch.autograd.Function):
    """The loss, and its gradient with respect to the logits in their dtype.

    As an output the gradient has a derivative of its own, so the backward pass is differentiable
    without the logits. It is ``total * softmax - part``; ``ctx.terms`` computes total (N, 1) and
    part (N, C) from the tensors that are kept.
    """

    @staticmethod
    def keep(ctx: Any, terms: Callable[..., tuple[Tensor, Tensor]], *tensors: Tensor) -> None:
        """Save tensors for the backward pass and forward mode, the gradient first."""
        ctx.terms = terms
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any, of_loss: Tensor | None, of_gradient: Tensor | None
    ) -> tuple[Tensor | None, None, None, None]:
        gradient = ctx.saved_tensors[0]
        result = None
        if of_loss is not None:
            result = gradient if _can_return_kept(of_loss) else gradient * of_loss
        if of_gradient is not None:
            through = _product(gradient, ctx.terms(*ctx.saved_tensors), of_gradient)
            result = through if result is None else result + through
        return result, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> tuple[Tensor, Tensor]:
        gradient = ctx.saved_tensors[0]
        derivative = _product(gradient, ctx.terms(*ctx.saved_tensors), tangent)
        return (gradient * tangent).sum(), derivative


class _OfIndices(_KeepsGradient):
    """``sum(coefficient * cross_entropy(z + addend * one_hot(index), index))``, 0-d.

    ``index`` (N, 1) is in 0..C-1; ``addend`` (N, 1) is added to the target's logit. Both it and
    ``coefficient`` (N,) have the precision to compute in. Where the coefficient is 0 the row is 0,
    whichever its logits are.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, index: Tensor, addend: Tensor, coefficient: Tensor
    ) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        total = coefficient.unsqueeze(1)
        probability = _gradient_of_indices(gradient, logits, index, addend, total)
        _OfIndices.keep(ctx, _terms_of_indices, gradient, index, total)
        return _loss(probability, logits, index, addend, coefficient), gradient


class _OfTargetProbs(_KeepsGradient):
    """``sum(factors * q * log_softmax(z + addend * q))``, 0-d, with the soft targets q.

    ``addend`` (C,) is added to the logit of a class whose soft target is 1; ``factors`` (C,) or
    (1,) are negative. Both have the dtype of q, in which is computed; q has no gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, target_probs: Tensor, addend: Tensor, factors: Tensor
    ) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(logits, memory_format=torch.contiguous_format)
        _OfTargetProbs.keep(ctx, _terms_of_target_probs, gradient, target_probs, factors)
        return _gradient_of_target_probs(gradient, logits, target_probs, addend, factors), gradient


def _terms_of_indices(gradient: Tensor, index: Tensor, total: Tensor) -> tuple[Tensor, Tensor]:
    return total, torch.zeros_like(gradient, dtype=total.dtype).scatter(1, index, total)


def _terms_of_target_probs(
    _: Tensor, target_probs: Tensor, factors: Tensor
) -> tuple[Tensor, Tensor]:
    part = -factors * target_probs
    return part.sum(1, keepdim=True), part


def _can_return_kept(of_loss: Tensor) -> bool:
    """Whether a backward pass may return the gradient that was kept itself, and save a copy.

    Only where the factor is the 1 that a backward pass usually begins with and the graph is freed
    after this pass, as the receiver may write into the gradient.
    """
    if torch.is_grad_enabled() or not can_inspect_values(of_loss):
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph() and of_loss.item() == 1


def _product(gradient: Tensor, terms: tuple[Tensor, Tensor], vector: Tensor) -> Tensor:
    """Derivative of the gradient times ``vector``."""
    total, part = terms
    softmax = (gradient + part) / total.masked_fill(total == 0, 1)
    product = softmax * vector
    return (total * (product - softmax * product.sum(1, keepdim=True))).to(gradient.dtype)


def _rows_at_once(logits: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // logits.shape[1])


def _row_chunks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    size = _rows_at_once(tensors[0])
    if len(tensors[0]) <= size:
        return (tensors,)
    return zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _scratch(like: Tensor, dtype: torch.dtype) -> Tensor:
    """An uninitialised chunk of rows in some precision."""
    rows = min(_rows_at_once(like), len(like))
    return like.new_empty((rows, like.shape[1]), dtype=dtype)


def _gradient_of_indices(
    out: Tensor, logits: Tensor, index: Tensor, addend: Tensor, total: Tensor
) -> Tensor:
    """Write ``total * (softmax - one_hot)`` of the shifted logits; return the target's softmax."""
    same = out.dtype == addend.dtype
    scratch = out if same else _scratch(logits, addend.dtype)
    probabilities = []
    for z, i, d, w, minus_w, place in _row_chunks(logits, index, addend, total, -total, out):
        wide = place if same else scratch[: len(z)]
        if same:
            torch.scatter_add(z, 1, i, d, out=wide)
        else:
            wide.copy_(z).scatter_add_(1, i, d)
        torch.softmax(wide, 1, out=wide)
        probabilities.append(wide.gather(1, i))
        wide.mul_(w).scatter_add_(1, i, minus_w)
        if not same:
            place.copy_(wide)
    return probabilities[0] if len(probabilities) == 1 else torch.cat(probabilities)


def _gradient_of_target_probs(
    out: Tensor, logits: Tensor, target_probs: Tensor, addend: Tensor, factors: Tensor
) -> Tensor:
    """Write the gradient of the loss with respect to the logits; return the loss."""
    log_softmax, product = (_scratch(logits, target_probs.dtype) for _ in range(2))
    loss = target_probs.new_zeros(())
    for z, q, place in _row_chunks(logits, target_probs, out):
        log_p, of_log_p = log_softmax[: len(z)], product[: len(z)]
        wide = z if z.dtype == q.dtype else log_p.copy_(z)
        torch.log_softmax(torch.addcmul(wide, q, addend, out=log_p), 1, out=log_p)
        torch.mul(q, factors, out=of_log_p)
        loss += (log_p * of_log_p).sum()
        made = place if place.dtype == q.dtype else of_log_p
        torch._log_softmax_backward_data(of_log_p, log_p, 1, q.dtype, out=made)
        if made is not place:
            place.copy_(made)
    return loss


def _loss(
    probability: Tensor, logits: Tensor, index: Tensor, addend: Tensor, coefficient: Tensor
) -> Tensor:
    """``-sum(coefficient * log(probability))``."""
    log_p = probability.squeeze(1).log()
    smallest = 2**20 * torch.finfo(log_p.dtype).tiny
    if probability.min().item() >= smallest:
        return (log_p * coefficient).sum().neg_()
    lost = ~(probability.squeeze(1) >= smallest)  # underflow has lost digits, and there may be nan
    shifted = logits[lost].to(log_p.dtype).scatter_add_(1, index[lost], addend[lost])
    log_p[lost] = -F.cross_entropy(shifted, index[lost, 0], reduction="none")
    return (log_p * coefficient).masked_fill_(coefficient == 0, 0).sum().neg_()
