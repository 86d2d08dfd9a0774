"""Processes that train together: how many they are, and which samples each of them gets."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil
from torch import Tensor, distributed

from ldam_plugins._validation import invalid

if TYPE_CHECKING:
    from accelerate import Accelerator

_Made = TypeVar("_Made")


def check_processes(running: int, expected: int | None = None) -> None:
    """Check that as many processes train together as were asked for.

    Some launch lines start only one process, or several that do not know of each other, each of
    which would silently train a model of its own.

    Args:
        running: Processes that train together (``accelerator.num_processes``).
        expected: How many the user asked for; None: how many the launcher started or was asked
            for.

    Raises:
        RuntimeError: the two differ.
    """
    asked = expected or int(os.environ.get("WORLD_SIZE", 0)) or _asked_of_launcher() or running
    if asked != running:
        hint = (
            "Start several processes with `accelerate launch --multi_gpu --num_processes N "
            "--main_process_port 0` (on a CPU with ACCELERATE_USE_CPU=true before it) or torchrun."
        )
        count = f"{asked}, as asked for"
        raise invalid("num_processes", count, running, hint=hint, error=RuntimeError)


def _asked_of_launcher() -> int | None:
    """``--num_processes`` of the ``accelerate launch`` that started this process.

    Without GPUs it starts one process regardless of the number, and does not pass the number on.
    """
    parent = psutil.Process().parent()
    line = parent.cmdline() if parent is not None else []
    launchers = ("accelerate", "accelerate-launch", "accelerate.commands.launch", "launch.py")
    if not any(Path(word).name in launchers for word in line[:3]):
        return None
    found = re.search(r"--num[_-]processes[= ](\d+)", " ".join(line))
    return int(found[1]) if found else None


def refuse_deepspeed(plugin: Any, *, stages: Collection[int], hint: str) -> None:
    """Refuse the ZeRO stages of DeepSpeed under which the training or the saved model goes wrong.

    Args:
        plugin: Accelerate's ``DeepSpeedPlugin`` (``TrainingArguments.deepspeed_plugin``,
            ``accelerator.state.deepspeed_plugin``); None: no DeepSpeed.
        stages: Those that go wrong.
        hint: What to use instead.

    Raises:
        ValueError: the plugin asks for one of them.
    """
    if plugin is None or plugin.zero_stage not in stages:
        return
    right = [stage for stage in range(4) if stage not in stages]
    expected = f"one of {right}" if right else "left out: DeepSpeed takes the update's steps itself"
    raise invalid("zero_stage", expected, plugin.zero_stage, hint=hint)


def is_sharded(state: Any) -> bool:
    """Whether the processes of a state of Accelerate hold parts of a model, none the whole."""
    return state.distributed_type in ("FSDP", "DEEPSPEED", "MEGATRON_LM")


def is_first_process() -> bool:
    """Whether this is the first of the processes that train together, or the only one."""
    together = distributed.is_available() and distributed.is_initialized()
    return not together or distributed.get_rank() == 0


def any_process(flag: bool) -> bool:
    """Whether ``flag`` is true on any of the processes that train together; all must call it."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return flag
    flags = [False] * distributed.get_world_size()
    distributed.all_gather_object(flags, flag)  # which knows the device of each backend
    return any(flags)


def from_first_process(make: Callable[[], _Made]) -> _Made:
    """What ``make`` gives on the first of the processes that train together; all must call it.

    Args:
        make: Called there only. What it gives is pickled for the others.
    """
    made: list[Any] = [make() if is_first_process() else None]
    if distributed.is_available() and distributed.is_initialized():
        distributed.broadcast_object_list(made)
    found: _Made = made[0]
    return found


def epoch_batches(
    samples: int, batch_size: int, processes: int = 1, *, drop_last: bool = False
) -> int:
    """Batches of each process in an epoch, as Accelerate shares them out.

    Args:
        samples: Samples of the epoch, over all processes.
        batch_size: Rows of a batch.
        processes: Processes that share the epoch.
        drop_last: Whether only whole batches are used, the same number by each process.

    Example:
        >>> epoch_batches(10, 4, 2), epoch_batches(10, 4, 2, drop_last=True)
        (2, 1)
    """
    turn = batch_size * processes
    return samples // turn if drop_last else -(-samples // turn)


def num_unpadded_rows(
    samples: int, batch: int, batch_size: int, process: int, processes: int
) -> int:
    """Rows of a process's ``batch``-th batch (0-based) that are not repeats of other rows.

    Accelerate gives whole batches to the processes in turn. Those of the last turn it fills up with
    samples that it gave out before; they come last and are not counted here.

    Args:
        samples: Samples of the epoch, over all processes.
        batch: 0-based number of the batch on this process.
        batch_size: Rows of a batch.
        process: This process, 0-based.
        processes: Processes that share the epoch.

    Example:
        >>> [num_unpadded_rows(10, 1, 4, process, 2) for process in range(2)]  # 4 + 4, 2 + none
        [2, 0]
    """
    first = (batch * processes + process) * batch_size
    return min(max(samples - first, 0), batch_size)


def unpadded_batches(
    accelerator: Accelerator, loader: Iterable[Any], *, batch_size: int, samples: int
) -> Iterator[tuple[Any, Tensor]]:
    """The (inputs, labels) batches of this process, without the labels of repeated samples.

    The inputs keep all rows, so that their shapes stay the same: the labels are the first of them,
    and :class:`~ldam_plugins.training.TrainStep` leaves out the rows beyond.

    Args:
        accelerator: What prepared the loader.
        loader: The prepared loader.
        batch_size: Rows of a batch.
        samples: Samples of the epoch, over all processes.
    """
    process, processes = accelerator.process_index, accelerator.num_processes
    for index, (inputs, labels) in enumerate(loader):
        yield inputs, labels[: num_unpadded_rows(samples, index, batch_size, process, processes)]
