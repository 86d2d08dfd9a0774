"""COCO-style JSON, the form that iNaturalist and camera traps are published in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ldam_plugins._validation import quoted
from ldam_plugins.data.readers.base import FileSource, ImageRequest, ImageRows, Reader, is_json
from ldam_plugins.data.readers.paths import composed, find_files, read_text

_KINDS: dict[str, tuple[type[Any], ...]] = {
    "id": (int, str),
    "image_id": (int, str),
    "category_id": (int,),
    "file_name": (str,),
}
_ONE_CLASS = (
    "An image must be of one class: leave such images out of the file, or list the others in files "
    "of `path label` lines (`train_list` and `test_list`)."
)
_TRAIN_FILE = re.compile(r"train((?:20\d\d)?)\.json")


def _accepts(request: ImageRequest) -> bool:
    if request.is_listed:
        return is_json(request.train_list) or is_json(request.test_list)
    return request.is_folder and bool(_files_in(request.root))


def _read(request: ImageRequest) -> tuple[ImageRows, ImageRows]:
    train, test = request.listed_in() if request.is_listed else _files_in(request.root)
    return read_annotations(request.root, train, test)


COCO_JSON = Reader(
    name="annotations",
    layout=(
        "a folder with train2018.json and val2018.json (or of another year), or with two such "
        "files as `train_list` and `test_list`"
    ),
    options=("train_list", "test_list"),
    accepts=_accepts,
    read=_read,
)


def _files_in(root: Path) -> list[Path]:
    """The JSON files to train on and to test on that lie in a folder; empty if there are none."""
    found = [
        match for path in root.glob("train*.json") if (match := _TRAIN_FILE.fullmatch(path.name))
    ]
    if not found:
        mini = root / "train_mini.json"  # the smaller part of iNaturalist 2021
        return [mini, root / "val.json"] if mini.is_file() else []
    if len(found) > 1:
        names = quoted(sorted(match.string for match in found))
        raise ValueError(f"{root} holds {names}; give `train_list` and `test_list` to choose")
    return [root / found[0].string, root / f"val{found[0][1]}.json"]


def read_annotations(root: Path, train_json: Path, test_json: Path) -> tuple[ImageRows, ImageRows]:
    """Read two files of ``images``, ``annotations`` and optional ``categories``.

    An image may have several annotations, such as a box for each animal, if they are of one
    category. Classes are the ids of ``categories`` in ascending order, without those that neither
    file uses; where the training file has no such list, the ids it uses. Rows are in the order of
    ``images``.

    Raises:
        ValueError: not such a file; an id that is repeated, unknown or has no annotation; an
            image of several categories, or one that is missing or leaves ``root``. The message
            names file and entry.
    """
    train, test = _Annotations.load(train_json), _Annotations.load(test_json)
    classes = train.categories()
    if classes is None:
        classes = {identity: str(identity) for identity in train.used_categories()}
    other = test.categories()
    if other is not None and other != classes:
        odd = quoted(sorted(set(other) ^ set(classes))) or "the names differ"
        raise ValueError(f"`categories` of {train_json} and {test_json} must be equal: {odd}")
    used = {*train.used_categories(), *test.used_categories()}
    classes = {identity: name for identity, name in classes.items() if identity in used}
    return train.rows(root, classes), test.rows(root, classes)


@dataclass(frozen=True)
class _Annotations:
    file: Path
    content: dict[str, Any]

    @classmethod
    def load(cls, file: Path) -> _Annotations:
        text = read_text(file)
        try:
            content = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {error.lineno}: not JSON ({error.msg})") from error
        except (ValueError, RecursionError) as error:  # endless digits, endless brackets
            raise ValueError(f"{file}: not annotations ({error})") from error
        if not isinstance(content, dict):
            raise ValueError(f"{file}: must be a JSON object, got {type(content).__name__}")
        return cls(file, content)

    def categories(self) -> dict[int, str] | None:
        """Give name by id, ids ascending; None where the file has no such list."""
        if "categories" not in self.content:
            return None
        found: dict[int, str] = {}
        for place, entry in self._entries("categories"):
            identity = self._field(entry, "id", place, (int,))
            if identity in found:
                raise ValueError(f"{place}: id {identity} is repeated")
            found[identity] = composed(str(entry.get("name", identity)))
        return dict(sorted(found.items()))

    def used_categories(self) -> list[int]:
        """Give the category ids of the annotations in ascending order."""
        entries = self._entries("annotations")
        return sorted({self._field(entry, "category_id", place) for place, entry in entries})

    def rows(self, root: Path, classes: dict[int, str]) -> ImageRows:
        """Join images and annotations."""
        names: list[str] = []
        row_of: dict[int | str, int] = {}
        for place, entry in self._entries("images"):
            identity = self._field(entry, "id", place)
            if row_of.setdefault(identity, len(names)) != len(names):
                raise ValueError(f"{place}: id {identity!r} is repeated")
            names.append(self._field(entry, "file_name", place))
        labels = self._labels(row_of, classes)
        found = find_files(root, names, lambda row: f"{self.file}, images[{row}]")
        return ImageRows(FileSource(root, found), labels, tuple(classes.values()))

    def _labels(self, row_of: dict[int | str, int], classes: dict[int, str]) -> np.ndarray:
        label_of = {identity: label for label, identity in enumerate(classes)}
        labels = np.full(len(row_of), -1, dtype=np.int64)
        for place, entry in self._entries("annotations"):
            image, category = (
                self._field(entry, key, place) for key in ("image_id", "category_id")
            )
            if image not in row_of:
                raise ValueError(f"{place}: no image has the id {image!r}")
            if category not in label_of:
                raise ValueError(f"{place}: there is no category {category}")
            label, before = label_of[category], int(labels[row_of[image]])
            if before not in (-1, label):
                names = list(classes.values())
                what = f"has an annotation already, of {names[before]!r} and not {names[label]!r}"
                raise ValueError(f"{place}: image {image!r} {what}. {_ONE_CLASS}")
            labels[row_of[image]] = label
        if (labels < 0).any():
            row = int(np.flatnonzero(labels < 0)[0])
            raise ValueError(f"{self.file}, images[{row}]: there is no annotation for it")
        return labels

    def _entries(self, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
        entries = self.content.get(key)
        if not isinstance(entries, list) or not entries:
            found = quoted(self.content)
            raise ValueError(f"{self.file}: must hold a list `{key}` with entries; it has {found}")
        for row, entry in enumerate(entries):
            place = f"{self.file}, {key}[{row}]"
            if not isinstance(entry, dict):
                raise ValueError(f"{place}: must be an object, got {entry!r:.200}")
            yield place, entry

    @staticmethod
    def _field(
        entry: dict[str, Any], key: str, place: str, kinds: tuple[type[Any], ...] | None = None
    ) -> Any:
        value = entry.get(key)
        kinds = kinds or _KINDS[key]
        if not isinstance(value, kinds) or isinstance(value, bool):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{place}: `{key}` must be {expected}, got {value!r:.200}")
        if key == "category_id" and value < 0:
            raise ValueError(f"{place}: `{key}` must be >= 0, got {value}")
        return value
