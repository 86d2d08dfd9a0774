"""The old path of ``ldam_plugins.kernels.batch_norm``."""

from ldam_plugins._moved import warn_moved
from ldam_plugins.kernels.batch_norm import *  # noqa: F403

warn_moved(__name__, "ldam_plugins.kernels.batch_norm")
