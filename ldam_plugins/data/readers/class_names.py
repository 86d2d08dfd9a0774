"""Names of classes as people write them: which are one, which only look so, and their order."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ldam_plugins.data.notes import DataNotes
from ldam_plugins.data.readers.paths import composed

_WHOLE = re.compile(r"-?(0|[1-9]\d*)(\.0+)?", re.ASCII)
_FRACTION = re.compile(r"[+-]?(\d+\.\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_LOOKS_MISSING = frozenset(("na", "n/a", "nan", "null", "none", "nil", "-", "?"))


def is_missing(value: Any) -> bool:
    """Whether a cell of a table is empty: None, NaN, or text without a letter in it."""
    if isinstance(value, str):
        return not value or value.isspace()
    return value is None or bool(value != value)


def is_whole(value: Any) -> bool:
    """Whether a cell is an integer, as a number or as text, ``2.0`` included.

    ``007`` is none: leading zeros belong to a name.
    """
    if isinstance(value, str):
        return _WHOLE.fullmatch(value.strip()) is not None
    if isinstance(value, float):
        return value.is_integer()  # false for inf and NaN
    return isinstance(value, int) and not isinstance(value, bool)


def as_whole(value: Any) -> int:
    """The integer that :func:`is_whole` has found, exactly: ids are longer than floats are."""
    return int(value.strip().partition(".")[0]) if isinstance(value, str) else int(value)


def is_fraction(value: Any) -> bool:
    """Whether a cell is a number that is no integer, as a number or as text."""
    if isinstance(value, str):
        return _FRACTION.fullmatch(value.strip()) is not None and not is_whole(value)
    return isinstance(value, float) and not is_whole(value)


def number_labels(values: Sequence[Any], notes: DataNotes) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class index of each value, and the names of the classes, see :func:`name_values`.

    Args:
        values: One a row, none missing.
        notes: Where to note the names that were merged, or that look like mistakes.
    """
    of_value, names = name_values(Counter(values), notes)
    return np.array([of_value[value] for value in values], dtype=np.int64), names


def name_values(
    counts: Mapping[Any, int], notes: DataNotes
) -> tuple[dict[Any, int], tuple[str, ...]]:
    """Class index of each different value, and the names of the classes.

    Integers, as numbers or as text, are classes in the order of the numbers, whatever they are:
    1 to 5, or 3, 17 and 40. Anything else is text: classes in sorted order, truths ``False`` and
    ``True``. Blanks around a name do not belong to it.

    Args:
        counts: Rows by value, none missing.
        notes: Where to note the names that were merged, or that look like mistakes.
    """
    if all(map(is_whole, counts)):
        numbers = {value: as_whole(value) for value in counts}
        order = sorted(set(numbers.values()))
        place: dict[Any, int] = {number: label for label, number in enumerate(order)}
        return {value: place[number] for value, number in numbers.items()}, tuple(map(str, order))
    texts: Counter[str] = Counter()
    for value, count in counts.items():
        texts[composed(str(value))] += count
    merged = {text: name.strip() for text, name in same_but_blanks(texts, notes).items()}
    odd = [name for name in merged.values() if name.lower() in _LOOKS_MISSING]
    if odd:
        notes.say(f"Read as names of classes, not as missing labels: {', '.join(map(repr, odd))}.")
    names = sorted(set(merged.values()))
    place = {name: label for label, name in enumerate(names)}
    return {value: place[merged[composed(str(value))]] for value in counts}, tuple(names)


def same_but_blanks(counts: Mapping[str, int], notes: DataNotes) -> dict[str, str]:
    """The class that each spelling stands for: those that differ in outer blanks only are one.

    ``"x "`` beside ``"x"`` is ``"x"``; alone it stays as it is. What is merged is noted, and so are
    names that differ in capitals or inner blanks only, or are one number, which stay apart: ``Cat``
    and ``cat`` may be two things.

    Args:
        counts: Examples by spelling.
        notes: Where to note it.
    """
    spellings: dict[str, list[str]] = {}
    for name in counts:
        spellings.setdefault(name.strip() or name, []).append(name)
    classes = {}
    for plain, names in spellings.items():
        for name in names:
            classes[name] = plain if len(names) > 1 else name
        if len(names) > 1:
            shown = ", ".join(f"{name!r} ({counts[name]})" for name in sorted(names))
            notes.say(f"Read as one class, {plain!r}, since they differ in blanks only: {shown}.")
    _note_alike(classes.values(), notes)
    return {name: classes[name] for name in counts}


def _note_alike(names: Collection[str], notes: DataNotes) -> None:
    alike: dict[str, list[str]] = {}
    for name in dict.fromkeys(names):
        plain = str(as_whole(name)) if is_whole(name) else "".join(name.casefold().split())
        alike.setdefault(plain, []).append(name)
    pairs = [" and ".join(map(repr, sorted(same))) for same in alike.values() if len(same) > 1]
    if pairs:
        shown = f"{', '.join(pairs[:20])}{', ...' if len(pairs) > 20 else ''}"
        notes.say(f"Kept apart, though they look like one class: {shown}.")
