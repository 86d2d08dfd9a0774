"""Folders of image files, one folder a class: ``train/<class>/...`` and ``test/<class>/...``."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ldam_plugins.data.readers.base import (
    FileSource,
    ImageRequest,
    ImageRows,
    Reader,
    pick_splits,
)
from ldam_plugins.data.readers.paths import IMAGE_SUFFIXES, class_folders, images_below, listing


def _read(request: ImageRequest) -> tuple[ImageRows, ImageRows]:
    folders = sorted(path.name for path in request.root.iterdir() if path.is_dir())
    train, test = pick_splits(request, folders)
    return read_class_folders(request.root, train), read_class_folders(request.root, test)


CLASS_FOLDERS = Reader(
    name="class folders",
    layout="a folder with {train_split}/<class>/",
    options=("train_split", "test_split"),
    accepts=lambda request: request.is_folder and (request.root / request.train_split).is_dir(),
    read=_read,
)


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
