"""LDAM loss and deferred re-weighting for timm with Accelerate and the Hugging Face Trainer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ldam_plugins.counts import ClassCounts
from ldam_plugins.data.long_tail import long_tail_counts, long_tail_indices
from ldam_plugins.heads import fold_cosine_head, use_cosine_head
from ldam_plugins.losses import LDAMLoss, create_loss, list_losses
from ldam_plugins.schedules import DeferredSchedule, Progress

if TYPE_CHECKING:
    from ldam_plugins.integrations.hf_evaluate import LongTailMetrics
    from ldam_plugins.integrations.timm import LongTailTask
    from ldam_plugins.integrations.transformers import DRWCallback

__version__ = "0.1.0"

__all__ = [
    "ClassCounts",
    "DRWCallback",
    "DeferredSchedule",
    "LDAMLoss",
    "LongTailMetrics",
    "LongTailTask",
    "Progress",
    "create_loss",
    "fold_cosine_head",
    "list_losses",
    "long_tail_counts",
    "long_tail_indices",
    "register",
    "use_cosine_head",
]

_LAZY = {
    "DRWCallback": "ldam_plugins.integrations.transformers",
    "LongTailMetrics": "ldam_plugins.integrations.hf_evaluate",
    "LongTailTask": "ldam_plugins.integrations.timm",
}


def register() -> None:
    """Make the package's models known to timm and its losses to transformers.

    Afterwards ``timm.create_model("cifar_resnet32")`` and ``config.loss_type = "LDAM"`` work.
    Importing the plugins does the same; calling it twice changes nothing.
    """
    for host in ("timm", "transformers"):
        import_module(f"ldam_plugins.integrations.{host}").register()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
