"""Training samples per class, and everything that follows from them alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldam_plugins._validation import check_int, check_real, invalid, quoted
from ldam_plugins.choices import DEFAULT_MAX_MARGIN, FEW_BELOW, MANY_ABOVE


class ClassCounts:
    """Number of training samples of each class, n_c.

    Args:
        counts: One positive integer a class, in class order: sequence, array or tensor. Or by
            class: a mapping or pandas Series with the classes 0..C-1 as keys or index, in any order
            (``df.label.value_counts()`` is in order of frequency).
        class_names: Optional name of each class, used in messages and tables.
        many_above: Classes with more samples are the *many* of :meth:`groups`.
        few_below: Classes with fewer samples are the *few*.

    Raises:
        TypeError: ``counts`` or limits are not integers.
        ValueError: fewer than one class, a negative count, a class without a sample, a number of
            names that differs from the number of counts, keys other than 0..C-1, or limits by which
            a class could be both many and few.

    Example:
        >>> counts = ClassCounts([5000, 500, 50])
        >>> counts.imbalance_ratio
        100.0
        >>> counts.margins(max_margin=0.5)
        tensor([0.1581, 0.2812, 0.5000])
        >>> counts.groups()
        {'many': [0, 1], 'medium': [2], 'few': []}
    """

    def __init__(
        self,
        counts: Sequence[int] | Mapping[int, int] | np.ndarray | Tensor,
        class_names: Sequence[str] | None = None,
        *,
        many_above: int = MANY_ABOVE,
        few_below: int = FEW_BELOW,
    ) -> None:
        array = _as_integers("counts", _in_class_order(counts)).copy()
        if len(array) == 0:
            raise invalid("counts", "one count per class", counts)
        names = _checked_names(class_names, len(array))
        _refuse_empty_classes(array, names)
        array.flags.writeable = False
        self.counts: np.ndarray = array
        self.class_names: tuple[str, ...] | None = names
        self.many_above = check_int("many_above", many_above, low=0)
        self.few_below = check_int("few_below", few_below, low=0)
        if few_below > many_above + 1:
            hint = "A class is not both many and few."
            raise invalid(
                "few_below", f"<= many_above + 1 = {many_above + 1}", few_below, hint=hint
            )

    @classmethod
    def from_labels(
        cls,
        labels: Any,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
    ) -> ClassCounts:
        """Count the labels of a training set.

        Args:
            labels: Class indices 0..C-1: a sequence, array, tensor, or column of a
                ``datasets.Dataset`` (read without decoding any other column).
            num_classes: C. Default: the number of names if given, else the largest label + 1.
            class_names: Optional name of each class.

        Raises:
            TypeError: labels are not integers (strings, floats, rows of several labels).
            ValueError: no labels, a missing one, a label outside 0..C-1, classes not numbered from
                0, or a class without a sample.

        Example:
            >>> ClassCounts.from_labels([0, 0, 1, 0, 2]).counts
            array([3, 1, 1])
        """
        array = label_array(labels)
        if len(array) == 0:
            raise invalid("labels", "at least one label", "none")
        if num_classes is None:
            num_classes = int(array.max()) + 1 if class_names is None else len(class_names)
        check_int("num_classes", num_classes, low=1)
        check_label_range(array, num_classes)
        counts = np.bincount(array, minlength=num_classes)
        names = _checked_names(class_names, num_classes)
        _refuse_empty_classes(counts, names, advice=_numbering_advice(counts))
        return cls(counts, names)

    def __len__(self) -> int:
        return len(self.counts)

    def __repr__(self) -> str:
        shown = ", ".join(str(count) for count in self.counts[:10])
        more = f", ... ({len(self)} classes)" if len(self) > 10 else ""
        return f"ClassCounts([{shown}{more}])"

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ClassCounts)
            and np.array_equal(self.counts, other.counts)
            and self.limits == other.limits
        )

    def __hash__(self) -> int:
        return hash(self.counts.tobytes())

    @property
    def limits(self) -> dict[str, int]:
        """``many_above`` and ``few_below``, by name."""
        return {"many_above": self.many_above, "few_below": self.few_below}

    def with_limits(self, *, many_above: int, few_below: int) -> ClassCounts:
        """The same counts and names with other limits of :meth:`groups`.

        Raises:
            TypeError: a limit is not an integer.
            ValueError: a negative limit, or such that a class could be both many and few.
        """
        limits = {"many_above": many_above, "few_below": few_below}
        return ClassCounts(self.counts, self.class_names, **limits)

    @property
    def total(self) -> int:
        """N, the number of training samples."""
        return int(self.counts.sum())

    @property
    def imbalance_ratio(self) -> float:
        """n_max / n_min, at least 1."""
        return float(self.counts.max() / self.counts.min())

    def margins(
        self, max_margin: float = DEFAULT_MAX_MARGIN, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """LDAM margins ``m_c = max_margin * (n_c / n_min) ** -1/4``, shape (C,).

        The rarest class gets ``max_margin``. Unit: cosine, so before the head's scale.
        Computed in float64 and rounded to ``dtype`` (default: torch's default, but at least
        float32). The tensor is on the CPU, whatever the default device is.

        Source: Cao et al., NeurIPS 2019, arXiv 1906.07413, section 3.2.

        Raises:
            ValueError: ``max_margin`` is negative or not finite.
        """
        check_real("max_margin", max_margin, low=0)
        return _tensor(max_margin * (self.counts / self.counts.min()) ** -0.25, dtype)

    def weights(self, beta: float = 0.9999, *, dtype: torch.dtype | None = None) -> Tensor:
        """Class-balanced weights ``w_c ~ (1 - beta) / (1 - beta ** n_c)``, sum C, shape (C,).

        ``1 - beta ** n`` over ``1 - beta`` is the effective number of n samples. ``beta = 0``
        gives ones, ``beta -> 1`` inverse frequency. Computed in float64 without cancellation;
        dtype and device are as in :meth:`margins`.

        Source: Cui et al., CVPR 2019, arXiv 1901.05555.

        Raises:
            ValueError: ``beta`` is outside [0, 1).

        Example:
            >>> ClassCounts([900, 90]).weights(beta=0.999)
            tensor([0.2534, 1.7466])
        """
        check_real("beta", beta, low=0, high=1, high_open=True)
        if beta == 0:
            return _tensor(np.ones(len(self)), dtype)
        # For beta > 1/2, 1 - beta is exact in floating point and log1p of it keeps every digit.
        log_beta = np.log1p(-(1.0 - beta)) if beta > 0.5 else np.log(beta)
        raw = 1.0 / -np.expm1(self.counts * log_beta)
        return _tensor(raw * (len(self) / raw.sum()), dtype)

    def prior(self, *, dtype: torch.dtype | None = None) -> Tensor:
        """Share of each class in the training set, ``n_c / N``, shape (C,), sums to 1."""
        return _tensor(self.counts / self.total, dtype)

    def groups(self) -> dict[str, list[int]]:
        """Class indices by size: many (> 100 samples), medium (20..100) and few (< 20).

        Or by the limits that the counts were made with, ``many_above`` and ``few_below``.

        Source: Liu et al., CVPR 2019, arXiv 1904.05160.
        """
        many, few = self.counts > self.many_above, self.counts < self.few_below
        masks = {"many": many, "medium": ~(many | few), "few": few}
        return {name: np.flatnonzero(mask).tolist() for name, mask in masks.items()}


def label_array(labels: Any) -> np.ndarray:
    """Labels as an int64 array (N,), read without decoding other columns of their dataset.

    The array may share the caller's memory: do not write to it.

    Raises:
        TypeError: labels are not integers, or a row holds more than one.
        ValueError: labels are not one-dimensional, or one is missing.
    """
    source, column = getattr(labels, "source", None), getattr(labels, "column_name", None)
    if source is not None and hasattr(source, "select_columns"):
        table = source.select_columns([column]).with_format("arrow")[:][column]
        labels = table.to_pylist() if table.null_count else table.to_numpy()
    array = _plain_array(labels)
    if array is not None and array.ndim == 0:
        raise invalid("labels", "one-dimensional", labels)
    if array is not None and array.ndim == 1 and (array.dtype.kind in "iu" or not array.size):
        return _as_integers("labels", array)
    fault, row, value = label_fault(labels if array is None else array)
    expected, hint = _LABEL_FAULTS[fault]
    shown = value if row in (None, 0) else f"{value} in row {row}"
    error = ValueError if fault in ("missing", "column") else TypeError
    raise invalid("labels", expected, shown, hint=hint, error=error)


_LABEL_FAULTS = {
    "missing": ("given for every row", "Leave out the rows without a label."),
    "column": (
        "one-dimensional",
        "Drop the second axis: `labels.squeeze(-1)`, `np.ravel(labels)`.",
    ),
    "soft": ("integers, one a row", "Soft labels have no counts: give those of the classes."),
    "several": ("integers, one a row", "Give the index of one class, not several labels, a row."),
    "bool": ("integers", "Write `np.asarray(labels).astype(int)`."),
    "whole": ("integers", "Map floats to class indices: `np.asarray(labels).astype(int)`."),
    "other": ("integers", "Map class names or floats to class indices 0..C-1 first."),
}


def label_fault(values: Any) -> tuple[str, int | None, Any]:
    """Why labels are no class indices (N,), in which row, and the value there.

    Args:
        values: Labels that are not integers (N,): an array, a tensor or a sequence.

    Returns:
        The fault, the row that has it (None: all rows), and the label of that row. Faults:
        ``"missing"`` (None or NaN), ``"column"`` (N, 1), ``"soft"`` (rows of floats),
        ``"several"`` (rows of several labels), ``"bool"``, ``"whole"`` (floats without a
        fraction), ``"other"`` (names, fractions).
    """
    rows = [v.tolist() if isinstance(v, Tensor | np.ndarray | np.generic) else v for v in values]
    missing = next((row for row, value in enumerate(rows) if _is_missing(value)), None)
    if missing is not None:
        return "missing", missing, rows[missing]
    first = rows[0] if rows else None
    if any(isinstance(row, list | tuple) for row in rows):
        lists = [row if isinstance(row, list | tuple) else [row] for row in rows]
        if all(len(row) == 1 for row in lists):
            return "column", None, f"shape ({len(rows)}, 1)"
        floats = any(isinstance(value, float) for value in lists[0])
        return "soft" if floats else "several", None, first
    if all(isinstance(row, bool) for row in rows):
        return "bool", None, first
    broken = (row for row, value in enumerate(rows) if not _is_whole(value))
    row = next(broken, None)
    return ("whole", None, first) if row is None else ("other", row, rows[row])


def _is_missing(value: Any) -> bool:
    if value is None or type(value).__name__ in ("NAType", "NaTType"):  # those of pandas
        return True
    return isinstance(value, float) and math.isnan(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, float) and value.is_integer()


def _plain_array(values: Any) -> np.ndarray | None:
    """``values`` as an array, None where they have no common shape."""
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        return (values.double() if values.is_floating_point() else values).numpy()
    if isinstance(values, list | tuple) and values and isinstance(values[0], Tensor):
        values = [v.tolist() if isinstance(v, Tensor) else v for v in values]  # from any device
    try:
        array = np.asarray(values)
    except ValueError:
        return None
    if array.dtype == object and all(type(value) is int for value in array.flat):
        return array.astype(np.int64)
    return array


def check_label_range(labels: np.ndarray, num_classes: int) -> None:
    """Check that every label lies in 0..``num_classes`` - 1.

    Raises:
        ValueError: a label does not; the message names it and its row.
    """
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        row = int(np.flatnonzero((labels < 0) | (labels >= num_classes))[0])
        expected = f"class indices in 0..{num_classes - 1}"
        starts_late = labels.min() > 0 and labels.max() - labels.min() < num_classes
        hint = _start_at_zero(int(labels.min())) if starts_late else ""
        raise invalid("labels", expected, f"{labels[row]} in row {row}", hint=hint)


def _start_at_zero(first: int) -> str:
    return (
        f"Labels count from 0 and the smallest of these is {first}: subtract {first} where they "
        "begin there."
    )


def _numbering_advice(counts: np.ndarray) -> str:
    """What to do with labels of these counts if they leave out classes."""
    if counts[0] == 0:
        return _start_at_zero(int(np.flatnonzero(counts)[0]))
    return "Number classes without gaps: `np.unique(labels, return_inverse=True)[1]` does."


def _in_class_order(counts: Any) -> Any:
    """Counts in class order, where a mapping or Series says which class each belongs to.

    Other counts are returned as they are.

    Raises:
        ValueError: the classes are not 0..C-1, each once; or a table of several columns.
    """
    if hasattr(counts, "columns"):
        hint = "Give the column that holds the counts, with the classes as its index."
        raise invalid("counts", "one-dimensional", type(counts).__name__, hint=hint)
    if isinstance(counts, Mapping):
        keys, values = list(counts), list(counts.values())
    elif hasattr(counts, "to_numpy") and hasattr(counts, "index"):  # a Series of pandas
        keys, values = list(counts.index), counts.to_numpy()
        values = values if np.issubdtype(values.dtype, np.integer) else counts.tolist()
    else:
        return counts
    by_class = {key: place for place, key in enumerate(keys)}
    if len(by_class) < len(keys) or by_class.keys() != set(range(len(keys))):
        hint = (
            "Classes are numbered from 0 without a gap: count the class indices that the model is "
            "trained on, with ClassCounts.from_labels(labels). Counts that are in class order "
            "already go without their index: counts.to_numpy(); a class that is not there, "
            "counts.reindex(range(C), fill_value=0), needs a sample."
        )
        expected = f"indexed by the classes 0..{len(keys) - 1}, each once"
        raise invalid("counts", expected, keys[:10], hint=hint)
    return [values[by_class[label]] for label in range(len(keys))]


def _as_integers(name: str, values: Any) -> np.ndarray:
    """``values`` as an int64 array of shape (n,), without a copy where it is one already."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    array = np.asarray(values)
    if array.size == 0 and array.ndim == 1:
        return np.zeros(0, dtype=np.int64)
    if not np.issubdtype(array.dtype, np.integer):
        hint = "Map class names or floats to class indices 0..C-1 first."
        example = array.flat[0] if array.size else None
        raise invalid(name, "integers", example, hint=hint, error=TypeError)
    if array.ndim != 1:
        raise invalid(name, "one-dimensional", f"shape {array.shape}")
    return array.astype(np.int64, copy=False)


def _checked_names(class_names: Sequence[str] | None, classes: int) -> tuple[str, ...] | None:
    names = None if class_names is None else tuple(str(name) for name in class_names)
    if names is not None and len(names) != classes:
        expected = f"one name for each of the {classes} counts"
        raise invalid("class_names", expected, f"{len(names)} names")
    return names


def _refuse_empty_classes(
    counts: np.ndarray, names: tuple[str, ...] | None, *, advice: str = ""
) -> None:
    """Refuse classes without a sample.

    Args:
        counts: Samples of each class.
        names: Names of the classes for the message.
        advice: A sentence for the message about what may be wrong.
    """
    negative = np.flatnonzero(counts < 0)
    if len(negative):
        first = int(negative[0])
        raise invalid("counts", ">= 1 in every class", f"{counts[first]} in {first}")
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        shown = quoted(int(c) if names is None else names[c] for c in empty)
        hint = "Every class needs a training sample: remove the class or add samples to it."
        raise ValueError(
            " ".join(filter(None, [f"no training sample in class {shown}.", advice, hint]))
        )


def _tensor(values: np.ndarray, dtype: torch.dtype | None) -> Tensor:
    """``values`` on the CPU: the default device may be "meta", which would lose them."""
    tensor = torch.from_numpy(np.asarray(values, dtype=np.float64))
    wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
    return tensor if dtype == torch.float64 else tensor.to(dtype or wide)
