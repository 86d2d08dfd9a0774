"""The losses of :mod:`ldam_plugins.functional` as modules that know the class counts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldam_plugins import functional
from ldam_plugins._checks import check_choice, check_int, check_real, must_be
from ldam_plugins.chunked_cosines import ChunkedCosines
from ldam_plugins.counts import ClassCounts


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
        self.reduction = check_choice("reduction", reduction, functional.REDUCTIONS)
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
        return functional.mean_denominator(target, self.weight, self.ignore_index)

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
            total = functional.cross_entropy(
                logits, labels, ignore_index=self.ignore_index, reduction="sum"
            )
            return total / (items * replicas)
        divisor = items.to(logits.device) * replicas * self.mean_weight().to(logits.device)
        return self.forward(logits, labels, divisor)

    def _items(self, labels: Tensor, counted: Tensor | int | None) -> tuple[Tensor, int]:
        """Items to divide by, at least 1, and the replicas the host multiplies the loss by."""
        if counted is None:
            items = functional.mean_denominator(labels, None, self.ignore_index)
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
        known = ", ".join(name for name, kind in _LOSSES.items() if kind.takes_chunked_head)
        way_out = f"Only these losses take one: {known}. Use use_cosine_head(model, chunked=False)."
        raise TypeError(must_be("loss", "one for a chunked head", type(self).__name__, way_out))

    def _common(self, reduction: str) -> dict[str, Any]:
        return {
            "weight": self.weight,
            "ignore_index": self.ignore_index,
            "reduction": reduction,
        }

    def _check_classes(self, logits: Tensor | ChunkedCosines) -> None:
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
        options = [f"{name}={getattr(self, name)!r}" for name in _option_names(type(self))]
        return ", ".join([f"num_classes={len(self.class_counts)}", *options])


class CrossEntropyLoss(ClassificationLoss):
    """Cross-entropy, see :func:`ldam_plugins.functional.cross_entropy`."""

    takes_chunked_head = True

    def _loss(self, logits: Tensor, target: Tensor, **common: Any) -> Tensor:
        return functional.cross_entropy(logits, target, **common)

    def _chunked_loss(self, cosines: ChunkedCosines, target: Tensor, **common: Any) -> Tensor:
        return functional.chunked_cross_entropy(cosines, target, **common)


class FocalLoss(ClassificationLoss):
    """Focal loss, see :func:`ldam_plugins.functional.focal_loss`.

    Args:
        class_counts: :class:`ClassCounts` or counts.
        gamma: Focusing exponent, at least 0; 0 is cross-entropy.
        **common: ``reduction``, ``ignore_index``, see :class:`ClassificationLoss`.
    """

    def __init__(self, class_counts: ClassCounts, *, gamma: float = 2.0, **common: Any) -> None:
        super().__init__(class_counts, **common)
        self.gamma = check_real("gamma", gamma, low=0)

    def _loss(self, logits: Tensor, target: Tensor, **common: Any) -> Tensor:
        return functional.focal_loss(logits, target, gamma=self.gamma, **common)


class _MarginLoss(ClassificationLoss):
    """A loss with one margin a class, in cosine units, times the scale of the head."""

    margins: Tensor
    needs_cosine_head = True
    takes_chunked_head = True
    function = staticmethod(functional.ldam_loss)

    def __init__(
        self,
        class_counts: ClassCounts | Sequence[int] | np.ndarray | Tensor,
        max_margin: float = 0.5,
        scale: float = 30.0,
        **common: Any,
    ) -> None:
        super().__init__(class_counts, **common)
        self.max_margin = check_real("max_margin", max_margin, low=0)
        self.scale = check_real("scale", scale, low=0, low_open=True)
        self._register_exact("margins", self._margins())

    def _margins(self) -> Tensor:
        return self.class_counts.margins(self.max_margin, dtype=torch.float64)

    def _loss(self, logits: Tensor, target: Tensor, **common: Any) -> Tensor:
        margins = self._constant("margins", logits)
        return self.function(logits, target, margins, scale=self.scale, **common)

    def _chunked_loss(self, cosines: ChunkedCosines, target: Tensor, **common: Any) -> Tensor:
        if not self.takes_chunked_head:
            return super()._chunked_loss(cosines, target, **common)
        margins = self._constant("margins", cosines)
        return functional.chunked_cross_entropy(
            cosines, target, margins, scale=self.scale, **common
        )


class LDAMLoss(_MarginLoss):
    """Label-distribution-aware margin loss, see :func:`ldam_plugins.functional.ldam_loss`.

    ``CE(z - scale * m[y] at the target)`` with ``m[c] = max_margin * (n_c / n_min) ** -1/4`` on
    the logits ``z = scale * cos(theta)`` of a cosine head (:func:`ldam_plugins.use_cosine_head`).

    Source: Cao et al., NeurIPS 2019, arXiv 1906.07413.

    Args:
        class_counts: :class:`ClassCounts` of the training set, or the bare counts.
        max_margin: Margin of the rarest class, in cosine units (the paper: 0.5, and 0.3 for
            iNaturalist).
        scale: Scale of the cosine head (the paper: 30).
        **common: ``reduction``, ``ignore_index``, see :class:`ClassificationLoss`.

    Example:
        >>> criterion = LDAMLoss([900, 90, 9], max_margin=0.5, scale=30.0)
        >>> logits = torch.tensor([[30.0, 0.0, -3.0], [3.0, 0.0, 15.0]])
        >>> criterion(logits, torch.tensor([0, 2]))
        tensor(1.5475)
    """


class UniformMarginLoss(_MarginLoss):
    """LDAM with one margin for all classes (the paper's M): ``m[c] = max_margin``."""

    def _margins(self) -> Tensor:
        return torch.full((len(self.class_counts),), self.max_margin, dtype=torch.float64)


class LDAMHingeLoss(_MarginLoss):
    """The hinge form of LDAM (LDAM-HG), see :func:`ldam_plugins.functional.hinge_loss`."""

    takes_chunked_head = False
    function = staticmethod(functional.hinge_loss)


class HingeLoss(UniformMarginLoss):
    """Hinge loss with one margin for all (HG), see :func:`ldam_plugins.functional.hinge_loss`."""

    takes_chunked_head = False
    function = staticmethod(functional.hinge_loss)


class LogitAdjustedLoss(ClassificationLoss):
    """Logit-adjusted loss, see :func:`ldam_plugins.functional.logit_adjusted_loss`.

    Args:
        class_counts: :class:`ClassCounts` or counts; the prior is their share.
        tau: Strength, at least 0; 1 is the balanced softmax, 0 cross-entropy.
        **common: ``reduction``, ``ignore_index``, see :class:`ClassificationLoss`.
    """

    prior: Tensor

    def __init__(self, class_counts: ClassCounts, *, tau: float = 1.0, **common: Any) -> None:
        super().__init__(class_counts, **common)
        self.tau = check_real("tau", tau, low=0)
        self._register_exact("prior", self.class_counts.prior(dtype=torch.float64))

    def _loss(self, logits: Tensor, target: Tensor, **common: Any) -> Tensor:
        prior = self._constant("prior", logits)
        return functional.logit_adjusted_loss(logits, target, prior, tau=self.tau, **common)


class VectorScalingLoss(ClassificationLoss):
    """Vector-scaling loss, see :func:`ldam_plugins.functional.vector_scaling_loss`.

    Args:
        class_counts: :class:`ClassCounts` or counts.
        gamma: Exponent of the factor ``(n_c / n_max) ** gamma``, at least 0.
        tau: Strength of the term ``tau log(n_c / N)``, at least 0.
        **common: ``reduction``, ``ignore_index``, see :class:`ClassificationLoss`.
    """

    multiplicative: Tensor
    additive: Tensor

    def __init__(
        self,
        class_counts: ClassCounts,
        *,
        gamma: float = 0.15,
        tau: float = 1.0,
        **common: Any,
    ) -> None:
        super().__init__(class_counts, **common)
        self.gamma = check_real("gamma", gamma, low=0)
        self.tau = check_real("tau", tau, low=0)
        prior = self.class_counts.prior(dtype=torch.float64)
        self._register_exact("multiplicative", (prior / prior.max()) ** self.gamma)
        self._register_exact("additive", self.tau * prior.log())

    def _loss(self, logits: Tensor, target: Tensor, **common: Any) -> Tensor:
        factors, terms = (self._constant(n, logits) for n in ("multiplicative", "additive"))
        return functional.vector_scaling_loss(logits, target, factors, terms, **common)


_LOSSES: dict[str, type[ClassificationLoss]] = {
    "ce": CrossEntropyLoss,
    "focal": FocalLoss,
    "ldam": LDAMLoss,
    "ldam_hinge": LDAMHingeLoss,
    "hinge": HingeLoss,
    "uniform_margin": UniformMarginLoss,
    "logit_adjusted": LogitAdjustedLoss,
    "vector_scaling": VectorScalingLoss,
}


def list_losses() -> list[str]:
    """Names :func:`create_loss` knows."""
    return list(_LOSSES)


def create_loss(
    name: str,
    class_counts: ClassCounts | Sequence[int] | np.ndarray | Tensor,
    **options: Any,
) -> ClassificationLoss:
    """Create a loss by name.

    Args:
        name: One of :func:`list_losses`.
        class_counts: :class:`ClassCounts` of the training set, or the bare counts.
        **options: Options of that loss, such as ``max_margin`` and ``scale`` (LDAM, hinges,
            uniform margin), ``gamma`` (focal, vector scaling), ``tau`` (logit adjusted, vector
            scaling), and ``reduction``, ``ignore_index`` (all).

    Raises:
        TypeError: an option this loss does not have.
        ValueError: an unknown name (the nearest are named), or a bad option.

    Example:
        >>> create_loss("focal", [90, 9], gamma=1.0)
        FocalLoss(num_classes=2, gamma=1.0, reduction='mean', ignore_index=-100)
    """
    loss = _LOSSES[check_choice("loss", name, _LOSSES)]
    known = loss_options(name)
    for option in options:
        if option not in known:
            wanted = f"an option of {name!r} (one of {', '.join(known)})"
            raise TypeError(must_be("options", wanted, option))
    return loss(class_counts, **options)


def loss_options(name: str) -> tuple[str, ...]:
    """Options :func:`create_loss` takes for the loss ``name``.

    Raises:
        ValueError: an unknown name.
    """
    return _option_names(_LOSSES[check_choice("loss", name, _LOSSES)])


def _option_names(loss: type[ClassificationLoss]) -> tuple[str, ...]:
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
