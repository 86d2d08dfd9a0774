"""What can be done to a classifier that is trained already: its features, head and prior."""

from ldam_plugins.posthoc.features import Features, extract_features
from ldam_plugins.posthoc.head_fitting import FittedHead, fit_head
from ldam_plugins.posthoc.priors import adjust_to_prior, adjusted_logits

__all__ = [
    "Features",
    "FittedHead",
    "adjust_to_prior",
    "adjusted_logits",
    "extract_features",
    "fit_head",
]
