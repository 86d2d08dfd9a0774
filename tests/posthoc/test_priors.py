"""Logits under another class prior, against Bayes' rule in plain floats."""

import copy
import math

import numpy as np
import pytest
import timm
import torch
from head_models import Net
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ldam_plugins import ClassCounts, fold_cosine_head, use_cosine_head
from ldam_plugins.posthoc import adjust_to_prior, adjusted_logits

COUNTS = ClassCounts([600, 250, 100, 40, 10])
SOURCE = [0.6, 0.25, 0.1, 0.04, 0.01]
TARGET = [0.1, 0.1, 0.2, 0.2, 0.4]


def shifts(source, target, tau):
    return [tau * (math.log(t) - math.log(s)) for s, t in zip(source, target, strict=True)]


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.5])
@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        (COUNTS, "uniform", ([0.2] * 5)),
        (SOURCE, TARGET, TARGET),
        (np.array(SOURCE), torch.tensor(TARGET), TARGET),
        (COUNTS, COUNTS, SOURCE),
    ],
)
def test_each_logit_moves_by_the_difference_of_log_priors(source, target, expected, tau):
    logits = torch.randn(7, 5, dtype=torch.float64)
    found = adjusted_logits(logits, source, target, tau)
    by_hand = shifts(SOURCE, expected, tau)
    for row, new in zip(logits.tolist(), found.tolist(), strict=True):
        assert new == pytest.approx([z + s for z, s in zip(row, by_hand, strict=True)], abs=1e-6)


def test_it_is_the_rule_of_bayes():
    # Likelihoods of three classes at one point; the model has learned the posterior of SOURCE.
    likelihood = [0.02, 0.3, 0.05, 0.1, 0.9]
    learned = [p * q for p, q in zip(SOURCE, likelihood, strict=True)]
    wanted = [p * q for p, q in zip(TARGET, likelihood, strict=True)]
    logits = np.log([[p / sum(learned) for p in learned]])
    found = adjusted_logits(logits, SOURCE, TARGET)
    assert isinstance(found, np.ndarray)
    shares = np.exp(found[0]) / np.exp(found[0]).sum()
    assert shares.tolist() == pytest.approx([p / sum(wanted) for p in wanted], abs=1e-12)


def test_balanced_accuracy_of_two_gaussians():
    # Unit Gaussians at 0 and 2, priors 0.9 and 0.1: the log-odds are 2x - 2 + log(1/9), and the
    # boundary of equal priors is at x = 1.
    x = torch.tensor([0.99, 1.01], dtype=torch.float64)
    odds = 2 * x - 2 + math.log(1 / 9)
    logits = torch.stack([torch.zeros(2, dtype=torch.float64), odds], dim=1)
    assert logits.argmax(1).tolist() == [0, 0]
    assert adjusted_logits(logits, [0.9, 0.1]).argmax(1).tolist() == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_type_dtype_and_gradient_stay(dtype):
    logits = torch.randn(2, 5).to(dtype).requires_grad_()
    found = adjusted_logits(logits, COUNTS)
    assert found.dtype == dtype
    found.sum().backward()
    assert torch.equal(logits.grad, torch.ones(2, 5, dtype=dtype))
    array = logits.detach().float().numpy()
    array.flags.writeable = False
    assert adjusted_logits(array, COUNTS).dtype == np.float32


def test_the_model_gives_the_adjusted_logits():
    model, x = Net().eval(), torch.randn(9, 6)
    before = copy.deepcopy(model)
    assert adjust_to_prior(model, COUNTS, TARGET, 0.7) is model
    expected = adjusted_logits(before(x), SOURCE, TARGET, 0.7)
    torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
    by_hand = shifts(SOURCE, TARGET, 0.7)
    for old, new, shift in zip(
        before.heads[0].bias.tolist(), model.heads[0].bias.tolist(), by_hand, strict=True
    ):
        assert new == pytest.approx(old + shift, abs=1e-6)
    before.load_state_dict(model.state_dict())
    assert torch.equal(before(x), model(x))
    trainable = [p.requires_grad for p in model.parameters()]
    assert all(trainable)


@pytest.mark.parametrize("shared", [True, False])
def test_each_of_averaged_heads_moves_by_the_whole(shared):
    model, x = Net(heads=2, shared=shared).eval(), torch.randn(9, 6)
    before = model(x)
    adjust_to_prior(model, COUNTS)
    torch.testing.assert_close(model(x), adjusted_logits(before, COUNTS))


def test_one_bias_of_two_heads_moves_once():
    model, x = Net(heads=2).eval(), torch.randn(9, 6)
    model.heads[1].bias = model.heads[0].bias
    before = model(x)
    adjust_to_prior(model, COUNTS)
    torch.testing.assert_close(model(x), adjusted_logits(before, COUNTS))


@pytest.mark.parametrize("arch", ["test_resnet", "deit_tiny_distilled_patch16_224", "ghostnet_050"])
def test_models_of_timm(arch):
    more = {"depth": 1, "img_size": 32} if "deit" in arch else {}
    model = timm.create_model(arch, num_classes=5, **more).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(x)
        adjust_to_prior(model, COUNTS)
        torch.testing.assert_close(model(x), adjusted_logits(before, COUNTS))
    stock = timm.create_model(arch, num_classes=5, **more).eval()
    stock.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(stock(x), model(x))


def test_a_convolutional_head():
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 5, 1), nn.Flatten())
    x = torch.randn(2, 3, 4, 4)
    before = model(x)
    adjust_to_prior(model, COUNTS)
    torch.testing.assert_close(model(x), adjusted_logits(before, COUNTS))


@pytest.mark.parametrize("trained", [True, False])
def test_a_head_without_a_bias_gets_one(trained):
    model, x = nn.Sequential(nn.Linear(6, 5, bias=False).requires_grad_(trained)), torch.randn(4, 6)
    before = model(x)
    with pytest.warns(UserWarning, match=r"head '0' had no bias.*adjustment is lost") as caught:
        adjust_to_prior(model, COUNTS)
    assert caught[0].filename == __file__
    torch.testing.assert_close(model(x), adjusted_logits(before, COUNTS))
    assert model[0].bias.requires_grad == trained
    stock = nn.Sequential(nn.Linear(6, 5))
    stock.load_state_dict(model.state_dict())
    assert torch.equal(stock(x), model(x))


def test_a_second_call_adds_to_the_first():
    model, x = Net(), torch.randn(4, 6)
    before = model(x)
    adjust_to_prior(model, COUNTS, TARGET)
    adjust_to_prior(model, TARGET, COUNTS)
    torch.testing.assert_close(model(x), before)


def test_16_bits_are_rounded_once():
    model = Net().bfloat16()
    old = model.heads[0].bias.tolist()
    adjust_to_prior(model, COUNTS)
    exact = [b + s for b, s in zip(old, shifts(SOURCE, [0.2] * 5, 1), strict=True)]
    rounded = torch.tensor(exact, dtype=torch.float64).bfloat16()
    assert torch.equal(model.heads[0].bias.detach(), rounded)


def test_a_cosine_head_is_folded_first():
    model, x = use_cosine_head(Net()).eval(), torch.randn(4, 6)
    with pytest.raises(ValueError, match=r"without a cosine head, got \['heads.0'\].*fold_cosine"):
        adjust_to_prior(model, COUNTS)
    before = fold_cosine_head(model)(x)
    adjust_to_prior(model, COUNTS)
    torch.testing.assert_close(model(x), adjusted_logits(before, COUNTS))


class Wrapper(DistributedDataParallel):
    """Without the processes that the real one asks for."""

    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module

    def forward(self, x):
        return self.module(x)


def test_wrapped_adapted_sharded_and_shared_heads_are_refused():
    def refused(model, message, error=ValueError):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(error, match=message):
            adjust_to_prior(model, COUNTS)
        for name, value in model.state_dict().items():
            assert value.is_meta or torch.equal(before[name], value)

    refused(Wrapper(Net()), "neither wrapped nor sharded, got 'Wrapper'.*unwrap_model")

    shared = Net()
    shared.other_head = nn.Linear(16, 5)
    shared.other_head.bias = shared.heads[0].bias
    refused(shared, r"a bias of its own, got \"that of 'other_head'\"")

    refused(Net().to("meta"), "whole bias in memory, got 'one on the meta device'")

    counted = Net()
    nn.utils.parametrize.register_parametrization(counted.heads[0], "bias", nn.Identity())
    refused(counted, "holds its bias as floats.*parametrization", TypeError)

    split = Net()
    split.heads[0].bias.data = torch.zeros(0)
    refused(split, r"whole bias in memory, got \(0,\)")

    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["heads.0"], r=2)
    refused(peft.get_peft_model(Net(), config), "without an adapter on its head")


@pytest.mark.parametrize(
    ("source", "target", "tau", "message"),
    [
        (ClassCounts([3, 2]), "uniform", 1, r"`source_prior` must be of shape \(5,\).*\(2,\)"),
        ([600, 250, 100, 40, 10], "uniform", 1, r"sum to 1, got 'a sum of 1000'.*ClassCounts"),
        ([0.5, 0.5, 0, 0, 0], "uniform", 1, r"`source_prior` must be above 0.*'0 in 2'"),
        (COUNTS, [0.5, 0.5, 0.5, 0.5, -1], 1, r"`target_prior` must be above 0.*'-1 in 4'"),
        (COUNTS, [0.5, 0.5, math.nan, 0, 0], 1, r"`target_prior` must be above 0.*'nan in 2'"),
        (COUNTS, "unifrom", 1, "`target_prior` must be one of 'uniform'.*Did you mean"),
        (COUNTS, "uniform", -1, "`tau` must be a finite number >= 0"),
        (COUNTS, "uniform", math.inf, "`tau` must be a finite number >= 0"),
    ],
)
def test_bad_priors_change_nothing(source, target, tau, message):
    model = Net(heads=2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        adjust_to_prior(model, source, target, tau)
    with pytest.raises(ValueError, match=message):
        adjusted_logits(torch.zeros(1, 5), source, target, tau)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_logits_of_another_kind_are_refused():
    with pytest.raises(TypeError, match="`logits` must be a floating-point tensor"):
        adjusted_logits(torch.zeros(1, 5).long(), COUNTS)
    with pytest.raises(ValueError, match=r"`logits` must be of shape \(N, C\)"):
        adjusted_logits(np.zeros(5), COUNTS)
