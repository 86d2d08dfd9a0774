"""Files below one root: listed in a fixed order, read as text, and never outside that root."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from ldam_plugins._checks import quoted
from ldam_plugins.image_sources import IMAGE_SUFFIXES, is_inside


def listing(folder: Path) -> str:
    """List what a folder holds, for a message."""
    try:
        return quoted(sorted(os.listdir(folder))) or "nothing in it"
    except OSError as error:
        return f"nothing to read ({error.strerror})"


def read_text(file: Path) -> str:
    """Read a UTF-8 file, with or without a byte order mark.

    Raises:
        ValueError: the file cannot be read, is empty or is not UTF-8; the message names it.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{file}, line {line}: not UTF-8 text ({error.reason})") from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}); {_neighbours(file)}") from error
    if not text.strip():
        raise ValueError(f"{file} is empty")
    return text


def read_lines(file: Path) -> list[str]:
    """Read the lines of a UTF-8 file without their ends and without blank lines at its end."""
    return [line.rstrip("\r") for line in read_text(file).rstrip().split("\n")]


def at_line(file: Path, row: int) -> str:
    """Name the 0-based ``row`` of a text file as editors count it."""
    return f"{file}, line {row + 1}"


def class_folders(root: Path, folder: str) -> list[str]:
    """Name the visible folders in ``root/folder`` in sorted order."""
    return [entry.name for entry in _entries(root, folder) if entry.is_dir()]


def images_below(root: Path, folder: str) -> Iterator[str]:
    """Walk the visible files of ``IMAGE_SUFFIXES`` below ``root/folder`` in sorted order.

    Yields paths relative to ``root``.

    Raises:
        ValueError: a link leaves ``root``, or is one to a folder (it could be a circle); a pipe or
            device, which would be waited for without end.
    """
    for entry in _entries(root, folder):
        name = f"{folder}/{entry.name}"
        if entry.is_dir():
            if entry.is_symlink():
                raise ValueError(f"{entry.path} is a link to a folder; put the folder there")
            yield from images_below(root, name)
        elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
            if os.path.exists(entry.path) and not entry.is_file():
                raise ValueError(f"{entry.path} is a pipe or device, not a file; remove it")
            yield name


def check_files(root: Path, names: Sequence[str], where: Callable[[int], str]) -> None:
    """Check that every name is a different file below ``root``, links followed.

    Each folder is listed once, so that hundreds of thousands of names take about a second.

    Args:
        root: the folder the names are relative to.
        names: the paths as a list file gives them.
        where: tells a row's place in that list file, for the message.

    Raises:
        ValueError: a name is absolute, repeated or missing, or leaves ``root``.
    """
    real_root = os.path.realpath(root)
    folders: dict[str, frozenset[str]] = {}
    seen: dict[str, int] = {}
    for row, name in enumerate(names):
        folder, _, file = name.rpartition("/")
        if folder not in folders:
            folders[folder] = _safe_files(real_root, folder)
        if os.path.isabs(name) or file not in folders[folder]:
            raise ValueError(f"{where(row)}: {_why_not(real_root, name)}")
        if seen.setdefault(name, row) != row:
            raise ValueError(f"{where(row)}: {name!r} was already given in {where(seen[name])}")


def _entries(root: Path, folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(root / folder) as scanned:
        entries = [entry for entry in scanned if not entry.name.startswith(".")]
    links = [entry.path for entry in entries if entry.is_symlink()]
    for path in (str(root / folder), *links):
        if not is_inside(os.path.realpath(path), os.path.realpath(root)):
            raise ValueError(f"link {path} {_leaves(root)}")
    return sorted(entries, key=lambda entry: entry.name)


def _safe_files(real_root: str, folder: str) -> frozenset[str]:
    try:
        path = os.path.realpath(os.path.join(real_root, folder))
        if not is_inside(path, real_root):
            return frozenset()
        with os.scandir(path) as entries:
            return frozenset(entry.name for entry in entries if _is_safe_file(entry, real_root))
    except (OSError, ValueError):  # no such folder, or a name no file system takes
        return frozenset()


def _is_safe_file(entry: os.DirEntry[str], real_root: str) -> bool:
    if entry.is_symlink() and not is_inside(os.path.realpath(entry.path), real_root):
        return False
    return entry.is_file()


def _why_not(real_root: str, name: str) -> str:
    if os.path.isabs(name):
        return f"path {name!r} must be relative to {real_root}"
    try:
        inside = is_inside(os.path.realpath(os.path.join(real_root, name)), real_root)
    except (OSError, ValueError) as error:
        return f"path {name!r} cannot be one ({error})"
    if not inside:
        return f"path {name!r} {_leaves(real_root)}"
    return f"there is no file {name!r} in {real_root}"


def _leaves(root: str | Path) -> str:
    return f"leads out of {root}; only files below that folder are read"


def _neighbours(file: Path) -> str:
    return f"in {file.parent} there is {listing(file.parent)}"
