"""LDAM loss and deferred re-weighting for timm with Accelerate and the Hugging Face Trainer."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ldam_plugins.counts import ClassCounts
from ldam_plugins.data.long_tail import long_tail_counts, long_tail_indices
from ldam_plugins.heads import fold_cosine_head, use_cosine_head
from ldam_plugins.losses import LDAMLoss, create_loss, list_losses
from ldam_plugins.schedules import DeferredSchedule

if TYPE_CHECKING:
    from ldam_plugins.evaluate_metric import LongTailMetrics
    from ldam_plugins.hf_plugin import DRWCallback
    from ldam_plugins.timm_plugin import LongTailTask

__version__ = "0.1.0"

__all__ = [
    "ClassCounts",
    "DRWCallback",
    "DeferredSchedule",
    "LDAMLoss",
    "LongTailMetrics",
    "LongTailTask",
    "create_loss",
    "fold_cosine_head",
    "list_losses",
    "long_tail_counts",
    "long_tail_indices",
    "register",
    "use_cosine_head",
]

_LAZY = {
    "DRWCallback": "ldam_plugins.hf_plugin",
    "LongTailMetrics": "ldam_plugins.evaluate_metric",
    "LongTailTask": "ldam_plugins.timm_plugin",
}


def register() -> None:
    """Make the package's models known to timm and its losses to transformers.

    Afterwards ``timm.create_model("cifar_resnet32")`` and ``config.loss_type = "LDAM"`` work.
    Importing the plugins does the same; calling it twice changes nothing.
    """
    for plugin in ("ldam_plugins.timm_plugin", "ldam_plugins.hf_plugin"):
        import_module(plugin).register()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
