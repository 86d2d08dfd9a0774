"""Files below one root folder: found, listed in a fixed order, read as text; none outside of it.

Two spellings of a name that differ in the Unicode normal form only are one name: macOS stores
``é`` as two characters, letter and accent (NFD), other systems as one (NFC).
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote

from ldam_plugins._validation import invalid, quoted

HEIF_SUFFIXES = frozenset((".heic", ".heif", ".hif"))
IMAGE_SUFFIXES = (
    HEIF_SUFFIXES
    | frozenset(
        (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".jp2")
    )
    | frozenset((".ppm", ".pgm", ".avif"))
)
_LEFT_BY_SYSTEMS = frozenset(
    ("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "@eadir")
) | frozenset(("lost+found", "system volume information"))
"""Entries that operating systems leave beside a person's own; others of theirs begin with a dot."""
_WEB_TAIL = re.compile(r"\?.*|\.\d+|~")
"""What downloads leave behind an extension: ``a.jpg?id=1&w=2``, ``a.jpg.1``."""
_ENCODINGS = (
    "cp1252",
    "cp1250",
    "cp1251",
    "cp1253",
    "cp1254",
    "cp1255",
    "cp1256",
    "koi8_r",
    "shift_jis",
    "euc_jp",
    "gb18030",
    "big5",
    "euc_kr",
    "utf_16_le",
    "utf_16_be",
)
"""What text that is no UTF-8 is usually written in, cp1252 being what Windows calls Latin-1."""
_SAMPLED = 1 << 16


def is_hidden(name: str) -> bool:
    """Whether an entry of a folder is hidden, or left there by an operating system."""
    return name.startswith((".", "~$")) or name.lower() in _LEFT_BY_SYSTEMS


def is_image_name(name: str) -> bool:
    """Whether a file is an image by its name, as people or the web leave it."""
    return _has_suffix(name, IMAGE_SUFFIXES)


def is_heif_name(name: str) -> bool:
    """Whether a file is a HEIF image by its name, as telephones write them."""
    lower = name.lower()
    return any(suffix in lower for suffix in HEIF_SUFFIXES) and _has_suffix(name, HEIF_SUFFIXES)


def _has_suffix(name: str, suffixes: Collection[str]) -> bool:
    if os.path.splitext(name)[1].lower() in suffixes:
        return True
    return os.path.splitext(without_web_tail(name))[1].lower() in suffixes


def without_web_tail(name: str) -> str:
    """The name of a file without what the web put behind its extension."""
    name = unquote(name)
    for found in _WEB_TAIL.finditer(name):
        if found[0][0] == "?" or found.end() == len(name):
            return name[: found.start()]
    return name


def is_inside(path: str | Path, root: str | Path) -> bool:
    """Whether ``path``, links followed, is the folder ``root`` or below it."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def listing(folder: Path) -> str:
    """List what a folder holds, for a message."""
    try:
        return quoted(sorted(os.listdir(folder))) or "nothing in it"
    except OSError as error:
        return f"nothing to read ({error.strerror})"


class EmptyFile(ValueError):
    """A file without a text."""


def read_text(file: Path, encoding: str | None = None) -> str:
    """Read a text file: UTF-8, with or without a byte order mark, unless told otherwise.

    Raises:
        ValueError: the file cannot be read, is empty or is of another encoding; the message names
            it, and the encoding that it seems to be of.
    """
    try:
        content = file.read_bytes()
        text = content.decode(encoding or "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(_wrong_encoding(file, encoding, error)) from error
    except LookupError as error:
        hint = "Such as utf-8, utf-16 or cp1252."
        raise invalid("encoding", "an encoding that Python knows", encoding, hint=hint) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}); {_neighbours(file)}") from error
    if encoding is None and has_zeros(text):
        zeros = UnicodeDecodeError("utf-8", content, content.index(0), 1, "zeros between letters")
        raise ValueError(_wrong_encoding(file, encoding, zeros))
    if not text.strip():
        raise EmptyFile(f"{file} is empty")
    return text.removeprefix("\ufeff")


def has_zeros(text: str) -> bool:
    """Whether what was decoded as UTF-8 is UTF-16 without a mark: half of ASCII is zeros there."""
    head = text[:_SAMPLED]
    return 4 * head.count("\0") > len(head)


def _wrong_encoding(file: Path, encoding: str | None, error: UnicodeDecodeError) -> str:
    content: bytes = error.object
    line = content[: error.start].count(b"\n") + 1
    what = "UTF-8" if encoding is None else encoding
    message = f"{file}, line {line}: not {what} text ({error.reason})"
    guess = guess_encoding(content, error.start)
    if guess is None or guess == encoding:
        return f"{message}. Give its encoding with --encoding (encoding=...)"
    return f"{message}. It looks like {guess}: --encoding {guess} (encoding={guess!r}) reads it so"


def guess_encoding(content: bytes, place: int = 0) -> str | None:
    """The encoding that bytes seem to be of, for a message; None if there is no telling.

    Args:
        content: All of a file.
        place: Where it is known not to be UTF-8.
    """
    from charset_normalizer import from_bytes

    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    if has_zeros(content[:_SAMPLED].decode("latin-1")):
        even, odd = (content[at:_SAMPLED:2].count(0) for at in (0, 1))
        return "utf-16-le" if odd > even else "utf-16-be"
    nearby = content[max(0, place - _SAMPLED // 2) :][:_SAMPLED]
    found = from_bytes(nearby, cp_isolation=list(_ENCODINGS))
    best = found.best()
    if best is None:
        return None
    # Of those that read the bytes equally well the first is the one that people use.
    same = {
        name
        for m in found
        if m.chaos <= best.chaos
        for name in (m.encoding, *m.could_be_from_charset)
    }
    return next(name for name in _ENCODINGS if name in same)


def read_lines(file: Path, encoding: str | None = None) -> list[str]:
    """Read the lines of a text file without their ends and without blank lines at its end."""
    return [line.rstrip("\r") for line in read_text(file, encoding).rstrip().split("\n")]


def at_line(file: Path, row: int) -> str:
    """Name the 0-based ``row`` of a text file as editors count it."""
    return f"{file}, line {row + 1}"


def composed(name: str) -> str:
    """A name in the one normal form (NFC) that names are compared in."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def natural_key(name: str) -> tuple[list[int | str], str]:
    """Sort key that puts ``2`` before ``10``, as timm's image folders do.

    Capital and small letters are equal. Names that are equal then, or that differ in leading zeros
    only, are sorted as text.
    """
    parts = re.split(r"(\d+)", name.lower())
    return [int(part) if part.isdecimal() else part for part in parts], name


def subfolders(root: Path, folder: str = "") -> list[str]:
    """Names of the visible folders in ``root/folder``, sorted; links are not looked into."""
    with os.scandir(root / folder) as scanned:
        return sorted(e.name for e in scanned if e.is_dir() and not is_hidden(e.name))


def class_folders(root: Path, folder: str) -> dict[str, str]:
    """Visible folders in ``root/folder`` by the composed name, in :func:`natural_key` order.

    Raises:
        ValueError: two folders have the same name in different Unicode normal forms, or a link
            leaves ``root``.
    """
    found: dict[str, str] = {}
    for entry in _entries(root, folder):
        if not entry.is_dir():
            continue
        if found.setdefault(composed(entry.name), entry.name) != entry.name:
            pair = ascii(found[composed(entry.name)]), ascii(entry.name)
            what = "are one name in two Unicode normal forms; put their files into one of them"
            raise ValueError(f"folders {' and '.join(pair)} in {root / folder} {what}")
    return dict(sorted(found.items(), key=lambda item: natural_key(item[0])))


def files_below(
    root: Path,
    folder: str,
    is_wanted: Callable[[str], bool] = is_image_name,
    others: list[str] | None = None,
) -> Iterator[str]:
    """Walk the visible files below ``root/folder`` in sorted order: images, unless told otherwise.

    Yields paths relative to ``root``.

    Args:
        root: The folder that links may not leave.
        folder: Relative to ``root``.
        is_wanted: Whether a file is one by its name.
        others: Gets the paths of the other visible files.

    Raises:
        ValueError: a link leaves ``root``, or is one to a folder (it could be a circle); a pipe or
            device, which would be waited for without end.
    """
    for entry in _entries(root, folder):
        name = f"{folder}/{entry.name}" if folder else entry.name
        if entry.is_dir():
            if entry.is_symlink():
                raise ValueError(f"{entry.path} is a link to a folder; put the folder there")
            yield from files_below(root, name, is_wanted, others)
        elif is_wanted(entry.name):
            if os.path.exists(entry.path) and not entry.is_file():
                raise ValueError(f"{entry.path} is a pipe or device, not a file; remove it")
            yield name
        elif others is not None:
            others.append(name)


def find_files(root: Path, names: Sequence[str], where: Callable[[int], str]) -> list[str]:
    """Find the different files below ``root`` that the names mean, links followed.

    A name is taken as it stands, else with its accents in another normal form, else as data sets
    are published: between quotes, with a backslash for each slash, or with a slash before it
    (Places365), which stands for ``root``; a whole path into ``root`` is one, too. Each folder is
    listed once, so that hundreds of thousands of names take about a second.

    Args:
        root: the folder the names are relative to.
        names: the paths as a list file gives them.
        where: tells a row's place in that list file, for the message.

    Returns:
        The paths relative to ``root``, as they are on the disk.

    Raises:
        ValueError: a name is missing, leaves ``root`` or means a file that was given before.
    """
    real_root = os.path.realpath(root)
    folders: dict[str, dict[str, str]] = {}
    seen: dict[str, int] = {}
    for row, name in enumerate(names):
        for spelled in _spellings(name, root):
            folder, _, file = spelled.rpartition("/")
            if folder not in folders:
                folders[folder] = _safe_files(real_root, folder)
            path = folders[folder].get(file) or folders[folder].get(composed(file))
            if path is not None:
                break
        else:
            raise ValueError(f"{where(row)}: {_why_not(real_root, name, spelled)}")
        if seen.setdefault(path, row) != row:
            raise ValueError(f"{where(row)}: {name!r} was already given in {where(seen[path])}")
    return list(seen)


def _entries(root: Path, folder: str) -> list[os.DirEntry[str]]:
    with os.scandir(root / folder) as scanned:
        entries = [entry for entry in scanned if not is_hidden(entry.name)]
    links = [entry.path for entry in entries if entry.is_symlink()]
    for path in (str(root / folder), *links):
        if not is_inside(path, root):
            raise ValueError(f"link {path} {_leaves(root)}")
    return sorted(entries, key=lambda entry: entry.name)


def _spellings(name: str, root: Path) -> Iterator[str]:
    """The relative paths that a name of a list may stand for, the likeliest first."""
    yield _below_root(name)
    bare = name[1:-1] if len(name) > 1 and name[0] == name[-1] and name[0] in "\"'" else name
    yield _below_root(bare.replace("\\", "/"))
    inside = os.path.abspath(root) + os.sep
    if name.startswith(inside):
        yield name[len(inside) :]


def _below_root(name: str) -> str:
    """A path without leading slashes, and without empty and ``.`` parts."""
    return "/".join(part for part in name.split("/") if part not in ("", "."))


def _safe_files(real_root: str, folder: str) -> dict[str, str]:
    """Paths of the files in a folder by their names, and by their composed names."""
    try:
        folder = _on_disk(real_root, folder)
        path = os.path.realpath(os.path.join(real_root, folder))
        if not is_inside(path, real_root):
            return {}
        with os.scandir(path) as entries:
            names = [entry.name for entry in entries if _is_safe_file(entry, real_root)]
    except (OSError, ValueError):  # no such folder, or a name no file system takes
        return {}
    before = f"{folder}/" if folder else ""
    files = {composed(name): before + name for name in names}
    return files | {name: before + name for name in names}


def _on_disk(real_root: str, folder: str) -> str:
    """A relative folder with each part in the normal form it has on the disk."""
    parts = folder.split("/")
    if folder.isascii() or ".." in parts or os.path.isdir(os.path.join(real_root, folder)):
        return folder
    for place, part in enumerate(parts):
        parent = os.path.join(real_root, *parts[:place])
        if is_inside(parent, real_root):
            same = [name for name in os.listdir(parent) if composed(name) == composed(part)]
            parts[place] = part if part in same else (same or [part])[0]
    return "/".join(parts)


def _is_safe_file(entry: os.DirEntry[str], real_root: str) -> bool:
    if entry.is_symlink() and not is_inside(entry.path, real_root):
        return False
    return entry.is_file()


def _why_not(real_root: str, name: str, spelled: str) -> str:
    try:
        inside = is_inside(os.path.join(real_root, spelled), real_root)
    except (OSError, ValueError) as error:
        return f"path {name!r} cannot be one ({error})"
    if not inside:
        return f"path {name!r} {_leaves(real_root)}"
    if os.path.isabs(name):
        return f"path {name!r} must be relative to {real_root}, where there is no such file"
    return f"there is no file {name!r} in {real_root}"


def _leaves(root: str | Path) -> str:
    return f"leads out of {root}; only files below that folder are read: copy it there (cp -rL)"


def _neighbours(file: Path) -> str:
    return f"in {file.parent} there is {listing(file.parent)}"
