"""Batch normalisation for compiled training on a CPU, against torch's."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldam_plugins.kernels.batch_norm import FastBatchNorm2d, _BatchNorm, use_fast_batch_norm

CHANNELS = 5


class Own(nn.BatchNorm2d):
    """One that may compute something else."""


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()


def images(*size, dtype=torch.float32, memory_format=torch.contiguous_format):
    generator = torch.Generator().manual_seed(0)
    made = 3 * torch.randn(*size, generator=generator) + torch.arange(size[1]).view(-1, 1, 1)
    return made.to(dtype).contiguous(memory_format=memory_format).requires_grad_()


def pair(**options):
    """A layer of torch and its fast twin, compiled as torch.compile does but for the last step."""
    theirs = nn.BatchNorm2d(CHANNELS, **options)
    if theirs.affine:
        with torch.no_grad():
            theirs.weight.uniform_(-2, 2)
            theirs.bias.uniform_(-2, 2)
    ours = copy.deepcopy(theirs)
    assert use_fast_batch_norm(ours) == 1
    whole = theirs.momentum is not None  # torch does not compile the mean of all batches whole
    return theirs, ours, torch.compile(ours, backend="aot_eager", fullgraph=whole)


def after(layer, call, batch, of_output):
    """Output, gradients and buffers after one batch."""
    output = call(batch)
    gradients = torch.autograd.grad(output, (batch, *layer.parameters()), of_output)
    return [output, *gradients, *(buffer.clone() for buffer in layer.buffers())]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(6, 4, 3), (1, 4, 3), (2, 1, 1)])
def test_equals_torch_in_float32(memory_format, size):
    theirs, ours, compiled = pair(momentum=0.3, eps=1e-3)
    for scale in (1, 0.5):
        batch = images(size[0], CHANNELS, *size[1:], memory_format=memory_format)
        of_output = scale * torch.randn(batch.shape)
        expected = after(theirs, theirs, batch, of_output)
        found = after(ours, compiled, batch, of_output)
        assert found[0].is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_as_near_to_the_exact_values_as_a_rounding(dtype):
    theirs, ours, compiled = pair()
    exact = copy.deepcopy(theirs).double()
    batch = images(16, CHANNELS, 8, 8, dtype=dtype)
    wide = batch.detach().double().requires_grad_()
    of_output = torch.randn(batch.shape).to(dtype)
    expected = after(exact, exact, wide, of_output.double())
    with torch.autocast("cpu", dtype):
        found = after(ours, compiled, batch, of_output)
    kinds = [value.dtype for value in found]
    assert kinds == [dtype] * 2 + [torch.float32] * 4 + [torch.int64]
    for mine, true in zip(found, expected, strict=True):
        rounding = torch.finfo(dtype).eps if mine.dtype == dtype else 1e-5
        torch.testing.assert_close(mine.double(), true.double(), rtol=rounding, atol=1e-5)


@pytest.mark.parametrize("outlier", [0, 1e4])
def test_statistics_keep_their_digits_far_from_zero(outlier):
    _, ours, compiled = pair(momentum=1.0)
    batch = images(8, CHANNELS, 8, 8).detach() + 1e4
    batch[0] += outlier
    compiled(batch)
    variance, mean = torch.var_mean(batch.double(), (0, 2, 3))
    torch.testing.assert_close(ours.running_mean.double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.running_var.double(), variance, rtol=1e-5, atol=0)


def test_uncompiled_and_in_evaluation_it_is_torch_to_the_bit():
    theirs, ours, compiled = pair()
    batch = images(4, CHANNELS, 3, 3)
    of_output = torch.randn(batch.shape)
    both = (after(layer, layer, batch, of_output) for layer in (theirs, ours))
    assert all(torch.equal(one, other) for one, other in zip(*both, strict=True))
    theirs.eval(), compiled.eval()
    assert torch.equal(compiled(batch), theirs(batch))


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"momentum": None}, torch.float32),
        ({"affine": False}, torch.float32),
        ({"track_running_stats": False}, torch.float32),
        ({}, torch.float64),
        ({}, torch.bfloat16),
    ],
)
def test_what_it_does_not_do_is_left_to_torch(options, dtype):
    theirs, ours, compiled = pair(**options)
    theirs.to(dtype), ours.to(dtype)
    for _ in range(2):
        batch = images(4, CHANNELS, 3, 3, dtype=dtype)
        of_output = torch.randn(batch.shape, dtype=dtype)
        expected = after(theirs, theirs, batch, of_output)
        found = after(ours, compiled, batch, of_output)
        tight = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}[dtype]
        torch.testing.assert_close(found, expected, rtol=tight, atol=tight)


def test_running_statistics_can_be_kept_as_they_are():
    theirs, ours, compiled = pair()
    theirs.track_running_stats = ours.track_running_stats = False
    batch = images(4, CHANNELS, 3, 3)
    torch.testing.assert_close(compiled(batch), theirs(batch))
    assert torch.equal(ours.running_mean, torch.zeros(CHANNELS))
    assert ours.num_batches_tracked == 0


@pytest.mark.parametrize("size", [(1, CHANNELS, 1, 1), (4, CHANNELS), (4, 1, 3, 3), (4, 6, 3, 3)])
def test_errors_are_those_of_torch(size):
    theirs, ours, _ = pair()
    compiled = torch.compile(ours, backend="aot_eager")
    with pytest.raises((ValueError, RuntimeError)) as expected:
        theirs(torch.ones(size))
    with pytest.raises((ValueError, RuntimeError)) as found:
        compiled(torch.ones(size))
    assert str(expected.value).split("\n")[0] in str(found.value)


def test_layers_keep_their_tensors_and_their_names():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(nn.BatchNorm2d(3)), Own(3))
    model.append(nn.BatchNorm1d(3))
    tensors = model.state_dict(keep_vars=True)
    assert use_fast_batch_norm(model) == 2
    assert use_fast_batch_norm(model) == 0
    kinds = [type(module) for module in model.modules() if not list(module.children())]
    assert kinds == [FastBatchNorm2d, FastBatchNorm2d, Own, nn.BatchNorm1d]
    changed = model.state_dict(keep_vars=True)
    assert list(changed) == list(tensors)
    assert all(changed[name] is tensors[name] for name in tensors)
    stored = io.BytesIO()
    torch.save(copy.deepcopy(model), stored)
    stored.seek(0)
    assert type(torch.load(stored, weights_only=False)[0]) is FastBatchNorm2d


@pytest.mark.parametrize("size", [(512, 8, 8), (256, 1, 1), (64, 2, 3), (2, 64, 64)])
@pytest.mark.parametrize("outlier", ["image 0", "image 1", "last image", "pixel 0", "row 0", "all"])
def test_no_outlier_costs_digits_whichever_it_is(size, outlier):
    """Values that lie ten thousand spreads away are a part of the batch like all others."""
    batch = 1e-2 * torch.randn(size[0], CHANNELS, *size[1:])
    where = {
        "image 0": batch[0],
        "image 1": batch[1],
        "last image": batch[-1],
        "pixel 0": batch[:, :, 0, 0],
        "row 0": batch[:, :, 0],
        "all": batch,
    }
    where[outlier].add_(100)
    parameters = torch.rand(CHANNELS) + 0.5, torch.randn(CHANNELS)
    of_output = torch.randn(batch.shape)

    def results(normalise, dtype):
        given = [part.to(dtype).requires_grad_() for part in (batch, *parameters)]
        output, mean, variance = normalise(*given)
        gradients = torch.autograd.grad(output, given, of_output.to(dtype))
        return [output, *gradients, mean, variance]

    def torchs(x, weight, bias):
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
        return F.batch_norm(x, None, None, weight, bias, training=True), mean, variance

    ours = results(lambda *given: _BatchNorm.apply(*given, 1e-5), torch.float32)
    theirs, exact = (results(torchs, dtype) for dtype in (torch.float32, torch.float64))
    for mine, other, right in zip(ours, theirs, exact, strict=True):
        error, bound = (
            ((found.double() - right).abs().max() / right.abs().max()).item()
            for found in (mine, other)
        )
        # An image is summed about its first row: that costs a rounding a row at most.
        assert error < 5e-6 + size[1] * 2.5e-7 + 4 * bound, (mine.shape, error, bound)
