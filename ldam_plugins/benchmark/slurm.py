"""The cells of a grid as jobs of a Slurm cluster, through submitit."""

from __future__ import annotations

import os
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import yaml

from ldam_plugins._validation import invalid
from ldam_plugins.benchmark.local import CellTask, Outcome, ended_before, run_cell
from ldam_plugins.training.preemption import PREEMPTED, defer_sigterm

_POLL_SECONDS = 1.0
_TIMEOUT_MINUTES = 60
"""As Hydra's launcher has it; submitit's own default, 5 minutes, is short for a training."""

_SHARED = ("name", "timeout_min", "mem_gb", "cpus_per_task", "gpus_per_node", "stderr_to_stdout")
_ONE_PROCESS = ("nodes", "tasks_per_node")
_LISTS = ("setup", "teardown", "srun_args")

Parameters = Mapping[str, Any]


def slurm_parameters(entries: Iterable[str]) -> dict[str, Any]:
    """Parameters of submitit from words such as ``timeout_min=60`` or ``partition=gpu``.

    Those that only Slurm has may be written with or without submitit's prefix ``slurm_``. Values
    are read as YAML scalars; commas go between those of ``setup``, ``teardown`` and ``srun_args``.

    Raises:
        ValueError: a word without a value, or one that asks for several processes a cell.

    Example:
        >>> slurm_parameters(["timeout_min=60", "partition=gpu", "slurm_setup=module load cuda"])
        {'timeout_min': 60, 'slurm_partition': 'gpu', 'slurm_setup': ['module load cuda']}
    """
    parameters = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals or not value:
            raise invalid("slurm", "made of name=value", entry)
        name = name.removeprefix("slurm_")
        if name in _ONE_PROCESS:
            hint = "Leave it out: a cell is one process."
            raise invalid("slurm", "without several processes a cell", entry, hint=hint)
        key = name if name in _SHARED else f"slurm_{name}"
        parameters[key] = value.split(",") if name in _LISTS else yaml.safe_load(value)
    return parameters


def run_on_slurm(
    tasks: Sequence[CellTask],
    jobs: int,
    folder: str | os.PathLike[str],
    parameters: Parameters,
    *,
    cluster: str = "slurm",
) -> Generator[Outcome, None, None]:
    """Run cells as one Slurm job array, at most ``jobs`` of it at once; yields each as it ends.

    Finished cells are not submitted. A job that Slurm preempts, or that meets its time limit, is
    queued again (submitit's ``max_num_timeout`` times) and resumes its run. When this generator is
    closed, or the process is interrupted or terminated, the jobs that have not ended are cancelled.

    Args:
        tasks: What to run. Their folders must be seen by all nodes.
        jobs: Array tasks at once.
        folder: Where submitit keeps its files.
        parameters: Of ``submitit.AutoExecutor.update_parameters``, see :func:`slurm_parameters`;
            ``timeout_min`` is 60 unless given.
        cluster: ``"local"`` tries the same with submitit's processes on this machine, which are
            not limited to ``jobs``.

    Raises:
        ModuleNotFoundError: submitit is not installed.
        RuntimeError: there is no Slurm here.
        SystemExit: with the code ``PREEMPTED``, at SIGTERM.
        ValueError: a parameter that submitit does not take.
    """
    executor = _executor(folder, cluster, {"slurm_array_parallelism": jobs, **parameters})
    waiting = []
    for task in tasks:
        ended = ended_before(task)
        if ended is None:
            waiting.append(task)
        else:
            yield ended
    if waiting:
        yield from _outcomes(waiting, executor.map_array(CellJob(), waiting))


class CellJob:
    """:func:`.run_cell` as a job that may be interrupted: submitit's protocol of checkpoints."""

    def __call__(self, task: CellTask) -> Outcome:
        """Run the cell; where it was begun, it is resumed."""
        return run_cell(task)

    def checkpoint(self, task: CellTask) -> Any:
        """What is queued in the place of a job that is interrupted: the same once more."""
        return _import_submitit().helpers.DelayedSubmission(self, task)


def _outcomes(tasks: Sequence[CellTask], jobs: Sequence[Any]) -> Iterator[Outcome]:
    waiting = {task.name: job for task, job in zip(tasks, jobs, strict=True)}
    with defer_sigterm() as told, _cancelled_at_the_end(waiting):
        while waiting:
            if told.is_set():
                raise SystemExit(PREEMPTED)
            for name in [name for name, job in waiting.items() if job.done()]:
                yield _outcome(name, waiting.pop(name))
            time.sleep(_POLL_SECONDS if waiting else 0)


def _outcome(name: str, job: Any) -> Outcome:
    error = job.exception()
    return job.result() if error is None else Outcome(name, "failed", str(error))


@contextmanager
def _cancelled_at_the_end(waiting: Mapping[str, Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for job in waiting.values():
            job.cancel()


def _executor(folder: str | os.PathLike[str], cluster: str, parameters: Parameters) -> Any:
    executor = _import_submitit().AutoExecutor(folder=str(folder), cluster=cluster)
    try:
        executor.update_parameters(timeout_min=_TIMEOUT_MINUTES)
        executor.update_parameters(**parameters)
    except (AssertionError, NameError, TypeError, ValueError) as error:
        expected = "parameters that submitit takes"
        raise invalid("slurm", expected, dict(parameters), hint=f"\n{error}") from error
    return executor


def _import_submitit() -> Any:
    try:
        import submitit
    except ModuleNotFoundError as error:
        hint = 'Run `pip install "ldam-plugins[slurm]"`, or leave --launcher at local.'
        expected = "one whose package is installed"
        raise invalid(
            "launcher", expected, "slurm", hint=hint, error=ModuleNotFoundError
        ) from error
    return submitit
