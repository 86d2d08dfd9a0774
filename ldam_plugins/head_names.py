"""Where the classifier of a timm, transformers or plain model sits: its dotted names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from torch import nn

from ldam_plugins._checks import check_choice, must_be, quoted

Layers = dict[str, nn.Linear | nn.Conv2d]

_ADAPTED = "base_layer"
_FROZEN_COPY = "original_module"
_TRAINED_COPY = "modules_to_save"


def find_head(model: nn.Module, head: str | Sequence[str] | None = None) -> tuple[str, ...]:
    """Find the dotted names of the layer, or layers, that give the logits.

    The first of these that knows the model decides:

    1. ``head``, one dotted name or several.
    2. timm: ``pretrained_cfg["classifier"]``, which names the layer inside containers, the two
       heads of distilled models and the auxiliary ones; then ``get_classifier()``.
    3. transformers: the layers with ``config.num_labels`` outputs, outside the base model where
       there are such; any module with ``num_classes``: the layers with that many outputs.
    4. Any other module: its last layer with parameters if that is a linear one, or else its only
       linear layer. Last means registered last, which is how modules are usually written.

    A wrapper with a single child (data parallel, compiled, PEFT, ``TimmWrapper``) is looked
    through. In a PEFT model the trained copies in ``modules_to_save`` are the head.

    Args:
        model: The classifier; a lone ``nn.Linear`` is found under the name ``""``.
        head: The names, where the search finds nothing or the wrong layer.

    Returns:
        Names as in ``model.named_modules()``, of ``nn.Linear`` or 1x1 ``nn.Conv2d`` layers.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``head`` names no such layer, the model was built without a classifier, an
            adapter sits on it, or no layer or too many fit; the message lists the candidates.

    Example:
        >>> find_head(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)))
        ('2',)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(must_be("model", "a torch.nn.Module", type(model).__name__))
    layers = _layers(model)
    if head is not None:
        names = _given(head, layers)
    else:
        _refuse_headless(model)
        searches = (_by_timm_path, _by_getter, _by_class_count, _by_position)
        answers = (search(model, layers) for search in searches)
        names = next((answer for answer in answers if answer is not None), ())
    if not names:
        raise ValueError(_unsettled("a model whose classifier can be found", model, layers))
    refuse_adapted(names)
    return names


def refuse_adapted(names: Iterable[str]) -> None:
    """Raise if one of the layers lies inside an adapter, which adds to its cosines.

    Raises:
        ValueError: a name ends as PEFT's wrapped layers do.
    """
    adapted = [name for name in names if name.rpartition(".")[2] == _ADAPTED]
    if adapted:
        way_out = "Put the cosine head on before `get_peft_model`, and name it in"
        way_out += " `modules_to_save` instead of `target_modules`: it trains in full."
        raise ValueError(must_be("model", "without an adapter on its head", adapted[0], way_out))


def is_layer(module: object) -> TypeGuard[nn.Linear | nn.Conv2d]:
    """Whether ``module`` maps one feature vector to one logit vector: linear or 1x1 convolution."""
    if isinstance(module, nn.Conv2d):
        shape = (module.kernel_size, module.stride, module.groups)
        return shape == ((1, 1), (1, 1), 1) and module.padding in ((0, 0), "valid", "same")
    return isinstance(module, nn.Linear)


def _layers(model: nn.Module) -> Layers:
    """List what may be a head, without the adapters' own matrices and PEFT's frozen copies."""
    found: Layers = {}
    adapted = [name for name, module in model.named_modules() if hasattr(module, _ADAPTED)]
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{parent}.") for parent in adapted)
        last = name.rpartition(".")[2]
        if is_layer(module) and last != _FROZEN_COPY and (last == _ADAPTED or not inside):
            found[name] = module
    return found


def _shells(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield ``model`` and, as long as it is all a module holds, the one child."""
    prefix = ""
    yield prefix, model
    while len(children := dict(model.named_children())) == 1:
        name, model = children.popitem()
        prefix = f"{prefix}{name}."
        yield prefix, model


def _given(head: str | Sequence[str], layers: Layers) -> tuple[str, ...]:
    names = (head,) if isinstance(head, str) else tuple(head)
    if not all(isinstance(name, str) for name in names):
        raise TypeError(must_be("head", "a dotted module name or several", head))
    if not names:
        raise ValueError(must_be("head", "at least one dotted module name", head))
    return tuple(check_choice("head", name, layers) for name in names)


def _by_timm_path(model: nn.Module, layers: Layers) -> tuple[str, ...] | None:
    known = False
    for prefix, module in _shells(model):
        path = _timm_path(module)
        names = [name for part in path for name in _inside(f"{prefix}{part}", layers)]
        if names:
            return tuple(names)
        known = known or bool(path)
    return () if known else None


def _timm_path(module: nn.Module) -> tuple[str, ...]:
    for attribute in ("pretrained_cfg", "default_cfg"):
        cfg = getattr(module, attribute, None)
        path = cfg.get("classifier") if isinstance(cfg, Mapping) else None
        path = path or getattr(cfg, "classifier", None)
        if path:
            return (path,) if isinstance(path, str) else tuple(path)
    return ()


def _inside(name: str, layers: Layers) -> list[str]:
    """Return the layer called ``name``, the copies PEFT trains in its place, or its last layer."""
    within = [other for other in layers if other.startswith(f"{name}.")]
    copies = [other for other in within if other.startswith(f"{name}.{_TRAINED_COPY}.")]
    return [name] if name in layers else copies or within[-1:]


def _by_getter(model: nn.Module, layers: Layers) -> tuple[str, ...] | None:
    for _, module in _shells(model):
        getter = getattr(module, "get_classifier", None)
        if callable(getter):
            heads = set(_flat(getter()))
            named = [name for name, part in model.named_modules() if part in heads]
            return tuple(layer for name in named for layer in _inside(name, layers)) or None
    return None


def _flat(heads: object) -> Iterator[nn.Module]:
    if isinstance(heads, (tuple, list, nn.ModuleList)):
        for head in heads:
            yield from _flat(head)
    elif isinstance(heads, nn.Module):
        yield heads


def _class_count(module: nn.Module) -> int | None:
    labels: Any = getattr(getattr(module, "config", None), "num_labels", None)
    classes: Any = labels if labels is not None else getattr(module, "num_classes", None)
    return classes if isinstance(classes, int) else None


def _by_class_count(model: nn.Module, layers: Layers) -> tuple[str, ...] | None:
    for _, module in _shells(model):
        classes = _class_count(module)
        if classes is not None:
            break
    else:
        return None
    fitting = {name: layer for name, layer in layers.items() if _sizes(layer)[1] == classes}
    backbone = getattr(module, getattr(module, "base_model_prefix", "") or "-", None)
    inner = set(backbone.modules()) if isinstance(backbone, nn.Module) else set()
    outside = {name: layer for name, layer in fitting.items() if layer not in inner}
    chosen = outside or fitting
    if len(chosen) > 1 and any(_sizes(layer)[0] == classes for layer in chosen.values()):
        wanted = f"a model with one place that gives its {classes} classes"
        raise ValueError(_unsettled(wanted, model, chosen))
    return tuple(chosen)


def _by_position(model: nn.Module, layers: Layers) -> tuple[str, ...]:
    owners = [name for name, module in model.named_modules() if any(True for _ in _own(module))]
    linear = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
    if owners and owners[-1] in linear:
        return (owners[-1],)
    return tuple(linear) if len(linear) == 1 else ()


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    return module.parameters(recurse=False)


def _sizes(layer: nn.Linear | nn.Conv2d) -> tuple[int, int]:
    if isinstance(layer, nn.Conv2d):
        return layer.in_channels, layer.out_channels
    return layer.in_features, layer.out_features


def _refuse_headless(model: nn.Module) -> None:
    for _, module in _shells(model):
        classes = _class_count(module)
        if classes:
            return
        if classes == 0:
            wanted = "a model with a classifier"
            way_out = "It was built for features (`num_classes=0`): build it with the number of"
            way_out += " classes, or name the layer that gives the logits with `head=`."
            raise ValueError(must_be("model", wanted, type(module).__name__, way_out))


def _unsettled(wanted: str, model: nn.Module, layers: Layers) -> str:
    """Word the error of a search that found no head or too many, likeliest candidates first."""
    shown = []
    for name, layer in reversed(layers.items()):
        inputs, outputs = _sizes(layer)
        shown.append(f"{name} ({type(layer).__name__}, {inputs} -> {outputs})")
    if shown:
        way_out = f"Say which layer it is with `head=`, one name or several of: {quoted(shown)}."
    else:
        way_out = "It holds no linear layer and no 1x1 convolution that could be the head."
    return must_be("model", wanted, type(model).__name__, way_out)
