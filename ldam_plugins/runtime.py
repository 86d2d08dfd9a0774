"""The old path of what :mod:`ldam_plugins.training` exports."""

from ldam_plugins._moved import warn_moved
from ldam_plugins.training.checkpoints import *  # noqa: F403
from ldam_plugins.training.distributed import *  # noqa: F403
from ldam_plugins.training.environment import *  # noqa: F403
from ldam_plugins.training.preemption import *  # noqa: F403

warn_moved(__name__, "ldam_plugins.training")
