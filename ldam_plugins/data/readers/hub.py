"""Images and labels in the tables of a hub dataset, or of a local folder laid out like one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ldam_plugins._validation import invalid, quoted
from ldam_plugins.data.readers.base import TableSource
from ldam_plugins.data.readers.paths import composed

_LABEL_COLUMNS = ("label", "fine_label")
"""Which of several class columns is meant (CIFAR-100 has fine and coarse ones)."""
_READABLE = ("binary", "large_binary", "string", "large_string")


def open_tables(dataset: str, cache_dir: str | None = None) -> Mapping[str, Any]:
    """Open every split of a hub id or of a local folder in hub layout.

    Raises:
        ConnectionError: the hub cannot be reached and nothing of that name is in the cache.
        ValueError: there is no such dataset, or its files cannot be read.
    """
    import datasets

    try:
        if (Path(dataset) / "dataset_dict.json").is_file():
            return datasets.load_from_disk(dataset)
        return datasets.load_dataset(dataset, cache_dir=cache_dir)
    except datasets.exceptions.DatasetNotFoundError as error:
        reason = f"The hub has none of that name ({error})"
        raise _no_dataset(dataset, reason) from error
    except ConnectionError as error:
        reason = f"There is no such folder, and the hub could not be reached ({error})"
        raise _no_dataset(dataset, reason, ConnectionError) from error
    except Exception as error:  # each file format fails in a way of its own
        cause = error.__cause__ or error
        raise ValueError(f"dataset {dataset!r} cannot be read: {cause}") from error


def table_source(
    table: Any, column: str, split: str, *, dataset: str, cache_dir: str | None = None
) -> TableSource:
    """Give access to the images of one split.

    A row that holds a path instead of bytes may lead into the dataset's folder and the hub's
    caches only.
    """
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub.constants import HF_HUB_CACHE

    caches = [str(HF_DATASETS_CACHE), str(HF_HUB_CACHE)]
    roots = [path for path in (dataset, cache_dir, *caches) if path and Path(path).is_dir()]
    return TableSource(table, column, split, roots)


def pick_columns(
    features: Mapping[str, Any], image_column: str | None, label_column: str | None
) -> tuple[str, str]:
    """Choose the image and the label column by their types, unless they are named.

    Raises:
        ValueError: there is no such column, or several could be meant; the message lists all.
    """
    from datasets import ClassLabel, Image

    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    labels = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    preferred = [name for name in _LABEL_COLUMNS if name in labels][:1]
    image = _pick_column("image_column", image_column, images, features)
    if image not in images and features[image].dtype not in _READABLE:
        raise invalid("image_column", "a column of images", image, hint=_columns(features))
    return image, _pick_column("label_column", label_column, preferred or labels, features)


def read_labels(
    table: Any, column: str, split: str, class_names: tuple[str, ...] | None = None
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Read one label column, no other: int64 labels and the class names.

    A column of class labels names its classes itself. For plain integers the classes are 0 to
    the largest, for strings the sorted ones, in one Unicode normal form; ``class_names`` gives
    those of the training split.

    Raises:
        ValueError: a row without label, a label out of range, a column of another type, or class
            labels with other names or in another order than ``class_names``.
    """
    values = table.select_columns([column]).with_format("arrow")[:].column(0)
    if len(values) == 0:
        raise ValueError(f"split {split} is empty")
    if values.null_count:
        raise ValueError(f"{values.null_count} rows of split {split} have no {column!r}")
    feature = table.features[column]
    if feature.dtype in ("string", "large_string"):
        return _read_strings(values, split, class_names)
    if "int" not in str(feature.dtype):
        hint = _columns(table.features)
        raise invalid("label_column", "a column of class labels", column, hint=hint)
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


def _pick_column(
    argument: str, asked: str | None, found: list[str], features: Mapping[str, Any]
) -> str:
    if asked is not None:
        if asked not in features:
            raise invalid(argument, "a column that is there", asked, hint=_columns(features))
        return asked
    if len(found) != 1:
        kind = "several columns" if found else "no column"
        raise ValueError(f"{kind} could be the `{argument}`; give it. {_columns(features)}")
    return found[0]


def _columns(features: Mapping[str, Any]) -> str:
    kinds = (f"{name} ({type(feature).__name__})" for name, feature in features.items())
    return f"The columns are {', '.join(kinds)}."


def _bad_label(row: int, split: str, label: int, limit: int) -> str:
    what = f"row {row} of split {split} has label {label}, which must be in 0..{limit - 1}"
    return f"{what}; -1 marks rows without label: choose a split that has them"


def _no_dataset(dataset: str, reason: str, error: type[Exception] = ValueError) -> Exception:
    expected = "'digits', a folder that is there or a hub id"
    hint = f"{reason}. A local folder in hub layout works without a network."
    return invalid("dataset", expected, dataset, hint=hint, error=error)
