"""What the losses with a margin for each class share: the margins, and the scale of the head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ldam_plugins._validation import check_real
from ldam_plugins.choices import DEFAULT_SCALE
from ldam_plugins.counts import DEFAULT_MAX_MARGIN, ClassCounts
from ldam_plugins.kernels.chunked_cosines import ChunkedCosines
from ldam_plugins.losses.base import ClassificationLoss
from ldam_plugins.losses.cross_entropy import chunked_cross_entropy


class MarginLoss(ClassificationLoss):
    """A loss with one margin a class, in cosine units, times the scale of the head.

    The margins are those of LDAM, ``m[c] = max_margin * (n_c / n_min) ** -1/4``, or where
    ``uniform`` is set ``m[c] = max_margin`` for all classes.

    Args:
        class_counts: :class:`ClassCounts` of the training set, or the bare counts.
        max_margin: Margin of the rarest class, in cosine units, at least 0.
        scale: Scale of the cosine head, above 0.
        **common: ``reduction``, ``ignore_index``, see :class:`ClassificationLoss`.
    """

    needs_cosine_head = True
    uniform = False
    """Whether all classes have the margin of the rarest."""
    function: ClassVar[Callable[..., Tensor]]
    """The pure function of logits, target and margins."""

    def __init__(
        self,
        class_counts: ClassCounts | Sequence[int] | np.ndarray | Tensor,
        max_margin: float = DEFAULT_MAX_MARGIN,
        scale: float = DEFAULT_SCALE,
        **common: Any,
    ) -> None:
        super().__init__(class_counts, **common)
        self.max_margin = check_real("max_margin", max_margin, low=0)
        self.scale = check_real("scale", scale, low=0, low_open=True)
        margins = self.class_counts.margins(self.max_margin, dtype=torch.float64)
        if self.uniform:
            margins = torch.full_like(margins, self.max_margin)
        self._set_constant("margins", margins)

    @property
    def margins(self) -> Tensor:
        """Margin of each class (C,), in cosine units, where the weight is and in its precision."""
        return self._constant("margins", self.weight)

    def _loss(self, logits: Tensor, target: Tensor, **common: Any) -> Tensor:
        margins = self._constant("margins", logits)
        return self.function(logits, target, margins, scale=self.scale, **common)

    def _chunked_loss(self, cosines: ChunkedCosines, target: Tensor, **common: Any) -> Tensor:
        if not self.takes_chunked_head:
            return super()._chunked_loss(cosines, target, **common)
        margins = self._constant("margins", cosines)
        return chunked_cross_entropy(cosines, target, margins, scale=self.scale, **common)
