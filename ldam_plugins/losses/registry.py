"""The losses by name: the one table of them.

To add a loss, write its file (see :class:`.base.ClassificationLoss`) and enter it here. Recipes,
plugins and the benchmark ask this table, and the class what is true of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ldam_plugins._validation import check_choice, invalid
from ldam_plugins.counts import ClassCounts
from ldam_plugins.losses.base import ClassificationLoss, option_defaults
from ldam_plugins.losses.cross_entropy import CrossEntropyLoss
from ldam_plugins.losses.focal import FocalLoss
from ldam_plugins.losses.hinge import HingeLoss, LDAMHingeLoss
from ldam_plugins.losses.ldam import LDAMLoss, UniformMarginLoss
from ldam_plugins.losses.logit_adjusted import LogitAdjustedLoss
from ldam_plugins.losses.vector_scaling import VectorScalingLoss

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


def loss_class(name: str) -> type[ClassificationLoss]:
    """The class of the loss ``name``, such as :class:`LDAMLoss`.

    Raises:
        ValueError: an unknown name (the nearest are named).
    """
    return _LOSSES[check_choice("loss", name, _LOSSES)]


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
    loss = loss_class(name)
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
    return tuple(option_defaults(loss_class(name)))


def losses_with(option: str) -> dict[str, Any]:
    """Losses that take an option of this name, and its default there.

    Example:
        >>> losses_with("gamma")
        {'focal': 2.0, 'vector_scaling': 0.15}
    """
    defaults = {name: option_defaults(loss) for name, loss in _LOSSES.items()}
    return {name: own[option] for name, own in defaults.items() if option in own}
