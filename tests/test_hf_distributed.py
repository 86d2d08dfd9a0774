"""Two real processes (gloo) do what one does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hf_split_run import runs

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return runs(tmp_path_factory.mktemp("alone"), 1)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of both processes."""
    out = tmp_path_factory.mktemp("both") / "found"
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    found = subprocess.run(
        [sys.executable, *launch, str(HERE / "hf_split_run.py"), str(out), "2"],
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    both = [torch.load(f"{out}.{rank}", weights_only=True) for rank in (0, 1)]
    assert all(run["processes"] == 2 for rank in both for run in rank.values())
    return both


@pytest.mark.parametrize("loss", ["ce", "ldam"])
@pytest.mark.parametrize("cut", ["whole", "parts"])
def test_the_update_does_not_depend_on_the_split(loss, cut, alone, ranks):
    one = alone[loss, "whole"]
    for found in (alone[loss, cut], ranks[0][loss, cut], ranks[1][loss, cut]):
        assert len(found["losses"]) == 2  # before and after the switch
        assert found["losses"] == pytest.approx(one["losses"], rel=1e-6)
        difference = (found["parameters"] - one["parameters"]).norm()
        assert difference <= 1e-6 * one["parameters"].norm()


def test_evaluation_is_the_same(alone, ranks):
    for rank in ranks:
        assert rank["ldam", "whole"]["eval_loss"] == pytest.approx(
            alone["ldam", "whole"]["eval_loss"], rel=1e-5
        )


def test_both_processes_share_one_resampled_order(alone, ranks):
    for name in [("drs", "straight"), ("drs", 3), ("drs", 6)]:
        one = alone[name]["seen"]
        both = [rank[name]["seen"] for rank in ranks]
        assert len(both[0]) == len(both[1]) == len(one) // 2
        batches = [part for pair in zip(*map(_eights, both), strict=True) for part in pair]
        assert [label for batch in batches for label in batch] == one


def test_resuming_goes_on_to_the_bit(alone, ranks):
    for found in (alone, *ranks):
        straight = found["drs", "straight"]
        for step in (3, 6):
            resumed = found["drs", step]
            assert torch.equal(resumed["parameters"], straight["parameters"])
            assert resumed["seen"] == straight["seen"][-len(resumed["seen"]) :]


def _eights(labels):
    return [labels[i : i + 8] for i in range(0, len(labels), 8)]
