"""The old path of ``ldam_plugins.training.environment``."""

from ldam_plugins._moved import warn_moved
from ldam_plugins.training.environment import *  # noqa: F403

warn_moved(__name__, "ldam_plugins.training.environment")
