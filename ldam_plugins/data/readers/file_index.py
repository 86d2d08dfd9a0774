"""The image files below a folder, found by what a table calls them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ldam_plugins._validation import quoted
from ldam_plugins.data.readers.base import split_kind
from ldam_plugins.data.readers.paths import (
    composed,
    files_below,
    is_image_name,
    without_web_tail,
)

_IMAGE_FOLDERS = ("images", "image", "img", "imgs", "jpg", "jpeg", "photos", "pictures")


def _as_written(name: str) -> str:
    return composed(name)


def _loosely(name: str) -> str:
    return composed(unquote(name)).casefold()


def _untailed(name: str) -> str:
    return composed(without_web_tail(name)).casefold()


def _without_suffix(name: str) -> str:
    return _untailed(
        name if not is_image_name(name) else os.path.splitext(without_web_tail(name))[0]
    )


_SPELLINGS: tuple[Callable[[str], str], ...] = (_as_written, _loosely, _untailed, _without_suffix)
"""How a file may be called, the nearest first: in other letters, with ``%20``, an id alone."""


class FileIndex:
    """Every visible image file below one folder, links that leave it refused.

    Only files that were found there are ever given, whatever a table names.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._by_name: list[dict[str, list[str]]] = []

    @cached_property
    def files(self) -> list[str]:
        """Paths relative to the folder, sorted."""
        return list(files_below(self.root, ""))

    def find(self, name: str, skipped: int = 0) -> list[str]:
        """Files that a name means, whose folders end as its folders do.

        Args:
            name: A name as a table gives it: a path, the end of one, or an id without extension.
            skipped: Folders at the beginning of the name that are not looked for.
        """
        parts = parts_of(name)
        parts = parts[min(skipped, len(parts) - 1) :]
        folder = "/".join(map(_loosely, parts[:-1]))
        for spelling, files in zip(_SPELLINGS, self._spelled, strict=True):
            if spelling is _without_suffix and is_image_name(parts[-1]):
                continue
            same = [file for file in files.get(spelling(parts[-1]), []) if _ends(file, folder)]
            if same:
                return same
        return []

    @cached_property
    def _spelled(self) -> list[dict[str, list[str]]]:
        spelled: list[dict[str, list[str]]] = []
        for spelling in _SPELLINGS:
            files: dict[str, list[str]] = {}
            for file in self.files:
                files.setdefault(spelling(file.rpartition("/")[2]), []).append(file)
            spelled.append(files)
        return spelled

    def find_all(
        self, names: Sequence[str], *, prefer: str, where: Callable[[int], str]
    ) -> list[str | None]:
        """The file of each name; None where there is none.

        Names of one table are looked up in one way: folders at their beginning are skipped for
        all of them or for none, so that a missing ``train/1.jpg`` is never ``test/1.jpg``.

        Args:
            names: The names.
            prefer: The split, or the folder of the table, whose files are meant where a name fits
                several.
            where: Tells the place of a row, for a message.

        Raises:
            ValueError: a name fits several files equally well.
        """
        for skipped in range(max(len(parts_of(name)) for name in names)):
            found = [self.find(name, skipped) for name in names]
            if any(found):
                rows = enumerate(zip(names, found, strict=True))
                return [self._pick(name, same, prefer, where, row) for row, (name, same) in rows]
        return [None] * len(names)

    def _pick(
        self, name: str, same: list[str], prefer: str, where: Callable[[int], str], row: int
    ) -> str | None:
        if len(same) < 2:
            return same[0] if same else None
        ranks = [_rank(file, parts_of(name), prefer) for file in same]
        best = [file for file, rank in zip(same, ranks, strict=True) if rank == min(ranks)]
        if len(best) > 1:
            hint = "Write the folder of each file into the table, as in 'images/1.jpg'."
            raise ValueError(f"{where(row)}: {name!r} may be each of {quoted(best)}. {hint}")
        return best[0]


def parts_of(name: str) -> list[str]:
    """The folders and the file of a name: of a path, also of Windows, or of a web address."""
    name = name.strip().strip("\"'")
    if "://" in name:
        address = urlsplit(name)
        name = address.path + (f"?{address.query}" if address.query else "")
    path, mark, tail = name.partition("?")
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    return [*parts[:-1], parts[-1] + mark + tail] if parts else [name]


def _ends(file: str, folder: str) -> bool:
    """Whether the folders of a file end in those of a name."""
    own = "/".join(map(_loosely, file.split("/")[:-1]))
    return not folder or own == folder or own.endswith(f"/{folder}")


def _rank(file: str, parts: list[str], prefer: str) -> int:
    """How likely a file is meant: the least is the likeliest."""
    folders = file.split("/")[:-1]
    if file == "/".join(parts) or (prefer and "/".join(folders) == prefer):
        return 0
    kinds = set(map(split_in_name, folders)) - {None}
    if prefer and kinds == {split_in_name(prefer)}:
        return 1
    if kinds:
        return 4
    return 2 if any(folder.lower() in _IMAGE_FOLDERS for folder in folders) else 3


def split_in_name(name: str) -> str | None:
    """The split that a name speaks of, such as ``train_labels`` or ``imagesTest``; None if none."""
    kinds = {split_kind(word) for word in _words(name)} - {None}
    return kinds.pop() if len(kinds) == 1 else None


def _words(name: str) -> Iterator[str]:
    word = ""
    for before, letter in zip(f" {name}", name, strict=False):
        if not letter.isalnum() or (letter.isupper() and before.islower()):
            yield word
            word = ""
        word += letter if letter.isalnum() else ""
    yield word
