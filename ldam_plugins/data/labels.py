"""Labels of whatever a Trainer trains on, read without decoding texts or images where possible."""

from __future__ import annotations

import contextlib
import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    SequentialSampler,
    Subset,
)
from tqdm.auto import tqdm

from ldam_plugins._validation import invalid, quoted
from ldam_plugins.counts import ClassCounts, label_array, label_fault

LABEL_COLUMNS = ("labels", "label", "label_ids")
"""Names under which the collators of transformers find labels and hand them on as ``labels``."""
IGNORED = -100
"""Label of rows that count nowhere, as in ``torch.nn.functional.cross_entropy``."""
GIVE_COUNTS = "Write DRWCallback(class_counts=[...]), one count per class."

logger = logging.getLogger(__name__)
_SECONDS_BEFORE_A_BAR = 1.0
_SECONDS_BETWEEN_PARTS = 20.0
_BATCHES_COMPARED = 4
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
"""What the method that gives an example of a data set reads its label from."""


class TrainingLabels:
    """Labels of the data set that a Trainer trains on, read at most once.

    What is known without loading examples (:func:`known_labels`) is taken as it is. Otherwise the
    first process loads every example once, as the data loader would but without its collator, and
    sends the labels to the others. Every process ends with the same labels, or the same error.

    Args:
        loader: The Trainer's data loader. Its collator is not called, but for examples that do not
            name their label, such as ``(image, label)``: these are compared in a few batches.
        args: ``TrainingArguments``: size of a batch, processes, and whether progress is shown.
        ignored: Label of the examples that count nowhere, also given to those that are None.
        hint: What to write where the labels cannot be read.
    """

    def __init__(
        self,
        loader: Any,
        args: Any,
        *,
        ignored: int = IGNORED,
        hint: str = GIVE_COUNTS,
    ) -> None:
        self.loader = loader
        self.dataset: Any = getattr(loader, "dataset", None)
        self.args = args
        self.ignored = ignored
        self.hint = hint
        self._labels: np.ndarray | None = None
        self._unnamed = False

    def read(self) -> np.ndarray:
        """Label of every example, (N,) int64, in the order of the data set.

        Call it on every process. Random states are left as they were.

        Raises:
            TypeError: labels that are not one integer an example.
            ValueError: a data set without length, an example without a label or one that cannot be
                loaded, or a collator that makes other labels.
        """
        if self._labels is None:
            self._labels = np.concatenate([np.zeros(0, dtype=np.int64), *self._parts()])
        return self._labels

    def count(self, num_classes: int | None) -> ClassCounts:
        """Count the labels, see :func:`count_labels`. Call it on every process."""
        labels = self.read()
        column = _column_of(self.dataset)
        names = class_names(self.dataset)
        return count_labels(labels, num_classes, names, ignored=self.ignored, column=column)

    def difference(self, counts: ClassCounts) -> str | None:
        """How ``counts`` differ from the labels, in words; None if not, or if it is not known.

        Loads no example: labels neither read nor known are not looked at.
        """
        labels = self._labels
        if labels is None:
            try:
                labels = known_labels(self.dataset)
            except (TypeError, ValueError):  # no class indices, which the counts stand in for
                return None
        if labels is None:
            return None
        labels = labels[labels != self.ignored]
        if not len(labels) or not 0 <= labels.min() <= labels.max() < len(counts):
            return None
        found = np.bincount(labels, minlength=len(counts))
        apart = np.flatnonzero(found != counts.counts)
        if not len(apart):
            return None
        pairs = (f"{c}: {counts.counts[c]} given, {found[c]} found" for c in apart.tolist()[:3])
        return (
            f"class_counts {_shown(counts.counts)} are not those of the labels of train_dataset, "
            f"{_shown(found)} ({'; '.join(pairs)}{'; ...' if len(apart) > 3 else ''}). Margins and "
            "weights follow class_counts; without them the labels are counted."
        )

    def _parts(self) -> Iterator[np.ndarray]:
        """The labels in parts: the first process makes them, the others receive them."""
        parts = self._own_parts()
        if self.args.world_size == 1:
            yield from parts
            return
        while True:
            error: BaseException | None = None
            said: list[Any] = [None]
            if self.args.process_index == 0:
                try:
                    said = [next(parts, None)]
                except BaseException as caught:
                    error = caught
                    said = [RuntimeError(f"the first process stopped reading labels: {error!r}")]
                    if type(error) in (TypeError, ValueError):
                        said = [type(error)(str(error))]  # without what may not be picklable
            part = broadcast_object_list(said)[0]
            if error is not None or isinstance(part, Exception):
                raise error or part
            if part is None:
                return
            yield part

    def _own_parts(self) -> Iterator[np.ndarray]:
        if isinstance(self.dataset, IterableDataset) or not isinstance(self.dataset, Sized):
            expected = "a dataset of known length, whose labels can be counted"
            shown = type(self.loader if self.dataset is None else self.dataset).__name__
            raise invalid("train_dataset", expected, shown, hint=self.hint)
        with _random_states_kept():
            labels = known_labels(self.dataset, self.hint)
            parts: Iterable[np.ndarray] = self._loaded() if labels is None else [labels]
            held = []
            for part in parts:
                held.append(part)
                yield part
            if self._unnamed:
                self._check_collator(np.concatenate(held))

    def _loaded(self) -> Iterator[np.ndarray]:
        """Labels read off the examples; a part every few seconds, so that no process times out."""
        total = len(self.dataset)
        logger.info(f"Reading the labels of {total} examples. {self.hint}")
        batches = BatchSampler(SequentialSampler(self.dataset), self.args.train_batch_size, False)
        first, held, began = 0, [], time.monotonic()
        delay, quiet = _SECONDS_BEFORE_A_BAR, bool(self.args.disable_tqdm)
        with tqdm(total=total, desc="Reading labels", delay=delay, disable=quiet) as bar:
            for rows, examples in self._batches(batches, partial(_labels_of, self.ignored)):
                found, unnamed = examples
                self._unnamed |= unnamed
                unknown = next((label for label in found if isinstance(label, _Unknown)), None)
                if unknown is not None or len(found) != len(rows):
                    expected = "a dataset whose examples hold one label"
                    shown = unknown.example if unknown else f"{len(found)} of {len(rows)} examples"
                    hint = f"Name it one of {quoted(LABEL_COLUMNS)}. Or: {self.hint}"
                    raise invalid("train_dataset", expected, shown, hint=hint)
                held += found
                bar.update(len(found))
                if time.monotonic() - began > _SECONDS_BETWEEN_PARTS:
                    yield class_indices(held, self.hint, first_row=first)
                    first, held, began = first + len(held), [], time.monotonic()
        yield class_indices(held, self.hint, first_row=first)

    def _batches(
        self, batches: Iterable[list[int]], collate: Callable[[list[Any]], Any]
    ) -> Iterator[tuple[list[int], Any]]:
        """Rows and ``collate`` of their examples, loaded by workers where the Trainer has them."""
        workers = getattr(self.loader, "num_workers", 0)
        names = ("worker_init_fn", "multiprocessing_context", "prefetch_factor", "timeout")
        options = {name: getattr(self.loader, name) for name in names if workers}
        found: Any = iter(
            DataLoader(
                self.dataset,
                batch_sampler=batches,
                collate_fn=collate,
                num_workers=workers,
                generator=torch.Generator(),
                **options,
            )
        )
        for rows in batches:
            try:
                given = next(found)
            except Exception as error:
                row, cause = self._unreadable(rows, error, workers)
                expected = "a dataset whose examples can all be loaded"
                shown = f"{type(cause).__name__} in row {row}: {cause}"
                raise invalid("train_dataset", expected, shown, hint=self.hint) from error
            yield rows, given

    def _unreadable(
        self, rows: list[int], error: Exception, workers: int
    ) -> tuple[int | str, Exception]:
        """Which of ``rows`` could not be loaded, and why; workers do not say which."""
        for row in [] if workers else rows:
            try:
                self.dataset[row]
            except Exception as cause:
                return row, cause
        return f"{rows[0]}..{rows[-1]}", error

    def _check_collator(self, labels: np.ndarray) -> None:
        """Refuse a collator that takes something else for the label of an example.

        It gets whole batches, as in training, with the first example of each class, the rarest
        first. What it says in an error, or in class masses, is left to the training.
        """
        collate = self.loader.collate_fn
        batches = _rows_of_every_class(labels, self.args.train_batch_size)
        for rows, found in self._batches(batches, partial(_collated_labels, collate)):
            if found is None:
                continue
            made, kept = found
            own = labels[rows] if len(made) == len(rows) else labels[rows][kept]
            if len(own) == len(made) and not np.array_equal(own, made):
                expected = (
                    f"one that takes the integers of the examples, {own.tolist()}, for labels"
                )
                raise invalid("data_collator", expected, made, hint=self.hint)


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
        column: Name of the column that holds the labels, for the way out of an error.

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
    """``values``, one of them an example, as (N,) int64, or an error that says how to encode them.

    Labels of shape (N, 1) are class indices, as the classifiers of transformers take them.

    Args:
        values: Integers, or what else labels may be.
        hint: What to write where they cannot be counted.
        column: Name of their column in a ``datasets.Dataset``, for the way out of an error.
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
    if fault == "masses":
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
    rows = [row if isinstance(row, list) else [row] for row in map(_plain, values)]
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
    """Words for labels beyond those of the model: other numbering, or a model too small."""
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


def _shown(counts: np.ndarray) -> str:
    listed = ", ".join(map(str, counts[:20].tolist()))
    return f"[{listed}{', ...' if len(counts) > 20 else ''}]"


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


def _column_of(dataset: Any) -> str | None:
    """Column of the labels, if the data set is a table without transform."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    is_table = _method_of(dataset) == "datasets.arrow_dataset.Dataset.__getitem__"
    plain = is_table and dataset.format["type"] in _FORMATS
    return next(iter(_label_columns(dataset)), None) if plain else None


def _method_of(dataset: Any) -> str:
    """Where the method is defined that gives the examples of a data set: module and name.

    Data loaders prefer ``__getitems__``, which counts as another unless it belongs to the same
    class.
    """
    one = getattr(type(dataset), "__getitem__", None)
    name = f"{getattr(one, '__module__', '')}.{getattr(one, '__qualname__', '')}"
    many = getattr(dataset, "__getitems__", None)
    if many is not None:
        other = f"{getattr(many, '__module__', '')}.{getattr(many, '__qualname__', '')}"
        if other.rpartition(".")[0] != name.rpartition(".")[0]:
            return other
    return name


@dataclass(frozen=True)
class _Unknown:
    """An example whose label is not certain, in words."""

    example: str


def _labels_of(ignored: int, examples: list[Any]) -> tuple[list[Any], bool]:
    """Label of each example, and whether one is not named so.

    None, of which no collator can make a row, gets ``ignored``.
    """
    labels = [ignored if example is None else _label_of(example) for example in examples]
    return labels, any(_is_unnamed(example) for example in examples)


def _label_of(example: Any) -> Any:
    if isinstance(example, Mapping):
        found = {name: example[name] for name in LABEL_COLUMNS if name in example}
    elif _is_unnamed(example):
        whole = [part for part in example if _is_index(part)]
        if len(whole) != 1:
            kinds = ", ".join(type(part).__name__ for part in example)
            return _Unknown(f"{type(example).__name__} of {kinds}")
        return _plain(whole[0])
    else:
        found = {name: getattr(example, name) for name in LABEL_COLUMNS if hasattr(example, name)}
    labels = [_plain(label) for label in found.values() if label is not None]
    if not found or any(label != labels[0] for label in labels[1:]):
        shown = list(example) if isinstance(example, Mapping) else type(example).__name__
        return _Unknown(f"different {quoted(found)}" if found else str(shown))
    return labels[0] if labels else None


def _is_unnamed(example: Any) -> bool:
    return isinstance(example, tuple | list) and not hasattr(example, "_fields")


def _is_index(part: Any) -> bool:
    if isinstance(part, Tensor):
        return part.ndim == 0 and not part.is_floating_point()
    if isinstance(part, np.ndarray):
        return part.ndim == 0 and part.dtype.kind in "iu"
    return isinstance(part, int | np.integer)


def _plain(label: Any) -> Any:
    return label.tolist() if isinstance(label, Tensor | np.ndarray | np.generic) else label


def _collated_labels(
    collate: Callable[[list[Any]], Any], examples: list[Any]
) -> tuple[list[int], list[bool]] | None:
    """Labels a collator makes of ``examples``, and which of these are no None."""
    kept = [example is not None for example in examples]
    try:
        batch = collate(examples)
    except Exception:  # the training meets it as well, and stops with it
        return None
    made = batch.get("labels") if isinstance(batch, Mapping) else getattr(batch, "labels", None)
    try:
        return class_indices(_plain(made)).tolist(), kept
    except (TypeError, ValueError):
        return None


def _rows_of_every_class(labels: np.ndarray, size: int) -> list[list[int]]:
    """A few batches of rows with one of each class, the rarest classes first."""
    _, first, counts = np.unique(labels, return_index=True, return_counts=True)
    chosen = first[np.argsort(counts, kind="stable")][: size * _BATCHES_COMPARED]
    expected = min(-(-len(chosen) // size) * size, len(labels))  # whole batches
    more = np.setdiff1d(np.arange(min(len(labels), expected + len(chosen))), chosen)
    rows = [*chosen.tolist(), *more.tolist()][:expected]
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    """Undo what random augmentations draw, so that counting changes no run."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
