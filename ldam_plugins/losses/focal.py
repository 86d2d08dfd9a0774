"""Focal loss: the terms of what is classified well already are scaled down.

Source: Lin et al., ICCV 2017, arXiv 1708.02002, in its softmax form.
"""

from __future__ import annotations

from typing import Any, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor

from ldam_plugins._validation import check_real
from ldam_plugins.counts import ClassCounts
from ldam_plugins.losses.base import ClassificationLoss
from ldam_plugins.losses.reduction import CommonOptions, prepare


def focal_loss(
    logits: Tensor, target: Tensor, *, gamma: float = 2.0, **common: Unpack[CommonOptions]
) -> Tensor:
    """Focal loss ``-w_y (1 - p_y) ** gamma log p_y`` with ``p = softmax(z)``.

    For soft targets q: ``-sum_c w_c q_c (1 - p_c) ** gamma log p_c``. ``gamma = 0`` is
    cross-entropy.

    Args:
        logits: (N, C) floating.
        target: (N,) int64 or (N, C) floating.
        gamma: Focusing exponent, at least 0.
        **common: See :class:`.reduction.CommonOptions`; errors: :func:`.reduction.check_batch`.

    Raises:
        ValueError: ``gamma`` is negative.
    """
    check_real("gamma", gamma, low=0)
    batch = prepare(logits, target, **common)
    log_p = batch.at_target(F.log_softmax(batch.logits, dim=1))
    # 1 - p without cancellation; the clamp keeps the gradient of the power finite at p = 1.
    miss = -torch.expm1(log_p)
    return batch.reduce(-(miss.clamp_min(torch.finfo(miss.dtype).tiny) ** gamma) * log_p)


class FocalLoss(ClassificationLoss):
    """Focal loss, see :func:`.focal_loss`.

    Args:
        class_counts: :class:`ClassCounts` of the training set, or the bare counts.
        gamma: Focusing exponent, at least 0; 0 is cross-entropy.
        **common: ``reduction``, ``ignore_index``, see :class:`ClassificationLoss`.
    """

    def __init__(self, class_counts: ClassCounts, *, gamma: float = 2.0, **common: Any) -> None:
        super().__init__(class_counts, **common)
        self.gamma = check_real("gamma", gamma, low=0)

    def _loss(self, logits: Tensor, target: Tensor, **common: Any) -> Tensor:
        return focal_loss(logits, target, gamma=self.gamma, **common)
