"""The cells of a grid as processes on this machine, several at once."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from heapq import heapify, heapreplace
from pathlib import Path
from typing import IO, Any, NamedTuple

import psutil
import torch

from ldam_plugins.training.auto_tune import Tuned
from ldam_plugins.training.cores import usable_cores
from ldam_plugins.training.files import write_atomic
from ldam_plugins.training.history import read_metrics
from ldam_plugins.training.preemption import PREEMPTED, defer_sigterm
from ldam_plugins.training.run_dir import COMMAND_FILE, METRICS_FILE, differing_options

LOG_FILE = "log.txt"
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 10.0
_TAIL_BYTES, _TAIL_LINES = 20_000, 12
_OTHER_FOLDER = "Choose another --output_dir for the grid, or remove that folder."


@dataclass(frozen=True)
class CellTask:
    """What is to be run for a cell of a grid: a recipe, in a folder of its own.

    Args:
        name: Name of the cell.
        recipe: The recipe's file.
        arguments: Arguments of the recipe, but for the folder.
        folder: ``--output_dir`` of the run; also gets its log and its command.
        options: What the recipe makes of the arguments.
        defaults: The recipe's own defaults. A run that was made before the recipe had some option
            counts as one with that option's default.
        auto_tune: File of the choice that all runs of the grid share, made by the first of them;
            None: each chooses for itself, or as its options say.
    """

    name: str
    recipe: Path
    arguments: tuple[str, ...] = field(repr=False)
    folder: Path
    options: Mapping[str, Any] = field(repr=False)
    defaults: Mapping[str, Any] = field(repr=False)
    auto_tune: Path | None = field(default=None, repr=False)

    def command(self) -> list[str]:
        """The command line that makes this run, ``python`` standing for this interpreter."""
        here = os.path.relpath(self.recipe)
        recipe = str(self.recipe) if here.startswith("..") else here
        return ["python", recipe, *self.arguments, "--output_dir", str(self.folder)]


class Outcome(NamedTuple):
    """How a cell ended: ``"finished"``, ``"skipped"`` (it was finished before) or ``"failed"``.

    ``exit_code`` is that of a process that failed; None where there was none.
    """

    name: str
    status: str
    message: str = ""
    exit_code: int | None = None


def is_finished(task: CellTask) -> bool:
    """Whether the folder of the task holds its run, finished.

    Raises:
        ValueError: it holds a finished run with other options.
    """
    if not (task.folder / METRICS_FILE).exists():
        return False
    stored = {**task.defaults, **read_metrics(task.folder)["options"]}
    differing = differing_options(stored, json.loads(json.dumps(task.options)))
    if differing:
        expected = f"that of the run in {str(task.folder)!r}"
        raise ValueError(f"`options` must be {expected}; {'; '.join(differing)}. {_OTHER_FOLDER}")
    return True


def share_choice(tasks: Sequence[CellTask]) -> None:
    """Let further runs of a grid be made as its finished ones, where those kept no choice for it.

    They are those of an earlier version. Call it before any run.

    Raises:
        OSError: the file cannot be written.
    """
    for task in tasks:
        if task.auto_tune is None or task.auto_tune.exists():
            continue
        if (task.folder / METRICS_FILE).exists():
            precision = read_metrics(task.folder).get("mixed_precision", "no")
            Tuned(precision, why="as the finished runs of the grid").save(task.auto_tune)


class _Begun(NamedTuple):
    """A task whose process runs, and since when on the monotonic clock."""

    task: CellTask
    process: subprocess.Popen[bytes]
    since: float


def run_locally(
    tasks: Sequence[CellTask],
    jobs: int = 1,
    on_wait: Callable[[float | None], object] = lambda seconds: None,
) -> Generator[Outcome, None, None]:
    """Run cells as processes on this machine, ``jobs`` at once; yields each as it ends.

    Each process gets an equal part of the usable cores (``OMP_NUM_THREADS``, unless it is set;
    what others use of them does not count, so a resumed cell gets the same) and, where
    there are GPUs, one of them in turn. When this generator is closed, or the process is
    interrupted or terminated, the running cells are stopped; they go on from their newest
    checkpoint when the grid is run again.

    Args:
        tasks: What to run; finished cells are skipped, begun ones resumed.
        jobs: Processes at once, at least 1.
        on_wait: Called several times a second with the seconds that are left, None as long as no
            cell has finished; see :func:`seconds_left`.

    Raises:
        SystemExit: with the code ``PREEMPTED``, at SIGTERM.
    """
    waiting, running, took = deque(tasks), dict[int, _Begun](), list[float]()
    free = deque(range(jobs))
    with defer_sigterm() as told, _beginning(running) as begin:
        while waiting or running:
            if told.is_set():
                raise SystemExit(PREEMPTED)
            while waiting and free:
                ended = begin(free[0], waiting.popleft(), _share_of_machine(free[0], jobs))
                if ended is None:
                    free.popleft()
                else:
                    yield ended
            for slot, (task, process, since) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    free.append(slot)
                    outcome = _outcome(task, process.returncode)
                    took += [time.monotonic() - since] if outcome.status == "finished" else []
                    yield outcome
            ages = [time.monotonic() - cell.since for cell in running.values()]
            on_wait(seconds_left(took, ages, len(waiting), jobs))
            time.sleep(_POLL_SECONDS if running else 0)


def seconds_left(
    took: Sequence[float], ages: Sequence[float], waiting: int, jobs: int
) -> float | None:
    """Time until all cells have ended, if each takes as long as those that finished did.

    Args:
        took: Seconds of each cell that finished; without one the answer is None.
        ages: Seconds that each running cell has run for.
        waiting: Cells that have not begun.
        jobs: Cells at once.

    Example:
        >>> seconds_left([60.0], ages=[20.0], waiting=2, jobs=2)  # one waits for the running one
        100.0
    """
    if not took:
        return None
    usual = sum(took) / len(took)
    ends = [max(0.0, usual - age) for age in ages] + [0.0] * (jobs - len(ages))
    heapify(ends)
    for _ in range(waiting):
        heapreplace(ends, ends[0] + usual)
    return max(ends)


def run_cell(task: CellTask) -> Outcome:
    """Run one cell in a process of its own, and wait for it; the process ends with the waiting."""
    running = dict[int, _Begun]()
    with _beginning(running) as begin:
        return begin(0, task, {}) or _outcome(task, running[0].process.wait())


def start_cell(task: CellTask, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start the process of a cell; a run that was begun is resumed.

    The log stays locked while the process lives, so that no second one writes into its folder.
    """
    task.folder.mkdir(parents=True, exist_ok=True)
    with (task.folder / LOG_FILE).open("ab") as log:
        _lock(log)
        _, *arguments = [*task.command(), "--resume", "auto"]
        if task.auto_tune is not None:
            arguments += ["--auto_tune", str(task.auto_tune)]
        write_atomic(task.folder / COMMAND_FILE, f"{shlex.join(task.command())}\n".encode())
        log.write(f"$ python {shlex.join(arguments)}\n".encode())
        log.flush()
        return subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TQDM_MININTERVAL": "10", **environment},
            # Ctrl-C in a terminal goes to the grid alone, which then stops its cells.
            start_new_session=True,
        )


@contextmanager
def _beginning(running: dict[int, _Begun]) -> Iterator[Callable[..., Outcome | None]]:
    """What begins cells, which are stopped at the end: see :func:`_begin`, ``running`` filled in.

    A signal may raise an exception between any two lines of the main thread. Another one begins
    the cells, so that none runs without being among those to stop.
    """
    try:
        with ThreadPoolExecutor(1) as thread:  # whose end waits for what it has begun
            yield lambda *given: thread.submit(_begin, running, *given).result()
    finally:
        _stop([cell.process for cell in running.values()])


def _begin(
    running: dict[int, _Begun], slot: int, task: CellTask, environment: Mapping[str, str]
) -> Outcome | None:
    """Begin a cell, from then on among the running ones; or how it ended without a process."""
    try:
        ended = ended_before(task)
        if ended is None:
            running[slot] = _Begun(task, start_cell(task, environment), time.monotonic())
        return ended
    except BlockingIOError:
        return Outcome(task.name, "failed", f"another process is running it in {task.folder}")
    except OSError as error:
        return Outcome(task.name, "failed", f"{type(error).__name__}: {error}")


def ended_before(task: CellTask) -> Outcome | None:
    """How a cell ends without being run: skipped, or failed for what its folder holds."""
    try:
        return Outcome(task.name, "skipped") if is_finished(task) else None
    except (OSError, ValueError, KeyError) as error:
        return Outcome(task.name, "failed", f"{type(error).__name__}: {error}")


def _outcome(task: CellTask, returncode: int) -> Outcome:
    if returncode == 0 and (task.folder / METRICS_FILE).exists():
        return Outcome(task.name, "finished")
    log = task.folder / LOG_FILE
    message = f"exit code {returncode}, see {log}\n{log_tail(log)}"
    return Outcome(task.name, "failed", message, returncode)


def log_tail(path: Path, lines: int = _TAIL_LINES) -> str:
    """Last lines of a log, of a progress bar only its last state."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        text = file.read().decode(errors="replace")
    shown = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return "\n".join([line for line in shown if line.strip()][-lines:])


def _share_of_machine(slot: int, jobs: int) -> dict[str, str]:
    """Environment of the process in a slot: its cores, and its GPU where there are any."""
    environment = {}
    if "OMP_NUM_THREADS" not in os.environ:
        environment["OMP_NUM_THREADS"] = str(max(1, usable_cores() // jobs))
    gpus = torch.cuda.device_count()
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[slot % gpus]
    return environment


def _stop(started: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask processes to end; those that do not, and what they started, are ended by force."""
    family, alive = [], [process for process in started if process.poll() is None]
    for parent in alive:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(parent.pid)
            family += [process, *process.children(recursive=True)]
        parent.terminate()
    _, left = psutil.wait_procs(family, timeout=_GRACE_SECONDS)
    for process in left:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    for parent in alive:
        parent.wait()


def _lock(log: IO[bytes]) -> None:
    """Lock a log for as long as this process, or one that inherits the file, has it open."""
    # Not by filelock, whose lock ends with this process, while the cell may go on without it.
    if sys.platform != "win32":
        import fcntl

        fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
