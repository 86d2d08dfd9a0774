"""The kernels of LDAM against the definition, on a GPU or in Triton's interpreter."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

triton = pytest.importorskip("triton")

from ldam_plugins.kernels import _margin_cross_entropy_triton as kernels  # noqa: E402
from ldam_plugins.losses import ldam_loss  # noqa: E402
from ldam_plugins.losses.reduction import REDUCTIONS  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
IGNORED, SCALE = -100, 30.3
BOUNDS = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 2e-6}


def in_interpreter():
    return os.environ.get("TRITON_INTERPRET") == "1"


runs_kernels = pytest.mark.skipif(
    not (ON_GPU or in_interpreter()), reason="run by the test in the interpreter"
)


@pytest.mark.skipif(ON_GPU or in_interpreter(), reason="the other tests run the kernels here")
def test_in_the_interpreter():
    """Without a GPU the kernels run line by line; Triton must know before it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", __file__, "-W", "ignore"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def problem(rows, classes, dtype, weighted):
    torch.manual_seed(rows * 1000 + classes)
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    logits = (5 * torch.randn(rows, classes, device=DEVICE)).to(dtype).requires_grad_()
    target = torch.randint(classes, (rows,), device=DEVICE)
    target[1] = IGNORED
    margins = torch.rand(classes, dtype=wide, device=DEVICE)
    weight = torch.rand(classes, dtype=wide, device=DEVICE) if weighted else None
    return logits, target, margins, weight


def defined(logits, target, margins, weight):
    """Losses and weights of the rows in float64, as the formula has it."""
    index = target.clamp_min(0)
    one_hot = F.one_hot(index, logits.shape[1])
    shifted = logits.double() - SCALE * margins.double() * one_hot
    row_weight = (target != IGNORED).double()
    if weight is not None:
        row_weight = row_weight * weight.double()[index]
    rows = F.cross_entropy(shifted, index, reduction="none") * row_weight
    return rows, row_weight


@runs_kernels
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("classes", [1, 2, 10, 1000, 4097, 9000])
def test_rows_and_gradients_are_those_of_the_definition(classes, dtype, weighted):
    given = problem(5, classes, dtype, weighted)
    logits, target, margins, weight = given
    rows, row_weight = kernels.rows_and_weights(logits, target, margins, SCALE, weight, IGNORED)
    expected, expected_weight = defined(*given)
    size = 1 + logits.detach().abs().max().item() + SCALE
    assert (rows.double() - expected).abs().max().item() <= BOUNDS[dtype] * size
    assert torch.equal(row_weight.double(), expected_weight)
    factors = torch.randn(5, dtype=rows.dtype, device=DEVICE)
    (gradient,) = torch.autograd.grad(rows, logits, factors)
    (exact,) = torch.autograd.grad(expected, logits, factors.double())
    rounding = 2**-7 if dtype == torch.bfloat16 else BOUNDS[dtype] * size
    assert gradient.dtype == dtype
    assert (gradient.double() - exact.double()).abs().max().item() <= rounding * factors.abs().max()


@runs_kernels
def test_derivatives_of_second_order_and_forward_mode():
    logits, target, margins, weight = problem(4, 5, torch.float64, True)

    def rows(values):
        return kernels.rows_and_weights(values, target, margins, 3.0, weight, IGNORED)[0]

    assert torch.autograd.gradcheck(rows, logits, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(rows, logits)


@runs_kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_only_rows_that_count_are_spoilt_by_bad_logits(bad):
    logits, target, margins, _ = problem(4, 6, torch.float32, False)
    with torch.no_grad():
        logits[1, 2] = bad
    rows, _ = kernels.rows_and_weights(logits, target, margins, SCALE, None, IGNORED)
    (gradient,) = torch.autograd.grad(rows.sum(), logits)
    assert rows[1] == 0
    assert not gradient[1].any()
    assert rows.isfinite().all()
    assert gradient.isfinite().all()
    target = target.clamp_min(0)
    rows, _ = kernels.rows_and_weights(logits, target, margins, SCALE, None, IGNORED)
    assert rows[1].isfinite() == (bad == float("-inf") and target[1] != 2)


@runs_kernels
def test_large_logits_lose_no_digits():
    logits = torch.tensor([[1e6, 1e6, 1e6 - 1]], device=DEVICE)
    target, margins = torch.tensor([0], device=DEVICE), torch.zeros(3, device=DEVICE)
    rows, _ = kernels.rows_and_weights(logits, target, margins, SCALE, None, IGNORED)
    expected = F.cross_entropy(logits.double(), target)
    assert abs(rows.item() - expected.item()) < 1e-6


@runs_kernels
def test_no_rows():
    logits = torch.empty(0, 3, device=DEVICE, requires_grad=True)
    target = torch.empty(0, dtype=torch.int64, device=DEVICE)
    margins = torch.ones(3, device=DEVICE)
    rows, _ = kernels.rows_and_weights(logits, target, margins, SCALE, None, IGNORED)
    (gradient,) = torch.autograd.grad(rows.sum(), logits)
    assert rows.shape == (0,)
    assert gradient.shape == (0, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
def test_ldam_loss_uses_it_on_a_gpu(reduction, weighted, monkeypatch):
    logits, target, margins, weight = problem(64, 1000, torch.float32, weighted)
    options = {"scale": SCALE, "weight": weight, "reduction": reduction}
    found = ldam_loss(logits, target, margins, **options)
    on_cpu = {**options, "weight": None if weight is None else weight.cpu()}
    expected = ldam_loss(logits.cpu(), target.cpu(), margins.cpu(), **on_cpu)
    torch.testing.assert_close(found.cpu(), expected)
    monkeypatch.setattr(kernels, "margin_cross_entropy", None)
    with pytest.raises(TypeError):
        ldam_loss(logits, target, margins, **options)


@pytest.mark.gpu
def test_the_mean_of_nothing_is_0_on_a_gpu():
    logits, target, margins, _ = problem(4, 6, torch.float32, False)
    loss = ldam_loss(logits, torch.full_like(target, IGNORED), margins)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss == 0
    assert not gradient.any()
