"""Cores of this machine that are really free, and threads that do not get into each other's way.

Two threads of OpenMP on one core wait for each other: a step then takes several times as long as
with one thread. So torch is given no more threads than there are cores that this process may use
(its affinity, the quota of its control group) and that other programs leave it.
"""

from __future__ import annotations

import logging
import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from ldam_plugins.training.command_line import is_first_process

LEAST_WINDOW = 0.5
"""Seconds that the machine must have been watched for its load to count."""
_CGROUPS = Path("/sys/fs/cgroup")
_BUSY = 0.5  # cores that are used beyond those there are, from which on it is worth a word

logger = logging.getLogger(__name__)


def usable_cores() -> int:
    """Cores that this process may use: those of its affinity, at most the quota of its cgroup.

    ``joblib.cpu_count`` looks at the quota of the topmost group alone.
    """
    quota = _quota()
    allowed = len(_allowed())
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def _allowed() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _quota(root: Path = _CGROUPS, own: Path = Path("/proc/self/cgroup")) -> float | None:
    """Cores by the CPU quota of the control groups that hold this process; None without one.

    Files as of https://www.kernel.org/doc/html/latest/admin-guide/cgroup-v2.html (``cpu.max``), and
    of version 1 (``cpu.cfs_quota_us``).
    """
    found = []
    for group in _groups(root, own):
        words = _words(group / "cpu.max")
        if not words:
            words = [*_words(group / "cpu.cfs_quota_us"), *_words(group / "cpu.cfs_period_us")]
        if len(words) == 2 and words[0] not in ("max", "-1"):
            found.append(int(words[0]) / int(words[1]))
    return min(found, default=None)


def _groups(root: Path, own: Path) -> list[Path]:
    """The folders of the control groups of this process, up to the root."""
    folders = [root, root / "cpu"]
    for line in _text(own).splitlines():
        _, controllers, path = line.split(":", 2)
        top = root if not controllers else root / "cpu" if "cpu" in controllers.split(",") else None
        place = None if top is None else top / path.lstrip("/")
        while top is not None and place is not None and place != top and top in place.parents:
            folders.append(place)
            place = place.parent
    return folders


def _words(path: Path) -> list[str]:
    return _text(path).split()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


class _Moment(NamedTuple):
    """Seconds on the clock, busy seconds of the allowed cores, and CPU seconds of this launch."""

    clock: float
    busy: float
    own: dict[int, float]


class CoreWatch:
    """Watches the cores from its making on, for what other programs use of them.

    Args:
        processes: Processes of this machine that train together, whose own use does not count.
    """

    def __init__(self, processes: int | None = None) -> None:
        self.processes = processes or int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self._began = self._now()

    def others(self) -> float:
        """Cores that other programs kept busy since; 0 if that was less than half a second ago."""
        now = self._now()
        seconds = now.clock - self._began.clock
        if seconds < LEAST_WINDOW:
            return 0.0
        own = sum(used - self._began.own.get(pid, 0.0) for pid, used in now.own.items())
        return max(0.0, (now.busy - self._began.busy - own) / seconds)

    def free(self) -> int:
        """Cores that are free for this launch, at least one."""
        left = round(len(_allowed()) - self.others())
        return max(1, min(usable_cores(), left))

    def _now(self) -> _Moment:
        allowed = set(_allowed())
        cores = [each for i, each in enumerate(psutil.cpu_times(percpu=True)) if i in allowed]
        # What a guest runs is in the time of the user already.
        not_busy = ("idle", "iowait", "guest", "guest_nice")
        idle = sum(getattr(each, name, 0.0) for each in cores for name in not_busy)
        busy = sum(map(sum, cores)) - idle
        return _Moment(time.perf_counter(), busy, self._family())

    def _family(self) -> dict[int, float]:
        """CPU seconds of this process, and of those that its launcher has started with it."""
        process = psutil.Process()
        family = {process.pid: process}
        parent = process.parent() if self.processes > 1 else None
        if parent is not None:
            family |= {each.pid: each for each in parent.children(recursive=True)}
        used = {}
        for pid, each in family.items():
            try:
                times = each.cpu_times()
            except psutil.Error:  # it has just ended
                continue
            used[pid] = times.user + times.system
        return used


_watches: list[CoreWatch] = []


def watch_cores() -> CoreWatch:
    """The watch that the first call in this process has begun.

    The command line of a recipe begins it, so that it covers the seconds of the imports.
    """
    if not _watches:
        _watches.append(CoreWatch())
    return _watches[0]


def fit_threads(watch: CoreWatch | None = None, *, kept: int | None = None) -> int:
    """Give torch no more threads than there are free cores for this process; returns how many.

    Where ``OMP_NUM_THREADS`` is set, by the user or a launcher, it holds. A warning says where
    there are more threads, those of other programs counted, than cores.

    Args:
        watch: What has watched the machine. Default: that of :func:`watch_cores`.
        kept: Threads of the run that is resumed, which are taken again as far as the machine has
            the cores: with another number sums are rounded in another order.
    """
    import torch  # not before the command line is read

    watch = watch_cores() if watch is None else watch
    processes, usable, others = watch.processes, usable_cores(), watch.others()
    threads = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        share = (usable if kept else min(usable, watch.free())) // processes
        threads = min(kept or threads, max(1, share))
        torch.set_num_threads(threads)
    crowded = threads * processes > usable
    crowded |= threads * processes + others > len(_allowed()) + _BUSY
    if crowded and is_first_process():
        logger.warning(_worded(threads * processes, usable, others))
    return threads


def _worded(threads: int, cores: int, others: float) -> str:
    ours = "1 thread of this run has" if threads == 1 else f"{threads} threads of this run share"
    there = "1 core" if cores == 1 else f"{cores} cores"
    theirs = f", and other programs use {others:.1f}" if others > _BUSY else ""
    return f"{ours} {there}{theirs}: steps may take several times as long."
