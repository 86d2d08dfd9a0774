"""Two files of lines ``relative/path.jpg 17``, as ImageNet-LT and Places-LT are published."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ldam_plugins.data.readers.base import (
    FileSource,
    ImageRequest,
    ImageRows,
    Reader,
    undivided,
)
from ldam_plugins.data.readers.paths import at_line, find_files, read_lines

_LISTS = (".txt", ".lst")
_LINE = re.compile(r"(.*[^\s,;])[\s,;]+([0-9]+)")


def _read(request: ImageRequest) -> tuple[ImageRows, ImageRows | None]:
    if not request.is_listed:
        if request.test_share is None:
            raise undivided(f"{request.root} is one list of all images", request)
        root = request.root.parent
        names, labels = _read_list(root, request.root, None, request.encoding)
        return _rows(root, names, labels, int(labels.max()) + 1), None
    train_list, test_list = request.listed_in()
    return read_lists(request.root, train_list, test_list, request.encoding)


def _lists_images(request: ImageRequest) -> bool:
    if not request.is_listed:
        if request.root.suffix.lower() not in _LISTS or not request.root.is_file():
            return False
        first = read_lines(request.root, request.encoding)[0]
        return _LINE.fullmatch(first.strip()) is not None
    return all(is_list(file, request.encoding) for file in request.listed_in())


LIST_FILES = Reader(
    name="list files",
    layout=(
        "a folder with `train_list` and `test_list`, files of lines 'relative/path.jpg 17', or one "
        "such file beside the images"
    ),
    options=("train_list", "test_list", "encoding"),
    accepts=_lists_images,
    read=_read,
)


def is_list(file: Path, encoding: str | None = None) -> bool:
    """Whether a file begins with a line ``relative/path.jpg 17``, or at least not as a table does.

    A table has a header, or labels that are words, and separates its columns by a comma, semicolon,
    tab or bar.

    Raises:
        ValueError: the file cannot be read.
    """
    first = read_lines(file, encoding)[0].strip()
    return _LINE.fullmatch(first) is not None or not set(first) & set(",;\t|")


def read_lists(
    root: Path, train_list: Path, test_list: Path, encoding: str | None = None
) -> tuple[ImageRows, ImageRows]:
    """Read two files of lines ``relative/path.jpg 17``; class names are the labels.

    Between path and label are blanks, tabs, a comma or a semicolon; a path may have any form that
    :func:`.find_files` knows. The classes are 0 to the largest label of
    the training list, which is below its number of lines since each class needs a sample.

    Raises:
        ValueError: a line of another form, a label out of range, a path that is repeated, is
            missing or leaves ``root``; the message names file and line.
    """
    names, labels = _read_list(root, train_list, None, encoding)
    classes = int(labels.max()) + 1
    test_names, test_labels = _read_list(root, test_list, classes, encoding)
    return _rows(root, names, labels, classes), _rows(root, test_names, test_labels, classes)


def _rows(root: Path, names: list[str], labels: np.ndarray, classes: int) -> ImageRows:
    return ImageRows(FileSource(root, names), labels, tuple(map(str, range(classes))))


def _read_list(
    root: Path, file: Path, classes: int | None, encoding: str | None
) -> tuple[list[str], np.ndarray]:
    lines = read_lines(file, encoding)
    limit = len(lines) if classes is None else classes
    reason = (
        f"the {limit} lines" if classes is None else f"the {limit} classes of the training list"
    )
    names: list[str] = []
    labels = np.empty(len(lines), dtype=np.int64)
    for row, line in enumerate(lines):
        match = _LINE.fullmatch(line.strip())
        if match is None:
            expected = "a path and a label from 0 on, as in 'relative/path.jpg 17'"
            raise ValueError(f"{at_line(file, row)}: must be {expected}, got {line[:200]!r}")
        name, digits = match.groups()
        if len(digits) > 18 or int(digits) >= limit:
            raise ValueError(f"{at_line(file, row)}: label {digits[:40]} is too large for {reason}")
        names.append(name)
        labels[row] = int(digits)
    return find_files(root, names, lambda row: at_line(file, row)), labels
