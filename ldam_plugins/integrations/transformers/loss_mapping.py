"""LDAM as an entry of transformers' table of losses, for ``config.loss_type = "LDAM"``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.loss.loss_utils import LOSS_MAPPING

from ldam_plugins._validation import invalid
from ldam_plugins.losses.ldam import LDAMLoss

LOSS_TYPE = "LDAM"


def register() -> None:
    """Make ``config.loss_type = "LDAM"`` work for models that ask transformers for their loss.

    Those are the 52 sequence and 41 image classifiers (of 136 and 46, transformers 5.23) that
    call ``self.loss_function``; the others compute cross-entropy in line and need
    :class:`.DRWCallback`, and so does deferred re-weighting, gradient
    accumulation and training on several devices. ``model.loss_type = "LDAM"`` works as well.
    The config also says ``class_counts`` (a list) and, if not the defaults, ``ldam_options``
    (``{"max_margin": 0.3, "scale": 30.0}``). Calling it twice changes nothing.
    """
    stock = LOSS_MAPPING["ForSequenceClassification"]
    if hasattr(stock, "ldam_of"):
        return
    LOSS_MAPPING[LOSS_TYPE] = ldam_of_config
    for task, loss in list(LOSS_MAPPING.items()):
        if loss is stock:
            LOSS_MAPPING[task] = _choose_by_config(stock)


def ldam_of_config(
    labels: Tensor,
    pooled_logits: Tensor,
    config: Any,
    num_items_in_batch: Tensor | int | None = None,
    **_: Any,
) -> Tensor:
    """LDAM of ``config.class_counts``; plain cross-entropy while gradients are off.

    Args:
        labels: (N,) int64.
        pooled_logits: (N, C), of a cosine head with the scale of ``config.ldam_options``.
        config: Configuration of the model, see :func:`register`.
        num_items_in_batch: What to divide by, if the model hands it on; None: the batch's rows.

    Raises:
        ValueError: ``config.class_counts`` is missing.
    """
    counts = getattr(config, "class_counts", None)
    if counts is None:
        hint = "Write `config.class_counts = [...]`, the training samples of each class."
        raise invalid("config.class_counts", "one count per class", None, hint=hint)
    options = getattr(config, "ldam_options", None) or {}
    criterion = _criterion(tuple(counts), tuple(sorted(options.items())), pooled_logits.device)
    labels = labels.to(pooled_logits.device)
    return criterion.compute_loss_func({"logits": pooled_logits}, labels, num_items_in_batch)


@torch.compiler.disable  # runs once for a model, and numpy is no part of its graph
@functools.lru_cache(maxsize=16)
def _criterion(
    counts: tuple[int, ...], options: tuple[tuple[str, float], ...], device: torch.device
) -> LDAMLoss:
    return LDAMLoss(counts, **dict(options)).to(device)


def _choose_by_config(stock: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The stock loss of a task, unless the model's config asks for LDAM."""

    @functools.wraps(stock)
    def loss(labels: Tensor, pooled_logits: Tensor, config: Any, **options: Any) -> Tensor:
        if getattr(config, "loss_type", None) == LOSS_TYPE:
            return ldam_of_config(labels, pooled_logits, config, **options)
        return stock(labels, pooled_logits, config, **options)

    loss.ldam_of = LOSS_TYPE  # type: ignore[attr-defined]
    return loss
