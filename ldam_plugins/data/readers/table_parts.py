"""Tables read some rows at a time, in little memory however long they are."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np

from ldam_plugins.data.readers.base import Request
from ldam_plugins.data.readers.class_names import is_missing
from ldam_plugins.data.readers.paths import has_zeros, read_text
from ldam_plugins.data.readers.tables import (
    HEAD,
    JSON_LINES,
    PARQUET,
    Table,
    find_delimiter,
    has_header,
    read_table,
)

_Item = TypeVar("_Item")
_REREAD = 2**28


class _Unreadable:
    def __repr__(self) -> str:
        return "(cannot be read)"


UNREADABLE: Final = _Unreadable()
"""Stands for each value of a row that is damaged: a line of no JSON, or of other many fields."""


def batched(items: Iterable[_Item], size: int) -> Iterator[list[_Item]]:
    """Lists of ``size`` items, the last one of what is left."""
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part


def table_parts(file: Path, request: Request, rows: int) -> Iterator[Table]:
    """The rows of a table as :func:`~.tables.read_table` reads them, at most ``rows`` at a time.

    A damaged row does not stop it: its values are :data:`UNREADABLE`. A ``.json`` file that is one
    list is read as a whole.

    Args:
        file: A CSV, TSV, JSON Lines or parquet file.
        request: Encoding and delimiter.
        rows: Rows of a part, those that hold nothing included.

    Raises:
        ValueError: when the part is asked for, that the file or a part of it cannot be read, or is
            no table.
    """
    suffix = file.suffix.lower()
    if suffix in PARQUET:
        parts = _parquet_parts(file, rows)
    elif suffix == ".json":
        whole = read_table(file, request)
        blocks = batched(range(len(whole)), rows)
        parts = ((whole.select(b).columns, whole.numbers[b]) for b in blocks)
    elif suffix in JSON_LINES:
        parts = _json_parts(file, request, rows)
    else:
        parts = _separated_parts(file, request, rows)
    for columns, numbers in parts:
        table = Table(file, columns, numbers)
        full = ~np.all([[is_missing(v) for v in values] for values in columns.values()], axis=0)
        if full.all():
            yield table
        elif full.any():
            yield table.select(np.flatnonzero(full))


_Parts = Iterator[tuple[dict[str, list[Any]], np.ndarray]]


def _separated_parts(file: Path, request: Request, rows: int) -> _Parts:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a text may be longer than a field
    with text_lines(file, request.encoding) as lines:
        head = list(_until(lines, HEAD))
        given, first = request.delimiter, 1
        if head[0][:4].lower() == "sep=":  # what Excel takes for the delimiter
            given, first = given or head[0][4:5], 2
            head = head[1:]
        delimiter = given or find_delimiter(file, "".join(head))
        reader = csv.reader(chain(head, lines), delimiter=delimiter, skipinitialspace=True)
        header = next(reader)
        if not has_header(file, list(csv.reader(head, delimiter=delimiter)), request):
            numbered: Iterable[list[str]] = chain([header], reader)
            names = [str(place) for place in range(1, len(header) + 1)]
        else:
            numbered, first, names = reader, first + 1, _column_names(header)
        for part in batched(_fields(file, numbered), rows):
            found = [_fitted(row, len(names)) for row in part]
            damaged = [place for place, row in enumerate(found) if row[0] is UNREADABLE]
            if 2 * len(damaged) > len(found):
                where = f"row {first + damaged[0]} has {len(part[damaged[0]])} fields"
                hint = 'A text that holds the delimiter or a line break must stand between " and "'
                hint += f"; the delimiter is {delimiter!r}, --delimiter gives another"
                raise ValueError(f"{file}: {where}, the first {len(names)}. {hint}")
            columns = zip(*found, strict=True)
            numbers = np.arange(first, first + len(found))
            yield {n: list(c) for n, c in zip(names, columns, strict=True)}, numbers
            first += len(found)


def _fields(file: Path, reader: Iterable[list[str]]) -> Iterator[list[str]]:
    try:
        yield from reader
    except csv.Error as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _fitted(row: list[str], width: int) -> list[Any]:
    """The fields of a row, of which those at its end may be missing, or empty beyond the last."""
    if len(row) <= width:
        return [*row, *[""] * (width - len(row))]
    return [UNREADABLE] * width if any(map(str.strip, row[width:])) else row[:width]


def _column_names(header: list[str]) -> list[str]:
    """Names of columns, each once: a second ``text`` is ``text.1``."""
    found: list[str] = []
    for place, cell in enumerate(header):
        name = cell.strip() or f"Unnamed: {place}"
        again = sum(each == name for each in map(str.strip, header[:place]))
        found.append(f"{name}.{again}" if again else name)
    return found


def _json_parts(file: Path, request: Request, rows: int) -> _Parts:
    with text_lines(file, request.encoding) as lines:
        full = ((number, line) for number, line in enumerate(lines, 1) if line.strip())
        names: list[str] = []
        for part in batched(full, rows):
            records = [_record(line) for _, line in part]
            known = [record for record in records if record is not None]
            if not names:
                names = list(dict.fromkeys(name for record in known for name in record))
            if not names:
                expected = 'a row of named values a line, as in {"text": "..."}'
                raise ValueError(f"{file} must hold {expected}, got {part[0][1][:40]!r}")
            columns = {
                name: [UNREADABLE if r is None else r.get(name) for r in records] for name in names
            }
            yield columns, np.array([number for number, _ in part])


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def _parquet_parts(file: Path, rows: int) -> _Parts:
    from pyarrow import ArrowException, parquet

    first = 1
    try:
        with parquet.ParquetFile(file) as opened:
            for batch in opened.iter_batches(rows):
                yield batch.to_pydict(), np.arange(first, first + len(batch))
                first += len(batch)
    except (ArrowException, OSError) as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


@contextmanager
def text_lines(file: Path, encoding: str | None = None) -> Iterator[Iterator[str]]:
    """The lines of a text file with their ends, as :func:`~.paths.read_text` decodes them.

    Raises:
        ValueError: the file cannot be read, is empty or is of another encoding.
    """
    try:
        with file.open(encoding=encoding or "utf-8-sig", newline="") as opened:
            first = next(opened, "").removeprefix("\ufeff")
            if encoding is None and has_zeros(first):
                read_text(file)  # which says what it is
            lines = chain([first], opened)
            if not first.strip():
                before = list(_until(lines, HEAD))
                if not "".join(before).strip():
                    raise ValueError(f"{file} is empty")
                lines = chain(before, lines)
            yield lines
    except (UnicodeDecodeError, LookupError, OSError) as error:
        if not isinstance(error, UnicodeDecodeError) or file.stat().st_size < _REREAD:
            read_text(file, encoding)  # which says what is wrong, and where
        what = encoding or "UTF-8"
        raise ValueError(
            f"{file} is not {what} text ({error}); --encoding gives another"
        ) from error


def _until(lines: Iterator[str], characters: int) -> Iterator[str]:
    """Lines up to so many characters."""
    for line in lines:
        yield line
        characters -= len(line)
        if characters < 0:
            return
