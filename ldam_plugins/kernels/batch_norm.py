"""Batch normalisation that compiles to tight loops on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def use_fast_batch_norm(model: nn.Module) -> int:
    r"""Let ``torch.compile`` make less of a CPU's training step out of batch normalisation.

    What torch compiles on a CPU divides and takes a square root for every element, and keeps the
    statistics for the backward pass in the type of the input, bf16 under autocast. Here they are
    float32, and a pass over the input multiplies and adds what was made once for each channel c:

    .. math:: y = a_c (x - \mu_c) + b_c,
        \qquad \partial x = a_c \, \partial y + p_c (x - \mu_c) + q_c

    It is the same function: ``nn.BatchNorm2d`` in training, running statistics included, up to
    rounding. Whatever is not compiled, not on a CPU or not in training is left to torch, and what
    the model saves is as before.

    Args:
        model: Changed in place: its layers of the very class ``nn.BatchNorm2d`` become
            :class:`FastBatchNorm2d`. To be called before ``torch.compile``.

    Returns:
        How many layers that were.

    Example:
        >>> use_fast_batch_norm(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
        1
    """
    layers = [module for module in model.modules() if type(module) is nn.BatchNorm2d]
    for layer in layers:
        # The object stays: optimizers and averages of the weights may hold its parameters.
        layer.__class__ = FastBatchNorm2d
    return len(layers)


class FastBatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` as :func:`use_fast_batch_norm` has it."""

    def forward(self, input: Tensor) -> Tensor:
        """Input (N, C, H, W), N H W greater than 1; the output has its shape and type."""
        mean, variance, momentum = self.running_mean, self.running_var, self.momentum
        if (
            not torch.compiler.is_compiling()
            or not self.training
            or not self.track_running_stats
            or momentum is None
            or mean is None
            or variance is None
            or self.num_batches_tracked is None
            or not _ours(input, self.weight, mean)
        ):
            return super().forward(input)
        normalised: Tensor
        normalised, of_batch, spread = _BatchNorm.apply(input, self.weight, self.bias, self.eps)
        with torch.no_grad():
            count = input.numel() / input.shape[1]
            self.num_batches_tracked.add_(1)
            mean.lerp_(of_batch, momentum)
            variance.lerp_(spread * (count / (count - 1)), momentum)
        return normalised


def _ours(input: Tensor, weight: Tensor | None, mean: Tensor) -> bool:
    """Whether the batch can be normalised here; a wrong one is left to torch, which says why."""
    return (
        input.ndim == 4
        and input.device.type == "cpu"
        and input.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and weight is not None
        and weight.dtype == mean.dtype == torch.float32
    )


class _BatchNorm(torch.autograd.Function):
    """Output, mean and variance (C,) of a batch; the statistics have no gradient."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = input.float()
        # Each image about a value of its own: one pass gives both sums, and the subtraction loses
        # no more than the spread within an image. What lies between images is added from their
        # means, so an image of another brightness costs no digits, whichever it is.
        origin = wide[:, :, :1].mean((2, 3))
        shifted = wide - origin[:, :, None, None]
        pixels = input.shape[2] * input.shape[3]
        offset = shifted.sum((2, 3)) / pixels
        within = ((shifted * shifted).sum((2, 3)) / pixels - offset * offset).clamp_min(0)
        near = (origin + offset).mean(0)
        between = (origin - near) + offset
        middle = between.mean(0)
        mean = near + middle
        variance = within.mean(0) + (between - middle).square().mean(0)
        inverse = torch.rsqrt(variance + eps)
        factor = weight * inverse
        # Stacked, so that they are computed once and read: compiled into the loop they would be
        # computed for every element.
        kept = torch.stack((mean, factor, inverse))
        output = (wide - _along_channels(kept[0])) * _along_channels(kept[1])
        output += _along_channels(bias)
        ctx.save_for_backward(input, kept)
        ctx.mark_non_differentiable(mean, variance)
        return output.to(input.dtype), mean, variance

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        input, (mean, factor, inverse) = ctx.saved_tensors
        centred, of_output = input - _along_channels(mean), gradient.float()
        of_bias, of_weight = _sum(of_output), _sum(of_output * centred) * inverse
        share = factor * (input.shape[1] / input.numel())
        kept = torch.stack((factor, -share * inverse * of_weight, -share * of_bias))
        of_input = of_output * _along_channels(kept[0]) + centred * _along_channels(kept[1])
        of_input += _along_channels(kept[2])
        return of_input.to(input.dtype), of_weight, of_bias, None


def _along_channels(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def _sum(values: Tensor) -> Tensor:
    """Sum over images and pixels (C,); image by image, as short sums compile to shorter loops."""
    return values.sum((2, 3)).sum(0)
