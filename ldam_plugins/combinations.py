"""The old path of ``ldam_plugins.losses.reweighting``."""

from ldam_plugins._moved import warn_moved
from ldam_plugins.losses.reweighting import *  # noqa: F403
from ldam_plugins.losses.reweighting import apply_stage

warn_moved(__name__, "ldam_plugins.losses.reweighting")
enter_stage = apply_stage  # its name then
