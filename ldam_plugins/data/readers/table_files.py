"""Tables of file names and labels beside images, and tables that hold texts and labels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldam_plugins._validation import invalid, quoted
from ldam_plugins.data.notes import DataNotes
from ldam_plugins.data.readers.base import (
    TABLE_OPTIONS,
    FileSource,
    ImageRequest,
    ImageRows,
    Reader,
    Request,
    TextRequest,
    keep_known_classes,
    say_columns,
    text_table,
)
from ldam_plugins.data.readers.class_folders import flat_folder, has_class_folders
from ldam_plugins.data.readers.class_names import is_missing, number_labels
from ldam_plugins.data.readers.file_index import FileIndex, parts_of
from ldam_plugins.data.readers.hub import is_saved
from ldam_plugins.data.readers.paths import is_image_name
from ldam_plugins.data.readers.tables import (
    PARQUET,
    SINGLE_FILES,
    TEXT_SUFFIXES,
    Table,
    check_file,
    first_nested,
    labels_of,
    pick_column,
    pick_labels,
    read_parts,
    read_table,
    tables_of,
    text_candidates,
    whole_rows,
)

if TYPE_CHECKING:
    from datasets import Dataset

_PARQUET_FILES = ("*.parquet", "*/*.parquet")
_TRIED = 50
"""Rows whose files are looked for to tell which column names them."""


class _Part:
    """One split of a table: its whole rows, the labels and the groups of these."""

    def __init__(
        self, table: Table, labels: list[Any], contents: list[Any], groups: np.ndarray | None
    ) -> None:
        self.table = table
        self.labels = labels
        self.contents = contents
        self.groups = groups

    def rows(self, kept: np.ndarray) -> _Part:
        """The part of some rows."""
        labels = [self.labels[row] for row in kept]
        contents = [self.contents[row] for row in kept]
        groups = None if self.groups is None else self.groups[kept]
        return _Part(self.table.select(kept), labels, contents, groups)


def _whole(
    table: Table,
    split: str,
    what: str,
    contents: list[Any],
    labels: tuple[str, ...],
    request: Request,
) -> _Part:
    """The rows that have a content, a label and, if asked for, a group."""
    found = labels_of(table, labels)
    missing: dict[str, list[bool]] = {
        what: [is_missing(value) for value in contents],
        "label": [value is None for value in found],
    }
    groups = None
    if request.group_column is not None:
        if request.group_column not in table.columns:
            expected = f"a column of {table.file.name}"
            raise invalid("group_column", expected, request.group_column, hint=table.described())
        values = table.columns[request.group_column]
        missing["group"] = [is_missing(value) for value in values]
        groups = np.array([str(value) for value in values], dtype=object)
    rows = np.array(whole_rows(table, missing, split, request), dtype=np.int64)
    return _Part(table, found, contents, groups).rows(rows)


def _numbered(
    parts: dict[str, _Part], request: Request
) -> tuple[tuple[str, ...], list[tuple[_Part, np.ndarray]]]:
    """The names of the classes, and each part with the class indices of its rows."""
    train = parts["train_split"]
    labels, names = number_labels(train.labels, request.notes)
    numbered = [(train, labels)]
    if "test_split" in parts:
        test = parts["test_split"]
        own, own_names = number_labels(test.labels, request.notes)
        split = request.notes.parts["test_split"]
        kept, labels = keep_known_classes(own, own_names, names, split, request.notes)
        numbered.append((test.rows(kept), labels))
    return names, numbered


# Texts


def _read_texts(request: TextRequest) -> tuple[Dataset, Dataset | None]:
    tables = read_parts(request, TEXT_SUFFIXES)
    train = tables["train_split"]
    asked = request.text_column
    given = [asked, request.group_column]
    labels = pick_labels(train, request.label_column, [name for name in given if name], request)

    def guess() -> list[str]:
        return [name for name in text_candidates(train, labels[0]) if name != request.group_column]

    text = pick_column("text_column", asked, guess, train, request)
    say_columns(request, train.file.name)
    parts = {}
    for argument, table in tables.items():
        if text not in table.columns:
            raise invalid(
                "text_column", f"a column of {table.file.name}", text, hint=table.described()
            )
        if (odd := first_nested(table.columns[text])) is not None:
            hint = "Write the text into a column of its own first."
            raise invalid("text_column", "a column of texts", f"{text} ({odd!r:.60})", hint=hint)
        split = request.notes.parts.get(argument, table.file.name)
        parts[argument] = _whole(table, split, "text", table.columns[text], labels, request)
    names, numbered = _numbered(parts, request)
    made = [text_table(_texts(part), found, names, part.groups) for part, found in numbered]
    return made[0], made[1] if len(made) > 1 else None


def _texts(part: _Part) -> list[str]:
    return [value if isinstance(value, str) else str(value) for value in part.contents]


def _holds_texts(request: TextRequest) -> bool:
    check_file(request)
    if not request.is_folder:
        return request.root.is_file() and request.root.suffix.lower() in SINGLE_FILES
    root = request.root
    if is_saved(root) or any(root.glob("**/*.parquet")):
        return False
    card = root / "README.md"
    if card.is_file() and "\nconfigs:" in card.read_text(encoding="utf-8", errors="replace"):
        return False  # what the hub says of the files of a data set is for `datasets`
    return bool(tables_of(request, TEXT_SUFFIXES))


_OPTIONS = (*TABLE_OPTIONS, "encoding", "delimiter")

TEXT_TABLES = Reader(
    name="a table",
    layout=(
        "a CSV, TSV or JSON Lines file of texts and labels, or a folder with train.csv and test.csv"
    ),
    options=("text_column", *_OPTIONS),
    accepts=_holds_texts,
    read=_read_texts,
)


# Images


def _read_images(request: ImageRequest) -> tuple[ImageRows, ImageRows | None]:
    root = request.root if request.is_folder else request.root.parent
    tables = read_parts(request)
    index = FileIndex(root)
    train = tables["train_split"]
    column = image_column_of(train, index, request)
    used = [name for name in (column, request.group_column) if name]
    labels = pick_labels(train, request.label_column, used, request)
    say_columns(request, train.file.name)
    parts = {}
    unnamed = set(index.files)
    for argument, table in tables.items():
        split = request.notes.parts.get(argument, table.file.name)
        files = files_of(table, column, index, split, request)
        unnamed.difference_update(file for file in files if file is not None)
        part = _whole(table, split, "file", files, labels, request)
        parts[argument] = part.rows(_once(part, split, request))
    if unnamed:
        read = " or ".join(table.file.name for table in tables.values())
        what = (
            f"{len(unnamed)} of the {len(index.files)} images below {root} are in no row of {read}"
        )
        request.notes.say(f"{what}, such as {min(unnamed)!r}.")
    if "test_split" in parts:
        both = set(parts["train_split"].contents) & set(parts["test_split"].contents)
        if both:
            shown = quoted(sorted(both))
            request.notes.say(f"Files both to train and to test on, {len(both)}: {shown}.")
    names, numbered = _numbered(parts, request)
    made = [
        ImageRows(FileSource(root, part.contents), found, names, groups=part.groups)
        for part, found in numbered
    ]
    return made[0], made[1] if len(made) > 1 else None


def image_column_of(table: Table, index: FileIndex, request: ImageRequest) -> str:
    """The column whose values are names of images that are there."""

    def guess() -> list[str]:
        found = {name: _found(values, index) for name, values in table.columns.items()}
        best = max(found.values(), default=0)
        if not best:
            there = f"where there are {len(index.files)}, such as {index.files[0]!r}"
            what = f"no column of {table.file} names images below {index.root}, {there}"
            raise ValueError(f"{what}. {table.described()}")
        named = [name for name, count in found.items() if count and 2 * count >= best]
        # A class "1" may stand beside a file 1.jpg, but files are many and classes are few.
        sizes = {name: len(set(map(str, table.columns[name]))) for name in named}
        named = [name for name in named if 2 * sizes[name] > max(sizes.values())]
        paths = [n for n in named if any(is_image_name(str(v)) for v in table.columns[n][:_TRIED])]
        return paths if len(paths) == 1 else named

    if not index.files:
        raise ValueError(f"there is no image below {index.root} for the rows of {table.file}")
    return pick_column("image_column", request.image_column, guess, table, request)


def _found(values: list[Any], index: FileIndex) -> int:
    """How many of the first values are names of images."""
    names = [str(value) for value in values if not is_missing(value)][:_TRIED]
    depth = max((len(parts_of(name)) for name in names), default=0)
    return max((sum(bool(index.find(n, skip)) for n in names) for skip in range(depth)), default=0)


def files_of(
    table: Table, column: str, index: FileIndex, split: str, request: Request
) -> list[str | None]:
    """The file that each row names, relative to the folder of the index; None where it names none.

    Raises:
        ValueError: there is no such column, it is empty, or a file is not there.
    """
    if column not in table.columns:
        expected = f"a column of {table.file.name}"
        raise invalid("image_column", expected, column, hint=table.described())
    values = table.columns[column]
    named = [row for row, value in enumerate(values) if not is_missing(value)]
    names = [str(values[row]) for row in named]
    if not names:
        raise ValueError(f"column {column!r} of {table.file} is empty")
    folder = table.file.parent
    inside = folder != index.root and folder.is_relative_to(index.root)
    prefer = folder.relative_to(index.root).as_posix() if inside else split
    found = index.find_all(names, prefer=prefer, where=lambda at: table.where(named[at]))
    files: list[str | None] = [None] * len(values)
    for row, file in zip(named, found, strict=True):
        files[row] = file
    gone = [at for at, file in enumerate(found) if file is None]
    if gone and not request.skip_empty:
        what = f"{len(gone)} of the {len(names)} files that {table.file} names are not there"
        first = f"the first is {names[gone[0]]!r} in row {table.numbers[named[gone[0]]]}"
        there = (
            f"Below {index.root} there are {len(index.files)} images, such as {index.files[0]!r}"
        )
        hint = "Leave such rows out with --skip_empty (skip_empty=True)."
        raise ValueError(f"{what}: {first}. {there}. {hint}")
    return files


def _once(part: _Part, split: str, request: Request) -> np.ndarray:
    """Rows of different files; a file that is given again with the same label counts once."""
    first: dict[str, int] = {}
    for row, file in enumerate(part.contents):
        before = first.setdefault(file, row)
        if part.labels[before] != part.labels[row]:
            pair = f"{part.labels[before]!r} and in {part.table.where(row)} {part.labels[row]!r}"
            hint = "Correct one of them, or keep one row of each file."
            raise ValueError(f"{file!r} has in {part.table.where(before)} the label {pair}. {hint}")
    if len(first) < len(part.contents):
        again = len(part.contents) - len(first)
        request.notes.leave_out(f"rows of {split} that name a file again", again)
    return np.array(list(first.values()), dtype=np.int64)


def _holds_image_table(request: ImageRequest) -> bool:
    check_file(request)
    if request.is_listed:
        return True  # files of plain lines are for the reader of list files, which is asked before
    if not request.is_folder:
        suffixes = (*SINGLE_FILES, *PARQUET)
        is_file = request.root.is_file() and request.root.suffix.lower() in suffixes
        return is_file and _is_plain(request.root)
    if is_saved(request.root) or has_class_folders(request):
        return False
    if not all(_is_plain(f) for pattern in _PARQUET_FILES for f in request.root.glob(pattern)):
        return False
    if flat_folder(request) is not None:
        return _names_images(request)
    tables = tables_of(request)
    if any(file.suffix.lower() in PARQUET for file in tables.values()):
        return bool(FileIndex(request.root).files)
    return bool(tables)


def _names_images(request: ImageRequest) -> bool:
    """Whether a table in a folder of folders with images names these."""
    index = FileIndex(request.root)
    quietly = replace(request, notes=DataNotes())  # what is read is read again, and told then
    try:
        tables = [read_table(file, quietly) for file in tables_of(request).values()]
    except ValueError:  # a file that has nothing to do with the images
        return False
    for table in tables:
        if any(_found(values, index) for values in table.columns.values()):
            name = table.file.name
            request.notes.say(f"Labels are read from {name}, not from the names of folders.")
            return True
    return False


def _is_plain(file: Path) -> bool:
    """Whether a table is one of names: parquet may hold the images themselves, as the hub's do."""
    if file.suffix.lower() not in PARQUET:
        return True
    from pyarrow import ArrowException, parquet, types

    try:
        kinds = parquet.read_schema(file).types
    except (ArrowException, OSError):
        return False
    return not any(types.is_nested(kind) or types.is_binary(kind) for kind in kinds)


IMAGE_TABLES = Reader(
    name="a table",
    layout=(
        "a folder with images and a CSV, TSV, JSON Lines or parquet file of file names and labels, "
        "or that file, or two with a header as `train_list` and `test_list`"
    ),
    options=("image_column", "train_list", "test_list", *_OPTIONS),
    accepts=_holds_image_table,
    read=_read_images,
)
