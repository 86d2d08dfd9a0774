"""Splits of the training samples that keep the share of each class."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldam_plugins._validation import check_int, check_real, invalid, quoted
from ldam_plugins.counts import check_label_range, label_array
from ldam_plugins.data.notes import DataNotes

SPLIT_FILE = "split.csv"
TRAIN_PART, TEST_PART, VALIDATION_PART = "train", "test", "validation"
_RESTARTS, _SEARCHED, _PASSES = 20, 200_000, 20
"""Searches for groups, their work together (groups times classes in each), and rounds of one."""
_WORTHWHILE = 1e-9


class SingleSampleWarning(UserWarning):
    """Classes with a single sample stay in training, so that nothing of them is held out."""


def share_or_name(argument: str, value: float | str | None) -> float | str | None:
    """A part of a data set as people give it: a share in (0, 1) to hold out, or a split's name.

    A number may be text, as on a command line; None stays None.

    Raises:
        ValueError: a number outside (0, 1).
    """
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return value
    hint = f"Give another --{argument} or leave it out."
    return check_real(argument, number, low=0, high=1, low_open=True, high_open=True, hint=hint)


def as_part(argument: str, value: float | str | None, split_file: object = None) -> dict[str, Any]:
    """A part of a data set as ``<argument>`` (its name) and ``test_share`` (a share of another).

    Raises:
        ValueError: a share outside (0, 1), or a name beside a file that says what is held out.
    """
    part = share_or_name(argument, value)
    if split_file is not None and TEST_PART not in split_parts(str(split_file)):
        split_file = None
    if split_file is not None and part is not None:
        hint = f"The examples that {split_file} tests on are tested on."
        raise invalid(argument, "left out beside `split_file`", part, hint=hint)
    is_share = isinstance(part, float) or split_file is not None
    return {argument: None if is_share else part, "test_share": (part or 0.5) if is_share else None}


def hold_out(
    examples: Examples,
    share: float,
    *,
    seed: int,
    min_kept: int,
    notes: DataNotes,
    split_file: str | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Hold a test part out, and note what could not be held out.

    Args:
        examples: All there are.
        share: See :func:`stratified_split`, and so for ``seed`` and ``min_kept``.
        seed: Of the choice.
        min_kept: Of a class.
        notes: Where to note it.
        split_file: Hold the examples out that this file, which :func:`save_split` wrote, tests on.
    """
    if split_file is not None and TEST_PART in split_parts(split_file):
        parts = read_split(split_file, examples)
        notes.say(f"The parts are those of {split_file}.")
        return np.flatnonzero(parts != TEST_PART), np.flatnonzero(parts == TEST_PART)
    labels, class_names, groups = examples.labels, examples.class_names, examples.groups
    if len(labels) and np.bincount(labels).max() < 2:
        expected = "the name of a part to test on"
        hint = "Each class has a single example, which can only be trained on."
        raise invalid("test_split", expected, share, hint=hint)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SingleSampleWarning)  # noted by name instead
        kept, held_out = stratified_split(
            labels, share, seed=seed, min_kept=min_kept, groups=groups
        )
    of_what = "each class" if groups is None else "each class as near as the groups allow"
    sizes = f"{len(held_out)} of {len(labels)} examples"
    notes.say(f"Held out to test on: {sizes}, {share:g} of {of_what}.")
    absent = np.setdiff1d(labels, labels[held_out])
    if len(absent):
        names = quoted(class_names[label] for label in absent)
        what = "example" if groups is None else "group"
        notes.say(f"Classes of which the only {what} is trained on, {len(absent)}: {names}.")
    return kept, held_out


def trained_classes(
    labels: np.ndarray, class_names: Sequence[str], notes: DataNotes
) -> np.ndarray | None:
    """The classes that have an example to train on; None if all have.

    The others are noted, see :func:`classes_with_examples`.
    """
    found = classes_with_examples(
        np.bincount(labels, minlength=len(class_names)), class_names, notes
    )
    return None if len(found) == len(class_names) else found


def classes_with_examples(
    counts: np.ndarray, class_names: Sequence[str], notes: DataNotes
) -> np.ndarray:
    """The classes that have an example to train on.

    A data set may name classes that it has no example of, or none in the part that is read. The
    others are noted.

    Args:
        counts: Examples of each class (C,).
        class_names: The name of each class.
        notes: Where to note the others.

    Raises:
        ValueError: fewer than two classes are left.
    """
    found = np.flatnonzero(counts)
    if len(found) < 2:
        shown = quoted(class_names[row] for row in found.tolist())
        hint = "Is it the folder or the column of labels that you mean?"
        raise invalid("train_split", "a part with two classes or more", shown, hint=hint)
    if len(found) == len(class_names):
        return found
    absent = [class_names[label] for label in np.flatnonzero(counts == 0).tolist()]
    notes.say(f"Classes without an example to train on are no classes here: {quoted(absent)}.")
    return found


def note_shared_groups(train: Examples, test: Examples, split: str, notes: DataNotes) -> None:
    """Note the groups that a split that was given shares with the training split."""
    if train.groups is None or test.groups is None:
        return
    shared = sorted(set(train.groups) & set(test.groups))
    if shared:
        count = int(np.isin(test.groups, shared).sum())
        where = f"both in training and in split {split}, of which they are {count} examples"
        notes.say(f"Groups {where}, {len(shared)}: {quoted(shared)}.")


class Examples(NamedTuple):
    """What a division needs to know of examples.

    Attributes:
        names: What each is called, the same in every run: no two are equal.
        labels: Class indices (N,).
        class_names: The name of each class.
        groups: What each belongs to, as text (N,).
    """

    names: Sequence[str]
    labels: np.ndarray
    class_names: Sequence[str]
    groups: np.ndarray | None = None


def part_of(examples: Examples, rows: np.ndarray) -> Examples:
    """Some of the examples."""
    names, labels, class_names, groups = examples
    chosen = [names[row] for row in rows]
    return Examples(chosen, labels[rows], class_names, None if groups is None else groups[rows])


def save_split(file: Path, divided: Mapping[str, Examples]) -> None:
    """Write which example is in which part, or check that a file says the same already.

    The file is CSV with the columns ``example``, ``class``, ``part`` and, where there are groups,
    ``group``, in the order of the names.

    Args:
        file: In the folder of a run; the run that is resumed there has written it.
        divided: The examples by part. Those of ``validation`` may be in ``train``, too.

    Raises:
        ValueError: the file is there, and the parts are others.
    """
    import pandas as pd

    rows: dict[str, dict[str, str]] = {}
    for part in (TRAIN_PART, TEST_PART, VALIDATION_PART):
        if part not in divided:
            continue
        names, labels, class_names, groups = divided[part]
        for row, name in enumerate(names):
            rows[name] = {"example": name, "class": class_names[labels[row]], "part": part}
            if groups is not None:
                rows[name]["group"] = groups[row]
    frame = pd.DataFrame([rows[name] for name in sorted(rows)])
    text = frame.to_csv(index=False)
    if not file.exists():
        file.write_text(text, encoding="utf-8")
        return
    before = _read_parts(str(file))
    now = dict(zip(frame["example"], zip(frame["class"], frame["part"], strict=True), strict=True))
    changes = {
        "new": [name for name in now if name not in before],
        "gone": [name for name in before if name not in now],
        "in another part or class": [n for n in now if n in before and now[n] != before[n]],
    }
    told = [
        f"{len(names)} are {how}: {quoted(names[:3])}" for how, names in changes.items() if names
    ]
    if told:
        hint = "Restore the data, or choose another --output_dir."
        raise ValueError(f"the examples are not those of {file}: {'; '.join(told)}. {hint}")


def split_parts(file: str) -> set[str]:
    """The parts that a file of :func:`save_split` has: ``train``, ``test``, ``validation``."""
    return {part for _, part in _read_parts(file).values()}


def read_split(file: str, examples: Examples) -> np.ndarray:
    """The part of each example, as text (N,), by a file that :func:`save_split` wrote.

    Raises:
        ValueError: there is no such file, or examples that it does not have, or has in another
            class.
    """
    before = _read_parts(file)
    unknown = [name for name in examples.names if name not in before]
    if unknown:
        what = f"{len(unknown)} of {len(examples.names)} examples are not in it"
        hint = f"{what}, the first is {unknown[0]!r}: it belongs to another data set, or to less."
        raise invalid("split_file", "that of the same examples", file, hint=hint)
    for row, name in enumerate(examples.names):
        now = examples.class_names[examples.labels[row]]
        if before[name][0] != now:
            hint = f"{name!r} is of class {before[name][0]!r} there, and of {now!r} now."
            raise invalid("split_file", "that of the same labels", file, hint=hint)
    return np.array([before[name][1] for name in examples.names], dtype=object)


def _read_parts(file: str) -> dict[str, tuple[str, str]]:
    """Class and part by example."""
    import pandas as pd

    try:
        frame = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8")
        columns = (frame[name].tolist() for name in ("example", "class", "part"))
        return {name: (label, part) for name, label, part in zip(*columns, strict=True)}
    except (OSError, ValueError, KeyError) as error:
        expected = f"a {SPLIT_FILE} that a run left, with columns example, class and part"
        raise invalid("split_file", expected, file, hint=f"It cannot be read ({error}).") from error


def stratified_split(
    labels: Any, share: float, *, seed: int = 0, min_kept: int = 1, groups: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the samples to train on and of those held out, ``share`` of each class.

    Of a class with n samples ``share * n`` are held out, rounded half up, but at least one and at
    most n - ``min_kept``, of small classes n - 1. A class with a single sample is kept, with a
    :class:`SingleSampleWarning` that names it: long-tailed sets have such classes, and no model
    learns a class that it never sees. They are
    ``np.setdiff1d(labels, labels[held_out])``; ``warnings.simplefilter("error",
    SingleSampleWarning)`` makes an error of the warning.

    Class c holds out the first of its samples in a shuffle by NumPy's legacy generator
    ``RandomState([seed, c])``, whose numbers are the same on every machine and in every version.
    So the split of a class depends on its own samples, ``share`` and ``seed`` only.

    With ``groups`` no group is divided, and what is held out is as near to ``share`` of each class
    as a search finds: it minimises ``sum_c (h_c - share * n_c)^2 / n_c`` over the sets of groups,
    h_c being the samples of class c that are held out. A class in several groups is in both parts
    wherever the groups allow it, one in a single group is kept, with the warning.

    Args:
        labels: Class indices (N,); see :meth:`ClassCounts.from_labels`.
        share: Share that is held out, in (0, 1), taken as the decimal number it is written as.
        seed: Seed of the choice, in 0..2**32 - 1.
        min_kept: Samples that a class keeps if it has more. 2 where another part is held out of
            those later, so that a class of three has one in each part. With ``groups`` it is
            groups that are counted.
        groups: What each sample belongs to (N,), such as a patient or a camera; of any type.

    Returns:
        Two int64 arrays of indices, each sorted, that together are ``0..N - 1``.

    Raises:
        TypeError: ``labels`` are not integers, or ``share`` is not a number.
        ValueError: ``share`` or ``seed`` out of range, a negative label, no class with two samples
            or in two groups, or another number of groups than of labels.

    Example:
        >>> kept, held_out = stratified_split([0] * 20 + [1] * 3, 0.1)
        >>> len(kept), held_out.tolist()
        (20, [10, 16, 21])
    """
    # scikit-learn's StratifiedShuffleSplit does not do: it holds out nothing of small classes, its
    # choice for a class changes with the other classes, and it refuses classes of one sample.
    array = label_array(labels)
    exact = Fraction(str(check_real("share", share, low=0, high=1, low_open=True, high_open=True)))
    check_int("seed", seed, low=0, high=2**32 - 1)
    check_int("min_kept", min_kept, low=1)
    if len(array) == 0:
        raise invalid("labels", "at least one label", "none")
    check_label_range(array, int(array.max()) + 1)
    counts = np.bincount(array)
    if counts.max() == 1:
        hint = "A class with a single sample can only be trained on."
        raise invalid("labels", "of a class with two samples or more", "one a class", hint=hint)
    if groups is not None:
        return _split_groups(array, _group_indices(groups, len(array)), exact, seed, min_kept)
    by_class = np.split(np.argsort(array, kind="stable").astype(np.int64), np.cumsum(counts)[:-1])
    held_out = np.zeros(len(array), dtype=bool)
    for label, members in enumerate(by_class):
        count = len(members)
        if count > 1:
            rounded = math.floor(exact * count + Fraction(1, 2))
            np.random.RandomState([seed, label]).shuffle(members)
            most = max(count - min_kept, 1)
            held_out[members[: min(max(rounded, 1), most)]] = True
    single = np.flatnonzero(counts == 1)
    if len(single):
        message = f"nothing is held out of classes with a single sample: {quoted(single.tolist())}"
        warnings.warn(message, SingleSampleWarning, stacklevel=2)
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


def _group_indices(groups: Any, count: int) -> np.ndarray:
    """The group of each sample as an integer, in the order in which groups first come."""
    names = list(groups)
    if len(names) != count:
        raise invalid("groups", f"one for each of {count} samples", len(names))
    place: dict[Any, int] = {}
    return np.array([place.setdefault(name, len(place)) for name in names], dtype=np.int64)


def _split_groups(
    labels: np.ndarray, groups: np.ndarray, share: Fraction, seed: int, min_kept: int
) -> tuple[np.ndarray, np.ndarray]:
    # scikit-learn's StratifiedGroupKFold does not do: it has shares of 1 / k only, and its folds
    # lack rare classes that another choice of groups would give both parts.
    counts = np.bincount(labels)
    members: list[list[tuple[int, int]]] = [[] for _ in range(int(groups.max()) + 1)]
    pairs, sizes = np.unique(np.stack([groups, labels]), axis=1, return_counts=True)
    for group, label, size in zip(*pairs.tolist(), sizes.tolist(), strict=True):
        members[group].append((label, size))
    if len(members) == 1:
        hint = "A single group cannot be divided."
        raise invalid("groups", "several", f"one group of {len(labels)} samples", hint=hint)
    search = _GroupSearch(members, counts.tolist(), float(share), min_kept)
    restarts = min(max(_SEARCHED // len(sizes), 1), _RESTARTS)
    found = [search.run(np.random.RandomState([seed, run])) for run in range(restarts)]
    held_out = np.isin(groups, sorted(min(found, key=lambda each: each[0])[1]))
    if not held_out.any():
        hint = "Each class is in one group, so that no group can be held out."
        raise invalid("groups", "several of a class", f"{len(members)} groups", hint=hint)
    single = np.setdiff1d(labels, labels[held_out])
    if len(single):
        message = f"nothing is held out of classes in too few groups: {quoted(single.tolist())}"
        warnings.warn(message, SingleSampleWarning, stacklevel=3)
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)


class _GroupSearch:
    """Search for the groups to hold out: each is moved while that brings the classes nearer.

    Args:
        members: Samples of each class in each group.
        counts: Samples of each class.
        share: That is to be held out of each class.
        min_kept: Groups of a class that stay, if it has more.
    """

    def __init__(
        self, members: list[list[tuple[int, int]]], counts: list[int], share: float, min_kept: int
    ) -> None:
        self.members = members
        self.counts = counts
        self.total = sum(counts)
        self.targets = [share * count for count in counts]
        self.of_class = [0] * len(counts)
        for group in members:
            for label, _ in group:
                self.of_class[label] += 1
        self.least = [min(min_kept, max(n - 1, 1)) for n in self.of_class]

    def run(self, random: np.random.RandomState) -> tuple[float, set[int]]:
        """One search from a random order: what it costs, and the groups that are held out."""
        order = random.permutation(len(self.members)).tolist()
        held = [0] * len(self.counts)
        left = list(self.of_class)
        chosen: set[int] = set()
        for _ in range(_PASSES):
            moved = [group for group in order if self._move(group, held, left, chosen)]
            if not moved:
                break
        return sum(map(self._cost, range(len(held)), held)), chosen

    def _cost(self, label: int, held: int) -> float:
        if not self.counts[label]:
            return 0.0
        absent = held == 0 and self.of_class[label] > 1
        miss = (held - self.targets[label]) ** 2 / self.counts[label]
        return miss + (self.total if absent else 0)

    def _move(self, group: int, held: list[int], left: list[int], chosen: set[int]) -> bool:
        """Move a group to the other part if that is allowed and better."""
        out = group in chosen
        sign = -1 if out else 1
        if not out and any(left[label] <= self.least[label] for label, _ in self.members[group]):
            return False
        gain = sum(
            self._cost(label, held[label]) - self._cost(label, held[label] + sign * size)
            for label, size in self.members[group]
        )
        if gain <= _WORTHWHILE:
            return False
        for label, size in self.members[group]:
            held[label] += sign * size
            left[label] -= sign
        (chosen.discard if out else chosen.add)(group)
        return True
