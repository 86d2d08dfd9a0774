"""What a run recorded: ``history.csv``, a row an epoch, and ``metrics.json`` at the end."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ldam_plugins._validation import check_choice, check_int, invalid, quoted
from ldam_plugins.counts import ClassCounts
from ldam_plugins.training.environment import device_name, own_command, run_versions
from ldam_plugins.training.files import disk_errors, to_json, write_atomic
from ldam_plugins.training.run_dir import (
    CONFUSION_FILES,
    HISTORY_FILE,
    METRICS_FILE,
    PREDICTION_FILES,
    hold_folder,
)

HISTORY_COLUMNS = ("epoch", "lr", "stage", "train_loss", "val_error", "seconds")
ERROR_COLUMNS = ("val_error", "test_error")
"""On what a run may be evaluated while it trains: held-out training samples, the test set."""
_WITH_TEST_ERROR = (*HISTORY_COLUMNS[:-1], "test_error", HISTORY_COLUMNS[-1])
_OF_EARLIER_VERSIONS = (*HISTORY_COLUMNS[:4], "test_error", HISTORY_COLUMNS[-1])
CONFUSION_COLUMNS = ("true", "predicted", "samples")
_MEASURED = ("device", "train_seconds", "examples_per_second", "test")
METRICS_KEYS = ("options", "versions", "class_counts", *_MEASURED)


class HistoryWriter:
    """``history.csv``: one row an epoch, on disk as soon as it is appended.

    Columns: ``epoch`` (0-based), ``lr``, ``stage``, ``train_loss``, ``val_error`` (%, on held-out
    training samples), ``seconds``; an empty field where something was not measured. A run whose
    test error is drawn as it trains, as that of the paper's figures, has ``test_error`` (%) before
    the seconds. Append the row before the checkpoint of that epoch is written, so that a resumed
    run finds every row it needs. The folder is locked against other processes while there is a
    writer.

    Args:
        output_dir: Folder of the run.
        start_epoch: First epoch still to be trained. Rows from there on, left by a run that
            was stopped after its last checkpoint, are dropped.
        test_error: Whether there is a column ``test_error``.

    Raises:
        ValueError: another process is at work in the folder, or rows to go on with that have other
            columns.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> history = HistoryWriter(folder)
        >>> history.append(
        ...     epoch=0, lr=0.1, stage="uniform", train_loss=2.5, val_error=80.0, seconds=3.0
        ... )
        >>> read_history(folder)[0]["train_loss"]
        2.5
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        start_epoch: int = 0,
        *,
        test_error: bool = False,
    ) -> None:
        check_int("start_epoch", start_epoch, low=0)
        self._columns = _WITH_TEST_ERROR if test_error else HISTORY_COLUMNS
        self._lock: Any = hold_folder(output_dir)
        self.path = Path(output_dir) / HISTORY_FILE
        there, rows = _read(self.path) if start_epoch and self.path.exists() else ((), [])
        kept = [row for row in rows if row["epoch"] < start_epoch]
        if kept and there != self._columns:
            expected = f"as in {self.path}, which has the columns {', '.join(there)}"
            raise invalid("test_error", expected, test_error)
        self._last_epoch = kept[-1]["epoch"] if kept else -1
        lines = [self._columns, *([row[name] for name in self._columns] for row in kept)]
        write_atomic(self.path, "".join(map(_csv_line, lines)).encode())

    def append(
        self,
        *,
        epoch: int,
        lr: float,
        stage: str,
        train_loss: float | None,
        seconds: float,
        val_error: float | None = None,
        test_error: float | None = None,
    ) -> None:
        """Add the row of an epoch.

        Raises:
            OSError: it cannot be written.
            ValueError: ``epoch`` is not after the last one, or an error has no column.
        """
        check_int("epoch", epoch, low=self._last_epoch + 1)
        if test_error is not None and "test_error" not in self._columns:
            hint = "Make the writer with test_error=True."
            raise invalid("test_error", "None in a history without it", test_error, hint=hint)
        row = {"epoch": epoch, "lr": lr, "stage": stage, "train_loss": train_loss}
        row |= {"val_error": val_error, "test_error": test_error, "seconds": seconds}
        line = _csv_line([row[name] for name in self._columns])
        with (
            disk_errors(self.path.parent),
            self.path.open("a", encoding="utf-8", newline="") as file,
        ):
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._last_epoch = epoch

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_lock": None}  # of a process


def read_history(output_dir: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Rows of ``history.csv`` in order: ``epoch`` int, ``stage`` str, the rest float or None.

    Every row has a ``val_error`` and a ``test_error``, None where the file has no such column.
    Files of earlier versions, which had one of the two, are read as well. A last line without its
    end, of a run that was killed while writing it, is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the columns are not those of a run.
    """
    _, rows = _read(Path(output_dir) / HISTORY_FILE)
    return [dict.fromkeys(ERROR_COLUMNS) | row for row in rows]


def _read(path: Path) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """Columns and rows of a history, as they stand in the file."""
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    reader = csv.DictReader(io.StringIO(whole))
    columns = tuple(reader.fieldnames or ())
    if columns not in (HISTORY_COLUMNS, _WITH_TEST_ERROR, _OF_EARLIER_VERSIONS):
        expected = f"the columns of a run ({', '.join(HISTORY_COLUMNS)})"
        raise invalid(str(path), expected, reader.fieldnames)
    return columns, [{name: _parsed(name, value) for name, value in row.items()} for row in reader]


def _parsed(column: str, value: str) -> Any:
    if column == "stage":
        return value
    if column == "epoch":
        return int(value)
    return float(value) if value else None


def _csv_line(values: Collection[Any]) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue()


def run_metrics(
    *,
    options: Mapping[str, Any],
    class_counts: ClassCounts,
    device: torch.device | str,
    test: Mapping[str, Any] | None,
    **more: Any,
) -> dict[str, Any]:
    """What :func:`write_metrics` writes of a run, apart from its :func:`training_times`.

    Args:
        options: Everything that makes the run.
        class_counts: Training samples per class.
        device: Where the model was trained.
        test: Metrics on the test set, as of :func:`~ldam_plugins.training.evaluate`; None where it
            was left alone.
        **more: Further entries.
    """
    return {
        "options": dict(options),
        "command": own_command(),
        "versions": run_versions(),
        "class_counts": class_counts.counts,
        "class_names": class_counts.class_names,
        "group_limits": class_counts.limits,
        "device": device_name(device),
        **more,
        "test": None if test is None else dict(test),
    }


def training_times(output_dir: str | os.PathLike[str], samples: int) -> dict[str, float]:
    """``train_seconds`` and ``examples_per_second`` of a finished run, from its history.

    Args:
        output_dir: Folder of the run.
        samples: Training samples of an epoch.
    """
    rows = read_history(output_dir)
    seconds = sum(row["seconds"] for row in rows)
    return {"train_seconds": seconds, "examples_per_second": samples * len(rows) / seconds}


def write_metrics(output_dir: str | os.PathLike[str], metrics: Mapping[str, Any]) -> Path:
    """Write ``metrics.json``, strict JSON, whole or not at all.

    The confusion matrices of ``test`` and ``validation``, where there are, go into files of their
    own before it: ``confusion.csv`` and ``confusion_validation.csv`` have columns ``true``,
    ``predicted`` and ``samples``, a row for each pair of classes that occurs, by name. So do
    predictions, into ``predictions.csv`` and ``predictions_validation.csv``, a row an example.

    Args:
        output_dir: Folder of the run.
        metrics: ``options``, ``versions``, ``class_counts``, ``device``, ``train_seconds``,
            ``examples_per_second``, ``test``, and any more (``class_names``, say).

    Raises:
        TypeError: a value that JSON cannot hold.
        ValueError: a missing key, or a NaN or infinite number (named).
    """
    missing = [key for key in METRICS_KEYS if key not in metrics]
    if missing:
        raise invalid("metrics", f"complete, with {quoted(missing)}", list(metrics))
    path, kept = Path(output_dir) / METRICS_FILE, dict(metrics)
    names = metrics.get("class_names")
    for part in PREDICTION_FILES:
        found = dict(kept.get(part) or {})
        for key, file, to_csv in (
            ("confusion", CONFUSION_FILES[part], _confusion_csv),
            ("predictions", PREDICTION_FILES[part], _predictions_csv),
        ):
            if key in found:
                # A file name may hold bytes that are no text.
                content = to_csv(found.pop(key), names).encode("utf-8", "backslashreplace")
                write_atomic(Path(output_dir) / file, content)
                kept[part] = found
    write_atomic(path, to_json(kept, name="metrics").encode())
    return path


def _confusion_csv(
    confusion: Mapping[str, Sequence[int]], class_names: Sequence[str] | None
) -> str:
    true, predicted = (
        [index if class_names is None else class_names[index] for index in confusion[name]]
        for name in ("true", "predicted")
    )
    rows = zip(true, predicted, confusion["samples"], strict=True)
    return "".join([_csv_line(CONFUSION_COLUMNS), *map(_csv_line, rows)])


def _predictions_csv(
    columns: Mapping[str, Sequence[Any]], class_names: Sequence[str] | None
) -> str:
    import pandas as pd

    table = pd.DataFrame(dict(columns))
    for name in table:
        if name == "label" or name.startswith("predicted"):
            indices = table[name].tolist()
            names = indices if class_names is None else [*class_names, ""]  # -1 is unknown
            table[name] = indices if class_names is None else [names[index] for index in indices]
    return table.to_csv(index=False, float_format="%.7g", lineterminator="\n")


def read_confusion(
    output_dir: str | os.PathLike[str], class_counts: ClassCounts, part: str = "test"
) -> dict[str, list[int]] | None:
    """The confusion matrix of a run, as of :func:`.long_tail_metrics`; None if there is none.

    Args:
        output_dir: Folder of the run.
        class_counts: With the names of the classes, if they have any.
        part: ``"test"`` or ``"validation"``.

    Raises:
        ValueError: the file is not one of these classes.
    """
    path = Path(output_dir) / CONFUSION_FILES[check_choice("part", part, CONFUSION_FILES)]
    if not path.exists():
        return None
    names = class_counts.class_names or range(len(class_counts))
    index_of = {str(name): index for index, name in enumerate(names)}
    rows = list(csv.DictReader(io.StringIO(path.read_bytes().decode(), newline="")))
    try:
        return {
            "true": [index_of[row["true"]] for row in rows],
            "predicted": [index_of[row["predicted"]] for row in rows],
            "samples": [int(row["samples"]) for row in rows],
        }
    except (KeyError, ValueError, TypeError) as error:
        raise invalid(str(path), "the confusion matrix of the run's classes", str(error)) from error


def read_metrics(output_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """``metrics.json`` of a run.

    Raises:
        FileNotFoundError: there is no such file.
    """
    text = (Path(output_dir) / METRICS_FILE).read_text(encoding="utf-8")
    return dict(json.loads(text))
