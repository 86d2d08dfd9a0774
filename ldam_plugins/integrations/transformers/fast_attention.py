"""The dropout of :mod:`ldam_plugins.kernels.dropout` for models of transformers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ldam_plugins.kernels.dispatch import can_inspect_values
from ldam_plugins.kernels.dropout import FastDropout, can_drop, dropout_attention

ATTENTION = "sdpa_fast_dropout"
"""Name under which transformers finds this attention."""


def use_fast_dropout(model: PreTrainedModel) -> bool:
    """Let a model of transformers draw its dropout several times faster on a CPU.

    Its dropout layers become :class:`.FastDropout`, and its attention, where that is ``"sdpa"``,
    :func:`.dropout_attention`, both with p rounded to a multiple of 1/32768. The distribution is
    the usual one and the numbers come from torch's generator, so a seed repeats a run, but the
    values drawn are others than without this function.

    The attention ``"sdpa"`` goes on to compute all else: no dropout, another device or type,
    compiled or traced code, tensor subclasses, transforms of torch.func, grouped queries, and masks
    that are not boolean or leave a query no key.

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
        or not can_drop(dropout)
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
    query, key, value = parts
    output = dropout_attention(query, key, value, attention_mask, dropout, scale)
    return output.transpose(1, 2).contiguous(), None


def _leaves_keys(mask: Tensor) -> bool:
    """Whether a mask is boolean and every query sees a key (softmax of none has no value)."""
    return mask.dtype == torch.bool and bool(mask.any(-1).all())
