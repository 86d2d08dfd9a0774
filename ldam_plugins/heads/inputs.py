"""What the last layer of a model gets as its input: the features that it classifies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

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
    names = head_names(model, head)
    if len(names) != 1:
        raise invalid("model", "one with a single head", names)
    return names[0]


def head_names(model: nn.Module, head: str | Sequence[str] | None = None) -> tuple[str, ...]:
    """The dotted names of the heads of ``model``: its cosine heads, or what `find_head` finds.

    Args:
        model: A classifier.
        head: The names, where the search does not find the right layers.

    Raises:
        ValueError: none is found.
    """
    return (head is None and tuple(cosine_heads(model))) or find_head(model, head)


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
    for (call,), output in with_head_calls(model, batches, run, (single_head(model, head),)):
        yield one_vector_a_sample(call), output


class HeadCall(NamedTuple):
    """What a head got and gave for a batch: (N, ..., D) and (N, ..., C), on the model's device."""

    inputs: Tensor
    outputs: Tensor


@torch.inference_mode()
def with_head_calls(
    model: nn.Module,
    batches: Iterable[Any],
    run: Callable[[nn.Module, Any], _Output],
    names: Sequence[str],
) -> Iterator[tuple[tuple[HeadCall, ...], _Output]]:
    """As :func:`with_head_inputs`, but for several heads, and with what each of them gives.

    Yields:
        The call of each head, in the order of ``names``, and what ``run`` returned.

    Raises:
        ValueError: a head that is called more than once for a batch, or not at all.
    """
    seen: list[list[HeadCall]] = [[] for _ in names]

    def note(calls: list[HeadCall]) -> Callable[..., None]:
        return lambda module, inputs, output: calls.append(HeadCall(inputs[0], output))

    hooks = [
        model.get_submodule(name).register_forward_hook(note(calls))
        for name, calls in zip(names, seen, strict=True)
    ]
    try:
        with evaluation_mode(model):
            for batch in batches:
                for calls in seen:
                    calls.clear()
                output = run(model, batch)
                for calls in seen:
                    if len(calls) != 1:
                        raise invalid("calls of the head for a batch", "1", len(calls))
                yield tuple(calls[0] for calls in seen), output
    finally:
        for hook in hooks:
            hook.remove()


def one_vector_a_sample(call: HeadCall, logits: Tensor | None = None) -> Tensor:
    """The vector of each sample that the head turned into its logits, (N, D) float32 on the CPU.

    Args:
        call: Of the head.
        logits: (N, C) of the model. With them a head that is called on all tokens (N, T, D) is read
            at the token whose output they are.

    Raises:
        ValueError: the head gets several vectors a sample.
    """
    features = call.inputs
    if features.ndim == 4:  # 1x1 maps of a convolution
        features = features.flatten(1)
    elif features.ndim == 3 and logits is not None and call.outputs.ndim == 3:
        given = call.outputs.float().cpu() == logits[:, None]
        same = given.all(dim=2)
        if same.any(dim=1).all():
            token = same.float().argmax(dim=1).to(features.device)
            features = features[torch.arange(len(features), device=features.device), token]
    if features.ndim != 2:
        expected = "(samples, features)"
        raise invalid("input of the head", expected, tuple(features.shape))
    return features.float().cpu()
