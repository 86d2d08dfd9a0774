"""The 8 x 8 digits that scikit-learn holds: a data set that needs no file and no network."""

from __future__ import annotations

import numpy as np

from ldam_plugins.data.readers.base import ArraySource, ImageRequest, ImageRows, Reader

_NAME = "digits"
_TRAIN, _TEST = 120, 54  # per class, of 174 to 183
_SEED = 0


def _accepts(request: ImageRequest) -> bool:
    return request.dataset == _NAME and not request.is_listed


DIGITS = Reader(
    name="embedded digits",
    layout=f"{_NAME!r}",
    options=(),
    accepts=_accepts,
    read=lambda request: read_digits(),
    is_name=True,
)


def read_digits() -> tuple[ImageRows, ImageRows]:
    """Draw 120 digits of each class for training and 54 for testing, with a fixed seed.

    The 57 that are left would make the test set unbalanced.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    names = tuple(str(name) for name in digits.target_names)
    random = np.random.RandomState(_SEED)
    rows = [random.permutation(np.flatnonzero(digits.target == c)) for c in range(len(names))]

    def split(name: str, part: slice) -> ImageRows:
        kept = np.sort(np.concatenate([of_class[part] for of_class in rows]))
        source = ArraySource(pixels[kept], f"split {name} of {_NAME}")
        return ImageRows(source, digits.target[kept].astype(np.int64), names)

    return split("train", slice(_TRAIN)), split("test", slice(_TRAIN, _TRAIN + _TEST))
