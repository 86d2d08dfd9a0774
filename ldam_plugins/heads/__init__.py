"""Cosine heads: put on a model, found in it, folded into an ordinary layer."""

from ldam_plugins.heads.cosine import use_cosine_head
from ldam_plugins.heads.finder import find_head
from ldam_plugins.heads.folding import fold_cosine_head, folded_state_dict
from ldam_plugins.heads.freezing import freeze_backbone
from ldam_plugins.heads.guard import check_heads
from ldam_plugins.heads.layers import CosineConv2d, CosineLinear, cosine_heads

__all__ = [
    "CosineConv2d",
    "CosineLinear",
    "check_heads",
    "cosine_heads",
    "find_head",
    "fold_cosine_head",
    "folded_state_dict",
    "freeze_backbone",
    "use_cosine_head",
]
