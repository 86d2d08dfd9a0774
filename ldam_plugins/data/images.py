"""Labelled images of any known layout, decoded when asked for."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from torch.utils.data import Dataset

from ldam_plugins._validation import check_int, invalid, quoted
from ldam_plugins.data.notes import DataNotes
from ldam_plugins.data.readers import read_images
from ldam_plugins.data.readers.base import ImageRequest, ImageRows, ImageSource
from ldam_plugins.data.splits import (
    TEST_PART,
    TRAIN_PART,
    Examples,
    as_part,
    hold_out,
    note_shared_groups,
)

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
        groups: What each example belongs to, such as a patient or a camera, as text (N,).
        transform: What ``dataset[i]`` does to the RGB image; may be set at any time.

    Attributes:
        labels: Class index of each example, int64 (N,), read-only.
        class_names: The name of each class, in class order.
        groups: As given.
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
        groups: np.ndarray | None = None,
        transform: Callable[[Image.Image], Any] | None = None,
    ) -> None:
        self.source = source
        self.rows = np.arange(len(source), dtype=np.int64) if rows is None else rows
        self.labels = _integers("labels", labels)
        self.class_names = tuple(class_names)
        self.groups = groups
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

    def examples(self) -> Examples:
        """The name, class and group of each example, for what divides and records them."""
        names = getattr(self.source, "names", None)
        called = self.source.describe if names is None else names.__getitem__
        return Examples(
            [called(row) for row in self.rows.tolist()], self.labels, self.class_names, self.groups
        )

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
            groups=None if self.groups is None else self.groups[kept],
            transform=self.transform,
        )

    def of_classes(self, classes: np.ndarray) -> LabelledImages:
        """The examples of some of the classes, which are numbered anew in the order given."""
        place = np.full(len(self.class_names), -1)
        place[classes] = np.arange(len(classes))
        kept = self.subset(np.flatnonzero(place[self.labels] >= 0))
        names = [self.class_names[label] for label in classes]
        return LabelledImages(
            kept.source,
            place[kept.labels],
            names,
            rows=kept.rows,
            groups=kept.groups,
            transform=kept.transform,
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
    test_split: float | str | None = None,
    train_list: str | os.PathLike[str] | None = None,
    test_list: str | os.PathLike[str] | None = None,
    group_column: str | None = None,
    encoding: str | None = None,
    delimiter: str | None = None,
    skip_empty: bool = False,
    split_file: str | os.PathLike[str] | None = None,
    seed: int = 0,
    min_kept: int = 1,
    cache_dir: str | os.PathLike[str] | None = None,
    notes: DataNotes | None = None,
) -> tuple[LabelledImages, LabelledImages]:
    """Load the training and the test images of a data set, in the same order on every machine.

    What ``dataset`` may be:

    * ``"digits"``: the 8 x 8 digits of scikit-learn, of each class 120 drawn with a fixed seed
      for training and 54 for testing (the 57 left over would unbalance the test);
    * a hub id, or a local folder of parquet files as the hub serves them. The columns are the
      one of type Image and the one of type ClassLabel (``label`` or ``fine_label`` of several); a
      split may be a slice of one as in ``datasets``: ``"train[:10%]"``;
    * a folder ``train/<class>/...`` and ``test/<class>/...``, the classes in natural order, ``2``
      before ``10``, as timm's reader numbers them (torchvision sorts them as text); also
      ``Train``, ``training``, ``Valid`` and the like, or ``<class>/...`` alone with a share for
      ``test_split``, and all of it once more in a folder, as archives are unpacked;
    * Tiny ImageNet's own folder (``wnids.txt``, ``val/val_annotations.txt``);
    * a folder with iNaturalist's ``train2018.json`` and ``val2018.json``, or those of another year
      or of camera traps in COCO's form: several boxes of one class in an image are one label;
    * a folder with images and a CSV, TSV, JSON Lines or parquet file of their names and labels, or
      that file: columns of any name, ids without extension, names as the web leaves them, a column
      of 0 and 1 a class. ``train.csv`` and ``test.csv`` or a column ``split`` give the parts; or
      one file of lines ``relative/path.jpg 17`` beside the images;
    * the folder that the paths in ``train_list`` and ``test_list`` are relative to: two files of
      lines ``relative/path.jpg 17``, two tables with a header such as ``image,label``, or two such
      JSON files.

    Data that exceed the disk are for :func:`~ldam_plugins.data.stream_images`. HEIC and HEIF images
    need the package pillow-heif. Names that differ in the Unicode normal form only are one name.

    Args:
        dataset: One of the above.
        image_column: The column of images, or of their names. Default: the only one of type Image,
            or whose values are names of files that are there.
        label_column: The column of labels: class labels, integers, truths or text. Default: that of
            type ClassLabel; of a table of names the one called ``label`` or the like, or the only
            one of few values.
        train_split: The split or folder to train on.
        test_split: The one to test on, or the share in (0, 1) of the training split's examples that
            is held out to test on, see :func:`~ldam_plugins.data.stratified_split`. Default: the
            first there is of test, validation, valid and val.
        train_list: List, table or JSON file of the training images.
        test_list: List, table or JSON file of the test images.
        group_column: Column of a table that tells what belongs together, such as a patient or a
            camera: no group is divided by a share that is held out.
        encoding: Of text files that are not UTF-8, such as ``"cp1252"`` or ``"utf-16"``.
        delimiter: What separates the fields of a CSV file. Default: a comma, semicolon, tab or
            bar, whichever gives even rows.
        skip_empty: Leave out rows of a table without a file or label instead of stopping.
        split_file: A ``split.csv`` that a run left: what it tests on is tested on, in place of a
            share.
        seed: Of the choice of a share, in 0..2**32 - 1.
        min_kept: Examples that a class keeps for training, if it has more; 2 where a share of them
            is to be held out, too.
        cache_dir: Where the hub's files are kept; only the hub uses it.
        notes: Gets what was decided, noticed and left out; without it ``logging`` does.

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
        **as_part("test_split", test_split, split_file),
        train_list=None if train_list is None else _as_text("train_list", train_list),
        test_list=None if test_list is None else _as_text("test_list", test_list),
        group_column=group_column,
        encoding=encoding,
        delimiter=delimiter,
        skip_empty=skip_empty,
        cache_dir=None if cache_dir is None else _as_text("cache_dir", cache_dir),
        notes=DataNotes() if notes is None else notes,
    )
    train_rows, test_rows = read_images(request)
    train = _of_rows(train_rows)
    if test_rows is None:
        kept, held_out = hold_out(
            train.examples(),
            request.test_share or 0,
            seed=seed,
            min_kept=min_kept,
            notes=request.notes,
            split_file=_as_file(split_file),
        )
        train, test = train.subset(kept), train.subset(held_out)
        request.notes.divided = {TRAIN_PART: train.examples(), TEST_PART: test.examples()}
    else:
        test = _of_same_classes(test_rows, train.class_names)
        split = request.notes.parts.get("test_split", "test")
        note_shared_groups(train.examples(), test.examples(), split, request.notes)
    if notes is None:
        request.notes.log()
    return train, test


def _as_file(value: str | os.PathLike[str] | None) -> str | None:
    return None if value is None else _as_text("split_file", value)


def _of_same_classes(test: ImageRows, class_names: tuple[str, ...]) -> LabelledImages:
    if class_names != test.class_names:
        odd = quoted(sorted(set(class_names) ^ set(test.class_names))) or "their order"
        raise ValueError(f"the classes to train on and to test on must be equal, not so: {odd}")
    return _of_rows(test)


def _of_rows(split: ImageRows) -> LabelledImages:
    return LabelledImages(
        split.source, split.labels, split.class_names, rows=split.rows, groups=split.groups
    )


def _integers(name: str, values: Sequence[int] | np.ndarray) -> np.ndarray:
    array = np.asarray(values)
    if array.size and (array.dtype.kind not in "iu" or array.ndim != 1):
        raise invalid(name, "a sequence of integers", array.dtype.name, error=TypeError)
    return np.array(array, dtype=np.int64)


def _as_text(name: str, value: str | os.PathLike[str]) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise invalid(name, "a name or a path", value, error=TypeError)
    return os.fspath(value)
