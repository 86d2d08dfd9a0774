"""LDAM, the label-distribution-aware margin loss.

Source: Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss",
NeurIPS 2019, arXiv 1906.07413.
"""

from __future__ import annotations

from typing import Unpack

from torch import Tensor

from ldam_plugins._validation import check_real
from ldam_plugins.choices import DEFAULT_SCALE
from ldam_plugins.kernels.margin_cross_entropy import margin_cross_entropy
from ldam_plugins.losses.margin import MarginLoss
from ldam_plugins.losses.reduction import CommonOptions, check_batch


def ldam_loss(
    logits: Tensor,
    target: Tensor,
    margins: Tensor,
    *,
    scale: float = DEFAULT_SCALE,
    **common: Unpack[CommonOptions],
) -> Tensor:
    r"""LDAM: cross-entropy with the margin of its class taken off the target's cosine.

    .. math:: -w_y \log \frac{e^{s (\cos\theta_y - m_y)}}
        {e^{s (\cos\theta_y - m_y)} + \sum_{j \ne y} e^{s \cos\theta_j}}

    On the logits ``z = s cos(theta)`` of a cosine head that is
    ``F.cross_entropy(z - s * m * one_hot(y), y, w)``. For soft targets q the margin applies in
    proportion: ``F.cross_entropy(z - s * m * q, q, w)``.

    Source: Cao et al., equation 13.

    Args:
        logits: z (N, C), ``s cos(theta)``.
        target: y (N,) int64, or q (N, C) floating.
        margins: m (C,) in cosine units, see :meth:`ClassCounts.margins`.
        scale: s, the scale of the head that gave the logits.
        **common: See :class:`.reduction.CommonOptions`; errors: :func:`.reduction.check_batch`.

    Raises:
        ValueError: ``scale`` is not positive, or ``margins`` not (C,).

    Example:
        >>> import torch
        >>> z = torch.tensor([[30.0, 15.0]])
        >>> ldam_loss(z, torch.tensor([0]), torch.tensor([0.5, 0.1]))
        tensor(0.6931)
    """
    check_real("scale", scale, low=0, low_open=True)
    batch = check_batch(logits, target, **common)
    m = batch.per_class("margins", margins)
    return margin_cross_entropy(batch.logits, batch.target, m, scale, *batch[2:])


class LDAMLoss(MarginLoss):
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
        >>> import torch
        >>> criterion = LDAMLoss([900, 90, 9], max_margin=0.5, scale=30.0)
        >>> logits = torch.tensor([[30.0, 0.0, -3.0], [3.0, 0.0, 15.0]])
        >>> criterion(logits, torch.tensor([0, 2]))
        tensor(1.5475)
    """

    takes_chunked_head = True
    function = staticmethod(ldam_loss)


class UniformMarginLoss(MarginLoss):
    """LDAM with one margin for all classes (the paper's M): ``m[c] = max_margin``.

    Args: those of :class:`LDAMLoss`.
    """

    uniform = True
    takes_chunked_head = True
    function = staticmethod(ldam_loss)
