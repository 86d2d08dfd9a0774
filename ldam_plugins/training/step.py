"""One optimizer step under Accelerate, over micro-batches and processes."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from ldam_plugins._validation import DIVERGED, invalid
from ldam_plugins.losses.base import ClassificationLoss
from ldam_plugins.training.environment import note_random_state
from ldam_plugins.training.sam import check_gathers_norm, moved_uphill

Batch = tuple[Tensor, Tensor]
Shapes = tuple[tuple[torch.Size, torch.Size, torch.dtype], ...]

WARM_UP = 3
"""Steps before a CUDA graph is captured, in which libraries choose kernels and allocate memory."""


class TrainStep:
    """One optimizer step: ``loss = train_step([(inputs, target), ...])``, a pair a micro-batch.

    The loss of every part is divided by the denominator of the whole batch (the number of its
    samples, or the sum of their weights). So the step is the same however the batch is cut into
    micro-batches and over processes: that of the mean over the whole batch in one process.

    A compiled model is compiled for the shape of the first batch only. Other shapes, such as that
    of the last batch of an epoch, run eagerly: they are not worth another compilation.

    With ``rho`` the step is sharpness-aware, see :class:`.SharpnessAware`: the gradient of the
    whole batch moves the weights, a second pass over it leaves the gradient that is cut
    (``clip_grad``) and given to the optimizer. An overflow of float16 in either pass skips the
    step, as in a plain one.

    Args:
        accelerator: What prepared the model.
        net: The prepared model.
        criterion: Its loss.
        optimizer: The prepared optimizer of its parameters.
        clip_grad: Largest norm of the gradient; None: no limit.
        replay: On one GPU, capture the forward and the backward pass once as a CUDA graph and
            replay it from then on: the kernels of small steps take less time than their launches.

    Raises:
        ValueError: the optimizer computes gradients of its own (L-BFGS, AdaHessian).
    """

    def __init__(
        self,
        accelerator: Accelerator,
        net: nn.Module,
        criterion: ClassificationLoss,
        optimizer: torch.optim.Optimizer,
        *,
        clip_grad: float | None = None,
        replay: bool = False,
    ) -> None:
        _check_first_order(getattr(optimizer, "optimizer", optimizer))  # Accelerate wraps it
        self.accelerator = accelerator
        self.net = net
        self.criterion = criterion
        self.optimizer = optimizer
        self.clip_grad = clip_grad
        alone = accelerator.distributed_type == DistributedType.NO
        self._replays = replay and alone and accelerator.device.type == "cuda"
        self._whole: list[tuple[torch.Size, int]] = []
        self._seen: Counter[Shapes] = Counter()
        self._passes: dict[Shapes, CapturedPass] = {}

    def __call__(self, batches: list[Batch], *, rho: float = 0.0) -> Tensor:
        """Step the optimizer once; call it on every process.

        Args:
            batches: Micro-batches (inputs, target) of this process. Inputs beyond the last target
                are left out: Accelerate repeats samples to fill up a batch.
            rho: Length of the move uphill, :meth:`.SharpnessAware.rho_at`; 0: a plain step.

        Returns:
            The mean loss of the whole batch at the weights as they were.

        Raises:
            RuntimeError: ``replay`` is asked for and something cannot be captured.
            ValueError: ``rho`` under FSDP1.
        """
        # The model does not see whether targets are soft, which changes where mixing ends.
        rows = [(images.shape, len(target)) for images, target in batches]
        self._whole = self._whole or rows
        if rows == self._whole:
            loss = self._gradients(batches, rho)
        else:
            with torch.compiler.set_stance("force_eager"):
                loss = self._gradients(batches, rho)
        if self.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.net.parameters(), self.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.accelerator.reduce(loss, "mean")

    def _gradients(self, batches: list[Batch], rho: float) -> Tensor:
        """Add the gradients at the weights, or at those moved uphill by ``rho``."""
        if not rho:
            return self._pass(batches)
        check_gathers_norm(self.accelerator)
        rewind = note_random_state(self.accelerator.device)
        loss = self._pass(batches).clone()  # the next replay writes over it
        rewind()
        with moved_uphill(self.net, rho):
            self._pass(batches)
        return loss

    def _pass(self, batches: list[Batch]) -> Tensor:
        """Add the gradients, by a CUDA graph if that is asked for and warmed up."""
        trained = self.accelerator, self.net, self.criterion
        if not self._replays:
            return add_gradients(*trained, batches)
        shapes = tuple((images.shape, target.shape, target.dtype) for images, target in batches)
        self._seen[shapes] += 1
        if self._seen[shapes] <= WARM_UP:
            with _side_stream():
                return add_gradients(*trained, batches)
        if shapes not in self._passes:
            # They share memory: what a pass leaves is used up before the next one begins.
            pool = next((known.pool for known in self._passes.values()), None)
            self._passes[shapes] = CapturedPass(*trained, batches, pool)
        return self._passes[shapes](batches)


def check_converges(loss: float, model: nn.Module, lr: float, epoch: int) -> None:
    """Stop a training whose loss is no number any more: no later epoch makes it one again.

    An overflow of float16 that was skipped leaves such a loss, but the weights as they were.

    Args:
        loss: Mean training loss of an epoch, the same on every process.
        model: In training.
        lr: Learning rate that was given.
        epoch: That has ended (0-based).

    Raises:
        ValueError: neither the loss nor all weights are finite.
    """
    if math.isfinite(loss):
        return
    # Of sharded weights the part that this process holds.
    weights = (getattr(p, "to_local", lambda p=p: p)() for p in model.parameters())
    if all(bool(weight.isfinite().all()) for weight in weights):
        return
    hint = f"It is {loss} in epoch {epoch + 1}. {DIVERGED}"
    raise invalid("lr", "one under which the training loss stays finite", lr, hint=hint)


def _check_first_order(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that a gradient per step is not enough for."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    needs_closure = closure is not None and closure.default is closure.empty
    if needs_closure or getattr(optimizer, "is_second_order", False):
        what = "calls the model itself" if needs_closure else "takes second derivatives"
        hint = f"{type(optimizer).__name__} {what}: use another, such as SGD or AdamW."
        expected = "one that steps by the gradient it is left"
        raise invalid("optimizer", expected, type(optimizer).__name__, hint=hint)


def micro_batches(batches: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of ``size`` batches, one list an optimizer step; the last one may be shorter."""
    left = iter(batches)
    while group := list(islice(left, size)):
        yield group


@contextlib.contextmanager
def _side_stream() -> Iterator[None]:
    """Run the block on another CUDA stream, which the work before a capture has to use."""
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


def add_gradients(
    accelerator: Accelerator,
    net: nn.Module,
    criterion: ClassificationLoss,
    batches: list[Batch],
) -> Tensor:
    """Add the gradients of a step to the parameters; returns this process's share of its loss."""
    whole = accelerator.reduce(sum(criterion.denominator(y) for _, y in batches), "sum")
    loss = torch.zeros((), device=accelerator.device)
    for index, (images, target) in enumerate(batches):
        last = index + 1 == len(batches)
        with contextlib.nullcontext() if last else accelerator.no_sync(net):
            part = criterion(net(images)[: len(target)], target, whole)
            # DDP averages the gradients over the processes, but their sum is needed. Dividing the
            # denominator by the number of processes instead would round it.
            part = part * accelerator.num_processes
            accelerator.backward(part)
        loss += part.detach()
    return loss


class CapturedPass:
    """:func:`add_gradients` as a CUDA graph, for batches of the shapes it was captured with.

    Args:
        accelerator: What prepared the model.
        net: The prepared model.
        criterion: Its loss.
        batches: Micro-batches of a step; their gradients are not kept.
        pool: Memory of another captured pass to share, if their replays never overlap.

    Raises:
        RuntimeError: something in the model or the loss cannot be captured.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        net: nn.Module,
        criterion: ClassificationLoss,
        batches: list[Batch],
        pool: Any = None,
    ) -> None:
        self._batches = [(images.clone(), target.clone()) for images, target in batches]
        self._captured = net, criterion  # their tensors must outlive the graph
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph, pool=pool):
                self._loss = add_gradients(accelerator, net, criterion, self._batches)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            problem = "the forward and backward pass cannot be captured as a CUDA graph"
            raise RuntimeError(f"{problem}; use replay=False, or no --compile") from error
        self.pool = self._graph.pool()
        self._gradients = [(p, p.grad) for p in net.parameters() if p.grad is not None]

    def __call__(self, batches: list[Batch]) -> Tensor:
        """Set the gradients to those of the batches; the next call overwrites the returned loss."""
        for kept, given in zip(self._batches, batches, strict=True):
            for tensor, new in zip(kept, given, strict=True):
                tensor.copy_(new, non_blocking=True)
        self._graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return self._loss
