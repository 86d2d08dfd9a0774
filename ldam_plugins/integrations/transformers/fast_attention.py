"""Dropout of a transformer on a CPU: fifteen random bits an element, attention block by block."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ldam_plugins.kernels.dispatch import can_inspect_values

ATTENTION = "sdpa_fast_dropout"
"""Name under which transformers finds this attention."""
_STEPS = 1 << 15  # steps of a probability: of the 16 bits of a draw one becomes the sign
_BLOCK = 1 << 20  # probabilities worked on at a time, for the caches of the cores


def use_fast_dropout(model: PreTrainedModel) -> bool:
    r"""Let a model of transformers draw its dropout several times faster on a CPU.

    torch draws dropout on a CPU one element after the other, and with dropout its attention goes
    the long way, in float32 even under autocast. Here a 64-bit draw serves four elements, and the
    attention is computed block by block:

    .. math:: O = \frac{M \odot \mathrm{softmax}(s\,QK^\top)}{1 - p}\,V,
        \qquad M_{ij} \sim \mathrm{Bernoulli}(1 - p)

    with :math:`p` rounded to a multiple of 1/32768. Scores and their gradients are float32; the
    probabilities are rounded to the type of the queries, as in torch's kernel without dropout. The
    distribution is the usual one and the numbers come from torch's generator, so a seed repeats a
    run, but the values drawn are others than without this function.

    The attention ``"sdpa"`` computes what lies outside of this: no dropout, another device or
    type, compiled or traced code, tensor subclasses, transforms of torch.func, grouped queries,
    and masks that are not boolean or leave a query no key.

    Args:
        model: Changed in place; what it saves is as before.

    Returns:
        Whether the attention is now computed so: one other than ``"sdpa"`` is left as it is.

    Example:
        >>> from transformers import BertConfig, BertModel
        >>> sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
        >>> use_fast_dropout(BertModel(BertConfig(vocab_size=9, num_hidden_layers=1, **sizes)))
        True
    """
    for module in model.modules():
        if type(module) is nn.Dropout:
            module.__class__ = FastDropout
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(ATTENTION, attention_forward)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
        model.set_attn_implementation(ATTENTION)
    return model.config._attn_implementation == ATTENTION


class FastDropout(nn.Dropout):
    """``nn.Dropout`` that draws fifteen bits an element on a CPU; elsewhere it is its parent."""

    def forward(self, input: Tensor) -> Tensor:
        """Input of any shape, each element 0 with probability p and else divided by 1 - p."""
        steps = _dropped_steps(self.p)
        if not (self.training and 0 < steps < _STEPS and can_inspect_values(input)):
            return super().forward(input)
        kept = _draw(input.shape, steps).ge_(0).to(input.dtype).mul_(_STEPS / (_STEPS - steps))
        return input.mul_(kept) if self.inplace else input * kept


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention for the ``AttentionInterface`` of transformers; see :func:`use_fast_dropout`.

    Args:
        module: The layer; its ``num_key_value_groups`` and ``is_causal`` count if it has them.
        query: (N, H, L, D).
        key: (N, H, S, D).
        value: (N, H, S, E).
        attention_mask: Boolean, broadcastable to (N, H, L, S), True where a query sees a key.
        dropout: Probability p of leaving a key out.
        scaling: s; None: 1/sqrt(D).
        is_causal: Whether queries see no later keys where there is no mask; None: as the module.
        **kwargs: For the attention ``"sdpa"``, which computes all that is asked for with them.

    Returns:
        The outputs, (N, L, H, E), and None.
    """
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    usual = (
        not can_inspect_values(query, key, value, attention_mask)
        or not 0 < _dropped_steps(dropout) < _STEPS
        or getattr(module, "num_key_value_groups", 1) > 1
        or any(kwargs.get(name) for name in ("softcap", "output_attentions"))
        or kwargs.get("position_bias") is not None
        or (is_causal if attention_mask is None else not _leaves_keys(attention_mask))
    )
    parts = [query, key, value]
    if torch.is_autocast_enabled("cpu"):
        parts = [part.to(torch.get_autocast_dtype("cpu")) for part in parts]
    if usual or any(part.dtype not in (torch.float32, torch.bfloat16) for part in parts):
        kwargs |= {"dropout": dropout, "scaling": scaling, "is_causal": is_causal}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    output: Tensor = _DropoutAttention.apply(*parts, attention_mask, dropout, scale)
    return output.transpose(1, 2).contiguous(), None


def _leaves_keys(mask: Tensor) -> bool:
    """Whether a mask is boolean and every query sees a key (softmax of none has no value)."""
    return mask.dtype == torch.bool and bool(mask.any(-1).all())


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
