"""The head of a model as one affine map of its features: read in float64, written back.

Whatever is done to a trained head here ends as another weight and bias of the same layers, so that
the host loads the model alone, and can be undone.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ldam_plugins._validation import invalid
from ldam_plugins.heads import cosine_heads, find_head, fold_cosine_head
from ldam_plugins.heads.folding import fold_before_fusing, matching_scale
from ldam_plugins.heads.guard import guard_heads, parallel_wrapper
from ldam_plugins.heads.inputs import head_names
from ldam_plugins.heads.layers import layer_sizes, replace_layers
from ldam_plugins.posthoc.features import Features

Layer = nn.Linear | nn.Conv2d

_CHECKED_ROWS = 2000
_TOLERANCE = 0.02
"""Share of their size by which logits may differ, as those of bfloat16 do."""
ROWS_AT_ONCE = 8192
"""What is computed of features or logits in float64 is computed of so many rows at a time."""


class LinearHead:
    """``z = W x + b``: the heads of a model on their features, side by side.

    Of several heads whose outputs are averaged ``W`` is made of their weights side by side, each
    times its share in the average.

    Args:
        names: Dotted names of the heads.
        layers: The layers, in that order.
        shares: What each layer's output counts in the logits.

    Attributes:
        weight: W, (C, D) float64 on the CPU, as read when it was made or last written.
        bias: b, (C,) likewise.
    """

    def __init__(
        self, names: Sequence[str], layers: Sequence[Layer], shares: Sequence[float]
    ) -> None:
        self.names, self.layers, self.shares = tuple(names), tuple(layers), tuple(shares)
        self.read()

    @classmethod
    def of_model(
        cls,
        model: nn.Module,
        features: Features,
        head: str | Sequence[str] | None = None,
    ) -> LinearHead:
        """The head of a model, after a check that it can be written and made these features.

        Raises:
            TypeError: the head does not hold its weights as floats.
            ValueError: a cosine head; a head that is not found, is sharded, or shares its weights;
                features or logits of another model, or logits that are no average of what the
                heads give.
        """
        refuse_cosine_heads(model)
        names = find_head(model, head)
        layers: list[Any] = [model.get_submodule(name) for name in names]
        for name, layer in zip(names, layers, strict=True):
            check_writable(model, name, layer, layers)
        return cls(names, layers, _shares(layers, features, names))

    def read(self) -> None:
        """Read weight and bias from the layers."""
        parts = zip(self.layers, self.shares, strict=True)
        self.weight = torch.cat(
            [share * _wide(layer.weight).flatten(1) for layer, share in parts], dim=1
        )
        self.bias = torch.zeros(len(self.weight), dtype=torch.float64)
        for layer, share in zip(self.layers, self.shares, strict=True):
            if layer.bias is not None:
                self.bias += share * _wide(layer.bias)

    @torch.no_grad()
    def write(self, weight: Tensor, bias: Tensor) -> bool:
        """Make the model give ``W x + b``, each value rounded once to the dtype of its layer.

        Args:
            weight: W, (C, D).
            bias: b, (C,). It goes to the heads that have a bias. Where none has one and b is not
                0, they get one.

        Returns:
            Whether the heads got a bias.
        """
        start = 0
        for layer, share in zip(self.layers, self.shares, strict=True):
            width = layer_sizes(layer)[0]
            block = weight[:, start : start + width] / share
            layer.weight.copy_(block.to(layer.weight.dtype).view_as(layer.weight))
            start += width
        needs_bias = not self.has_bias and bool(bias.any())
        if needs_bias:
            for layer in self.layers:
                give_bias(layer)
        pairs = zip(self.layers, self.shares, strict=True)
        own = [(layer, share) for layer, share in pairs if layer.bias is not None]
        for layer, _ in own:
            whole = sum(share for _, share in own)
            parameter: Any = layer.bias
            parameter.copy_((bias / whole).to(parameter.dtype))
        self.read()
        return needs_bias

    @property
    def has_bias(self) -> bool:
        """Whether a head has a bias."""
        return any(layer.bias is not None for layer in self.layers)

    def logits(self, features: Tensor) -> Tensor:
        """``W x + b`` (N, C) of features (N, D), summed in float64, float32."""
        return affine(features, self.weight, self.bias)


class HeadState:
    """The heads of a model as they are, to be put back.

    Args:
        model: The model.
        head: Names of its heads, see `find_head`.
    """

    def __init__(self, model: nn.Module, head: str | Sequence[str] | None = None) -> None:
        self.model = model
        self.layers: dict[str, Any] = {
            name: model.get_submodule(name) for name in head_names(model, head)
        }
        self.values = {
            name: {key: value.detach().clone() for key, value in layer._parameters.items()
                   if value is not None}
            for name, layer in self.layers.items()
        }  # fmt: skip

    @contextmanager
    def restored_on_error(self) -> Iterator[None]:
        """Restore the heads if an error leaves the block."""
        try:
            yield
        except BaseException:
            self.restore()
            raise

    @torch.no_grad()
    def restore(self) -> None:
        """Put the layers back, with the values that they had."""
        changed: dict[Any, nn.Module] = {}
        for name, layer in self.layers.items():
            if self.model.get_submodule(name) is not layer:
                changed[self.model.get_submodule(name)] = layer
            for key in list(layer._parameters):
                if key in self.values[name]:
                    layer._parameters[key].copy_(self.values[name][key])
                else:
                    layer._parameters[key] = None
        if changed:
            replace_layers(self.model, changed)
            guard_heads(self.model)
            fold_before_fusing(self.model)


def check_features(
    model: nn.Module, features: Features, head: str | Sequence[str] | None = None
) -> None:
    """Check that the heads of a model, cosine ones as well, turn the features into their logits.

    Raises:
        ValueError: they do not.
    """
    names = head_names(model, head)
    _shares([model.get_submodule(name) for name in names], features, names)


def fold_to_fit(model: nn.Module, features: Features) -> Features:
    """Fold the cosine head of ``model``, if it has one, so that its probabilities change least.

    It is :func:`.fold_cosine_head` with the features in place of ``inputs``.

    Returns:
        The features with the logits of the folded model.

    Raises:
        ValueError: the model is the head itself; features of another model.
    """
    heads = cosine_heads(model)
    if not heads:
        return features
    if "" in heads:
        hint = "Put it into another module, such as nn.Sequential, which then holds the new layer."
        raise invalid("model", "one that contains its cosine head", "the head alone", hint=hint)
    layers = list(heads.values())
    shares = _shares(layers, features, list(heads))
    fold_cosine_head(model)
    plain: list[Any] = [model.get_submodule(name) for name in heads]
    folded = LinearHead(list(heads), plain, shares)
    factor = matching_scale(features.logits, folded.logits(features.features))
    with torch.no_grad():
        for layer in plain:
            layer.weight.mul_(factor)
    folded.read()
    return replace(features, logits=folded.logits(features.features))


def affine(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``W x + b`` (N, C) in float32, each sum in float64.

    Args:
        features: x, (N, D).
        weight: W, (C, D) float64.
        bias: b, (C,) float64.
    """
    logits = torch.empty(len(features), len(weight))
    for start in range(0, len(features), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        logits[rows] = torch.addmm(bias, features[rows].double(), weight.T)
    return logits


def refuse_cosine_heads(model: nn.Module) -> None:
    """Refuse a model whose head has no bias and no weight of free length.

    Raises:
        ValueError: it has a cosine head.
    """
    if cosine_heads(model):
        hint = "It has no bias. Call fold_cosine_head(model, inputs=some_batches) first, which"
        hint += " makes it an ordinary layer with nearly the same probabilities."
        raise invalid("model", "one without a cosine head", [*cosine_heads(model)], hint=hint)


def check_writable(
    model: nn.Module,
    name: str,
    layer: Layer,
    heads: Sequence[nn.Module],
    *,
    parts: Sequence[str] = ("weight", "bias"),
) -> None:
    """Check that other values can be written into a head, or a bias be given to it.

    Args:
        model: The model.
        name: Dotted name of the head.
        layer: The head.
        heads: All heads, which may share what is written alike.
        parts: What is to be written.

    Raises:
        TypeError: it is quantised, parametrised or not initialised.
        ValueError: it is wrapped or sharded, on the meta device, or another module shares it.
    """
    wrapper = parallel_wrapper(model, name, layer)
    if wrapper is not None:
        expected = f"one whose head {name!r} is neither wrapped nor sharded"
        hint = "Give the model inside: accelerator.unwrap_model(model)."
        raise invalid("model", expected, type(wrapper).__name__, hint=hint)
    for part in parts:
        _check_part(model, name, layer, heads, part)


def _check_part(
    model: nn.Module, name: str, layer: Layer, heads: Sequence[nn.Module], part: str
) -> None:
    own = layer._parameters.get(part)
    absent = part == "bias" and layer.bias is None
    values = layer._parameters.get("weight") if absent else own
    if values is None or torch.nn.parameter.is_lazy(values) or not values.is_floating_point():
        expected = f"a model whose head {name!r} holds its {part} as floats"
        hint = "Load a quantised head in full, run a batch through a lazy one, or remove the"
        hint += " parametrization (pruning) first."
        raise invalid("model", expected, type(layer).__name__, hint=hint, error=TypeError)
    if values.is_meta or len(values) != layer_sizes(layer)[1]:
        expected = f"a model whose head {name!r} has its whole {part} in memory"
        shown = "one on the meta device" if values.is_meta else tuple(values.shape)
        hint = "Load its weights, or gather what is partitioned, first."
        raise invalid("model", expected, shown, hint=hint)
    for other, module in model.named_modules():
        shared = own is not None and any(each is own for each in module._parameters.values())
        alike = any(module is head for head in heads) if part == "bias" else module is layer
        if shared and not alike:
            expected = f"one whose head {name!r} has a {part} of its own"
            hint = f"Give it one first: `layer.{part} = nn.Parameter("
            hint += f"layer.{part}.detach().clone())`."
            raise invalid("model", expected, f"that of {other!r}", hint=hint)


def warn_of_new_bias(name: str, stacklevel: int) -> None:
    """Warn that a head got a bias that its architecture may lack."""
    warnings.warn(
        f"the head {name!r} had no bias and has one now: build the model with a bias"
        " there before you load what you save of it, or the adjustment is lost.",
        stacklevel=stacklevel,
    )


def give_bias(layer: Layer) -> None:
    """Give a layer a bias of zeros."""
    weight = layer.weight
    zeros = weight.new_zeros(layer_sizes(layer)[1])
    layer.bias = nn.Parameter(zeros, requires_grad=weight.requires_grad)


def _wide(values: Tensor) -> Tensor:
    return values.detach().cpu().double()  # in this order: Apple's MPS has no float64


def _shares(layers: Sequence[Any], features: Features, names: Sequence[str]) -> list[float]:
    """What the output of each layer counts in the logits, after a check that it explains them."""
    widths = [layer_sizes(layer)[0] for layer in layers]
    found, size = features.features[:_CHECKED_ROWS], features.features.shape[1]
    logits = features.logits[:_CHECKED_ROWS].double()
    sizes = (sum(widths), layer_sizes(layers[0])[1])
    if (size, logits.shape[1]) != sizes:
        expected = f"those of this model: {sizes[0]} features and {sizes[1]} logits a sample"
        raise _of_another_model(expected, f"{size} and {logits.shape[1]}")
    outputs = [
        _output(layer, part) for layer, part in zip(layers, found.split(widths, 1), strict=True)
    ]
    shares = torch.full((len(layers),), 1 / len(layers), dtype=torch.float64)
    columns = torch.stack([output.flatten() for output in outputs], dim=1)
    size_of_logits = logits.square().mean().sqrt() + 1e-6

    def misfit() -> float:
        rest = columns @ shares - logits.flatten()
        return float(rest.square().mean().sqrt() / size_of_logits)

    if misfit() > _TOLERANCE and len(layers) > 1:  # an average with other shares
        shares = torch.linalg.lstsq(columns, logits.flatten()).solution
    if misfit() > _TOLERANCE or bool((shares.abs() < 1e-3).any()):
        if len(layers) > 1:
            expected = f"one whose logits are an average of its heads {', '.join(names)}"
            hint = "Or the features are not those of this model as it is now."
            raise invalid("model", expected, "one that makes them in another way", hint=hint)
        expected = "those of this model, whose head turns them into their logits"
        raise _of_another_model(expected, f"logits that differ by {misfit():.1%} of their size")
    return shares.tolist()


def _of_another_model(expected: str, found: str) -> Exception:
    hint = "Extract them anew, extract_features(model, loader), with the model as it is."
    return invalid("features", expected, found, hint=hint)


@torch.no_grad()
def _output(layer: Any, features: Tensor) -> Tensor:
    """What a head gives for features (N, D), (N, C) float64 on the CPU."""
    mode = layer.training
    layer.eval()
    try:
        given = features.to(layer.weight.device, layer.weight.dtype)
        if isinstance(layer, nn.Conv2d):
            given = given[:, :, None, None]
        return layer(given).flatten(1).cpu().double()
    finally:
        layer.training = mode
