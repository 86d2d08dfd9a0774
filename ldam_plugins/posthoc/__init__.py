"""What can be done to a classifier that is trained already: its features, head and prior."""

from ldam_plugins.posthoc.calibration import (
    Calibrated,
    Scaling,
    calibration_error,
    fit_temperature,
    fit_vector_scaling,
)
from ldam_plugins.posthoc.choice import Candidate, Choice
from ldam_plugins.posthoc.features import Features, extract_features
from ldam_plugins.posthoc.head_fitting import FittedHead, fit_head
from ldam_plugins.posthoc.last_step import Finished, LastStep
from ldam_plugins.posthoc.methods import METHODS, parse_method
from ldam_plugins.posthoc.prior_estimates import (
    ImpliedPrior,
    PriorEstimate,
    estimate_prior,
    implied_prior,
)
from ldam_plugins.posthoc.priors import adjust_to_prior, adjusted_logits
from ldam_plugins.posthoc.rebalance import Rebalanced, rebalance_head

__all__ = [
    "METHODS",
    "Calibrated",
    "Candidate",
    "Choice",
    "Features",
    "Finished",
    "FittedHead",
    "ImpliedPrior",
    "LastStep",
    "PriorEstimate",
    "Rebalanced",
    "Scaling",
    "adjust_to_prior",
    "adjusted_logits",
    "calibration_error",
    "estimate_prior",
    "extract_features",
    "fit_head",
    "fit_temperature",
    "fit_vector_scaling",
    "implied_prior",
    "parse_method",
    "rebalance_head",
]
