"""Which layers a model's output is made of, proved from its ``forward`` without any data.

``torch.fx`` runs ``forward`` on stand-ins for tensors, which record what is done with them. The
record is then followed backwards from the output, through operations that keep logits what they are
(another shape or dtype, a choice of tokens, an average), to the layers that gave them. Only the
modules on this path are looked into, so a backbone of any size and kind costs nothing.
"""

from __future__ import annotations

import copy
import inspect
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import fx, nn
from torch.fx.node import Node, map_arg

_LIBRARIES = {"torch", "torchvision", "timm", "transformers", "peft", "accelerate"}
_MAX_BRANCHES = 64
_MAX_MODULES = 100
# Operations by name, as functions, methods and operators have them.
_CASTS = {"bfloat16", "cpu", "cuda", "double", "float", "half", "to", "type", "type_as"}
_SHAPES = {"flatten", "reshape", "reshape_as", "squeeze", "unflatten", "unsqueeze", "view"}
_SHAPES |= {"movedim", "moveaxis", "permute", "swapaxes", "swapdims", "transpose", "view_as"}
_CHOICES = {"gather", "index_select", "narrow", "select", "take_along_dim"}
_SAME_VALUES = _CASTS | _SHAPES | _CHOICES | {"clone", "contiguous"}
_MEANS = {"mean", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "avg_pool1d", "avg_pool2d"}
_SUMS = {"add", "add_", "iadd"}
_PRODUCTS = {"mul", "mul_", "imul", "multiply"}
_QUOTIENTS = {"div", "div_", "divide", "truediv", "true_divide", "itruediv"}
_SAME_VALUE_MODULES = (
    nn.Identity,
    nn.Flatten,
    nn.Unflatten,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AvgPool1d,
    nn.AvgPool2d,
)


class Untraceable(Exception):
    """A ``forward`` did something that stand-ins cannot do."""


class Combination(dict[str, float]):
    """A weighted sum of layers' outputs: the weight of each, by the layer's name."""


class Stack(tuple[Any, ...]):
    """Several outputs, side by side along a new dimension."""


Declared = Callable[[nn.Module, str], Sequence[str] | None]


class OutputReader:
    """Tells what the outputs of modules are made of.

    It describes an output by a *value*: a `Combination`; a tuple, list or dict of values, as
    ``forward`` returns it; or None for anything else. The values inside of containers are worked
    out only when `read` is called with them.

    Args:
        model: The model.
        layers: The layers that may give its logits, by dotted name.
        declared: Called with a module and its name; returns the names of the submodules whose mean
            is the module's output, where the module itself says so, and None elsewhere.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, nn.Module], declared: Declared
    ) -> None:
        self.layers = layers
        self._declared = declared
        self._names = {module: name for name, module in model.named_modules()}
        self._parents_of_layers = {""} | {
            name[:end] for name in layers for end, sign in enumerate(name) if sign == "."
        }
        self._modules_left = _MAX_MODULES

    def outputs(self, model: nn.Module) -> list[Any]:
        """The values that ``model`` may return in training, one for each branch of its code.

        Raises:
            Untraceable: its ``forward`` cannot be followed.
        """
        return self._values_of(model, None)

    def read(self, value: Any) -> Any:
        """Work out a value taken from a container; any other is returned as it is.

        Raises:
            Untraceable: it comes from a ``forward`` that cannot be followed.
        """
        while isinstance(value, _Unread):
            value = value.read()
        return value

    def of_module(self, name: str) -> Any:
        """The value of the module ``name``, None where its branches return different ones."""
        modules = {name: module for module, name in self._names.items()}
        return self.read(self._agreed(self._values_of(modules[name], None)))

    def of_node(self, node: Node, tracer: _Tracer) -> Any:
        """The value of one recorded operation."""
        if node not in tracer.values:
            tracer.values[node] = None  # in case it depends on itself
            tracer.values[node] = self._of_new_node(node, tracer)
        return tracer.values[node]

    def _values_of(self, module: nn.Module, call: _Call | None) -> list[Any]:
        """The values of ``module``, one for each branch; of the whole model if ``call`` is None."""
        name = self._names.get(module, "")
        if name in self.layers and self.layers[name] is module:
            return [Combination({name: 1.0})]
        if is_adapter(module):
            return [Combination({f"{name}.base_layer" if name else "base_layer": 1.0})]
        declared = self._declared(module, name)
        if declared:
            return [self._mean_of(declared)]
        inner = unwrapped(module)
        if inner is not module:
            return self._values_of(inner, call)
        if isinstance(module, _SAME_VALUE_MODULES) and call is not None:
            return [call.first_value()]
        of_torch = type(module).__module__.startswith("torch.nn.modules.")
        if of_torch and not isinstance(module, nn.Sequential):
            return [None]
        return self._trace(module, call)

    def _mean_of(self, names: Sequence[str]) -> Combination | None:
        values = []
        for name in names:
            values.append(self.of_module(name))
            if not isinstance(values[-1], Combination):
                return None
        return _weighted_sum(values, 1.0 / len(names))

    def _trace(self, module: nn.Module, call: _Call | None) -> list[Any]:
        self._modules_left -= 1
        if self._modules_left < 0:
            raise Untraceable("its output comes from too many modules")
        try:
            return self._trace_branches(module, call, nn.Parameter)
        except Untraceable:  # a buffer combined with an input must be a stand-in, too
            return self._trace_branches(module, call, torch.Tensor)

    def _trace_branches(
        self, module: nn.Module, call: _Call | None, tensors: type[torch.Tensor]
    ) -> list[Any]:
        """Run ``forward`` once for each branch that it may take."""
        values: list[Any] = []
        failure: Exception | None = None
        branches: list[tuple[int, ...]] = [()]
        for _ in range(_MAX_BRANCHES):
            if not branches:
                break
            tracer = _Tracer(branches.pop(), tensors)
            try:
                value = _record(tracer, self, module, call)
            except Exception as error:  # a user's code may raise anything on stand-ins
                failure = error
            else:
                values.append(value)
            branches.extend(tracer.other_branches())
        if branches or not values:
            reason = failure if not branches else "too many branches"
            raise Untraceable(f"{type(module).__name__}.forward: {reason}") from failure
        return values

    def _of_new_node(self, node: Node, tracer: _Tracer) -> Any:
        def value_of(argument: Any) -> Any:
            return self.of_node(argument, tracer) if isinstance(argument, Node) else argument

        if node.op == "call_module":
            module = tracer.modules[str(node.target)]
            call = _Call(node.args, node.kwargs, value_of)
            if self._may_contain_layers(module) or _may_contain_logits(call.first_value()):
                return self._agreed(self._values_of(module, call))
            return None
        if node.op not in ("call_function", "call_method") or not node.args:
            return None
        target = node.target
        name = target if isinstance(target, str) else getattr(target, "__name__", "")
        if name in ("getitem", "getattr"):
            return self._of_item(node, tracer, value_of)
        if name in ("stack", "cat", "concat"):
            parts = [self.read(value_of(part)) for part in _as_list(node.args[0])]
            whole = parts and all(isinstance(part, Combination) for part in parts)
            return Stack(parts) if whole else None
        first = self.read(value_of(node.args[0]))
        if isinstance(first, Stack):
            factor = 1.0 if name == "sum" else 1.0 / len(first)
            return _weighted_sum(first, factor) if name in ("sum", "mean") else None
        if name in _SUMS | _PRODUCTS | _QUOTIENTS and len(node.args) == 2:
            return _arithmetic(name, first, self.read(value_of(node.args[1])))
        unchanged = isinstance(first, Combination) and name in _SAME_VALUES | _MEANS
        return first if unchanged else None

    def _of_item(self, node: Node, tracer: _Tracer, value_of: Callable[[Any], Any]) -> Any:
        """The value of ``source[key]`` or ``source.key``."""
        source, key = node.args[0], node.args[1]
        if isinstance(source, Node) and source.op == "placeholder":
            return tracer.inputs[key]() if isinstance(key, int) and key in tracer.inputs else None
        whole = self.read(value_of(source))
        if isinstance(whole, Combination):
            return None if node.target is getattr or _leaves_out_classes(key) else whole
        if isinstance(whole, Mapping):
            entry = whole.get(key) if isinstance(key, str) else _entry(whole.values(), key)
            return self.read(entry)
        if isinstance(whole, (tuple, list)) and not isinstance(whole, Stack):
            entry = getattr(whole, key, None) if isinstance(key, str) else _entry(whole, key)
            return self.read(entry)
        return None

    def _may_contain_layers(self, module: nn.Module) -> bool:
        name = self._names.get(module, "")
        return name in self._parents_of_layers or module in self.layers.values()

    def _agreed(self, values: list[Any]) -> Any:
        """The value that all branches of a module return; None where they differ."""
        if len(values) == 1:
            return values[0]
        read = [self._read_all(value) for value in values]
        return read[0] if all(value == read[0] for value in read) else None

    def _read_all(self, value: Any) -> Any:
        value = self.read(value)
        if isinstance(value, Combination):
            return value
        if isinstance(value, Mapping):
            return {key: self._read_all(entry) for key, entry in value.items()}
        if isinstance(value, (tuple, list)):
            return [self._read_all(entry) for entry in value]
        return value


def is_adapter(module: nn.Module) -> bool:
    """Whether ``module`` is PEFT's layer around a ``base_layer``, and not timm's DLA block."""
    base = getattr(module, "base_layer", None)
    return isinstance(base, nn.Module) and not isinstance(base, nn.Sequential)


def unwrapped(module: nn.Module) -> nn.Module:
    """The model inside a compiled or data-parallel one, which gives the same output."""
    parallel = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    inner = module.module if isinstance(module, parallel) else getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, nn.Module) else module


class _Unread:
    """A recorded output whose value is worked out when it is asked for."""

    def __init__(self, reader: OutputReader, node: Node, tracer: _Tracer) -> None:
        self.reader, self.node, self.tracer = reader, node, tracer

    def read(self) -> Any:
        return self.reader.of_node(self.node, self.tracer)


class _Call:
    """The recorded arguments of a call of a module, and what gives their values."""

    def __init__(self, args: Any, kwargs: Any, value_of: Callable[[Any], Any]) -> None:
        self.args, self.kwargs, self.value_of = args, kwargs, value_of

    def first_value(self) -> Any:
        """The value of the first argument, None if it was not recorded."""
        arguments = self.args or tuple(self.kwargs.values())
        recorded = arguments and isinstance(arguments[0], Node)
        return self.value_of(arguments[0]) if recorded else None

    def stand_ins(self, tracer: _Tracer, inputs: Any) -> tuple[Any, Any]:
        """The same arguments for a trace of the module itself, by stand-ins ``inputs[0]``, ..."""

        def stand_in(node: Node) -> Any:
            place = len(tracer.inputs)
            tracer.inputs[place] = lambda: self.value_of(node)
            return inputs[place]

        return map_arg(self.args, stand_in), map_arg(self.kwargs, stand_in)


class _Tracer(fx.Tracer):
    """Records one branch of a ``forward``, with its submodules as single operations.

    Args:
        choices: Which way to go at the first decisions that depend on a stand-in, each a number
            from 0. Later decisions go way 0.
        tensors: The kind of the module's tensors that stand-ins replace.
    """

    def __init__(self, choices: tuple[int, ...], tensors: type[torch.Tensor]) -> None:
        super().__init__()
        self.values: dict[Node, Any] = {}
        self.inputs: dict[int, Callable[[], Any]] = {}
        self.modules: dict[str, nn.Module] = {}
        self._tensors = tensors
        self._given = choices
        self._taken: list[int] = []
        self._options: list[int] = []

    def choose(self, options: int) -> int:
        """Decide between ways 0, 1, ..., ``options - 1``."""
        place = len(self._taken)
        self._taken.append(self._given[place] if place < len(self._given) else 0)
        self._options.append(options)
        return self._taken[-1]

    def other_branches(self) -> Iterator[tuple[int, ...]]:
        """The choices that lead to the branches which begin at decisions of this one."""
        for place in range(len(self._given), len(self._taken)):
            for other in range(1, self._options[place]):
                yield (*self._taken[:place], other)

    def proxy(self, node: Node) -> fx.Proxy:
        return _StandIn(node, self)

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


class _Deciding:
    """Lets the tracer decide where the code asks a stand-in for a truth value or a number."""

    tracer: Any

    def __getattr__(self, name: str) -> fx.Proxy:
        return _Attribute(self, name)  # type: ignore[arg-type]

    def __bool__(self) -> bool:
        return self.tracer.choose(2) == 1

    def __len__(self) -> int:
        return 1 + self.tracer.choose(2)

    __index__ = __int__ = __len__


class _StandIn(_Deciding, fx.Proxy):  # type: ignore[misc]
    """A tensor, or what is computed from one."""


class _Attribute(_Deciding, fx.proxy.Attribute):  # type: ignore[misc]
    """An attribute of a stand-in, such as its shape, or a method that is about to be called."""


def _record(tracer: _Tracer, reader: OutputReader, module: nn.Module, call: _Call | None) -> Any:
    """Run ``forward`` of a copy of ``module`` in training mode on stand-ins; return its value."""
    copied = _copy_for_tracing(module)
    returned: list[Any] = []

    def run(inputs: Any) -> None:
        if call is None:
            args, kwargs = _stand_ins(copied, inputs)
        else:
            args, kwargs = call.stand_ins(tracer, inputs)
        returned.append(_unread(copied.forward(*args, **kwargs), reader, tracer))

    with warnings.catch_warnings(), torch.no_grad(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        with _variables_restored(copied.forward):
            tracer.trace(run)
    return returned[0]


def _copy_for_tracing(module: nn.Module) -> Any:
    """A copy with the same children, so that what ``forward`` stores on it does not stay."""
    copied = module.__new__(type(module))
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
        state["forward"] = types.MethodType(getattr(forward, "__func__", forward), copied)
    copied.__dict__ = state
    return copied


@contextmanager
def _variables_restored(forward: Any) -> Iterator[None]:
    """Undo what a user's ``forward`` does to variables outside of it, such as a list it fills.

    Those of the libraries' own modules are left alone: what they cache is meant to stay.
    """
    function = inspect.unwrap(getattr(forward, "__func__", forward))
    scope: dict[str, Any] = getattr(function, "__globals__", {})
    if str(scope.get("__name__")).partition(".")[0] in _LIBRARIES:
        yield
        return
    names = {name: value for name, value in scope.items() if not name.startswith("__")}
    cells: list[tuple[Any, Any]] = []
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # the variable was not assigned yet
            cells.append((cell, cell.cell_contents))
    values = [*names.values(), *(value for _, value in cells)]
    contents = [(value, copy.copy(value)) for value in values if type(value) in (dict, list, set)]
    try:
        yield
    finally:
        for container, before in contents:
            if not _same_contents(container, before):
                _restore(container, before)
        scope.update(names)
        for cell, value in cells:
            cell.cell_contents = value


def _same_contents(container: Any, before: Any) -> bool:
    """Whether the same objects are in both; ``==`` of tensors would be no truth value."""
    if isinstance(container, dict):
        container = [*container.keys(), *container.values()]
        before = [*before.keys(), *before.values()]
    same_length = len(container) == len(before)
    return same_length and all(a is b for a, b in zip(container, before, strict=True))


def _restore(container: Any, before: Any) -> None:
    if isinstance(container, list):
        container[:] = before
    else:
        container.clear()
        container.update(before)


def _stand_ins(module: nn.Module, inputs: Any) -> tuple[list[Any], dict[str, Any]]:
    """One for each required argument of ``forward``; if there is none, for its main argument."""
    parameters = inspect.signature(module.forward).parameters.values()
    required = [p for p in parameters if p.default is p.empty]
    positional = [p for p in required if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    args = [inputs[parameter.name] for parameter in positional]
    kwargs = {p.name: inputs[p.name] for p in required if p.kind is p.KEYWORD_ONLY}
    if not args and not kwargs:
        main = getattr(module, "main_input_name", None)
        if main in [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]:
            kwargs = {str(main): inputs[main]}
        else:
            args = [inputs["input"]]
    return args, kwargs


def _unread(returned: Any, reader: OutputReader, tracer: _Tracer) -> Any:
    """What ``forward`` returned, with unread values in place of stand-ins."""
    if isinstance(returned, fx.Proxy):
        return _Unread(reader, returned.node, tracer)
    if isinstance(returned, Mapping):
        return {key: _unread(entry, reader, tracer) for key, entry in returned.items()}
    if isinstance(returned, (tuple, list)):
        entries = [_unread(entry, reader, tracer) for entry in returned]
        return type(returned)(*entries) if hasattr(returned, "_fields") else tuple(entries)
    if hasattr(returned, "__dataclass_fields__"):
        return {key: _unread(entry, reader, tracer) for key, entry in vars(returned).items()}
    return None


def _leaves_out_classes(key: Any) -> bool:
    """Whether an index of logits (..., T, C) may leave out classes, and not only tokens."""
    last = key[-1] if isinstance(key, tuple) and len(key) > 2 else slice(None)
    return not (last is Ellipsis or last == slice(None))


def _may_contain_logits(value: Any) -> bool:
    return value is not None and not isinstance(value, (int, float, str))


def _as_list(argument: Any) -> list[Any]:
    return list(argument) if isinstance(argument, (tuple, list)) else []


def _entry(values: Any, key: Any) -> Any:
    """``values[key]``, None if ``key`` is not the position of an entry."""
    entries = list(values)
    return entries[key] if isinstance(key, int) and -len(entries) <= key < len(entries) else None


def _arithmetic(name: str, first: Any, second: Any) -> Combination | None:
    """The value of ``first + second``, ``first * second`` or ``first / second``."""
    if name in _SUMS:
        if isinstance(first, Combination) and isinstance(second, Combination):
            return _weighted_sum((first, second), 1.0)
        if isinstance(second, Combination):
            first, second = second, first
        plus_zero = isinstance(first, Combination) and _number(second) == 0  # sum() starts at 0
        return first if plus_zero else None
    if name in _PRODUCTS and isinstance(second, Combination):
        first, second = second, first
    factor = _number(second)
    if not isinstance(first, Combination) or not factor:
        return None
    return _weighted_sum((first,), factor if name in _PRODUCTS else 1.0 / factor)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None


def _weighted_sum(values: Sequence[Any], factor: float) -> Combination:
    total = Combination()
    for value in values:
        for name, weight in value.items():
            total[name] = total.get(name, 0.0) + weight * factor
    return total
