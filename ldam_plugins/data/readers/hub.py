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
    TABLE_OPTIONS,
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
    keep_known_classes,
    note_absent,
    note_untested,
    say_columns,
    text_features,
    text_table,
)
from ldam_plugins.data.readers.class_names import is_fraction, is_missing, number_labels
from ldam_plugins.data.readers.tables import LABEL_NAMES, OTHER_LABEL_NAMES

if TYPE_CHECKING:
    from datasets import Dataset

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
"""What a name of a data set of the hub looks like."""
_IMAGE_LABELS = ("label", "fine_label")
"""Which of several class columns is meant (CIFAR-100 has fine and coarse ones)."""
_TEXT_LABELS = ("label", "labels")
_FRACTIONS = ("float16", "float32", "float64")
"""Types that whole numbers have where pandas wrote some of them as missing."""
_PARQUET = ".parquet"
_STRINGS = ("string", "large_string")
_WHOLE_KINDS = ("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))
_BYTES_OR_PATHS = ("binary", "large_binary", *_STRINGS)


def _holds_image_tables(request: ImageRequest) -> bool:
    if request.root.is_file():
        return request.root.suffix.lower() == _PARQUET
    if not request.is_folder:
        return HUB_ID.fullmatch(request.dataset) is not None
    root = request.root
    if holds_parquet(root):
        return True
    # Deep in a folder of class folders a table is one file among others.
    return not (root / request.train_split).is_dir() and _holds(root, "*/*/*.parquet")


def holds_parquet(root: Path) -> bool:
    """Whether a folder is laid out as the hub lays a data set out, or was saved by ``datasets``."""
    return is_saved(root) or _holds(root, "*.parquet", "*/*.parquet")


def is_saved(root: Path) -> bool:
    """Whether ``save_to_disk`` of ``datasets`` wrote a folder, of several splits or of one."""
    one = all((root / name).is_file() for name in ("state.json", "dataset_info.json"))
    return one or (root / "dataset_dict.json").is_file()


def holds_images(file: Path) -> bool:
    """Whether a parquet file has a column of encoded images, not of names of files."""
    from datasets import Features, Image
    from pyarrow import parquet, types

    schema = parquet.read_schema(file)
    if any(isinstance(feature, Image) for feature in Features.from_arrow_schema(schema).values()):
        return True
    return any(types.is_binary(field.type) or types.is_large_binary(field.type) for field in schema)


def _holds(root: Path, *patterns: str) -> bool:
    return any(True for pattern in patterns for _ in root.glob(pattern))


def _read_images(request: ImageRequest) -> tuple[ImageRows, ImageRows | None]:
    splits = _open_splits(request)
    features = splits[0][1].features
    image = pick_image(request.image_column, features)
    label = pick_image_label(request, features)
    note_columns(request, splits[0][0], features, image_column=image, label_column=label)
    names = None
    parts = []
    for split, table in splits:
        check_columns(table.features, split, image_column=image, label_column=label)
        pick_image(image, table.features)
        rows, labels, names = read_labels(table, label, split, request, names)
        source = TableSource(table, image, split, roots(request))
        parts.append(ImageRows(source, labels, names, rows, _read_groups(table, rows, request)))
    return parts[0], parts[1] if len(parts) > 1 else None


def _read_texts(request: TextRequest) -> tuple[Dataset, Dataset | None]:
    splits = _open_splits(request)
    if len(splits) > 1 and splits[0][0] == splits[1][0]:
        raise invalid("test_split", "other rows than `train_split`", splits[1][0])
    features = splits[0][1].features
    label = pick_text_label(request.label_column, features)
    text = pick_text(request.text_column, features, label)
    note_columns(request, splits[0][0], features, text_column=text, label_column=label)
    names = None
    parts = []
    for split, table in splits:
        check_columns(table.features, split, text_column=text, label_column=label)
        check_text_column(text, table.features)
        table = _with_texts(table, text, split, request)
        rows, labels, names = read_labels(table, label, split, request, names)
        groups = _read_groups(table, rows, request)
        table = table if len(rows) == len(table) else table.select(rows)
        part = _cached_columns(table, text, label, names) if groups is None else None
        parts.append(text_table(table[text][:], labels, names, groups) if part is None else part)
    return parts[0], parts[1] if len(parts) > 1 else None


def _read_groups(table: Any, rows: np.ndarray, request: Request) -> np.ndarray | None:
    """What each row belongs to, if a column of that is asked for."""
    if request.group_column is None:
        return None
    check_columns(table.features, "each", group_column=request.group_column)
    values = table[request.group_column][:]
    missing = [row for row in rows if is_missing(values[row])]
    if missing:
        shown = f"none in {len(missing)} rows, the first is row {missing[0]}"
        raise invalid("group_column", "a column with a value in every row", shown)
    return np.array([str(values[row]) for row in rows], dtype=object)


HUB_IMAGES = Reader(
    name="tables",
    layout="a hub id, or a folder of *.parquet files (also one or two folders down)",
    options=("image_column", *TABLE_OPTIONS),
    accepts=_holds_image_tables,
    read=_read_images,
)
HUB_TEXTS = Reader(
    name="tables",
    layout="a hub id, or a folder of files that `datasets.load_dataset` reads",
    options=("text_column", *TABLE_OPTIONS),
    accepts=lambda request: bool(request.dataset),  # the last one asked: `datasets` knows others
    read=_read_texts,
)


# Tables


def open_tables(
    dataset: str, cache_dir: str | None = None, *, streaming: bool = False, **options: Any
) -> Mapping[str, Any]:
    """Open every split of a hub id or of a local folder in hub layout.

    Args:
        dataset: A hub id, a folder, or a file.
        cache_dir: Where files of the hub are kept.
        streaming: Give a ``datasets.IterableDataset`` of each split, and keep no file.
        **options: Of the format of the files, as ``datasets.load_dataset`` takes them.

    Raises:
        NoSuchDataset: there is none, or the hub cannot be reached and it is not in the cache.
        ValueError: its files cannot be read.
    """
    import datasets

    try:
        if is_saved(Path(dataset)):
            tables = datasets.load_from_disk(dataset)
            if isinstance(tables, datasets.Dataset):
                tables = {"train": tables}
            if streaming:
                return {name: table.to_iterable_dataset() for name, table in tables.items()}
            return tables
        if Path(dataset).suffix.lower() == _PARQUET and Path(dataset).is_file() and not streaming:
            return {"train": datasets.Dataset.from_parquet(dataset, cache_dir=cache_dir)}
        if streaming:
            return datasets.load_dataset(dataset, cache_dir=cache_dir, streaming=True, **options)
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
    if request.test_share is not None:
        note_untested(request, request.train_split, tables)
    else:
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


def roots(request: Request) -> list[str]:
    """Where the files may be that rows name by a path: the data set's folder and the caches."""
    from datasets.config import HF_DATASETS_CACHE
    from huggingface_hub.constants import HF_HUB_CACHE

    folder = str(request.root) if request.is_folder else None
    roots = (folder, request.cache_dir, str(HF_DATASETS_CACHE), str(HF_HUB_CACHE))
    return [path for path in roots if path and Path(path).is_dir()]


# Columns


def pick_image(asked: str | None, features: Mapping[str, Any]) -> str:
    """The column of images that was asked for, else the only one of that type."""
    from datasets import Image

    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    image = _pick("image_column", asked, images, features)
    if image not in images and features[image].dtype not in _BYTES_OR_PATHS:
        raise invalid("image_column", "a column of images", image, hint=_columns(features))
    return image


def pick_image_label(request: ImageRequest, features: Mapping[str, Any]) -> str:
    """The column of labels that was asked for, else the one of classes."""
    classes = _class_columns(features)
    preferred = [name for name in _IMAGE_LABELS if name in classes][:1]
    found = preferred or classes or _named(features)
    label = _pick("label_column", request.label_column, found, features)
    others = [name for name in classes if name != label]
    if request.label_column is None and others:
        also = f"--label_column takes another: {quoted(others)}"
        request.notes.say(f"The classes are those of column {label!r}; {also}.")
    return label


def pick_text(asked: str | None, features: Mapping[str, Any], label: str) -> str:
    """The column of texts that was asked for, else ``text``, else the only one of strings."""
    strings = [n for n, feature in features.items() if n != label and _is_string(feature)]
    return _pick("text_column", asked, [TEXT] if TEXT in strings else strings, features)


def pick_text_label(asked: str | None, features: Mapping[str, Any]) -> str:
    """The column of labels that was asked for, else the one of classes or of that name."""
    classes = _class_columns(features)
    named = [name for name in _TEXT_LABELS if name in features] or _named(features)
    return _pick("label_column", asked, classes if len(classes) == 1 else named, features)


def _named(features: Mapping[str, Any]) -> list[str]:
    """Columns that are called as labels are, in tables as in files."""
    kinds = (LABEL_NAMES, OTHER_LABEL_NAMES)
    found = ([name for name in features if name.lower() in names] for names in kinds)
    return next(filter(None, found), [])


def note_columns(request: Request, split: str, features: Mapping[str, Any], **columns: str) -> None:
    """Note which columns are read, and say which were found by other than their type."""
    from datasets import ClassLabel, Image

    typed = [name for name in features if isinstance(features[name], ClassLabel | Image)]
    request.notes.columns |= columns
    say_columns(request, f"split {split}", certain=typed)


def _pick(
    argument: str, asked: str | None, candidates: Sequence[str], features: Mapping[str, Any]
) -> str:
    """The column that was asked for, else the only candidate."""
    if asked is not None:
        return check_choice(argument, asked, list(features), hint=_columns(features))
    if len(candidates) != 1:
        which = f"each of {quoted(candidates)}" if candidates else "no column"
        options = f"--{argument} ({argument}=...)"
        raise ValueError(f"{which} could be the `{argument}`; give {options}. {_columns(features)}")
    return candidates[0]


def check_columns(features: Mapping[str, Any], split: str, **columns: str) -> None:
    """Check that a split has the columns, each given under the argument that chooses it."""
    for argument, column in columns.items():
        if column not in features:
            expected = f"a column of split {split}"
            raise invalid(argument, expected, column, hint=_columns(features))


def check_text_column(column: str, features: Mapping[str, Any]) -> None:
    """Check that a column is one of strings."""
    if not _is_string(features[column]):
        shown = f"{column} ({_kind(features[column])})"
        raise invalid("text_column", "a column of strings", shown)


def check_label_column(column: str, features: Mapping[str, Any]) -> None:
    """Check that a column is one of class labels, numbers, truths or strings."""
    feature = features[column]
    kinds = (*_WHOLE_KINDS, *_FRACTIONS)  # of numbers the values tell, see check_whole
    if not (_is_string(feature) or str(getattr(feature, "dtype", "")) in kinds):
        raise _no_labels(column, features)


def check_whole(column: str, values: Collection[Any], features: Mapping[str, Any]) -> None:
    """Check that numbers in a column of labels are whole, as 2.0 is, or missing."""
    if str(getattr(features[column], "dtype", "")) in _FRACTIONS:
        kept = (value for value in values if not is_missing(value))
        fraction = next(filter(is_fraction, kept), None)
        if fraction is not None:
            hint = f"Cut the numbers into classes first. {_columns(features)}"
            shown = f"{column} ({fraction})"
            raise invalid("label_column", "a column of one class a row", shown, hint=hint)


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
    table: Any,
    column: str,
    split: str,
    request: Request,
    class_names: tuple[str, ...] | None = None,
) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Read one label column, no other: the labelled rows, their int64 labels, the class names.

    A column of class labels names its classes itself. Integers, truths and strings are numbered by
    :func:`.number_labels`; ``class_names`` gives the classes of the training split, and rows of
    others are left out and noted. Rows without a label stop, or are left out if asked for.

    Raises:
        ValueError: a column of another type, a row without label, a label out of range, or class
            labels with other names or in another order than ``class_names``.
    """
    check_label_column(column, table.features)
    feature = table.features[column]
    found = table.select_columns([column]).with_format("arrow")[:].column(0)
    if len(found) == 0:
        raise ValueError(f"split {split} is empty")
    values = found.to_pylist()
    check_whole(column, values, table.features)
    rows = _labelled_rows(values, column, split, request, _is_string(feature))
    names = getattr(feature, "names", None)
    if names is None:
        labels, own = number_labels([values[row] for row in rows], request.notes)
        if class_names is None:
            return rows, labels, own
        kept, labels = keep_known_classes(labels, own, class_names, split, request.notes)
        return rows[kept], labels, class_names
    if class_names is not None and tuple(names) != tuple(class_names):
        odd = quoted(sorted(set(names) ^ set(class_names))) or "their order"
        what = f"column {column!r} of split {split} must have the classes of training"
        raise ValueError(f"{what}, not so: {odd}")
    labels = np.array([values[row] for row in rows], dtype=np.int64)
    wrong = np.flatnonzero(labels >= len(names))
    if wrong.size:
        row = int(rows[wrong[0]])
        raise ValueError(_bad_label(row, split, values[row], len(names)))
    if class_names is not None:
        note_absent(np.bincount(labels, minlength=len(names)), names, split, request.notes)
    return rows, labels, tuple(names)


def _labelled_rows(
    values: Sequence[Any], column: str, split: str, request: Request, strings: bool
) -> np.ndarray:
    """The rows that have a label; -1 is none, as the hub's test sets have it."""
    empty = [row for row, value in enumerate(values) if is_missing(value)]
    if empty and not request.skip_empty:
        hint = "Leave such rows out with --skip_empty (skip_empty=True)"
        raise ValueError(f"{len(empty)} rows of split {split} have no {column!r}. {hint}")
    if not strings:
        unmarked = [row for row, value in enumerate(values) if not is_missing(value) and value < 0]
        limit = max((value for value in values if not is_missing(value)), default=0) + 1
        if unmarked and (not request.skip_empty or any(values[row] < -1 for row in unmarked)):
            raise ValueError(_bad_label(unmarked[0], split, values[unmarked[0]], limit))
        empty += unmarked
    if len(empty) == len(values):
        raise ValueError(f"no row of split {split} has a label; choose a split that has them")
    if empty:
        request.notes.leave_out(f"rows of split {split} without label", len(empty))
    return np.setdiff1d(np.arange(len(values)), empty)


def _no_labels(column: str, features: Mapping[str, Any]) -> Exception:
    kind = _kind(features[column])
    hint = _columns(features)
    if "list" in kind.lower():
        hint = "Several labels a text or image have no long tail of classes: choose one of them."
    expected = "a column of class labels, integers or strings, one a row"
    return invalid("label_column", expected, f"{column} ({kind})", hint=hint)


def _bad_label(row: int, split: str, label: int, limit: int) -> str:
    what = f"row {row} of split {split} has label {label}, which must be in 0..{limit - 1}"
    hint = "choose a split that has them, or leave them out with --skip_empty"
    return f"{what}; -1 marks rows without label: {hint}"


# Texts


def _with_texts(table: Any, column: str, split: str, request: Request) -> Any:
    """The rows that have a text."""
    empty = [row for row, text in enumerate(table[column][:]) if not (text and text.strip())]
    if not empty:
        return table
    if not request.skip_empty:
        expected = f"a text in every row of split {split}"
        hint = "Leave such rows out with --skip_empty (skip_empty=True)."
        found = f"none in {len(empty)} rows, the first is row {empty[0]}"
        raise ValueError(f"`{column}` must be {expected}, got {found}. {hint}")
    request.notes.leave_out(f"rows of split {split} without text", len(empty))
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
