"""Splits of the training samples that keep the share of each class."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from ldam_plugins._validation import check_int, check_real, invalid, quoted
from ldam_plugins.counts import check_label_range, label_array
from ldam_plugins.data.notes import DataNotes


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


def as_part(argument: str, value: float | str | None) -> dict[str, Any]:
    """A part of a data set as ``<argument>`` (its name) and ``test_share`` (a share of another)."""
    part = share_or_name(argument, value)
    is_share = isinstance(part, float)
    return {argument: None if is_share else part, "test_share": part if is_share else None}


def hold_out(
    labels: np.ndarray,
    class_names: Sequence[str],
    share: float,
    *,
    seed: int,
    min_kept: int,
    notes: DataNotes,
) -> tuple[np.ndarray, np.ndarray]:
    """Hold a test part out with :func:`stratified_split`, and note what could not be held out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SingleSampleWarning)  # noted by name instead
        kept, held_out = stratified_split(labels, share, seed=seed, min_kept=min_kept)
    notes.say(
        f"Held out to test on: {len(held_out)} of {len(labels)} examples, {share:g} of each class."
    )
    absent = np.setdiff1d(labels, labels[held_out])
    if len(absent):
        names = quoted(class_names[label] for label in absent)
        notes.say(f"Classes of which the only example is trained on, {len(absent)}: {names}.")
    return kept, held_out


def stratified_split(
    labels: Any, share: float, *, seed: int = 0, min_kept: int = 1
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

    Args:
        labels: Class indices (N,); see :meth:`ClassCounts.from_labels`.
        share: Share that is held out, in (0, 1), taken as the decimal number it is written as.
        seed: Seed of the choice, in 0..2**32 - 1.
        min_kept: Samples that a class keeps if it has more. 2 where another part is held out of
            those later, so that a class of three has one in each part.

    Returns:
        Two int64 arrays of indices, each sorted, that together are ``0..N - 1``.

    Raises:
        TypeError: ``labels`` are not integers, or ``share`` is not a number.
        ValueError: ``share`` or ``seed`` out of range, a negative label, or no class with two
            samples.

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
