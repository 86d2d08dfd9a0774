"""Losses, gradients and weights against 40-digit arithmetic, on logits of up to +-8192.

Stated bounds: loss of a row within ``3e-6 * (1 + size)`` in float32 and ``1e-13 * (1 + size)`` in
float64, where ``size`` is the largest number that enters it (logit or margin times scale);
gradients of the losses but the hinges within 1e-11 in float64.
"""

import math
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from exact_losses import RELATIVE, exact_row, few, make, problems
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldam_plugins import ClassCounts, create_loss, list_losses

many = settings(
    max_examples=5000, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)


def check_values(name, problem, dtype):
    counts, logits, target, margin, beta = problem
    loss, weight = make(name, counts, margin, beta)
    loss = loss.double() if dtype == torch.float64 else loss
    loss.weight.copy_(weight)
    logits = logits.to(dtype).requires_grad_()
    loss.reduction = "none"
    rows = loss(logits, target)
    assert torch.isfinite(rows).all()
    for row, z, y in zip(rows.tolist(), logits.tolist(), target.tolist(), strict=True):
        if y < 0:
            assert row == 0
            continue
        exact, size = exact_row(name, counts, z, y, margin)
        w = mpmath.mpf(weight[y].item())
        assert abs(row - w * exact) <= RELATIVE[dtype] * (1 + size) * w
    loss.reduction = "mean"
    (gradient,) = torch.autograd.grad(loss(logits, target), logits)
    assert torch.isfinite(gradient).all()
    assert gradient[target < 0].abs().sum() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", list_losses())
@few
@given(problem=problems())
def test_loss_is_that_of_exact_arithmetic(name, dtype, problem):
    check_values(name, problem, dtype)


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", list_losses())
@many
@given(problem=problems())
def test_loss_is_that_of_exact_arithmetic_in_5000_cases(name, dtype, problem):
    check_values(name, problem, dtype)


SMOOTH = [name for name in list_losses() if "hinge" not in name]


def check_gradient(name, problem):
    """Against central differences of the exact loss, whose own error in 40 digits is < 1e-18."""
    counts, logits, target, margin, beta = problem
    loss, weight = make(name, counts, margin, beta)
    loss = loss.double()
    loss.weight.copy_(weight)
    loss.reduction = "sum"
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logits, target), logits)
    step = mpmath.mpf(10) ** -10
    for z, y, found in zip(logits.tolist(), target.tolist(), gradient.tolist(), strict=True):
        for c in range(len(z) if y >= 0 else 0):
            up, down = ([mpmath.mpf(v) for v in z] for _ in range(2))
            up[c] += step
            down[c] -= step
            ends = [exact_row(name, counts, side, y, margin)[0] for side in (up, down)]
            exact = weight[y].item() * (ends[0] - ends[1]) / (2 * step)
            assert abs(found[c] - exact) <= 1e-11 * (1 + weight[y].item())


@pytest.mark.parametrize("name", SMOOTH)
@few
@given(problem=problems())
def test_gradient_is_that_of_exact_arithmetic(name, problem):
    check_gradient(name, problem)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", SMOOTH)
@many
@given(problem=problems())
def test_gradient_is_that_of_exact_arithmetic_in_5000_cases(name, problem):
    check_gradient(name, problem)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list_losses())
@few
@given(problem=problems())
def test_16_bit_logits_lose_nothing_more(name, dtype, problem):
    counts, logits, target, margin, beta = problem
    loss, weight = make(name, counts, margin, beta)
    loss.weight.copy_(weight)
    low = logits.to(dtype).requires_grad_()
    got = loss(low, target)
    assert got.item() == loss(low.detach().float(), target).item()
    (gradient,) = torch.autograd.grad(got, low)
    assert torch.isfinite(gradient).all()


@few
@given(
    counts=st.lists(st.integers(1, 10**9), min_size=1, max_size=30),
    beta=st.floats(0, 1, exclude_max=True),
)
def test_weights_are_those_of_exact_arithmetic(counts, beta):
    b = mpmath.mpf(beta)
    raw = [(1 - b) / (1 - mpmath.power(b, n)) for n in counts]
    share = len(counts) / sum(raw)
    found = ClassCounts(counts).weights(beta, dtype=torch.float64).tolist()
    for weight, exact in zip(found, raw, strict=True):
        assert abs(weight - share * exact) <= 1e-12 * share * exact
    assert math.isclose(sum(found), len(counts), rel_tol=1e-12)


@few
@given(counts=st.lists(st.integers(1, 10**9), min_size=1, max_size=30))
def test_margins_and_prior_are_those_of_exact_arithmetic(counts):
    made = ClassCounts(counts)
    for n, margin in zip(counts, made.margins(dtype=torch.float64).tolist(), strict=True):
        exact = mpmath.power(mpmath.mpf(n) / min(counts), mpmath.mpf(-1) / 4) / 2
        assert abs(margin - exact) <= 1e-15
    shares = made.prior(dtype=torch.float64).tolist()
    assert all(
        abs(Fraction(s) - Fraction(n, sum(counts))) < 1e-16
        for s, n in zip(shares, counts, strict=True)
    )


@pytest.mark.parametrize("name", list_losses())
def test_a_hundred_thousand_classes(name):
    counts = np.random.default_rng(0).integers(1, 10**9, 100_000)
    logits = torch.randn(4, 100_000, dtype=torch.float64) * 20
    target = torch.tensor([0, 99_999, 5, -100])
    double = create_loss(name, counts).double()
    single = create_loss(name, counts)
    for loss in (double, single):
        loss.weight.copy_(ClassCounts(counts).weights(dtype=torch.float64))
    exact = double(logits, target).item()
    low = logits.float().requires_grad_()
    got = single(low, target)
    assert got.item() == pytest.approx(exact, rel=1e-5)
    (gradient,) = torch.autograd.grad(got, low)
    assert torch.isfinite(gradient).all()
    assert gradient[3].abs().sum() == 0


class WithLoss(torch.nn.Module):
    """A linear model and its loss as one module, for export."""

    def __init__(self, loss):
        super().__init__()
        self.net, self.loss = torch.nn.Linear(5, 4), loss

    def forward(self, x, target):
        return self.loss(self.net(x), target)


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name", list_losses())
def test_export_vmap_and_autocast_give_the_same_numbers(name, soft):
    torch.manual_seed(0)
    counts = [500, 60, 9, 2]
    loss = create_loss(name, counts)
    loss.weight.copy_(ClassCounts(counts).weights(0.99))
    model, x = WithLoss(loss), torch.randn(8, 5)
    target = torch.softmax(torch.randn(8, 4), 1) if soft else torch.arange(8) % 4
    expected = model(x, target)
    exported = torch.export.export(model, (x, target)).module()
    torch.testing.assert_close(exported(x, target), expected, rtol=1e-6, atol=1e-7)
    logits = model.net(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(loss(logits, target), loss(logits, target).float())
        assert loss(logits, target).item() == expected.item()
    single = lambda z, y: loss(z[None], y[None], 1.0)  # noqa: E731
    got = torch.func.vmap(torch.func.grad(single))(logits, target)
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logits, target, 1.0), logits)
    torch.testing.assert_close(got, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [n for n in list_losses() if "hinge" not in n])
def test_second_derivatives_are_right(name):
    loss = create_loss(name, [500, 60, 9]).double()
    z = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda v: loss(v, torch.tensor([0, 1, 2])), (z,))
