"""The old path of ``ldam_plugins.integrations.transformers.fast_attention``."""

from ldam_plugins._moved import warn_moved
from ldam_plugins.integrations.transformers.fast_attention import *  # noqa: F403

warn_moved(__name__, "ldam_plugins.integrations.transformers.fast_attention")
