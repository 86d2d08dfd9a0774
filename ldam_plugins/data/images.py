"""Labelled images of any known layout, decoded when asked for."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from torch.utils.data import Dataset

from ldam_plugins._validation import check_int, invalid, quoted
from ldam_plugins.data.readers import read_images
from ldam_plugins.data.readers.base import ImageRequest, ImageSource

if TYPE_CHECKING:
    from PIL import Image

_BLOCK = 64
_EXHAUSTED = (errno.EMFILE, errno.ENFILE)
_Result = TypeVar("_Result")


class LabelledImages(Dataset[tuple[Any, int]]):
    """Images of one split, decoded when asked for, and their labels, known from the start.

    Args:
        source: Where the pixels are.
        labels: Class index of each example, int64 (N,).
        class_names: The name of each class.
        rows: Row of ``source`` that each example is. Default: all rows in order.
        transform: What ``dataset[i]`` does to the RGB image; may be set at any time.

    Attributes:
        labels: Class index of each example, int64 (N,), read-only.
        class_names: The name of each class, in class order.
        transform: As given.

    Raises:
        TypeError: ``labels`` are not integers.
        ValueError: there are no examples, lengths differ, or a label is not a class.
    """

    def __init__(
        self,
        source: ImageSource,
        labels: np.ndarray,
        class_names: Sequence[str],
        *,
        rows: np.ndarray | None = None,
        transform: Callable[[Image.Image], Any] | None = None,
    ) -> None:
        self.source = source
        self.rows = np.arange(len(source), dtype=np.int64) if rows is None else rows
        self.labels = _integers("labels", labels)
        self.class_names = tuple(class_names)
        self.transform = transform
        if len(self.labels) != len(self.rows):
            expected = f"one label for each of the {len(self.rows)} images"
            raise invalid("labels", expected, f"{len(self.labels)} labels")
        if len(self.labels) == 0:
            raise invalid("labels", "those of at least one image", "none")
        check_int("labels.min()", int(self.labels.min()), low=0)
        check_int("labels.max()", int(self.labels.max()), high=len(self.class_names) - 1)
        self.labels.flags.writeable = False

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.image(index)
        return image if self.transform is None else self.transform(image), int(self.labels[index])

    def image(self, index: int) -> Image.Image:
        """Decode one example to an RGB image, untransformed.

        Raises:
            ValueError: the image cannot be decoded; the message names it.
        """
        row = int(self.rows[index])
        try:
            return self.source.read(row)
        except Exception as error:  # decoders raise nearly any exception for damaged bytes
            if isinstance(error, OSError) and error.errno in _EXHAUSTED:
                raise
            hint = "repair or remove it, or leave such images out with --skip_corrupt"
            message = f"image {self.source.describe(row)} cannot be read ({error}); {hint}"
            raise ValueError(message) from error

    def describe(self, index: int) -> str:
        """Name one example for a message: its path, or its row and split."""
        return self.source.describe(int(self.rows[index]))

    def subset(self, indices: Sequence[int] | np.ndarray) -> LabelledImages:
        """Keep the examples ``indices`` of this set, in that order.

        Raises:
            TypeError: ``indices`` are not integers.
            ValueError: an index is not in ``0..len - 1``.
        """
        kept = self._indices(indices)
        return LabelledImages(
            self.source,
            self.labels[kept],
            self.class_names,
            rows=self.rows[kept],
            transform=self.transform,
        )

    def without(self, indices: Sequence[int] | np.ndarray) -> LabelledImages:
        """Leave the examples ``indices`` out, with the errors of ``subset``."""
        kept = np.ones(len(self), dtype=bool)
        kept[self._indices(indices)] = False
        return self.subset(np.flatnonzero(kept))

    def find_corrupt(self, progress: bool = False) -> list[int]:
        """Decode every image once, in threads, and list the indices of those that fail."""
        found = map_in_threads(len(self), self._corrupt_among, progress=progress)
        return [index for indices in found for index in indices]

    def _corrupt_among(self, indices: range) -> list[int]:
        corrupt = []
        for index in indices:
            try:
                self.image(index)
            except ValueError:
                corrupt.append(index)
        return corrupt

    def _indices(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        array = _integers("indices", indices)
        if len(array):
            check_int("indices.min()", int(array.min()), low=0)
            check_int("indices.max()", int(array.max()), high=len(self) - 1)
        return array


def map_in_threads(
    count: int, work: Callable[[range], _Result], *, progress: bool = False
) -> Iterator[_Result]:
    """Call ``work`` with blocks of indices ``0..count - 1`` in threads; give results in order."""
    from tqdm.contrib.concurrent import thread_map

    blocks = [range(start, min(start + _BLOCK, count)) for start in range(0, count, _BLOCK)]
    hidden = not progress
    return iter(thread_map(work, blocks, unit=" blocks", disable=hidden, leave=False, delay=1))


def load_images(
    dataset: str | os.PathLike[str],
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    train_list: str | os.PathLike[str] | None = None,
    test_list: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> tuple[LabelledImages, LabelledImages]:
    """Load the training and the test images of a data set, in the same order on every machine.

    What ``dataset`` may be:

    * ``"digits"``: the 8 x 8 digits of scikit-learn, of each class 120 drawn with a fixed seed
      for training and 54 for testing (the 57 left over would unbalance the test);
    * a hub id, or a local folder of parquet files as the hub serves them. The columns are the
      one of type Image and the one of type ClassLabel (``label`` or ``fine_label`` of several); a
      split may be a slice of one as in ``datasets``: ``"train[:10%]"``;
    * a folder ``train/<class>/...`` and ``test/<class>/...``, the classes in natural order, ``2``
      before ``10``, as timm's reader numbers them (torchvision sorts them as text);
    * Tiny ImageNet's own folder (``wnids.txt``, ``val/val_annotations.txt``);
    * a folder with iNaturalist's ``train2018.json`` and ``val2018.json``, or those of another year
      or of camera traps in COCO's form: several boxes of one class in an image are one label;
    * the folder that the paths in ``train_list`` and ``test_list`` are relative to: two files of
      lines ``relative/path.jpg 17``, or two such JSON files.

    Names that differ in the Unicode normal form only are one name.

    Args:
        dataset: One of the above.
        image_column: The image column of a hub dataset. Default: the only one of type Image.
        label_column: The label column of a hub dataset. Default: that of type ClassLabel.
        train_split: The split or folder to train on.
        test_split: The one to test on. Default: the first there is of test, validation, valid and
            val.
        train_list: List or JSON file of the training images.
        test_list: List or JSON file of the test images.
        cache_dir: Where the hub's files are kept; only the hub uses it.

    Raises:
        ConnectionError: the hub cannot be reached.
        TypeError: ``dataset`` is neither text nor a path.
        ValueError: no known layout, with those that are known and what is there; a bad line or
            entry, with its place; an option that means nothing for this kind of data set.

    Example:
        >>> train, test = load_images("digits")
        >>> len(train), len(test), train.class_names[:3]
        (1200, 540, ('0', '1', '2'))
        >>> image, label = train[0]
        >>> image.size, image.mode, label
        ((8, 8), 'RGB', 0)
    """
    request = ImageRequest(
        dataset=_as_text("dataset", dataset),
        image_column=image_column,
        label_column=label_column,
        train_split=train_split,
        test_split=test_split,
        train_list=None if train_list is None else _as_text("train_list", train_list),
        test_list=None if test_list is None else _as_text("test_list", test_list),
        cache_dir=None if cache_dir is None else _as_text("cache_dir", cache_dir),
    )
    train, test = read_images(request)
    if train.class_names != test.class_names:
        odd = quoted(sorted(set(train.class_names) ^ set(test.class_names))) or "their order"
        raise ValueError(f"the classes to train on and to test on must be equal, not so: {odd}")
    return LabelledImages(*train), LabelledImages(*test)


def _integers(name: str, values: Sequence[int] | np.ndarray) -> np.ndarray:
    array = np.asarray(values)
    if array.size and (array.dtype.kind not in "iu" or array.ndim != 1):
        raise invalid(name, "a sequence of integers", array.dtype.name, error=TypeError)
    return np.array(array, dtype=np.int64)


def _as_text(name: str, value: str | os.PathLike[str]) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise invalid(name, "a name or a path", value, error=TypeError)
    return os.fspath(value)
