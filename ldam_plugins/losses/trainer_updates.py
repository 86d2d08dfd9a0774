"""What a loss relies on when the Trainer of transformers divides an update into parts."""

from __future__ import annotations

import sys
from typing import Any

import torch

from ldam_plugins._validation import invalid

HOST_IGNORES = -100
"""The label that the Trainer leaves out when it counts the items of an update."""


def check_item_count(counted: Any, ignore_index: int) -> None:
    """Check that a loss called by the Trainer can be divided by the items of the whole update.

    Args:
        counted: ``num_items_in_batch``, the Trainer's count; None where it was not handed on.
        ignore_index: Label that the loss leaves out.

    Raises:
        ValueError: the count has rows that the loss leaves out, or it is missing while a Trainer
            that accumulates gradients or trains in several processes computes a loss to train on.
    """
    if counted is not None:
        check_ignored(ignore_index)
    elif torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _check_one_part()


def check_ignored(ignore_index: int) -> None:
    """Check that the loss leaves out what the Trainer leaves out of its count.

    Raises:
        ValueError: it leaves out another label.
    """
    if ignore_index != HOST_IGNORES:
        hint = (
            "The Trainer counts every label but -100, so the loss would be divided by too many "
            f"items. Label such rows -100 instead of {ignore_index}: `train_dataset.map(...)`."
        )
        raise invalid("ignore_index", f"{HOST_IGNORES} here", ignore_index, hint=hint)


def _check_one_part() -> None:
    trainer = _calling_trainer()
    if trainer is None:
        return
    parts, processes = trainer.args.gradient_accumulation_steps, trainer.args.world_size
    scaled = trainer.compute_loss_func is not None or trainer.model_accepts_loss_kwargs
    divides = not scaled or getattr(trainer, "loss_is_scaled_for_ga", None) is False
    if parts * processes > 1 and not divides:
        hint = (
            f"An update has {parts} micro-batches on {processes} processes and is divided by all "
            f"its items. Let compute_loss() of {type(trainer).__name__} hand the count on: "
            "`super().compute_loss(model, inputs, return_outputs, num_items_in_batch)`. A model "
            "that keeps it to itself is trained with callbacks=[DRWCallback()]."
        )
        expected = "given where an update has several parts"
        raise invalid("num_items_in_batch", expected, None, hint=hint)


def _calling_trainer() -> Any:
    """The nearest ``transformers.Trainer`` on the stack of calls, without importing it."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if any((c.__module__, c.__name__) == _TRAINER for c in type(owner).__mro__):
            return owner
        frame = frame.f_back
    return None


_TRAINER = ("transformers.trainer", "Trainer")
