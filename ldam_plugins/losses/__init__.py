"""Losses of classification under class imbalance, as functions and as modules."""

from ldam_plugins.losses.base import ClassificationLoss
from ldam_plugins.losses.functional import (
    chunked_cross_entropy,
    cross_entropy,
    focal_loss,
    hinge_loss,
    ldam_loss,
    logit_adjusted_loss,
    vector_scaling_loss,
)
from ldam_plugins.losses.registry import (
    CrossEntropyLoss,
    FocalLoss,
    HingeLoss,
    LDAMHingeLoss,
    LDAMLoss,
    LogitAdjustedLoss,
    UniformMarginLoss,
    VectorScalingLoss,
    create_loss,
    list_losses,
    loss_options,
)
from ldam_plugins.losses.reweighting import (
    apply_stage,
    combination_advice,
    warn_of_combination,
)

__all__ = [
    "ClassificationLoss",
    "CrossEntropyLoss",
    "FocalLoss",
    "HingeLoss",
    "LDAMHingeLoss",
    "LDAMLoss",
    "LogitAdjustedLoss",
    "UniformMarginLoss",
    "VectorScalingLoss",
    "apply_stage",
    "chunked_cross_entropy",
    "combination_advice",
    "create_loss",
    "cross_entropy",
    "focal_loss",
    "hinge_loss",
    "ldam_loss",
    "list_losses",
    "logit_adjusted_loss",
    "loss_options",
    "vector_scaling_loss",
    "warn_of_combination",
]
