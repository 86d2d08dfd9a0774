"""One split of a data set of the hub, of a folder laid out like one, or of one embedded here.

Its labels, if it has any, are not looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldam_plugins._validation import check_choice, invalid, quoted
from ldam_plugins.data.notes import DataNotes
from ldam_plugins.data.readers.base import (
    TEXT,
    ImageRequest,
    ImageSource,
    NoSuchDataset,
    TableSource,
    TextRequest,
)
from ldam_plugins.data.readers.digits import DIGITS
from ldam_plugins.data.readers.hub import (
    HUB_ID,
    check_text_column,
    holds_images,
    holds_parquet,
    open_tables,
    pick_image,
    pick_text,
    roots,
)
from ldam_plugins.data.readers.paths import files_below, is_image_name
from ldam_plugins.data.readers.stdlib_docstrings import STDLIB_DOCSTRINGS


def is_text_name(name: str) -> bool:
    """Whether a file holds a text, by its name."""
    return name.lower().endswith(".txt")


def is_split_up(path: str, *, images: bool) -> bool:
    """Whether ``path`` is a data set that comes in splits, rather than files or a table of them.

    Args:
        path: A hub id, a name, a folder or a file.
        images: Whether images are looked for, else texts.
    """
    if images and DIGITS.accepts(ImageRequest(path, notes=DataNotes())):
        return True
    if not images and STDLIB_DOCSTRINGS.accepts(TextRequest(path, notes=DataNotes())):
        return True
    place = Path(path).expanduser()
    if place.is_dir():  # of single files, beside which a table may lie, those are meant
        wanted = is_image_name if images else is_text_name
        return holds_parquet(place) and not any(True for _ in files_below(place, "", wanted))
    if place.is_file():
        return images and place.suffix.lower() == ".parquet" and holds_images(place)
    return HUB_ID.fullmatch(path) is not None and not place.suffix


def open_split_of_images(
    path: str, split: str | None, image_column: str | None
) -> tuple[str, ImageSource]:
    """The name of the split, and its images.

    Raises:
        ValueError: there is no such data set, it has several splits and none is named, or its
            column of images is not certain.
    """
    request = ImageRequest(path, notes=DataNotes())
    if DIGITS.accepts(request):
        train, test = DIGITS.read(request)
        parts = {"train": train.source, **({} if test is None else {"test": test.source})}
        name = _pick_split(parts, split)
        return name, parts[name]
    name, table = _open(path, split)
    column = pick_image(image_column, table.features)
    return name, TableSource(table, column, name, roots(request))


def open_split_of_texts(
    path: str, split: str | None, text_column: str | None
) -> tuple[str, list[str | None]]:
    """The name of the split, and its texts; None where there is none.

    Raises:
        ValueError: as :func:`open_split_of_images`, of its column of texts.
    """
    request = TextRequest(path, notes=DataNotes())
    if STDLIB_DOCSTRINGS.accepts(request):
        parts = dict(zip(("train", "test"), STDLIB_DOCSTRINGS.read(request), strict=True))
        name = _pick_split(parts, split)
        return name, parts[name][TEXT][:]
    name, table = _open(path, split)
    column = pick_text(text_column, table.features, "")
    check_text_column(column, table.features)
    return name, table[column][:]


def _open(path: str, split: str | None) -> tuple[str, Any]:
    try:
        tables = open_tables(path)
    except NoSuchDataset as missing:
        expected = "a folder or file that is there, or a hub id"
        raise invalid("dataset", expected, path, hint=f"{missing}.") from missing
    name = _pick_split(tables, split)
    return name, tables[name]


def _pick_split(parts: Mapping[str, Any], split: str | None) -> str:
    if split is not None:
        return check_choice("split", split, list(parts))
    if len(parts) > 1:
        raise invalid("split", f"one of {quoted(list(parts))}", None)
    return next(iter(parts))
