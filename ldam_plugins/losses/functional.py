"""The losses as pure functions of tensors.

Shared by all: ``logits`` (N, C) are used as the head gives them, so those of a cosine head
already hold its scale s; ``target`` is class indices (N,) int64, or class masses (N, C) floating
(mixup, cutmix, label smoothing). ``weight`` (C,) multiplies the terms of class c. Rows whose index
is ``ignore_index`` count nowhere. Arithmetic is float32 for 16-bit logits, else in the logits' own
precision. ``reduction="mean"`` is torch's: for indices ``sum(w_y l) / sum(w_y)``, for masses
``sum(l) / N``; the mean of nothing is 0 (torch gives nan). Margins are in cosine units: they are
multiplied by ``scale`` before they meet the logits.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from ldam_plugins._validation import check_choice, check_real, invalid
from ldam_plugins.kernels.chunked_cosines import ChunkedCosines
from ldam_plugins.kernels.dispatch import any_requires_grad, ordinary
from ldam_plugins.kernels.margin_cross_entropy import (
    can_fuse,
    margin_cross_entropy,
    margin_cross_entropy_of_masses,
)
from ldam_plugins.losses.ldam import DEFAULT_SCALE
from ldam_plugins.losses.reduction import (
    REDUCTIONS,
    at_target,
    checked_target,
    index_and_weight,
    per_class,
    prepare,
    reduce_rows,
    row_weights,
    sum_or_one,
    torch_cross_entropy,
    weigh,
)


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy ``-w_y log softmax(z)_y``; for masses q ``-sum_c w_c q_c log softmax(z)_c``.

    Equals ``torch.nn.functional.cross_entropy`` except that the mean of nothing is 0.

    Raises:
        TypeError: ``logits`` or ``target`` of a wrong dtype.
        ValueError: shapes that do not fit, or an unknown reduction.
    """
    logits, target, weight = prepare(logits, target, weight, reduction)
    return torch_cross_entropy(logits, target, weight, ignore_index, reduction)


def focal_loss(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Focal loss ``-w_y (1 - p_y) ** gamma log p_y`` with ``p = softmax(z)``.

    For masses q: ``-sum_c w_c q_c (1 - p_c) ** gamma log p_c``. ``gamma = 0`` is cross-entropy.

    Source: Lin et al., ICCV 2017, arXiv 1708.02002, in its softmax form.

    Raises:
        TypeError: ``logits`` or ``target`` of a wrong dtype.
        ValueError: shapes that do not fit, negative ``gamma``, or an unknown reduction.
    """
    check_real("gamma", gamma, low=0)
    logits, target, weight = prepare(logits, target, weight, reduction)
    log_p = F.log_softmax(logits, dim=1)
    if target.ndim == 1:
        log_p = at_target(log_p, target, ignore_index)
    # 1 - p without cancellation; the clamp keeps the gradient of the power finite at p = 1.
    miss = -torch.expm1(log_p)
    terms = -(miss.clamp_min(torch.finfo(miss.dtype).tiny) ** gamma) * log_p
    rows = weigh(terms, target, weight, ignore_index)
    return reduce_rows(rows, target, weight, ignore_index, reduction)


def ldam_loss(
    logits: Tensor,
    target: Tensor,
    margins: Tensor,
    *,
    scale: float = DEFAULT_SCALE,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """LDAM: cross-entropy of the logits with ``scale * margins[y]`` taken off the target entry.

    Equals ``F.cross_entropy(z - scale * margins * one_hot(y), y, weight)``. On logits
    ``z = s cos(theta)`` of a cosine head with scale s it is the paper's loss. For masses q the
    margin applies in proportion: ``z_c - scale * margins_c * q_c``.

    Source: Cao et al., NeurIPS 2019, arXiv 1906.07413, equation 13.

    Args:
        logits: (N, C), ``s cos(theta)``.
        target: (N,) int64 or (N, C) floating.
        margins: (C,), see :meth:`ClassCounts.margins`.
        scale: s, the scale of the head that gave the logits.
        weight: (C,) or None.
        ignore_index: Index of rows that count nowhere.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        TypeError: ``logits`` or ``target`` of a wrong dtype.
        ValueError: shapes that do not fit, ``scale`` not positive, or an unknown reduction.

    Example:
        >>> z = torch.tensor([[30.0, 15.0]])
        >>> ldam_loss(z, torch.tensor([0]), torch.tensor([0.5, 0.1]))
        tensor(0.6931)
    """
    check_real("scale", scale, low=0, low_open=True)
    target = checked_target(logits, target, reduction)
    margins = per_class("margins", margins, logits)
    weight = None if weight is None else per_class("weight", weight, logits)
    if target.ndim == 2:
        target = target.to(margins.dtype)
        if can_fuse(reduction, logits, target, margins, weight):
            factors = margins.new_ones(1) if weight is None else weight
            factors = factors / (-len(target) if reduction == "mean" else -1)
            return margin_cross_entropy_of_masses(logits, target, margins * -scale, factors)
        shifted = torch.addcmul(logits.to(margins.dtype), target, margins, value=-scale)
    elif _in_one_kernel(logits, target, margins, weight):
        from ldam_plugins.kernels import _margin_cross_entropy_triton as triton

        rows, row_weight = triton.margin_cross_entropy(
            logits, target, margins, weight, scale, ignore_index
        )
        if reduction == "none":
            return rows
        total = rows.sum()
        return total / sum_or_one(row_weight) if reduction == "mean" else total
    elif can_fuse(reduction, logits, target, margins, weight):
        index, coefficient = index_and_weight(target, weight, ignore_index, margins.dtype)
        divisor = sum_or_one(coefficient).item() if reduction == "mean" else 1.0
        addend = (margins.gather(0, index) * -scale).unsqueeze(1)
        share = coefficient / (divisor or 1.0)
        loss = margin_cross_entropy(logits, index.unsqueeze(1), addend, share)
        return loss if divisor else loss / divisor
    else:
        index = target.clamp(0, logits.shape[1] - 1)
        addend = margins.gather(0, index).mul_(-scale).unsqueeze(1)
        shifted = logits.to(margins.dtype).scatter_add(1, index.unsqueeze(1), addend)
    return torch_cross_entropy(shifted, target, weight, ignore_index, reduction)


def hinge_loss(
    logits: Tensor,
    target: Tensor,
    margins: Tensor,
    *,
    scale: float = DEFAULT_SCALE,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Multi-class hinge ``w_y max(0, max_{j != y} z_j - z_y + scale * margins[y])``.

    With LDAM margins this is LDAM-HG, with equal ones the hinge loss of Crammer and Singer. For
    masses q: ``sum_c w_c q_c max(0, max_{j != c} z_j - z_c + scale * margins_c)``. With a single
    class there is no other logit and the loss is 0.

    Source: Cao et al., NeurIPS 2019, arXiv 1906.07413, equation 9.

    Raises:
        TypeError: ``logits`` or ``target`` of a wrong dtype.
        ValueError: shapes that do not fit, ``scale`` not positive, or an unknown reduction.
    """
    check_real("scale", scale, low=0, low_open=True)
    logits, target, weight = prepare(logits, target, weight, reduction)
    shift = per_class("margins", margins, logits) * scale
    if logits.shape[1] == 1:
        terms = logits * 0
    else:
        top = logits.topk(2, dim=1)
        best, runner_up = top.values[:, :1], top.values[:, 1:]
        # Not F.one_hot, which looks at the values.
        is_best = torch.zeros_like(logits, dtype=torch.bool).scatter(1, top.indices[:, :1], 1)
        rival = torch.where(is_best, runner_up, best)
        terms = (rival - logits + shift).clamp_min(0)
    if target.ndim == 1:
        terms = at_target(terms, target, ignore_index)
    rows = weigh(terms, target, weight, ignore_index)
    return reduce_rows(rows, target, weight, ignore_index, reduction)


def logit_adjusted_loss(
    logits: Tensor,
    target: Tensor,
    prior: Tensor,
    *,
    tau: float = 1.0,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of ``z_c + tau log prior_c``; ``tau = 1`` is the balanced softmax.

    Source: Menon et al., ICLR 2021, arXiv 2007.07314; Ren et al., NeurIPS 2020, arXiv 2007.10740.

    Args:
        logits: (N, C).
        target: (N,) int64 or (N, C) floating.
        prior: (C,) share of each class in the training set, see :meth:`ClassCounts.prior`.
        tau: Strength of the adjustment, at least 0.
        weight: (C,) or None.
        ignore_index: Index of rows that count nowhere.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Raises:
        TypeError: ``logits`` or ``target`` of a wrong dtype.
        ValueError: shapes that do not fit, negative ``tau``, or an unknown reduction.
    """
    check_real("tau", tau, low=0)
    logits, target, weight = prepare(logits, target, weight, reduction)
    adjusted = logits + tau * per_class("prior", prior, logits).log()
    return torch_cross_entropy(adjusted, target, weight, ignore_index, reduction)


def vector_scaling_loss(
    logits: Tensor,
    target: Tensor,
    multiplicative: Tensor,
    additive: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of ``multiplicative_c z_c + additive_c``.

    Kini et al. take ``multiplicative_c = (n_c / n_max) ** gamma`` and
    ``additive_c = tau log(n_c / N)``.

    Source: Kini et al., NeurIPS 2021, arXiv 2103.01550.

    Raises:
        TypeError: ``logits`` or ``target`` of a wrong dtype.
        ValueError: shapes that do not fit, or an unknown reduction.
    """
    logits, target, weight = prepare(logits, target, weight, reduction)
    scaled = logits * per_class("multiplicative", multiplicative, logits)
    adjusted = scaled + per_class("additive", additive, logits)
    return torch_cross_entropy(adjusted, target, weight, ignore_index, reduction)


def chunked_cross_entropy(
    cosines: ChunkedCosines,
    target: Tensor,
    margins: Tensor | None = None,
    *,
    scale: float = DEFAULT_SCALE,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """:func:`ldam_loss` of the logits that ``cosines`` stands for, some classes at a time.

    Without ``margins`` it is :func:`cross_entropy`. Gradients reach the features and the weight of
    the head, not the margins; derivatives are of first order.

    Raises:
        TypeError: ``target`` of a wrong dtype.
        ValueError: ``target`` is not (N,), shapes that do not fit, or an unknown reduction.
        IndexError: a target out of range.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    if target.shape != cosines.shape[:1] or target.dtype != torch.int64:
        expected = f"int64 class indices of shape ({cosines.shape[0]},) for a chunked head"
        raise invalid("target", expected, (target.dtype, tuple(target.shape)))
    shift = None if margins is None else per_class("margins", margins, cosines) * scale
    rows = cosines.cross_entropy(target.masked_fill(target == ignore_index, 0), shift)
    weight = None if weight is None else per_class("weight", weight, cosines)
    coefficient = row_weights(target, weight, ignore_index, cosines.dtype)
    rows = (coefficient * rows).masked_fill(coefficient == 0, 0)
    return reduce_rows(rows, target, weight, ignore_index, reduction)


def _in_one_kernel(logits: Tensor, target: Tensor, margins: Tensor, weight: Tensor | None) -> bool:
    """Whether a kernel of Triton can do it."""
    if not logits.is_cuda or not ordinary(logits, target, margins, weight):
        return False
    return not any_requires_grad(margins, weight) and find_spec("triton") is not None
