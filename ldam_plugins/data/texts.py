"""Where labelled texts come from: the hub, a folder laid out like one, or embedded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ldam_plugins._validation import check_choice, check_int, check_real, invalid, quoted
from ldam_plugins.counts import check_label_range, label_array
from ldam_plugins.data.readers.hub import open_tables, read_labels
from ldam_plugins.data.readers.registry import TEST_SPLITS
from ldam_plugins.data.readers.stdlib_docstrings import read_docstrings

if TYPE_CHECKING:
    from datasets import Dataset, Features

EMBEDDED = "stdlib_docstrings"
TEXT, LABEL = "text", "label"
_LABEL_NAMES = (LABEL, "labels")
_STRINGS = ("string", "large_string")


def load_texts(
    dataset: str | os.PathLike[str],
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    train_split: str = "train",
    test_split: str | None = None,
    skip_empty: bool = False,
) -> tuple[Dataset, Dataset]:
    """Load the texts to train on and those to test on, in the same order on every machine.

    What ``dataset`` may be: a hub id; a local folder of files as the hub serves them, or one that
    ``save_to_disk`` wrote; or ``"stdlib_docstrings"``, docstrings of Python's own standard library
    labelled by module (see :func:`~ldam_plugins.data.readers.stdlib_docstrings.read_docstrings`).

    Args:
        dataset: One of the above.
        text_column: Column of the texts. Default: ``text``, else the only one of strings.
        label_column: Column of the labels: class labels, integers or strings, which become
            classes in sorted order. Default: the only one of class labels, else ``label`` or
            ``labels``.
        train_split: The split to train on, or a slice of one as in ``datasets``:
            ``"train[:10%]"``, ``"train[500:]"``.
        test_split: The one to test on, likewise. Default: the first there is of test, validation,
            valid and val.
        skip_empty: Leave out rows without a text instead of stopping.

    Returns:
        Training and test set with the columns ``text`` (str) and ``label`` (a ``ClassLabel``
        with the names of the classes), and no others.

    Raises:
        ConnectionError: the hub cannot be reached.
        ValueError: no such dataset, split or column, with what there is; labels that are not one
            class a text; rows without text or label; an option that means nothing here.

    Example:
        >>> train, test = load_texts("stdlib_docstrings")
        >>> train.column_names, train.features["label"].names[:2]
        (['text', 'label'], ['_collections_abc', '_pydecimal'])
    """
    name = os.fspath(dataset)
    if name == EMBEDDED:
        given = {"text_column": text_column, "label_column": label_column, "test_split": test_split}
        _refuse_columns({**given, "train_split": None if train_split == "train" else train_split})
        train, test, class_names = read_docstrings()
        return _dataset(*train, class_names), _dataset(*test, class_names)
    tables = open_tables(str(Path(name).expanduser()) if Path(name).expanduser().is_dir() else name)
    splits = _pick_splits(tables, train_split, test_split)
    features = next(iter(splits.values())).features
    label = _pick_label(features, label_column)
    text = _pick_text(features, text_column, label)
    names: tuple[str, ...] | None = None
    parts = []
    for split, table in splits.items():
        _check_columns(table.features, split, text, label)
        table = _with_texts(table, text, split, skip_empty)
        labels, names = read_labels(table, label, split, names)
        part = _columns_of(table, text, label, names)
        parts.append(_dataset(table[text][:], labels, names) if part is None else part)
    return parts[0], parts[1]


def subsample_classes(
    labels: Any,
    class_names: Sequence[str],
    rare_classes: Sequence[str],
    rare_fraction: float,
    seed: int = 0,
) -> np.ndarray:
    """Indices that are left if ``rare_classes`` keep ``rare_fraction`` of their samples, in order.

    The way the paper makes IMDB imbalanced: 90 % of the negative reviews are removed (Cao et al.,
    NeurIPS 2019, arXiv 1906.07413). Class c keeps ``int(rare_fraction * n_c)`` samples, the
    first of one shuffle a class in class order by NumPy's legacy generator, as in
    :func:`~ldam_plugins.long_tail_indices`.

    Args:
        labels: Class indices (N,).
        class_names: Name of each class.
        rare_classes: Names of the classes that lose samples.
        rare_fraction: Share that they keep, in (0, 1].
        seed: Seed of the choice, in 0..2**32 - 1.

    Raises:
        ValueError: an unknown class, a fraction out of range, or a class that would keep nothing.

    Example:
        >>> subsample_classes([0, 0, 0, 0, 1, 1], ["neg", "pos"], ["neg"], 0.5)
        array([2, 3, 4, 5])
    """
    array = label_array(labels)
    check_label_range(array, len(class_names))
    check_real("rare_fraction", rare_fraction, low=0, high=1, low_open=True)
    random = np.random.RandomState(check_int("seed", seed, low=0, high=2**32 - 1))
    rare = sorted(
        {class_names.index(check_choice("rare_classes", n, class_names)) for n in rare_classes}
    )
    removed = np.zeros(len(array), dtype=bool)
    for label in rare:
        members = np.flatnonzero(array == label)
        kept = int(rare_fraction * len(members))
        if kept == 0:
            expected = (
                f"large enough that {class_names[label]!r} keeps one of {len(members)} samples"
            )
            raise invalid("rare_fraction", expected, rare_fraction)
        random.shuffle(members)
        removed[members[kept:]] = True
    return np.flatnonzero(~removed)


def _columns_of(table: Any, text: str, label: str, class_names: Sequence[str]) -> Dataset | None:
    """The two columns of a table of the cache, where they need no change.

    They stay on disk, and ``map`` keeps beside them what it makes of them. None for other tables,
    those of ``save_to_disk`` among them: ``map`` would write into the user's folder.
    """
    from datasets.config import HF_DATASETS_CACHE

    cache = Path(HF_DATASETS_CACHE).resolve()
    files = [Path(file["filename"]).resolve() for file in table.cache_files]
    if not files or any(cache not in file.parents for file in files):
        return None
    kept = table.select_columns([text, label])
    if [text, label] != [TEXT, LABEL]:
        kept = kept.rename_columns({text: TEXT, label: LABEL})
    return kept if kept.features == _features(class_names) else None


def _dataset(texts: Sequence[str], labels: np.ndarray, class_names: Sequence[str]) -> Dataset:
    from datasets import Dataset

    return Dataset.from_dict({TEXT: list(texts), LABEL: labels}, features=_features(class_names))


def _features(class_names: Sequence[str]) -> Features:
    from datasets import ClassLabel, Features, Value

    return Features({TEXT: Value("string"), LABEL: ClassLabel(names=list(class_names))})


def _refuse_columns(given: Mapping[str, object]) -> None:
    for name, value in given.items():
        if value is not None:
            hint = f"It means nothing for {EMBEDDED!r}."
            raise invalid(name, "left out", value, hint=hint)


def _pick_splits(
    tables: Mapping[str, Any], train_split: str, test_split: str | None
) -> dict[str, Any]:
    """The rows to train on and those to test on, by what they were asked for as."""
    test = test_split or next((name for name in TEST_SPLITS if name in tables), None)
    if test is None:
        expected = f"given, for none of {quoted(tables)} is named {', '.join(TEST_SPLITS)}"
        raise invalid("test_split", expected, None)
    if test == train_split:
        raise invalid("test_split", "other rows than `train_split`", test)
    train = _pick_rows("train_split", tables, train_split)
    return {train_split: train, test: _pick_rows("test_split", tables, test)}


def _pick_rows(argument: str, tables: Mapping[str, Any], asked: str) -> Any:
    """A split, or the slice of one that ``datasets`` would read."""
    from datasets import ReadInstruction

    name = asked.partition("[")[0]
    table = tables[check_choice(argument, name, list(tables))]
    if name == asked:
        return table
    try:
        (rows,) = ReadInstruction.from_spec(asked).to_absolute({name: len(table)})
    except (ValueError, AssertionError) as error:
        expected = f"a split or a slice of one, such as '{name}[:10%]'"
        raise invalid(argument, expected, asked) from error
    if rows.from_ >= rows.to:
        raise invalid(argument, f"a slice that holds one of {len(table)} rows", asked)
    return table.select(range(rows.from_, rows.to))


def _pick_label(features: Mapping[str, Any], asked: str | None) -> str:
    from datasets import ClassLabel

    if asked is not None:
        return check_choice("label_column", asked, list(features))
    classes = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    if len(classes) == 1:
        return classes[0]
    named = [name for name in _LABEL_NAMES if name in features]
    return _only("label_column", named, features)


def _pick_text(features: Mapping[str, Any], asked: str | None, label: str) -> str:
    if asked is not None:
        return check_choice("text_column", asked, list(features))
    strings = [n for n, feature in features.items() if n != label and _is_string(feature)]
    return _only("text_column", [TEXT] if TEXT in strings else strings, features)


def _only(argument: str, found: list[str], features: Mapping[str, Any]) -> str:
    if len(found) != 1:
        kind = f"each of {quoted(found)}" if found else "no column"
        columns = ", ".join(f"{name} ({_kind(feature)})" for name, feature in features.items())
        raise ValueError(f"{kind} could be the `{argument}`; give it. The columns are {columns}.")
    return found[0]


def _check_columns(features: Mapping[str, Any], split: str, text: str, label: str) -> None:
    """Refuse texts that are no strings, and labels that are not one class a text."""
    for argument, column in (("text_column", text), ("label_column", label)):
        if column not in features:
            expected = f"a column of split {split}, one of {quoted(features)}"
            raise invalid(argument, expected, column)
    if not _is_string(features[text]):
        expected = "a column of strings"
        raise invalid("text_column", expected, f"{text} ({_kind(features[text])})")
    kind = _kind(features[label])
    hint = ""
    if "float" in kind:
        hint = f'Cast it: `dataset.cast_column("{label}", Value("int64"))`, if it holds classes.'
    elif "list" in kind.lower():
        hint = "Several labels a text have no long tail of classes: choose one of them."
    if hint:
        expected = "a column of one class a text (class labels, integers or strings)"
        raise invalid("label_column", expected, f"{label} ({kind})", hint=hint)


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


def _is_string(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in _STRINGS


def _kind(feature: Any) -> str:
    """Type of a column for a message: ``string``, ``float32``, ``ClassLabel``, ``List``."""
    if type(feature).__name__ == "Value":
        return str(feature.dtype)
    return type(feature).__name__ if not isinstance(feature, list) else "List"
