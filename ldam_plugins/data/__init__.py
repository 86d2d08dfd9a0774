"""Data sets of images and texts, their labels, the cut to a long tail, and splits."""

from typing import TYPE_CHECKING

from ldam_plugins._lazy import lazy_names
from ldam_plugins.data.long_tail import long_tail_counts, long_tail_indices
from ldam_plugins.data.splits import SingleSampleWarning, stratified_split

if TYPE_CHECKING:
    from ldam_plugins.data.audit import Audit, audit_images, audit_texts
    from ldam_plugins.data.images import LabelledImages, load_images, map_in_threads
    from ldam_plugins.data.streams import stream_images, stream_texts
    from ldam_plugins.data.texts import load_texts

__all__ = [
    "Audit",
    "LabelledImages",
    "SingleSampleWarning",
    "audit_images",
    "audit_texts",
    "load_images",
    "load_texts",
    "long_tail_counts",
    "long_tail_indices",
    "map_in_threads",
    "stratified_split",
    "stream_images",
    "stream_texts",
]

# Readers need libraries that `import ldam_plugins` does without.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Audit": "ldam_plugins.data.audit",
        "LabelledImages": "ldam_plugins.data.images",
        "audit_images": "ldam_plugins.data.audit",
        "audit_texts": "ldam_plugins.data.audit",
        "load_images": "ldam_plugins.data.images",
        "load_texts": "ldam_plugins.data.texts",
        "map_in_threads": "ldam_plugins.data.images",
        "stream_images": "ldam_plugins.data.streams",
        "stream_texts": "ldam_plugins.data.streams",
    },
)
