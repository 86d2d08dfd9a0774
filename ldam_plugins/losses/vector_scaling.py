"""Vector-scaling loss: cross-entropy of logits with a factor and a term for each class.

Source: Kini et al., NeurIPS 2021, arXiv 2103.01550.
"""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor

from ldam_plugins._validation import check_real
from ldam_plugins.counts import ClassCounts
from ldam_plugins.losses.base import ClassificationLoss
from ldam_plugins.losses.reduction import CommonOptions, prepare


def vector_scaling_loss(
    logits: Tensor,
    target: Tensor,
    multiplicative: Tensor,
    additive: Tensor,
    **common: Unpack[CommonOptions],
) -> Tensor:
    """Cross-entropy of ``multiplicative_c z_c + additive_c``.

    Kini et al. take ``multiplicative_c = (n_c / n_max) ** gamma`` and
    ``additive_c = tau log(n_c / N)``.

    Args:
        logits: z (N, C) floating.
        target: (N,) int64 or (N, C) floating.
        multiplicative: (C,) factor of each class.
        additive: (C,) term of each class.
        **common: See :class:`.reduction.CommonOptions`; errors: :func:`.reduction.check_batch`.

    Raises:
        ValueError: ``multiplicative`` or ``additive`` not (C,).
    """
    batch = prepare(logits, target, **common)
    scaled = batch.logits * batch.per_class("multiplicative", multiplicative)
    return batch.cross_entropy(scaled + batch.per_class("additive", additive))


class VectorScalingLoss(ClassificationLoss):
    """Vector-scaling loss, see :func:`.vector_scaling_loss`.

    Args:
        class_counts: :class:`ClassCounts` or counts.
        gamma: Exponent of the factor ``(n_c / n_max) ** gamma``, at least 0.
        tau: Strength of the term ``tau log(n_c / N)``, at least 0.
        **common: ``reduction``, ``ignore_index``, see :class:`ClassificationLoss`.
    """

    corrects_prior = True

    def __init__(
        self,
        class_counts: ClassCounts,
        *,
        gamma: float = 0.15,
        tau: float = 1.0,
        **common: Any,
    ) -> None:
        super().__init__(class_counts, **common)
        self.gamma = check_real("gamma", gamma, low=0)
        self.tau = check_real("tau", tau, low=0)
        prior = self._exact["prior"]
        self._set_constant("multiplicative", (prior / prior.max()) ** self.gamma)
        self._set_constant("additive", self.tau * prior.log())

    @property
    def multiplicative(self) -> Tensor:
        """Factor of each class (C,), as :attr:`LDAMLoss.margins`."""
        return self._constant("multiplicative", self.weight)

    @property
    def additive(self) -> Tensor:
        """Term of each class (C,), as :attr:`LDAMLoss.margins`."""
        return self._constant("additive", self.weight)

    def _loss(self, logits: Tensor, target: Tensor, **common: Any) -> Tensor:
        factors, terms = (self._constant(n, logits) for n in ("multiplicative", "additive"))
        return vector_scaling_loss(logits, target, factors, terms, **common)
