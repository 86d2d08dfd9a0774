"""One update is one update, however its batch is cut."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import split_run
import torch


@pytest.fixture(scope="module")
def alone():
    return split_run.everything([1, 4])


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    path = tmp_path_factory.mktemp("split") / "results.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    command += [
        "--rdzv_backend",
        "c10d",
        "--rdzv_endpoint",
        "localhost:0",
        str(Path(__file__).with_name("split_run.py")),
        str(path),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    results = torch.load(path, weights_only=False)
    assert results["processes"] == 2
    return results


BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.mark.parametrize("case", list(split_run.cases()), ids=str)
def test_update_does_not_depend_on_the_cut(alone, together, case):
    for dtype in split_run.precisions(case):
        reference = alone[(*case, 1, dtype)]
        for results, micro in ((alone, 4), (together, 1), (together, 4)):
            difference = results[(*case, micro, dtype)] - reference
            assert (difference.norm() / reference.norm()).item() <= BOUNDS[dtype]


def test_the_updates_moved_the_parameters(alone):
    assert not torch.equal(
        alone[("ldam", False, False, 1, torch.float64)],
        alone[("ldam", True, False, 1, torch.float64)],
    )


def test_metrics_of_two_processes_equal_those_of_one(alone, together):
    assert together["test"] == alone["test"]
