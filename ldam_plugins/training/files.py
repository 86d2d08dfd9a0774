"""Files that survive a crash: each is written whole or not at all, and flushed to the disk."""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ldam_plugins._validation import invalid

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)


def write_atomic(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace a file at once: readers find the old content or the whole new one.

    The new content is written to a file beside it, flushed to the disk and renamed, so this holds
    after a power cut too.

    Raises:
        OSError: it cannot be written; the old file is as it was.
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
    """Write a file and return when its content is on the disk."""
    with path.open(mode) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(folder: str | os.PathLike[str]) -> None:
    """Flush a folder to the disk: all files in it, and its own name in the folder above.

    Raises:
        OSError: it cannot be written.
    """
    for path, _, names in os.walk(folder, topdown=False):
        for name in names:
            _flush(os.path.join(path, name))
        flush_names(path)
    flush_names(Path(folder).absolute().parent)


def flush_names(folder: str | os.PathLike[str]) -> None:
    """Flush the names of a folder's files to the disk, where the system can do that.

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


@contextmanager
def disk_errors(output_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Say what to do about a disk that is full, read-only or gone, whoever noticed it.

    Raises:
        OSError: in place of such an error of the system, of safetensors or of torch, which each
            report it in another way. All other errors pass unchanged.
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
