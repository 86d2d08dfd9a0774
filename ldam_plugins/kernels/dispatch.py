"""Which tensors may be looked at, and how a plain one goes with those that are not plain."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes


def ordinary(*tensors: Tensor | None) -> bool:
    """Whether these are plain tensors, with no compiler, transform or mode that looks on.

    All else (subclasses such as ``DTensor``, ``torch.func``, ``FakeTensorMode``, ``make_fx``,
    ``torch.jit.trace`` ...) gets the definitions in operations of torch, without a branch that
    depends on a value.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._is_torch_function_mode_enabled() and not _only_default_devices():
        return False
    return all(tensor is None or type(tensor) in (Tensor, Parameter) for tensor in tensors)


def _only_default_devices() -> bool:
    """Whether all function modes are of ``torch.set_default_device``, which may be on for good."""
    return all(type(mode) is DeviceContext for mode in _get_current_function_mode_stack())


def can_inspect_values(*tensors: Tensor | None) -> bool:
    """Whether values may decide what is computed: of ordinary tensors, without a wait for them."""
    return ordinary(*tensors) and all(tensor is None or tensor.is_cpu for tensor in tensors)


def takes_own_functions(*tensors: Tensor) -> bool:
    """Whether a ``torch.autograd.Function`` without rules for transforms takes these.

    Compilers and modes let it pass, transforms of torch.func and tensor subclasses do not.
    """
    if torch.compiler.is_compiling():
        return True
    if torch._C._are_functorch_transforms_active():
        return False
    return all(type(tensor) in (Tensor, Parameter) for tensor in tensors)


def beside(values: Tensor, logits: Any) -> Tensor:
    """The same values in the form of logits, or targets, with which plain tensors do not mix.

    A loss has its class weights as a plain tensor, whatever it is called with: fake ones where the
    logits are fake, the same on every process where those are a ``DTensor``.
    """
    if torch.compiler.is_compiling() or type(values) not in (Tensor, Parameter):
        return values
    if torch._C._len_torch_dispatch_stack() or hasattr(logits, "fake_mode"):
        values = _fake_where_all_are(values, logits)
    if hasattr(logits, "device_mesh"):
        from torch.distributed.tensor import DTensor, Replicate  # its import is slow

        mesh: Any = logits.device_mesh
        local = values.to(logits.device)
        return DTensor.from_local(local, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return values


def _fake_where_all_are(values: Tensor, logits: Any) -> Tensor:
    """Values as a constant of what ``FakeTensorMode`` or ``make_fx`` traces."""
    from torch._guards import detect_fake_mode

    mode = detect_fake_mode([logits])
    if mode is None or torch._C._functorch.is_functorch_wrapped_tensor(values):
        return values
    if not torch._C._len_torch_dispatch_stack():  # fake logits outside of their mode
        fake: Tensor = mode.from_tensor(values)
        return fake
    with _disable_current_modes():
        numbers = values.tolist()
    return torch.tensor(numbers, dtype=values.dtype, device=values.device)


def any_requires_grad(*tensors: Tensor | None) -> bool:
    """Whether one of them asks for a gradient."""
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)
