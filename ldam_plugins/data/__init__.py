"""Data sets of images and texts, their labels, and the cut to a long tail."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ldam_plugins.data.long_tail import long_tail_counts, long_tail_indices

if TYPE_CHECKING:
    from ldam_plugins.data.images import LabelledImages, load_images, map_in_threads
    from ldam_plugins.data.texts import load_texts

__all__ = [
    "LabelledImages",
    "load_images",
    "load_texts",
    "long_tail_counts",
    "long_tail_indices",
    "map_in_threads",
]

# Readers need libraries that `import ldam_plugins` does without.
_LAZY = {
    "LabelledImages": "ldam_plugins.data.images",
    "load_images": "ldam_plugins.data.images",
    "load_texts": "ldam_plugins.data.texts",
    "map_in_threads": "ldam_plugins.data.images",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
