"""Tables of the Hugging Face hub, or of a local folder laid out like one: images and texts."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldam_plugins._validation import check_choice, invalid, quoted
from ldam_plugins.data.readers.base import (
    LABEL,
    TEXT,
    ImageRequest,
    ImageRows,
    NoSuchDataset,
    Reader,
    Request,
    TableSource,
    TextRequest,
    check_split,
    default_test_split,
    text_features,
    text_table,
)
from ldam_plugins.data.readers.paths import composed

if TYPE_CHECKING:
    from datasets import Dataset

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_IMAGE_LABELS = ("label", "fine_label")
"""Which of several class columns is meant (CIFAR-100 has fine and coarse ones)."""
_TEXT_LABELS = ("label", "labels")
_STRINGS = ("string", "large_string")
_BYTES_OR_PATHS = ("binary", "large_binary", *_STRINGS)


def _holds_image_tables(request: ImageRequest) -> bool:
    if not request.is_folder:
        return _HUB_ID.fullmatch(request.dataset) is not None
    root = request.root
    if (root / "dataset_dict.json").is_file() or _holds(root, "*.parquet", "*/*.parquet"):
        return True
    # Deep in a folder of class folders a table is one file among others.
    return not (root / request.train_split).is_dir() and _holds(root, "*/*/*.parquet")


def _holds(root: Path, *patterns: str) -> bool:
    return any(True for pattern in patterns for _ in root.glob(pattern))


def _read_images(request: ImageRequest) -> tuple[ImageRows, ImageRows | None]:
    splits = _open_splits(request)
    features = splits[0][1].features
    image = _pick_image(request.image_column, features)
    label = _pick_image_label(request.label_column, features)
    class_names = None
    parts = []
    for split, table in splits:
        _check_columns(table, split, image_column=image, label_column=label)
        _pick_image(image, table.features)
        labels, class_names = read_labels(table, label, split, class_names)
        source = TableSource(table, image, split, _roots(request))
        parts.append(ImageRows(source, labels, class_names))
    return parts[0], parts[1] if len(parts) > 1 else None


def _read_texts(request: TextRequest) -> tuple[Dataset, Dataset | None]:
    splits = _open_splits(request)
    if len(splits) > 1 and splits[0][0] == splits[1][0]:
        raise invalid("test_split", "other rows than `train_split`", splits[1][0])
    features = splits[0][1].features
    label = _pick_text_label(request.label_column, features)
    text = _pick_text(request.text_column, features, label)
    class_names = None
    parts = []
    for split, table in splits:
        _check_columns(table, split, text_column=text, label_column=label)
        if not _is_string(table.features[text]):
            shown = f"{text} ({_kind(table.features[text])})"
            raise invalid("text_column", "a column of strings", shown)
        table = _with_texts(table, text, split, request.skip_empty)
        labels, class_names = read_labels(table, label, split, class_names)
        part = _cached_columns(table, text, label, class_names)
        parts.append(text_table(table[text][:], labels, class_names) if part is None else part)
    return parts[0], parts[1] if len(parts) > 1 else None


HUB_IMAGES = Reader(
    name="tables",
    layout="a hub id, or a folder of *.parquet files (also one or two folders down)",
    options=("image_column", "label_column", "train_split", "test_split"),
    accepts=_holds_image_tables,
    read=_read_images,
)
HUB_TEXTS = Reader(
    name="tables",
    layout="a hub id, or a folder of files that `datasets.load_dataset` reads",
    options=("text_column", "label_column", "train_split", "test_split", "skip_empty"),
    accepts=lambda request: bool(request.dataset),  # the last one asked: `datasets` knows others
    read=_read_texts,
)


# Tables


def open_tables(dataset: str, cache_dir: str | None = None) -> Mapping[str, Any]:
    """Open every split of a hub id or of a local folder in hub layout.

    Raises:
        NoSuchDataset: there is none, or the hub cannot be reached and it is not in the cache.
        ValueError: its files cannot be read.
    """
    import datasets

    try:
        if (Path(dataset) / "dataset_dict.json").is_file():
            return datasets.load_from_disk(dataset)
        return datasets.load_dataset(dataset, cache_dir=cache_dir)
    except datasets.exceptions.DatasetNotFoundError as error:
        raise NoSuchDataset(f"The hub has none of that name ({error})") from error
    except ConnectionError as error:
        reason = f"There is no such folder, and the hub could not be reached ({error})"
        raise NoSuchDataset(reason, ConnectionError) from error
    except Exception as error:  # each file format fails in a way of its own
        cause = error.__cause__ or error
        raise ValueError(f"dataset {dataset!r} cannot be read: {cause}") from error


def _open_splits(request: Request) -> list[tuple[str, Any]]:
    """The rows to train on and those to test on, each with what it was asked for as."""
    name = str(request.root) if request.is_folder else request.dataset
    tables = open_tables(name, request.cache_dir)
    asked: dict[str, str | None] = {"train_split": request.train_split}
    if request.test_share is None:
        asked["test_split"] = request.test_split or default_test_split(tables)
    return [
        (str(split), _rows_of(argument, split, tables, request))
        for argument, split in asked.items()
    ]


def _rows_of(argument: str, asked: str | None, tables: Mapping[str, Any], request: Request) -> Any:
    """A split, or the slice of one that ``datasets`` would read."""
    from datasets import ReadInstruction

    name = check_split(argument, asked and asked.partition("[")[0], list(tables), request)
    table = tables[name]
    request.notes.parts[argument] = asked or name
    if asked is None or "[" not in asked:
        return table
    try:
        asked = f"{name}[{asked.partition('[')[2]}"
        (rows,) = ReadInstruction.from_spec(asked).to_absolute({name: len(table)})
    except (ValueError, AssertionError) as error:
        expected = f"a split or a slice of one, such as '{name}[:10%]'"
        raise invalid(argument, expected, asked) from error
    if rows.from_ >= rows.to:
        raise invalid(argument, f"a slice that holds one of {len(table)} rows", asked)
    return table.select(range(rows.from_, rows.to))


def _roots(request: Request) -> list[str]:
    """Where the files may be that rows name by a path: the data set's folder and the caches."""
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = str(request.root) if request.is_folder else None
    roots = (folder, request.cache_dir, str(HF_DATASETS_CACHE), str(HF_HUB_CACHE))
    return [path for path in roots if path and Path(path).is_dir()]


# Columns


def _pick_image(asked: str | None, features: Mapping[str, Any]) -> str:
    from datasets import Image

    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    image = _pick("image_column", asked, images, features)
    if image not in images and features[image].dtype not in _BYTES_OR_PATHS:
        raise invalid("image_column", "a column of images", image, hint=_columns(features))
    return image


def _pick_image_label(asked: str | None, features: Mapping[str, Any]) -> str:
    classes = _class_columns(features)
    preferred = [name for name in _IMAGE_LABELS if name in classes][:1]
    return _pick("label_column", asked, preferred or classes, features)


def _pick_text(asked: str | None, features: Mapping[str, Any], label: str) -> str:
    strings = [n for n, feature in features.items() if n != label and _is_string(feature)]
    return _pick("text_column", asked, [TEXT] if TEXT in strings else strings, features)


def _pick_text_label(asked: str | None, features: Mapping[str, Any]) -> str:
    classes = _class_columns(features)
    named = [name for name in _TEXT_LABELS if name in features]
    return _pick("label_column", asked, classes if len(classes) == 1 else named, features)


def _pick(
    argument: str, asked: str | None, candidates: Sequence[str], features: Mapping[str, Any]
) -> str:
    """The column that was asked for, else the only candidate."""
    if asked is not None:
        return check_choice(argument, asked, list(features), hint=_columns(features))
    if len(candidates) != 1:
        which = f"each of {quoted(candidates)}" if candidates else "no column"
        raise ValueError(f"{which} could be the `{argument}`; give it. {_columns(features)}")
    return candidates[0]


def _check_columns(table: Any, split: str, **columns: str) -> None:
    """Check that a split has the columns, each given under the argument that chooses it."""
    for argument, column in columns.items():
        if column not in table.features:
            expected = f"a column of split {split}"
            raise invalid(argument, expected, column, hint=_columns(table.features))


def _class_columns(features: Mapping[str, Any]) -> list[str]:
    from datasets import ClassLabel

    return [name for name, feature in features.items() if isinstance(feature, ClassLabel)]


def _is_string(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in _STRINGS


def _kind(feature: Any) -> str:
    """Type of a column for a message: ``string``, ``float32``, ``ClassLabel``, ``List``."""
    if type(feature).__name__ == "Value":
        return str(feature.dtype)
    return type(feature).__name__ if not isinstance(feature, list) else "List"


def _columns(features: Mapping[str, Any]) -> str:
    kinds = (f"{name} ({_kind(feature)})" for name, feature in features.items())
    return f"The columns are {', '.join(kinds)}."


# Labels


def read_labels(
    table: Any, column: str, split: str, class_names: tuple[str, ...] | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Read one label column, no other: int64 labels and the class names.

    A column of class labels names its classes itself. For plain integers the classes are 0 to
    the largest, for strings the sorted ones, in one Unicode normal form; ``class_names`` gives
    those of the training split.

    Raises:
        ValueError: a column of another type, a row without label, a label out of range, or class
            labels with other names or in another order than ``class_names``.
    """
    feature = table.features[column]
    if not (_is_string(feature) or "int" in str(getattr(feature, "dtype", ""))):
        raise _no_labels(column, table.features)
    values = table.select_columns([column]).with_format("arrow")[:].column(0)
    if len(values) == 0:
        raise ValueError(f"split {split} is empty")
    if values.null_count:
        raise ValueError(f"{values.null_count} rows of split {split} have no {column!r}")
    if _is_string(feature):
        return _read_strings(values, split, class_names)
    labels = values.to_numpy()
    names = getattr(feature, "names", None) or class_names
    if class_names is not None and tuple(names or ()) != tuple(class_names):
        odd = quoted(sorted(set(names or ()) ^ set(class_names))) or "their order"
        what = f"column {column!r} of split {split} must have the classes of training"
        raise ValueError(f"{what}, not so: {odd}")
    limit = len(names) if names else len(labels)
    wrong = np.flatnonzero((labels < 0) | (labels >= limit))
    if wrong.size:
        raise ValueError(_bad_label(int(wrong[0]), split, int(labels[wrong[0]]), limit))
    names = names or [str(label) for label in range(int(labels.max()) + 1)]
    return labels.astype(np.int64), tuple(names)


def _read_strings(
    values: Any, split: str, class_names: tuple[str, ...] | None
) -> tuple[np.ndarray, tuple[str, ...]]:
    texts = np.array([composed(value) for value in values.to_pylist()], dtype=str)
    found, labels = np.unique(texts, return_inverse=True)
    names = tuple(found.tolist()) if class_names is None else class_names
    place = {name: label for label, name in enumerate(names)}
    odd = [name for name in found.tolist() if name not in place]
    if odd:
        raise ValueError(f"split {split} has labels that training has not: {quoted(odd)}")
    return np.array([place[name] for name in found.tolist()])[labels], names


def _no_labels(column: str, features: Mapping[str, Any]) -> Exception:
    kind = _kind(features[column])
    hint = _columns(features)
    if "float" in kind:
        hint = f'Cast it: `dataset.cast_column("{column}", Value("int64"))`, if it holds classes.'
    elif "list" in kind.lower():
        hint = "Several labels a text or image have no long tail of classes: choose one of them."
    expected = "a column of class labels, integers or strings, one a row"
    return invalid("label_column", expected, f"{column} ({kind})", hint=hint)


def _bad_label(row: int, split: str, label: int, limit: int) -> str:
    what = f"row {row} of split {split} has label {label}, which must be in 0..{limit - 1}"
    return f"{what}; -1 marks rows without label: choose a split that has them"


# Texts


def _with_texts(table: Any, column: str, split: str, skip_empty: bool) -> Any:
    """The rows that have a text."""
    empty = [row for row, text in enumerate(table[column][:]) if not (text and text.strip())]
    if not empty:
        return table
    if not skip_empty:
        expected = f"a text in every row of split {split}"
        hint = "Leave such rows out with --skip_empty (skip_empty=True)."
        found = f"none in {len(empty)} rows, the first is row {empty[0]}"
        raise ValueError(f"`{column}` must be {expected}, got {found}. {hint}")
    return table.select(np.setdiff1d(np.arange(len(table)), empty))


def _cached_columns(
    table: Any, text: str, label: str, class_names: Collection[str]
) -> Dataset | None:
    """The two columns of a table in the cache of ``datasets``, where they need no change.

    They stay on disk, and ``map`` stores its results beside them. None for other tables, those of
    ``save_to_disk`` among them: ``map`` would write into the user's folder.
    """
    from datasets.config import HF_DATASETS_CACHE

    cache = Path(HF_DATASETS_CACHE).resolve()
    files = [Path(file["filename"]).resolve() for file in table.cache_files]
    if not files or not all(file.is_relative_to(cache) for file in files):
        return None
    kept = table.select_columns([text, label])
    if [text, label] != [TEXT, LABEL]:
        kept = kept.rename_columns({text: TEXT, label: LABEL})
    return kept if kept.features == text_features(list(class_names)) else None
