"""How good a classifier is under a long tail: by class, by group, and by a linear probe."""

from ldam_plugins.metrics.linear_probe import head_inputs, linear_probe
from ldam_plugins.metrics.long_tail import ECE_BINS, MetricAccumulator, long_tail_metrics
from ldam_plugins.metrics.predictions import Predictions
from ldam_plugins.metrics.views import error_views

__all__ = [
    "ECE_BINS",
    "MetricAccumulator",
    "Predictions",
    "error_views",
    "head_inputs",
    "linear_probe",
    "long_tail_metrics",
]
