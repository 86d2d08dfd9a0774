"""The draws of fast dropout on a CPU, and the layer that uses them."""

import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ldam_plugins.kernels import dropout
from ldam_plugins.kernels.dropout import FastDropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_draws_are_independent_and_of_the_probability(p):
    rows = 400_000
    layer = FastDropout(p)
    output = layer(torch.ones(rows, 4))  # the four of a row come from one draw of 64 bits
    kept = (output > 0).double()
    assert output.unique().tolist() == pytest.approx([0, 1 / (1 - p)], rel=1e-3)
    noise = math.sqrt(p * (1 - p) / rows)
    assert kept.mean(0).sub(1 - p).abs().max() < 5 * noise + 1 / 65536
    correlation = torch.corrcoef(torch.cat([kept.T[:, 1:], kept.T[:, :-1]])).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / math.sqrt(rows)


def test_every_value_of_a_draw_has_its_share():
    steps = 3277
    signs = dropout._draw(torch.Size([4_000_003]), steps)
    assert (signs.min(), signs.max()) == (-steps, 32767 - steps)
    counts = torch.bincount((signs.int() + steps) // 256, minlength=128)
    expected = len(signs) / 128
    assert counts.sub(expected).square().sum() / expected < 127 + 5 * math.sqrt(2 * 127)


@pytest.mark.parametrize("inplace", [False, True])
def test_dropout_of_hidden_states_passes_the_gradient_of_what_it_kept(inplace):
    layer = FastDropout(0.25, inplace)
    leaf = torch.randn(40, 7, requires_grad=True)
    inputs = leaf * 1
    output = layer(inputs)
    assert (output is inputs) == inplace
    (gradient,) = torch.autograd.grad(output.sum(), leaf)
    torch.testing.assert_close(gradient, output.ne(0) / 0.75)
    torch.testing.assert_close(output, leaf * gradient)


@pytest.mark.parametrize("p", [0.0, 1.0, 1e-6])
def test_dropout_of_nothing_and_of_everything_is_the_usual(p):
    inputs = torch.randn(50, 50)
    torch.manual_seed(0)
    expected = nn.Dropout(p)(inputs)
    torch.manual_seed(0)
    torch.testing.assert_close(FastDropout(p)(inputs), expected)
    torch.testing.assert_close(FastDropout(0.5).eval()(inputs), inputs)


def test_an_empty_batch_has_an_empty_output():
    assert FastDropout(0.1)(torch.zeros(0, 3)).shape == (0, 3)


def test_what_looks_on_gets_the_dropout_of_torch():
    layer = FastDropout(0.5)
    with pytest.raises(RuntimeError, match="randomness"):  # not the same draw for every example
        torch.func.vmap(layer)(torch.ones(3, 4))
    with FakeTensorMode():
        assert layer(torch.empty(3, 4)).shape == (3, 4)
    with torch.device("meta"):  # a default for what is made anew
        assert layer(torch.ones(64, 64, device="cpu")).eq(0).any()
