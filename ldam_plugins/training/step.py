"""One update of a model by Accelerate: of micro-batches and processes, as a CUDA graph."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn

from ldam_plugins.losses.base import ClassificationLoss

Batch = tuple[Tensor, Tensor]
Shapes = tuple[tuple[torch.Size, torch.Size, torch.dtype], ...]

WARM_UP = 3
"""Updates before the capture, in which libraries choose kernels and allocate what they keep."""


class TrainStep:
    """Updates of one model, compiled for its whole batches only.

    Batches of another shape than the first (the last of an epoch) are not worth another
    compilation, so they run eagerly.

    Args:
        accelerator: Where the model trains.
        net: The prepared model.
        criterion: Its loss.
        optimizer: The prepared optimizer of its parameters.
        clip_grad: Largest norm of the gradient; None: any.
        replay: On one GPU, capture the forward and the backward pass once as a CUDA graph and
            replay it from then on: the kernels of small steps take less time than their launches.
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
        self.accelerator = accelerator
        self.net = net
        self.criterion = criterion
        self.optimizer = optimizer
        self.clip_grad = clip_grad
        alone = accelerator.distributed_type == DistributedType.NO
        self._replays = replay and alone and accelerator.device.type == "cuda"
        self._whole: Shapes = ()
        self._seen: Counter[Shapes] = Counter()
        self._passes: dict[Shapes, CapturedPass] = {}

    def __call__(self, batches: list[Batch]) -> Tensor:
        """One update from micro-batches of all processes; returns its loss.

        Every part is divided by the denominator of the whole, so the update does not depend on how
        the batch was cut: it is the mean over the whole batch that one process would compute.
        Images past the last target are repeats and have no part in it.

        Raises:
            RuntimeError: the pass was to be captured and cannot be.
        """
        shapes = tuple((images.shape, target.shape, target.dtype) for images, target in batches)
        self._whole = self._whole or shapes
        if shapes == self._whole:
            loss = self._gradients(shapes, batches)
        else:
            with torch.compiler.set_stance("force_eager"):
                loss = self._gradients(shapes, batches)
        if self.clip_grad is not None:
            self.accelerator.clip_grad_norm_(self.net.parameters(), self.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.accelerator.reduce(loss, "mean")

    def _gradients(self, shapes: Shapes, batches: list[Batch]) -> Tensor:
        """Gradients by a pass as it is, the first ones before a capture, or a replay."""
        trained = self.accelerator, self.net, self.criterion
        if not self._replays:
            return add_gradients(*trained, batches)
        self._seen[shapes] += 1
        if self._seen[shapes] <= WARM_UP:
            with _side_stream():
                return add_gradients(*trained, batches)
        if shapes not in self._passes:
            # One pool: what a pass leaves is used up before the next one begins.
            pool = next((known.pool for known in self._passes.values()), None)
            self._passes[shapes] = CapturedPass(*trained, batches, pool)
        return self._passes[shapes](batches)


@contextlib.contextmanager
def _side_stream() -> Iterator[None]:
    """Work on another stream than the current one, in its place, as CUDA asks before a capture."""
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
    """Add the gradients of an update to the parameters; returns the share of its loss."""
    whole = accelerator.reduce(sum(criterion.denominator(y) for _, y in batches), "sum")
    loss = torch.zeros((), device=accelerator.device)
    for index, (images, target) in enumerate(batches):
        last = index + 1 == len(batches)
        with contextlib.nullcontext() if last else accelerator.no_sync(net):
            part = criterion(net(images)[: len(target)], target, whole)
            # DDP averages the gradients over the processes; they are to be summed. (A denominator
            # divided by 3 would be rounded.)
            part = part * accelerator.num_processes
            accelerator.backward(part)
        loss += part.detach()
    return loss


class CapturedPass:
    """:func:`add_gradients` as a CUDA graph, for batches of the shapes it was captured with.

    Args:
        accelerator: Where the model trains.
        net: The prepared model.
        criterion: Its loss.
        batches: Micro-batches of an update; their gradients are not kept.
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
        """Gradients of the batches; the loss is overwritten by the next call."""
        for kept, given in zip(self._batches, batches, strict=True):
            for tensor, new in zip(kept, given, strict=True):
                tensor.copy_(new, non_blocking=True)
        self._graph.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        return self._loss
