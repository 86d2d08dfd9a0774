"""Where the logits of a model's output are: the one answer for losses and metrics."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ldam_plugins._validation import invalid

_RETURN_A_DICT = 'Let `forward` return {"logits": logits, ...}.'


def find_logits(outputs: Any, rows: int, classes: int, hint: str = _RETURN_A_DICT) -> Any:
    """The logits (N, C) of a model's output.

    These are the output itself where it is a tensor or array; else its ``logits``, an attribute or
    a key; else the one of its members that has the shape (N, C), wherever it stands.

    Args:
        outputs: A tensor, an array, a tuple or list, a mapping, or an object with ``logits``.
        rows: N, the rows of the labels.
        classes: C.
        hint: What to write where they are not found.

    Raises:
        ValueError: no member, or more than one, has that shape.
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


def refuse_lost_logits(outputs: Any, logits: Any) -> None:
    """Refuse an output of which the calling Trainer would not predict the ``logits``.

    Where the loss is given, ``Trainer.prediction_step`` takes the first item of every output that
    is no dict for the loss of the model and drops it (transformers 5.23): of logits that
    are a tensor the first row, of a tuple that begins with the logits all of them. One whose
    ``compute_loss`` or ``prediction_step`` is its user's own may do otherwise; nothing is said
    then, nor where no Trainer calls.

    Args:
        outputs: What the model returned.
        logits: The part of it that :func:`find_logits` found.

    Raises:
        ValueError: the output is no dict, and its first item belongs to the logits.
    """
    if isinstance(outputs, dict):
        return
    later = isinstance(outputs, tuple | list) and outputs[0] is not logits
    if not later and _trainer_drops_first():
        expected = "one whose `forward` returns a dict with `logits` (or a ModelOutput)"
        why = "Of other outputs the Trainer drops the first item, in predict() and for metrics."
        hint = f"{_RETURN_A_DICT} {why}"
        raise invalid("model", expected, f"a {type(outputs).__name__}", hint=hint)


def one_label_a_row(labels: Any) -> Any:
    """Class indices of shape (N, 1) as (N,), as the classifiers of transformers take them."""
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


def _trainer_drops_first() -> bool:
    """Whether the caller is a Trainer whose steps of prediction are those of transformers."""
    frame = inspect.currentframe()
    try:
        while frame is not None:
            owner: Any = frame.f_locals.get("self")
            if frame.f_code.co_name == "compute_loss" and hasattr(owner, "prediction_step"):
                kind: Any = type(owner)
                steps = (kind.compute_loss, kind.prediction_step)
                return all(step.__module__.startswith("transformers.") for step in steps)
            frame = frame.f_back
    finally:
        del frame  # a frame that refers to itself would keep its locals alive
    return False
