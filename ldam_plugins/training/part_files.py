"""A table of any length that several processes write in parts, and that goes on when stopped."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldam_plugins._validation import invalid
from ldam_plugins.training.files import flush_names, write_atomic
from ldam_plugins.training.run_dir import hold_folder

if TYPE_CHECKING:
    from pyarrow import Table

TABLE_FORMATS = (".csv", ".parquet")
_STATE = "begun.json"
_ROW_GROUP = 65_536


class PartFiles:
    """A table whose parts are files of their own until all of them are there.

    They lie in the folder ``OUTPUT.partial``, each whole or not there at all, so any process may
    write any of them, and a later command goes on with those that lack, on as many processes as it
    likes. Memory does not grow with the number of rows.

    Args:
        output: The table that is to be written, ``.csv`` or ``.parquet``.
        columns: Its columns, the first of which names the row.
        types: Of parquet, where a column is no text: ``"double"`` or ``"bool"``.

    Raises:
        ValueError: another kind of file.
    """

    def __init__(
        self,
        output: str | os.PathLike[str],
        columns: Sequence[str],
        types: Mapping[str, str] | None = None,
    ) -> None:
        self.output, self.columns, self.types = Path(output), list(columns), dict(types or {})
        if self.output.suffix.lower() not in TABLE_FORMATS:
            expected = f"a file that ends in {' or '.join(TABLE_FORMATS)}"
            raise invalid("output", expected, str(output))
        self.folder = Path(f"{output}.partial")

    def begin(
        self, made: Mapping[str, Any], parts: Iterable[Sequence[str]], *, anew: bool = False
    ) -> list[int]:
        """Begin, or go on; of several processes the first calls this, before the others go on.

        Args:
            made: What the rows depend on, as JSON takes it.
            parts: Names of the rows of each part.
            anew: Delete what an earlier command has left.

        Returns:
            How many rows each part has.

        Raises:
            ValueError: what was begun depends on something else or has other rows, or another
                process is writing it. Nothing is changed then.
        """
        again = f"Delete {self.folder} to begin anew, or give the same again."
        if anew:
            shutil.rmtree(self.folder, ignore_errors=True)
        stored = self._stored()
        now = json.loads(json.dumps(made))
        if stored is not None and stored != now:
            keys = sorted(k for k in {**stored, **now} if stored.get(k) != now.get(k))
            raise ValueError(f"{self.folder} was begun with another {', '.join(keys)}. {again}")
        sizes = []
        for index, names in enumerate(parts):
            if self.is_done(index) and [row[0] for row in self._rows(index)] != list(names):
                raise ValueError(f"{self.folder} is of other rows, in part {index}. {again}")
            sizes.append(len(names))
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            hold_folder(self.folder)
        except ValueError as error:
            expected = "one that no other command is writing"
            raise invalid("output", expected, str(self.output)) from error
        write_atomic(self.folder / _STATE, json.dumps(now).encode())
        return sizes

    def is_done(self, index: int) -> bool:
        """Whether a part, 0-based, is there."""
        return self._file(index).exists()

    def done(self) -> list[int]:
        """The parts that are there, by one look into the folder."""
        return sorted(int(file.stem) for file in self.folder.glob("[0-9]*.csv"))

    def write(self, index: int, rows: Iterable[Sequence[Any]]) -> None:
        """Write a part, whole or not at all."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        write_atomic(self._file(index), text.getvalue().encode())

    def finish(self, parts: int) -> None:
        """Put the whole table where it was asked for, and delete the parts.

        Args:
            parts: How many there are; all of them are done.
        """
        beside = self.output.with_name(f".{self.output.name}.{os.getpid()}.tmp")
        try:
            if self.output.suffix.lower() == ".parquet":
                self._write_parquet(beside, parts)
            else:
                self._write_csv(beside, parts)
            os.replace(beside, self.output)
        finally:
            beside.unlink(missing_ok=True)
        flush_names(self.output.absolute().parent)
        shutil.rmtree(self.folder)

    def rows(self, parts: int) -> Iterator[list[str]]:
        """The rows of all parts, as text."""
        for index in range(parts):
            yield from self._rows(index)

    def _file(self, index: int) -> Path:
        return self.folder / f"{index:06d}.csv"

    def _rows(self, index: int) -> list[list[str]]:
        with self._file(index).open(encoding="utf-8", newline="") as file:
            return list(csv.reader(file))

    def _stored(self) -> dict[str, Any] | None:
        try:
            return dict(json.loads((self.folder / _STATE).read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None

    def _write_csv(self, path: Path, parts: int) -> None:
        with path.open("wb") as file:
            header = io.StringIO()
            csv.writer(header, lineterminator="\n").writerow(self.columns)
            file.write(header.getvalue().encode())
            for index in range(parts):
                with self._file(index).open("rb") as part:
                    shutil.copyfileobj(part, file)
            file.flush()
            os.fsync(file.fileno())

    def _write_parquet(self, path: Path, parts: int) -> None:
        import pyarrow
        from pyarrow import parquet

        kinds = {"double": pyarrow.float64(), "bool": pyarrow.bool_(), "text": pyarrow.string()}
        schema = pyarrow.schema([(n, kinds[self.types.get(n, "text")]) for n in self.columns])
        kept: list[list[str]] = []
        with parquet.ParquetWriter(path, schema) as writer:
            for index in range(parts):
                kept += self._rows(index)
                if len(kept) >= _ROW_GROUP:
                    writer.write_table(self._typed(kept, schema))
                    kept = []
            if kept or not parts:
                writer.write_table(self._typed(kept, schema))

    def _typed(self, rows: list[list[str]], schema: Any) -> Table:
        import pyarrow

        columns: dict[str, Any] = dict(zip(self.columns, zip(*rows, strict=True), strict=True))
        readers = {"double": float, "bool": lambda word: word == "yes"}
        for name, kind in self.types.items():
            read = readers[kind]
            columns[name] = [None if word == "" else read(word) for word in columns[name]]
        return pyarrow.table({n: list(values) for n, values in columns.items()}, schema=schema)


def file_stamps(*paths: str | os.PathLike[str], suffixes: Sequence[str] = ()) -> list[list[Any]]:
    """Name, size and time of change of files, and of those right in folders; nothing of others.

    Args:
        *paths: Files and folders.
        suffixes: Endings that count, of the files in folders. Default: all.
    """
    found = []
    for path in map(Path, paths):
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        for file in files:
            is_meant = not path.is_dir() or not suffixes or file.suffix in suffixes
            if file.is_file() and is_meant:
                known = file.stat()
                found.append([file.name, known.st_size, known.st_mtime_ns])
    return found
