"""How ``speed.py`` times: its options, and two contenders that take turns."""

from __future__ import annotations

import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
import torch
from study_options import SpeedOptions

from ldam_plugins.training import default_device

Row = dict[str, Any]
Contender = Callable[[], Any]
DEVICE = default_device()


def compare(
    options: SpeedOptions,
    what: str,
    ours: Contender,
    peer: Contender,
    peer_name: str,
    *,
    note: str = "",
    once: bool = False,
) -> Row:
    """Let two contenders take turns; a turn is one call if ``once``, else as many as fill it."""
    calls = 1 if once else max(calls_for(options.seconds, ours), calls_for(options.seconds, peer))
    seconds = [(clock(ours, calls), clock(peer, calls)) for _ in range(options.repeats)]
    return summary(what, peer_name, seconds, note)


def summary(
    what: str,
    peer: str,
    turns: list[tuple[float, float]],
    note: str = "",
    *,
    unit: str = "seconds",
) -> Row:
    """The row of a comparison, from what ours and the peer took of the unit in each turn."""
    ratios = [mine / theirs for mine, theirs in turns]
    return {
        "what": what,
        "peer": peer,
        f"ours_{unit}": statistics.median(mine for mine, _ in turns),
        f"peer_{unit}": statistics.median(theirs for _, theirs in turns),
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        unit: turns,
        "note": note,
    }


def calls_for(seconds: float, run: Contender) -> int:
    """Calls that take so long, after one to warm up."""
    run()
    return max(1, round(seconds / clock(run, 1)))


def clock(run: Contender, calls: int) -> float:
    """Mean seconds of a call."""
    began = time.perf_counter()
    for _ in range(calls):
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / calls


def peak_memory(run: Contender) -> float:
    """Largest growth of the process (on CUDA: of what it has on the device) in a run, in MB."""
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    process, done, peak = psutil.Process(), threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], process.memory_info().rss)

    before = process.memory_info().rss
    thread = threading.Thread(target=watch)
    thread.start()
    run()
    done.set()
    thread.join()
    return max(0, peak[0] - before) / 1e6


def peak_of_tree(process: subprocess.Popen[str]) -> float:
    """Most memory of a process and its children until it ends, in MB.

    Memory that several share is divided among them (the proportional set size of Linux), elsewhere
    it counts for each.
    """
    peak, root = 0, psutil.Process(process.pid)
    while process.poll() is None:
        total = 0
        with suppress(psutil.NoSuchProcess):
            for each in (root, *root.children(recursive=True)):
                with suppress(psutil.NoSuchProcess, psutil.ZombieProcess, psutil.AccessDenied):
                    sizes = each.memory_full_info()
                    total += getattr(sizes, "pss", sizes.rss)
        peak = max(peak, total)
        time.sleep(0.05)
    return peak / 1e6
