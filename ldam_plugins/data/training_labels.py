"""Labels of the data set that a training loop loads, read from its examples where need be."""

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
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler
from tqdm.auto import tqdm

from ldam_plugins._validation import invalid, quoted
from ldam_plugins.counts import ClassCounts
from ldam_plugins.data.labels import (
    GIVE_COUNTS,
    IGNORED,
    LABEL_COLUMNS,
    class_indices,
    class_names,
    count_labels,
    known_labels,
    label_column,
    plain_value,
)
from ldam_plugins.data.streams import LabelledStream

logger = logging.getLogger(__name__)
_SECONDS_BEFORE_A_BAR = 1.0
_SECONDS_BETWEEN_PARTS = 20.0
_BATCHES_COMPARED = 4


class TrainingLabels:
    """Labels of the data set of a training loop, read at most once.

    Labels that are known without loading examples (:func:`.known_labels`) are taken as they are.
    Otherwise the first process loads every example once, with the loader's workers but without
    its collator, and sends the labels to the other processes. Every process ends with the same
    labels, or the same error.

    Args:
        loader: The training loop's data loader. Its collator is called only where examples do not
            name their label, such as ``(image, label)``: a few batches show whether it takes the
            same integers for labels.
        batch_size: Examples that are loaded at once, those of a batch of the training.
        num_processes: Processes of the training.
        process_index: Which of them this is, from 0.
        progress: Whether loading shows a progress bar.
        ignored: Label of the examples that count nowhere, also given to those that are None.
        hint: What to write where the labels cannot be read.
    """

    def __init__(
        self,
        loader: Any,
        batch_size: int,
        *,
        num_processes: int = 1,
        process_index: int = 0,
        progress: bool = True,
        ignored: int = IGNORED,
        hint: str = GIVE_COUNTS,
    ) -> None:
        self.loader = loader
        self.dataset: Any = getattr(loader, "dataset", None)
        self.batch_size = batch_size
        self.num_processes = num_processes
        self.process_index = process_index
        self.progress = progress
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
        """Count the labels, see :func:`.count_labels`. Call it on every process.

        A stream knows its own.
        """
        if isinstance(self.dataset, LabelledStream):
            return self.dataset.class_counts
        labels = self.read()
        column = label_column(self.dataset)
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
        if self.num_processes == 1:
            yield from parts
            return
        while True:
            error: BaseException | None = None
            said: list[Any] = [None]
            if self.process_index == 0:
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
        batches = BatchSampler(SequentialSampler(self.dataset), self.batch_size, False)
        first, held, began = 0, [], time.monotonic()
        quiet = not self.progress
        with tqdm(
            total=total, desc="Reading labels", delay=_SECONDS_BEFORE_A_BAR, disable=quiet
        ) as bar:
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
        """Rows and ``collate`` of their examples, loaded by workers where the loader has them."""
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
        first. A collator that fails is left to the training, which fails with it; one that makes
        soft targets is not compared.
        """
        collate = self.loader.collate_fn
        batches = _rows_of_every_class(labels, self.batch_size)
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
        return plain_value(whole[0])
    else:
        found = {name: getattr(example, name) for name in LABEL_COLUMNS if hasattr(example, name)}
    labels = [plain_value(label) for label in found.values() if label is not None]
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
        return class_indices(plain_value(made)).tolist(), kept
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


def _shown(counts: np.ndarray) -> str:
    listed = ", ".join(map(str, counts[:20].tolist()))
    return f"[{listed}{', ...' if len(counts) > 20 else ''}]"
