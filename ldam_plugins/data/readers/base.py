"""What a reader is, what it is asked for, and what it gives.

A reader knows one layout of data sets. It recognises a request for a data set of that layout and
reads the labels of the training and the test split. Images are decoded later, one at a time, by
the :class:`ImageSource` that a reader gives.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from ldam_plugins._validation import check_choice, invalid, quoted
from ldam_plugins.data.notes import DataNotes
from ldam_plugins.data.readers.paths import is_heif_name, is_inside

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from PIL import Image

TEST_SPLITS = ("test", "validation", "valid", "val")
"""Names of the test split in order of preference, for folders and tables alike."""
_ALSO_CALLED = {
    "train": ("training", "train_set", "training_set"),
    "test": ("testing", "test_set", "testing_set"),
    "validation": ("valid", "val", "dev", "validation_set", "val_set"),
}
"""What else people call a split, capitals aside."""
TEXT, LABEL, GROUP = "text", "label", "group"
"""Columns of the tables that readers of texts give."""
TABLE_OPTIONS = ("label_column", "group_column", "train_split", "test_split", "skip_empty")
"""Options of every reader of tables, beside the column of its images or texts."""
_ORIENTATION = 0x0112
"""The EXIF tag that says how a camera was held."""
# Pillow tells formats apart by content, and some of the others (EPS) start external programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "JPEG2000", "PPM")
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
"""What stands in bytes 8 to 12 of a HEIF file (ISO/IEC 23008-12), after ``ftyp``."""


# Requests


@dataclass(frozen=True)
class Request:
    """The arguments that ``load_images`` and ``load_texts`` share, paths as text.

    A reader gives None for the test split if ``test_share`` of the training split is to be held
    out; what it has to say goes into ``notes``.
    """

    dataset: str
    label_column: str | None = None
    train_split: str = "train"
    test_split: str | None = None
    test_share: float | None = None
    group_column: str | None = None
    skip_empty: bool = False
    encoding: str | None = None
    delimiter: str | None = None
    cache_dir: str | None = None
    notes: DataNotes = field(default_factory=DataNotes, compare=False)

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


def is_json(file: str | Path | None) -> bool:
    """Whether a file is JSON by its name."""
    return file is not None and Path(file).suffix.lower() == ".json"


def find_split(name: str, available: Collection[str]) -> str | None:
    """The split that ``name`` means: that one, else one in other letters or of the same meaning.

    ``train`` is also ``Train`` and ``training``, ``validation`` also ``Valid``, ``val`` and
    ``dev``. None if there is none, or several.
    """
    if name in available:
        return name
    same = [each for each in available if each.lower() == name.lower()]
    kind = split_kind(name)
    if not same and kind is not None:
        same = [each for each in available if split_kind(each) == kind]
    return same[0] if len(same) == 1 else None


def split_kind(name: str) -> str | None:
    """``train``, ``test`` or ``validation`` if a name stands for one of them."""
    plain = name.lower().replace("-", "_").replace(" ", "_")
    for kind, others in _ALSO_CALLED.items():
        if plain == kind or plain in others:
            return kind
    return None


def default_test_split(available: Collection[str]) -> str | None:
    """The first of :data:`TEST_SPLITS` that there is; None if there is none."""
    if test := find_split("test", available):
        return test
    exact = next((name for name in TEST_SPLITS if name in available), None)
    return exact or find_split("validation", available)


def check_split(
    argument: str, name: str | None, available: Collection[str], request: Request
) -> str:
    """The split of the data set that ``name`` means, see :func:`find_split`.

    Raises:
        ValueError: it is not; None stands for a test split that was not given and has no default.
    """
    if name is None:
        named = f"None is named {', '.join(TEST_SPLITS)}: "
        raise no_test_part(argument, f"one of {quoted(available)}", request, named)
    hint = f"The data set is {request.dataset}."
    found = find_split(name, available) or check_choice(argument, name, available, hint=hint)
    request.notes.parts[argument] = found
    return found


def say_columns(request: Request, where: str, certain: Collection[str] = ()) -> None:
    """Say which columns are read that were not asked for, but found; not those ``certain``."""
    found = {
        name: column
        for name, column in request.notes.columns.items()
        if getattr(request, name) is None and column not in certain
    }
    if found:
        shown = ", ".join(f"{column!r} as --{name}" for name, column in found.items())
        request.notes.say(f"Columns read from {where}: {shown}.")


def no_test_part(argument: str, expected: str, request: Request, why: str = "") -> Exception:
    """The error where nothing is there to test on, and nobody said what to hold out."""
    hint = "--test_split 0.2 (test_split=0.2) holds out a fifth of each class to test on."
    return invalid(argument, expected, request.test_split, hint=why + hint, error=NoTestPart)


def undivided(what: str, request: Request) -> Exception:
    """The error where all examples are one part, which no share was asked of."""
    expected = "given" if request.test_split is None else "a share in (0, 1)"
    return no_test_part("test_split", f"{expected}: {what}", request)


def pick_splits(request: Request, available: Collection[str]) -> tuple[str, str | None]:
    """Names of the split to train on and of the one to test on.

    The second is None if a share of the first is to be held out.

    Raises:
        ValueError: one of them is not there.
    """
    train = check_split("train_split", request.train_split, available, request)
    if request.test_share is not None:
        note_untested(request, train, available)
        return train, None
    test = request.test_split or default_test_split(available)
    test = check_split("test_split", test, available, request)
    if test == train:
        raise invalid("test_split", "another split than `train_split`", test)
    return train, test


def note_untested(request: Request, train: str, available: Collection[str]) -> None:
    """Note that there is a split to test on where a share of the training split stands for it."""
    test = default_test_split([name for name in available if name != train])
    if test is not None:
        what = f"Split {test} is there and is not what is tested on"
        request.notes.say(f"{what}: that is a share of {train}.")


def keep_known_classes(
    labels: np.ndarray,
    names: Sequence[str],
    known: Sequence[str],
    split: str,
    notes: DataNotes,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a test split whose class training has, and their labels by the training's order.

    Both what is left out and the classes that the test split lacks are noted.

    Args:
        labels: Index into ``names`` of each row.
        names: Classes of the test split.
        known: Classes of the training split.
        split: Name of the test split.
        notes: Where to note it.

    Raises:
        ValueError: no row is left.
    """
    place = {name: label for label, name in enumerate(known)}
    translated = np.array([place.get(name, -1) for name in names], dtype=np.int64)
    if not set(names) & set(known):
        pair = f"{quoted(names)} there, {quoted(known)} in training"
        raise ValueError(f"split {split} has no class that training has: {pair}")
    found = translated[labels]
    rows = np.flatnonzero(found >= 0)
    if len(rows) < len(labels):
        odd = [name for name in names if name not in place]
        reason = f"examples of split {split} whose class training has not"
        notes.leave_out(reason, len(labels) - len(rows), quoted(odd))
    note_absent(np.bincount(found[rows], minlength=len(known)), known, split, notes)
    return rows, found[rows]


def note_absent(counts: np.ndarray, names: Sequence[str], split: str, notes: DataNotes) -> None:
    """Note the classes of which a test split has no example: nothing is measured of them."""
    absent = [name for name, count in zip(names, counts, strict=True) if not count]
    if absent:
        notes.say(f"Split {split} has no example of {len(absent)} classes: {quoted(absent)}.")


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
            a ``datasets.Dataset`` (see :func:`text_table`). The test split may be None where a
            share of the training split is to be held out.
        is_name: Whether the layout is one data set that is known by a name and needs no file.
    """

    name: str
    layout: str
    options: Collection[str]
    accepts: Callable[[_Request], bool]
    read: Callable[[_Request], tuple[_Split, _Split | None]]
    is_name: bool = False


class NoTestPart(ValueError):
    """The data have no part to test on, and nobody said what to hold out."""


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
    """One split: a source, the int64 label of each of its rows, and the name of each class.

    ``rows`` are those of the source that are meant, where not all are, and ``groups`` what each
    belongs to.
    """

    source: ImageSource
    labels: np.ndarray
    class_names: tuple[str, ...]
    rows: np.ndarray | None = None
    groups: np.ndarray | None = None


class FileSource:
    """Image files below one folder, by path relative to it.

    Raises:
        ValueError: some are HEIF by name, and there is no package that decodes them.
    """

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        heif = [] if _can_read_heif() else [name for name in names if is_heif_name(name)]
        if heif:
            files = f"{len(heif)} of the {len(names)} images"
            raise ValueError(f"{files} are HEIC or HEIF, the first {heif[0]!r}: {_HEIF_HINT}")
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
        return stored_bytes(self.table[row][self.column], self.column, self.roots)

    def describe(self, row: int) -> str:
        """Name the row and its split."""
        return f"row {row} of split {self.split}"


def stored_bytes(record: Mapping[str, Any] | None, column: str, roots: Sequence[str]) -> bytes:
    """The file of an image in a column of ``datasets``: its ``bytes``, else what ``path`` names.

    Raises:
        ValueError: there is neither, or the path leads out of the folders ``roots``.
    """
    if record is None or (record["bytes"] is None and record["path"] is None):
        raise ValueError(f"column {column!r} is empty here")
    if record["bytes"] is not None:
        return bytes(record["bytes"])
    if not any(is_inside(record["path"], root) for root in roots):
        where = ", ".join(roots) or "the files of the data set"
        raise ValueError(f"its path {record['path']!r} leads out of {where}")
    return Path(record["path"]).read_bytes()


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
    """Decode a file (a path or its bytes in memory) to RGB, as a person sees it.

    Its EXIF orientation is applied, what is transparent stands before white, 16 bits become the
    higher 8, and of an animation the first frame is taken. (torchvision's and timm's loaders drop
    orientation and transparency; other pixels are as theirs.)

    Raises:
        Exception: a damaged file; Pillow raises nearly any type.
        ValueError: pixels of 32 bits, which have no defined range.
    """
    with open_image(file) as image:
        return to_rgb(image)


def open_image(file: str | io.BytesIO) -> Image.Image:
    """Open an image of a format that is read, its pixels not decoded yet.

    HEIF, as telephones write it, is read where the package pillow-heif is installed.

    Raises:
        ValueError: it is HEIF, and the package is not.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(file, formats=_formats())
    except UnidentifiedImageError as error:
        if _can_read_heif() or not _is_heif(file):
            raise
        raise ValueError(f"it is HEIC or HEIF: {_HEIF_HINT}") from error


_HEIF_HINT = "`pip install pillow-heif` reads such files, or convert them to JPEG"


def _can_read_heif() -> bool:
    return find_spec("pillow_heif") is not None


@cache
def _formats() -> tuple[str, ...]:
    """The formats of Pillow that are read."""
    if not _can_read_heif():
        return _FORMATS
    from pillow_heif import register_heif_opener

    register_heif_opener()
    return (*_FORMATS, "HEIF")


def _is_heif(file: str | io.BytesIO) -> bool:
    if isinstance(file, str):
        with open(file, "rb") as opened:
            start = opened.read(12)
    else:
        start = file.getvalue()[:12]
    return start[4:8] == b"ftyp" and start[8:] in _HEIF_BRANDS


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode the pixels to RGB, as :func:`decode_image` says."""
    from PIL import Image, ImageOps

    if image.getexif().get(_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    # Pillow's own conversion of 16 bits clips at 255; its older releases open such a PNG as "I".
    if image.mode.startswith("I;16") or (image.format, image.mode) == ("PNG", "I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode!r} (32 bits) have no defined range")
    if not image.has_transparency_data:
        return image.convert("RGB")
    seen = image.convert("RGBA")
    if seen.getchannel("A").getextrema()[0] == 255:
        return seen.convert("RGB")
    before_white = Image.new("RGBA", seen.size, "white")
    before_white.alpha_composite(seen)
    return before_white.convert("RGB")


# Texts


def text_table(
    texts: Sequence[str],
    labels: np.ndarray,
    class_names: Sequence[str],
    groups: Sequence[str] | np.ndarray | None = None,
) -> Dataset:
    """One split of texts: a table with the columns ``text`` and ``label``, ``group`` if given."""
    from datasets import Dataset

    columns = {TEXT: list(texts), LABEL: labels}
    if groups is not None:
        columns[GROUP] = list(groups)
    return Dataset.from_dict(columns, features=text_features(class_names, groups is not None))


def text_features(class_names: Sequence[str], grouped: bool = False) -> Features:
    """Types of the columns of a :func:`text_table`."""
    from datasets import ClassLabel, Features, Value

    group = {GROUP: Value("string")} if grouped else {}
    return Features({TEXT: Value("string"), LABEL: ClassLabel(names=list(class_names)), **group})
