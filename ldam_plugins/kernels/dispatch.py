"""When values may be looked at, when a transform looks on, and how kinds of tensors are mixed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes


def is_tracing() -> bool:
    """Whether a compiler, a transform or a mode of torch looks on, now.

    These are ``torch.compile``, ``torch.jit.trace``, the transforms of ``torch.func``, dispatch
    modes (``FakeTensorMode``, ``make_fx``) and function modes, but for a default device, which may
    be set for good.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return True
    return torch._C._is_torch_function_mode_enabled() and not _only_default_devices()


def runs_eagerly(*tensors: Tensor | None) -> bool:
    """Whether these are plain tensors and nothing is traced: an operation is computed as it is.

    All else (subclasses such as ``DTensor`` too) gets definitions in operations of torch, without
    a branch that depends on a value.
    """
    return not is_tracing() and all(tensor is None or _is_plain(tensor) for tensor in tensors)


def can_inspect_values(*tensors: Tensor | None) -> bool:
    """Whether values may decide what is computed: they exist, and on the CPU, without a wait."""
    return runs_eagerly(*tensors) and all(tensor is None or tensor.is_cpu for tensor in tensors)


def supports_custom_autograd(*tensors: Tensor) -> bool:
    """Whether a ``torch.autograd.Function`` without rules for transforms can be applied to these.

    Compilers and modes let it pass; transforms of ``torch.func`` and tensor subclasses do not.
    """
    if torch.compiler.is_compiling():
        return True
    if torch._C._are_functorch_transforms_active():
        return False
    return all(_is_plain(tensor) for tensor in tensors)


def any_requires_grad(*tensors: Tensor | None) -> bool:
    """Whether one of them asks for a gradient."""
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def match_tensor_kind(values: Tensor, like: Any) -> Tensor:
    """``values`` as the kind of tensor that ``like`` is, with which plain tensors do not mix.

    A loss keeps its class weights as a plain tensor. Where it is called with fake tensors it needs
    them fake, and where it is called with a ``DTensor`` the same on every process.
    """
    if torch.compiler.is_compiling() or not _is_plain(values):
        return values
    if torch._C._len_torch_dispatch_stack() or hasattr(like, "fake_mode"):
        values = _fake_where_all_are(values, like)
    if hasattr(like, "device_mesh"):
        from torch.distributed.tensor import DTensor, Replicate  # its import is slow

        mesh: Any = like.device_mesh
        local = values.to(like.device)
        return DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return values


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, Parameter)


def _only_default_devices() -> bool:
    """Whether all function modes are those of ``torch.set_default_device``."""
    return all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())


def _fake_where_all_are(values: Tensor, like: Any) -> Tensor:
    """Values as a constant of what ``FakeTensorMode`` or ``make_fx`` traces."""
    from torch._guards import detect_fake_mode

    mode = detect_fake_mode([like])
    if mode is None or torch._C._functorch.is_functorch_wrapped_tensor(values):
        return values
    if not torch._C._len_torch_dispatch_stack():  # a fake tensor outside of its mode
        fake: Tensor = mode.from_tensor(values)
        return fake
    with _disable_current_modes():
        numbers = values.tolist()
    return torch.tensor(numbers, dtype=values.dtype, device=values.device)
