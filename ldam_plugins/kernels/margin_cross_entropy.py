"""Cross-entropy with a margin at the target: what it is, and which form computes it.

The forms have the same values. The definition works everywhere. On a CPU
:mod:`._margin_cross_entropy_cpu` reads and writes the logits fewer times, on a GPU
:mod:`._margin_cross_entropy_triton` starts fewer kernels.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from ldam_plugins.kernels import _margin_cross_entropy_cpu as cpu_form
from ldam_plugins.kernels.cross_entropy import cross_entropy
from ldam_plugins.kernels.dispatch import any_requires_grad, runs_eagerly


def margin_cross_entropy(
    logits: Tensor,
    target: Tensor,
    margins: Tensor,
    scale: float,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """``F.cross_entropy(z - scale * margins * q, y, weight)``, where q is the target as (N, C).

    For class indices q is ``one_hot(y)``, so ``scale * margins[y]`` is taken off the target's
    logit; for soft targets y it is y itself. Mean, sum and rows are those of
    :func:`.kernels.cross_entropy.cross_entropy`.

    Args:
        logits: (N, C) floating.
        target: (N,) int64, or soft targets (N, C) in the dtype of ``margins``.
        margins: (C,) in the precision to compute in.
        scale: Factor of the margins.
        weight: (C,) in that precision, or None for ones.
        ignore_index: Index of the rows that count nowhere, such as -100.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
    """
    given = logits, target, margins, scale, weight, ignore_index, reduction
    if cpu_form.is_faster(*given):
        return cpu_form.margin_cross_entropy(*given)
    if _takes_triton(logits, target, margins, weight):
        from ldam_plugins.kernels import _margin_cross_entropy_triton as triton_form

        return triton_form.margin_cross_entropy(*given)
    return _by_definition(*given)


def _by_definition(
    logits: Tensor,
    target: Tensor,
    margins: Tensor,
    scale: float,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
) -> Tensor:
    if target.ndim == 2:
        shifted = torch.addcmul(logits.to(margins.dtype), target, margins, value=-scale)
    else:
        index = target.clamp(0, logits.shape[1] - 1)
        addend = margins.gather(0, index).mul_(-scale).unsqueeze(1)
        shifted = logits.to(margins.dtype).scatter_add(1, index.unsqueeze(1), addend)
    return cross_entropy(shifted, target, weight, ignore_index, reduction)


def _takes_triton(logits: Tensor, target: Tensor, margins: Tensor, weight: Tensor | None) -> bool:
    """Whether the kernels of Triton take these: class indices on a GPU, gradients of logits."""
    if target.ndim == 2 or not logits.is_cuda:
        return False
    if not runs_eagerly(logits, target, margins, weight) or any_requires_grad(margins, weight):
        return False
    return find_spec("triton") is not None
