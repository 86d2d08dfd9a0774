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
from ldam_plugins.data.augment_policies import POLICIES, create_policy
from ldam_plugins.data.erasing import Cutout, RandomErasing

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


@pytest.mark.parametrize("name", list(POLICIES))
def test_policies_give_the_same_pixels_as_on_a_cpu(name):
    images = torch.randint(256, (512, 3, 32, 32), dtype=torch.uint8)
    draws = create_policy(name).draw(512, torch.Generator().manual_seed(0))
    assert torch.equal(draws.apply(images.cuda()).cpu(), draws.apply(images))


@pytest.mark.parametrize("eraser", [Cutout(16), RandomErasing()], ids=["cutout", "erasing"])
def test_the_same_boxes_are_erased_as_on_a_cpu(eraser):
    images = torch.randn(512, 3, 32, 32)
    draws = eraser.draw(512, (32, 32), torch.Generator().manual_seed(0))
    assert torch.equal(draws.apply(images.cuda()).cpu(), draws.apply(images))


def test_augmentation_does_not_wait_for_the_gpu():
    images = torch.randint(256, (128, 3, 32, 32), dtype=torch.uint8).cuda()
    policies = [create_policy(name) for name in POLICIES]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for policy in policies:
            changed = policy(images, torch.Generator().manual_seed(0))
            RandomErasing()(changed.float(), torch.Generator().manual_seed(0))
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
