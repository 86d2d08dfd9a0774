"""What keeps a cosine head in its place once it is on a model.

A loss with margins sees logits only, and those of an ordinary layer look like any. So the model
itself checks, before every forward pass that trains, that the layers which `use_cosine_head` put
there are there still; and what fuses its layers for inference folds the head first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ldam_plugins._validation import invalid
from ldam_plugins.heads.finder import refuse_adapted
from ldam_plugins.heads.layers import Cosine, CosineConv2d, CosineLinear, cosine_heads, is_sharded
from ldam_plugins.heads.trace import unwrapped

_FUSING = ("fuse", "reparameterize", "switch_to_deploy")


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
    for part, guard in _guards(model):
        guard.check(part)
    return heads


class HeadGuard:
    """A forward pre-hook that stops a training without the cosine heads it was set up with.

    It knows the names only, so it goes along when the model is copied, averaged, saved or wrapped.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self._trusted: int | None = None

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Check where gradients are on, as nothing else trains."""
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
            if not isinstance(_at(module, name), (CosineLinear, CosineConv2d)):
                self._look_closer(module, name)

    def _look_closer(self, module: nn.Module, name: str) -> None:
        part = _at(module, name)
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
        """Check once that a data-parallel wrapper around the model knows the heads."""
        wrapper = DistributedDataParallel._get_active_ddp_module()
        if wrapper is None or id(wrapper) == self._trusted:
            return
        known = {id(parameter) for parameter in wrapper._module_parameters}
        for name, head in cosine_heads(module).items():
            if head.weight.requires_grad and id(head.weight) not in known:
                raise _wrapped(name, wrapper)
        self._trusted = id(wrapper)


class FoldsFirst:
    """A method of ``module`` that reads weights as those of ordinary layers: they are, by then."""

    def __init__(self, module: nn.Module, method: str, fold: Callable[[nn.Module], Any]) -> None:
        self.module, self.method, self.fold = module, method, fold

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Fold the cosine heads inside, then do what the method does.

        The guards stay: a fused model is for inference, and the user has not folded it.
        """
        if cosine_heads(self.module):
            guards = list(_guards(self.module))
            self.fold(self.module)
            for part, guard in guards:
                part.register_forward_pre_hook(guard)
        return getattr(type(self.module), self.method)(self.module, *args, **kwargs)


def keep_in_place(model: nn.Module, names: Sequence[str], fold: Callable[[nn.Module], Any]) -> None:
    """Guard the heads ``names`` of ``model``, in place of what guarded it before."""
    let_go(model)
    while (inner := unwrapped(model)) is not model:
        prefix = next(f"{name}." for name, part in model.named_children() if part is inner)
        names = [name.removeprefix(prefix) for name in names]
        model = inner
    if "" in names:  # the model is the head: nothing is around it
        return
    model.register_forward_pre_hook(HeadGuard(names))
    for part in dict.fromkeys(part for name in names for part in _around(model, name)):
        for method in _FUSING:
            if callable(getattr(type(part), method, None)):
                setattr(part, method, FoldsFirst(part, method, fold))


def let_go(model: nn.Module) -> None:
    """Take away what `keep_in_place` put on ``model``."""
    for part in model.modules():
        for key, hook in list(part._forward_pre_hooks.items()):
            if isinstance(hook, HeadGuard):
                del part._forward_pre_hooks[key]
        for name, value in list(vars(part).items()):
            if isinstance(value, FoldsFirst):
                delattr(part, name)


def check_replaceable(model: nn.Module, layers: Mapping[str, nn.Linear | nn.Conv2d]) -> None:
    """Check that nothing but ``model`` itself holds on to the layers' parameters.

    Raises:
        ValueError: a wrapper that trains in parallel knows them already, or another module
            shares the weight.
    """
    sharded = sys.modules.get("torch.distributed.fsdp")
    kinds: tuple[type, ...] = (DistributedDataParallel,)
    kinds += (sharded.FullyShardedDataParallel,) if sharded else ()
    for name, layer in layers.items():
        for part in _around(model, name):
            engine = any(kind.__name__ == "DeepSpeedEngine" for kind in type(part).__mro__)
            if engine or isinstance(part, kinds):
                raise _wrapped(name, part)
        if is_sharded(layer.weight) or getattr(layer.weight, "_fsdp_flattened", False):
            raise _wrapped(name, model)
        parts = [(n, p) for n, p in model.named_modules() if p is not layer]
        tied = [n for n, p in parts if any(v is layer.weight for v in p._parameters.values())]
        if tied:
            expected = f"one whose head {name!r} has a weight of its own"
            hint = "A cosine head would part them: give the head its own first,"
            hint += " `layer.weight = nn.Parameter(layer.weight.detach().clone())`."
            raise invalid("model", expected, f"that of {tied[0]!r}", hint=hint)


def _guards(model: nn.Module) -> Iterator[tuple[nn.Module, HeadGuard]]:
    """Yield the guards on ``model`` and inside it, with the module that each is on."""
    for part in model.modules():
        for hook in part._forward_pre_hooks.values():
            if isinstance(hook, HeadGuard):
                yield part, hook


def _wrapped(name: str, wrapper: nn.Module) -> Exception:
    hint = "The wrapper would never see the new weight. Call use_cosine_head(model) first, then"
    hint += " wrap (DistributedDataParallel, FSDP, DeepSpeed, accelerator.prepare)."
    expected = f"one not yet wrapped or sharded where its head {name!r} is replaced"
    return invalid("model", expected, type(wrapper).__name__, hint=hint)


def _at(model: nn.Module, name: str) -> nn.Module | None:
    part: Any = model
    for step in name.split("."):
        part = getattr(part, step, None)
    return part


def _around(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """Yield the modules that hold the module ``name``, the model first."""
    part = model
    for step in name.split(".") if name else ():
        yield part
        part = getattr(part, step)
