import pytest
import torch
from accelerate import Accelerator
from torch import nn

from ldam_plugins import ClassCounts
from ldam_plugins.metrics import long_tail_metrics
from ldam_plugins.training import evaluate

COUNTS = ClassCounts([400, 60, 9, 2])


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def batches(rows, count):
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(rows, 6, generator=generator), torch.randint(4, (rows,), generator=generator))
        for _ in range(count)
    ]


def test_metrics_are_those_of_all_logits(accelerator):
    net, parts = nn.Sequential(nn.Dropout(), nn.Linear(6, 4)), batches(7, 3)
    found = evaluate(accelerator, net, parts, COUNTS, to_input=lambda x: 2 * x)
    assert not net.training
    with torch.no_grad():
        logits = torch.cat([net(2 * inputs) for inputs, _ in parts])
    labels = torch.cat([labels for _, labels in parts])
    expected = long_tail_metrics(logits, labels, COUNTS)
    for name in [name for name in expected if name.startswith("per_class")]:
        assert found.pop(name) == expected.pop(name)
    assert found == pytest.approx(expected)


def test_groups_are_in_the_order_of_the_loader_and_of_its_length(accelerator):
    parts, net = batches(7, 3), nn.Linear(6, 4)
    groups = [str(row % 5) for row in range(21)]
    found = evaluate(accelerator, net, parts, COUNTS, groups=groups, detailed=True)
    with torch.no_grad():
        logits = torch.cat([net(inputs) for inputs, _ in parts])
    labels = torch.cat([labels for _, labels in parts])
    expected = long_tail_metrics(logits, labels, COUNTS, groups=groups, detailed=True)
    assert found["by_group"] == expected["by_group"]
    assert set(found) == set(expected)
    for length in (20, 22):
        with pytest.raises(ValueError, match="`groups` must be of shape"):
            evaluate(accelerator, net, parts, COUNTS, groups=["a"] * length)


def test_evaluation_is_not_compiled(accelerator):
    torch.compiler.reset()
    shapes = []

    def backend(graph, inputs):
        shapes.append([tuple(x.shape) for x in inputs])
        return graph.forward

    plain = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    net = torch.compile(plain, backend=backend, dynamic=False)
    found = evaluate(accelerator, net, batches(12, 3), COUNTS)
    assert shapes == []
    assert found == evaluate(accelerator, plain, batches(12, 3), COUNTS)
    torch.compiler.reset()


@pytest.mark.parametrize("autocast", [True, False])
def test_mixed_precision_may_be_left_out(autocast):
    dtypes = []

    class Noting(nn.Linear):
        def forward(self, x):
            dtypes.append(super().forward(x).dtype)
            return super().forward(x)

    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    evaluate(accelerator, Noting(6, 4), batches(5, 1), COUNTS, autocast=autocast)
    assert dtypes == [torch.bfloat16 if autocast else torch.float32]
