"""Metrics of a classifier on a test set that several processes share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, broadcast
from torch import Tensor, nn

from ldam_plugins.counts import ClassCounts
from ldam_plugins.metrics import MetricAccumulator


@torch.inference_mode()
def evaluate(
    accelerator: Accelerator,
    net: nn.Module,
    loader: Iterable[tuple[Any, Tensor]],
    class_counts: ClassCounts,
    *,
    to_input: Callable[[Any], Any] | None = None,
    autocast: bool = True,
) -> dict[str, Any]:
    """Metrics of the whole test set; the model is left in evaluation mode.

    Every sample counts once, also where Accelerate repeats some to fill up the last batches. Call
    it on every process.

    Args:
        accelerator: What prepared the loader.
        net: The model, on the device; ``net(inputs)`` gives logits (N, C).
        loader: The prepared loader of batches (inputs, labels), labels int64 (N,).
        class_counts: Training samples per class, which tell many, medium and few apart.
        to_input: What turns the inputs of the loader into those of the model.
        autocast: Whether to use the mixed precision of the accelerator.

    Returns:
        What :class:`~ldam_plugins.metrics.MetricAccumulator` computes: ``top1_error`` (%),
        ``balanced_accuracy``, ``nll`` by plain cross-entropy, and so on.
    """
    net.eval()
    for buffer in net.buffers():  # every process has batch statistics of its own
        buffer.copy_(broadcast(buffer))
    metrics = MetricAccumulator(class_counts)
    # A compiled model is not compiled once more for the shapes of these batches.
    with torch.compiler.set_stance("force_eager"):
        for inputs, labels in loader:
            with accelerator.autocast(AutocastKwargs(enabled=autocast)):
                logits = net(inputs if to_input is None else to_input(inputs))
            metrics.update(*accelerator.gather_for_metrics((logits.float(), labels)))
    return metrics.compute()
