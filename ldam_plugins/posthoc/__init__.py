"""What can be done to a classifier that is trained already: its features, and its prior."""

from ldam_plugins.posthoc.features import Features, extract_features
from ldam_plugins.posthoc.priors import adjust_to_prior, adjusted_logits

__all__ = ["Features", "adjust_to_prior", "adjusted_logits", "extract_features"]
