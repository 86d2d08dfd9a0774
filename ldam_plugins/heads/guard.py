"""Checks that a cosine head stays where it was put.

A loss with margins sees only logits, and those of an ordinary layer look like any others. So the
model itself checks, before every forward pass that trains, that the heads which `use_cosine_head`
put on it are still there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ldam_plugins._validation import invalid
from ldam_plugins.heads.finder import refuse_adapted
from ldam_plugins.heads.layers import (
    Cosine,
    CosineHead,
    cosine_heads,
    is_sharded,
    submodule_or_none,
)
from ldam_plugins.heads.trace import unwrapped


def check_heads(model: nn.Module, scale: float) -> dict[str, Cosine]:
    """Return the cosine heads of ``model`` after checking that they suit a loss of this scale.

    Raises:
        ValueError: there is none, one has another scale, or one that was put on is gone.
    """
    heads = cosine_heads(model)
    if not heads:
        hint = f"Call use_cosine_head(model, scale={scale:g}) before the optimizer is made."
        raise invalid("model", "one with a cosine head", type(model).__name__, hint=hint)
    for name, head in heads.items():
        if head.scale != scale:
            expected = f"{head.scale:g}, that of head {name!r}, for the loss as well"
            raise invalid("scale", expected, scale)
    for module, guard in guards_of(model):
        guard.check(module)
    return heads


class HeadGuard:
    """A forward pre-hook that stops training when one of the cosine heads is missing.

    It holds only their names, so it stays valid when the model is copied, averaged, saved or
    wrapped.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._checked_wrapper: int | None = None

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Check before a forward pass with gradients in training mode, and before no other."""
        if not (module.training and torch.is_grad_enabled()):
            return
        self.check(module)
        if not torch.compiler.is_compiling():
            self._check_parallel(module)

    def check(self, module: nn.Module) -> None:
        """Check that the heads are where they were put.

        Raises:
            ValueError: an ordinary layer is in the place of one, or an adapter on top of it.
        """
        for name in self.names:
            if not isinstance(submodule_or_none(module, name), CosineHead):
                self._check_moved(module, name)

    def _check_moved(self, module: nn.Module, name: str) -> None:
        """Check that the head ``name`` now is inside a wrapper, such as PEFT's, and unchanged."""
        part = submodule_or_none(module, name)
        inside = cosine_heads(module if part is None else part)
        if part is not None:
            inside = {f"{name}.{inner}": head for inner, head in inside.items()}
        if len(inside) >= (len(self.names) if part is None else 1):
            refuse_adapted(inside)
            return
        expected = f"one with the cosine head {name!r}, on which margins depend, in training"
        hint = "It was replaced since use_cosine_head(model), by reset_classifier, fusing,"
        hint += " quantising or the like. Call use_cosine_head(model) again before the"
        hint += " optimizer is made; to train on without it, fold_cosine_head(model) first."
        found = "none" if part is None else type(part).__name__
        raise invalid("model", expected, found, hint=hint)

    def _check_parallel(self, module: nn.Module) -> None:
        """Check, once for each wrapper, that DistributedDataParallel knows the heads' weights."""
        wrapper = DistributedDataParallel._get_active_ddp_module()
        if wrapper is None or id(wrapper) == self._checked_wrapper:
            return
        known = {id(parameter) for parameter in wrapper._module_parameters}
        for name, head in cosine_heads(module).items():
            if head.weight.requires_grad and id(head.weight) not in known:
                raise _already_wrapped(name, wrapper)
        self._checked_wrapper = id(wrapper)


def guard_heads(model: nn.Module) -> None:
    """Put one guard of all cosine heads on ``model``, in place of those that are there.

    It is put on the model inside a compiled or data-parallel one, which others may hold as well.
    """
    remove_guards(model)
    names = list(cosine_heads(model))
    while (inner := unwrapped(model)) is not model:
        prefix = next(f"{name}." for name, part in model.named_children() if part is inner)
        names = [name.removeprefix(prefix) for name in names]
        model = inner
    if "" not in names:  # else the model is the head, and nothing can replace it
        model.register_forward_pre_hook(HeadGuard(names))


def remove_guards(model: nn.Module) -> None:
    """Remove the guards on ``model`` and inside it."""
    for module, guard in list(guards_of(model)):
        hooks = module._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is guard]:
            del hooks[key]


def guards_of(model: nn.Module) -> Iterator[tuple[nn.Module, HeadGuard]]:
    """Yield the guards on ``model`` and inside it, each with the module that it is on."""
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, HeadGuard):
                yield module, hook


def check_replaceable(model: nn.Module, layers: Mapping[str, nn.Linear | nn.Conv2d]) -> None:
    """Check that nothing but ``model`` itself uses the layers' parameters.

    Raises:
        ValueError: a wrapper that trains in parallel has registered them, or another module
            shares the weight.
    """
    for name, layer in layers.items():
        _check_not_wrapped(model, name, layer)
        _check_not_shared(model, name, layer)


def _check_not_wrapped(model: nn.Module, name: str, layer: nn.Linear | nn.Conv2d) -> None:
    wrapper = parallel_wrapper(model, name, layer)
    if wrapper is not None:
        raise _already_wrapped(name, wrapper)


def parallel_wrapper(model: nn.Module, name: str, layer: nn.Linear | nn.Conv2d) -> nn.Module | None:
    """The module around ``layer`` that trains it in parallel and knows its parameters, if any.

    Args:
        model: The model.
        name: Dotted name of ``layer`` in it.
        layer: The layer.

    Returns:
        The wrapper (DistributedDataParallel, FSDP, DeepSpeed's engine), or ``model`` where the
        weight itself is sharded.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")  # slow to import, and needless if it is not
    kinds: tuple[type, ...] = (DistributedDataParallel,)
    kinds += (fsdp.FullyShardedDataParallel,) if fsdp else ()
    for module in modules_around(model, name):
        deepspeed = any(kind.__name__ == "DeepSpeedEngine" for kind in type(module).__mro__)
        if deepspeed or isinstance(module, kinds):
            return module
    sharded = is_sharded(layer.weight) or getattr(layer.weight, "_fsdp_flattened", False)
    return model if sharded else None


def _check_not_shared(model: nn.Module, name: str, layer: nn.Linear | nn.Conv2d) -> None:
    for other, module in model.named_modules():
        parameters = module._parameters.values()
        if module is not layer and any(parameter is layer.weight for parameter in parameters):
            expected = f"one whose head {name!r} has a weight of its own"
            hint = "A cosine head would part them: give the head its own first,"
            hint += " `layer.weight = nn.Parameter(layer.weight.detach().clone())`."
            raise invalid("model", expected, f"that of {other!r}", hint=hint)


def _already_wrapped(name: str, wrapper: nn.Module) -> Exception:
    hint = "The wrapper would never see the new weight. Call use_cosine_head(model) first, then"
    hint += " wrap (DistributedDataParallel, FSDP, DeepSpeed, accelerator.prepare)."
    expected = f"one not yet wrapped or sharded where its head {name!r} is replaced"
    return invalid("model", expected, type(wrapper).__name__, hint=hint)


def modules_around(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """Yield the modules that contain the submodule ``name``, ``model`` first."""
    part = model
    for step in name.split(".") if name else ():
        yield part
        part = getattr(part, step)
