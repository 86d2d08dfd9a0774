"""Mixup and CutMix of timm with labels that lean to the rarer class."""

from __future__ import annotations

import torch
from timm.data import Mixup
from timm.data.mixup import mixup_target
from torch import Tensor

from ldam_plugins._validation import check_real
from ldam_plugins.counts import ClassCounts

REMIX_KAPPA = 3.0
"""How many times as frequent the one class must be as the other (Chou et al., section 4.1)."""
REMIX_TAU = 0.5
"""Share of the mixed image below which the more frequent class loses its label (the same)."""


class Remix:
    r"""Remix: images are mixed as by timm, but labels go to the rarer class where it is clear.

    Each batch gets one :math:`\lambda`, and image i is mixed with j, that at the same place from
    the end: by Mixup :math:`\lambda x_i + (1 - \lambda) x_j`, by CutMix :math:`1 - \lambda` is the
    share of the area that is cut from j. The target is
    :math:`\lambda_y t_i + (1 - \lambda_y) t_j`, and with n training samples of a class

    .. math:: \lambda_y = \begin{cases}
        0 & n_i \geq \kappa n_j \text{ and } \lambda < \tau \\
        1 & n_j \geq \kappa n_i \text{ and } 1 - \lambda < \tau \\
        \lambda & \text{otherwise} \end{cases}

    It draws what timm's Mixup draws, so only targets tell it apart.

    Source: Chou et al., "Remix: Rebalanced Mixup", 2020, arXiv 2007.03943, equation 6.

    Args:
        class_counts: Training samples per class.
        mixup: Alpha of Mixup; 0: none.
        cutmix: Alpha of CutMix; 0: none. With both, either is drawn for each batch.
        smoothing: Label smoothing, in [0, 1).
        kappa: At least 1. Default: 3, the paper's.
        tau: In [0, 1]. Default: 0.5, the paper's.

    Raises:
        ValueError: an option out of range, or neither of the two is above 0.
    """

    def __init__(
        self,
        class_counts: ClassCounts,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        *,
        smoothing: float = 0.0,
        kappa: float = REMIX_KAPPA,
        tau: float = REMIX_TAU,
    ) -> None:
        check_real("mixup", mixup, low=0, low_open=not cutmix)
        check_real("cutmix", cutmix, low=0)
        self.smoothing = check_real("smoothing", smoothing, low=0, high=1, high_open=True)
        self.kappa = check_real("kappa", kappa, low=1)
        self.tau = check_real("tau", tau, low=0, high=1)
        self.class_counts = class_counts
        self._counts = torch.tensor(class_counts.counts, dtype=torch.float64)
        self._mixup, self._cutmix = mixup, cutmix

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix a batch in place.

        Args:
            images: (N, channels, height, width), N even.
            labels: Class indices (N,).

        Returns:
            The images and the targets (N, C) in float32.
        """
        # Mixed as if every image were a class of its own, a target says what it is mixed of.
        images, parts = Mixup(
            self._mixup, self._cutmix, label_smoothing=0.0, num_classes=len(images)
        )(images, torch.arange(len(images), device=labels.device))
        share = self.label_shares(parts.diagonal(), labels, labels.flip(0))
        classes = len(self.class_counts)
        return images, mixup_target(labels, classes, share[:, None], self.smoothing)

    def label_shares(self, shares: Tensor, labels: Tensor, others: Tensor) -> Tensor:
        """Share of the first label in each target, (N,).

        Args:
            shares: Of the first image in each mixed one, (N,).
            labels: Classes of the first images, (N,).
            others: Classes of the second ones, (N,).
        """
        self._counts = self._counts.to(labels.device)
        own, other = self._counts[labels], self._counts[others]
        to_other = (own >= self.kappa * other) & (shares < self.tau)
        to_own = (other >= self.kappa * own) & (1 - shares < self.tau)
        return shares.masked_fill(to_other, 0.0).masked_fill(to_own, 1.0)
