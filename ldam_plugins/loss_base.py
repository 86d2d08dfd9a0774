"""The base of the losses: class counts, a weight per class, and how a batch is averaged."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldam_plugins._checks import check_choice, check_int, must_be
from ldam_plugins.chunked_cosines import ChunkedCosines
from ldam_plugins.counts import ClassCounts
from ldam_plugins.functional import cross_entropy
from ldam_plugins.reduction import REDUCTIONS, mean_denominator


class ClassificationLoss(nn.Module):
    """Base of all losses: class counts, a weight per class, and how a batch is averaged.

    Calling it gives the loss of ``logits`` (N, C) against ``target``, class indices (N,) int64 or
    class masses (N, C) floating; shapes, dtypes and ``reduction="mean"`` are those of
    :mod:`ldam_plugins.functional`.

    ``weight`` is a buffer (C,) of ones, to be filled in place (``loss.weight.copy_(w)``) when a
    schedule says so: one module, one graph. Buffers stay float32 or float64 when the module is
    moved to a 16-bit dtype.

    Args:
        class_counts: :class:`ClassCounts` of the training set, or the bare counts.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Index of rows that count nowhere.

    Raises:
        ValueError: bad counts, or an unknown reduction.
    """

    weight: Tensor
    needs_cosine_head = False
    """Whether the loss is meant for logits ``scale * cos(theta)``: its margins are in cosines."""
    takes_chunked_head = False
    """Whether it takes the output of ``use_cosine_head(model, chunked=True)`` in training."""
    scale: float

    def __init__(
        self,
        class_counts: ClassCounts | Sequence[int] | np.ndarray | Tensor,
        *,
        reduction: str = "mean",
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        if not isinstance(class_counts, ClassCounts):
            class_counts = ClassCounts(class_counts)
        self.class_counts = class_counts
        self.reduction = check_choice("reduction", reduction, REDUCTIONS)
        self.ignore_index = check_int("ignore_index", ignore_index)
        self._exact: dict[str, Tensor] = {}
        self.register_buffer("weight", torch.ones(len(class_counts)))

    def forward(
        self,
        logits: Tensor | ChunkedCosines,
        target: Tensor,
        denominator: Tensor | float | None = None,
    ) -> Tensor:
        """Loss of one batch.

        Args:
            logits: (N, C), or what a chunked cosine head returns in training mode.
            target: (N,) int64 or (N, C) floating.
            denominator: If given, the loss is the sum over the rows divided by it, so that the
                parts of a batch add up to the loss of the whole: give each part the
                :meth:`denominator` of the whole. Needs ``reduction="mean"``.

        Raises:
            TypeError: ``logits`` or ``target`` of a wrong dtype.
            ValueError: shapes that do not fit the counts or each other.
        """
        self._check_classes(logits)
        loss: Any = self._chunked_loss if isinstance(logits, ChunkedCosines) else self._loss
        if denominator is None:
            return loss(logits, target, **self._common(self.reduction))
        if self.reduction != "mean":
            wanted = "None where `reduction` is not 'mean'"
            raise ValueError(must_be("denominator", wanted, self.reduction))
        return loss(logits, target, **self._common("sum")) / denominator

    def denominator(self, target: Tensor) -> Tensor:
        """What ``reduction="mean"`` divides by: ``sum(w_y)`` for indices, N for masses (0-d)."""
        return mean_denominator(target, self.weight, self.ignore_index)

    def mean_weight(self) -> Tensor:
        """Mean weight of a training sample, ``sum(n_c w_c) / sum(n_c)`` (0-d); 1 for ones."""
        return (self.class_counts.prior().to(self.weight) * self.weight).sum()

    def compute_loss_func(
        self,
        outputs: Any,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Loss in the form ``transformers.Trainer(compute_loss_func=...)`` asks for.

        While gradients are on: ``sum_i w_i l_i / (num_items_in_batch * mean_weight)``. The divisor
        is the same on every process and for every micro-batch, so the update does not depend on
        how the batch was cut. While they are off (evaluation): plain cross-entropy.

        Args:
            outputs: Model output with ``logits`` (attribute, key or first item).
            labels: (N,) int64 or (N, C) floating.
            num_items_in_batch: Labels in the whole batch over all micro-batches and processes, as
                the Trainer counts them; None: this batch alone.

        Raises:
            ValueError: ``labels`` is None, or as for a call.
        """
        if labels is None:
            way_out = 'Name the label column "label" or "labels": the Trainer hands on no other.'
            raise ValueError(must_be("labels", "a tensor", None, way_out))
        logits = logits_of(outputs)
        items, replicas = self._items(labels, num_items_in_batch)
        if not torch.is_grad_enabled():
            self._check_classes(logits)
            total = cross_entropy(logits, labels, ignore_index=self.ignore_index, reduction="sum")
            return total / (items * replicas)
        divisor = items.to(logits.device) * replicas * self.mean_weight().to(logits.device)
        return self.forward(logits, labels, divisor)

    def _items(self, labels: Tensor, counted: Tensor | int | None) -> tuple[Tensor, int]:
        """Items to divide by, at least 1, and the replicas the host multiplies the loss by."""
        if counted is None:
            items = mean_denominator(labels, None, self.ignore_index)
            return items.clamp_min(1), 1
        tensor = torch.as_tensor(counted, device=labels.device)
        replicas = tensor.numel()  # DataParallel hands over one copy of the count per device
        items = tensor.flatten()[0].to(torch.get_default_dtype())
        if labels.ndim == 2:  # the host counts entries of the masses, not rows
            items = items / labels.shape[1]
        return items.clamp_min(1), replicas

    def _loss(self, logits: Tensor, target: Tensor, **common: Any) -> Tensor:
        """The pure function of this loss."""
        raise NotImplementedError

    def _chunked_loss(self, cosines: ChunkedCosines, target: Tensor, **common: Any) -> Tensor:
        """The same without the (N, C) logits, where the loss can be had so."""
        way_out = "Only ce, ldam and uniform_margin do. Use use_cosine_head(model, chunked=False)."
        raise TypeError(must_be("loss", "one for a chunked head", type(self).__name__, way_out))

    def _common(self, reduction: str) -> dict[str, Any]:
        return {
            "weight": self.weight,
            "ignore_index": self.ignore_index,
            "reduction": reduction,
        }

    def _check_classes(self, logits: Tensor | ChunkedCosines) -> None:
        if not isinstance(logits, Tensor | ChunkedCosines):
            wanted = f"one tensor of shape (N, {len(self.class_counts)})"
            way_out = "Models with auxiliary or distilled heads give several in training: add the"
            way_out += " losses of each, or take one of them."
            raise TypeError(must_be("logits", wanted, type(logits).__name__, way_out))
        if logits.ndim != 2 or logits.shape[1] != len(self.class_counts):
            wanted = f"of shape (N, {len(self.class_counts)}), one column per class count"
            raise ValueError(must_be("logits", wanted, tuple(logits.shape)))

    def _register_exact(self, name: str, values: Tensor) -> None:
        """Keep float64 ``values`` and a buffer of them in the default dtype."""
        self._exact[name] = values
        self.register_buffer(name, values.to(torch.get_default_dtype()), persistent=False)

    def _constant(self, name: str, logits: Tensor | ChunkedCosines) -> Tensor:
        """The constant ``name`` in the precision the loss is computed in."""
        if logits.dtype == torch.float64:
            return self._exact[name].to(logits.device)
        return getattr(self, name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ClassificationLoss:
        """Move the module, but keep its buffers out of 16-bit dtypes."""

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype.itemsize >= 4 else tensor.to(moved.device)

        super()._apply(keep_precision, recurse)
        return self

    def extra_repr(self) -> str:
        """Number of classes and options, for ``print``."""
        options = [f"{name}={getattr(self, name)!r}" for name in option_names(type(self))]
        return ", ".join([f"num_classes={len(self.class_counts)}", *options])


def option_names(loss: type[ClassificationLoss]) -> tuple[str, ...]:
    """Options of a loss, its own first."""
    own = inspect.signature(loss).parameters
    shared = inspect.signature(ClassificationLoss).parameters
    return tuple(n for n in dict.fromkeys((*own, *shared)) if n not in ("class_counts", "common"))


def logits_of(outputs: Any) -> Any:
    """Logits of a model's output: attribute, key or first item."""
    if isinstance(outputs, Tensor | ChunkedCosines):
        return outputs
    if isinstance(outputs, dict):
        return outputs["logits"]
    return outputs.logits if hasattr(outputs, "logits") else outputs[0]
