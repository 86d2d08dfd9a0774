"""Checks of logits and targets, apart from :mod:`._validation`, which needs no torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ldam_plugins._validation import invalid


def check_logits(logits: Tensor) -> None:
    """Check that ``logits`` is a floating tensor of shape (N, C).

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: another number of dimensions, or no column.
    """
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        shown = getattr(logits, "dtype", type(logits).__name__)
        raise invalid("logits", "a floating-point tensor", shown, error=TypeError)
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise invalid("logits", "of shape (N, C)", tuple(logits.shape))


def check_target(target: Tensor, logits: Tensor) -> None:
    """Check that ``target`` holds class indices (N,) or soft targets (N, C) for ``logits``.

    Out-of-range indices are left to the kernels, which check them where that needs no
    synchronisation with the device.

    Raises:
        TypeError: dtype is neither int64 (indices) nor floating (soft targets).
        ValueError: the shape fits neither form.
    """
    if target.shape == logits.shape[:1]:
        if target.dtype != torch.int64:
            hint = "Class indices are int64: use `target.long()`."
            raise invalid(
                "target", "an int64 tensor of indices", target.dtype, hint=hint, error=TypeError
            )
    elif target.shape == logits.shape:
        if not target.is_floating_point():
            hint = "Soft targets are floats (mixup, label smoothing): use `target.float()`."
            raise invalid("target", "floating-point", target.dtype, hint=hint, error=TypeError)
    else:
        expected = f"of shape ({len(logits)},) or {tuple(logits.shape)}"
        raise invalid("target", expected, tuple(target.shape))
