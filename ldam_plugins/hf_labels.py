"""Labels of whatever a Trainer trains on, read without decoding texts or images where possible."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, IterableDataset, Subset

from ldam_plugins._checks import must_be, quoted
from ldam_plugins.counts import ClassCounts, label_array

LABEL_COLUMNS = ("labels", "label", "label_ids")
"""Names under which the collators of transformers find labels and hand them on as ``labels``."""
IGNORED = -100
"""Label of rows that count nowhere, as in ``torch.nn.functional.cross_entropy``."""
_GIVE_COUNTS = "Write DRWCallback(class_counts=[...]), one count per class."


def count_labels(
    dataset: Any, num_classes: int | None, collate: Callable[[list], Any]
) -> ClassCounts:
    """Count the labels of a training set; rows labelled -100 count nowhere.

    Args:
        dataset: Map-style: a ``datasets.Dataset``, a torch ``Dataset``, or a ``Subset`` or
            ``ConcatDataset`` of such.
        num_classes: C, the classes the model tells apart; None: the largest label + 1.
        collate: Collator of the Trainer; says where examples of unknown form keep their label.

    Raises:
        TypeError: labels that are not one integer an example (strings, floats, multi-hot).
        ValueError: no length, no label column, a label outside 0..C-1, or a class without one.
    """
    labels = read_labels(dataset, collate)
    labels = labels[labels != IGNORED]
    largest = int(labels.max(initial=0))
    if num_classes is not None and largest >= num_classes:
        way_out = f"Create the model with num_labels={largest + 1}."
        wanted = f"above {largest}, a label of the training set"
        raise ValueError(must_be("num_labels", wanted, num_classes, way_out))
    return ClassCounts.from_labels(labels, num_classes, _class_names(dataset, num_classes))


def read_labels(dataset: Any, collate: Callable[[list], Any]) -> np.ndarray:
    """Label of every example, (N,) int64, in the order of the dataset.

    Columns, and the ``targets`` of torchvision's datasets, are read alone. Where a transform may
    make other labels, or nothing of the kind is there, every example is loaded instead.

    Raises:
        TypeError: labels that are not one integer an example.
        ValueError: a dataset without length, or without labels.
    """
    if isinstance(dataset, Subset):
        return read_labels(dataset.dataset, collate)[np.asarray(dataset.indices, dtype=np.int64)]
    if isinstance(dataset, ConcatDataset):
        return np.concatenate([read_labels(part, collate) for part in dataset.datasets])
    if isinstance(dataset, IterableDataset) or not isinstance(dataset, Sized):
        wanted = "a dataset of known length, whose labels can be counted"
        raise ValueError(must_be("train_dataset", wanted, type(dataset).__name__, _GIVE_COUNTS))
    form = getattr(dataset, "format", None)  # a datasets.Dataset says how it gives its rows
    if isinstance(form, dict) and form.get("type") != "custom":
        return _read_columns(dataset)
    for values in _likely(dataset):
        if _are_those_of(dataset, values, collate):
            return _class_indices(values)
    return _class_indices(_read_examples(dataset, collate, range(len(dataset))))


def _read_columns(dataset: Any) -> np.ndarray:
    """Labels of a ``datasets.Dataset``, from the one column that holds them."""
    columns = {n: _raw_column(dataset, n) for n in LABEL_COLUMNS if n in dataset.column_names}
    if not columns:
        wanted = f"a dataset with one of the columns {quoted(LABEL_COLUMNS)}"
        way_out = 'Write `train_dataset.rename_column("...", "labels")`.'
        raise ValueError(must_be("train_dataset", wanted, dataset.column_names, way_out))
    (first, labels), *others = columns.items()
    for name, column in others:
        if not np.array_equal(column, labels):
            way_out = f'Write `train_dataset.remove_columns("{name}")`, or remove the other.'
            raise ValueError(must_be(name, f"the same labels as {first!r}", "others", way_out))
    return _class_indices(labels)


def _raw_column(dataset: Any, name: str) -> np.ndarray:
    return dataset.select_columns([name]).with_format("numpy")[:][name]


def _likely(dataset: Any) -> Iterator[Any]:
    """What may be the labels: columns behind a transform, torchvision's ``targets``."""
    for name in LABEL_COLUMNS:
        if name in getattr(dataset, "column_names", ()):
            yield _raw_column(dataset, name)
    for name in ("targets", "labels"):
        values = getattr(dataset, name, None)
        if isinstance(values, Sized) and len(values) == len(dataset):
            yield values


def _are_those_of(dataset: Any, values: Any, collate: Callable[[list], Any]) -> bool:
    """Whether the first, middle and last example bear ``values`` out."""
    rows = sorted({0, len(dataset) // 2, len(dataset) - 1})
    shown = _read_examples(dataset, collate, rows)
    return np.array_equal(np.asarray([values[row] for row in rows]), np.asarray(shown))


def _read_examples(dataset: Any, collate: Callable[[list], Any], rows: Iterable[int]) -> list[Any]:
    """Labels of the examples ``rows``, by loading them; leaves random states as they were."""
    with _random_states_kept():
        return [_label_of(dataset[row], collate) for row in rows]


def _label_of(example: Any, collate: Callable[[list], Any]) -> Any:
    names = [n for n in LABEL_COLUMNS if isinstance(example, Mapping) and n in example]
    if len(names) == 1:
        label = example[names[0]]
    else:
        batch = collate([example])
        if "labels" not in batch:
            wanted = f"a dataset whose examples have one of {quoted(LABEL_COLUMNS)}"
            found = list(example) if isinstance(example, Mapping) else type(example).__name__
            raise ValueError(must_be("train_dataset", wanted, found, "Name the labels so."))
        label = batch["labels"][0]
    return label.tolist() if isinstance(label, torch.Tensor | np.ndarray) else label


def _class_indices(values: Any) -> np.ndarray:
    """``values`` as (N,) int64, or an error that says how to encode them."""
    array = np.asarray(values) if not isinstance(values, torch.Tensor) else values.numpy()
    if array.ndim != 1:
        way_out = "Several labels an example (multi-hot) have no LDAM; give the index of one class."
        raise TypeError(must_be("labels", "one integer an example", array[0].tolist(), way_out))
    if array.dtype.kind not in "iu" and len(array):
        way_out = (
            'Write `train_dataset.class_encode_column("label")` for names, '
            '`train_dataset.cast_column("label", Value("int64"))` for numbers.'
        )
        raise TypeError(must_be("labels", "class indices 0..C-1", array.tolist()[0], way_out))
    return label_array(array)


def _class_names(dataset: Any, num_classes: int | None) -> list[str] | None:
    """Names a ``ClassLabel`` column gives the classes."""
    features = getattr(dataset, "features", None) or {}
    for name in LABEL_COLUMNS:
        names = getattr(features.get(name), "names", None) if hasattr(features, "get") else None
        if names is not None and len(names) == num_classes:
            return list(names)
    return None


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    """Undo what random augmentations draw, so that counting changes no run."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        yield
    random.setstate(python)
    np.random.set_state(numpy)
