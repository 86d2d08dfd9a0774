"""Images and texts whose classes nobody knows yet, to be predicted: read as training data are."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldam_plugins._validation import invalid
from ldam_plugins.data.images import LabelledImages
from ldam_plugins.data.notes import DataNotes
from ldam_plugins.data.readers.base import FileSource, ImageRequest, TextRequest
from ldam_plugins.data.readers.class_names import is_missing
from ldam_plugins.data.readers.file_index import FileIndex
from ldam_plugins.data.readers.paths import files_below, is_image_name, read_lines
from ldam_plugins.data.readers.table_files import files_of, image_column_of
from ldam_plugins.data.readers.tables import (
    Table,
    is_table,
    pick_column,
    read_table,
    text_candidates,
)

READ, UNREAD = 0, 1
"""What stands in place of a class: whether the image could be decoded."""


class UnlabelledImages(LabelledImages):
    """Images of no class; one that cannot be decoded is a black one, and said to be unread.

    ``dataset[i]`` is the image and :data:`READ` or :data:`UNREAD`.

    Args:
        source: Where the pixels are.
        examples: The name of each image.
    """

    def __init__(self, source: FileSource, examples: list[str]) -> None:
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


def unlabelled_images(
    path: str,
    *,
    image_column: str | None = None,
    encoding: str | None = None,
    delimiter: str | None = None,
) -> UnlabelledImages:
    """All images of a folder, of a table that names files, or one image.

    Args:
        path: A folder, whose subfolders count, too; a CSV, TSV, JSON Lines or parquet file with a
            column of file names, which are looked for in its folder and below; or an image.
        image_column: Column of the names. Default: the one that names files that are there.
        encoding: Of a table that is not UTF-8.
        delimiter: Of a CSV file. Default: whichever gives even rows.

    Raises:
        ValueError: there is no image, or a file that the table names is not there.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        names = list(files_below(place, ""))
        if not names:
            raise invalid("dataset", "a folder with images", path)
        return UnlabelledImages(FileSource(place, names), names)
    if is_image_name(place.name) and place.is_file():
        return UnlabelledImages(FileSource(place.parent, [place.name]), [place.name])
    request = ImageRequest(
        path, image_column=image_column, encoding=encoding, delimiter=delimiter, notes=DataNotes()
    )
    table = _table(place, request)
    index = FileIndex(place.parent)
    column = image_column_of(table, index, request)
    files = files_of(table, column, index, "", request)
    if None in files:
        raise ValueError(f"{table.where(files.index(None))}: there is no name of a file")
    names = [str(value) for value in table.columns[column]]
    return UnlabelledImages(FileSource(place.parent, [str(file) for file in files]), names)


def unlabelled_texts(
    path: str,
    *,
    text_column: str | None = None,
    encoding: str | None = None,
    delimiter: str | None = None,
) -> tuple[list[str], list[str]]:
    """The texts of a table, of a file with one a line, or of a folder of ``.txt`` files.

    Args:
        path: A CSV, TSV, JSON Lines or parquet file; a ``.txt`` file; or a folder.
        text_column: Column of the texts. Default: ``text``, else the only one that holds words.
        encoding: Of files that are not UTF-8.
        delimiter: Of a CSV file. Default: whichever gives even rows.

    Returns:
        The name of each text, and the texts; one that is missing is empty. Rows of a table are
        called by their column ``id`` if no two are equal there, else by their number.

    Raises:
        ValueError: there are none, or the column is not certain.
    """
    place = Path(path).expanduser()
    request = TextRequest(
        path, text_column=text_column, encoding=encoding, delimiter=delimiter, notes=DataNotes()
    )
    if place.is_dir():
        names = list(files_below(place, "", lambda name: name.lower().endswith(".txt")))
        if not names:
            raise invalid("dataset", "a folder with .txt files, or a table", path)
        kept = encoding or "utf-8"
        return names, [(place / name).read_text(encoding=kept) for name in names]
    if place.suffix.lower() == ".txt" and place.is_file():
        lines = read_lines(place)
        return [f"line {number}" for number in range(1, len(lines) + 1)], lines
    table = _table(place, request)
    column = pick_column(
        "text_column", text_column, lambda: _text_candidates(table), table, request
    )
    texts = ["" if is_missing(value) else str(value) for value in table.columns[column]]
    return _row_names(table), texts


def _table(place: Path, request: ImageRequest | TextRequest) -> Table:
    if not place.is_file() or not is_table(place):
        expected = "a folder, or a CSV, TSV, JSON Lines or parquet file"
        hint = "" if place.exists() else "There is no such file or folder."
        raise invalid("dataset", expected, str(place), hint=hint)
    return read_table(place, request)


def _text_candidates(table: Table) -> list[str]:
    found = text_candidates(table, "")
    return [name for name in found if name.lower() != "id"] or found


def _row_names(table: Table) -> list[str]:
    for name, values in table.columns.items():
        if name.lower() == "id" and len(set(map(str, values))) == len(values):
            return [str(value) for value in values]
    return [f"row {number}" for number in table.numbers]
