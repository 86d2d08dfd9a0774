"""The hinge losses: with the margins of LDAM, and with one margin for all classes.

Source: Cao et al., NeurIPS 2019, arXiv 1906.07413, equation 9 (LDAM-HG, and HG).
"""

from __future__ import annotations

from typing import Unpack

import torch
from torch import Tensor

from ldam_plugins._validation import check_real
from ldam_plugins.choices import DEFAULT_SCALE
from ldam_plugins.losses.margin import MarginLoss
from ldam_plugins.losses.reduction import CommonOptions, prepare


def hinge_loss(
    logits: Tensor,
    target: Tensor,
    margins: Tensor,
    *,
    scale: float = DEFAULT_SCALE,
    **common: Unpack[CommonOptions],
) -> Tensor:
    """Multi-class hinge ``w_y max(0, max_{j != y} z_j - z_y + scale * margins[y])``.

    With LDAM margins this is LDAM-HG, with equal ones the hinge loss of Crammer and Singer. For
    soft targets q: ``sum_c w_c q_c max(0, max_{j != c} z_j - z_c + scale * margins_c)``. With a
    single class there is no other logit and the loss is 0.

    Args:
        logits: z (N, C), ``scale * cos(theta)``.
        target: (N,) int64 or (N, C) floating.
        margins: (C,) in cosine units, see :meth:`ClassCounts.margins`.
        scale: Scale of the head that gave the logits.
        **common: See :class:`.reduction.CommonOptions`; errors: :func:`.reduction.check_batch`.

    Raises:
        ValueError: ``scale`` is not positive, or ``margins`` not (C,).
    """
    check_real("scale", scale, low=0, low_open=True)
    batch = prepare(logits, target, **common)
    shift = batch.per_class("margins", margins) * scale
    z = batch.logits
    terms = z * 0 if z.shape[1] == 1 else (_highest_of_others(z) - z + shift).clamp_min(0)
    return batch.reduce(batch.at_target(terms))


def _highest_of_others(logits: Tensor) -> Tensor:
    """``max_{j != c} z_j`` of each entry (N, C)."""
    top = logits.topk(2, dim=1)
    best, runner_up = top.values[:, :1], top.values[:, 1:]
    # Not F.one_hot, which looks at the values.
    is_best = torch.zeros_like(logits, dtype=torch.bool).scatter(1, top.indices[:, :1], 1)
    return torch.where(is_best, runner_up, best)


class LDAMHingeLoss(MarginLoss):
    """The hinge form of LDAM (LDAM-HG), see :func:`.hinge_loss`.

    Args: those of :class:`LDAMLoss`.
    """

    function = staticmethod(hinge_loss)


class HingeLoss(MarginLoss):
    """Hinge loss with one margin for all classes (HG), see :func:`.hinge_loss`.

    Args: those of :class:`LDAMLoss`.
    """

    uniform = True
    function = staticmethod(hinge_loss)
