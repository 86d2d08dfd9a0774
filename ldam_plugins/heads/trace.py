"""Which layers give a model's output: read off its ``forward``, without running it on an input.

``torch.fx`` runs ``forward`` on stand-ins that record what is done to them. From the output the
record is followed back through what leaves logits as they are (another shape or dtype, a choice of
tokens, an average) to the layers they come from. Only the modules on that way are looked into, so
a backbone of any size or kind costs nothing.
"""

from __future__ import annotations

import copy
import inspect
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import Node, map_arg

_HOSTS = {"torch", "torchvision", "timm", "transformers", "peft", "accelerate"}
_MAX_PATHS = 64
_MAX_MODULES = 100
_CASTS = {"bfloat16", "cpu", "cuda", "double", "float", "half", "to", "type", "type_as"}
_SHAPES = {"flatten", "reshape", "reshape_as", "squeeze", "unflatten", "unsqueeze", "view"}
_SHAPES |= {"movedim", "moveaxis", "permute", "swapaxes", "swapdims", "transpose", "view_as"}
_CHOICES = {"gather", "index_select", "narrow", "select", "take_along_dim"}
_SAME_VALUES = _CASTS | _SHAPES | _CHOICES | {"clone", "contiguous"}
_MEANS = {"mean", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "avg_pool1d", "avg_pool2d"}
_SUMS = {"add", "add_", "iadd"}
_PRODUCTS = {"mul", "mul_", "imul", "multiply"}
_QUOTIENTS = {"div", "div_", "divide", "truediv", "true_divide", "itruediv"}
_PASSING_MODULES = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AvgPool1d,
    nn.AvgPool2d,
)


class Untraceable(Exception):
    """A ``forward`` did something that stand-ins cannot follow."""


class Mix(dict[str, float]):
    """A sum of the outputs of layers, by name: how often each is in it."""


class Stack(tuple[Any, ...]):
    """Outputs side by side along a dimension of their own."""


Declared = Callable[[nn.Module, str], Sequence[str] | None]


class Reader:
    """Reads from modules what their outputs are made of.

    A value is a `Mix`, a tuple, list or dict of values as ``forward`` returns them, or None for
    what is no layer's output. Entries of containers are read when `read` is called with them.

    Args:
        model: The model.
        layers: The layers that may give its logits, by dotted name.
        declared: Names of the layers whose average a module gives, where the module says so
            itself; gets the module and its name.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Module], declared: Declared
    ) -> None:
        self.layers = layers
        self.declared = declared
        self.names = {module: name for name, module in model.named_modules()}
        self.holders = {""} | {
            name[:end] for name in layers for end, sign in enumerate(name) if sign == "."
        }
        self._left = _MAX_MODULES

    def outputs(self, model: nn.Module) -> list[Any]:
        """The values that ``model`` may return in training, one for each way through its code.

        Raises:
            Untraceable: its ``forward`` cannot be followed.
        """
        return self._module(model, None)

    def read(self, value: Any) -> Any:
        """The value of an entry of a container.

        Raises:
            Untraceable: it comes from a ``forward`` that cannot be followed.
        """
        while isinstance(value, _Entry):
            value = value.read()
        return value

    def of_module(self, name: str) -> Any:
        """The value that the module ``name`` gives, None where it differs by branch."""
        places = {place: module for module, place in self.names.items()}
        return self.read(_only(self, self._module(places[name], None)))

    def _module(self, module: nn.Module, call: _Call | None) -> list[Any]:
        name = self.names.get(module, "")
        if name in self.layers and self.layers[name] is module:
            return [Mix({name: 1.0})]
        if is_adapter(module):
            return [Mix({f"{name}.base_layer" if name else "base_layer": 1.0})]
        known = self.declared(module, name)
        if known:
            return [self._declared(known)]
        inner = unwrapped(module)
        if inner is not module:
            return self._module(inner, call)
        if isinstance(module, _PASSING_MODULES) and call is not None:
            return [call.first()]
        of_torch = type(module).__module__.startswith("torch.nn.modules.")
        if of_torch and not isinstance(module, nn.Sequential):
            return [None]
        return self._traced(module, call)

    def _declared(self, names: Sequence[str]) -> Mix | None:
        total = Mix()
        for name in names:
            value = self.of_module(name)
            if not isinstance(value, Mix):
                return None
            for layer, factor in value.items():
                total[layer] = total.get(layer, 0.0) + factor / len(names)
        return total

    def _traced(self, module: nn.Module, call: _Call | None) -> list[Any]:
        """Follow ``forward`` through every branch it takes for some input."""
        self._left -= 1
        if self._left < 0:
            raise Untraceable("its output comes from too many modules")
        try:
            return self._every_way(module, call, nn.Parameter)
        except Untraceable:  # a buffer that is shaped like an input needs a stand-in, too
            return self._every_way(module, call, torch.Tensor)

    def _every_way(
        self, module: nn.Module, call: _Call | None, tensors: type[torch.Tensor]
    ) -> list[Any]:
        found: list[Any] = []
        failure: Exception | None = None
        waiting: list[tuple[int, ...]] = [()]
        for _ in range(_MAX_PATHS):
            if not waiting:
                break
            tracer = _Tracer(waiting.pop(), tensors)
            try:
                value = _run(tracer, self, module, call)
            except Exception as error:  # whatever a user's code raises on stand-ins
                failure = error
            else:
                found.append(value)
            waiting.extend(tracer.other_ways())
        if waiting or not found:
            reason = failure if not waiting else "too many branches"
            raise Untraceable(f"{type(module).__name__}.forward: {reason}") from failure
        return found

    def node(self, node: Node, tracer: _Tracer) -> Any:
        """The value of one recorded operation."""
        if node not in tracer.values:
            tracer.values[node] = None  # of itself, should it ever be met again below
            tracer.values[node] = self._node(node, tracer)
        return tracer.values[node]

    def _node(self, node: Node, tracer: _Tracer) -> Any:
        def value(argument: Any) -> Any:
            return self.node(argument, tracer) if isinstance(argument, Node) else argument

        if node.op == "call_module":
            module = tracer.modules[str(node.target)]
            call = _Call(node.args, node.kwargs, value)
            held = self.names.get(module, "") in self.holders or module in self.layers.values()
            if not (held or _carries(call.first())):
                return None
            return _only(self, self._module(module, call))
        if node.op not in ("call_function", "call_method") or not node.args:
            return None
        target = node.target
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        if name in ("getitem", "getattr"):
            return self._entry(node, tracer, value)
        if name in ("stack", "cat", "concat"):
            parts = [self.read(value(part)) for part in _listed(node.args[0])]
            return Stack(parts) if parts and all(isinstance(p, Mix) for p in parts) else None
        first = self.read(value(node.args[0]))
        if isinstance(first, Stack):
            share = 1.0 if name == "sum" else 1.0 / len(first)
            return _sum(first, share) if name in ("sum", "mean") else None
        if name in _SUMS | _PRODUCTS | _QUOTIENTS and len(node.args) == 2:
            return _arithmetic(name, first, self.read(value(node.args[1])))
        return first if isinstance(first, Mix) and name in _SAME_VALUES | _MEANS else None

    def _entry(self, node: Node, tracer: _Tracer, value: Callable[[Any], Any]) -> Any:
        source, key = node.args[0], node.args[1]
        if isinstance(source, Node) and source.op == "placeholder":
            return tracer.inputs[key]() if isinstance(key, int) and key in tracer.inputs else None
        whole = self.read(value(source))
        if isinstance(whole, Mix):
            return None if node.target is getattr or _picks_columns(key) else whole
        if isinstance(whole, Mapping):
            return self.read(whole.get(key) if isinstance(key, str) else _at(whole.values(), key))
        if isinstance(whole, (tuple, list)) and not isinstance(whole, Stack):
            found = getattr(whole, key, None) if isinstance(key, str) else _at(whole, key)
            return self.read(found)
        return None


class _Call:
    """The arguments that a module is called with."""

    def __init__(self, args: Any, kwargs: Any, value: Callable[[Any], Any]) -> None:
        self.args, self.kwargs, self.value = args, kwargs, value

    def first(self) -> Any:
        """What the first argument is."""
        given = self.args or tuple(self.kwargs.values())
        return self.value(given[0]) if given and isinstance(given[0], Node) else None

    def stand_ins(self, tracer: _Tracer, inputs: Any) -> tuple[Any, Any]:
        def stand_in(node: Node) -> Any:
            place = len(tracer.inputs)
            tracer.inputs[place] = lambda: self.value(node)
            return inputs[place]

        return map_arg(self.args, stand_in), map_arg(self.kwargs, stand_in)


class _Entry:
    """An entry of a container, read when it is asked for."""

    def __init__(self, reader: Reader, node: Node, tracer: _Tracer) -> None:
        self.reader, self.node, self.tracer = reader, node, tracer

    def read(self) -> Any:
        return self.reader.node(self.node, self.tracer)


class _Tracer(fx.Tracer):
    """Records calls of whole modules, and takes a given branch where the code asks for a value."""

    def __init__(self, choices: tuple[int, ...], tensors: type[torch.Tensor]) -> None:
        super().__init__()
        self._tensors = tensors
        self.values: dict[Node, Any] = {}
        self.inputs: dict[int, Callable[[], Any]] = {}
        self.modules: dict[str, nn.Module] = {}
        self._given = choices
        self._made: list[tuple[int, int]] = []

    def choose(self, options: int) -> int:
        """Which of so many branches to take here."""
        place = len(self._made)
        taken = self._given[place] if place < len(self._given) else 0
        self._made.append((taken, options))
        return taken

    def other_ways(self) -> Iterator[tuple[int, ...]]:
        """The choices that lead to branches which were not given and not taken."""
        taken = [choice for choice, _ in self._made]
        for place in range(len(self._given), len(self._made)):
            for other in range(1, self._made[place][1]):
                yield (*taken[:place], other)

    def proxy(self, node: Node) -> fx.Proxy:
        return _StandIn(node, self)

    def to_bool(self, obj: fx.Proxy) -> bool:
        return self.choose(2) == 1

    def iter(self, obj: Any) -> Iterator[Any]:
        return iter([obj[0]])

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def path_of_module(self, mod: nn.Module) -> str:
        path = f"module_{id(mod)}"
        self.modules[path] = mod
        return path

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if isinstance(attr_val, self._tensors):
            return self.create_proxy("get_attr", "constant", (), {})
        return attr_val

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, (torch.Tensor, nn.Module)):  # which one does not matter
            return self.create_node("get_attr", "constant", (), {})
        try:
            return super().create_arg(a)
        except NotImplementedError:  # a cache, a configuration
            return None


class _Asked:
    """What the code may ask of a stand-in besides recording what is done to it."""

    tracer: Any

    def __getattr__(self, name: str) -> fx.Proxy:
        return _Attribute(self, name)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return self.tracer.to_bool(self)

    def __len__(self) -> int:
        return 1 + self.tracer.choose(2)

    __index__ = __int__ = __len__


class _StandIn(_Asked, fx.Proxy):  # type: ignore[misc]
    """A tensor, or whatever comes of one."""


class _Attribute(_Asked, fx.proxy.Attribute):  # type: ignore[misc]
    """An attribute of one, such as its shape, or a method to be called."""


def is_adapter(module: nn.Module) -> bool:
    """Whether it is PEFT's layer around a ``base_layer`` (timm's DLA calls a sequence so)."""
    base = getattr(module, "base_layer", None)
    return isinstance(base, nn.Module) and not isinstance(base, nn.Sequential)


def unwrapped(module: nn.Module) -> nn.Module:
    """The model inside a compiled or data-parallel one, which gives the same output."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    inner = module.module if isinstance(module, parallel) else getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else module


def _run(tracer: _Tracer, reader: Reader, module: nn.Module, call: _Call | None) -> Any:
    """Run ``forward`` of a copy of ``module`` in training mode on stand-ins."""
    twin = _twin(module)
    returned: list[Any] = []

    def run(inputs: Any) -> None:
        if call is None:
            args, kwargs = _stand_ins(twin, inputs)
        else:
            args, kwargs = call.stand_ins(tracer, inputs)
        returned.append(_value(twin.forward(*args, **kwargs), reader, tracer))

    with warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        with _variables_kept(twin.forward):
            tracer.trace(run)
    return returned[0]


@contextmanager
def _variables_kept(forward: Any) -> Iterator[None]:
    """Take back what a user's ``forward`` does to variables outside, such as a list it fills.

    Those of the hosts' own modules are left alone, as what they cache is meant to stay.
    """
    function = inspect.unwrap(getattr(forward, "__func__", forward))
    scope: dict[str, Any] = getattr(function, "__globals__", {})
    if str(scope.get("__name__")).partition(".")[0] in _HOSTS:
        yield
        return
    names = {name: value for name, value in scope.items() if not name.startswith("__")}
    cells = [(c, c.cell_contents) for c in getattr(function, "__closure__", None) or () if _full(c)]
    values = [*names.values(), *(value for _, value in cells)]
    contents = [(value, copy.copy(value)) for value in values if type(value) in (dict, list, set)]
    try:
        yield
    finally:
        for value, before in contents:
            _put_back(value, before)
        scope.update(names)
        for cell, value in cells:
            cell.cell_contents = value


def _identity(entry: Any) -> Any:
    return tuple(map(id, entry)) if isinstance(entry, tuple) else id(entry)


def _full(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a variable without a value yet
        return False


def _put_back(container: Any, before: Any) -> None:
    pairs = container.items() if isinstance(container, dict) else container
    known = before.items() if isinstance(before, dict) else before
    if len(container) == len(before) and [*map(_identity, pairs)] == [*map(_identity, known)]:
        return
    if isinstance(container, list):
        container[:] = before
    else:
        container.clear()
        container.update(before)


def _twin(module: nn.Module) -> Any:
    """A copy for which ``forward`` can leave things behind, its children being the module's own."""
    twin = module.__new__(type(module))
    state = {
        k: copy.copy(v) if type(v) in (dict, list, set) else v for k, v in vars(module).items()
    }
    state["_buffers"] = {
        k: None if buffer is None else buffer.clone() for k, buffer in module._buffers.items()
    }
    state["training"] = True
    if "_original_forward" in state:
        # Under mixed precision Accelerate's `prepare` puts a function around `forward` that casts
        # what it returns to float32, by a look at the dtype, which a stand-in cannot answer.
        forward = state["_original_forward"]
        state["forward"] = types.MethodType(getattr(forward, "__func__", forward), twin)
    twin.__dict__ = state
    return twin


def _stand_ins(module: nn.Module, inputs: Any) -> tuple[list[Any], dict[str, Any]]:
    """One for every argument that ``forward`` needs, or for the one that it is mainly about."""
    parameters = inspect.signature(module.forward).parameters.values()
    required = [p for p in parameters if p.default is p.empty]
    places = [p for p in required if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [inputs[parameter.name] for parameter in places]
    keywords = {p.name: inputs[p.name] for p in required if p.kind is p.KEYWORD_ONLY}
    if not needed and not keywords:
        main = getattr(module, "main_input_name", None)
        if main in [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]:
            keywords = {str(main): inputs[main]}
        else:
            needed = [inputs["input"]]
    return needed, keywords


def _value(returned: Any, reader: Reader, tracer: _Tracer) -> Any:
    """What ``forward`` returned, with entries to be read in place of stand-ins."""
    if isinstance(returned, fx.Proxy):
        return _Entry(reader, returned.node, tracer)
    if isinstance(returned, Mapping):
        return {key: _value(entry, reader, tracer) for key, entry in returned.items()}
    if isinstance(returned, (tuple, list)):
        entries = [_value(entry, reader, tracer) for entry in returned]
        return type(returned)(*entries) if hasattr(returned, "_fields") else tuple(entries)
    if hasattr(returned, "__dataclass_fields__"):
        return {k: _value(v, reader, tracer) for k, v in vars(returned).items()}
    return None


def _only(reader: Reader, values: list[Any]) -> Any:
    """The value, if every way through a module gives the same."""
    if len(values) == 1:
        return values[0]
    read = [_read_all(reader, value) for value in values]
    return read[0] if all(value == read[0] for value in read) else None


def _read_all(reader: Reader, value: Any) -> Any:
    value = reader.read(value)
    if isinstance(value, Mix):
        return value
    if isinstance(value, Mapping):
        return {key: _read_all(reader, entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [_read_all(reader, entry) for entry in value]
    return value


def _picks_columns(key: Any) -> bool:
    """Whether an index of logits (..., T, C) leaves out classes."""
    last = key[-1] if isinstance(key, tuple) and len(key) > 2 else slice(None)
    return not (last is Ellipsis or last == slice(None))


def _carries(value: Any) -> bool:
    """Whether there is a layer's output in it."""
    return value is not None and not isinstance(value, (int, float, str))


def _listed(argument: Any) -> list[Any]:
    return list(argument) if isinstance(argument, (tuple, list)) else []


def _at(values: Any, key: Any) -> Any:
    entries = list(values)
    return entries[key] if isinstance(key, int) and -len(entries) <= key < len(entries) else None


def _arithmetic(name: str, first: Any, second: Any) -> Mix | None:
    if name in _SUMS:
        if isinstance(first, Mix) and isinstance(second, Mix):
            return _sum((first, second), 1.0)
        pair = (first, second) if isinstance(first, Mix) else (second, first)
        return pair[0] if isinstance(pair[0], Mix) and _number(pair[1]) == 0 else None
    if name in _PRODUCTS and isinstance(second, Mix):
        first, second = second, first
    factor = _number(second)
    if not isinstance(first, Mix) or not factor:
        return None
    return _sum((first,), factor if name in _PRODUCTS else 1.0 / factor)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _sum(parts: Sequence[Any], factor: float) -> Mix:
    total = Mix()
    for part in parts:
        for name, share in part.items():
            total[name] = total.get(name, 0.0) + share * factor
    return total
