"""Logit-adjusted loss: cross-entropy of logits that the class prior is added to.

Source: Menon et al., ICLR 2021, arXiv 2007.07314; Ren et al. (balanced softmax), NeurIPS 2020,
arXiv 2007.10740.
"""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from ldam_plugins._validation import check_real
from ldam_plugins.counts import ClassCounts
from ldam_plugins.losses.base import ClassificationLoss
from ldam_plugins.losses.reduction import CommonOptions, prepare


def logit_adjusted_loss(
    logits: Tensor,
    target: Tensor,
    prior: Tensor,
    *,
    tau: float = 1.0,
    **common: Unpack[CommonOptions],
) -> Tensor:
    """Cross-entropy of ``z_c + tau log prior_c``; ``tau = 1`` is the balanced softmax.

    Args:
        logits: z (N, C) floating.
        target: (N,) int64 or (N, C) floating.
        prior: (C,) share of each class in the training set, see :meth:`ClassCounts.prior`.
        tau: Strength of the adjustment, at least 0.
        **common: See :class:`.reduction.CommonOptions`; errors: :func:`.reduction.check_batch`.

    Raises:
        ValueError: ``tau`` is negative, or ``prior`` not (C,).
    """
    check_real("tau", tau, low=0)
    batch = prepare(logits, target, **common)
    return batch.cross_entropy(batch.logits + tau * batch.per_class("prior", prior).log())


class LogitAdjustedLoss(ClassificationLoss):
    """Logit-adjusted loss, see :func:`.logit_adjusted_loss`.

    Args:
        class_counts: :class:`ClassCounts` or counts; the prior is their share.
        tau: Strength, at least 0; 1 is the balanced softmax, 0 cross-entropy.
        **common: ``reduction``, ``ignore_index``, see :class:`ClassificationLoss`.
    """

    corrects_prior = True

    def __init__(self, class_counts: ClassCounts, *, tau: float = 1.0, **common: Any) -> None:
        super().__init__(class_counts, **common)
        self.tau = check_real("tau", tau, low=0)

    @property
    def prior(self) -> Tensor:
        """Share of each class in the training set (C,), as :attr:`LDAMLoss.margins`."""
        return self._constant("prior", self.weight)

    def _loss(self, logits: Tensor, target: Tensor, **common: Any) -> Tensor:
        prior = self._constant("prior", logits)
        return logit_adjusted_loss(logits, target, prior, tau=self.tau, **common)
