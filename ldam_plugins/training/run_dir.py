"""The folder of a run: claimed by one run, and by no other that has not the same options."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ldam_plugins._validation import check_choice, invalid, quoted
from ldam_plugins.training.history import (
    HISTORY_FILE,
    METRICS_FILE,
    OPTIONS_FILE,
    to_json,
    write_flushed,
)
from ldam_plugins.training.run_lock import hold_folder

RUN_ENTRIES = (OPTIONS_FILE, HISTORY_FILE, METRICS_FILE, "checkpoints", "model", "report.html")
"""What makes a folder one that holds a run."""
MAY_CHANGE = ("output_dir", "resume", "report_to", "keep_checkpoints")
"""Options that a resumed run may have otherwise than the run it goes on with."""
_WAIT = 2.0  # seconds, for a run that is just ending


def claim_output_dir(
    path: str | os.PathLike[str],
    options: Mapping[str, Any],
    *,
    resume: bool | str,
    may_change: Collection[str] = MAY_CHANGE,
) -> Path:
    """Make the folder of a run and write ``options.json`` into it, or find the run to resume.

    Call it last before training, on one process: a folder is claimed once, and two runs that
    start together, or resume together, cannot both have it. Within
    :func:`.folders_held` the folder stays locked until the end of that block.

    Args:
        path: The folder, ``--output_dir``. Files in it that are no run's are left alone.
        options: Everything that makes the run, ready for JSON.
        resume: Go on with the run in the folder instead of starting one; ``"auto"``: if it
            holds one, else start.
        may_change: Names of options that a resumed run may have otherwise.

    Returns:
        The folder. It stays the recipe's matter which checkpoint is loaded, if there is one.

    Raises:
        ValueError: the folder cannot be written; it holds a run and ``resume`` is False; it
            holds none and ``resume`` is True; the options of the two runs differ; or another
            process is at work in it.
    """
    folder = Path(path)
    text = to_json(dict(options), name="options")
    check_choice("resume", resume, (False, True, "auto"))
    if resume is True or (resume == "auto" and (folder / OPTIONS_FILE).exists()):
        _check_same_options(folder, json.loads(text), may_change)
        _check_writable(folder)
        hold_folder(folder, _WAIT)
        return folder
    _check_writable(folder)
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


def _check_no_run(folder: Path) -> None:
    held = [name for name in RUN_ENTRIES if (folder / name).exists()]
    if held:
        hint = f"It has {quoted(held)}: choose another --output_dir, or add --resume to go on."
        raise invalid("output_dir", "a folder that holds no run", str(folder), hint=hint)


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        hint = f"Choose another --output_dir ({error.strerror})."
        expected = "a folder that can be written"
        raise invalid("output_dir", expected, str(folder), hint=hint) from error


def _check_same_options(folder: Path, options: dict[str, Any], may_change: Collection[str]) -> None:
    differing = differing_options(_stored_options(folder), options, may_change)
    if differing:
        hint = "Give the same options, or choose another --output_dir without --resume."
        expected = f"those of the run in {str(folder)!r}"
        raise ValueError(f"`options` must be {expected}; {'; '.join(differing)}. {hint}")


def differing_options(
    stored: Mapping[str, Any], options: Mapping[str, Any], may_change: Collection[str] = MAY_CHANGE
) -> list[str]:
    """What two runs have otherwise, worded for a message, apart from ``may_change``."""
    absent = "(absent)"
    return [
        f"{name}: {stored.get(name, absent)!r} there, {options.get(name, absent)!r} now"
        for name in {**stored, **options}
        if name not in may_change and stored.get(name, absent) != options.get(name, absent)
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
