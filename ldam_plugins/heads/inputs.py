"""What the last layer of a model gets as its input: the features that it classifies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ldam_plugins._validation import invalid
from ldam_plugins.heads.finder import find_head
from ldam_plugins.heads.folding import evaluation_mode
from ldam_plugins.heads.layers import cosine_heads

_Output = TypeVar("_Output")


def single_head(model: nn.Module, head: str | None = None) -> str:
    """The dotted name of the only head of ``model``, a cosine head or what `find_head` finds.

    Args:
        model: A classifier.
        head: The name, where the search does not find the right layer.

    Raises:
        ValueError: there are several, or none is found.
    """
    names = (head is None and tuple(cosine_heads(model))) or find_head(model, head)
    if len(names) != 1:
        raise invalid("model", "one with a single head", names)
    return names[0]


@torch.inference_mode()
def with_head_inputs(
    model: nn.Module,
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], _Output],
    head: str | None = None,
) -> Iterator[tuple[Tensor, _Output]]:
    """For each batch the features that the head gets, and what ``run`` returns.

    The model is in evaluation mode, without gradients; each of its modules is put back into its own
    mode at the end.

    Args:
        model: A classifier with one linear or cosine head (see `find_head`).
        batches: Batches of any form.
        run: ``run(model, batch)`` calls the model once on a batch.
        head: As for :func:`single_head`.

    Yields:
        The features (N, D) of a batch, in float32 on the CPU, and what ``run`` returned.

    Raises:
        ValueError: several heads, or a head that is called more than once or on more than one
            vector a sample.
    """
    seen: list[Tensor] = []
    hook = model.get_submodule(single_head(model, head)).register_forward_pre_hook(
        lambda module, arguments: seen.append(arguments[0].float().cpu())
    )
    try:
        with evaluation_mode(model):
            for batch in batches:
                seen.clear()
                output = run(model, batch)
                yield _one_vector_a_sample(seen), output
    finally:
        hook.remove()


def _one_vector_a_sample(seen: list[Tensor]) -> Tensor:
    if len(seen) != 1:
        raise invalid("calls of the head for a batch", "1", len(seen))
    features = seen[0].flatten(1) if seen[0].ndim == 4 else seen[0]  # 1x1 maps of a conv head
    if features.ndim != 2:
        expected = "(samples, features)"
        raise invalid("input of the head", expected, tuple(features.shape))
    return features
