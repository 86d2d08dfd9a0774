"""What both recipes ask of the machine they run on, and where checkpoints are kept."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import random
import re
import shutil
import signal
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import psutil
import torch
from torch import distributed

from ldam_plugins._validation import check_choice, check_int, invalid
from ldam_plugins.training.history import flush_folder, flush_names

PRECISIONS = ("auto", "no", "bf16", "fp16")
PREEMPTED = 128 + signal.SIGTERM
"""Exit code, 143, of a run that SIGTERM ended after its state was saved: ``--resume`` goes on."""
_CHECKPOINT = "epoch_"
_PARTIAL = ".partial"
# Parameters of glibc's mallopt (malloc.h), and what they grow to by themselves.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_GROWN = {_MMAP_MAX: 65_536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}

logger = logging.getLogger(__name__)


def choose_precision(requested: str = "auto") -> str:
    """Mixed precision for Accelerate and the Trainer: ``"no"``, ``"bf16"`` or ``"fp16"``.

    ``"auto"`` is bf16 where the hardware has units that multiply matrices in it (AMX on a CPU,
    compute capability 8 on a CUDA device), else float32. AVX512-BF16 alone is not enough: with it
    bf16 was measured slower than float32.

    Raises:
        ValueError: an unknown precision.
    """
    check_choice("mixed_precision", requested, PRECISIONS)
    if requested != "auto":
        return requested
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.get_device_capability()[0] >= 8 else "no"
    if torch.accelerator.is_available():
        return "no"
    units = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return "bf16" if units.get("amx_bf16") and units.get("amx_tile") else "no"


def seed_epoch(seed: int, epoch: int, process: int = 0) -> torch.Generator:
    """Seed all that a process draws in an epoch: Python, NumPy, and torch on every device.

    Each of them, for each seed, epoch and process, has a stream of its own (NumPy's
    ``SeedSequence``), so that no process repeats another's draws in any epoch, and a resumed
    training draws what it would have drawn.

    Args:
        seed: Seed of the training, at least 0.
        epoch: 0-based epoch.
        process: 0-based process.

    Returns:
        A generator on the CPU with one more such stream.
    """
    for name, value in (("seed", seed), ("epoch", epoch), ("process", process)):
        check_int(name, value, low=0)
    children = np.random.SeedSequence(seed, spawn_key=(epoch, process)).spawn(4)
    random.seed(children[0].generate_state(8).tobytes())
    np.random.seed(children[1].generate_state(8))
    torch.manual_seed(int(children[2].generate_state(1, np.uint64)[0]))
    return torch.Generator().manual_seed(int(children[3].generate_state(1, np.uint64)[0]))


@contextmanager
def keep_freed_memory(device: torch.device | str) -> Iterator[None]:
    """Keep what a training step on a CPU frees for the next step, until the end of the block.

    The C library of Linux gives large blocks back to the system, which must clear them page by
    page before it lends them again: a fifth of the time of a compiled ResNet-32 and a third of
    MiniLM's. The price is that the process stays as large as it ever was in the block. Nothing
    changes on other devices and with other C libraries.
    """
    if torch.device(device).type != "cpu" or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_MAX, 0)
    libc.mallopt(_TRIM_THRESHOLD, -1)
    try:
        yield
    finally:
        for parameter, value in _GROWN.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)


def check_processes(running: int, expected: int | None = None) -> None:
    """Check that as many processes run together as were asked for.

    Some launch lines start several processes that do not know of each other, or only one; each
    would train on its own without a word.

    Args:
        running: Processes that train together (``accelerator.num_processes``).
        expected: How many the user asked for; None: what the launcher started or was told to.

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


def refuse_deepspeed(plugin: Any, *, stages: Collection[int], hint: str) -> None:
    """Refuse the ZeRO stages of DeepSpeed under which a training or its model would be wrong.

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


def _asked_of_launcher() -> int | None:
    """``--num_processes`` of the ``accelerate launch`` that started this process.

    Without GPUs it starts one process whatever the number, and passes the number on to nobody.
    """
    parent = psutil.Process().parent()
    line = parent.cmdline() if parent is not None else []
    launchers = ("accelerate", "accelerate-launch", "accelerate.commands.launch", "launch.py")
    if not any(Path(word).name in launchers for word in line[:3]):
        return None
    found = re.search(r"--num[_-]processes[= ](\d+)", " ".join(line))
    return int(found[1]) if found else None


def check_tracker(name: str) -> None:
    """Check that the experiment tracker ``name`` is installed; ``"none"`` always is.

    Raises:
        ModuleNotFoundError: it is not (Accelerate would go on without it).
    """
    if name != "none" and find_spec(name) is None:
        expected = "an installed tracker or 'none'"
        hint = f"Run `pip install {name}`."
        raise invalid("report_to", expected, name, hint=hint, error=ModuleNotFoundError)


@contextmanager
def defer_sigterm(
    runs: Callable[[FrameType | None], bool] | None = None,
) -> Iterator[threading.Event]:
    """Note SIGTERM, which schedulers send before they kill a job, instead of ending at once.

    Yields an event that is set by the first SIGTERM; a second one ends the process as ever, and so
    does the first one after the block. Then the handler is again the one that was there before,
    unless somebody else has set another since. Only the main thread can be told of signals, and a
    handler that is none of Python's could not be put back: there the event is never set.

    Args:
        runs: Of the frame that the signal interrupts: whether what is to be ended still runs. For
            blocks that may never be left, as where nobody tells a callback of an error.
    """
    told, main = threading.Event(), threading.main_thread()
    if threading.current_thread() is not main:
        yield told
        return
    before = signal.getsignal(signal.SIGTERM)
    if before is None:
        logger.warning("SIGTERM has a handler that is not Python's: it is left as it is.")
        yield told
        return
    ended = False

    def give_back() -> None:
        if signal.getsignal(signal.SIGTERM) is note and threading.current_thread() is main:
            signal.signal(signal.SIGTERM, before)

    def note(number: int, frame: FrameType | None) -> None:
        give_back()
        if not ended and (runs is None or runs(frame)):
            told.set()
        elif callable(before):
            before(number, frame)
        elif before == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, note)
    try:
        yield told
    finally:
        ended = True
        give_back()


def any_process(flag: bool) -> bool:
    """Whether ``flag`` is true on any of the processes that train together; all must call it."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return flag
    flags = [False] * distributed.get_world_size()
    distributed.all_gather_object(flags, flag)  # which knows the device of each backend
    return any(flags)


def device_of_collectives(config: str) -> str:
    """Type of a device on which processes can talk: the CPU where a backend serves it.

    Example:
        >>> device_of_collectives("cpu:gloo,cuda:nccl"), device_of_collectives("xpu:xccl")
        ('cpu', 'xpu')
    """
    devices = [entry.partition(":")[0] for entry in config.split(",")]
    return "cpu" if "cpu" in devices else devices[0]


def until_preempted(epochs: Iterable[int]) -> Iterator[int]:
    """The epochs to train; where SIGTERM comes to any process, the last one is the running one.

    Raises:
        SystemExit: with the code :data:`PREEMPTED`, after the loop's body has finished (and
            saved) the epoch in which SIGTERM came.
    """
    with defer_sigterm() as told:
        for epoch in epochs:
            yield epoch
            if any_process(told.is_set()):
                logger.warning(f"SIGTERM: ended after epoch {epoch}; --resume goes on from there.")
                raise SystemExit(PREEMPTED)


def epoch_batches(
    samples: int, batch_size: int, processes: int = 1, *, drop_last: bool = False
) -> int:
    """Batches of each process in an epoch, as Accelerate deals them; see :func:`num_unpadded_rows`.

    Args:
        samples: Samples of the epoch, over all processes.
        batch_size: Rows of a batch.
        processes: Processes that share the epoch.
        drop_last: Whether only whole batches are dealt, the same number to each process.

    Example:
        >>> epoch_batches(10, 4, 2), epoch_batches(10, 4, 2, drop_last=True)
        (2, 1)
    """
    turn = batch_size * processes
    return samples // turn if drop_last else -(-samples // turn)


def num_unpadded_rows(
    samples: int, batch: int, batch_size: int, process: int, processes: int
) -> int:
    """Rows of a process's ``batch``-th batch (0-based) that are samples of the epoch.

    Accelerate deals whole batches to the processes in turn and fills up those of the last turn
    with samples that were dealt already; these come last and are not counted here.

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


def newest_checkpoint(output_dir: str | os.PathLike[str]) -> tuple[Path | None, int]:
    """Newest whole checkpoint of a run and the epochs it holds; (None, 0) if there is none."""
    found = checkpoints(output_dir)
    return (found[max(found)], max(found)) if found else (None, 0)


def checkpoints(output_dir: str | os.PathLike[str]) -> dict[int, Path]:
    """Whole checkpoints of a run by the epochs they hold."""
    found = sorted(_folder(output_dir).glob(f"{_CHECKPOINT}*"))
    return {int(path.name.removeprefix(_CHECKPOINT)): path for path in found if _is_one(path)}


def drop_partial_checkpoints(output_dir: str | os.PathLike[str]) -> None:
    """Remove what a run that was killed while it wrote a checkpoint left of that one.

    Call it on one process before any writes.
    """
    for path in _folder(output_dir).glob(f".{_CHECKPOINT}*{_PARTIAL}"):
        if path.is_dir():
            shutil.rmtree(path)


def write_checkpoint(
    output_dir: str | os.PathLike[str], epochs: int, save: Callable[[str], None], keep: int = 1
) -> Path:
    """Write a checkpoint whole or not at all, and drop all but the newest ``keep``.

    ``save(folder)`` writes into a folder beside, which is renamed when it is complete and on the
    disk; only then older ones are dropped, so that a power cut leaves one. Call it on every process
    for a ``save`` that is collective, such as ``Accelerator.save_state``.

    Args:
        output_dir: Folder of the run.
        epochs: Epochs done.
        save: Writes the state into the folder it is given.
        keep: Checkpoints to keep, at least 1.

    Raises:
        OSError: it could not be written; the checkpoints before it are as they were.
        ValueError: ``keep`` is less than 1.
    """
    check_int("keep", keep, low=1)
    target = _folder(output_dir) / f"{_CHECKPOINT}{epochs:05d}"
    beside = target.with_name(f".{target.name}{_PARTIAL}")
    main = int(os.environ.get("RANK", 0)) == 0
    try:
        save(str(beside))
        if main:
            flush_folder(beside)
    except Exception as error:  # torch, safetensors and the system each word a full disk otherwise
        shutil.rmtree(beside, ignore_errors=True)
        hint = "Make room or mend the folder, then go on from the last one with --resume"
        raise OSError(f"checkpoint {target} cannot be written ({error}). {hint}.") from error
    if main:
        if target.exists():
            target.rename(target.with_name(f".{target.name}.old{_PARTIAL}"))
        beside.rename(target)
        flush_names(target.parent)
        drop_partial_checkpoints(output_dir)
        for _, path in sorted(checkpoints(output_dir).items())[:-keep]:
            shutil.rmtree(path)
    return target


def _folder(output_dir: str | os.PathLike[str]) -> Path:
    return Path(output_dir) / "checkpoints"


def _is_one(path: Path) -> bool:
    return path.is_dir() and path.name.removeprefix(_CHECKPOINT).isdecimal()
