"""Data sets of the hub, or laid out like one, read as streams: columns, classes, rows of each.

A stream is read from its beginning, never whole and never from the middle. So the rows of each
class, on which margins, weights and the length of an epoch depend, are given or counted in one
pass. Of parquet files that pass reads the columns that it needs and no other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ldam_plugins._validation import invalid, quoted
from ldam_plugins.counts import ClassCounts
from ldam_plugins.data.notes import DataNotes
from ldam_plugins.data.readers import IMAGE_READERS, TEXT_READERS
from ldam_plugins.data.readers.base import (
    ImageRequest,
    NoSuchDataset,
    Request,
    TextRequest,
    default_test_split,
    note_absent,
    pick_splits,
)
from ldam_plugins.data.readers.class_names import as_whole, is_missing, is_whole, name_values
from ldam_plugins.data.readers.hub import (
    check_columns,
    check_label_column,
    check_text_column,
    check_whole,
    note_columns,
    open_tables,
    pick_image,
    pick_image_label,
    pick_text,
    pick_text_label,
)
from ldam_plugins.data.readers.paths import composed, is_hidden
from ldam_plugins.data.splits import classes_with_examples

GivenCounts = ClassCounts | Mapping[str, int] | Sequence[int]
_ROWS_AT_ONCE = 1000
_ROWS_LOOKED_AT = 100
"""Rows that tell the types of columns where the files do not."""
_IN_RUNS = 0.5
"""Share of neighbours of one class, beyond that of a random order, from which rows are sorted."""
_NO_DATA = (".md", ".txt", ".lock", "")
"""Endings of what lies beside the files of a data set."""
_COUNT_ANEW = "Without class_counts one pass counts the rows."


@dataclass(frozen=True)
class StreamedSplit:
    """One split of a data set, which is read from its beginning as often as asked.

    Attributes:
        table: A ``datasets.IterableDataset`` with the columns ``content`` and ``label``.
        name: Name of the split, for messages.
        content: Column of the images or texts.
        label: Column of the labels.
        class_names: The name of each class.
        counts: Rows of each class, int64 (C,).
        places: Class of each value of the label column that is known; None: the row is left out.
        is_text: Whether an empty content is a row without text.
        skip_empty: Whether rows without text or label are left out, in place of an error.
        roots: Folders that the path of an image may lead into.
    """

    table: Any
    name: str
    content: str
    label: str
    class_names: tuple[str, ...]
    counts: np.ndarray
    places: Mapping[Any, int | None] = field(repr=False)
    is_text: bool
    skip_empty: bool
    roots: tuple[str, ...]

    def class_of(self, row: Mapping[str, Any]) -> int | None:
        """The class of a row; None if the row is left out.

        Raises:
            ValueError: the row has no label or text, and none may be left out; or its label is not
                among the classes that were given.
        """
        value = row[self.label]
        absent = self.label if _is_unlabelled(value) else None
        if self.is_text and is_missing(row[self.content]):
            absent = self.content
        if absent is not None:
            if not self.skip_empty:
                raise _empty_rows(1, self.name, absent)
            return None
        try:
            return self.places[value]
        except KeyError:
            expected = f"counts of all classes of split {self.name}"
            none = f"none of {value!r}"
            raise invalid("class_counts", expected, none, hint=_COUNT_ANEW) from None


def read_streams(
    request: Request,
    *,
    class_counts: GivenCounts | None = None,
    shuffle_buffer: int = 0,
    progress: bool = False,
) -> tuple[StreamedSplit, StreamedSplit]:
    """The split to train on and the one to test on, as streams, with the rows of each class.

    Args:
        request: Of images or of texts.
        class_counts: Training rows of each class, if they are known: by name, or in class order.
        shuffle_buffer: Rows that are to be shuffled at a time; fewer than it takes are noted.
        progress: Whether counting shows a bar.

    Raises:
        ConnectionError: the hub cannot be reached.
        ValueError: no such data set, split or column; a column that holds no classes; rows without
            text or label; or counts of other classes.
    """
    source = _open(request)
    train_name, test_name = _split_names(request, source.splits)
    content, label, names = _columns(request, source, train_name, test_name)
    count = _RowCount(source, content, label, progress)
    if class_counts is None:
        found = count(train_name, shuffle_buffer)
        class_names, counts = _counted_classes(found, names, train_name, request.notes)
    else:
        class_names, counts = _given_classes(class_counts, names)
    kept = classes_with_examples(counts, class_names, request.notes)
    class_names = tuple(class_names[index] for index in kept)
    # Class labels are numbers in the files; all others are known by their names.
    values = class_names if names is None else kept.tolist()
    places = dict(zip(values, range(len(kept)), strict=True))
    train = StreamedSplit(
        source.table(train_name, content, label),
        train_name,
        content,
        label,
        class_names,
        counts[kept],
        _ByName(places) if names is None else places,
        is_text=isinstance(request, TextRequest),
        skip_empty=request.skip_empty,
        roots=source.roots,
    )
    tested, counts = _tested_rows(count(test_name), train, names, test_name, request.notes)
    table = source.table(test_name, content, label)
    return train, replace(train, table=table, name=test_name, places=tested, counts=counts)


def _open(request: Request) -> _Source:
    readers: Any = TEXT_READERS if isinstance(request, TextRequest) else IMAGE_READERS
    embedded = any(reader.is_name and reader.accepts(request) for reader in readers)
    if embedded or request.root.is_file():
        hint = "This one is small, or a file on the disk: leave --streaming out."
        raise invalid(
            "dataset", "one of the hub, or a folder laid out like one", request.dataset, hint=hint
        )
    try:
        return _Source(request)
    except NoSuchDataset as missing:
        expected = "a hub id, or a folder that `datasets.load_dataset` reads"
        shown, hint = request.dataset, f"{missing}."
        raise invalid("dataset", expected, shown, hint=hint, error=missing.error) from missing


def _split_names(request: Request, available: Sequence[str]) -> tuple[str, str]:
    """The names of the splits to train on and to test on."""
    for argument in ("train_split", "test_split"):
        if "[" in (asked := getattr(request, argument) or ""):
            hint = "Of a stream it is not known how many rows there are to cut."
            raise invalid(argument, "a whole split where data are streamed", asked, hint=hint)
    if request.test_split is None and default_test_split(available) is None:
        hint = "A stream is not divided: name a split, or store one to test on beside. Data on the "
        hint += "disk are divided without --streaming, and images there read one at a time."
        raise invalid("test_split", f"one of {quoted(available)}", None, hint=hint)
    train, test = pick_splits(request, available)
    assert test is not None  # it is where no share is asked for
    return train, test


def _columns(
    request: Request, source: _Source, train: str, test: str
) -> tuple[str, str, list[str] | None]:
    """The columns of images or texts and of labels, and the classes that the data set names.

    Raises:
        ValueError: there are none for certain, or the splits have different ones.
    """
    features = source.features(train)
    content, label = _pick_columns(request, features)
    argument = "text_column" if isinstance(request, TextRequest) else "image_column"
    note_columns(request, train, features, **{argument: content, "label_column": label})
    for split in (train, test):
        _check_columns(request, source.features(split), split, content, label)
    names, others = (getattr(source.features(s)[label], "names", None) for s in (train, test))
    if names != others:
        what = f"column {label!r} of split {test} must have the classes of training"
        raise ValueError(f"{what}, in the same order")
    return content, label, names


# Tables


class _Source:
    """The splits of a data set as streams, and the types of their columns."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.roots = (str(request.root),) if request.is_folder else ()
        exists = request.root.exists()
        self._name = str(request.root) if exists else request.dataset
        self._as_text = exists and _is_delimited(request.root)
        self._tables = self._open()
        self.splits = list(self._tables)
        self.features = cache(self._features)

    def _open(self, **options: Any) -> Mapping[str, Any]:
        if self._as_text:  # NA is a class where it stands, 01 is not 1
            options["keep_default_na"] = False
        return open_tables(self._name, self.request.cache_dir, streaming=True, **options)

    def _features(self, split: str) -> Mapping[str, Any]:
        from datasets import Dataset, Features, Value

        table = self._tables[split]
        with _reading(split, self.request):
            known = table.features or Dataset.from_list(list(table.take(_ROWS_LOOKED_AT))).features
        if not self._as_text:
            return known
        if len(known) == 1:
            hint = "CSV files that are streamed have commas between the columns, TSV files tabs."
            raise invalid("dataset", "a table of several columns", next(iter(known)), hint=hint)
        texts = Features(dict.fromkeys(known, Value("string")))
        self._tables = {**self._tables, split: self._open(features=texts)[split]}
        return texts

    def table(self, split: str, content: str, label: str) -> Any:
        """The two columns of a split, images undecoded."""
        from datasets import Image

        table = self._tables[split].select_columns([content, label])
        if isinstance(self.request, ImageRequest):
            table = table.cast_column(content, Image(decode=False))
        return table

    def rows(self, split: str) -> int | None:
        """The number of rows that the data set says a split has, if it does."""
        known = (self._tables[split].info.splits or {}).get(split)
        return getattr(known, "num_examples", None)

    def columns(self, split: str, columns: Sequence[str]) -> Any:
        """Some columns of a split, read without the others where the format allows it."""
        try:
            table = self._open(columns=list(columns))[split]
        except ValueError:  # only parquet is read by columns
            table = self._tables[split].select_columns(list(columns))
        return table


@contextmanager
def _reading(split: str, request: Request) -> Iterator[None]:
    """Say what cannot be read, for errors that each file format has of its own."""
    try:
        yield
    except Exception as error:
        what = f"split {split} of {request.dataset!r} cannot be read ({error})"
        hint = "; text files that are streamed are UTF-8" if isinstance(error, UnicodeError) else ""
        raise ValueError(what + hint) from error


def _is_delimited(folder: Path) -> bool:
    """Whether all data in a folder are CSV or TSV."""
    files = (p for p in folder.rglob("*") if p.is_file() and not is_hidden(p.name))
    data = [p for p in files if p.suffix.lower() not in _NO_DATA]
    return bool(data) and all(p.suffix.lower() in (".csv", ".tsv") for p in data)


def _pick_columns(request: Request, features: Mapping[str, Any]) -> tuple[str, str]:
    if isinstance(request, TextRequest):
        label = pick_text_label(request.label_column, features)
        return pick_text(request.text_column, features, label), label
    assert isinstance(request, ImageRequest)
    return pick_image(request.image_column, features), pick_image_label(request, features)


def _check_columns(
    request: Request, features: Mapping[str, Any], split: str, content: str, label: str
) -> None:
    is_text = isinstance(request, TextRequest)
    argument = "text_column" if is_text else "image_column"
    check_columns(features, split, **{argument: content, "label_column": label})
    check_label_column(label, features)
    if is_text:
        check_text_column(content, features)
    else:
        pick_image(content, features)


# Classes


class _RowCount:
    """Counts the rows of a split by the value of their label, in one pass."""

    def __init__(self, source: _Source, content: str, label: str, progress: bool) -> None:
        self.source = source
        self.label = label
        is_text = isinstance(source.request, TextRequest)
        self.columns = [content, label] if is_text else [label]
        self.progress = progress

    def __call__(self, split: str, shuffle_buffer: int = 0) -> Counter[Any]:
        """Count a split; rows without text or label stop, or are left out if asked for."""
        request = self.source.request
        found: Counter[Any] = Counter()
        empty: Counter[str] = Counter()
        alike, last = 0, None
        for columns in self._parts(split):
            for row in zip(*columns, strict=True):
                value = row[-1]
                if len(row) > 1 and is_missing(row[0]):
                    empty[self.columns[0]] += 1
                elif _is_unlabelled(value):
                    empty[self.label] += 1
                else:
                    found[value] += 1
                    alike += value == last
                    last = value
        for column, count in empty.items():
            if not request.skip_empty:
                raise _empty_rows(count, split, column)
            request.notes.leave_out(f"rows of split {split} without {column!r}", count)
        check_whole(self.label, found, self.source.features(split))
        if not found:
            raise ValueError(f"no row of split {split} has a label; choose a split that has them")
        _note_order(found, alike, split, shuffle_buffer, request.notes)
        return found

    def _parts(self, split: str) -> Iterator[list[list[Any]]]:
        from tqdm.auto import tqdm

        table = self.source.columns(split, self.columns).with_format("arrow")
        desc = f"Counting the classes of split {split}"
        hidden = not self.progress
        rows = self.source.rows(split)
        with (
            tqdm(desc=desc, total=rows, unit=" rows", delay=1, disable=hidden) as bar,
            _reading(split, self.source.request),
        ):
            for part in table.iter(batch_size=_ROWS_AT_ONCE):
                yield [part.column(name).to_pylist() for name in self.columns]
                bar.update(part.num_rows)


def _note_order(
    found: Counter[Any], alike: int, split: str, shuffle_buffer: int, notes: DataNotes
) -> None:
    """Note rows that are sorted by class, which a small buffer does not mix."""
    total = found.total()
    if not 0 < shuffle_buffer < total:
        return
    by_chance = sum(count**2 for count in found.values()) / total**2
    if alike / total - by_chance > _IN_RUNS * (1 - by_chance):
        notes.say(
            f"Rows of split {split} are sorted by class, and a buffer of {shuffle_buffer} of "
            f"{total} rows mixes them badly: raise --shuffle_buffer (shuffle_buffer), or store "
            "them in a random order."
        )


class _ByName(dict[Any, int]):
    """Classes by all spellings of their names: ``3``, ``"3"`` and ``"3 "`` are the class ``"3"``.

    The spellings that :func:`.number_labels` reads as one class.
    """

    def __init__(self, classes: Mapping[str, int]) -> None:
        super().__init__(classes)
        self._classes = dict(classes)

    def __missing__(self, value: Any) -> int:
        name = composed(str(value)).strip()
        if name not in self._classes and is_whole(value):
            name = str(as_whole(value))
        self[value] = self._classes[name]
        return self[value]


def _counted_classes(
    found: Counter[Any], names: Sequence[str] | None, split: str, notes: DataNotes
) -> tuple[tuple[str, ...], np.ndarray]:
    """The names of the classes and the rows of each."""
    if names is None:
        of_value, class_names = name_values(found, notes)
    else:
        if wrong := [value for value in found if not 0 <= value < len(names)]:
            expected = f"must be in 0..{len(names) - 1}"
            raise ValueError(f"split {split} has label {wrong[0]}, which {expected}")
        of_value, class_names = {value: value for value in found}, tuple(names)
    counts = np.zeros(len(class_names), dtype=np.int64)
    for value, count in found.items():
        counts[of_value[value]] += count
    return class_names, counts


def _given_classes(
    given: GivenCounts, names: Sequence[str] | None
) -> tuple[tuple[str, ...], np.ndarray]:
    """The names of the classes and the rows of each, by the counts that were given."""
    if isinstance(given, ClassCounts):
        listed = given.counts.tolist()
        given = dict(zip(given.class_names, listed, strict=True)) if given.class_names else listed
    if isinstance(given, Mapping):
        by_name = {composed(str(name)).strip(): count for name, count in given.items()}
        order = tuple(names or name_values(Counter(by_name.keys()), DataNotes())[1])
        if unknown := sorted(set(by_name) - set(order)):
            hint = f"It has the classes {quoted(order)}."
            raise invalid("class_counts", "of classes of the data set", unknown, hint=hint)
        numbers = [by_name.get(name, 0) for name in order]
    else:
        numbers = list(given)
        order = tuple(names or map(str, range(len(numbers))))
    if len(numbers) != len(order):
        expected = f"{len(order)} counts, of {quoted(order)}"
        raise invalid("class_counts", expected, f"{len(numbers)} counts")
    if not all(isinstance(n, int | np.integer) and n >= 0 for n in numbers):
        raise invalid("class_counts", "a whole number of rows for each class", numbers)
    return order, np.array(numbers, dtype=np.int64)


def _tested_rows(
    found: Counter[Any],
    train: StreamedSplit,
    names: Sequence[str] | None,
    split: str,
    notes: DataNotes,
) -> tuple[dict[Any, int | None], np.ndarray]:
    """Class of each value of a split by the classes of training, and the rows of each.

    Rows of other classes are left out and noted, as are the classes that the split lacks.

    Raises:
        ValueError: no row is left.
    """
    places: dict[Any, int | None] = {}
    counts = np.zeros(len(train.class_names), dtype=np.int64)
    odd: Counter[Any] = Counter()
    for value, count in found.items():
        try:
            places[value] = train.places[value]
        except KeyError:
            places[value] = None
            odd[value] += count
        else:
            counts[train.places[value]] += count
    if not counts.any():
        pair = f"{quoted(found)} there, {quoted(train.class_names)} in training"
        raise ValueError(f"split {split} has no class that training has: {pair}")
    if odd:
        shown = quoted(odd if names is None else [names[label] for label in odd])
        reason = f"examples of split {split} whose class training has not"
        notes.leave_out(reason, odd.total(), shown)
    note_absent(counts, train.class_names, split, notes)
    return places, counts


# Rows without content


def _is_unlabelled(value: Any) -> bool:
    """Whether a label is none; -1 is how the hub's test sets write that."""
    return is_missing(value) or value == -1


def _empty_rows(count: int, split: str, column: str) -> Exception:
    hint = "Leave such rows out with --skip_empty (skip_empty=True)."
    return ValueError(f"{count} rows of split {split} have no {column!r}. {hint}")
