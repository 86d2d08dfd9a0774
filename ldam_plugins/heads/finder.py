"""Where the classifier of a timm, transformers or plain model is: its dotted names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

from torch import nn

from ldam_plugins._validation import check_choice, invalid, quoted
from ldam_plugins.heads.layers import cosine_heads, layer_sizes
from ldam_plugins.heads.trace import Combination, OutputReader, Stack, Untraceable, is_adapter

Layers = dict[str, nn.Linear | nn.Conv2d]

_ADAPTED = "base_layer"  # what PEFT calls the layer inside an adapter,
_FROZEN_COPY = "original_module"  # and the old weights of a module that it trains a copy of


def find_head(model: nn.Module, head: str | Sequence[str] | None = None) -> tuple[str, ...]:
    """Find the dotted names of the layer, or layers, that give the logits.

    The first of these that gives an answer is used, and nothing is guessed:

    1. ``head``, one dotted name or several.
    2. timm's ``pretrained_cfg["classifier"]`` of the model or of a module inside it. It also names
       layers inside containers, both heads of distilled models, and auxiliary heads.
    3. What ``forward`` shows (see :mod:`ldam_plugins.heads.trace`): the layer whose output the
       model returns in training, possibly reshaped, cast or averaged over positions; all layers
       whose outputs are averaged; all whose outputs are returned under names such as ``logits``
       and ``aux_logits``.
    4. Where ``forward`` cannot be followed: ``get_classifier()`` of the model, or the only layer
       outside a transformers base model that has ``config.num_labels`` outputs.

    The model may be wrapped (data parallel, compiled, PEFT, ``TimmWrapper``). In a PEFT model the
    trained copies in ``modules_to_save`` are the head.

    Args:
        model: The classifier. The name of a lone ``nn.Linear`` is ``""``.
        head: The names, where the search finds nothing or the wrong layer.

    Returns:
        Names as in ``model.named_modules()``, of ``nn.Linear`` or 1x1 ``nn.Conv2d`` layers.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``head`` names no such layer, the model was built without a classifier, an
            adapter sits on it, something that follows it changes the logits (a normalisation,
            softmax or factor), or no layer or too many fit; the message lists the candidates.

    Example:
        >>> find_head(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)))
        ('2',)
    """
    if not isinstance(model, nn.Module):
        raise invalid("model", "a torch.nn.Module", type(model).__name__, error=TypeError)
    layers = _possible_heads(model)
    if head is not None:
        names = _checked_names(head, layers)
    else:
        _refuse_headless(model)
        names = _search(model, layers)
    refuse_adapted(names)
    return names


def class_count(model: nn.Module) -> int | None:
    """Number of classes by the model's cosine head or its ``config``; None if neither says."""
    heads = list(cosine_heads(model).values())
    if heads:
        return layer_sizes(heads[0])[1]
    return getattr(getattr(model, "config", None), "num_labels", None)


def refuse_adapted(names: Iterable[str]) -> None:
    """Refuse heads inside an adapter, which would add something to the cosines.

    Raises:
        ValueError: a name is that of a layer inside PEFT's adapter.
    """
    adapted = [name for name in names if name.rpartition(".")[2] == _ADAPTED]
    if adapted:
        hint = "Put the cosine head on before `get_peft_model`, and name it in"
        hint += " `modules_to_save` instead of `target_modules`: it trains in full."
        raise invalid("model", "without an adapter on its head", adapted[0], hint=hint)


def _possible_heads(model: nn.Module) -> Layers:
    """The layers that may be a head: not an adapter's own matrices, nor PEFT's frozen copies."""
    found: Layers = {}
    adapters = [name for name, module in model.named_modules() if is_adapter(module)]
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{adapter}.") for adapter in adapters)
        last = name.rpartition(".")[2]
        if _is_linear(module) and last != _FROZEN_COPY and (last == _ADAPTED or not inside):
            found[name] = module
    return found


def _is_linear(module: object) -> TypeGuard[nn.Linear | nn.Conv2d]:
    """Whether ``module`` maps each feature vector to a logit vector: linear or 1x1 convolution."""
    if isinstance(module, nn.Conv2d):
        shape = (module.kernel_size, module.stride, module.groups)
        return shape == ((1, 1), (1, 1), 1) and module.padding in ((0, 0), "valid", "same")
    return isinstance(module, nn.Linear)


def _checked_names(head: str | Sequence[str], layers: Layers) -> tuple[str, ...]:
    names = (head,) if isinstance(head, str) else tuple(head)
    if not all(isinstance(name, str) for name in names):
        raise invalid("head", "a dotted module name or several", head, error=TypeError)
    if not names:
        raise invalid("head", "at least one dotted module name", head)
    return tuple(check_choice("head", name, layers) for name in names)


def _search(model: nn.Module, layers: Layers) -> tuple[str, ...]:
    """The layers that ``forward`` shows to give the logits, or else those the model declares."""
    reader = OutputReader(model, layers, lambda module, name: _of_timm(module, name, layers))
    try:
        answers = [_logit_layers(reader, value, model) for value in reader.outputs(model)]
    except (Untraceable, RecursionError) as failure:
        names = _of_getter(model, reader) or _of_label_count(model, layers)
        if names:
            return names
        reason = f"Its forward() cannot be followed ({failure})."
        raise _not_found(model, layers, reason) from failure
    names = answers[0]
    if not names or any(other != names for other in answers):
        seen = {name: layers[name] for answer in answers for name in answer if name in layers}
        reason = "What it returns in training is not what one of its layers gives: take away what "
        reason += "changes the logits after the classifier (norm, dropout, softmax, factor), or,"
        reason += " where the layer gives them all the same, name it."
        if seen:
            reason = "Which layer gives its output depends on the input."
        raise _not_found(model, seen or layers, reason)
    return names


def _of_timm(module: nn.Module, name: str, layers: Layers) -> tuple[str, ...] | None:
    """Names of the modules that timm's configuration calls the classifier, if they are there."""
    prefix = f"{name}." if name else ""
    inside = [f"{prefix}{part}" for part in _timm_classifier(module)]
    known = [n for n in inside if n in layers or any(o.startswith(f"{n}.") for o in layers)]
    return tuple(known) or None


def _timm_classifier(module: nn.Module) -> tuple[str, ...]:
    for attribute in ("pretrained_cfg", "default_cfg"):
        cfg = getattr(module, attribute, None)
        path = cfg.get("classifier") if isinstance(cfg, Mapping) else None
        path = path or getattr(cfg, "classifier", None)
        if path:
            return (path,) if isinstance(path, str) else tuple(path)
    return ()


def _logit_layers(reader: OutputReader, returned: Any, model: nn.Module) -> tuple[str, ...]:
    """Names of the layers that give what a model returned as logits; () if no layer does.

    Raises:
        Untraceable: the logits come from a ``forward`` that cannot be followed.
        ValueError: several layers give different outputs, none of which is called logits.
    """
    returned = reader.read(returned)
    if hasattr(returned, "_asdict"):
        returned = returned._asdict()
    if not isinstance(returned, (Mapping, tuple)) or isinstance(returned, (Combination, Stack)):
        return _names_of(returned)
    outputs = returned if isinstance(returned, Mapping) else dict(enumerate(returned))
    auxiliary = {key: output for key, output in outputs.items() if "logits" in str(key)}
    main = auxiliary.pop("logits", None)
    found = [] if main is None else [_names_of(reader.read(main))]
    for output in (auxiliary if main is not None or auxiliary else outputs).values():
        try:
            found.append(_names_of(reader.read(output)))
        except (Untraceable, RecursionError):
            continue
    given = [names for names in dict.fromkeys(found) if names]
    if main is not None and not found[0]:
        return ()
    if len(given) > 1 and main is None and not auxiliary:
        several = {name: reader.layers[name] for names in given for name in names}
        expected = "a model with one output that a classifier gives"
        reason = f"It returns {len(given)} in training. Name all those that give logits of classes."
        raise _not_found(model, several, reason, expected)  # type: ignore[arg-type]
    return tuple(dict.fromkeys(name for names in given for name in names))


def _names_of(value: Any) -> tuple[str, ...]:
    """The layers of one output, if it is a layer's output or an average of several."""
    if not isinstance(value, Combination):
        return ()
    is_average = abs(sum(value.values()) - 1) < 1e-6 and min(value.values()) > 0
    return tuple(value) if is_average else ()


def _of_getter(model: nn.Module, reader: OutputReader) -> tuple[str, ...]:
    """The layers inside what ``get_classifier()`` returns."""
    for module in _model_and_only_children(model):
        getter = getattr(module, "get_classifier", None)
        if callable(getter):
            heads = set(_flat(getter()))
            named = [name for name, part in model.named_modules() if part in heads]
            try:
                found = [_names_of(reader.of_module(name)) for name in named]
            except (Untraceable, RecursionError):
                return ()
            return tuple(n for names in found for n in names) if all(found) else ()
    return ()


def _flat(heads: object) -> Iterator[nn.Module]:
    if isinstance(heads, (tuple, list, nn.ModuleList)):
        for head in heads:
            yield from _flat(head)
    elif isinstance(heads, nn.Module):
        yield heads


def _of_label_count(model: nn.Module, layers: Layers) -> tuple[str, ...]:
    """The only layer outside the base model of transformers with an output for every label."""
    for module in _model_and_only_children(model):
        classes = getattr(getattr(module, "config", None), "num_labels", None)
        backbone = getattr(module, getattr(module, "base_model_prefix", "") or "-", None)
        if isinstance(classes, int) and isinstance(backbone, nn.Module):
            inner = set(backbone.modules())
            outside = [name for name, layer in layers.items() if layer not in inner]
            fitting = [name for name in outside if layer_sizes(layers[name])[1] == classes]
            return tuple(fitting) if len(fitting) == 1 else ()
    return ()


def _refuse_headless(model: nn.Module) -> None:
    """Refuse a model that was built to return features."""
    for module in _model_and_only_children(model):
        features_only = hasattr(module, "feature_info") and not hasattr(module, "get_classifier")
        classes = _stated_class_count(module)
        if classes and not features_only:
            return
        if classes == 0 or features_only:
            expected = "a model with a classifier"
            built = "`features_only=True`" if features_only else "`num_classes=0`"
            hint = f"It was built for features ({built}): build it with the number of"
            hint += " classes, or name the layer that gives the logits with `head=`."
            raise invalid("model", expected, type(module).__name__, hint=hint)


def _stated_class_count(module: nn.Module) -> int | None:
    """Number of classes as transformers or timm writes it on a model."""
    labels: Any = getattr(getattr(module, "config", None), "num_labels", None)
    classes: Any = labels if labels is not None else getattr(module, "num_classes", None)
    return classes if isinstance(classes, int) else None


def _model_and_only_children(model: nn.Module) -> Iterator[nn.Module]:
    """Yield ``model``, its child if it has exactly one, the child's only child, and so on."""
    yield model
    while len(children := list(model.children())) == 1:
        model = children[0]
        yield model


def _not_found(
    model: nn.Module,
    layers: Layers,
    reason: str,
    expected: str = "a model whose classifier can be found",
) -> Exception:
    """The error of a search that found no head or too many; it lists the last layers first."""
    shown = []
    for name, layer in reversed(layers.items()):
        inputs, outputs = layer_sizes(layer)
        shown.append(f"{name} ({type(layer).__name__}, {inputs} -> {outputs})")
    if shown:
        hint = f"Say which layer it is with `head=`, one name or several of: {quoted(shown)}."
    else:
        hint = "It holds no linear layer and no 1x1 convolution that could be the head."
    return invalid("model", expected, type(model).__name__, hint=f"{reason} {hint}")
