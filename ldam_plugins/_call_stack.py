"""Who is calling: the Trainer or data loader behind a call that is not told which one it is.

The hosts call losses, metrics, samplers and callbacks without handing themselves over, so the
caller is looked for on the stack of running functions. Only this module does so. It imports no
host: where the module of a class is not loaded, there is no object of that class.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple


class TrainerCall(NamedTuple):
    """A method of a ``transformers.Trainer`` that is running."""

    trainer: Any
    frame: FrameType


def trainer_calls(
    method: str | None = None, frame: FrameType | None = None
) -> Iterator[TrainerCall]:
    """Running methods of ``transformers.Trainer`` or a subclass, the innermost first.

    Do not keep the frames: they keep the local variables of their functions alive.

    Args:
        method: Only methods of this name; None: any.
        frame: Where to begin; None: with the caller.
    """
    trainer_class = getattr(sys.modules.get("transformers.trainer"), "Trainer", None)
    if trainer_class is None:
        return
    for running in _outward(frame or sys._getframe(1)):
        owner = running.f_locals.get("self")
        # Not isinstance, which asks the attributes of objects that have nothing to do with it.
        if issubclass(type(owner), trainer_class) and method in (None, running.f_code.co_name):
            yield TrainerCall(owner, running)


def find_trainer(method: str | None = None) -> Any:
    """The innermost ``transformers.Trainer`` that is running; None if there is none.

    Args:
        method: Only a Trainer that runs its method of this name; None: any.
    """
    return next((call.trainer for call in trainer_calls(method)), None)


def loader_that_sets_epoch() -> tuple[Any, bool]:
    """Which data loader of Accelerate called the ``set_epoch`` that asks, and why.

    A loader hands on what a training loop tells it. At the beginning of its ``__iter__`` it also
    calls its own ``set_epoch`` with the number of its iterations (accelerate 1.10 to 1.15). Batch
    samplers in between hand both on.

    Returns:
        The loader, or None; and whether it was its own count.
    """
    loader = None
    for running in _outward(sys._getframe(1)):
        if running.f_code.co_name != "set_epoch":
            own_count = running.f_code.co_name == "__iter__" and _is_of_accelerate(running)
            return loader, loader is not None and own_count
        if _is_of_accelerate(running):
            loader = running.f_locals.get("self")
    return loader, False


def loader_that_iterates() -> Any:
    """The data loader of Accelerate whose iteration asks a sampler for rows; None if none does."""
    for running in _outward(sys._getframe(1)):
        if running.f_code.co_name == "__iter__" and _is_of_accelerate(running):
            loader = running.f_locals.get("self")
            if hasattr(loader, "iteration"):  # its batch samplers have none
                return loader
    return None


def _outward(frame: FrameType | None) -> Iterator[FrameType]:
    """The frame, that of its caller, and so on."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_of_accelerate(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith("accelerate.")
