"""Labelled images and texts that are read as a stream, for data that exceed the disk.

A stream has no random access, so its *rows* are what a sampler gives: the training process reads
them in order, shuffled by a buffer, and the data set turns a row into an example. All else is as
with other data sets: worker processes decode, Accelerate and the Trainer give each process its
batches, and every row is trained on once an epoch.
"""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

import numpy as np
from torch.utils.data import Dataset, Sampler

from ldam_plugins._validation import check_int, invalid
from ldam_plugins.counts import ClassCounts
from ldam_plugins.data.notes import DataNotes
from ldam_plugins.data.readers.base import (
    LABEL,
    TEXT,
    ImageRequest,
    TextRequest,
    decode_image,
    stored_bytes,
    text_features,
)
from ldam_plugins.data.readers.hub_streams import GivenCounts, StreamedSplit, read_streams

if TYPE_CHECKING:
    from datasets import Features
    from PIL import Image

_Example = TypeVar("_Example")
IMAGE_BUFFER, TEXT_BUFFER = 1000, 10_000
"""Rows that are shuffled at a time unless told: files of images, texts."""


class StreamedRow(NamedTuple):
    """One row: an image file as ``datasets`` stores it or a text, and the class index."""

    content: Any
    label: int


class StreamedRows(Sampler[StreamedRow]):
    """The rows of a stream, once each, in an order that follows from seed and epoch.

    To be given to a ``DataLoader`` as its ``sampler``. ``datasets`` shuffles the order of the files
    and, in a buffer, that of the rows. Every process of a training reads the whole stream and keeps
    the rows of its own batches, so the processes see disjoint rows and the same number of batches.
    A training that resumes inside an epoch reads the rows up to there again, undecoded.

    Args:
        split: What is read.
        shuffle_buffer: Rows that are shuffled at a time; 0: their order is that of the files.
        seed: Of the order.

    Raises:
        ValueError: at the end of an epoch, if the rows of a class were not as many as known.
    """

    def __init__(self, split: StreamedSplit, shuffle_buffer: int = 0, seed: int = 0) -> None:
        self.split = split
        self.shuffle_buffer = check_int("shuffle_buffer", shuffle_buffer, low=0)
        self.seed = check_int("seed", seed, low=0)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the 0-based epoch whose order is read next."""
        self.epoch = check_int("epoch", epoch, low=0)

    def __len__(self) -> int:
        return int(self.split.counts.sum())

    def __iter__(self) -> Iterator[StreamedRow]:
        table = self.split.table
        if self.shuffle_buffer:
            table = table.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer)
            table.set_epoch(self.epoch)
        found = np.zeros_like(self.split.counts)
        for row in table:
            label = self.split.class_of(row)
            if label is not None:
                found[label] += 1
                if found[label] > self.split.counts[label]:
                    break
                yield StreamedRow(row[self.split.content], label)
        self._check(found)

    def _check(self, found: np.ndarray) -> None:
        apart = np.flatnonzero(found != self.split.counts)
        if len(apart):
            label = int(apart[0])
            known = self.split.counts[label]
            more = "more" if found[label] > known else f"{found[label]}"
            hint = "Leave class_counts out, and one pass counts the rows."
            shown = f"{known} of {self.split.class_names[label]!r}, where there are {more}"
            expected = f"the rows of split {self.split.name}"
            raise invalid("class_counts", expected, shown, hint=hint)


class LabelledStream(Dataset[_Example], Generic[_Example]):
    """Examples of a stream: ``stream[row]`` of a row of ``stream.rows``, or one after the other.

    Attributes:
        rows: The sampler of its rows.
        class_names: The name of each class.
    """

    def __init__(self, rows: StreamedRows) -> None:
        self.rows = rows
        self.class_names = rows.split.class_names

    @property
    def counts(self) -> np.ndarray:
        """Rows of each class, int64 (C,)."""
        return self.rows.split.counts

    @property
    def class_counts(self) -> ClassCounts:
        """Rows of each class, with their names.

        Raises:
            ValueError: a class has none, as one may in a split to test on.
        """
        return ClassCounts(self.counts, self.class_names)

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[_Example]:
        return map(self.__getitem__, self.rows)

    def __getitem__(self, row: StreamedRow) -> _Example:
        if not isinstance(row, StreamedRow):
            hint = "A stream is read in order: write DataLoader(stream, sampler=stream.rows, ...)."
            raise invalid("row", "one of stream.rows", row, hint=hint, error=TypeError)
        return self._example(row)

    def _example(self, row: StreamedRow) -> _Example:
        raise NotImplementedError


class StreamedImages(LabelledStream[tuple[Any, int]]):
    """Images of one split, read as a stream: ``(image, label)``, decoded when asked for.

    Args:
        rows: Its rows.
        transform: What is done to the RGB image; may be set at any time.

    Attributes:
        groups: None; a stream has no groups.
    """

    groups = None

    def __init__(
        self, rows: StreamedRows, transform: Callable[[Image.Image], Any] | None = None
    ) -> None:
        super().__init__(rows)
        self.transform = transform

    def _example(self, row: StreamedRow) -> tuple[Any, int]:
        split = self.rows.split
        try:
            image = decode_image(io.BytesIO(stored_bytes(row.content, split.content, split.roots)))
        except Exception as error:  # decoders raise nearly any exception for damaged bytes
            path = (row.content or {}).get("path") or "without a name"
            which = f"an image ({path}, of class {split.class_names[row.label]!r})"
            message = f"{which} of split {split.name} cannot be read ({error}); repair or remove it"
            raise ValueError(message) from error
        return image if self.transform is None else self.transform(image), row.label


class StreamedTexts(LabelledStream[dict[str, Any]]):
    """Texts of one split, read as a stream: ``{"text": ..., "label": ...}``.

    Args:
        rows: Its rows.
        transform: Gives the columns that stand in place of the text, such as its tokens.
    """

    def __init__(
        self, rows: StreamedRows, transform: Callable[[str], dict[str, Any]] | None = None
    ) -> None:
        super().__init__(rows)
        self.transform = transform

    @property
    def features(self) -> Features:
        """Types of the columns, as of the tables that :func:`.load_texts` gives."""
        return text_features(self.class_names)

    def map(self, transform: Callable[[str], dict[str, Any]]) -> StreamedTexts:
        """The same texts through a transform."""
        texts = copy.copy(self)
        texts.transform = transform
        return texts

    def _example(self, row: StreamedRow) -> dict[str, Any]:
        columns = {TEXT: row.content} if self.transform is None else self.transform(row.content)
        return {**columns, LABEL: row.label}


def stream_images(
    dataset: str | os.PathLike[str],
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    class_counts: GivenCounts | None = None,
    shuffle_buffer: int = IMAGE_BUFFER,
    skip_empty: bool = False,
    seed: int = 0,
    progress: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
    notes: DataNotes | None = None,
) -> tuple[StreamedImages, StreamedImages]:
    """The training and the test images of a data set that is read as a stream, never kept whole.

    The rows of each class are counted in one pass over both splits, unless those to train on are
    given; of parquet files it reads the labels only.

    Args:
        dataset: A hub id, or a local folder laid out like one: what ``datasets.load_dataset(...,
            streaming=True)`` reads.
        image_column: As in :func:`~ldam_plugins.data.load_images`, and so the next three.
        label_column: Column of the labels.
        train_split: The split to train on.
        test_split: The one to test on. A stream is not divided, so it is no share.
        class_counts: Training rows of each class: by name, or in class order.
        shuffle_buffer: Training rows that are shuffled at a time; their files are in memory.
        skip_empty: Leave out rows without a label instead of stopping.
        seed: Of the order of the training rows.
        progress: Whether counting shows a bar.
        cache_dir: Where small files of the hub are kept.
        notes: Gets what was decided, noticed and left out; without it ``logging`` does.

    Raises:
        ConnectionError: the hub cannot be reached.
        ValueError: no such data set, split or column, a column that holds no classes, or
            ``class_counts`` of other classes; while it is read: other rows than counted.
    """
    request = ImageRequest(
        dataset=os.fspath(dataset),
        image_column=image_column,
        label_column=label_column,
        train_split=train_split,
        test_split=test_split,
        skip_empty=skip_empty,
        cache_dir=None if cache_dir is None else os.fspath(cache_dir),
        notes=DataNotes() if notes is None else notes,
    )
    train, test = _rows(request, class_counts, shuffle_buffer, seed, progress, notes is None)
    return StreamedImages(train), StreamedImages(test)


def stream_texts(
    dataset: str | os.PathLike[str],
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    class_counts: GivenCounts | None = None,
    shuffle_buffer: int = TEXT_BUFFER,
    skip_empty: bool = False,
    seed: int = 0,
    progress: bool = False,
    notes: DataNotes | None = None,
) -> tuple[StreamedTexts, StreamedTexts]:
    """The training and the test texts of a data set that is read as a stream, never kept whole.

    Like :func:`stream_images`, with ``text_column`` as in :func:`~ldam_plugins.data.load_texts`.
    The pass that counts reads the texts, too, to find rows without one. A ``transformers.Trainer``
    takes such texts with :class:`.StreamingTrainer`.
    """
    request = TextRequest(
        dataset=os.fspath(dataset),
        text_column=text_column,
        label_column=label_column,
        train_split=train_split,
        test_split=test_split,
        skip_empty=skip_empty,
        notes=DataNotes() if notes is None else notes,
    )
    train, test = _rows(request, class_counts, shuffle_buffer, seed, progress, notes is None)
    return StreamedTexts(train), StreamedTexts(test)


def _rows(
    request: ImageRequest | TextRequest,
    class_counts: GivenCounts | None,
    shuffle_buffer: int,
    seed: int,
    progress: bool,
    log: bool,
) -> tuple[StreamedRows, StreamedRows]:
    check_int("shuffle_buffer", shuffle_buffer, low=1)
    check_int("seed", seed, low=0)
    train, test = read_streams(
        request, class_counts=class_counts, shuffle_buffer=shuffle_buffer, progress=progress
    )
    if log:
        request.notes.log()
    return StreamedRows(train, shuffle_buffer, seed), StreamedRows(test)
