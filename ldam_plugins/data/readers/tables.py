"""CSV, TSV, JSON Lines and parquet files as columns, and which column is what."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ldam_plugins._validation import check_choice, invalid, quoted
from ldam_plugins.data.readers.base import (
    ImageRequest,
    Request,
    find_split,
    pick_splits,
    split_kind,
    undivided,
)
from ldam_plugins.data.readers.class_names import is_fraction, is_missing, is_whole
from ldam_plugins.data.readers.file_index import split_in_name
from ldam_plugins.data.readers.paths import (
    is_hidden,
    is_image_name,
    is_inside,
    read_text,
    subfolders,
)

SEPARATED = (".csv", ".tsv", ".tab")
JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET = (".parquet",)
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".7z", ".rar")
SPREADSHEETS = (".xlsx", ".xls", ".ods")
TEXT_SUFFIXES = (*SEPARATED, *JSON_LINES)
TABLE_SUFFIXES = (*TEXT_SUFFIXES, *PARQUET)
SINGLE_FILES = (*TEXT_SUFFIXES, ".txt")
"""Endings of text files that may be a data set; what Excel calls Unicode text ends in .txt."""
_NO_DATA = re.compile(
    r"sample_?submission.*|requirements.*|package.*|.*config.*|dataset_(dict|infos?)|state",
    re.IGNORECASE,
)
"""Stems of files that lie beside data and are none."""
_SHARD = re.compile(r"-\d+-of-\d+$")
"""One file of several, as `datasets` writes and reads them."""
_DELIMITERS = ",;\t|"
SNIFFED = 50
"""Lines, or rows, that are looked at to tell how a table is written."""
HEAD = 2000 * SNIFFED
"""Characters of a file that are looked at for that."""
LABEL_NAMES = ("label", "labels", "class", "classes", "class_name", "category", "target", "y")
OTHER_LABEL_NAMES = (
    *("sentiment", "intent", "emotion", "topic", "species", "breed", "genre", "diagnosis", "dx"),
    *("disease", "rating", "stars", "choice", "tag", "class_id", "label_name", "category_name"),
)
_SPLIT_NAMES = ("split", "set", "subset", "partition", "fold", "data set", "dataset")
_CONTENT_NAMES = (
    *("text", "id", "title", "name", "body", "sentence", "review", "message", "comment", "content"),
    *("tweet", "question", "description", "image", "file", "filename", "file_name", "path", "url"),
)
"""What columns of texts and of file names are called in headers, to know one."""
_SENTENCE = 5
"""Words from which on a cell is no name of a column."""


@dataclass(frozen=True)
class Table:
    """A file of rows, of which those that hold nothing are gone.

    Attributes:
        file: Where it was read.
        columns: Values by the name of the column, of equal length; of CSV files all are text.
        numbers: The number that spreadsheets and editors give each row.
    """

    file: Path
    columns: dict[str, list[Any]]
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def where(self, row: int) -> str:
        """The place of a row, for a message."""
        return f"{self.file}, row {self.numbers[row]}"

    def select(self, rows: Sequence[int] | np.ndarray) -> Table:
        """The table of some rows."""
        columns = {name: [values[row] for row in rows] for name, values in self.columns.items()}
        return Table(self.file, columns, self.numbers[np.asarray(rows, dtype=np.int64)])

    def described(self) -> str:
        """The columns, each with its first value, for a message."""
        shown = [f"{name!r} ({values[0]!r:.40})" for name, values in self.columns.items()]
        if len(shown) == 1:
            advice = "Another delimiter (--delimiter) may give more."
            return f"The only column of {self.file.name} is {shown[0]}. {advice}"
        return f"The columns of {self.file.name}, with their first values, are {', '.join(shown)}."


# Which files


def is_table(file: Path, suffixes: Collection[str] = TABLE_SUFFIXES) -> bool:
    """Whether a file is a table by its name, and whole; one of JSON must be a list."""
    if file.suffix.lower() not in suffixes or _NO_DATA.fullmatch(file.stem):
        return False
    if _SHARD.search(file.stem):
        return False
    if file.suffix.lower() == ".json":
        with file.open("rb") as opened:
            return opened.read(64).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"["
    return True


def tables_in(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """The visible tables that lie in a folder, sorted."""
    with os.scandir(folder) as entries:
        names = sorted(e.name for e in entries if e.is_file() and not is_hidden(e.name))
    files = (folder / name for name in names)
    return [file for file in files if is_table(file, suffixes) and is_inside(file, folder)]


def tables_of(request: Request, suffixes: Collection[str] = TABLE_SUFFIXES) -> dict[str, Path]:
    """The tables of a data set by the split that they hold; one of all is called ``""``.

    Raises:
        ValueError: there are several, and no telling which is meant.
    """
    if not request.is_folder:
        return {"": request.root}
    for folder in (request.root, *_likely_folders(request.root)):
        tables = tables_in(folder, suffixes)
        splits: dict[str, list[Path]] = {}
        for file in tables:
            splits.setdefault(file.stem, []).append(file)
        if find_split(request.train_split, list(splits)) is None:
            splits = {}
            for file in tables:
                if kind := split_in_name(file.stem):
                    splits.setdefault(kind, []).append(file)
        if find_split(request.train_split, list(splits)) is not None:
            return {name: _only(files, request) for name, files in splits.items()}
        if tables:
            return {"": _only(tables, request)}
    inner = {
        name: tables_in(request.root / name, suffixes)
        for name in subfolders(request.root)
        if split_kind(name)
    }
    return {name: _only(tables, request) for name, tables in inner.items() if tables}


def _likely_folders(root: Path) -> Iterator[Path]:
    folders = [name for name in subfolders(root) if split_kind(name) is None]
    if len(folders) == 1 or "data" in folders:
        yield root / ("data" if "data" in folders else folders[0])


def _only(files: Sequence[Path], request: Request) -> Path:
    if len(files) > 1:
        hint = f"Give one of them, as in --dataset {files[0]}"
        raise invalid("dataset", "one table a split", quoted(f.name for f in files), hint=hint)
    return files[0]


# Reading


def read_table(file: Path, request: Request) -> Table:
    """Read a table, whatever its kind.

    Raises:
        ValueError: it cannot be read, is no table or has no row; the message names it.
    """
    suffix = file.suffix.lower()
    if suffix in PARQUET:
        rows = _read_parquet(file)
    elif suffix in JSON_LINES:
        rows = _read_json(file, read_text(file, request.encoding))
    else:
        rows = _read_separated(file, read_text(file, request.encoding), request)
    columns, first = rows
    count = len(next(iter(columns.values()), []))
    full = [row for row in range(count) if not all(is_missing(v[row]) for v in columns.values())]
    if not full:
        raise ValueError(f"{file} has no row")
    if holes := full[-1] + 1 - len(full):
        request.notes.leave_out(f"rows of {file.name} that hold nothing", holes)
    table = Table(file, columns, np.arange(first, first + count))
    return table if len(full) == count else table.select(full)


def _read_separated(file: Path, text: str, request: Request) -> tuple[dict[str, list[Any]], int]:
    import pandas as pd

    skipped = 0
    given = request.delimiter
    if text[:4].lower() == "sep=":  # what Excel takes for the delimiter
        first, _, text = text.partition("\n")
        given, skipped = given or first[4:5], 1
    delimiter = given or find_delimiter(file, text)
    head = list(csv.reader(io.StringIO(text[:HEAD], newline=""), delimiter=delimiter))
    header = head[0]
    headless = not has_header(file, head, request)
    if headless:
        request.notes.say(f"{file.name} has no header, so that its columns are called 1, 2, ...")
    elif twice := [name for name, n in Counter(map(str.strip, header)).items() if name and n > 1]:
        again = ", ".join(f"{name!r} ({name}.1, ...)" for name in twice)
        request.notes.say(
            f"{file.name} has several columns of one name, called otherwise: {again}."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            frame = pd.read_csv(
                io.StringIO(text),
                sep=delimiter,
                header=None if headless else 0,
                dtype=str,
                # "NA" is the name of a class like any other; only what is empty is missing.
                keep_default_na=False,
                skipinitialspace=True,
                skip_blank_lines=False,
                index_col=False,
            )
    except (pd.errors.ParserError, pd.errors.ParserWarning, ValueError) as error:
        cause = str(error).replace("Error tokenizing data. C error: ", "").strip().rstrip(".")
        hint = 'A text that holds the delimiter or a line break must stand between " and ".'
        hint += f" The delimiter is {delimiter!r}; --delimiter (delimiter=...) gives another."
        raise ValueError(f"{file} cannot be read: {cause}. {hint}") from error
    names = [str(n + 1 if headless else n).strip() for n in frame.columns]
    columns = dict(zip(names, (frame[n].tolist() for n in frame.columns), strict=True))
    unnamed = [n for n in columns if n.startswith("Unnamed: ") and _says_nothing(columns[n])]
    for name in unnamed:
        del columns[name]
    return columns, skipped + (1 if headless else 2)


def _says_nothing(values: Sequence[Any]) -> bool:
    """Whether a column without a name is empty, or the index that pandas writes."""
    if all(map(is_missing, values)):
        return True
    return all(is_whole(value) for value in values) and len(set(values)) == len(values)


def find_delimiter(file: Path, text: str) -> str:
    """What separates the fields: what gives as many of them in each of the first rows.

    Raises:
        ValueError: no character does, or several.
    """
    sample = io.StringIO(text[:HEAD], newline="")  # lines of old Macs end in \r
    found = {}
    for delimiter in _DELIMITERS:
        sample.seek(0)
        rows = list(islice(csv.reader(sample, delimiter=delimiter), SNIFFED))
        widths = {len(row) for row in (rows[:-1] or rows) if row}
        if len(rows[0]) > 1:
            found[delimiter] = len(widths)
    usual = "," if file.suffix.lower() == ".csv" else "\t"
    if not found:  # one column
        return usual
    even = [delimiter for delimiter, widths in found.items() if widths == 1]
    if usual in even or (usual in found and not even):
        return usual
    if len(even) == 1 or len(found) == 1:
        return (even or list(found))[0]
    shown = text.partition("\n")[0][:200]
    expected = f"known of {file.name}: its header is {shown!r}"
    hint = "Give what separates the columns, as in --delimiter ';' (delimiter=';')."
    raise invalid("delimiter", expected, f"each of {quoted(even or found)}", hint=hint)


def has_header(file: Path, rows: Sequence[Sequence[str]], request: Request) -> bool:
    """Whether the first row of a CSV file names its columns, and is not the first example.

    Columns that were asked for by name settle it. Else it is an example if it names an image, or
    if it holds a label that stands in other rows, too, or a number above numbers, and a sentence.

    Args:
        file: Its name is told.
        rows: The first of them.
        request: The columns that were asked for; those of a file without a header are 1, 2, ...

    Raises:
        ValueError: it may be either.
    """
    first, *others = ([cell.strip() for cell in row] for row in rows)
    asked = asked_columns(request)
    if any(map(is_image_name, first)):
        return False
    if asked & {*first}:
        return True
    if asked and asked <= {str(place) for place in range(1, len(first) + 1)}:
        return False
    known = (*LABEL_NAMES, *OTHER_LABEL_NAMES, *_SPLIT_NAMES, *_CONTENT_NAMES)
    numbered = [str(place) for place in range(len(first))]  # as pandas writes columns of no name
    like = [at for at, cell in enumerate(first) if cell and _like_others(at, cell, others)]
    named = any(cell.lower() in known for at, cell in enumerate(first) if at not in like)
    if not like or named or first in (numbered, *others):
        return True
    if any(len(cell.split()) >= _SENTENCE for cell in first):
        return False
    argument = "image_column" if isinstance(request, ImageRequest) else "text_column"
    expected = (
        f"given: the first row of {file.name}, {quoted(first)}, may be a header or an example"
    )
    at = max(set(range(len(first))) - set(like), key=lambda place: len(first[place]), default=0)
    hint = f"{first[like[0]]!r} is like what stands below it. --{argument} {first[at]!r} reads the "
    hint += f"row as a header, --{argument} {at + 1} as an example, the columns called 1, 2, ..."
    raise invalid(argument, expected, None, hint=hint)


def _like_others(at: int, cell: str, rows: Sequence[Sequence[str]]) -> bool:
    """Whether a cell of the first row is like those below it: a word again, or one more number."""
    below = [row[at] for row in rows if len(row) > at and row[at]]
    return cell in below if not _is_number(cell) else bool(below) and all(map(_is_number, below))


def asked_columns(request: Request) -> set[str]:
    """The columns that were asked for."""
    names = ("text_column", "image_column", "label_column", "group_column")
    found = (getattr(request, name, None) for name in names)
    return {column for column in found if column is not None}


def _read_json(file: Path, text: str) -> tuple[dict[str, list[Any]], int]:
    try:
        rows = [json.loads(text)] if file.suffix.lower() == ".json" else None
    except ValueError:  # several lines of JSON under that name
        rows = None
    if rows is None:
        rows = [_parsed(file, line, at) for at, line in enumerate(text.split("\n")) if line.strip()]
    elif isinstance(rows[0], list):
        rows = rows[0]
    elif isinstance(rows[0], dict):
        return _columns_of_object(file, rows[0]), 1
    wrong = next((row for row, record in enumerate(rows) if not isinstance(record, dict)), None)
    if wrong is not None or not rows:
        shown = type(rows[wrong]).__name__ if rows and wrong is not None else "nothing"
        expected = 'a row of named values a line, as in {"text": "...", "label": "..."}'
        raise ValueError(f"{file} must hold {expected}, got {shown}")
    names = dict.fromkeys(name for record in rows for name in record)
    return {name: [record.get(name) for record in rows] for name in names}, 1


def _columns_of_object(file: Path, found: dict[str, Any]) -> dict[str, list[Any]]:
    """The columns of a table that is one object of JSON.

    Its values are the columns, as lists or as pandas writes them, with the number of each row; or
    one of them is the list of rows; or it is one row, or has a label by the name of each image.

    Raises:
        ValueError: it is none of these.
    """
    values = list(found.values())
    if all(isinstance(value, dict) for value in values):
        if values and len({tuple(value) for value in values}) == 1:
            return {name: list(value.values()) for name, value in found.items()}
    elif all(isinstance(value, list) for value in values):
        plain = not any(isinstance(item, list | dict) for value in values for item in value)
        if plain and len(set(map(len, values))) == 1:
            return found
    elif found and all(map(is_image_name, found)):
        return {"file": list(found), "label": values}
    elif not any(isinstance(value, list | dict) for value in values):
        return {name: [value] for name, value in found.items()}
    tables = [value for value in values if isinstance(value, list) and value]
    if len(tables) == 1 and all(isinstance(row, dict) for row in tables[0]):
        names = dict.fromkeys(name for row in tables[0] for name in row)
        return {name: [row.get(name) for row in tables[0]] for name in names}
    expected = 'a list of rows, as in [{"text": "...", "label": "..."}]'
    hint = "pandas writes such a list by to_json(orient='records')."
    shown = f"an object of {quoted(list(found)[:5])}"
    raise ValueError(f"{file} must hold {expected}, got {shown}. {hint}")


def _parsed(file: Path, line: str, at: int) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{file}, line {at + 1}: no JSON ({error})") from error


def _read_parquet(file: Path) -> tuple[dict[str, list[Any]], int]:
    from pyarrow import ArrowException, parquet

    try:
        table = parquet.read_table(file)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error
    return table.to_pydict(), 1


# Which column is what


def pick_column(
    argument: str, asked: str | None, guess: Callable[[], list[str]], table: Table, request: Request
) -> str:
    """The column that was asked for, else the one that a guess is certain of, which is noted.

    Raises:
        ValueError: there is no such column, none that could be meant, or several.
    """
    if asked is not None:
        check_choice(argument, asked, list(table.columns), hint=table.described())
        request.notes.columns[argument] = asked
        return asked
    candidates = guess()
    if len(candidates) != 1:
        which = f"each of {quoted(candidates)}" if candidates else "no column for certain"
        options = f"--{argument} ({argument}=...)"
        raise ValueError(f"{which} could be the `{argument}`; give {options}. {table.described()}")
    request.notes.columns[argument] = candidates[0]
    return candidates[0]


def label_candidates(table: Table, used: Collection[str]) -> list[str]:
    """Columns that could hold the labels: one by its name, else all that repeat few values."""
    rest = {name: values for name, values in table.columns.items() if name not in used}
    for names in (LABEL_NAMES, OTHER_LABEL_NAMES):
        named = [name for name in rest if name.lower() in names]
        if named:
            return _same_classes({name: rest[name] for name in named}) or named
    if len(rest) == 1 and len(table.columns) > 1:
        return list(rest) if _distinct(next(iter(rest.values()))) < len(table) else []
    return [name for name, values in rest.items() if name.lower() != "id" and _repeats(values)]


def _same_classes(columns: dict[str, list[Any]]) -> list[str]:
    """The one of several columns that tells the classes in words, if all tell the same."""
    if len(columns) == 1:
        return list(columns)
    rows = {tuple(map(str, row)) for row in zip(*columns.values(), strict=True)}
    if any(len({row[at] for row in rows}) != len(rows) for at in range(len(columns))):
        return []
    words = [name for name, values in columns.items() if not all(map(is_whole, values))]
    return (words or list(columns))[:1]


def text_candidates(table: Table, label: str) -> list[str]:
    """Columns that could hold the texts: ``text``, else all others that hold words."""
    rest = {
        name: values
        for name, values in table.columns.items()
        if name != label and first_nested(values) is None
    }
    named = [name for name in rest if name.lower() == "text"]
    if named:
        return named
    only = [name for name in rest if len(rest) == 1 and name.lower() != "id"]
    strings = [n for n, values in rest.items() if any(map(_is_words, values)) or n in only]
    long = [name for name in strings if not _repeats(rest[name])]
    return long if len(long) == 1 else strings


def first_nested(values: Sequence[Any]) -> Any:
    """The first value that is no single one, as JSON and parquet may have them; None if all are."""
    return next((value for value in values if isinstance(value, list | dict | bytes)), None)


def _is_words(value: Any) -> bool:
    return isinstance(value, str) and not is_missing(value) and not _is_number(value)


def _is_number(value: Any) -> bool:
    return is_whole(value) or is_fraction(value)


def _repeats(values: Sequence[Any]) -> bool:
    """Whether values are few and short, as those of classes are, and not all numbers of a scale."""
    kept = [value for value in values if not is_missing(value)]
    if first_nested(kept) is not None or any(map(is_fraction, kept)):
        return False
    return 2 <= _distinct(kept) <= len(kept) / 2 and max(len(str(v)) for v in set(kept)) <= 100


def _distinct(values: Sequence[Any]) -> int:
    return len({value if not isinstance(value, list | dict) else str(value) for value in values})


def one_hot_columns(table: Table, used: Collection[str]) -> list[str]:
    """Columns of 0 and 1, a class each, of which one is 1 in every row; empty if they are not so.

    Beside others, such as ids or texts, they are it if no other column could hold the labels.

    Raises:
        ValueError: rows have none or several of them.
    """
    rest = [name for name in table.columns if name not in used]
    hot = [name for name in rest if {str(v).strip() for v in table.columns[name]} <= _TRUTHS]
    if len(hot) < 2 or (len(hot) < len(rest) and label_candidates(table, used) != hot):
        return []
    sums = np.sum([[float(v) for v in table.columns[name]] for name in hot], axis=0)
    wrong = np.flatnonzero(sums != 1)
    if len(wrong) and len(hot) < len(rest):
        return []
    if len(wrong):
        what = f"{len(wrong)} of {len(table)} rows have none or several of the classes"
        shown = f"the first is {table.where(int(wrong[0]))}"
        raise ValueError(f"{what} {quoted(hot)}, {shown}: each must have one")
    return hot


_TRUTHS = {"0", "1", "0.0", "1.0"}


def pick_labels(
    table: Table, asked: str | None, used: Collection[str], request: Request
) -> tuple[str, ...]:
    """The column of the labels; several where each is a class, 1 in its rows and 0 in others.

    Raises:
        ValueError: no such column, none that is certain, or one of fractions or lists.
    """
    hot = one_hot_columns(table, used) if asked is None else []
    if hot:
        request.notes.say(f"Labels are the columns of 0 and 1: {quoted(hot)}.")
        return tuple(hot)

    def guess() -> list[str]:
        return label_candidates(table, used)

    column = pick_column("label_column", asked, guess, table, request)
    kept = [value for value in table.columns[column] if not is_missing(value)]
    odd = first_nested(kept)
    expected = "a column of one class a row"
    if odd is not None:
        hint = "Several labels an example have no long tail of classes: choose one of them."
        raise invalid("label_column", expected, f"{column} ({odd!r:.60})", hint=hint)
    fraction = next(filter(is_fraction, kept), None)
    if fraction is not None and all(map(_is_number, kept)):
        hint = f"Cut the numbers into classes first. {table.described()}"
        raise invalid("label_column", expected, f"{column} ({fraction})", hint=hint)
    return (column,)


def labels_of(table: Table, columns: Sequence[str]) -> list[Any]:
    """The label of each row, see :func:`pick_labels`; None where there is none.

    Raises:
        ValueError: the table lacks a column.
    """
    for column in columns:
        if column not in table.columns:
            hint = "Tables to predict often have no labels. "
            hint += "--test_split 0.2 (test_split=0.2) holds a fifth of the training rows out."
            expected = f"a column of {table.file.name}, which is to be tested on"
            raise invalid("label_column", expected, column, hint=f"{hint} {table.described()}")
    if len(columns) == 1:
        return [None if is_missing(v) else v for v in table.columns[columns[0]]]
    one_hot_columns(table, set(table.columns) - set(columns))
    matrix = np.array([[float(v) for v in table.columns[name]] for name in columns])
    return [columns[at] for at in matrix.argmax(axis=0)]


def whole_rows(
    table: Table, missing: Mapping[str, Sequence[bool]], split: str, request: Request
) -> list[int]:
    """The rows that lack nothing; those that do stop, or are left out and counted if asked for.

    Args:
        table: The rows.
        missing: For each thing a row needs, such as ``"text"``, which rows lack it.
        split: Name of the split, for the message.
        request: Says whether to leave rows out.

    Raises:
        ValueError: some rows lack something, or all do.
    """
    lacking = {what: np.flatnonzero(rows) for what, rows in missing.items() if any(rows)}
    gone = set(np.concatenate(list(lacking.values())).tolist()) if lacking else set()
    if lacking and not request.skip_empty:
        shown = [
            f"{len(rows)} have no {what}, the first is row {table.numbers[rows[0]]}"
            for what, rows in lacking.items()
        ]
        hint = "Leave such rows out with --skip_empty (skip_empty=True)."
        raise ValueError(f"Of {len(table)} rows of {table.file} {'; '.join(shown)}. {hint}")
    if len(gone) == len(table):
        raise ValueError(f"no row of {table.file} has a {' and a '.join(missing)}")
    for what, rows in lacking.items():
        request.notes.leave_out(f"rows of {split} without {what}", len(rows))
    return [row for row in range(len(table)) if row not in gone]


def split_column(table: Table, request: Request) -> str | None:
    """The column that says which split each row belongs to, if one is certain to."""
    for name, values in table.columns.items():
        if name.lower() in _SPLIT_NAMES:
            kinds = {split_kind(str(value).strip()) for value in values}
            if "train" in kinds and None not in kinds and len(kinds) > 1:
                return name
    return None


# The parts of a data set


def read_parts(request: Request, suffixes: Collection[str] = TABLE_SUFFIXES) -> dict[str, Table]:
    """The table to train on and the one to test on, under ``train_split`` and ``test_split``.

    The second is left out if a share of the first is to be held out.

    Raises:
        ValueError: no such split, or none to test on.
    """
    if isinstance(request, ImageRequest) and request.is_listed:
        lists = dict(zip(("train_split", "test_split"), request.listed_in(), strict=True))
        request.notes.parts |= {argument: file.name for argument, file in lists.items()}
        return {argument: read_table(file, request) for argument, file in lists.items()}
    files = tables_of(request, suffixes)
    whole = files.get("")
    if whole is None:
        names = {"train_split": request.train_split, "test_split": request.test_split}
        found = _named(names, files, request)
        return {argument: read_table(files[name], request) for argument, name in found.items()}
    table = read_table(whole, request)
    other = _other_table(request)
    if other is not None:
        request.notes.parts |= {"train_split": whole.name, "test_split": other.name}
        return {"train_split": table, "test_split": read_table(other, request)}
    column = split_column(table, request)
    if column is not None and request.test_share is not None:
        what = f"Column {column!r} tells which rows are to test on, and is not used"
        request.notes.say(f"{what}: a share of all rows is tested on.")
    elif column is not None:
        request.notes.say(f"Which rows are to test on is read from column {column!r}.")
        values = [str(value).strip() for value in table.columns.pop(column)]
        names = {"train_split": request.train_split, "test_split": request.test_split}
        found = _named(names, dict.fromkeys(values), request)
        return {
            argument: table.select([row for row, value in enumerate(values) if value == name])
            for argument, name in found.items()
        }
    if request.test_share is None:
        raise undivided(f"{whole} is one table of all rows", request)
    return {"train_split": table}


def _named(
    asked: dict[str, str | None], available: Collection[str], request: Request
) -> dict[str, str]:
    train, test = pick_splits(request, list(available))
    return {"train_split": train} if test is None else {"train_split": train, "test_split": test}


def _other_table(request: Request) -> Path | None:
    """The file of the rows to test on, where ``test_split`` names one."""
    if request.test_split is None or request.is_folder:
        return None
    given = Path(request.test_split).expanduser()
    for file in (given, request.root.parent / given):
        if file.is_file() and is_table(file):
            return file
    return None


def check_file(request: Request) -> None:
    """Say what to do with a file that nothing here reads, or that is not there.

    Raises:
        ValueError: it is one.
    """
    suffix = request.root.suffix.lower()
    if suffix in SPREADSHEETS:
        hint = "Save it as CSV (in Excel: Save as, CSV UTF-8)."
        raise invalid("dataset", "a CSV file, not a spreadsheet", request.dataset, hint=hint)
    if suffix in ARCHIVES:
        inner = request.root.stem
        is_packed = Path(inner).suffix.lower() in TABLE_SUFFIXES
        hint = f"Unpack it, and give {inner if is_packed else 'the folder'}."
        raise invalid("dataset", "a folder or a table, not an archive", request.dataset, hint=hint)
    known = (*SINGLE_FILES, *PARQUET)
    if suffix in known and not request.root.exists():
        raise invalid("dataset", "a file that is there", request.dataset)
    if suffix not in known and request.root.is_file():
        expected = f"a folder, or a table ({' '.join(TABLE_SUFFIXES)})"
        hint = "Write it as CSV or JSON Lines (pandas: to_csv, to_json(orient='records'))."
        raise invalid("dataset", expected, request.dataset, hint=hint)
