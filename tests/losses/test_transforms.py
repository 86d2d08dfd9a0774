"""Losses under every transform, mode and tensor type of F.cross_entropy."""

import copy
import itertools
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from exact_losses import definition
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ldam_plugins import ClassCounts, create_loss, list_losses, use_cosine_head
from ldam_plugins.losses import ldam_loss

SMALL, LARGE = (6, 5), (1000, 100)
"""Rows and classes: the definition, and what CPUs compute in one pass."""
# torch itself scripts its derivatives when forward mode is first used.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:Anomaly Detection:UserWarning"),
]


def counts_of(classes):
    return ClassCounts([3 * c + 2 for c in range(classes)][::-1])


def make(name, size, kind, weighted):
    """A loss, logits and a target."""
    rows, classes = size
    loss = create_loss(name, counts_of(classes))
    if weighted:
        loss.weight.copy_(torch.linspace(-0.5, 2, classes))
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(rows, classes, generator=generator)
    if kind == "soft":
        return loss, logits, torch.rand(rows, classes, generator=generator).softmax(1)
    target = torch.randint(classes, (rows,), generator=generator)
    target[1] = -100
    return loss, logits, target


def expected(loss, name, logits, target):
    z = logits.detach().clone().requires_grad_()
    value = definition(name, loss.class_counts, loss.weight)(z, target)
    return value.detach(), torch.autograd.grad(value, z)[0]


def value_and_gradient(function, logits):
    z = logits.detach().clone().requires_grad_()
    value = function(z)
    value.backward()
    return value, z.grad


def eager(loss, z, t):
    return value_and_gradient(lambda z: loss(z, t), z)


def of_grad(loss, z, t):
    return loss(z, t), grad(loss)(z, t)


def of_jacrev(loss, z, t):
    return loss(z, t), jacrev(loss)(z, t)


def of_jvp(loss, z, t):
    value, along = jvp(lambda z: loss(z, t), (z,), (torch.ones_like(z),))
    gradient = grad(loss)(z, t)
    torch.testing.assert_close(along, gradient.sum(), rtol=1e-3, atol=1e-4)
    return value, gradient


def of_vmap(loss, z, t):
    """Gradients of examples are those of the batch, each divided by its own denominator."""
    single = lambda z, y: loss(z[None], y[None], 1.0)  # noqa: E731
    gradients, values = vmap(torch.func.grad_and_value(single))(z, t)
    whole = loss.denominator(t)
    return values.sum() / whole, gradients / whole


def compiled(dynamic):
    def run(loss, z, t):
        torch._dynamo.reset()
        whole = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        return value_and_gradient(lambda z: whole(z, t), z)

    return run


def traced_by(mode):
    def run(loss, z, t):
        graph = make_fx(lambda z, t: grad(loss)(z, t), tracing_mode=mode)(z, t)
        return loss(z, t), graph(z, t)

    return run


def exported(strict):
    def run(loss, z, t):
        program = torch.export.export(loss, (z, t), strict=strict).module()
        return value_and_gradient(lambda z: program(z, t), z)

    return run


def jit_traced(loss, z, t):
    graph = torch.jit.trace(lambda z: loss(z, t), z, check_trace=False)
    return value_and_gradient(graph, z)


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Functions(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def under(context):
    def run(loss, z, t):
        with context():
            return eager(loss, z, t)

    return run


def hooks():
    return torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t)


@contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Plain(torch.Tensor):
    """A subclass that adds nothing."""


def subclass(loss, z, t):
    z = torch.Tensor._make_subclass(Plain, z.clone(), True)
    value = loss(z, t)
    assert type(value) is Plain
    (gradient,) = torch.autograd.grad(value, z)
    return value.as_subclass(torch.Tensor), gradient.as_subclass(torch.Tensor)


def checkpointed(reentrant):
    def run(loss, z, t):
        return value_and_gradient(
            lambda z: checkpoint(loss, z.clone(), t, use_reentrant=reentrant), z
        )

    return run


def called(loss, z, t):
    buffers = {name: buffer.clone() for name, buffer in loss.named_buffers()}
    empty = copy.deepcopy(loss).to("meta")
    return value_and_gradient(lambda z: functional_call(empty, buffers, (z, t)), z)


def inference(loss, z, t):
    with torch.inference_mode():
        value = loss(z.clone(), t)
    return value.clone(), eager(loss, z, t)[1]


def written(loss, z, t):
    """A hook writes into the gradient that it is given, twice."""
    z = z.clone().requires_grad_()
    middle = z * 1
    middle.register_hook(lambda g: g.mul_(2))
    value = loss(middle, t)
    value.backward(retain_graph=True)
    value.backward()
    return value, z.grad / 4


TRANSFORMS = {
    "eager": eager,
    "grad": of_grad,
    "jacrev": of_jacrev,
    "jvp": of_jvp,
    "vmap of grad": of_vmap,
    "compile": compiled(None),
    "compile dynamic": compiled(True),
    "make_fx real": traced_by("real"),
    "make_fx fake": traced_by("fake"),
    "make_fx symbolic": traced_by("symbolic"),
    "export": exported(False),
    "export strict": exported(True),
    "jit.trace": jit_traced,
    "dispatch mode": under(Seen),
    "function mode": under(Functions),
    "flop counter": under(lambda: FlopCounterMode(display=False)),
    "default device": under(lambda: torch.device("meta")),
    "saved tensors hooks": under(hooks),
    "deterministic": under(deterministic),
    "anomaly mode": under(torch.autograd.detect_anomaly),
    "subclass": subclass,
    "checkpoint": checkpointed(False),
    "checkpoint reentrant": checkpointed(True),
    "functional_call": called,
    "inference mode": inference,
    "hook that writes": written,
}

SLOW = [name for name in TRANSFORMS if name.startswith(("compile", "export", "make_fx", "jit"))]
"""Of these the suite runs the losses with a check, a margin or a branch of their own."""


def assert_right(transform, name, size, kind, weighted):
    loss, logits, target = make(name, size, kind, weighted)
    got = TRANSFORMS[transform](loss, logits, target)
    for ours, exact in zip(got, expected(loss, name, logits, target), strict=True):
        torch.testing.assert_close(ours.detach().double(), exact.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["indices", "soft"])
@pytest.mark.parametrize("transform", sorted(set(TRANSFORMS) - set(SLOW)))
def test_losses_are_right_under(transform, kind):
    for name in list_losses():
        assert_right(transform, name, SMALL, kind, weighted=True)
    assert_right(transform, "ldam", LARGE, kind, weighted=True)


@pytest.mark.parametrize(
    ("name", "size", "kind"), [("ldam", LARGE, "indices"), ("focal", SMALL, "soft")]
)
@pytest.mark.parametrize("transform", SLOW)
def test_losses_are_right_as_a_graph_of(transform, name, size, kind):
    assert_right(transform, name, size, kind, weighted=False)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", list_losses())
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_every_loss_is_right_under(transform, name):
    for size, kind in itertools.product((SMALL, LARGE), ("indices", "soft")):
        for weighted in (False, True):
            assert_right(transform, name, size, kind, weighted)


@pytest.mark.parametrize("made", ["outside", "inside"])
@pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("kind", ["indices", "soft"])
def test_fake_tensors(kind, size, made):
    for name in list_losses():
        loss, logits, target = make(name, size, kind, weighted=True)
        with FakeTensorMode():
            if made == "inside":
                loss = create_loss(name, counts_of(size[1]))
            z = torch.empty(logits.shape, requires_grad=True)
            y = torch.empty(target.shape, dtype=target.dtype)
            loss(z, y).backward()
            assert z.grad.shape == logits.shape
            assert loss.denominator(y).shape == ()
            loss.compute_loss_func((z,), y, 3).backward()


@pytest.mark.parametrize("kind", ["indices", "soft"])
def test_fake_tensors_outside_of_their_mode(kind):
    mode = FakeTensorMode()
    for name in ("ce", "ldam", "logit_adjusted", "vector_scaling"):
        loss, logits, target = make(name, SMALL, kind, weighted=True)
        z, y = mode.from_tensor(logits).requires_grad_(), mode.from_tensor(target)
        loss(z, y).backward()
        assert z.grad.shape == logits.shape


@pytest.mark.parametrize("kind", ["indices", "soft"])
def test_no_value_is_waited_for_on_a_device(kind):
    """Values on the "meta" device cannot be read at all."""
    for name in list_losses():
        loss, logits, target = make(name, SMALL, kind, weighted=True)
        z, y = logits.to("meta").requires_grad_(), target.to("meta")
        for placed in (loss, copy.deepcopy(loss).to("meta")):
            placed(z, y).backward()
            assert z.grad.is_meta
    head = use_cosine_head(nn.Linear(4, SMALL[1], device="meta"), chunked=True)
    features = torch.empty(SMALL[0], 4, device="meta")
    target = torch.empty(SMALL[0], dtype=torch.int64, device="meta")
    create_loss("ldam", counts_of(SMALL[1]))(head(features), target).backward()
    assert head.weight.grad.is_meta


@pytest.fixture
def mesh():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["indices", "soft"])
def test_distributed_tensors(mesh, kind):
    for name, size in [*((name, SMALL) for name in list_losses()), ("ldam", LARGE)]:
        loss, logits, target = make(name, size, kind, weighted=True)
        value, gradient = expected(loss, name, logits, target)
        for placement in (Shard(0), Shard(1)):
            of_target = Replicate() if target.ndim == placement.is_shard(1) else placement
            z = distribute_tensor(logits, mesh, [placement]).requires_grad_()
            y = distribute_tensor(target, mesh, [of_target])
            got = loss(z, y)
            got.backward()
            torch.testing.assert_close(got.full_tensor().double(), value, rtol=1e-4, atol=1e-5)
            ours = z.grad.full_tensor()
            torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-5)
            assert loss.denominator(y).item() == pytest.approx(loss.denominator(target).item())


class TestChunkedHead:
    """The head without logits, where its own function cannot be applied."""

    ROWS, FEATURES = 6, 4

    @pytest.fixture
    def parts(self):
        head = use_cosine_head(nn.Linear(self.FEATURES, 5, dtype=torch.float64))
        features = torch.randn(self.ROWS, self.FEATURES, dtype=torch.float64)
        return head, features, torch.arange(self.ROWS) % 5

    def both(self, head, chunked):
        """Loss of the head's weight and of features, by a head of one kind."""
        head = use_cosine_head(copy.deepcopy(head), chunked=chunked)
        loss = create_loss("ldam", counts_of(5)).double()
        del head.cosine_moments  # observed in training, in place
        head.register_buffer("cosine_moments", torch.zeros(2))
        head._observe = lambda lengths: None
        return lambda weight, x, y: loss(functional_call(head, {"weight": weight}, (x,)), y)

    def test_gradients_of_examples(self, parts):
        head, features, target = parts
        results = []
        for chunked in (False, True):
            function = self.both(head, chunked)
            single = lambda w, x, y: function(w, x[None], y[None])  # noqa: B023, E731
            batched = vmap(grad(single), in_dims=(None, 0, 0))
            results.append(batched(head.weight.detach(), features, target))
        torch.testing.assert_close(results[1], results[0])

    def test_second_derivatives(self, parts):
        head, features, target = parts
        results = [
            torch.func.hessian(self.both(head, chunked))(head.weight.detach(), features, target)
            for chunked in (False, True)
        ]
        torch.testing.assert_close(results[1], results[0])

    @pytest.mark.parametrize(
        "dynamic", [None, pytest.param(True, marks=pytest.mark.exhaustive)], ids=str
    )
    def test_compiled_whole(self, parts, dynamic):
        head, features, target = parts
        torch._dynamo.reset()
        head = use_cosine_head(head, chunked=True)
        loss = create_loss("ldam", counts_of(5)).double()
        step = torch.compile(
            lambda x, y: loss(head(x), y), backend="aot_eager", fullgraph=True, dynamic=dynamic
        )
        torch.testing.assert_close(step(features, target), loss(head(features), target))


class TestDenominators:
    """Sums of weights of any sign divide as in torch."""

    @pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])
    @pytest.mark.parametrize("sign", [1.0, -1.0])
    def test_negative_sums(self, size, sign):
        _, logits, target = make("ce", size, "indices", weighted=False)
        weight = sign * torch.linspace(-0.2, 2, size[1])
        right = F.cross_entropy(logits, target, weight)
        for chosen in (create_loss("ce", counts_of(size[1])), None):
            if chosen is None:
                got = ldam_loss(logits, target, torch.zeros(size[1]), weight=weight)
            else:
                chosen.weight.copy_(weight)
                got = chosen(logits, target)
            torch.testing.assert_close(got, right)
        for name in list_losses() if size == SMALL else ("ldam", "focal"):
            loss, z, y = make(name, size, "indices", weighted=False)
            loss.weight.copy_(weight)
            value = expected(loss, name, z, y)[0]
            torch.testing.assert_close(loss(z, y).double(), value, rtol=1e-4, atol=1e-5)
            (mapped,) = vmap(loss, in_dims=(0, None))(z[None], y)
            torch.testing.assert_close(mapped.double(), value, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("rows", [2, 1000])
    def test_weights_that_cancel_are_infinite_as_in_torch(self, rows):
        target = torch.arange(rows) % 2
        logits = torch.randn(rows, 100)
        weight = torch.zeros(100)
        weight[:2] = torch.tensor([1.0, -1.0])
        right = F.cross_entropy(logits, target, weight)
        assert right.isinf()
        assert ldam_loss(logits, target, torch.zeros(100), weight=weight) == right
        focal = create_loss("focal", counts_of(100), gamma=0.0)
        focal.weight.copy_(weight)
        assert focal(logits, target) == right

    @pytest.mark.parametrize("rows", [2, 1000])
    def test_weights_of_zero_are_nothing(self, rows):
        for name in list_losses() if rows == 2 else ("ldam", "ce"):
            loss, logits, target = make(name, (rows, 100), "indices", weighted=False)
            loss.weight.zero_()
            value, gradient = eager(loss, logits, target)
            assert value == 0
            assert gradient.abs().max() == 0


@pytest.mark.parametrize(
    ("outputs", "hint"),
    [
        (lambda z: (z, z), r"criterion\(outputs\[0\], target\)"),
        (lambda z: [z, z], r"several outputs in training"),
        (lambda z: {"logits": z}, r"outputs\.logits"),
        (lambda z: z.numpy(), ""),
        (lambda z: None, ""),
    ],
)
def test_what_is_no_tensor_is_refused_with_a_way_out(outputs, hint):
    loss, logits, target = make("ldam", SMALL, "indices", weighted=False)
    wanted = rf"`logits` must be a floating-point tensor of shape \(N, 5\), got .*{hint}"
    with pytest.raises(TypeError, match=wanted):
        loss(outputs(logits), target)


def test_the_prior_is_computed_once(monkeypatch):
    loss, logits, target = make("ldam", SMALL, "indices", weighted=True)
    right = loss.mean_weight().item()

    def computed(*_, **__):
        raise AssertionError("the prior was computed again")

    monkeypatch.setattr(ClassCounts, "prior", computed)
    shares = torch.tensor(loss.class_counts.counts, dtype=torch.float64)
    shares = shares / shares.sum()
    assert right == pytest.approx((shares * loss.weight).sum().item(), rel=1e-6)
    assert loss.mean_weight().item() == right
    loss.compute_loss_func((logits,), target, 6)
