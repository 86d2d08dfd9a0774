"""What both recipes ask of the machine they run on, and where checkpoints are kept."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import psutil
import torch

from ldam_plugins._checks import check_choice, must_be

PRECISIONS = ("auto", "no", "bf16", "fp16")
_CHECKPOINT = "epoch_"


def choose_precision(requested: str = "auto") -> str:
    """Mixed precision for Accelerate and the Trainer: ``"no"``, ``"bf16"`` or ``"fp16"``.

    ``"auto"`` is bf16 where the hardware computes in it (AMX or AVX512-BF16 on a CPU, compute
    capability 8 on a CUDA device), else float32: without such units bf16 is slower than float32.

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
    return "bf16" if units.get("amx_bf16") or units.get("avx512_bf16") else "no"


def check_processes(running: int, wanted: int | None = None) -> None:
    """Check that as many processes run together as were asked for.

    Some launch lines start several processes that do not know of each other, or only one; each
    would train on its own without a word.

    Args:
        running: Processes that train together (``accelerator.num_processes``).
        wanted: How many the user asked for; None: what the launcher started or was told to.

    Raises:
        RuntimeError: the two differ.
    """
    asked = wanted or int(os.environ.get("WORLD_SIZE", 0)) or _asked_of_launcher() or running
    if asked != running:
        way_out = (
            "Start several processes with `accelerate launch --multi_gpu --num_processes N "
            "--main_process_port 0` (on a CPU with ACCELERATE_USE_CPU=true before it) or torchrun."
        )
        raise RuntimeError(must_be("num_processes", f"{asked}, as asked for", running, way_out))


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
        wanted = "an installed tracker or 'none'"
        raise ModuleNotFoundError(must_be("report_to", wanted, name, f"Run `pip install {name}`."))


def newest_checkpoint(output_dir: str | os.PathLike[str]) -> tuple[Path | None, int]:
    """Newest whole checkpoint of a run and the epochs it holds; (None, 0) if there is none."""
    found = [(_epochs_of(path), path) for path in _folder(output_dir).glob(f"{_CHECKPOINT}*")]
    epochs, newest = max(found, default=(0, None))
    return newest, epochs


def write_checkpoint(
    output_dir: str | os.PathLike[str], epochs: int, save: Callable[[str], None], keep: int = 1
) -> Path:
    """Write a checkpoint whole or not at all, and drop all but the newest ``keep``.

    ``save(folder)`` writes into a folder beside, which is renamed when it is complete. Call it on
    every process for a ``save`` that is collective, such as ``Accelerator.save_state``.

    Args:
        output_dir: Folder of the run.
        epochs: Epochs done.
        save: Writes the state into the folder it is given.
        keep: Checkpoints to keep, at least 1.
    """
    target = _folder(output_dir) / f"{_CHECKPOINT}{epochs:05d}"
    beside = target.with_name(f".{target.name}.partial")
    save(str(beside))
    if int(os.environ.get("RANK", 0)) == 0:
        shutil.rmtree(target, ignore_errors=True)
        beside.rename(target)
        older = sorted(target.parent.glob(f"{_CHECKPOINT}*"), key=_epochs_of)[:-keep]
        for path in older:
            shutil.rmtree(path)
    return target


def _folder(output_dir: str | os.PathLike[str]) -> Path:
    return Path(output_dir) / "checkpoints"


def _epochs_of(path: Path) -> int:
    return int(path.name.removeprefix(_CHECKPOINT))
