"""The old path of ``ldam_plugins.losses.reweighting``."""

from ldam_plugins._moved import warn_moved
from ldam_plugins.losses.reweighting import *  # noqa: F403

warn_moved(__name__, "ldam_plugins.losses.reweighting")
