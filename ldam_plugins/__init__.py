"""LDAM loss and deferred re-weighting for timm with Accelerate and the Hugging Face Trainer."""

from importlib import import_module
from typing import TYPE_CHECKING

from ldam_plugins._lazy import lazy_names

if TYPE_CHECKING:
    from ldam_plugins.counts import ClassCounts
    from ldam_plugins.data.long_tail import long_tail_counts, long_tail_indices
    from ldam_plugins.heads import fold_cosine_head, use_cosine_head
    from ldam_plugins.integrations.hf_evaluate import LongTailMetrics
    from ldam_plugins.integrations.timm import LongTailTask
    from ldam_plugins.integrations.transformers import DRWCallback, RebalanceCallback
    from ldam_plugins.losses import LDAMLoss, create_loss, list_losses
    from ldam_plugins.schedules import DeferredSchedule, Progress

__version__ = "0.1.0"

__all__ = [
    "ClassCounts",
    "DRWCallback",
    "DeferredSchedule",
    "LDAMLoss",
    "LongTailMetrics",
    "LongTailTask",
    "Progress",
    "RebalanceCallback",
    "create_loss",
    "fold_cosine_head",
    "list_losses",
    "long_tail_counts",
    "long_tail_indices",
    "register",
    "use_cosine_head",
]

# Without torch, which takes seconds to import, the command line of a recipe answers at once.
_MODULES = ("counts", "data", "heads", "losses", "metrics", "samplers", "schedules")
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        **{name: f"ldam_plugins.{name}" for name in _MODULES},
        "ClassCounts": "ldam_plugins.counts",
        "DeferredSchedule": "ldam_plugins.schedules",
        "LDAMLoss": "ldam_plugins.losses",
        "Progress": "ldam_plugins.schedules",
        "create_loss": "ldam_plugins.losses",
        "fold_cosine_head": "ldam_plugins.heads",
        "list_losses": "ldam_plugins.losses",
        "long_tail_counts": "ldam_plugins.data.long_tail",
        "long_tail_indices": "ldam_plugins.data.long_tail",
        "use_cosine_head": "ldam_plugins.heads",
        "DRWCallback": "ldam_plugins.integrations.transformers",
        "RebalanceCallback": "ldam_plugins.integrations.transformers",
        "LongTailMetrics": "ldam_plugins.integrations.hf_evaluate",
        "LongTailTask": "ldam_plugins.integrations.timm",
    },
)


def register() -> None:
    """Make the package's models known to timm and its losses to transformers.

    Afterwards ``timm.create_model("cifar_resnet32")`` and ``config.loss_type = "LDAM"`` work.
    Importing the plugins does the same; calling it twice changes nothing.
    """
    for host in ("timm", "transformers"):
        import_module(f"ldam_plugins.integrations.{host}").register()
