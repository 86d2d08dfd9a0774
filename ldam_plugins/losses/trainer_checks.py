"""What a loss checks of the ``transformers.Trainer`` that calls its ``compute_loss_func``.

A Trainer calls the loss once for each micro-batch and process. It tells the number of labels of the
whole optimizer step, by which the loss divides, and it makes predictions of the same outputs.
"""

from __future__ import annotations

from typing import Any

import torch

from ldam_plugins._call_stack import find_trainer
from ldam_plugins._validation import invalid
from ldam_plugins.losses.model_outputs import RETURN_A_DICT

HOST_IGNORES = -100
"""The label that the Trainer leaves out when it counts the labels of an optimizer step."""


def check_item_count(count: Any, ignore_index: int) -> None:
    """Check that the loss can be divided by the labels of the whole optimizer step.

    Args:
        count: ``num_items_in_batch``, the Trainer's count of labels; None where it is not known.
        ignore_index: Label of the rows that the loss leaves out.

    Raises:
        ValueError: the count includes rows that the loss leaves out; or it is missing while a
            Trainer that accumulates gradients or trains in several processes is training.
    """
    if count is not None:
        check_ignored(ignore_index)
    elif torch.is_grad_enabled() and not torch.compiler.is_compiling():
        _check_one_part()


def check_ignored(ignore_index: int) -> None:
    """Check that the loss leaves out the rows that the Trainer leaves out of its count.

    Raises:
        ValueError: ``ignore_index`` is not -100.
    """
    if ignore_index != HOST_IGNORES:
        hint = (
            "The Trainer counts every label but -100, so the loss would be divided by too many "
            f"items. Label such rows -100 instead of {ignore_index}: `train_dataset.map(...)`."
        )
        raise invalid("ignore_index", f"{HOST_IGNORES} here", ignore_index, hint=hint)


def check_predictions(outputs: Any, logits: Any) -> None:
    """Check that the calling Trainer would predict the ``logits`` that the loss is computed from.

    Where the loss is given, ``Trainer.prediction_step`` takes the first item of every output that
    is no dict for a loss and drops it (transformers 5.23): of logits that are a tensor the first
    row, of a tuple that begins with the logits all of them. A subclass with a ``compute_loss`` or
    ``prediction_step`` of its own may do otherwise and is not checked.

    Args:
        outputs: What the model returned.
        logits: The part of it that :func:`.find_logits` found.

    Raises:
        ValueError: the output is no dict, and its first item belongs to the logits.
    """
    if isinstance(outputs, dict):
        return
    later = isinstance(outputs, tuple | list) and outputs[0] is not logits
    if not later and _drops_first_item(find_trainer("compute_loss")):
        expected = "one whose `forward` returns a dict with `logits` (or a ModelOutput)"
        why = "Of other outputs the Trainer drops the first item, in predict() and for metrics."
        hint = f"{RETURN_A_DICT} {why}"
        raise invalid("model", expected, f"a {type(outputs).__name__}", hint=hint)


def _check_one_part() -> None:
    """Check that an optimizer step is one micro-batch of one process, or divided by the Trainer."""
    trainer = find_trainer()
    if trainer is None:
        return
    parts, processes = trainer.args.gradient_accumulation_steps, trainer.args.world_size
    counts = trainer.compute_loss_func is not None or trainer.model_accepts_loss_kwargs
    divides = not counts or getattr(trainer, "loss_is_scaled_for_ga", None) is False
    if parts * processes > 1 and not divides:
        hint = (
            f"An update has {parts} micro-batches on {processes} processes and is divided by all "
            f"its items. Let compute_loss() of {type(trainer).__name__} hand the count on: "
            "`super().compute_loss(model, inputs, return_outputs, num_items_in_batch)`. A model "
            "that keeps it to itself is trained with callbacks=[DRWCallback()]."
        )
        expected = "given where an update has several parts"
        raise invalid("num_items_in_batch", expected, None, hint=hint)


def _drops_first_item(trainer: Any) -> bool:
    """Whether losses and predictions are computed by transformers, not by a subclass."""
    if trainer is None:
        return False
    kind = type(trainer)
    steps = (kind.compute_loss, kind.prediction_step)
    return all(step.__module__.startswith("transformers.") for step in steps)
