"""Cells as jobs of submitit, whose local executor runs them here as Slurm would elsewhere."""

import os
import signal
import sys

import pytest
from small_cells import began, calls, cells_in, gone

from ldam_plugins.benchmark.slurm import run_on_slurm, slurm_parameters
from ldam_plugins.training.preemption import PREEMPTED


@pytest.fixture
def cell(tmp_path):
    return cells_in(tmp_path)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run cells through submitit on this machine, without its wait for slow file systems.

    It cancels by SIGINT, which processes started in the background of a script would ignore.
    """
    job = pytest.importorskip("submitit").Job
    monkeypatch.setattr(job, "_results_timeout_s", 0)

    def run(*runs):
        return run_on_slurm(runs, 2, tmp_path / "slurm", {"timeout_min": 5}, cluster="local")

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield run
    signal.signal(signal.SIGINT, before)


def statuses(outcomes):
    return {outcome.name: outcome.status for outcome in outcomes}


def test_jobs_finish_fail_are_skipped_and_resumed_when_preempted(cell, run):
    good, bad = cell("finish", "good"), cell("fail", "bad")
    lost = cell(f"signal:{int(signal.SIGKILL)}:0", "lost")
    preempted = cell(f"signal:{int(signal.SIGUSR2)}:0", "preempted")
    found = {outcome.name: outcome for outcome in run(good, bad, lost, preempted)}
    assert statuses(found.values()) == {
        "good": "finished",
        "bad": "failed",
        "lost": "failed",
        "preempted": "finished",
    }
    assert found["bad"].message.splitlines()[-1] == "ValueError: `x` must be y"
    assert "has not produced any output" in found["lost"].message
    assert (preempted.folder / "calls.txt").read_text() == "auto\nauto\n"
    # Another time what is finished, or cannot be run, is not submitted.
    other = cell("finish", "good", epochs=3)
    jobs = {path.stem for path in (good.folder.parents[1] / "slurm").glob("*.pkl")}
    again = statuses(run(preempted, other))
    assert again == {"preempted": "skipped", "good": "failed"}
    assert {path.stem for path in (good.folder.parents[1] / "slurm").glob("*.pkl")} == jobs
    assert (calls(good), calls(preempted)) == (1, 2)


# What is cancelled is left by submitit to end on its own.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_sigterm_to_the_grid_cancels_its_jobs(cell, run):
    slow = cell(f"signal:{int(signal.SIGTERM)}:{os.getpid()}", "slow")
    with pytest.raises(SystemExit, match=str(PREEMPTED)):
        list(run(slow))
    assert gone(began(slow)["pid"])


def test_parameters_are_those_of_submitit(cell, tmp_path):
    words = ["timeout_min=60", "mem_gb=1.5", "partition=gpu", "slurm_qos=low", "exclusive=yes"]
    assert slurm_parameters([*words, "setup=module load a,module load b"]) == {
        "timeout_min": 60,
        "mem_gb": 1.5,
        "slurm_partition": "gpu",
        "slurm_qos": "low",
        "slurm_exclusive": True,
        "slurm_setup": ["module load a", "module load b"],
    }
    with pytest.raises(ValueError, match="`slurm` must be made of name=value, got 'timeout_min'"):
        slurm_parameters(["timeout_min"])
    with pytest.raises(ValueError, match="without several processes a cell, got 'nodes=2'"):
        slurm_parameters(["nodes=2"])
    pytest.importorskip("submitit")
    outcomes = run_on_slurm([cell()], 1, tmp_path, {"slurm_queue": "gpu"}, cluster="local")
    with pytest.raises(ValueError, match=r"got \{.*'slurm_queue': 'gpu'\}(.|\n)*Valid arguments: "):
        next(outcomes)


def test_missing_submitit_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "ldam-plugins\[slurm\]"'):
        next(run_on_slurm([], 1, tmp_path, {}))
