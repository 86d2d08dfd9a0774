"""The matrix of splits, the numerics and a killed run on CUDA: ``pytest -m gpu``."""

import signal

import pytest
import split_run
import torch
from accelerate import Accelerator
from exact_losses import RELATIVE, exact_row, few, make, problems
from hf_split_run import BOUNDS
from hypothesis import given
from kill_run import TEXT, VISION, finish, kill_after, killed_at, result

from ldam_plugins import list_losses

pytestmark = pytest.mark.gpu
ON_GPU = {"ACCELERATE_USE_CPU": "false"}


@pytest.fixture
def accelerator():
    return Accelerator()


@pytest.mark.parametrize("case", list(split_run.cases()), ids=str)
def test_update_does_not_depend_on_the_cut(accelerator, case):
    for dtype in split_run.precisions(case):
        reference = split_run.train(accelerator, *case, 1, dtype)
        for micro in (2, 4):
            found = split_run.train(accelerator, *case, micro, dtype)
            assert ((found - reference).norm() / reference.norm()).item() <= BOUNDS[dtype]


@pytest.mark.parametrize("case", list(split_run.epochs(whole=True)), ids=str)
def test_a_short_last_batch_counts_once(accelerator, case):
    reference = split_run.train_epoch(accelerator, *case, 1)
    for micro in (2, 4):
        found = split_run.train_epoch(accelerator, *case, micro)
        assert ((found - reference).norm() / reference.norm()).item() <= BOUNDS[torch.float64]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", list_losses())
@few
@given(problem=problems())
def test_loss_is_that_of_exact_arithmetic(name, dtype, problem):
    counts, logits, target, margin, beta = problem
    loss, weight = make(name, counts, margin, beta)
    loss = loss.to("cuda", dtype)
    loss.weight.copy_(weight)
    loss.reduction = "none"
    rows = loss(logits.to("cuda", dtype), target.to("cuda"))
    for row, z, y in zip(rows.tolist(), logits.tolist(), target.tolist(), strict=True):
        exact, size = exact_row(name, counts, z, y, margin) if y >= 0 else (0, 0)
        w = weight[y].item() if y >= 0 else 0
        assert abs(row - w * exact) <= RELATIVE[dtype] * (1 + size) * w


@pytest.mark.parametrize("recipe", ["vision", "text"])
def test_a_killed_run_goes_on_where_it_was(recipe, tmp_path):
    """Kernels of CUDA may add up in another order, so the results are close, not the same bits."""
    flags = [*(VISION if recipe == "vision" else [*TEXT, "--dataset", "stdlib_docstrings"])]
    finish(recipe, [*flags, "--output_dir", tmp_path / "whole"], environment=ON_GPU)
    flags += ["--output_dir", tmp_path / "broken"]
    killed_at(recipe, "step:5", flags, tmp_path, signal.SIGTERM, device=ON_GPU)
    kill_after(recipe, flags, 20, environment=ON_GPU)
    finish(recipe, flags, environment=ON_GPU)
    (_, measured), (_, expected) = result(tmp_path / "broken"), result(tmp_path / "whole")
    assert measured["balanced_accuracy"] == pytest.approx(expected["balanced_accuracy"], abs=0.05)
