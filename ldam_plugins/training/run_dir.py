"""The folder of a run: claimed by one run, and locked while a process trains there."""

from __future__ import annotations

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from filelock import FileLock, Timeout

from ldam_plugins._validation import check_choice, invalid, quoted
from ldam_plugins.training.files import to_json, write_atomic, write_flushed

OPTIONS_FILE, HISTORY_FILE, METRICS_FILE = "options.json", "history.csv", "metrics.json"
COMMAND_FILE = "command.txt"
AUTO_TUNE_FILE = "auto_tune.json"
"""What :mod:`~ldam_plugins.training.auto_tune` chose when the run began."""
LOCK_FILE, HOLDER_FILE = ".run.lock", ".run.json"
CONFUSION_FILES = {"test": "confusion.csv", "validation": "confusion_validation.csv"}
"""Confusion matrices by the part of the metrics they belong to."""
PREDICTION_FILES = {"test": "predictions.csv", "validation": "predictions_validation.csv"}
"""What the model says of each example, likewise."""
_RESULTS = (
    *(METRICS_FILE, "report.html"),
    *(*CONFUSION_FILES.values(), *PREDICTION_FILES.values()),
)
RUN_ENTRIES = (OPTIONS_FILE, HISTORY_FILE, "checkpoints", "model", *_RESULTS)
"""What makes a folder one that holds a run."""
MISTAKES_FOLDER, MISTAKES_FILE = "mistakes", "mistakes/mistakes.csv"
OTHER_FILES = (
    *("split.csv", "training_curve.png", "class_profile.png"),
    *("confusion.png", "reliability.png", "class_change.png", "reliability_change.png"),
    *("classes.csv", "reliability.csv", "baseline.csv", AUTO_TUNE_FILE),
)
"""What a run writes beside."""
MAY_CHANGE = (
    *("output_dir", "resume", "report_to", "keep_checkpoints"),
    *("overwrite", "quiet", "traceback", "auto_tune"),
)
"""Options in which a resumed run may differ from the run it goes on with."""
_WAIT = 2.0  # seconds, for a run that is just ending

_held: WeakValueDictionary[tuple[int, str], FileLock] = WeakValueDictionary()
_kept: list[list[FileLock]] = []


def claim_output_dir(
    path: str | os.PathLike[str],
    options: Mapping[str, Any],
    *,
    resume: bool | str,
    may_change: Collection[str] = MAY_CHANGE,
    may_grow: Mapping[str, str | None] | None = None,
    overwrite: bool = False,
) -> Path:
    """Make the folder of a run and write ``options.json`` into it, or find the run to resume.

    Call it last before training, on one process. Of two runs that start together, or resume
    together, one is refused. Within :func:`folders_held` the folder stays locked until the end of
    that block. A run that ended before it had saved anything is no run: its folder is taken.

    Args:
        path: The folder, ``--output_dir``. Other files in it are left alone.
        options: Everything that makes the run, ready for JSON.
        resume: Go on with the run in the folder instead of starting one; ``"auto"``: if it
            holds one, else start.
        may_change: Names of options in which a resumed run may differ.
        may_grow: Options of which a resumed run may have more, such as epochs, each with the reason
            why this one may not, or None. ``options.json`` then says the new number.
        overwrite: Delete the run in the folder, and nothing else there, before starting one.

    Returns:
        The folder. Loading a checkpoint is up to the caller.

    Raises:
        ValueError: the folder cannot be written; it holds a run and neither ``resume`` nor
            ``overwrite`` is true, or both; it holds none and ``resume`` is True; it holds something
            else that ``overwrite`` would delete; the options of the two runs differ; or another
            process is at work in it.
    """
    folder = Path(path)
    text = to_json(dict(options), name="options")
    check_choice("resume", resume, (False, True, "auto"))
    if overwrite and resume:
        raise invalid("overwrite", "left out with --resume", overwrite)
    begun = has_checkpoint(folder) or (folder / METRICS_FILE).exists()
    if resume is True or (resume == "auto" and (folder / OPTIONS_FILE).exists() and begun):
        grown = _check_same_options(folder, json.loads(text), may_change, may_grow or {})
        _check_writable(folder)
        hold_folder(folder, _WAIT)
        if grown:
            write_atomic(folder / OPTIONS_FILE, text.encode())
        return folder
    _check_writable(folder)
    if overwrite or is_unsaved(folder):
        hold_folder(folder, _WAIT)  # that of a run at work is not taken
    if overwrite or is_unsaved(folder):
        delete_run(folder)
    else:
        _check_no_run(folder)
        hold_folder(folder, _WAIT)
    try:
        _write_new(folder / OPTIONS_FILE, text.encode())
    except FileExistsError:
        _check_no_run(folder)
    return folder


def _write_new(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, and never over another."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write_flushed(beside, content)
        os.link(beside, path)  # unlike a rename it fails where there is one
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        write_flushed(path, content, mode="xb")
    finally:
        beside.unlink(missing_ok=True)


def check_no_run(folder: str | os.PathLike[str], *, resumes: bool = True) -> None:
    """Refuse a folder that holds a run, unless it ended before it had saved anything.

    Args:
        folder: Of the run.
        resumes: Whether the command could go on with it, for the hint.

    Raises:
        ValueError: it holds one.
    """
    if not is_unsaved(Path(folder)):
        _check_no_run(Path(folder), resumes=resumes)


def check_resumes(
    folder: str | os.PathLike[str],
    options: Mapping[str, Any],
    may_grow: Mapping[str, str | None] | None = None,
) -> None:
    """Refuse to go on with a run whose options differ from some that are known already.

    Before data and model are read; :func:`claim_output_dir` sees to all of them.

    Args:
        folder: Of the run.
        options: Those that are known.
        may_grow: As there.

    Raises:
        ValueError: it holds no run, or one with other options.
    """
    known = json.loads(to_json(dict(options), name="options"))
    stored = _stored_options(Path(folder))
    unknown = [name for name in stored if name not in known]
    _check_same_options(Path(folder), known, [*MAY_CHANGE, *unknown], may_grow or {})


def check_is_folder(path: str | os.PathLike[str]) -> None:
    """Refuse a folder that cannot be made or written, as far as that shows without writing.

    Raises:
        ValueError: it or what it would lie in is a file, or may not be written.
    """
    there = next(p for p in (Path(path), *Path(path).absolute().parents) if p.exists())
    if not there.is_dir():
        raise _unwritable(path, f"{there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise _unwritable(path, f"{there} may not be written")


def _unwritable(path: str | os.PathLike[str], reason: str | None) -> Exception:
    hint = f"Choose another --output_dir ({reason})."
    return invalid("output_dir", "a folder that can be written", str(path), hint=hint)


def _check_no_run(folder: Path, *, resumes: bool = True) -> None:
    held = [name for name in RUN_ENTRIES if (folder / name).exists()]
    if held:
        hint = f"It has {quoted(held)}: choose another --output_dir,"
        hint += " add --resume to go on," if resumes else ""
        hint += " or --overwrite to delete that run."
        raise invalid("output_dir", "a folder that holds no run", str(folder), hint=hint)


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, error.strerror) from error


def has_checkpoint(folder: str | os.PathLike[str]) -> bool:
    """Whether a run has saved something to go on from, of either recipe."""
    whole = (*Path(folder).glob("checkpoints/epoch_*"),)
    return bool(whole) or any(Path(folder).glob("checkpoints/checkpoint-*/whole"))


def is_unsaved(folder: Path) -> bool:
    """Whether a folder holds a run that ended before it had saved anything."""
    lost = has_checkpoint(folder) or any((folder / n).exists() for n in ("model", *_RESULTS))
    return (folder / OPTIONS_FILE).is_file() and not lost


def delete_run(folder: str | os.PathLike[str]) -> None:
    """Delete the run in a folder: its files, checkpoints and model. Other files are left alone.

    Raises:
        ValueError: what would be deleted is not that of a run, having no ``options.json``.
    """
    folder = Path(folder)
    held = [name for name in RUN_ENTRIES if (folder / name).exists()]
    if held and OPTIONS_FILE not in held:
        hint = f"It has {quoted(held)} but no {OPTIONS_FILE}: choose another --output_dir."
        raise invalid("overwrite", "left out where there is no run", str(folder), hint=hint)
    if not held:
        return
    _stored_options(folder)
    for pattern in ("epoch_*", ".epoch_*", "checkpoint-*"):
        for path in folder.glob(f"checkpoints/{pattern}"):
            _remove(path)
    if not any(folder.glob("checkpoints/*")):
        _remove(folder / "checkpoints")
    if (folder / "model" / "config.json").is_file():
        _remove(folder / "model")
    if (folder / MISTAKES_FILE).is_file():
        _remove(folder / MISTAKES_FOLDER)
    for name in (HISTORY_FILE, *_RESULTS, *OTHER_FILES, OPTIONS_FILE):
        _remove(folder / name)  # the options last: without them it is no run


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _check_same_options(
    folder: Path,
    options: dict[str, Any],
    may_change: Collection[str],
    may_grow: Mapping[str, str | None],
) -> list[str]:
    """Refuse options other than those of the run; returns those that have grown."""
    stored = _stored_options(folder)
    grown = [n for n in may_grow if n in stored and n in options and options[n] > stored[n]]
    for name in grown:
        if reason := may_grow[name]:
            expected = f"{stored[name]} as in the run in {str(folder)!r}"
            raise invalid(name, expected, options[name], hint=reason)
    differing = differing_options(stored, options, [*may_change, *grown])
    if differing:
        hint = "Give the same options, or choose another --output_dir without --resume."
        expected = f"those of the run in {str(folder)!r}"
        raise ValueError(f"`options` must be {expected}; {'; '.join(differing)}. {hint}")
    return grown


def differing_options(
    stored: Mapping[str, Any], options: Mapping[str, Any], may_change: Collection[str] = MAY_CHANGE
) -> list[str]:
    """Each option in which two runs differ, as text for a message, apart from ``may_change``.

    An option that a run does not have, as one of an earlier version, is None there.
    """
    absent = "(absent)"
    return [
        f"{name}: {stored.get(name, absent)!r} there, {options.get(name, absent)!r} now"
        for name in {**stored, **options}
        if name not in may_change and stored.get(name) != options.get(name)
    ]


def _stored_options(folder: Path) -> dict[str, Any]:
    expected = "a folder that holds a run to resume"
    try:
        return dict(json.loads((folder / OPTIONS_FILE).read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        hint = f"It has no {OPTIONS_FILE}: leave out --resume to start a run there."
        raise invalid("output_dir", expected, str(folder), hint=hint) from error
    except (OSError, ValueError, TypeError) as error:
        hint = f"Its {OPTIONS_FILE} cannot be read ({error}): choose another --output_dir."
        raise invalid("output_dir", expected, str(folder), hint=hint) from error


def hold_folder(folder: str | os.PathLike[str], wait: float = 0) -> FileLock:
    """Lock the folder of a run against other processes, until the returned lock is garbage.

    The lock is the operating system's (``flock``; over NFS only as good as the server's): it ends
    with the process, however that ends. One process may lock a folder several times. Of the
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
    for kept in _kept:
        kept.append(lock)
    return lock


@contextmanager
def folders_held() -> Iterator[None]:
    """Keep every lock of :func:`hold_folder` until the end of the block, or decorated function."""
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
