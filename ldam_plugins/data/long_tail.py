"""Long-tail profiles, and which samples of a set are kept under one."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from ldam_plugins._validation import check_choice, check_int, check_real, invalid
from ldam_plugins.choices import CLASS_ORDERS, PROFILES
from ldam_plugins.counts import check_label_range, label_array

_ROUNDING = 1e-13
"""Relative error that a power in double precision stays below."""


def long_tail_counts(
    n_max: int, num_classes: int, ratio: float = 100.0, profile: str = "exp"
) -> np.ndarray:
    """Samples to keep of each class, from head to tail, shape (C,) int64.

    ``exp``: ``int(n_max * ratio ** -(c / (C - 1)))``. ``step``: the first ``C // 2`` classes
    keep ``n_max``, the others ``int(n_max / ratio)``. ``none``: all keep ``n_max``.

    Source: Cao et al., NeurIPS 2019, arXiv 1906.07413, section 4, and Cui et al., CVPR 2019.

    Args:
        n_max: Samples of the largest class.
        num_classes: C.
        ratio: Imbalance ratio n_max / n_min, at least 1.
        profile: ``"exp"``, ``"step"`` or ``"none"``.

    Raises:
        ValueError: unknown profile, ``ratio`` below 1, or so large that a class keeps nothing.

    Example:
        >>> long_tail_counts(5000, 10, ratio=100)
        array([5000, 2997, 1796, 1077,  645,  387,  232,  139,   83,   50])
    """
    check_int("n_max", n_max, low=1)
    check_int("num_classes", num_classes, low=1)
    check_choice("profile", profile, PROFILES)
    ratio = check_real("ratio", ratio, low=1)
    kept = np.full(num_classes, n_max)
    if profile == "exp" and num_classes > 1:
        last = num_classes - 1
        kept = np.array([_share(n_max, ratio, c, last) for c in range(num_classes)])
    elif profile == "step":
        kept[num_classes // 2 :] = _share(n_max, ratio, 1, 1)
    if kept.min() == 0:
        hint = f"Use a ratio of at most {n_max}."
        expected = f"small enough that every class keeps a sample of {n_max}"
        raise invalid("ratio", expected, ratio, hint=hint)
    return kept


def _share(n_max: int, ratio: float, numerator: int, denominator: int) -> int:
    """``int(n_max * ratio ** -(numerator / denominator))`` without an error of rounding.

    Floating point has 4900 / 49 a little below 100. Where it is so near to an integer that rounding
    could decide, integers do: ``whole <= n_max * ratio ** -(p / q)`` if and only if
    ``whole ** q * ratio ** p <= n_max ** q``.
    """
    if ratio == 1:
        return n_max
    share = n_max * ratio ** -(numerator / denominator)
    whole = round(share)
    if abs(share - whole) > _ROUNDING * share:
        return int(share)
    exact = Fraction(str(ratio))  # 1.1 is meant as 11/10
    common = math.gcd(numerator, denominator)
    p, q = numerator // common, denominator // common
    return whole if Fraction(whole) ** q * exact**p <= n_max**q else whole - 1


def long_tail_indices(
    labels: Any,
    ratio: float = 100.0,
    profile: str = "exp",
    seed: int = 0,
    num_classes: int | None = None,
    class_order: str = "size",
) -> np.ndarray:
    """Indices of the samples a long-tailed version of a set keeps, in class order.

    Classes are ranked by size, the largest first and equal ones by index. The class of rank r
    keeps ``min(n, long_tail_counts(n_max, C, ratio, profile)[r])`` of its n samples, n_max being
    those of the largest class: the first of one shuffle a class, in class order, of that class's
    indices by NumPy's legacy generator seeded with ``seed``. Of a balanced set this is the choice
    that the paper's authors make, index for index.

    On other sets their code ranks classes by index and takes the mean class size ``N // C`` for
    n_max, whatever the classes have; ``class_order="index"`` does as it does.

    Args:
        labels: Class indices (N,); see :meth:`ClassCounts.from_labels`.
        ratio: Imbalance ratio, at least 1.
        profile: ``"exp"``, ``"step"`` or ``"none"`` (keeps everything, in its own order).
        seed: Seed of the generator, in 0..2**32 - 1.
        num_classes: C. Default: the largest label + 1.
        class_order: ``"size"`` or ``"index"``, which differ for unbalanced sets only.

    Raises:
        ValueError: bad ratio, profile, order or label, or a class that would keep nothing.

    Example:
        >>> labels = [0] * 20 + [1] * 400 + [2] * 100
        >>> np.bincount(np.array(labels)[long_tail_indices(labels, ratio=100)])
        array([  4, 400,  40])
    """
    array = label_array(labels)
    check_choice("profile", profile, PROFILES)
    check_choice("class_order", class_order, CLASS_ORDERS)
    check_int("seed", seed, low=0, high=2**32 - 1)
    if len(array) == 0:
        raise invalid("labels", "at least one label", "none")
    classes = num_classes if num_classes is not None else int(array.max()) + 1
    check_label_range(array, check_int("num_classes", classes, low=1))
    if profile == "none":
        check_real("ratio", ratio, low=1)
        return np.arange(len(array))
    available = np.bincount(array, minlength=classes)
    if available.min() == 0:
        empty = int(np.argmin(available))
        raise ValueError(f"no training sample in class {empty}: nothing of it can be kept")
    by_size = class_order == "size"
    order = np.argsort(-available, kind="stable") if by_size else np.arange(classes)
    n_max = int(available.max()) if by_size else len(array) // classes
    expected = np.empty(classes, dtype=np.int64)
    expected[order] = long_tail_counts(n_max, classes, ratio, profile)
    generator = np.random.RandomState(seed)
    chosen = []
    for label, count in enumerate(np.minimum(expected, available)):
        members = np.flatnonzero(array == label)
        generator.shuffle(members)
        chosen.append(members[:count])
    return np.concatenate(chosen)
