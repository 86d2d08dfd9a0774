"""Logits in the output of a model, and class indices in a batch, for losses and metrics alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ldam_plugins._validation import invalid

RETURN_A_DICT = 'Let `forward` return {"logits": logits, ...}.'
"""What to write where logits are not found."""


def find_logits(outputs: Any, rows: int, classes: int, hint: str = RETURN_A_DICT) -> Any:
    """The logits (N, C) of a model's output.

    An output that is a tensor or array is the logits. Of others they are what is named ``logits``,
    as an attribute or a key; where nothing is, the one member of shape (N, C), wherever it stands.

    Args:
        outputs: A tensor, an array, a tuple or list, a mapping, or an object with ``logits``.
        rows: N, the number of labels.
        classes: C, the number of classes.
        hint: What the error tells the user to write.

    Returns:
        A tensor or array. Its shape is the caller's to check where it was named or alone.

    Raises:
        ValueError: no member of the output has the shape (N, C), or several have.
    """
    named = _named(outputs)
    found = outputs if named is None else named
    if _is_array(found):
        return found
    members = _members(found)
    fitting = [member for member in members if _shape(member) == (rows, classes)]
    if len(fitting) == 1:
        return fitting[0]
    expected = f"one with a single tensor of shape ({rows}, {classes}), the logits, or one so named"
    shown = [_shape(member) for member in members] or type(found).__name__
    raise invalid("model output", expected, shown, hint=hint)


def one_label_a_row(labels: Any) -> Any:
    """Class indices of shape (N, 1) as (N,); other labels as they are.

    The classifiers of transformers take both shapes. Floating labels (N, 1) are soft targets of one
    class and stay.
    """
    if getattr(labels, "ndim", 1) == 2 and labels.shape[1] == 1 and not _is_floating(labels):
        return labels.reshape(-1)
    return labels


def _is_floating(labels: Any) -> bool:
    return labels.is_floating_point() if isinstance(labels, Tensor) else labels.dtype.kind == "f"


def _named(outputs: Any) -> Any:
    if isinstance(outputs, Mapping):
        return outputs.get("logits")
    return getattr(outputs, "logits", None)


def _members(outputs: Any) -> list[Any]:
    if isinstance(outputs, Mapping):
        return list(outputs.values())
    return list(outputs) if isinstance(outputs, tuple | list) else []


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "ndim")


def _shape(value: Any) -> Any:
    return tuple(value.shape) if _is_array(value) else type(value).__name__
