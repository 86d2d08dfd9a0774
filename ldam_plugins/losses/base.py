"""The base of the losses as modules: class counts, a weight per class, the form of the Trainer.

Each loss has a file of its own, with a pure function of tensors and a module that knows the class
counts. What all of them take stands once: a batch and its checks in
:func:`.reduction.check_batch`, weight, ignored index and reduction in
:class:`.reduction.CommonOptions`. Arithmetic is float32 for 16-bit logits, else in the logits' own
precision.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ldam_plugins._validation import check_choice, check_int, invalid
from ldam_plugins.counts import ClassCounts
from ldam_plugins.kernels.chunked_cosines import ChunkedCosines
from ldam_plugins.kernels.dispatch import match_tensor_kind, runs_eagerly
from ldam_plugins.losses.model_outputs import find_logits, one_label_a_row
from ldam_plugins.losses.reduction import (
    REDUCTIONS,
    mean_denominator,
    prepare,
    wide_default,
    widened,
)
from ldam_plugins.losses.trainer_checks import check_item_count, check_predictions

_INITIALISED = "_is_hf_initialized"
"""Flag of transformers, on what a checkpoint held and on modules that have been initialised."""


class Filled(NamedTuple):
    """What a buffer was filled with, and what shows that it has not been written since.

    Attributes:
        source: What the values follow from.
        buffer: The tensor itself.
        address: Of its memory.
        version: Torch's count of the operations that wrote into it.
        values: A copy, on the CPU only, where comparing waits for no device.
    """

    source: Hashable
    buffer: Tensor
    address: int
    version: int
    values: Tensor | None

    @classmethod
    def of(cls, source: Hashable, buffer: Tensor) -> Filled | None:
        """Of the buffer as it is now; None where torch does not count what writes into it."""
        if not runs_eagerly(buffer) or buffer.is_inference():
            return None
        values = buffer.clone() if buffer.is_cpu else None
        return cls(source, buffer, buffer.data_ptr(), buffer._version, values)

    def holds(self, source: Hashable, buffer: Tensor) -> bool:
        """Whether the buffer still has the values that were made from ``source``."""
        if source != self.source or buffer is not self.buffer or buffer.is_inference():
            return False
        if (buffer.data_ptr(), buffer._version) != (self.address, self.version):
            return False
        return self.values is None or torch.equal(buffer, self.values)


class ClassificationLoss(nn.Module):
    """Base of all losses: class counts, a weight per class, and how a batch is averaged.

    Calling it gives the loss of ``logits`` (N, C) against ``target``, class indices (N,) int64 or
    soft targets (N, C) floating, which need not sum to 1 (mixup, cutmix, label smoothing). The mean
    is that of :class:`.reduction.CommonOptions`.

    A subclass implements ``_loss``, sets the class attributes below where they are true of it, and
    is entered in :mod:`.losses.registry`.

    ``weight`` is a buffer (C,) of ones, to be filled in place (``loss.weight.copy_(w)``) when a
    schedule says so, which needs no new module and no new compilation. It stays float32 or float64
    when the module is made, moved or loaded in a 16-bit dtype, and is of ones again where a module
    made on the "meta" device gets memory (``to_empty``, ``from_pretrained``). What follows from the
    counts (margins, prior) is no buffer, so no host can lose or round it.

    Args:
        class_counts: :class:`ClassCounts` of the training set, or the bare counts.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        ignore_index: Index of rows that count nowhere.

    Raises:
        ValueError: bad counts, or an unknown reduction.
    """

    needs_cosine_head = False
    """Whether the loss is meant for logits ``scale * cos(theta)``: its margins are in cosines."""
    takes_chunked_head = False
    """Whether it takes the output of ``use_cosine_head(model, chunked=True)`` in training."""
    corrects_prior = False
    """Whether the loss alone, without class weights, divides by the class prior at its optimum."""
    weight: Tensor
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
        self._converted: dict[str, Tensor] = {}
        self._filled: Filled | None = None
        with torch.inference_mode(False):  # one that is made there could not be filled elsewhere
            weight = torch.ones(len(class_counts), dtype=wide_default())
        self.register_buffer("weight", weight)
        self._set_constant("prior", class_counts.prior(dtype=torch.float64))

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
            expected = "None where `reduction` is not 'mean'"
            raise invalid("denominator", expected, self.reduction)
        return loss(logits, target, **self._common("sum")) / denominator

    def denominator(self, target: Tensor) -> Tensor:
        """What the mean divides by: ``sum(w_y)`` for indices, N for soft targets (0-d)."""
        return mean_denominator(target, self.weight, self.ignore_index)

    def mean_weight(self) -> Tensor:
        """Mean weight of a training sample, ``sum(n_c w_c) / sum(n_c)`` (0-d); 1 for ones."""
        weight = match_tensor_kind(self.weight, self.weight)
        return (self._constant("prior", weight) * weight).sum()

    def fill_weight(self, source: Hashable, make: Callable[[], Tensor]) -> None:
        """Fill the class weights in place with ``make()``, unless they already follow ``source``.

        If they were changed in another way (by hand, from a checkpoint, by a move), they are
        filled again. Writes that torch does not count (``weight.data``, NumPy) are noticed on the
        CPU only, as comparing values would wait for a device.

        Args:
            source: What the weights follow from.
            make: Computes them, (C,).
        """
        if self._filled is not None and self._filled.holds(source, self.weight):
            return
        self.weight.copy_(make())
        self._filled = Filled.of(source, self.weight)

    def compute_loss_func(
        self,
        outputs: Any,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Loss in the form that ``transformers.Trainer(compute_loss_func=...)`` calls.

        While gradients are on: ``sum_i w_i l_i / (num_items_in_batch * mean_weight)``. The divisor
        is the same on every process and for every micro-batch, so the update does not depend on
        how the batch was cut. While they are off (evaluation): plain cross-entropy.

        Args:
            outputs: Model output, in which :func:`.find_logits` finds the logits.
            labels: (N,) or (N, 1) int64, or (N, C) floating.
            num_items_in_batch: Labels in the whole batch over all micro-batches and processes, as
                the Trainer counts them; None: this batch alone.

        Raises:
            ValueError: ``labels`` is None; ``ignore_index`` is not -100, the only label that the
                Trainer leaves out of its count; a Trainer with several micro-batches or processes
                does not hand its count on; no logits are found, or the Trainer that calls would
                predict something else; or as for a call.
        """
        if labels is None:
            hint = (
                'Name the label column "label" or "labels": the Trainer hands on no other. Of a '
                "model whose `forward` has no argument `labels` it drops that one, too, but for "
                'TrainingArguments(label_names=["labels"]).'
            )
            raise invalid("labels", "a tensor", None, hint=hint)
        check_item_count(num_items_in_batch, self.ignore_index)
        labels = one_label_a_row(labels)
        logits = find_logits(outputs, len(labels), len(self.class_counts))
        check_predictions(outputs, logits)
        items, replicas = self._items(labels, num_items_in_batch)
        if not torch.is_grad_enabled():
            self._check_classes(logits)
            batch = prepare(logits, labels, ignore_index=self.ignore_index, reduction="sum")
            return batch.cross_entropy(batch.logits) / (_near(items, logits) * replicas)
        divisor = _near(self.mean_weight(), logits) * _near(items, logits) * replicas
        return self.forward(logits, labels, divisor)

    def _items(self, labels: Tensor, counted: Tensor | int | None) -> tuple[Tensor | float, int]:
        """Items to divide by, at least 1, and the replicas the host multiplies the loss by."""
        if counted is None:
            return mean_denominator(labels, None, self.ignore_index).clamp_min(1), 1
        # The host counts entries of soft targets, not rows.
        entries = labels.shape[1] if labels.ndim == 2 else 1
        if not isinstance(counted, Tensor):
            return max(counted / entries, 1), 1
        replicas = counted.numel()  # DataParallel hands over one copy of the count per device
        return (counted.flatten()[0].to(wide_default()) / entries).clamp_min(1), replicas

    def _loss(self, logits: Tensor, target: Tensor, **common: Any) -> Tensor:
        """The pure function of this loss."""
        raise NotImplementedError

    def _chunked_loss(self, cosines: ChunkedCosines, target: Tensor, **common: Any) -> Tensor:
        """The same without the (N, C) logits, where the loss can be had so."""
        from ldam_plugins.losses.registry import list_losses, loss_class  # it imports this module

        *most, last = (name for name in list_losses() if loss_class(name).takes_chunked_head)
        hint = f"Only {', '.join(most)} and {last} do. Use use_cosine_head(model, chunked=False)."
        raise invalid(
            "loss", "one for a chunked head", type(self).__name__, hint=hint, error=TypeError
        )

    def _common(self, reduction: str) -> dict[str, Any]:
        return {
            "weight": self.weight,
            "ignore_index": self.ignore_index,
            "reduction": reduction,
        }

    def _check_classes(self, logits: Tensor | ChunkedCosines) -> None:
        if not isinstance(logits, (Tensor, ChunkedCosines)):
            expected = f"a floating-point tensor of shape (N, {len(self.class_counts)})"
            hint = _way_to_logits(logits)
            raise invalid("logits", expected, type(logits).__name__, hint=hint, error=TypeError)
        if logits.ndim != 2 or logits.shape[1] != len(self.class_counts):
            expected = f"of shape (N, {len(self.class_counts)}), one column per class count"
            hint = "The loss is for one class an example, not one a token or pixel."
            shape = tuple(logits.shape)
            raise invalid("logits", expected, shape, hint=hint if len(shape) > 2 else "")

    def _set_constant(self, name: str, values: Tensor) -> None:
        """Keep float64 ``values`` (C,) that follow from the counts."""
        self._exact[name] = values
        self._convert_constants()

    def _convert_constants(self) -> None:
        """Convert the constants to the weight's device and dtype, unless it is no real tensor."""
        place = self.weight.device, self.weight.dtype
        if runs_eagerly(self.weight) and not self.weight.is_meta:
            with torch.inference_mode(False):
                self._converted = {name: exact.to(*place) for name, exact in self._exact.items()}

    def _constant(self, name: str, logits: Tensor | ChunkedCosines) -> Tensor:
        """The constant ``name`` in the precision the loss is computed in."""
        dtype, ready = widened(logits.dtype), self._converted.get(name)
        if ready is None or ready.device != logits.device or ready.dtype.itemsize < dtype.itemsize:
            return match_tensor_kind(self._exact[name], logits).to(logits.device, dtype)
        return match_tensor_kind(ready, logits)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; ``weight`` keeps 32 bits, and is of ones where no checkpoint has it.

        ``from_pretrained`` of transformers makes modules on the "meta" device. It sets flagged
        tensors for what the checkpoint holds and uninitialised memory for the rest; then it flags
        the module as initialised.
        """
        if name == "weight" and isinstance(value, Tensor) and "weight" in self._buffers:
            self._unfilled = self.weight.is_meta and not hasattr(value, _INITIALISED)
            super().__setattr__(name, value.to(widened(value.dtype)))
            self._convert_constants()
            return
        super().__setattr__(name, value)
        if name == _INITIALISED and self.__dict__.get("_unfilled"):
            self.weight.fill_(1)
            self._unfilled = False

    def __getstate__(self) -> dict[str, Any]:
        """State without what can be computed again."""
        return {k: v for k, v in self.__dict__.items() if k not in ("_converted", "_filled")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the state, and compute the rest."""
        super().__setstate__({"_converted": {}, "_filled": None, **state})
        self._convert_constants()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ClassificationLoss:
        """Move the module; its weight gets no 16-bit dtype and never loses its values."""

        def with_values(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved is tensor or moved.is_meta:
                return moved
            values = torch.ones_like(moved) if tensor.is_meta else tensor
            return values.to(moved.device, widened(moved.dtype))

        super()._apply(with_values, recurse)
        self._convert_constants()
        return self

    def extra_repr(self) -> str:
        """Number of classes and options, for ``print``."""
        options = [f"{name}={getattr(self, name)!r}" for name in option_defaults(type(self))]
        return ", ".join([f"num_classes={len(self.class_counts)}", *options])


def _near(number: Tensor | float, logits: Tensor | ChunkedCosines) -> Any:
    """A number (0-d) for arithmetic with the logits; one on the CPU goes with every device."""
    if not isinstance(number, Tensor):
        return number
    return match_tensor_kind(number if number.is_cpu else number.to(logits.device), logits)


def _way_to_logits(outputs: Any) -> str:
    """What to write for the output of a model that is no tensor."""
    if isinstance(outputs, dict) or hasattr(outputs, "logits"):
        return "Give it `outputs.logits`, or call `criterion.compute_loss_func(outputs, labels)`."
    if isinstance(outputs, tuple | list):
        return (
            "The model gives several outputs in training: give the loss the one that is "
            "classified by, `criterion(outputs[0], target)`, or the sum of a loss of each."
        )
    return ""


def option_defaults(loss: type[ClassificationLoss]) -> dict[str, Any]:
    """Options of a loss and their defaults, its own first."""
    own = inspect.signature(loss).parameters
    shared = inspect.signature(ClassificationLoss).parameters
    names = [name for name in {**own, **shared} if name not in ("class_counts", "common")]
    return {name: {**shared, **own}[name].default for name in names}
