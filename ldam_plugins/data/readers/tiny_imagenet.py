"""Tiny ImageNet as it is published: ``wnids.txt``, class folders, and a list of the test files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ldam_plugins._validation import quoted
from ldam_plugins.data.readers.base import FileSource, ImageRequest, ImageRows, Reader
from ldam_plugins.data.readers.class_folders import read_class_folders
from ldam_plugins.data.readers.paths import at_line, find_files, natural_key, read_lines

_IDS, _VAL_LIST = "wnids.txt", "val/val_annotations.txt"
"""What the layout is known by; ``words.txt`` is used where it is there."""


def _accepts(request: ImageRequest) -> bool:
    return request.is_folder and all((request.root / n).is_file() for n in (_IDS, _VAL_LIST))


TINY_IMAGENET = Reader(
    name="Tiny ImageNet",
    layout=f"a folder with {_IDS} and {_VAL_LIST}",
    options=(),
    accepts=_accepts,
    read=lambda request: read_tiny_imagenet(request.root),
)


def read_tiny_imagenet(root: Path) -> tuple[ImageRows, ImageRows]:
    """Read Tiny ImageNet as it is published: classes are the ids of ``wnids.txt`` in natural order.

    ``train/<id>/images`` holds the training files; ``val/val_annotations.txt`` names the test
    files of ``val/images`` and their ids. A class is called by its first word and its id.

    Raises:
        ValueError: the training folders are not the ids, or a bad line (file and line named).
    """
    ids = tuple(sorted(read_lines(root / _IDS), key=natural_key))
    train = read_class_folders(root, "train")
    if ids != train.class_names:
        odd = quoted(sorted(set(ids) ^ set(train.class_names))) or "an id is repeated"
        raise ValueError(f"{root / _IDS} and the folders in {root / 'train'} differ: {odd}")
    names, labels = _read_tiny_val(root, ids)
    words = _read_words(root / "words.txt")
    class_names = tuple(f"{words[name]} ({name})" if name in words else name for name in ids)
    test = ImageRows(FileSource(root, names), labels, class_names)
    return train._replace(class_names=class_names), test


def _read_tiny_val(root: Path, ids: tuple[str, ...]) -> tuple[list[str], np.ndarray]:
    file = root / _VAL_LIST
    index = {name: label for label, name in enumerate(ids)}
    names, labels = [], []
    for row, line in enumerate(read_lines(file)):
        fields = line.split()
        if len(fields) < 2 or fields[1] not in index:
            expected = "a file name and an id of wnids.txt"
            raise ValueError(
                f"{at_line(file, row)}: must begin with {expected}, got {line[:200]!r}"
            )
        names.append(f"val/images/{fields[0]}")
        labels.append(index[fields[1]])
    found = find_files(root, names, lambda row: at_line(file, row))
    return found, np.array(labels, dtype=np.int64)


def _read_words(file: Path) -> dict[str, str]:
    if not file.exists():
        return {}
    words = {}
    for row, line in enumerate(read_lines(file)):
        name, tab, text = line.partition("\t")
        if not tab:
            raise ValueError(f"{at_line(file, row)}: must be an id, a tab and words, got {line!r}")
        words[name] = text.split(",")[0]
    return words
