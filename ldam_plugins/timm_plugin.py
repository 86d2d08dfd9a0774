"""The old path of ``ldam_plugins.integrations.timm``."""

from ldam_plugins._moved import warn_moved
from ldam_plugins.integrations.timm import *  # noqa: F403

warn_moved(__name__, "ldam_plugins.integrations.timm")
