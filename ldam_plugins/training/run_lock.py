"""The lock on the folder of a run: one process at a time writes there."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from weakref import WeakValueDictionary

from filelock import FileLock, Timeout

from ldam_plugins._validation import invalid

LOCK_FILE, HOLDER_FILE = ".run.lock", ".run.json"

_held: WeakValueDictionary[tuple[int, str], FileLock] = WeakValueDictionary()
_kept: list[list[FileLock]] = []


def hold_folder(folder: str | os.PathLike[str], wait: float = 0) -> FileLock:
    """Lock the folder of a run against other processes for as long as the lock is referred to.

    The lock is the operating system's (``flock``; over NFS only as good as the server's): it ends
    with the process, however that ends. A process may hold a folder several times over. Of the
    processes that train together only the main one calls this.

    Args:
        folder: The folder; it exists.
        wait: Seconds to wait for a run that is just ending.

    Raises:
        ValueError: another process holds it (named, with its host), or it cannot be locked.
    """
    folder = Path(folder)
    key = os.getpid(), str(folder.resolve())  # a fork does not hold what its parent does
    lock = _held.get(key)
    if lock is None or not lock.is_locked:
        lock = _acquired(folder, wait)
        _held[key] = lock
    if _kept:
        _kept[-1].append(lock)
    return lock


@contextmanager
def folders_held() -> Iterator[None]:
    """Hold what :func:`hold_folder` locks in the block, or decorated function, until its end."""
    _kept.append([])
    try:
        yield
    finally:
        _kept.pop()


def _acquired(folder: Path, wait: float) -> FileLock:
    lock = FileLock(folder / LOCK_FILE, timeout=wait, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        hint = "Wait until it has ended or end it, or choose another --output_dir."
        expected = f"a folder in which no other run is at work; {_holder(folder)} trains there"
        raise invalid("output_dir", expected, str(folder), hint=hint) from error
    except (OSError, NotImplementedError) as error:
        hint = f"Choose an --output_dir on another file system ({error})."
        expected = "a folder that can be locked"
        raise invalid("output_dir", expected, str(folder), hint=hint) from error
    holder = {"pid": os.getpid(), "host": platform.node()}
    with suppress(OSError):  # it only words the message of another process
        (folder / HOLDER_FILE).write_text(json.dumps(holder), encoding="utf-8")
    return lock


def _holder(folder: Path) -> str:
    try:
        holder = json.loads((folder / HOLDER_FILE).read_text(encoding="utf-8"))
        return f"process {holder['pid']} on host {holder['host']}"
    except (OSError, ValueError, KeyError):
        return "another process"
