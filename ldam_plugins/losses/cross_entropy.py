"""Cross-entropy, of logits and of a cosine head that never computes all of them."""

from __future__ import annotations

from typing import Any, Unpack

import torch
from torch import Tensor

from ldam_plugins._validation import check_choice, invalid
from ldam_plugins.choices import DEFAULT_SCALE
from ldam_plugins.kernels.chunked_cosines import ChunkedCosines
from ldam_plugins.kernels.cross_entropy import reduce_rows, row_weights
from ldam_plugins.losses.base import ClassificationLoss
from ldam_plugins.losses.reduction import REDUCTIONS, CommonOptions, per_class, prepare


def cross_entropy(logits: Tensor, target: Tensor, **common: Unpack[CommonOptions]) -> Tensor:
    """Cross-entropy ``-w_y log softmax(z)_y``.

    For soft targets q: ``-sum_c w_c q_c log softmax(z)_c``. Equals
    ``torch.nn.functional.cross_entropy`` except that the mean of nothing is 0.

    Args:
        logits: (N, C) floating.
        target: (N,) int64 or (N, C) floating.
        **common: See :class:`.reduction.CommonOptions`; errors: :func:`.reduction.check_batch`.
    """
    batch = prepare(logits, target, **common)
    return batch.cross_entropy(batch.logits)


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
    """:func:`.ldam_loss` of the logits that ``cosines`` stands for, some classes at a time.

    Without ``margins`` it is :func:`cross_entropy`. Gradients reach the features and the weight of
    the head, not the margins; derivatives are of first order.

    Args:
        cosines: What a chunked cosine head returns in training mode, for (N, C) logits.
        target: (N,) int64.
        margins: (C,) in cosine units, or None for none.
        scale: Factor of the margins, the scale of the head.
        weight: See :class:`.reduction.CommonOptions`, as the others.
        ignore_index: Likewise.
        reduction: Likewise.

    Raises:
        ValueError: ``target`` is not (N,) int64, shapes that do not fit, or an unknown reduction.
        IndexError: a target out of range.
    """
    check_choice("reduction", reduction, REDUCTIONS)
    if target.shape != cosines.shape[:1] or target.dtype != torch.int64:
        expected = f"int64 class indices of shape ({cosines.shape[0]},) for a chunked head"
        raise invalid("target", expected, (target.dtype, tuple(target.shape)))
    shift = None if margins is None else per_class("margins", margins, cosines) * scale
    rows = cosines.cross_entropy(target.masked_fill(target == ignore_index, 0), shift)
    weight = None if weight is None else per_class("weight", weight, cosines)
    row_weight = row_weights(target, weight, ignore_index, cosines.dtype)
    rows = (row_weight * rows).masked_fill(row_weight == 0, 0)
    return reduce_rows(rows, target, weight, ignore_index, reduction)


class CrossEntropyLoss(ClassificationLoss):
    """Cross-entropy, see :func:`.cross_entropy`.

    Args:
        class_counts: :class:`ClassCounts` of the training set, or the bare counts.
        **common: ``reduction``, ``ignore_index``, see :class:`ClassificationLoss`.
    """

    takes_chunked_head = True

    def _loss(self, logits: Tensor, target: Tensor, **common: Any) -> Tensor:
        return cross_entropy(logits, target, **common)

    def _chunked_loss(self, cosines: ChunkedCosines, target: Tensor, **common: Any) -> Tensor:
        return chunked_cross_entropy(cosines, target, **common)
