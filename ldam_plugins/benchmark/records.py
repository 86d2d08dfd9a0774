"""Records: what is kept of a finished run, a line of JSON each in one table an experiment."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ldam_plugins._validation import invalid, quoted
from ldam_plugins.counts import ClassCounts
from ldam_plugins.metrics.views import error_views
from ldam_plugins.training.files import write_atomic
from ldam_plugins.training.history import METRICS_KEYS, read_metrics
from ldam_plugins.training.run_dir import COMMAND_FILE, METRICS_FILE

Record = dict[str, Any]
"""``metrics.json`` of one run, after its ``name`` and the ``command`` that made it; with ``tuned``,
as of :meth:`.Search.record`, where options of the run were tuned.

Without the intervals of single classes, which would be most of it."""

TUNED_FILE = "tuned.json"
"""Beside the metrics of a run: ``tuned`` of its record."""

UNKNOWN = "unknown"
"""The precision of a run that was made before runs recorded it."""


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """Records of an experiment, by name.

    Args:
        path: A file of JSON Lines, as :func:`write_records` writes it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no record, or a line that is not a whole one.
    """
    # pandas.read_json(path, lines=True) reads this file too, but by default it rounds the last
    # digit of numbers, and it fills what some records lack with NaN.
    with Path(path).open(encoding="utf-8") as file:
        lines = list(file)
    if not lines:
        raise invalid("experiment", "a file with a record a line", str(path))
    records = [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]
    return sorted(records, key=_name)


def _parse(line: str, place: str) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place} is not JSON: {error}") from error
    missing = [key for key in ("name", "command", *METRICS_KEYS) if key not in record]
    if missing:
        raise invalid(place, f"a whole record, with {quoted(missing)}", list(record))
    return _measured(record, place)


def _measured(record: Record, place: str) -> Record:
    if record["test"] is None:
        expected = "the record of a run measured on the test set"
        raise invalid(place, expected, "one made with --evaluate validation")
    return record


def write_records(path: str | os.PathLike[str], records: Sequence[Mapping[str, Any]]) -> None:
    """Write records by name, one a line, so that a comparison of versions shows what changed.

    The keys of a record stay in the order they have: that of the options is used in tables.
    """
    lines = [json.dumps(record, ensure_ascii=False) for record in sorted(records, key=_name)]
    write_atomic(path, "".join(f"{line}\n" for line in lines).encode())


def add_records(path: str | os.PathLike[str], records: Sequence[Mapping[str, Any]]) -> None:
    """Add records to a file of them, or begin it; those of the same name are replaced."""
    kept = read_records(path) if Path(path).exists() else []
    by_name = {record["name"]: record for record in [*kept, *records]}
    write_records(path, list(by_name.values()))


def _name(record: Mapping[str, Any]) -> str:
    return record["name"]


def collect_records(
    folder: str | os.PathLike[str], leave_out: Collection[str] = ()
) -> list[Record]:
    """Records of the finished runs of a grid, from the folders of its cells.

    Args:
        folder: What holds a folder a cell.
        leave_out: Names of cells whose files are not what the grid asked for.
    """
    cells = [path.parent for path in sorted(Path(folder).glob(f"*/{METRICS_FILE}"))]
    return [_measured(_record(cell), str(cell)) for cell in cells if cell.name not in leave_out]


def new_record(name: str, command: str | None, metrics: Mapping[str, Any]) -> Record:
    """A record of what :func:`~ldam_plugins.training.run_metrics` gives of a run.

    Args:
        name: Of the run.
        command: That made it.
        metrics: Of it; what records do not keep is left out.
    """
    kept = {part: metrics[part] for part in ("test", "validation") if metrics.get(part)}
    kept = {part: {**found} for part, found in kept.items()}
    for found in kept.values():
        found.pop("confusion", None)
        found["intervals"] = {
            key: ends
            for key, ends in found.get("intervals", {}).items()
            if not key.startswith("per_class")
        }
        if not found["intervals"]:
            del found["intervals"]
    # The command in the metrics is that of the process: with --resume, and where its files are.
    rest = {key: value for key, value in metrics.items() if key != "command"}
    return {"name": name, "command": command, "mixed_precision": UNKNOWN, **rest, **kept}


def _record(cell: Path) -> Record:
    tuned = cell / TUNED_FILE
    found = {"tuned": json.loads(tuned.read_text(encoding="utf-8"))} if tuned.exists() else {}
    return {**new_record(cell.name, _command(cell), read_metrics(cell)), **found}


def write_tuned(folder: str | os.PathLike[str], tuned: Mapping[str, Any]) -> None:
    """Write what a search says of a finished run, for its record, beside its metrics."""
    write_atomic(Path(folder, TUNED_FILE), f"{json.dumps(tuned, ensure_ascii=False)}\n".encode())


def _command(cell: Path) -> str | None:
    path = cell / COMMAND_FILE
    return path.read_text(encoding="utf-8").strip() if path.exists() else None


def test_metrics(record: Record) -> dict[str, Any]:
    """The test metrics of a run, with both of :func:`.error_views` also where it is older."""
    test, counts = record["test"], ClassCounts(record["class_counts"])
    return {**test, **error_views(test["per_class_accuracy"], counts)}


def errors_of(records: Iterable[Record], view: str = "balanced_error") -> list[float]:
    """An error in % of each run, the balanced one unless told: one of :func:`.error_views`."""
    return [test_metrics(record)[view] for record in records]
