"""Dropout of a transformer on a CPU: fifteen random bits an element, attention block by block.

torch draws dropout on a CPU one element after the other, and with dropout its attention computes
in float32 even under autocast. Here a draw of 64 random bits serves four elements, and the
attention is computed block by block. The draws come from torch's generator, so a seed repeats a
run, but they are others than torch's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ldam_plugins.kernels.dispatch import can_inspect_values

_STEPS = 1 << 15  # steps of a probability: of the 16 bits of a draw one becomes the sign
_BLOCK = 1 << 20  # probabilities worked on at a time, for the caches of the cores


class FastDropout(nn.Dropout):
    """``nn.Dropout`` that draws fifteen bits an element on a CPU; elsewhere it is its parent."""

    def forward(self, input: Tensor) -> Tensor:
        """Input of any shape, each element 0 with probability p and else divided by 1 - p."""
        if not (self.training and can_drop(self.p) and can_inspect_values(input)):
            return super().forward(input)
        steps = _dropped_steps(self.p)
        kept = _draw(input.shape, steps).ge_(0).to(input.dtype).mul_(_STEPS / (_STEPS - steps))
        return input.mul_(kept) if self.inplace else input * kept


def can_drop(p: float) -> bool:
    """Whether the probability p, rounded to a multiple of 1/32768, is neither 0 nor 1."""
    return 0 < _dropped_steps(p) < _STEPS


def _dropped_steps(p: float) -> int:
    return round(p * _STEPS)


def _draw(shape: torch.Size, steps: int) -> Tensor:
    """Independent int16 of a CPU that are negative with probability ``steps / _STEPS``."""
    count = shape.numel()
    bits = torch.empty(-(-count // 4), dtype=torch.int64, device="cpu").random_().view(torch.int16)
    return bits[:count].view(shape).bitwise_and_(_STEPS - 1).sub_(steps)


def _blocks(probabilities: Tensor) -> Iterator[slice]:
    """Slices of a batch of attention probabilities, (N, H, L, S)."""
    rows = max(1, _BLOCK // max(1, math.prod(probabilities.shape[1:])))
    return (slice(start, start + rows) for start in range(0, len(probabilities), rows))


def dropout_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scale: float
) -> Tensor:
    r"""Attention with dropout of its probabilities, (N, H, L, E).

    .. math:: O = \frac{M \odot \mathrm{softmax}(s\,QK^\top)}{1 - p}\,V,
        \qquad M_{ij} \sim \mathrm{Bernoulli}(1 - p)

    Scores and their gradients are float32; the probabilities are rounded to the type of the
    queries. Derivatives are of first order.

    Args:
        query: (N, H, L, D) on the CPU, float32 or bfloat16.
        key: (N, H, S, D), of the same type.
        value: (N, H, S, E), of the same type.
        mask: Boolean, broadcastable to (N, H, L, S), True where a query sees a key; each query
            sees one at least. None: each sees all.
        dropout: Probability p of leaving a key out, for which :func:`can_drop` holds.
        scale: s.
    """
    output: Tensor = _DropoutAttention.apply(query, key, value, mask, dropout, scale)
    return output


class _DropoutAttention(torch.autograd.Function):
    """Keeps the probabilities for the backward pass, those left out with a negative sign."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        dropout: float,
        scale: float,
    ) -> Tensor:
        steps = _dropped_steps(dropout)
        ctx.scale, ctx.kept = scale, 1 - steps / _STEPS
        texts, heads, length, _ = query.shape
        signed = query.new_empty(texts, heads, length, key.shape[2])
        output = value.new_empty(texts, length, heads, value.shape[-1]).transpose(1, 2)
        scaled, turned = query.float() * scale, key.float().mT
        bias = None
        if mask is not None:
            bias = torch.where(mask, 0.0, -math.inf).expand(texts, -1, -1, -1)
        with torch.autocast("cpu", enabled=False):
            for block in _blocks(signed):
                scores = scaled[block] @ turned[block]
                if bias is not None:
                    scores += bias[block]
                part = signed[block]
                part.copy_(scores.softmax(-1).copysign_(_draw(part.shape, steps)))
                output[block] = part.clamp_min(0) @ value[block] / ctx.kept
        ctx.save_for_backward(query, key, value, signed, output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, signed, output = ctx.saved_tensors
        of_query, of_key, of_value = map(torch.empty_like, (query, key, value))
        wide = grad.float()
        # The mean gradient of a row's probabilities, which softmax takes off.
        mean = (wide * output.float()).sum(-1, keepdim=True)
        wide, turned = wide / ctx.kept, value.float().mT
        with torch.autocast("cpu", enabled=False):
            for block in _blocks(signed):
                part = signed[block]
                seen = part.clamp_min(0)
                of_value[block] = seen.mT @ wide[block].to(seen.dtype)
                of_scores = (wide[block] @ turned[block]).mul_(seen.float())
                of_scores.addcmul_(part.abs().float(), mean[block], value=-1)
                narrow = of_scores.to(seen.dtype)
                of_query[block] = narrow @ key[block] * ctx.scale
                of_key[block] = narrow.mT @ query[block] * ctx.scale
        return of_query, of_key, of_value, None, None, None
