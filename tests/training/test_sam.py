"""Sharpness-aware steps are those of the paper's formula, and leave nothing else behind."""

import copy
import random
from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from ldam_plugins import ClassCounts, Progress, create_loss, use_cosine_head
from ldam_plugins.training import SharpnessAware, TrainStep
from ldam_plugins.training.environment import note_random_state
from ldam_plugins.training.sam import check_gathers_norm, moved_uphill

COUNTS = ClassCounts([400, 60, 9, 2])
RHO = 0.3


class Draws(nn.Module):
    """Noise of every generator there is; notes what it drew."""

    def __init__(self):
        super().__init__()
        self.noted = []

    def forward(self, x):
        noise = [torch.rand(()), torch.tensor(np.random.rand()), torch.tensor(random.random())]
        self.noted.append([value.item() for value in noise])
        return x * (1 + sum(noise)).to(x)


def make_model():
    """A model whose layers draw and keep statistics, and whose first layer is frozen."""
    torch.manual_seed(1)
    layers = [nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), Draws(), nn.Tanh()]
    model = use_cosine_head(nn.Sequential(*layers, nn.Linear(8, 4)), scale=5.0).double()
    model[0].requires_grad_(False)
    return model.train()


def batch(rows=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(rows, 6, generator=generator, dtype=torch.float64)
    return images, torch.randint(4, (rows,), generator=generator)


def make_step(model, lr=0.1, **options):
    criterion = create_loss("ldam", COUNTS, scale=5.0).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return TrainStep(Accelerator(cpu=True), model, criterion, optimizer, **options)


def seeded():
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)


def by_the_formula(model, rho):
    """The gradient at ``w + rho g / |g|`` by autograd alone, under the same random numbers."""
    criterion = create_loss("ldam", COUNTS, scale=5.0).double()
    images, target = batch()

    def gradients(net):
        seeded()
        trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(criterion(net(images), target), list(trained.values()))
        return dict(zip(trained, found, strict=True))

    first = gradients(copy.deepcopy(model))
    length = torch.cat([g.flatten() for g in first.values()]).norm()
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in moved.named_parameters():
            if name in first:
                parameter += rho * first[name] / length
    return gradients(moved)


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_a_step_is_that_of_the_gradient_uphill(clip):
    model = make_model()
    expected, before = by_the_formula(model, RHO), copy.deepcopy(model.state_dict())
    plain = by_the_formula(model, 0.0)
    step = make_step(model, lr=1.0, clip_grad=clip)
    seeded()
    step([batch()], rho=RHO)
    length = torch.cat([g.flatten() for g in expected.values()]).norm()
    factor = 1.0 if clip is None else clip / (length + 1e-6)
    assert not torch.allclose(expected["1.weight"], plain["1.weight"], rtol=1e-3)
    for name, parameter in model.named_parameters():
        taken = before[name] - parameter
        torch.testing.assert_close(taken, factor * expected.get(name, torch.zeros_like(taken)))


def test_both_passes_draw_the_same_and_statistics_are_of_the_first_one():
    model, plain = make_model(), make_model()
    for each, rho in ((model, RHO), (plain, 0.0)):
        seeded()
        make_step(each, lr=0.0)([batch()], rho=rho)
        each.after = [torch.rand(()).item(), np.random.rand(), random.random()]
    (first, second), (once,) = model[3].noted, plain[3].noted
    assert first == second == once
    assert model.after == plain.after
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert model[1].num_batches_tracked == 1
    assert model[5].cosine_moments.any()


def test_the_loss_is_that_at_the_weights_as_they_were():
    losses = []
    for rho in (0.0, RHO):
        seeded()
        losses.append(make_step(make_model())([batch()], rho=rho))
    assert losses[0] == losses[1]


@pytest.mark.parametrize(("scale", "size"), [(None, 1), (512.0, 1), (2.0**120, 1e6)])
def test_losses_may_be_scaled_and_an_overflow_skips_the_step(scale, size):
    """As Accelerate's fp16 does on a GPU: the norm of the move is that of scaled gradients."""
    ends = []
    for factor in (None, scale):
        accelerator, model = Accelerator(cpu=True), nn.Linear(6, 4, bias=False)
        nn.init.ones_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if factor is not None:
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=factor)
            optimizer = AcceleratedOptimizer(optimizer, scaler=accelerator.scaler)
        step = TrainStep(accelerator, model, create_loss("ce", COUNTS), optimizer)
        images, target = batch()
        step([(size * images.float(), target)], rho=RHO)
        ends.append(model.weight.detach().clone())
    if size > 1:
        assert torch.equal(ends[1], torch.ones(4, 6))
        assert optimizer.step_was_skipped
    else:
        torch.testing.assert_close(ends[1], ends[0])
        assert not torch.equal(ends[0], torch.ones(4, 6))


def test_weights_come_back_to_the_bit_even_after_an_error():
    model = nn.Linear(6, 4)
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(3, 6)).square().sum().backward()
    with suppress(KeyboardInterrupt), moved_uphill(model, 1e3):
        assert (model.weight - before["weight"]).norm() > 100
        assert model.weight.grad is None
        raise KeyboardInterrupt
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("gradient", [0.0, 1e-44])
def test_no_gradient_and_a_tiny_one_move_no_further_than_rho(gradient):
    model = nn.Linear(6, 4, bias=False)
    before = model.weight.detach().clone()
    model.weight.grad = torch.full_like(before, gradient)
    with moved_uphill(model, RHO):
        assert model.weight.isfinite().all()
        assert (model.weight - before).norm() <= RHO * 1.001


def test_an_overflow_is_not_hidden():
    """So the scaler of float16 sees it in the second pass, and skips the step."""
    for value in (float("inf"), float("nan")):
        model = nn.Linear(6, 4)
        model.weight.grad = torch.zeros(4, 6).fill_diagonal_(value)
        with moved_uphill(model, RHO):
            model(torch.ones(2, 6)).sum().backward()
            loss = model(torch.ones(2, 6)).square().mean()
        assert not loss.isfinite()


@pytest.mark.parametrize(
    ("start", "every", "on"),
    [(0, 1, range(12)), (0.5, 1, range(6, 12)), (2, 3, (8, 11)), (1.0, 1, ()), (0.3, 5, (4, 9))],
)
def test_when_steps_are_sharpness_aware(start, every, on):
    sam = SharpnessAware(RHO, start=start, every=every)
    rhos = [sam.rho_at(Progress(step, 12, 4)) for step in range(12)]
    assert rhos == [RHO if step in on else 0.0 for step in range(12)]


def test_without_rho_no_step_is():
    assert SharpnessAware(0.0, start=99).rho_at(Progress(0, 12, 4)) == 0.0


def test_what_is_drawn_again():
    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()

    seeded()
    plain = draw(), draw()
    seeded()
    rewind = note_random_state("cpu")
    first = draw()
    rewind()
    assert (first, draw(), draw()) == (plain[0], *plain)


class Closure(torch.optim.LBFGS):
    """Calls the model itself."""


class SecondOrder(torch.optim.SGD):
    """As timm marks them."""

    is_second_order = True


REFUSED = {
    "rho": (lambda: SharpnessAware(-1.0), "`rho` must be a finite number >= 0, got -1.0"),
    "every": (lambda: SharpnessAware(0.1, every=0), "`every` must be an integer >= 1, got 0"),
    "start": (lambda: SharpnessAware(0.1, start=1.5), r"`start` must be in \[0, 1\], got 1.5"),
    "late": (
        lambda: SharpnessAware(0.1, start=3).rho_at(Progress(0, 12, 4)),
        "`start` must be before the end of the training at epoch 3, got 3. Use a smaller start",
    ),
    "closure": (
        lambda: step_of(Closure),
        "`optimizer` must be one that steps by the gradient it is left, got 'Closure'. Closure "
        "calls the model itself: use another, such as SGD or AdamW",
    ),
    "flat shards": (
        lambda: check_gathers_norm(SimpleNamespace(distributed_type="FSDP", is_fsdp2=False)),
        "`fsdp_version` must be 2 for sharpness-aware steps, got 1. Write `fsdp_version: 2`",
    ),
    "second order": (lambda: step_of(SecondOrder), "SecondOrder takes second derivatives: use"),
}


def step_of(kind):
    accelerator, model = Accelerator(cpu=True), nn.Linear(6, 4)
    _, optimizer = accelerator.prepare(model, kind(model.parameters(), lr=0.1))
    return TrainStep(accelerator, model, create_loss("ce", COUNTS), optimizer)


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()
