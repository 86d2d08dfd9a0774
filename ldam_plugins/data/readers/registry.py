"""Which kind of data set a name or a folder is, and the loader of each kind."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from ldam_plugins._validation import invalid, quoted
from ldam_plugins.data.readers.base import ArraySource, ImageRows
from ldam_plugins.data.readers.class_folders import (
    TINY_IMAGENET_FILES,
    read_class_folders,
    read_lists,
    read_tiny_imagenet,
)
from ldam_plugins.data.readers.coco_json import read_annotations
from ldam_plugins.data.readers.hub import open_tables, pick_columns, read_labels, table_source
from ldam_plugins.data.readers.paths import listing

TEST_SPLITS = ("test", "validation", "valid", "val")
"""Names of the test split in order of preference, for folders and tables alike."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_INATURALIST = re.compile(r"train((?:20\d\d)?)\.json")
_DIGITS_TRAIN, _DIGITS_TEST = 120, 54  # per class, of 174 to 183
_DIGITS_SEED = 0
_Pair = tuple[ImageRows, ImageRows]


@dataclass(frozen=True)
class ImageRequest:
    """The arguments of ``load_images``, paths as text."""

    dataset: str
    image_column: str | None = None
    label_column: str | None = None
    train_split: str = "train"
    test_split: str | None = None
    train_list: str | None = None
    test_list: str | None = None
    cache_dir: str | None = None

    @property
    def root(self) -> Path:
        """The data set as a folder."""
        return Path(self.dataset).expanduser()


def load_rows(request: ImageRequest) -> _Pair:
    """Recognise the data set and read the labels of its training and its test split.

    Raises:
        ConnectionError: the hub cannot be reached.
        ValueError: nothing fits, an option has no meaning here, or the content is bad.
    """
    kind = _kind(request)
    load, uses = _LOADERS[kind]
    for field in fields(request):
        value = getattr(request, field.name)
        if field.name not in uses and value != field.default and field.name != "dataset":
            hint = f"It means nothing for {request.dataset!r}, read as {kind}."
            raise invalid(field.name, "left out", value, hint=hint)
    return load(request)


def _kind(request: ImageRequest) -> str:
    if request.train_list is not None or request.test_list is not None:
        return "list files"
    if request.dataset == "digits":
        return "embedded digits"
    if request.dataset and request.root.is_dir():
        return _folder_kind(request.root, request.train_split)
    if _HUB_ID.fullmatch(request.dataset):
        return "tables"
    expected = "'digits', a folder that is there or a hub id"
    raise invalid("dataset", expected, request.dataset, hint="There is no such folder.")


def _folder_kind(root: Path, train_split: str) -> str:
    if _annotation_files(root):
        return "annotations"
    if all((root / name).is_file() for name in TINY_IMAGENET_FILES):
        return "Tiny ImageNet"
    if (root / "dataset_dict.json").is_file() or _holds(root, "*.parquet", "*/*.parquet"):
        return "tables"
    if (root / train_split).is_dir():
        return "class folders"
    if _holds(root, "*/*/*.parquet"):
        return "tables"
    raise ValueError(
        f"{root} is no known kind of data set. Looked for: {train_split}/<class>/, *.parquet "
        f"(also one or two folders down), train2018.json with val2018.json, "
        f"{' with '.join(TINY_IMAGENET_FILES)}; or give `train_list` and `test_list`. "
        f"There is {listing(root)}."
    )


def _holds(root: Path, *patterns: str) -> bool:
    return any(True for pattern in patterns for _ in root.glob(pattern))


def _annotation_files(root: Path) -> list[Path]:
    found = [
        match for path in root.glob("train*.json") if (match := _INATURALIST.fullmatch(path.name))
    ]
    if not found:
        mini = root / "train_mini.json"  # the smaller part of iNaturalist 2021
        return [mini, root / "val.json"] if mini.is_file() else []
    if len(found) > 1:
        names = quoted(sorted(match.string for match in found))
        raise ValueError(f"{root} holds {names}; give `train_list` and `test_list` to choose")
    return [root / found[0].string, root / f"val{found[0][1]}.json"]


def _load_digits(request: ImageRequest) -> _Pair:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    names = tuple(str(name) for name in digits.target_names)
    random = np.random.RandomState(_DIGITS_SEED)
    rows = [random.permutation(np.flatnonzero(digits.target == c)) for c in range(len(names))]
    ends = (0, _DIGITS_TRAIN, _DIGITS_TRAIN + _DIGITS_TEST)
    pair = []
    for split, start, end in zip(("train", "test"), ends, ends[1:], strict=False):
        kept = np.sort(np.concatenate([of_class[start:end] for of_class in rows]))
        source = ArraySource(pixels[kept], f"split {split} of digits")
        pair.append(ImageRows(source, digits.target[kept].astype(np.int64), names))
    return pair[0], pair[1]


def _load_lists(request: ImageRequest) -> _Pair:
    if not request.root.is_dir():
        expected = "the folder that the listed paths are relative to"
        raise invalid("dataset", expected, request.dataset, hint="There is no such folder.")
    for name in ("train_list", "test_list"):
        if getattr(request, name) is None:
            raise invalid(name, "given, since the other list is", None)
    files = [Path(str(name)).expanduser() for name in (request.train_list, request.test_list)]
    kinds = {file.suffix.lower() == ".json" for file in files}
    if len(kinds) > 1:
        raise invalid("test_list", f"of the kind of {files[0].name}", files[1].name)
    read = read_annotations if True in kinds else read_lists
    return read(request.root, files[0], files[1])


def _load_annotations(request: ImageRequest) -> _Pair:
    train, test = _annotation_files(request.root)
    return read_annotations(request.root, train, test)


def _load_tiny_imagenet(request: ImageRequest) -> _Pair:
    return read_tiny_imagenet(request.root)


def _load_class_folders(request: ImageRequest) -> _Pair:
    folders = sorted(path.name for path in request.root.iterdir() if path.is_dir())
    train, test = _pick_splits(request, folders)
    return read_class_folders(request.root, train), read_class_folders(request.root, test)


def _load_tables(request: ImageRequest) -> _Pair:
    name = str(request.root) if request.root.is_dir() else request.dataset
    tables = open_tables(name, request.cache_dir)
    splits = _pick_splits(request, list(tables))
    image, label = pick_columns(
        tables[splits[0]].features, request.image_column, request.label_column
    )
    class_names = None
    pair = []
    for split in splits:
        pick_columns(tables[split].features, image, label)
        labels, class_names = read_labels(tables[split], label, split, class_names)
        source = table_source(
            tables[split], image, split, dataset=name, cache_dir=request.cache_dir
        )
        pair.append(ImageRows(source, labels, class_names))
    return pair[0], pair[1]


def _pick_splits(request: ImageRequest, available: list[str]) -> tuple[str, str]:
    test = request.test_split or next((name for name in TEST_SPLITS if name in available), None)
    there = f"one of {quoted(available)}, the splits of {request.dataset}"
    if request.train_split not in available:
        raise invalid("train_split", there, request.train_split)
    if test not in available:
        hint = "" if test else f"None is named {', '.join(TEST_SPLITS)}."
        raise invalid("test_split", there, test, hint=hint)
    return request.train_split, test


_LOADERS: dict[str, tuple[Callable[[ImageRequest], _Pair], Collection[str]]] = {
    "embedded digits": (_load_digits, ("cache_dir",)),
    "list files": (_load_lists, ("cache_dir", "train_list", "test_list")),
    "annotations": (_load_annotations, ("cache_dir",)),
    "Tiny ImageNet": (_load_tiny_imagenet, ("cache_dir",)),
    "class folders": (_load_class_folders, ("cache_dir", "train_split", "test_split")),
    "tables": (
        _load_tables,
        ("cache_dir", "train_split", "test_split", "image_column", "label_column"),
    ),
}
