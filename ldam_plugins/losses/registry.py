"""The losses of :mod:`ldam_plugins.losses.functional` as modules that know the class counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldam_plugins._validation import check_choice, check_real, invalid
from ldam_plugins.counts import ClassCounts
from ldam_plugins.kernels.chunked_cosines import ChunkedCosines
from ldam_plugins.losses import functional
from ldam_plugins.losses.base import ClassificationLoss, option_names
from ldam_plugins.losses.ldam import DEFAULT_SCALE


class CrossEntropyLoss(ClassificationLoss):
    """Cross-entropy, see :func:`.cross_entropy`."""

    takes_chunked_head = True

    def _loss(self, logits: Tensor, target: Tensor, **common: Any) -> Tensor:
        return functional.cross_entropy(logits, target, **common)

    def _chunked_loss(self, cosines: ChunkedCosines, target: Tensor, **common: Any) -> Tensor:
        return functional.chunked_cross_entropy(cosines, target, **common)


class FocalLoss(ClassificationLoss):
    """Focal loss, see :func:`.focal_loss`.

    Args:
        class_counts: :class:`ClassCounts` or counts.
        gamma: Focusing exponent, at least 0; 0 is cross-entropy.
        **common: ``reduction``, ``ignore_index``, see :class:`ClassificationLoss`.
    """

    def __init__(self, class_counts: ClassCounts, *, gamma: float = 2.0, **common: Any) -> None:
        super().__init__(class_counts, **common)
        self.gamma = check_real("gamma", gamma, low=0)

    def _loss(self, logits: Tensor, target: Tensor, **common: Any) -> Tensor:
        return functional.focal_loss(logits, target, gamma=self.gamma, **common)


class _MarginLoss(ClassificationLoss):
    """A loss with one margin a class, in cosine units, times the scale of the head."""

    needs_cosine_head = True
    takes_chunked_head = True
    function = staticmethod(functional.ldam_loss)

    def __init__(
        self,
        class_counts: ClassCounts | Sequence[int] | np.ndarray | Tensor,
        max_margin: float = 0.5,
        scale: float = DEFAULT_SCALE,
        **common: Any,
    ) -> None:
        super().__init__(class_counts, **common)
        self.max_margin = check_real("max_margin", max_margin, low=0)
        self.scale = check_real("scale", scale, low=0, low_open=True)
        self._set_constant("margins", self._margins())

    @property
    def margins(self) -> Tensor:
        """Margin of each class (C,), in cosine units, where the weight is and in its precision."""
        return self._constant("margins", self.weight)

    def _margins(self) -> Tensor:
        return self.class_counts.margins(self.max_margin, dtype=torch.float64)

    def _loss(self, logits: Tensor, target: Tensor, **common: Any) -> Tensor:
        margins = self._constant("margins", logits)
        return self.function(logits, target, margins, scale=self.scale, **common)

    def _chunked_loss(self, cosines: ChunkedCosines, target: Tensor, **common: Any) -> Tensor:
        if not self.takes_chunked_head:
            return super()._chunked_loss(cosines, target, **common)
        margins = self._constant("margins", cosines)
        return functional.chunked_cross_entropy(
            cosines, target, margins, scale=self.scale, **common
        )


class LDAMLoss(_MarginLoss):
    """Label-distribution-aware margin loss, see :func:`.ldam_loss`.

    ``CE(z - scale * m[y] at the target)`` with ``m[c] = max_margin * (n_c / n_min) ** -1/4`` on
    the logits ``z = scale * cos(theta)`` of a cosine head (:func:`ldam_plugins.use_cosine_head`).

    Source: Cao et al., NeurIPS 2019, arXiv 1906.07413.

    Args:
        class_counts: :class:`ClassCounts` of the training set, or the bare counts.
        max_margin: Margin of the rarest class, in cosine units (the paper: 0.5, and 0.3 for
            iNaturalist).
        scale: Scale of the cosine head (the paper: 30).
        **common: ``reduction``, ``ignore_index``, see :class:`ClassificationLoss`.

    Example:
        >>> criterion = LDAMLoss([900, 90, 9], max_margin=0.5, scale=30.0)
        >>> logits = torch.tensor([[30.0, 0.0, -3.0], [3.0, 0.0, 15.0]])
        >>> criterion(logits, torch.tensor([0, 2]))
        tensor(1.5475)
    """


class UniformMarginLoss(_MarginLoss):
    """LDAM with one margin for all classes (the paper's M): ``m[c] = max_margin``."""

    def _margins(self) -> Tensor:
        return torch.full_like(self._exact["prior"], self.max_margin)


class LDAMHingeLoss(_MarginLoss):
    """The hinge form of LDAM (LDAM-HG), see :func:`.hinge_loss`."""

    takes_chunked_head = False
    function = staticmethod(functional.hinge_loss)


class HingeLoss(UniformMarginLoss):
    """Hinge loss with one margin for all (HG), see :func:`.hinge_loss`."""

    takes_chunked_head = False
    function = staticmethod(functional.hinge_loss)


class LogitAdjustedLoss(ClassificationLoss):
    """Logit-adjusted loss, see :func:`.logit_adjusted_loss`.

    Args:
        class_counts: :class:`ClassCounts` or counts; the prior is their share.
        tau: Strength, at least 0; 1 is the balanced softmax, 0 cross-entropy.
        **common: ``reduction``, ``ignore_index``, see :class:`ClassificationLoss`.
    """

    def __init__(self, class_counts: ClassCounts, *, tau: float = 1.0, **common: Any) -> None:
        super().__init__(class_counts, **common)
        self.tau = check_real("tau", tau, low=0)

    @property
    def prior(self) -> Tensor:
        """Share of each class in the training set (C,), as :attr:`LDAMLoss.margins`."""
        return self._constant("prior", self.weight)

    def _loss(self, logits: Tensor, target: Tensor, **common: Any) -> Tensor:
        prior = self._constant("prior", logits)
        return functional.logit_adjusted_loss(logits, target, prior, tau=self.tau, **common)


class VectorScalingLoss(ClassificationLoss):
    """Vector-scaling loss, see :func:`.vector_scaling_loss`.

    Args:
        class_counts: :class:`ClassCounts` or counts.
        gamma: Exponent of the factor ``(n_c / n_max) ** gamma``, at least 0.
        tau: Strength of the term ``tau log(n_c / N)``, at least 0.
        **common: ``reduction``, ``ignore_index``, see :class:`ClassificationLoss`.
    """

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
        return functional.vector_scaling_loss(logits, target, factors, terms, **common)


_LOSSES: dict[str, type[ClassificationLoss]] = {
    "ce": CrossEntropyLoss,
    "focal": FocalLoss,
    "ldam": LDAMLoss,
    "ldam_hinge": LDAMHingeLoss,
    "hinge": HingeLoss,
    "uniform_margin": UniformMarginLoss,
    "logit_adjusted": LogitAdjustedLoss,
    "vector_scaling": VectorScalingLoss,
}


def list_losses() -> list[str]:
    """Names :func:`create_loss` knows."""
    return list(_LOSSES)


def create_loss(
    name: str,
    class_counts: ClassCounts | Sequence[int] | np.ndarray | Tensor,
    **options: Any,
) -> ClassificationLoss:
    """Create a loss by name.

    Args:
        name: One of :func:`list_losses`.
        class_counts: :class:`ClassCounts` of the training set, or the bare counts.
        **options: Options of that loss, such as ``max_margin`` and ``scale`` (LDAM, hinges,
            uniform margin), ``gamma`` (focal, vector scaling), ``tau`` (logit adjusted, vector
            scaling), and ``reduction``, ``ignore_index`` (all).

    Raises:
        TypeError: an option this loss does not have.
        ValueError: an unknown name (the nearest are named), or a bad option.

    Example:
        >>> create_loss("focal", [90, 9], gamma=1.0)
        FocalLoss(num_classes=2, gamma=1.0, reduction='mean', ignore_index=-100)
    """
    loss = _LOSSES[check_choice("loss", name, _LOSSES)]
    known = loss_options(name)
    for option in options:
        if option not in known:
            expected = f"an option of {name!r} (one of {', '.join(known)})"
            raise invalid("options", expected, option, error=TypeError)
    return loss(class_counts, **options)


def loss_options(name: str) -> tuple[str, ...]:
    """Options :func:`create_loss` takes for the loss ``name``.

    Raises:
        ValueError: an unknown name.
    """
    return option_names(_LOSSES[check_choice("loss", name, _LOSSES)])
