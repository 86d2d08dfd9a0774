"""Metrics of a classifier on a test set that several processes share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, broadcast
from torch import Tensor, nn

from ldam_plugins._validation import invalid
from ldam_plugins.counts import ClassCounts
from ldam_plugins.metrics import MetricAccumulator, Predictions


@torch.inference_mode()
def evaluate(
    accelerator: Accelerator,
    net: nn.Module,
    loader: Iterable[tuple[Any, Tensor]],
    class_counts: ClassCounts,
    *,
    to_input: Callable[[Any], Any] | None = None,
    autocast: bool = True,
    groups: Sequence[Any] | np.ndarray | None = None,
    detailed: bool = False,
    examples: Sequence[str] | None = None,
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
        groups: What each sample belongs to, such as a camera or a patient, in the order of the
            loader (N,); with ``detailed`` there are metrics of each.
        detailed: Whether to give intervals, the confusion matrix and the groups as well, for the
            end of a training.
        examples: Name of each sample, in the order of the loader (N,). With them the answer has
            ``predictions``, the columns of :class:`~ldam_plugins.metrics.Predictions`.

    Returns:
        What :class:`~ldam_plugins.metrics.MetricAccumulator` computes: ``top1_error`` (%),
        ``balanced_accuracy``, ``nll`` by plain cross-entropy, and so on.

    Raises:
        ValueError: another number of groups or of names than of samples.
    """
    net.eval()
    for buffer in net.buffers():  # every process has batch statistics of its own
        buffer.copy_(broadcast(buffer))
    metrics, seen = MetricAccumulator(class_counts), 0
    predictions = Predictions(len(class_counts))
    # A compiled model is not compiled once more for the shapes of these batches.
    with torch.compiler.set_stance("force_eager"):
        for inputs, labels in loader:
            with accelerator.autocast(AutocastKwargs(enabled=autocast)):
                logits = net(inputs if to_input is None else to_input(inputs))
            logits, labels = accelerator.gather_for_metrics((logits.float(), labels))
            part = None if groups is None else groups[seen : seen + len(labels)]
            metrics.update(logits, labels, part)
            if examples is not None:
                predictions.update(range(seen, seen + len(labels)), logits, labels.cpu())
            seen += len(labels)
    if groups is not None and len(groups) != seen:
        raise invalid("groups", f"of shape ({seen},), one for each sample", (len(groups),))
    found = metrics.compute(detailed=detailed)
    if examples is not None:
        found["predictions"] = predictions.columns(examples)
    return found
