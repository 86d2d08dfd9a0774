"""Splits of the training samples that keep the share of each class."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction
from typing import Any

import numpy as np

from ldam_plugins._validation import check_int, check_real, invalid, quoted
from ldam_plugins.counts import check_label_range, label_array


class SingleSampleWarning(UserWarning):
    """Classes with a single sample stay in training, so that nothing of them is held out."""


def stratified_split(labels: Any, share: float, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the samples to train on and of those held out, ``share`` of each class.

    Of a class with n samples ``share * n`` are held out, rounded half up, but at least one and at
    most n - 1. A class with a single sample is kept, with a :class:`SingleSampleWarning` that names
    it: long-tailed sets have such classes, and no model learns a class that it never sees. They are
    ``np.setdiff1d(labels, labels[held_out])``; ``warnings.simplefilter("error",
    SingleSampleWarning)`` makes an error of the warning.

    Class c holds out the first of its samples in a shuffle by NumPy's legacy generator
    ``RandomState([seed, c])``, whose numbers are the same on every machine and in every version.
    So the split of a class depends on its own samples, ``share`` and ``seed`` only.

    Args:
        labels: Class indices (N,); see :meth:`ClassCounts.from_labels`.
        share: Share that is held out, in (0, 1), taken as the decimal number it is written as.
        seed: Seed of the choice, in 0..2**32 - 1.

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
            held_out[members[: min(max(rounded, 1), count - 1)]] = True
    single = np.flatnonzero(counts == 1)
    if len(single):
        message = f"nothing is held out of classes with a single sample: {quoted(single.tolist())}"
        warnings.warn(message, SingleSampleWarning, stacklevel=2)
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
