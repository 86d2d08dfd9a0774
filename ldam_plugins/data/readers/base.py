"""Where the pixels of one example are: a file, a table row or an array, read one at a time."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".jp2")
) | frozenset((".ppm", ".pgm"))
# Pillow tells formats apart by content, and some of the others (EPS) start external programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "JPEG2000", "PPM")


class ImageSource(Protocol):
    """Rows of images, each of which can be read and named; any error of ``read`` is the row's."""

    def __len__(self) -> int:
        """Count the rows."""

    def read(self, row: int) -> Image.Image:
        """Decode one row to an RGB image."""

    def describe(self, row: int) -> str:
        """Name one row for a message: a path, or a row and its split."""


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


class TableSource:
    """The image column of a ``datasets`` split, whose rows hold ``bytes``, else a ``path``.

    Args:
        table: the split, of which only ``column`` is kept, undecoded.
        column: the image column.
        split: the split's name, for messages.
        roots: folders that a ``path`` may lead into; a table names files nowhere else.
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
        record = self.table[row][self.column]
        if record is None:
            raise ValueError(f"column {self.column!r} is empty here")
        if record["bytes"] is not None:
            return decode_image(io.BytesIO(record["bytes"]))
        path = os.path.realpath(record["path"])
        if not any(is_inside(path, root) for root in self.roots):
            raise ValueError(f"its path {record['path']!r} leads out of {', '.join(self.roots)}")
        return decode_image(path)

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


def decode_image(file: str | io.BytesIO) -> Image.Image:
    """Decode a file (a path or its bytes in memory) to RGB, pixels as stored.

    As in torchvision's and timm's loaders an alpha channel is dropped and an EXIF orientation is
    not applied; of a moving image the first frame is taken.

    Raises:
        Exception: whatever Pillow raises for a damaged file, which can be nearly anything.
        ValueError: pixels of 32 bits, which have no defined range.
    """
    from PIL import Image

    with Image.open(file, formats=_FORMATS) as image:
        return _to_rgb(image)


def is_inside(path: str, root: str | Path) -> bool:
    """Whether the real path ``path`` is the real folder ``root`` or below it."""
    root = str(root)
    return path == root or path.startswith(root.rstrip(os.sep) + os.sep)


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    # Pillow's own conversion of 16 bits clips at 255; its older releases open such a PNG as "I".
    if image.mode.startswith("I;16") or (image.format, image.mode) == ("PNG", "I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode!r} (32 bits) have no defined range")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")
