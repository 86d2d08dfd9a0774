"""Sharpness-aware minimization: steps by the gradient at weights that were moved uphill first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ldam_plugins._validation import check_int, check_real, invalid
from ldam_plugins.schedules import Moment, Progress

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class SharpnessAware:
    r"""Which optimizer steps are sharpness-aware (SAM), and how far they look.

    With the loss L of the whole batch, weights w and its gradient g at w, the optimizer gets in
    place of g

    .. math:: \nabla L(w + \epsilon), \qquad \epsilon = \rho \, g / \lVert g \rVert_2

    with one norm over all trained parameters. Such a step takes a second forward and backward pass.
    Later and rarer ones cost less: a training has
    ``1 + (1 - start) / every`` times the passes of one without.

    The batch is that of all micro-batches and processes, so the step does not depend on how it is
    cut. Where each process moves its weights by the gradient of its own part, as in the paper's
    experiments (m-sharpness), ``rho`` means something else. Weight decay is the optimizer's, and no
    part of L. In the second pass layers that draw (dropout, drop path) draw the same numbers
    again, so that g is the gradient of the very loss that is looked at uphill.

    The steps follow from the :class:`.Progress` alone, so there is nothing to save.

    Source: Foret et al., ICLR 2021, arXiv 2010.01412, equation 2 and algorithm 1.

    Args:
        rho: Euclidean length of the move, in units of the weights; 0: no step is sharpness-aware.
        start: From when on: a float in [0, 1] is a share of the training, an int a 0-based epoch.
        every: From then on each ``every``-th step, the others are plain.

    Raises:
        TypeError: an argument is not a number of the right kind.
        ValueError: one is out of range.

    Example:
        >>> sam = SharpnessAware(0.05, start=0.5, every=2)
        >>> [sam.rho_at(Progress(step, 8, 4)) for step in range(8)]
        [0.0, 0.0, 0.0, 0.0, 0.05, 0.0, 0.05, 0.0]
    """

    rho: float
    start: float | int = 0
    every: int = 1

    def __post_init__(self) -> None:
        check_real("rho", self.rho, low=0)
        check_int("every", self.every, low=1)
        Moment(self.start, name="start")

    def rho_at(self, progress: Progress) -> float:
        """``rho`` of the optimizer step at ``progress``; 0 where it is a plain one.

        Raises:
            ValueError: ``start`` is an epoch past the end of the training.
        """
        if not self.rho:
            return 0.0
        first = Moment(self.start, name="start").step(
            progress.total_steps, progress.steps_per_epoch, hint="Use a smaller start."
        )
        on = progress.step >= first and (progress.step - first) % self.every == 0
        return self.rho if on else 0.0


def check_gathers_norm(accelerator: Accelerator) -> None:
    """Refuse a model whose flat shards know the norm of their own gradients only.

    Raises:
        ValueError: it is sharded by FSDP1.
    """
    if accelerator.distributed_type == "FSDP" and not accelerator.is_fsdp2:
        hint = "Write `fsdp_version: 2` into the config of Accelerate."
        raise invalid("fsdp_version", "2 for sharpness-aware steps", 1, hint=hint)


@contextmanager
def moved_uphill(model: nn.Module, rho: float) -> Iterator[None]:
    """In the block the weights are ``w + rho g / norm(g)``, g their gradients, which are taken off.

    After it, weights and buffers have the bits that they had before: what a pass in it adds to
    running statistics (of batch normalisation, of a cosine head) does not count. The gradients that
    it leaves stay. Parameters without a gradient, such as frozen ones, are not moved, and do not
    count in the norm. A gradient of zeros moves nothing.

    Args:
        model: Its gradients are those of the whole batch, on every process.
        rho: Length of the move.
    """
    moved = [parameter for parameter in model.parameters() if parameter.grad is not None]
    gradients = [parameter.grad for parameter in moved if parameter.grad is not None]
    with torch.no_grad():
        norm = _whole(torch.nn.utils.get_total_norm(gradients))
        factor = rho / norm.clamp_min(torch.finfo(norm.dtype).tiny)
        weights = [_own(parameter) for parameter in moved]
        weights_before = [weight.clone() for weight in weights]
        buffers_before = [(buffer, buffer.clone()) for buffer in model.buffers()]
        steps = torch._foreach_mul([_own(gradient) for gradient in gradients], factor)
        torch._foreach_add_(weights, list(steps))
        for parameter in moved:
            parameter.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(weights, weights_before)
            for buffer, before in buffers_before:
                buffer.copy_(before)


def _own(tensor: Any) -> Tensor:
    """The part of a tensor that this process holds, in the same memory: all but where sharded."""
    own: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return own


def _whole(tensor: Any) -> Tensor:
    """A tensor of which each process may hold its share."""
    whole: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole
