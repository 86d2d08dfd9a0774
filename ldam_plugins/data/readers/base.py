"""What a reader is, what it is asked for, and what it gives.

A reader knows one layout of data sets. It recognises a request for a data set of that layout and
reads the labels of the training and the test split. Images are decoded later, one at a time, by
the :class:`ImageSource` that a reader gives.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from ldam_plugins._validation import check_choice, invalid, quoted
from ldam_plugins.data.readers.paths import is_inside

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from PIL import Image

TEST_SPLITS = ("test", "validation", "valid", "val")
"""Names of the test split in order of preference, for folders and tables alike."""
TEXT, LABEL = "text", "label"
"""Columns of the tables that readers of texts give."""
# Pillow tells formats apart by content, and some of the others (EPS) start external programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "JPEG2000", "PPM")


# Requests


@dataclass(frozen=True)
class Request:
    """The arguments that ``load_images`` and ``load_texts`` share, paths as text."""

    dataset: str
    label_column: str | None = None
    train_split: str = "train"
    test_split: str | None = None
    cache_dir: str | None = None

    @property
    def root(self) -> Path:
        """The data set as a folder."""
        return Path(self.dataset).expanduser()

    @property
    def is_folder(self) -> bool:
        """Whether the data set is a folder that exists."""
        return bool(self.dataset) and self.root.is_dir()


@dataclass(frozen=True)
class ImageRequest(Request):
    """The arguments of ``load_images``."""

    image_column: str | None = None
    train_list: str | None = None
    test_list: str | None = None

    @property
    def is_listed(self) -> bool:
        """Whether the images are those that two files list."""
        return self.train_list is not None or self.test_list is not None

    def listed_in(self) -> tuple[Path, Path]:
        """The two files that list the images.

        Raises:
            ValueError: one of them or the images' folder is missing, or only one is JSON.
        """
        if not self.root.is_dir():
            expected = "the folder that the listed paths are relative to"
            raise invalid("dataset", expected, self.dataset, hint="There is no such folder.")
        for name in ("train_list", "test_list"):
            if getattr(self, name) is None:
                raise invalid(name, "given, since the other list is", None)
        train, test = (Path(str(name)).expanduser() for name in (self.train_list, self.test_list))
        if is_json(train) != is_json(test):
            raise invalid("test_list", f"of the kind of {train.name}", test.name)
        return train, test


@dataclass(frozen=True)
class TextRequest(Request):
    """The arguments of ``load_texts``."""

    text_column: str | None = None
    skip_empty: bool = False


def is_json(file: str | Path | None) -> bool:
    """Whether a file is JSON by its name."""
    return file is not None and Path(file).suffix.lower() == ".json"


def default_test_split(available: Collection[str]) -> str | None:
    """The first of :data:`TEST_SPLITS` that there is; None if there is none."""
    return next((name for name in TEST_SPLITS if name in available), None)


def check_split(
    argument: str, name: str | None, available: Collection[str], request: Request
) -> str:
    """Return ``name`` if it is a split of the data set.

    Raises:
        ValueError: it is not; None stands for a test split that was not given and has no default.
    """
    if name is None:
        hint = f"None is named {', '.join(TEST_SPLITS)}."
        raise invalid(argument, f"one of {quoted(available)}", name, hint=hint)
    return check_choice(argument, name, available, hint=f"The data set is {request.dataset}.")


def pick_splits(request: Request, available: Collection[str]) -> tuple[str, str]:
    """Names of the split to train on and of the one to test on.

    Raises:
        ValueError: one of them is not there.
    """
    test_split = request.test_split or default_test_split(available)
    return (
        check_split("train_split", request.train_split, available, request),
        check_split("test_split", test_split, available, request),
    )


# Readers

_Request = TypeVar("_Request", bound=Request)
_Split = TypeVar("_Split")


@dataclass(frozen=True)
class Reader(Generic[_Request, _Split]):
    """One layout of data sets.

    Args:
        name: What the layout is called in messages.
        layout: How to recognise it, for the list of all layouts; ``{train_split}`` stands for the
            split that was asked for.
        options: Arguments that mean something for it, beside ``dataset`` and ``cache_dir``.
        accepts: Whether a request is for a data set of this layout. The first reader that accepts
            a request reads it.
        read: Gives the training and the test split, of images as :class:`ImageRows`, of texts as
            a ``datasets.Dataset`` (see :func:`text_table`).
        is_name: Whether the layout is one data set that is known by a name and needs no file.
    """

    name: str
    layout: str
    options: Collection[str]
    accepts: Callable[[_Request], bool]
    read: Callable[[_Request], tuple[_Split, _Split]]
    is_name: bool = False


class NoSuchDataset(Exception):
    """A reader's answer where there is no data set of that name; users see ``error`` with advice.

    Args:
        reason: Why, as the beginning of a sentence.
        error: Type of the error to tell the user.
    """

    def __init__(self, reason: str, error: type[Exception] = ValueError) -> None:
        super().__init__(reason)
        self.error = error


# Images


class ImageSource(Protocol):
    """Rows of images, each of which can be read and named; any error of ``read`` is the row's."""

    def __len__(self) -> int:
        """Count the rows."""

    def read(self, row: int) -> Image.Image:
        """Decode one row to an RGB image."""

    def describe(self, row: int) -> str:
        """Name one row for a message: a path, or a row and its split."""

    def stored(self, row: int) -> bytes | None:
        """The file of one row as it is stored; None if its pixels come from no file."""


class ImageRows(NamedTuple):
    """One split: a source, the int64 label of each of its rows, and the name of each class."""

    source: ImageSource
    labels: np.ndarray
    class_names: tuple[str, ...]


class FileSource:
    """Image files below one folder, by path relative to it."""

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root = str(root)
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def read(self, row: int) -> Image.Image:
        """Decode the file to an RGB image."""
        return decode_image(self.describe(row))

    def describe(self, row: int) -> str:
        """Name the file."""
        return os.path.join(self.root, self.names[row])

    def stored(self, row: int) -> bytes:
        """Read the file."""
        return Path(self.describe(row)).read_bytes()


class TableSource:
    """The image column of a ``datasets`` split, whose rows hold ``bytes``, else a ``path``.

    Args:
        table: The split, of which only ``column`` is kept, undecoded.
        column: The image column.
        split: The split's name, for messages.
        roots: Folders that a ``path`` may lead into; one that leads elsewhere is refused.
    """

    def __init__(self, table: Any, column: str, split: str, roots: Sequence[str]) -> None:
        from datasets import Image

        self.table = table.select_columns([column]).cast_column(column, Image(decode=False))
        self.column = column
        self.split = split
        self.roots = tuple(os.path.realpath(root) for root in roots)

    def __len__(self) -> int:
        return len(self.table)

    def read(self, row: int) -> Image.Image:
        """Decode the row to an RGB image."""
        return decode_image(io.BytesIO(self.stored(row)))

    def stored(self, row: int) -> bytes:
        """The bytes in the row, or those of the file that it names."""
        record = self.table[row][self.column]
        if record is None:
            raise ValueError(f"column {self.column!r} is empty here")
        if record["bytes"] is not None:
            return bytes(record["bytes"])
        path = os.path.realpath(record["path"])
        if not any(is_inside(path, root) for root in self.roots):
            raise ValueError(f"its path {record['path']!r} leads out of {', '.join(self.roots)}")
        return Path(path).read_bytes()

    def describe(self, row: int) -> str:
        """Name the row and its split."""
        return f"row {row} of split {self.split}"


class ArraySource:
    """Grey images held in memory as one ``uint8`` array (N, H, W)."""

    def __init__(self, pixels: np.ndarray, name: str) -> None:
        self.pixels = pixels
        self.name = name

    def __len__(self) -> int:
        return len(self.pixels)

    def read(self, row: int) -> Image.Image:
        """Give the row as an RGB image."""
        from PIL import Image

        return Image.fromarray(self.pixels[row]).convert("RGB")

    def describe(self, row: int) -> str:
        """Name the row and its set."""
        return f"row {row} of {self.name}"

    def stored(self, row: int) -> None:
        """There is no file."""


def decode_image(file: str | io.BytesIO) -> Image.Image:
    """Decode a file (a path or its bytes in memory) to RGB, pixels as stored.

    As in torchvision's and timm's loaders an alpha channel is dropped and an EXIF orientation is
    not applied; of an animation the first frame is taken.

    Raises:
        Exception: a damaged file; Pillow raises nearly any type.
        ValueError: pixels of 32 bits, which have no defined range.
    """
    with open_image(file) as image:
        return to_rgb(image)


def open_image(file: str | io.BytesIO) -> Image.Image:
    """Open an image of a format that is read, its pixels not decoded yet."""
    from PIL import Image

    return Image.open(file, formats=_FORMATS)


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode the pixels to RGB, as :func:`decode_image` says."""
    from PIL import Image

    # Pillow's own conversion of 16 bits clips at 255; its older releases open such a PNG as "I".
    if image.mode.startswith("I;16") or (image.format, image.mode) == ("PNG", "I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode!r} (32 bits) have no defined range")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


# Texts


def text_table(texts: Sequence[str], labels: np.ndarray, class_names: Sequence[str]) -> Dataset:
    """One split of texts: a table with the columns ``text`` and ``label``."""
    from datasets import Dataset

    columns = {TEXT: list(texts), LABEL: labels}
    return Dataset.from_dict(columns, features=text_features(class_names))


def text_features(class_names: Sequence[str]) -> Features:
    """Types of the columns of a :func:`text_table`."""
    from datasets import ClassLabel, Features, Value

    return Features({TEXT: Value("string"), LABEL: ClassLabel(names=list(class_names))})
