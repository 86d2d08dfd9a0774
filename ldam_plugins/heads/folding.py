"""How long the logits of a folded head should be: fitted to inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ldam_plugins._validation import invalid

_WIDEST_FACTOR = 2.0**20


def logits_of_both(
    model: nn.Module, layers: Mapping[Any, nn.Module], inputs: Iterable[Any]
) -> tuple[Tensor, Tensor]:
    """Run ``inputs`` through the cosine and the folded model; return both (N, C) logits.

    Args:
        model: A model with cosine heads.
        layers: The folded layer of each of them.
        inputs: Batches, see :func:`ldam_plugins.heads.cosine.fold_cosine_head`.

    Raises:
        TypeError: the model's output is neither a tensor nor holds ``logits``.
        ValueError: ``inputs`` holds no example, or none with a finite, non-zero logit.
    """
    pairs = []
    with _evaluating(model):
        for batch in inputs:
            cosine = _logits(model, batch)
            hooks = [old.register_forward_hook(_answer_of(new)) for old, new in layers.items()]
            try:
                pairs.append((cosine, _logits(model, batch)))
            finally:
                for hook in hooks:
                    hook.remove()
    if not pairs:
        raise invalid("inputs", "at least one batch", inputs)
    cosine, linear = (torch.cat(part).float() for part in zip(*pairs, strict=True))
    if not (linear.isfinite().all() and cosine.isfinite().all() and linear.any()):
        raise invalid("inputs", "examples with finite logits, not all zero", inputs)
    return cosine, linear


def _answer_of(layer: nn.Module) -> Any:
    return lambda module, args, output: layer(*args)


def _logits(model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        output = model(**batch)
    else:
        output = model(batch if isinstance(batch, Tensor) else batch[0])
    logits = output.get("logits") if isinstance(output, Mapping) else output
    if not isinstance(logits, Tensor):
        expected = "batches on which the model gives a tensor or an output with `logits`"
        raise invalid("inputs", expected, type(output).__name__, error=TypeError)
    return logits.flatten(0, -2)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def matching_scale(cosine: Tensor, linear: Tensor) -> float:
    """Return the f with the least mean KL(softmax(cosine) || softmax(f * linear)).

    The divergence is convex in f; its slope is the difference of the mean logit under the two
    distributions, whose zero is bracketed on a logarithmic scale.
    """
    expected = (cosine.softmax(-1) * linear).sum(-1)
    low, high = 1 / _WIDEST_FACTOR, _WIDEST_FACTOR
    while high / low > 1 + 1e-6:
        middle = math.sqrt(low * high)
        slope = ((middle * linear).softmax(-1) * linear).sum(-1) - expected
        low, high = (low, middle) if slope.mean() >= 0 else (middle, high)
    return math.sqrt(low * high)
