"""Labels of image files as class folders and list files give them."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ldam_plugins._validation import quoted
from ldam_plugins.data.readers.base import IMAGE_SUFFIXES, FileSource, ImageRows
from ldam_plugins.data.readers.paths import (
    at_line,
    class_folders,
    find_files,
    images_below,
    listing,
    natural_key,
    read_lines,
)

TINY_IMAGENET_FILES = ("wnids.txt", "val/val_annotations.txt")
"""What Tiny ImageNet's own layout is known by; ``words.txt`` is used where it is there."""
_LIST_LINE = re.compile(r"(.*[^\s,;])[\s,;]+([0-9]+)")


def read_class_folders(root: Path, split: str) -> ImageRows:
    """Read ``root/split/<class>/...``: one class a folder.

    Classes come in the natural order of their names, 2 before 10, as in timm's reader (torchvision
    sorts them as text), files in that of their text. Files may lie deeper than the class folder.
    Hidden entries and files of other suffixes than ``IMAGE_SUFFIXES`` are no examples.

    Raises:
        ValueError: no class folder, a class without an image, one name in two Unicode normal forms,
            or a link that leaves ``root``.
    """
    classes = class_folders(root, split)
    if not classes:
        raise ValueError(f"{root / split} holds no class folder; there is {listing(root / split)}")
    files = [list(images_below(root, f"{split}/{folder}")) for folder in classes.values()]
    for name, found in zip(classes, files, strict=True):
        if not found:
            suffixes = " ".join(sorted(IMAGE_SUFFIXES))
            raise ValueError(f"{root / split / name} holds no image ({suffixes})")
    labels = np.repeat(np.arange(len(classes), dtype=np.int64), [len(found) for found in files])
    names = [name for found in files for name in found]
    return ImageRows(FileSource(root, names), labels, tuple(classes))


def read_tiny_imagenet(root: Path) -> tuple[ImageRows, ImageRows]:
    """Read Tiny ImageNet as it is published: classes are the ids of ``wnids.txt`` in natural order.

    ``train/<id>/images`` holds the training files; ``val/val_annotations.txt`` names the test
    files of ``val/images`` and their ids. A class is called by its first word and its id.

    Raises:
        ValueError: the training folders are not the ids, or a bad line (file and line named).
    """
    ids = tuple(sorted(read_lines(root / TINY_IMAGENET_FILES[0]), key=natural_key))
    train = read_class_folders(root, "train")
    if ids != train.class_names:
        odd = quoted(sorted(set(ids) ^ set(train.class_names))) or "an id is repeated"
        raise ValueError(f"{root / 'wnids.txt'} and the folders in {root / 'train'} differ: {odd}")
    names, labels = _read_tiny_val(root, ids)
    words = _read_words(root / "words.txt")
    class_names = tuple(f"{words[name]} ({name})" if name in words else name for name in ids)
    test = ImageRows(FileSource(root, names), labels, class_names)
    return train._replace(class_names=class_names), test


def read_lists(root: Path, train_list: Path, test_list: Path) -> tuple[ImageRows, ImageRows]:
    """Read two files of lines ``relative/path.jpg 17``; class names are the labels.

    Between path and label are blanks, tabs, a comma or a semicolon; a path may have any form that
    :func:`.find_files` knows. The classes are 0 to the largest label of
    the training list, which is below its number of lines since each class needs a sample.

    Raises:
        ValueError: a line of another form, a label out of range, a path that is repeated, is
            missing or leaves ``root``; the message names file and line.
    """
    names, labels = _read_list(root, train_list, None)
    class_names = tuple(str(label) for label in range(int(labels.max()) + 1))
    test_names, test_labels = _read_list(root, test_list, len(class_names))
    return (
        ImageRows(FileSource(root, names), labels, class_names),
        ImageRows(FileSource(root, test_names), test_labels, class_names),
    )


def _read_list(root: Path, file: Path, classes: int | None) -> tuple[list[str], np.ndarray]:
    lines = read_lines(file)
    limit = len(lines) if classes is None else classes
    reason = (
        f"the {limit} lines" if classes is None else f"the {limit} classes of the training list"
    )
    names: list[str] = []
    labels = np.empty(len(lines), dtype=np.int64)
    for row, line in enumerate(lines):
        match = _LIST_LINE.fullmatch(line.strip())
        if match is None:
            expected = "a path and a label from 0 on, as in 'relative/path.jpg 17'"
            raise ValueError(f"{at_line(file, row)}: must be {expected}, got {line[:200]!r}")
        name, digits = match.groups()
        if len(digits) > 18 or int(digits) >= limit:
            raise ValueError(f"{at_line(file, row)}: label {digits[:40]} is too large for {reason}")
        names.append(name)
        labels[row] = int(digits)
    return find_files(root, names, lambda row: at_line(file, row)), labels


def _read_tiny_val(root: Path, ids: tuple[str, ...]) -> tuple[list[str], np.ndarray]:
    file = root / TINY_IMAGENET_FILES[1]
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
