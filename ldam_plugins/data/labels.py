"""Labels and class counts of any data set whose labels are known without loading its examples.

:mod:`ldam_plugins.data.training_labels` reads those of all others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Subset

from ldam_plugins._validation import invalid, quoted
from ldam_plugins.counts import ClassCounts, label_array, label_fault

LABEL_COLUMNS = ("labels", "label", "label_ids")
"""Names under which the collators of transformers find labels and hand them on as ``labels``."""
IGNORED = -100
"""Label of rows that count nowhere, as in ``torch.nn.functional.cross_entropy``."""
GIVE_COUNTS = "Write DRWCallback(class_counts=[...]), one count per class."
"""Hint of the errors where labels cannot be read, unless another one is given."""
_FORMATS = {None, "python", "numpy", "torch", "tensorflow", "jax", "arrow", "pandas", "polars"}
_ATTRIBUTE_READ = {
    "torchvision.datasets.cifar.CIFAR10.__getitem__": "targets",
    "torchvision.datasets.folder.DatasetFolder.__getitem__": "samples",
    "torchvision.datasets.mnist.MNIST.__getitem__": "targets",
    "torchvision.datasets.stl10.STL10.__getitem__": "labels",
    "torchvision.datasets.svhn.SVHN.__getitem__": "labels",
    "torchvision.datasets.usps.USPS.__getitem__": "targets",
    "timm.data.dataset.ImageDataset.__getitem__": "reader",
    "timm.data.readers.reader_image_folder.ReaderImageFolder.__getitem__": "samples",
    "timm.data.readers.reader_image_in_tar.ReaderImageInTar.__getitem__": "samples",
}
"""By the method that gives an example: the attribute that it reads the label from."""


def known_labels(dataset: Any, hint: str = GIVE_COUNTS) -> np.ndarray | None:
    """Labels that the data set gives for certain, (N,) int64, without loading an example.

    These are columns of a ``datasets.Dataset`` without a transform, and what the data sets of
    torchvision and timm read their labels from, if their own ``__getitem__`` does it and they have
    no ``target_transform``; also in a ``Subset`` or ``ConcatDataset``. An attribute of any other
    data set (``targets``, ``labels``) says nothing of what its ``__getitem__`` makes of it.

    Returns:
        The labels; None where only the examples can tell.

    Raises:
        TypeError: a label column that holds no class indices.
        ValueError: no label column, two different ones, or a row without a label.
    """
    method = _method_of(dataset)
    if method == "torch.utils.data.dataset.Subset.__getitem__":
        labels = known_labels(dataset.dataset, hint)
        return None if labels is None else labels[np.asarray(dataset.indices, dtype=np.int64)]
    if method == "torch.utils.data.dataset.ConcatDataset.__getitem__":
        parts = [known_labels(part, hint) for part in dataset.datasets]
        known = [part for part in parts if part is not None]
        return np.concatenate(known) if len(known) == len(parts) else None
    if method == "datasets.arrow_dataset.Dataset.__getitem__":
        return _read_columns(dataset, hint) if dataset.format["type"] in _FORMATS else None
    if getattr(dataset, "target_transform", None) is not None:
        return None
    name = _ATTRIBUTE_READ.get(method)
    values = getattr(dataset, name, None) if name else None
    if name == "reader":
        return known_labels(values)
    if name == "samples" and values is not None:
        values = [sample[1] for sample in values]
    if values is None or len(values) != len(dataset):
        return None
    try:
        return label_array(values)
    except (TypeError, ValueError):
        return None


def count_labels(
    labels: np.ndarray,
    num_classes: int | None,
    names: list[str] | None = None,
    *,
    ignored: int = IGNORED,
    column: str | None = None,
) -> ClassCounts:
    """Count the labels of a training set.

    Args:
        labels: (N,) integers.
        num_classes: C, the classes the model tells apart; None: the largest label + 1.
        names: Of the classes; left out where they are not C.
        ignored: Label of the examples that count nowhere.
        column: Name of the column that holds the labels, for the hint of an error.

    Raises:
        ValueError: no label, one outside 0..C-1, or a class without one.
    """
    kept = labels[labels != ignored]
    if not len(kept):
        expected = "a dataset with labels"
        shown = f"{len(labels)} examples labelled {ignored}" if len(labels) else "no example"
        raise invalid("train_dataset", expected, shown)
    if kept.min() < 0:
        row = int(np.flatnonzero((labels < 0) & (labels != ignored))[0])
        hint = f"Leave examples without a label out, or label them {ignored}."
        shown = f"{labels[row]} in row {row}"
        raise invalid("labels", "class indices, from 0", shown, hint=hint)
    found = np.unique(kept)
    if num_classes is not None and found[-1] >= num_classes:
        raise _too_few_classes(found, num_classes, column)
    if num_classes is not None and found[-1] == len(found) - 1 < num_classes - 1:
        missing = quoted(range(len(found), num_classes))
        hint = f"Create the model with num_labels={len(found)}, or add examples."
        raise ValueError(f"no training sample in class {missing}. {hint}")
    if names is not None and len(names) != num_classes:
        names = None
    return ClassCounts.from_labels(kept, num_classes, names)


def class_names(dataset: Any) -> list[str] | None:
    """Names that the ``ClassLabel`` column of a ``datasets.Dataset`` gives the classes."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    features: Any = getattr(dataset, "features", None)
    for name in LABEL_COLUMNS if isinstance(features, Mapping) else ():
        names = getattr(features.get(name), "names", None)
        if names is not None:
            return list(names)
    return None


def class_indices(
    values: Any, hint: str = GIVE_COUNTS, *, column: str | None = None, first_row: int = 0
) -> np.ndarray:
    """Labels as (N,) int64 class indices, or an error that says how to encode them.

    Labels of shape (N, 1) are class indices, as the classifiers of transformers take them.

    Args:
        values: Label of each example.
        hint: What to write where they cannot be counted.
        column: Name of their column in a ``datasets.Dataset``, for the hint of an error.
        first_row: Row of the first of them.

    Raises:
        TypeError: labels that are not one integer an example.
        ValueError: an example without a label.
    """
    try:
        return label_array(values)
    except (TypeError, ValueError):
        fault, row, value = label_fault(values)
    if fault == "column":
        return class_indices([v[0] for v in values], hint, column=column, first_row=first_row)
    if fault == "missing":
        shown = f"{value} in row {first_row + (row or 0)}"
        advice = _encoded(column, value, fault)
        raise invalid("labels", "given for every example", shown, hint=advice)
    if fault == "soft":
        advice = f"Soft labels have no counts to read. {hint}"
    elif fault == "several":
        advice = _several(values)
    else:
        advice = _encoded(column, value, fault)
    raise invalid(
        "labels", "one integer an example, of 0..C-1", value, hint=advice, error=TypeError
    )


def _encoded(column: str | None, value: Any, fault: str) -> str:
    """How to make class indices of labels that are something else."""
    row = f'row["{column}"]'
    if fault == "missing" and column:
        test = f"{row} is not None" if value is None else f"{row} == {row}"
        return f"Leave those without one out: `train_dataset.filter(lambda row: {test})`."
    if fault == "missing":
        return (
            "Leave those without one out (torch.utils.data.Subset), or label them "
            f"{IGNORED}, which counts nowhere."
        )
    if isinstance(value, str):
        names = f'`train_dataset.class_encode_column("{column}")`'
        return f"Write {names}." if column else "Let `__getitem__` return the index of the class."
    if fault in ("bool", "whole"):
        cast = f'`train_dataset.cast_column("{column}", Value("int64"))`'
        return f"Write {cast}." if column else "Let `__getitem__` return `int(label)`."
    return "Margins and weights are those of classes: other numbers have no LDAM."


def _several(values: Any) -> str:
    """What to do about rows of several integers: multi-hot ones, or a label a token."""
    rows = [row if isinstance(row, list) else [row] for row in map(plain_value, values)]
    hot = len({len(row) for row in rows}) == 1 and all(v in (0, 1) for row in rows for v in row)
    if hot and all(sum(row) == 1 for row in rows):
        return "Of one-hot rows give the index of the 1."
    if hot:
        return (
            "Several labels an example (multi-hot, or one a token) have no LDAM; give the index of "
            "one class."
        )
    return "DRWCallback is for one class an example; one a token has no LDAM here."


def _too_few_classes(found: np.ndarray, num_classes: int, column: str | None) -> Exception:
    """The error of labels beyond C - 1: they are numbered otherwise, or the model is too small."""
    first, last = int(found[0]), int(found[-1])
    shown = f"{first}..{last}" if last - first < len(found) else quoted(found.tolist())
    row = f'row["{column}"]'

    def mapped(index: str) -> str:
        new = f'`train_dataset.map(lambda row: {{"{column}": {index.format(row)}}})`'
        return new if column else f"let `__getitem__` return `{index.format('label')}`"

    if first > 0 and last - first < num_classes:
        hint = f"Labels count from 0: subtract {first}, {mapped(f'{{}} - {first}')}."
    elif len(found) <= num_classes:
        hint = f"Number the classes without gaps: {mapped(f'{found.tolist()}.index({{}})')}."
    elif len(found) == last + 1:
        expected = f"above {last}, a label of the training set"
        hint = f"Create the model with num_labels={last + 1}."
        return invalid("num_labels", expected, num_classes, hint=hint)
    else:
        hint = (
            f"Create the model with num_labels={len(found)} and number the classes without gaps: "
            f"`classes = sorted(set(labels))`, then {mapped('classes.index({})')}."
        )
    return invalid("labels", f"class indices in 0..{num_classes - 1}", shown, hint=hint)


def _read_columns(dataset: Any, hint: str) -> np.ndarray:
    """Labels of a ``datasets.Dataset``, from the one column that holds them."""
    columns = {name: _raw_column(dataset, name) for name in _label_columns(dataset)}
    if not columns:
        expected = f"a dataset with one of the columns {quoted(LABEL_COLUMNS)}"
        advice = f'Write `train_dataset.rename_column("...", "label")`. Or: {hint}'
        raise invalid("train_dataset", expected, dataset.column_names, hint=advice)
    (first, labels), *others = columns.items()
    for name, column in others:
        if not column.equals(labels):
            advice = f'Write `train_dataset.remove_columns("{name}")`, or remove the other.'
            raise invalid(name, f"the same labels as {first!r}", "others", hint=advice)
    plain = not labels.null_count and str(labels.type).lstrip("u").startswith("int")
    values = labels.to_numpy() if plain else labels.to_pylist()
    return class_indices(values, hint, column=first)


def _raw_column(dataset: Any, name: str) -> Any:
    return dataset.select_columns([name]).with_format("arrow")[:][name]


def _label_columns(dataset: Any) -> list[str]:
    shown = (getattr(dataset, "format", None) or {}).get("columns") or ()
    return [name for name in LABEL_COLUMNS if name in shown]


def label_column(dataset: Any) -> str | None:
    """Column of the labels, if the data set is a table without transform."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    is_table = _method_of(dataset) == "datasets.arrow_dataset.Dataset.__getitem__"
    plain = is_table and dataset.format["type"] in _FORMATS
    return next(iter(_label_columns(dataset)), None) if plain else None


def _method_of(dataset: Any) -> str:
    """The method that gives the examples of a data set: module and qualified name.

    Data loaders prefer ``__getitems__``, so that it is the method unless the class that defines it
    also defines ``__getitem__``.
    """
    one = getattr(type(dataset), "__getitem__", None)
    name = f"{getattr(one, '__module__', '')}.{getattr(one, '__qualname__', '')}"
    many = getattr(dataset, "__getitems__", None)
    if many is not None:
        other = f"{getattr(many, '__module__', '')}.{getattr(many, '__qualname__', '')}"
        if other.rpartition(".")[0] != name.rpartition(".")[0]:
            return other
    return name


def plain_value(label: Any) -> Any:
    """A label as a plain Python value: number, text or list."""
    return label.tolist() if isinstance(label, Tensor | np.ndarray | np.generic) else label
