"""The files of a run: history and metrics, written so that none is torn."""

from __future__ import annotations

import csv
import errno
import io
import json
import math
import os
import platform
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ldam_plugins._validation import check_int, invalid, quoted
from ldam_plugins.training.run_lock import hold_folder

OPTIONS_FILE, HISTORY_FILE, METRICS_FILE = "options.json", "history.csv", "metrics.json"
COMMAND_FILE = "command.txt"

HISTORY_COLUMNS = ("epoch", "lr", "stage", "train_loss", "test_error", "seconds")
_MEASURED = ("device", "train_seconds", "examples_per_second", "test")
METRICS_KEYS = ("options", "versions", "class_counts", *_MEASURED)

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
_PACKAGES = ("ldam_plugins", "torch", "timm", "transformers", "accelerate", "datasets", "numpy")


@contextmanager
def disk_errors(output_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Word the errors of a disk that is full, read-only or gone: what failed, and what to do.

    Raises:
        OSError: instead of such an error of the system, of safetensors or of torch, each of
            which words it otherwise; all other errors pass.
    """
    try:
        yield
    except Exception as error:
        number = getattr(error, "errno", None) if isinstance(error, OSError) else None
        told = re.search(r"\(os error (\d+)\)", str(error))  # safetensors
        number = int(told[1]) if told else number
        if number not in _DISK_ERRORS and "PytorchStreamWriter failed" not in str(error):
            raise
        hint = "Make room or mend the folder, then go on from the last checkpoint with --resume"
        message = f"output_dir {str(output_dir)!r} cannot be written ({error}). {hint}."
        raise OSError(message) from error


class HistoryWriter:
    """``history.csv``: one row an epoch, on disk as soon as it is appended.

    Columns: ``epoch`` (0-based), ``lr``, ``stage``, ``train_loss``, ``test_error`` (%),
    ``seconds``; an empty field where something was not measured. Append the row before the
    checkpoint of that epoch is written, so that a resumed run finds every row it needs. The folder
    is locked against other processes while there is a writer.

    Args:
        output_dir: Folder of the run.
        start_epoch: First epoch still to be trained. Rows from there on, left by a run that
            was stopped after its last checkpoint, are dropped.

    Raises:
        ValueError: another process is at work in the folder.

    Example:
        >>> import tempfile
        >>> folder = tempfile.mkdtemp()
        >>> history = HistoryWriter(folder)
        >>> history.append(
        ...     epoch=0, lr=0.1, stage="uniform", train_loss=2.5, test_error=80.0, seconds=3.0
        ... )
        >>> read_history(folder)[0]["train_loss"]
        2.5
    """

    def __init__(self, output_dir: str | os.PathLike[str], start_epoch: int = 0) -> None:
        check_int("start_epoch", start_epoch, low=0)
        self._lock: Any = hold_folder(output_dir)
        self.path = Path(output_dir) / HISTORY_FILE
        rows = read_history(output_dir) if start_epoch and self.path.exists() else []
        kept = [row for row in rows if row["epoch"] < start_epoch]
        self._last_epoch = kept[-1]["epoch"] if kept else -1
        lines = [_csv_line(HISTORY_COLUMNS), *(_csv_line(row.values()) for row in kept)]
        write_atomic(self.path, "".join(lines).encode())

    def append(
        self,
        *,
        epoch: int,
        lr: float,
        stage: str,
        train_loss: float | None,
        test_error: float | None,
        seconds: float,
    ) -> None:
        """Add the row of an epoch.

        Raises:
            OSError: it cannot be written.
            ValueError: ``epoch`` is not after the last one.
        """
        check_int("epoch", epoch, low=self._last_epoch + 1)
        line = _csv_line((epoch, lr, stage, train_loss, test_error, seconds))
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

    A last line without its end, of a run that was killed while writing it, is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the columns are not those of a run.
    """
    path = Path(output_dir) / HISTORY_FILE
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    reader = csv.DictReader(io.StringIO(whole))
    if tuple(reader.fieldnames or ()) != HISTORY_COLUMNS:
        expected = f"the columns of a run ({', '.join(HISTORY_COLUMNS)})"
        raise invalid(str(path), expected, reader.fieldnames)
    return [{name: _parsed(name, value) for name, value in row.items()} for row in reader]


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


def write_metrics(output_dir: str | os.PathLike[str], metrics: Mapping[str, Any]) -> Path:
    """Write ``metrics.json``, strict JSON, whole or not at all.

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
    path = Path(output_dir) / METRICS_FILE
    write_atomic(path, to_json(dict(metrics), name="metrics").encode())
    return path


def read_metrics(output_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """``metrics.json`` of a run.

    Raises:
        FileNotFoundError: there is no such file.
    """
    text = (Path(output_dir) / METRICS_FILE).read_text(encoding="utf-8")
    return dict(json.loads(text))


def to_json(value: Any, *, name: str) -> str:
    """Strict, indented JSON of ``value``; paths as text, arrays and tensors as lists.

    Raises:
        TypeError: a value that JSON cannot hold.
        ValueError: a NaN or infinite number; the message says under which key.
    """
    plain = json.loads(json.dumps(value, default=_plain))
    for key, number in _numbers(plain, name):
        if not math.isfinite(number):
            raise invalid(key, "a finite number, which JSON can hold", number)
    return json.dumps(plain, indent=2, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise invalid("value", "a number, text, list or mapping", value, error=TypeError)


def _numbers(value: Any, key: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield key, value
    elif isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in items:
            yield from _numbers(item, f"{key}[{name!r}]")


def write_atomic(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file beside and rename it, so that readers find the old one or the whole new one.

    So does whoever reads after a power cut.
    """
    target = Path(path)
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        write_flushed(beside, content)
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    flush_names(target.parent)


def write_flushed(path: Path, content: bytes, mode: str = "wb") -> None:
    """Write a file, and return when it is on the disk."""
    with path.open(mode) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(folder: str | os.PathLike[str]) -> None:
    """Return when all that is in a folder, and the folder in its own one, is on the disk.

    Raises:
        OSError: it cannot be written.
    """
    for path, _, names in os.walk(folder, topdown=False):
        for name in names:
            _flush(os.path.join(path, name))
        flush_names(path)
    flush_names(Path(folder).absolute().parent)


def flush_names(folder: str | os.PathLike[str]) -> None:
    """Return when the names of a folder's files are on the disk, where a system can tell.

    Raises:
        OSError: they cannot be written.
    """
    try:
        _flush(folder)
    except OSError as error:
        if os.name != "nt" and error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise


def _flush(path: str | os.PathLike[str]) -> None:
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def run_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages behind a run; None for one that is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def device_name(device: torch.device | str) -> str:
    """What a run was trained on, for people: the GPU's name, or the kind of CPU and threads."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    kind = torch.backends.cpu.get_cpu_capability()
    return f"cpu ({platform.machine()}, {kind}, threads: {torch.get_num_threads()})"
