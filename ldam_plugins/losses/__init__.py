"""Losses of classification under class imbalance, as functions and as modules."""

from ldam_plugins.losses.base import ClassificationLoss
from ldam_plugins.losses.cross_entropy import CrossEntropyLoss, chunked_cross_entropy, cross_entropy
from ldam_plugins.losses.focal import FocalLoss, focal_loss
from ldam_plugins.losses.hinge import HingeLoss, LDAMHingeLoss, hinge_loss
from ldam_plugins.losses.ldam import LDAMLoss, UniformMarginLoss, ldam_loss
from ldam_plugins.losses.logit_adjusted import LogitAdjustedLoss, logit_adjusted_loss
from ldam_plugins.losses.registry import (
    create_loss,
    list_losses,
    loss_class,
    loss_options,
    losses_with,
)
from ldam_plugins.losses.reweighting import (
    apply_stage,
    combination_advice,
    warn_of_combination,
)
from ldam_plugins.losses.vector_scaling import VectorScalingLoss, vector_scaling_loss

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
    "loss_class",
    "loss_options",
    "losses_with",
    "vector_scaling_loss",
    "warn_of_combination",
]
