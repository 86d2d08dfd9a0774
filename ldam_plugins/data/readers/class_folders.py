"""Folders of images or of text files, one folder a class, with or without folders of splits."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ldam_plugins._validation import invalid, quoted
from ldam_plugins.data.notes import DataNotes
from ldam_plugins.data.readers.base import (
    FileSource,
    ImageRequest,
    ImageRows,
    Reader,
    Request,
    TextRequest,
    find_split,
    keep_known_classes,
    pick_splits,
    split_kind,
    text_table,
    undivided,
)
from ldam_plugins.data.readers.class_names import same_but_blanks
from ldam_plugins.data.readers.file_index import split_in_name
from ldam_plugins.data.readers.paths import (
    IMAGE_SUFFIXES,
    EmptyFile,
    class_folders,
    files_below,
    is_hidden,
    is_image_name,
    listing,
    read_text,
    subfolders,
)
from ldam_plugins.data.readers.tables import ARCHIVES, TABLE_SUFFIXES

if TYPE_CHECKING:
    from datasets import Dataset

_TEXT_SUFFIX = ".txt"
_OF_DETECTION = {"images", "labels", "annotations"}
"""Folders that object detectors are trained on: not classes."""
_NESTED = 3
_READ_BY_DATASETS = (".arrow", ".xml", ".bz2", ".lz4", ".xz", ".zst", ".h5", ".hdf5")
"""Endings of tables, packed ones too, that nothing here reads but the package `datasets` does."""


class ClassFiles(NamedTuple):
    """Files below one root, the class index of each, and the names of the classes."""

    names: list[str]
    labels: np.ndarray
    class_names: tuple[str, ...]


def _is_text_name(name: str) -> bool:
    return name.lower().endswith(_TEXT_SUFFIX)


# Which folder is what


def split_folders(request: Request) -> dict[str, str] | None:
    """Folders of the splits by their names, relative to the root; None if there are none."""
    for base in dict.fromkeys(("", _unwrapped(request.root, ""))):
        folders = subfolders(request.root, base)
        train = find_split(request.train_split, folders)
        if train is None:
            by_kind = _by_kind(request.root, base, folders)
            if find_split(request.train_split, list(by_kind)) is not None:
                return {kind: _unwrapped(request.root, path) for kind, path in by_kind.items()}
        elif _is_split(request.root, base, train, folders):
            return {name: _unwrapped(request.root, _join(base, name)) for name in folders}
    return None


def _by_kind(root: Path, base: str, folders: list[str]) -> dict[str, str]:
    """Folders of class folders whose names speak of a split, such as ``seg_train``, by split."""
    found: dict[str, list[str]] = {}
    for name in folders:
        kind = split_in_name(name)
        if kind is not None and subfolders(root, _join(base, name)):
            found.setdefault(kind, []).append(_join(base, name))
    return {kind: names[0] for kind, names in found.items() if len(names) == 1}


def has_class_folders(request: Request) -> bool:
    """Whether a folder has a split to train on with folders in it."""
    splits = split_folders(request)
    train = find_split(request.train_split, list(splits or {}))
    return train is not None and bool(subfolders(request.root, (splits or {})[train]))


def _is_split(root: Path, base: str, train: str, folders: list[str]) -> bool:
    """Whether ``train`` holds the classes, and is not itself one beside others: buses, trains."""
    if subfolders(root, _join(base, train)):
        return True
    beside = [name for name in folders if name != train and split_kind(name) is None]
    return not any(_has_file(root, _join(base, name), is_image_name) for name in beside)


def flat_folder(request: Request, *, texts: bool = False) -> str | None:
    """The folder, relative to the root, that holds a folder for each class and no splits."""
    if find_split(request.train_split, ["train"]) is None:
        return None  # another split was asked for by name
    base = _unwrapped(request.root, "")
    folders = subfolders(request.root, base)
    wanted = _is_text_name if texts else is_image_name
    held = (True for name in folders if _has_file(request.root, _join(base, name), wanted))
    several = next(held, False) and next(held, False)
    are_splits = all(map(split_in_name, folders)) or any(
        split_kind(name) and subfolders(request.root, _join(base, name)) for name in folders
    )
    return base if several and not are_splits else None


def _unwrapped(root: Path, folder: str) -> str:
    """The folder, or the only one in it if that holds several: archives are often unpacked so."""
    deeper = folder
    for _ in range(_NESTED):
        inner = subfolders(root, deeper)
        if len(inner) != 1 or _own_files(root / deeper, is_image_name):
            break
        if split_kind(inner[0]) not in (None, split_kind(os.path.basename(folder))):
            break
        deeper = _join(deeper, inner[0])
        if len(subfolders(root, deeper)) > 1:
            return deeper
    return folder


def _own_files(folder: Path, is_wanted: Callable[[str], bool]) -> list[str]:
    """Names of the visible files that lie in a folder itself, sorted."""
    with os.scandir(folder) as entries:
        files = [entry.name for entry in entries if entry.is_file() and not is_hidden(entry.name)]
    return sorted(filter(is_wanted, files))


def _has_file(root: Path, folder: str, is_wanted: Callable[[str], bool]) -> bool:
    return next(files_below(root, folder, is_wanted), None) is not None


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


# Reading


def _read_parts(request: Request, *, texts: bool = False) -> tuple[ClassFiles, ClassFiles | None]:
    """The files to train on and those to test on, of the classes that training has."""
    splits = split_folders(request)
    if splits is None:
        whole = flat_folder(request, texts=texts) or ""
        if request.test_share is None:
            raise undivided(f"{request.root / whole} holds class folders only", request)
        return _in_training(request, whole, texts), None
    train_name, test_name = pick_splits(request, list(splits))
    train = _in_training(request, splits[train_name], texts)
    if test_name is None:
        return train, None
    test = read_class_files(request.root, splits[test_name], request.notes, texts=texts)
    found = keep_known_classes(
        test.labels, test.class_names, train.class_names, test_name, request.notes
    )
    names = [test.names[row] for row in found[0]]
    return train, ClassFiles(names, found[1], train.class_names)


def _in_training(request: Request, folder: str, texts: bool) -> ClassFiles:
    files = read_class_files(request.root, folder, request.notes, texts=texts)
    if len(files.class_names) == 1 and set(subfolders(request.root, folder)) & _OF_DETECTION:
        what = "looks like a data set for object detection, with boxes in place of classes"
        hint = "Cut the boxes out into one folder a class, or list images and labels in a table."
        raise ValueError(f"{request.root / folder} {what}. {hint}")
    return files


def read_class_files(
    root: Path, folder: str, notes: DataNotes, *, texts: bool = False
) -> ClassFiles:
    """Read ``root/folder/<class>/...``: one class a folder.

    Classes come in the natural order of their names, 2 before 10, as in timm's reader (torchvision
    sorts them as text), files in that of their text. Files may lie deeper than the class folder.
    Hidden entries, what systems leave and files of other endings are no examples. A folder without
    an example is no class: it is noted, as are names that differ in blanks only, which are one.

    Raises:
        ValueError: no class folder, none with an example, one name in two Unicode normal forms, or
            a link that leaves ``root``.
    """
    folders = class_folders(root, folder)
    if not folders:
        raise ValueError(
            f"{root / folder} holds no class folder; there is {listing(root / folder)}"
        )
    wanted = _is_text_name if texts else is_image_name
    others: list[str] = []
    found = {
        name: list(files_below(root, _join(folder, spelled), wanted, others))
        for name, spelled in folders.items()
    }
    what = "text" if texts else "image"
    suffixes = _TEXT_SUFFIX if texts else " ".join(sorted(IMAGE_SUFFIXES))
    endings = _endings(others)
    if empty := [name for name, files in found.items() if not files]:
        shown = ", ".join(str(root / folder / name) for name in empty[:20])
        if len(empty) == len(found):
            hint = f"There is {endings}." if others else "They are empty."
            raise ValueError(f"{shown} holds no {what} ({suffixes}). {hint}")
        notes.say(f"Folders that hold no {what}, so that they are no classes: {shown}.")
    if others:
        notes.leave_out(f"files that are no {what}s by name", len(others), endings)
    if beside := _own_files(root / folder, wanted):
        reason = f"{what}s beside the folders of classes"
        notes.leave_out(reason, len(beside), quoted(beside[:3]))
    classes = same_but_blanks({name: len(files) for name, files in found.items() if files}, notes)
    names = tuple(dict.fromkeys(classes.values()))
    members: dict[str, list[str]] = {name: [] for name in names}
    for spelled, name in classes.items():
        members[name] += found[spelled]
    sizes = [len(files) for files in members.values()]
    labels = np.repeat(np.arange(len(names), dtype=np.int64), sizes)
    return ClassFiles([file for files in members.values() for file in files], labels, names)


def _endings(names: list[str]) -> str:
    """How many files there are of each ending."""
    counts = Counter(os.path.splitext(name)[1].lower() or "no ending" for name in names)
    return ", ".join(f"{count} {ending}" for ending, count in counts.most_common(5))


def read_class_folders(root: Path, split: str) -> ImageRows:
    """Read the images of ``root/split/<class>/...``, see :func:`read_class_files`."""
    files = read_class_files(root, split, DataNotes())
    return ImageRows(FileSource(root, files.names), files.labels, files.class_names)


def _read_images(request: ImageRequest) -> tuple[ImageRows, ImageRows | None]:
    train, test = (
        files and ImageRows(FileSource(request.root, files.names), files.labels, files.class_names)
        for files in _read_parts(request)
    )
    assert train is not None
    return train, test


def _read_texts(request: TextRequest) -> tuple[Dataset, Dataset | None]:
    train, test = (
        files and _text_table(files, request) for files in _read_parts(request, texts=True)
    )
    assert train is not None
    return train, test


def _text_table(files: ClassFiles, request: TextRequest) -> Dataset:
    """The texts in files; those without one stop, or are left out and counted if asked for."""
    texts: list[str] = []
    empty: list[str] = []
    for name in files.names:
        try:
            texts.append(read_text(request.root / name, request.encoding))
        except EmptyFile:
            empty.append(name)
    if empty and not request.skip_empty:
        what = f"{len(empty)} of {len(files.names)} files in {request.root} hold no text"
        hint = "Leave such files out with --skip_empty (skip_empty=True)."
        raise ValueError(f"{what}, the first is {empty[0]!r}. {hint}")
    if not texts:
        raise ValueError(f"no file in {request.root} holds a text")
    if empty:
        request.notes.leave_out("files without text", len(empty), quoted(empty[:3]))
    kept = np.isin(files.names, empty, invert=True)
    return text_table(texts, files.labels[kept], files.class_names)


def _holds_texts(request: TextRequest) -> bool:
    if not request.is_folder:
        return False
    splits = split_folders(request)
    if splits is None:
        holds = flat_folder(request, texts=True) is not None
    else:
        train = splits[find_split(request.train_split, list(splits)) or ""]
        inner = subfolders(request.root, train)
        holds = any(_has_file(request.root, _join(train, name), _is_text_name) for name in inner)
    if not holds:
        _check_endings(request)
    return holds


def _check_endings(request: TextRequest) -> None:
    """Say that files in folders of classes do not end as texts do.

    Raises:
        ValueError: nothing in the data set is a text or what `datasets` may read.
    """
    walked = os.walk(request.root)  # links may lead out of it, as in the caches of the hub
    files = [name for _, _, names in walked for name in names if not is_hidden(name)]
    known = (_TEXT_SUFFIX, *TABLE_SUFFIXES, *ARCHIVES, *_READ_BY_DATASETS)
    if files and subfolders(request.root) and not any(n.lower().endswith(known) for n in files):
        expected = f"a folder of tables, or of class folders with files that end in {_TEXT_SUFFIX}"
        hint = f"There is {_endings(files)}. Rename texts, or write them and labels into a table."
        raise invalid("dataset", expected, request.dataset, hint=hint)


CLASS_FOLDERS = Reader(
    name="class folders",
    layout="a folder with {train_split}/<class>/, or with <class>/ alone",
    options=("train_split", "test_split"),
    accepts=lambda request: (
        request.is_folder
        and (split_folders(request) is not None or flat_folder(request) is not None)
    ),
    read=_read_images,
)
TEXT_FOLDERS = Reader(
    name="class folders",
    layout="a folder with {train_split}/<class>/*.txt, or with <class>/*.txt alone",
    options=("train_split", "test_split", "encoding", "skip_empty"),
    accepts=_holds_texts,
    read=_read_texts,
)
