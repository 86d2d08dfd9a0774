"""Losses, gradients and weights against 40-digit arithmetic, on logits of up to +-8192.

Stated bounds: loss of a row within ``3e-6 * (1 + size)`` in float32 and ``1e-13 * (1 + size)`` in
float64, where ``size`` is the largest number that enters it (logit or margin times scale);
gradients of the losses but the hinges within 1e-11 in float64.
"""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ldam_plugins import ClassCounts, create_loss, list_losses

mpmath = pytest.importorskip("mpmath")  # comes with torch (sympy)
mpmath.mp.dps = 40
RELATIVE = {torch.float64: 1e-13, torch.float32: 3e-6}
SCALE = 30.0
few = settings(max_examples=25, deadline=None, derandomize=True)
many = settings(
    max_examples=5000, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)


@st.composite
def problems(draw):
    """Counts, logits and targets of a small batch; the logits have 11 bits, exact in float16."""
    c = draw(st.integers(1, 6))
    counts = draw(st.lists(st.integers(1, 10**9), min_size=c, max_size=c))
    size = draw(st.sampled_from([2.0**-10, 1.0, 32.0, 2.0**14]))
    rows = draw(st.integers(0, 4))
    element = st.integers(-1024, 1024).map(lambda n: n * size / 1024)
    logits = draw(st.lists(element, min_size=rows * c, max_size=rows * c))
    target = draw(st.lists(st.integers(-1, c - 1), min_size=rows, max_size=rows))
    margin = draw(st.sampled_from([0.0, 0.5, 3.0, 100.0]))
    beta = draw(st.sampled_from([0.0, 0.9999, 1 - 1e-12]))
    logits = torch.tensor(logits, dtype=torch.float64).view(rows, c)
    return counts, logits, torch.tensor(target, dtype=torch.int64), margin, beta


def make(name, counts, margin, beta):
    options = (
        {"max_margin": margin} if "margin" in name or "ldam" in name or name == "hinge" else {}
    )
    loss = create_loss(name, counts, ignore_index=-1, **options)
    return loss, ClassCounts(counts).weights(beta, dtype=torch.float64)


def exact_row(name, counts, z, y, margin):
    """Loss of one row from its definition, and the largest number in it."""
    mp = mpmath.mpf
    z = [mp(v) for v in z]
    n, total, smallest, most = [mp(v) for v in counts], mp(sum(counts)), min(counts), max(counts)
    m = mp(margin)
    if name in ("ldam", "ldam_hinge"):
        m = m * mpmath.power(n[y] / smallest, mp(-1) / 4)
    if name in ("hinge", "ldam_hinge"):
        rivals = [v for j, v in enumerate(z) if j != y]
        value = max(mp(0), max(rivals) - z[y] + 30 * m) if rivals else mp(0)
    else:
        if name in ("ldam", "uniform_margin"):
            z[y] = z[y] - 30 * m
        if name in ("logit_adjusted", "vector_scaling"):
            log_prior = [mpmath.log(v / total) for v in n]
            factor = [mp(1)] * len(n)
            if name == "vector_scaling":
                factor = [mpmath.power(v / most, mp("0.15")) for v in n]
            z = [f * v + b for f, v, b in zip(factor, z, log_prior, strict=True)]
        top = max(z)
        value = mpmath.log(sum(mpmath.exp(v - top) for v in z)) + top - z[y]
        if name == "focal":
            value = (1 - mpmath.exp(-value)) ** 2 * value
    return value, max([abs(v) for v in z] + [30 * m])


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
