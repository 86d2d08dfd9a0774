"""Optimizer steps are the same whether compiled, captured or neither."""

import contextlib

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from ldam_plugins import ClassCounts, create_loss
from ldam_plugins.training import step as step_module
from ldam_plugins.training.step import (
    CapturedPass,
    TrainStep,
    add_gradients,
    check_converges,
    micro_batches,
)

COUNTS = ClassCounts([400, 60, 9, 2])


def batches(rows, count=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(rows, 6, generator=generator), torch.randint(4, (rows,), generator=generator))
        for _ in range(count)
    ]


class Training:
    """A small model on the CPU with all that its steps need."""

    def __init__(self):
        torch.manual_seed(1)
        self.accelerator = Accelerator(cpu=True)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
        self.criterion = create_loss("ldam", COUNTS)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)

    def train_step(self, net=None, **options):
        net = self.model if net is None else net
        return TrainStep(self.accelerator, net, self.criterion, self.optimizer, **options)

    def parameters(self):
        return torch.cat([p.detach().flatten() for p in self.model.parameters()])


def test_a_training_that_has_diverged_is_stopped():
    model = nn.Linear(2, 2)
    check_converges(0.5, model, 0.1, 0)
    check_converges(float("nan"), model, 0.1, 0)  # an overflow of float16, whose step was skipped
    nn.init.constant_(model.bias, float("nan"))
    for loss in ("nan", "inf"):
        told = f"`lr` must be .* finite, got 0.1. It is {loss} in epoch 3. Has training diverged?"
        with pytest.raises(ValueError, match=told):
            check_converges(float(loss), model, 0.1, 2)


@pytest.fixture
def compilations():
    """A compiler that runs what it is given, and the shapes of its inputs."""
    torch.compiler.reset()
    shapes = []

    def backend(graph, inputs):
        shapes.append([tuple(x.shape) for x in inputs if x.ndim == 2 and x.shape[1] == 6][-1])
        return graph.forward

    yield backend, shapes
    torch.compiler.reset()


def test_whole_batches_alone_are_compiled(compilations):
    backend, shapes = compilations
    training, plain = Training(), Training()
    net = torch.compile(training.model, backend=backend, dynamic=False)
    train_step, plainly = training.train_step(net), plain.train_step()
    for step, rows in enumerate([12, 12, 5, 12, 7]):
        parts = batches(rows, seed=step)
        loss = train_step(parts)
        assert loss == plainly(parts)
    assert shapes == [(12, 6)]
    assert torch.equal(training.parameters(), plain.parameters())


def test_whole_batches_are_compiled_whatever_their_targets():
    torch.compiler.reset()
    ran = []

    def backend(graph, inputs):
        return lambda *given: ran.append(1) or graph.forward(*given)

    training = Training()
    train_step = training.train_step(torch.compile(training.model, backend=backend, dynamic=False))
    ((images, target),) = batches(12)
    for aims in (nn.functional.one_hot(target, 4).float(), target):  # as where mixing ends
        train_step([(images, aims)])
    assert len(ran) == 2
    torch.compiler.reset()


def test_micro_batches_are_grouped_by_step():
    assert list(micro_batches(iter("abcde"), 2)) == [["a", "b"], ["c", "d"], ["e"]]
    assert list(micro_batches([], 2)) == []


def test_the_norm_of_the_gradient_is_cut():
    training = Training()
    before = training.parameters()
    training.optimizer = torch.optim.SGD(training.model.parameters(), lr=1.0)
    training.train_step(clip_grad=1e-3)(batches(12))
    assert (training.parameters() - before).norm() == pytest.approx(1e-3, rel=1e-3)


@pytest.fixture
def captures(monkeypatch):
    """Stand-ins for CUDA: what is captured where, and how often it is replayed."""
    log = []

    class Capture:
        def __init__(self, accelerator, net, criterion, parts, pool):
            self.arguments, self.pool = (accelerator, net, criterion), pool or f"pool {len(log)}"
            self.loss = torch.zeros(())
            log.append(("capture", [len(images) for images, _ in parts], pool))

        def __call__(self, parts):
            log.append(("replay", [len(images) for images, _ in parts]))
            return self.loss.copy_(add_gradients(*self.arguments, parts))

    @contextlib.contextmanager
    def stream():
        log.append("warm-up")
        yield

    monkeypatch.setattr(step_module, "CapturedPass", Capture)
    monkeypatch.setattr(step_module, "_side_stream", stream)
    return log


def test_both_passes_of_a_step_are_replayed(captures):
    training, plain = Training(), Training()
    train_step, plainly = training.train_step(replay=True), plain.train_step()
    train_step._replays = True
    for step in range(4):
        parts = batches(12, seed=step)
        assert train_step(parts, rho=0.3) == plainly(parts, rho=0.3)
    replays = [("replay", [12])] * 4
    assert captures == ["warm-up"] * 3 + [("capture", [12], None), replays[0], *replays]
    assert torch.equal(training.parameters(), plain.parameters())


def test_a_pass_is_captured_for_each_shape_after_three_steps(captures):
    training, plain = Training(), Training()
    train_step, plainly = training.train_step(replay=True), plain.train_step()
    assert not train_step._replays  # a CPU
    train_step._replays = True
    for step, rows in enumerate([12, 12, 5, 12, 12, 5, 5, 12, 5]):
        parts = batches(rows, count=2, seed=step)
        loss = train_step(parts)
        assert loss == plainly(parts)
    whole, short = [12, 12], [5, 5]
    expected = ["warm-up"] * 4 + [("capture", whole, None), ("replay", whole)]
    expected += ["warm-up", "warm-up", ("replay", whole)]
    expected += [("capture", short, "pool 4"), ("replay", short)]
    assert captures == expected
    assert torch.equal(training.parameters(), plain.parameters())


@pytest.mark.gpu
@pytest.mark.parametrize("rho", [0.0, 0.1])
@pytest.mark.parametrize("name", ["ce", "focal", "ldam", "ldam_hinge", "logit_adjusted"])
def test_replayed_steps_are_those_of_a_plain_run(name, rho):
    accelerator = Accelerator()
    found = []
    for replay in (False, True):
        torch.manual_seed(1)
        layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten()]
        model = nn.Sequential(*layers, nn.Linear(8 * 36, 4)).to(accelerator.device)
        criterion = create_loss(name, COUNTS).to(accelerator.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        net, optimizer = accelerator.prepare(model, optimizer)
        train_step = TrainStep(accelerator, net, criterion, optimizer, clip_grad=5.0, replay=replay)
        generator = torch.Generator().manual_seed(0)
        losses = []
        for step in range(24):
            rows = 7 if step % 4 == 3 else 32
            images = torch.randn(rows, 3, 8, 8, generator=generator)
            target = torch.randint(4, (rows,), generator=generator)
            if step == 16:
                criterion.weight.copy_(COUNTS.weights(0.99))
            parts = [(images.to(accelerator.device), target.to(accelerator.device))]
            losses.append(train_step(parts, rho=rho).item())
        assert len(train_step._passes) == (2 if replay else 0)
        state = torch.cat([value.flatten().double() for value in model.state_dict().values()])
        found.append((state, torch.tensor(losses)))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


class Reading(nn.Linear):
    def forward(self, x):
        return super().forward(x) * (1 if x.sum().item() > 0 else 2)


@pytest.mark.gpu
def test_what_cannot_be_captured_is_told():
    accelerator = Accelerator()
    model = Reading(6, 4).to(accelerator.device)
    criterion = create_loss("ldam", COUNTS).to(accelerator.device)
    parts = [(x.to(accelerator.device), y.to(accelerator.device)) for x, y in batches(12)]
    with pytest.raises(RuntimeError, match="cannot be captured as a CUDA graph; use replay=False"):
        CapturedPass(accelerator, model, criterion, parts)
