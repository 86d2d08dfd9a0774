"""Images and texts whose classes nobody knows yet, to be predicted: read as training data are.

They come in parts, so that memory does not grow with their number, but for the names of files.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ldam_plugins._validation import invalid
from ldam_plugins.data.images import LabelledImages
from ldam_plugins.data.notes import DataNotes
from ldam_plugins.data.readers.base import FileSource, ImageRequest, ImageSource, TextRequest
from ldam_plugins.data.readers.class_names import is_missing
from ldam_plugins.data.readers.file_index import FileIndex
from ldam_plugins.data.readers.paths import files_below, is_image_name
from ldam_plugins.data.readers.table_files import files_of, image_column_of
from ldam_plugins.data.readers.table_parts import UNREADABLE, batched, table_parts, text_lines
from ldam_plugins.data.readers.tables import (
    Table,
    is_table,
    pick_column,
    read_table,
    text_candidates,
)
from ldam_plugins.data.readers.unlabelled_splits import (
    is_split_up,
    is_text_name,
    open_split_of_images,
    open_split_of_texts,
)

_Part = TypeVar("_Part")
READ, UNREAD = 0, 1
"""What stands in place of a class: whether the image could be decoded."""
_LOOKED_AT = 4096
"""Rows by which the columns of a table are known."""


class UnlabelledImages(LabelledImages):
    """Images of no class; one that cannot be decoded is a black one, and said to be unread.

    ``dataset[i]`` is the image and :data:`READ` or :data:`UNREAD`.

    Args:
        source: Where the pixels are.
        examples: The name of each image.
    """

    def __init__(self, source: ImageSource, examples: list[str]) -> None:
        super().__init__(source, np.zeros(len(source), dtype=np.int64), ("read", "unread"))
        self.names = examples

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        try:
            image, state = self.image(index), READ
        except ValueError:
            image, state = Image.new("RGB", (8, 8)), UNREAD
        return image if self.transform is None else self.transform(image), state

    def subset(self, indices: Sequence[int] | np.ndarray) -> UnlabelledImages:
        """Keep the examples ``indices`` of this set, in that order."""
        kept = copy.copy(self)
        rows = np.asarray(indices, dtype=np.int64)
        kept.rows, kept.labels = self.rows[rows], self.labels[rows]
        kept.names = [self.names[row] for row in rows.tolist()]
        return kept


class UnlabelledTexts(NamedTuple):
    """Some texts, in order.

    Args:
        names: The name of each.
        source: The texts, None for one that cannot be read; or the folder of the files ``names``.
        encoding: Of such files.
    """

    names: list[str]
    source: list[str | None] | Path
    encoding: str | None = None

    def texts(self) -> list[str | None]:
        """The texts, None for one that cannot be read."""
        if isinstance(self.source, list):
            return self.source
        return [self._read(self.source / name) for name in self.names]

    def _read(self, file: Path) -> str | None:
        try:
            return file.read_text(encoding=self.encoding or "utf-8-sig")
        except (OSError, UnicodeDecodeError):
            return None


def unlabelled_images(
    path: str,
    *,
    image_column: str | None = None,
    encoding: str | None = None,
    delimiter: str | None = None,
    split: str | None = None,
    rows: int = _LOOKED_AT,
) -> Iterator[UnlabelledImages]:
    """All images of a folder, of a table that names files, of a split, or one image; in parts.

    Args:
        path: A folder, whose subfolders count, too; a CSV, TSV, JSON Lines or parquet file with a
            column of file names, which are looked for in its folder and below; or an image. A table
            is read as a whole. A file that it names and that is not there cannot be decoded. Or a
            hub id, a folder or file of parquet that holds images, or ``digits``.
        image_column: Column of the names. Default: the one that names files that are there.
        encoding: Of a table that is not UTF-8.
        delimiter: Of a CSV file. Default: whichever gives even rows.
        split: Of a data set that has several.
        rows: Images of a part.

    Raises:
        ValueError: there is no image, or several splits of which none is named.
    """
    if is_split_up(path, images=True):
        _, source = open_split_of_images(path, split, image_column)
        found = UnlabelledImages(source, [source.describe(row) for row in range(len(source))])
        for some in batched(range(len(source)), rows):
            yield found.subset(some)
        return
    _refuse_split(path, split)
    place = Path(path).expanduser()
    if place.is_dir():
        folder, parts = place, batched(((name, name) for name in files_below(place, "")), rows)
    elif is_image_name(place.name) and place.is_file():
        folder, parts = place.parent, iter([[(place.name, place.name)]])
    else:
        request = ImageRequest(
            path,
            image_column=image_column,
            encoding=encoding,
            delimiter=delimiter,
            skip_empty=True,
            notes=DataNotes(),
        )
        table, index = read_table(_table_file(place), request), FileIndex(place.parent)
        column = image_column_of(table, index, request)
        names = ["" if is_missing(name) else str(name) for name in table.columns[column]]
        files = files_of(table, column, index, "", request)
        # Where there is no file, reading the name as it stands tells so.
        pairs = ((name, file or name) for name, file in zip(names, files, strict=True))
        folder, parts = place.parent, batched(pairs, rows)
    for part in _some(parts, "a folder with images", path):
        yield UnlabelledImages(FileSource(folder, [f for _, f in part]), [n for n, _ in part])


def unlabelled_texts(
    path: str,
    *,
    text_column: str | None = None,
    encoding: str | None = None,
    delimiter: str | None = None,
    split: str | None = None,
    rows: int = _LOOKED_AT,
) -> Iterator[UnlabelledTexts]:
    """The texts of a table, of a file with one a line, of a folder or of a split; in parts.

    Rows of a table are called by their column ``id`` if no two of the first 4096 are equal there,
    else by their number. A text that is missing is empty.

    Args:
        path: A CSV, TSV, JSON Lines or parquet file; a ``.txt`` file, or a folder of them; a hub
            id, a folder of parquet files, or ``stdlib_docstrings``.
        text_column: Column of the texts. Default: ``text``, else the only one that holds words.
        encoding: Of files that are not UTF-8.
        delimiter: Of a CSV file. Default: whichever gives even rows.
        split: Of a data set that has several.
        rows: Texts of a part.

    Raises:
        ValueError: there are none, the column is not certain, or there are several splits of which
            none is named.
    """
    if is_split_up(path, images=False):
        name, texts = open_split_of_texts(path, split, text_column)
        for part in batched(enumerate(texts), rows):
            names = [f"row {row} of split {name}" for row, _ in part]
            yield UnlabelledTexts(names, [text or "" for _, text in part])
        return
    _refuse_split(path, split)
    place = Path(path).expanduser()
    found: Iterator[UnlabelledTexts]
    if place.is_dir():
        files = files_below(place, "", is_text_name)
        found = (UnlabelledTexts(names, place, encoding) for names in batched(files, rows))
    elif place.suffix.lower() == ".txt" and place.is_file():
        found = _lines(place, encoding, rows)
    else:
        request = TextRequest(
            path, text_column=text_column, encoding=encoding, delimiter=delimiter, notes=DataNotes()
        )
        found = _rows(_table_file(place), request, rows)
    yield from _some(found, "a folder with .txt files, or a table", path)


def _refuse_split(path: str, split: str | None) -> None:
    """Refuse the name of a split where there are none."""
    if split is not None:
        raise invalid("split", f"left out for {path!r}, which has none", split)


def _some(parts: Iterator[_Part], expected: str, path: str) -> Iterator[_Part]:
    first = next(parts, None)
    if first is None:
        raise invalid("dataset", expected, path)
    return chain([first], parts)


def _lines(file: Path, encoding: str | None, rows: int) -> Iterator[UnlabelledTexts]:
    with text_lines(file, encoding) as lines:
        for part in batched(enumerate(lines, 1), rows):
            texts: list[str | None] = [line.rstrip("\r\n") for _, line in part]
            yield UnlabelledTexts([f"line {number}" for number, _ in part], texts)


def _rows(file: Path, request: TextRequest, rows: int) -> Iterator[UnlabelledTexts]:
    head = next(table_parts(file, request, _LOOKED_AT), None)
    if head is None:
        raise ValueError(f"{file} has no row")
    column = pick_column(
        "text_column", request.text_column, lambda: _text_candidates(head), head, request
    )
    called = _name_column(head)
    for part in table_parts(file, request, rows):
        missing = [None] * len(part)
        texts = [_as_text(value) for value in part.columns.get(column, missing)]
        names = [f"row {number}" for number in part.numbers]
        if called is not None:
            given = part.columns.get(called, missing)
            pairs = zip(given, names, strict=True)
            names = [name if g is UNREADABLE or is_missing(g) else str(g) for g, name in pairs]
        yield UnlabelledTexts(names, texts)


def _as_text(value: Any) -> str | None:
    if value is UNREADABLE:
        return None
    return "" if is_missing(value) else str(value)


def _table_file(place: Path) -> Path:
    if not place.is_file() or not is_table(place):
        expected = "a folder, or a CSV, TSV, JSON Lines or parquet file"
        hint = "" if place.exists() else "There is no such file or folder."
        raise invalid("dataset", expected, str(place), hint=hint)
    return place


def _text_candidates(table: Table) -> list[str]:
    found = text_candidates(table, "")
    return [name for name in found if name.lower() != "id"] or found


def _name_column(table: Table) -> str | None:
    for name, values in table.columns.items():
        if name.lower() == "id" and len(set(map(str, values))) == len(values):
            return name
    return None
