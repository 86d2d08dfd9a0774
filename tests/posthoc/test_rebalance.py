"""A head that is re-balanced: folded as it should be, undone, measured, and bad input refused."""

import copy
import math

import pytest
import torch
from frozen import bayes, draw, features_of, gaussians, long_tail
from head_models import Net
from torch import nn

from ldam_plugins import ClassCounts, use_cosine_head
from ldam_plugins.heads import cosine_heads
from ldam_plugins.metrics import long_tail_metrics
from ldam_plugins.posthoc import (
    Features,
    calibration_error,
    extract_features,
    rebalance_head,
)
from ldam_plugins.posthoc.methods import METHODS

COUNTS = long_tail(600, 5, 30)
STRENGTHS = {name: method.strengths(600)[0] for name, method in METHODS.items()}
STRENGTHS |= dict.fromkeys(("logit_adjustment", "tau_norm", "logit_adjusted"), 1.0)
QUICK = [name for name in METHODS if "hinge" not in name]


@pytest.fixture(scope="module")
def simulated():
    """A model that has learned the class shares, features held out of training, and of a test."""
    generator = torch.Generator().manual_seed(0)
    means = 0.7 * gaussians(5, 8, generator)
    model = bayes(means, COUNTS.prior(dtype=torch.float64).log())
    held_out = features_of(model, *draw(means, COUNTS.counts, generator))
    test = features_of(model, *draw(means, [400] * 5, generator))
    return model, held_out, test


def same(first, second, tolerance=1e-6):
    size = second.abs().max().item()
    torch.testing.assert_close(first, second, rtol=0, atol=tolerance * size)


@pytest.mark.parametrize("name", QUICK)
def test_each_method_is_folded_measured_and_undone(simulated, name):
    model, held_out, test = copy.deepcopy(simulated[0]), *simulated[1:]
    before = copy.deepcopy(model)
    strength = STRENGTHS[name]
    done = rebalance_head(model, held_out, COUNTS, name, strength=strength, test=test)
    assert (done.method, done.strength, done.measured_on) == (name, strength, "test")
    assert type(model[1]) is nn.Linear
    with torch.no_grad():
        after = model(test.features)
    for logits, found in ((before(test.features).detach(), done.before), (after, done.after)):
        expected = long_tail_metrics(logits, test.labels, COUNTS, detailed=True)
        assert found["balanced_accuracy"] == expected["balanced_accuracy"]
        assert found["intervals"] == expected["intervals"]
        assert found["calibration"]["ece"] == pytest.approx(expected["ece"], abs=1e-6)
    gain = done.after["balanced_accuracy"] - done.before["balanced_accuracy"]
    value, low, high = done.differences["balanced_accuracy"]
    assert value == pytest.approx(gain, abs=1e-12)
    assert low <= value <= high
    assert gain > 0.01 or name in ("none", "lws", "focal")
    done.undo()
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )


def test_the_folded_model_gives_the_logits_of_the_closed_form(simulated):
    model, held_out, _ = copy.deepcopy(simulated[0]), *simulated[1:]
    x = held_out.features
    weight, bias = model[1].weight.detach().double(), model[1].bias.detach().double()
    done = rebalance_head(model, held_out, COUNTS, "logit_adjustment", strength=0.7)
    shares = [count / COUNTS.total for count in COUNTS.counts]
    shift = torch.tensor([-0.7 * math.log(share * 5) for share in shares], dtype=torch.float64)
    same(model(x).detach().double(), x.double() @ weight.T + bias + shift)
    done.undo()
    rebalance_head(model, held_out, COUNTS, "tau_norm", strength=0.5)
    unfolded = x.double() @ (weight / weight.norm(dim=1, keepdim=True).sqrt()).T
    same(model(x).detach().double(), unfolded)


def test_16_bits_are_rounded_once_and_measured_so(simulated):
    model, held_out, test = copy.deepcopy(simulated[0]).bfloat16(), *simulated[1:]
    rounded = model[1].weight.double(), model[1].bias.double()

    def of(samples):
        logits = (samples.features.double() @ rounded[0].T + rounded[1]).float().detach()
        return Features(samples.features, logits, samples.labels)

    held_out, test = of(held_out), of(test)
    done = rebalance_head(model, held_out, COUNTS, "tau_norm", strength=1.0, test=test)
    exact = rounded[0] / rounded[0].norm(dim=1, keepdim=True)
    assert torch.equal(model[1].weight, exact.bfloat16())
    logits = model[1].weight.double() @ test.features.double().T
    found = long_tail_metrics(logits.T.detach(), test.labels, COUNTS)
    assert done.after["per_class_accuracy"] == found["per_class_accuracy"]


def test_without_a_test_set_it_is_measured_by_cross_fitting(simulated):
    model, held_out, test = copy.deepcopy(simulated[0]), *simulated[1:]
    wide = nn.Sequential(nn.Identity(), nn.Linear(8 + 300, 5))
    with torch.no_grad():
        wide[1].weight.zero_()[:, :8] = model[1].weight
        wide[1].bias.copy_(model[1].bias)
    generator = torch.Generator().manual_seed(1)
    noisy = [
        features_of(
            wide,
            torch.cat([each.features, torch.randn(len(each), 300, generator=generator)], 1),
            each.labels,
        )
        for each in (held_out, test)
    ]
    # 300 features of noise: what is learned from a sample knows its class by heart.
    done = rebalance_head(wide, noisy[0], COUNTS, "crt", strength=100.0)
    assert done.measured_on == "cross-fitting"
    own = (wide(noisy[0].features).argmax(1) == noisy[0].labels).double().mean()
    true = (wide(noisy[1].features).argmax(1) == noisy[1].labels).double().mean()
    assert own > 0.95
    assert true < 0.6
    assert done.after["balanced_accuracy"] < 0.65


@pytest.mark.parametrize("shared", [True, False])
def test_averaged_heads_are_changed_together(shared):
    model = Net(heads=2, shared=shared).eval()
    x, labels = torch.randn(80, 6), torch.arange(80) % 5
    features = extract_features(model, [(x, labels)])
    before = copy.deepcopy(model)
    done = rebalance_head(model, features, COUNTS, "crt", strength=0.01)
    assert done.strength == 0.01
    weight = torch.cat([head.weight for head in model.heads], 1).double() / 2
    bias = torch.stack([head.bias for head in model.heads]).double().mean(0)
    same(model(x).detach().double(), (features.features.double() @ weight.T + bias).detach())
    one = nn.Linear(32, 5)
    with torch.no_grad():
        one.weight.copy_(torch.cat([head.weight for head in before.heads], 1) / 2)
        one.bias.copy_(torch.stack([head.bias for head in before.heads]).mean(0))
    alone = nn.Sequential(nn.Identity(), one)
    rebalance_head(
        alone, Features(features.features, features.logits, labels), COUNTS, "crt", strength=0.01
    )
    same(model(x).detach(), alone(features.features).detach(), 1e-5)
    done.undo()
    assert torch.equal(model(x), before(x))


class Weighted(Net):
    """Another average: 0.8 and 0.2."""

    def forward(self, x):
        return 0.8 * self.heads[0](self.body(x)) + 0.2 * self.heads[1](self.other(x))


def test_the_shares_of_an_average_are_found():
    model, x = Weighted(heads=2, shared=False).eval(), torch.randn(80, 6)
    names = ("heads.0", "heads.1")
    features = extract_features(model, [(x, torch.arange(80) % 5)], head=names)
    before = model(x).detach()
    rebalance_head(model, features, COUNTS, "logit_adjustment", strength=1.0, head=names)
    shift = -COUNTS.prior(dtype=torch.float64).log() - math.log(5)
    same(model(x).detach().double(), before.double() + shift)


def test_a_cosine_head_is_folded_first_and_before_is_of_the_folded_one():
    model, x = use_cosine_head(Net()).eval(), torch.randn(200, 6)
    features = extract_features(model, [(x, torch.arange(200) % 5)])
    cosine = model(x)
    done = rebalance_head(model, features, COUNTS, "none")
    assert not cosine_heads(model)
    folded = model(x).detach()
    assert torch.equal(folded.argmax(1), cosine.argmax(1))
    assert done.before["nll"] == pytest.approx(
        long_tail_metrics(folded, features.labels, COUNTS)["nll"], abs=1e-6
    )
    assert done.before["nll"] == done.after["nll"]
    done.undo()
    assert torch.equal(model(x), cosine)
    assert list(cosine_heads(model)) == ["heads.0"]
    done = rebalance_head(model, features, COUNTS, "logit_adjustment", strength=1.0)
    shift = -COUNTS.prior(dtype=torch.float64).log() - math.log(5)
    same(model(x).detach().double(), folded.double() + shift)


def test_a_head_without_a_bias():
    model = nn.Sequential(nn.Identity(), nn.Linear(6, 5, bias=False))
    features = features_of(model, torch.randn(200, 6), torch.arange(200) % 5)
    done = rebalance_head(model, features, COUNTS, "auto")
    assert {each.method for each in done.choice.candidates} == {
        "none",
        "tau_norm",
        "lws",
        "cosine_means",
    }
    assert model[1].bias is None
    done.undo()
    with pytest.warns(UserWarning, match="had no bias and has one now") as caught:
        done = rebalance_head(model, features, COUNTS, "logit_adjustment", strength=1.0)
    assert caught[0].filename == __file__
    assert model[1].bias is not None
    done.undo()
    assert model[1].bias is None


def test_priors_of_the_target_and_of_the_source(simulated):
    model, held_out, test = copy.deepcopy(simulated[0]), *simulated[1:]
    shares = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.1], dtype=torch.float64)
    done = rebalance_head(
        model, held_out, COUNTS, "logit_adjustment", strength=1.0, target_prior=shares
    )
    assert torch.equal(done.target_prior, shares)
    done.undo()
    done = rebalance_head(
        model, held_out, COUNTS, "logit_adjustment", strength=1.0, target_prior="train"
    )
    assert done.differences["accuracy"].value == 0
    done.undo()
    done = rebalance_head(
        model, held_out, COUNTS, "logit_adjustment", strength=1.0, target_prior=test
    )
    assert done.target_prior.tolist() == pytest.approx([0.2] * 5, abs=0.07)
    done.undo()
    done = rebalance_head(
        model, held_out, COUNTS, "logit_adjustment", strength=1.0, source_prior="implied"
    )
    off = done.source_prior.log() - COUNTS.prior(dtype=torch.float64).log()
    assert off.abs().max() < 0.7
    done.undo()
    done = rebalance_head(
        model, held_out, COUNTS, "logit_adjustment", strength=1.0, source_prior=[0.2] * 5
    )
    assert done.differences["accuracy"].value == 0


def test_calibration_under_the_target_prior(simulated):
    model, held_out, test = copy.deepcopy(simulated[0]), *simulated[1:]
    plain = rebalance_head(model, held_out, COUNTS, "tau_norm", strength=1.0, test=test)
    plain.undo()
    scaled = rebalance_head(
        model, held_out, COUNTS, "tau_norm", strength=1.0, test=test, calibrate=True
    )
    scaled.undo()
    assert scaled.temperature != 1
    assert scaled.after["top1_error"] == plain.after["top1_error"]
    assert scaled.after["nll"] < plain.after["nll"]
    shares = torch.tensor([0.6, 0.1, 0.1, 0.1, 0.1])
    done = rebalance_head(
        model, held_out, COUNTS, "logit_adjustment", strength=1.0, test=test, target_prior=shares
    )
    with torch.no_grad():
        expected = calibration_error(model(test.features), test.labels, prior=shares)
    assert done.after["calibration"]["ece"] == pytest.approx(expected["ece"], abs=1e-5)
    assert "points" in str(scaled)


def test_what_the_model_knows_by_heart_shows_nothing(simulated):
    generator = torch.Generator().manual_seed(0)
    means = 20 * gaussians(5, 8, generator)
    model = bayes(means)
    known = features_of(model, *draw(means, COUNTS.counts, generator))
    with pytest.warns(UserWarning, match=r"errs on 0.0% of the samples in `features`.*held-out"):
        done = rebalance_head(model, known, COUNTS, "auto", methods=["logit_adjustment"])
    assert done.method == "none"


def without(features, label):
    kept = features.labels != label
    return Features(features.features[kept], features.logits[kept], features.labels[kept])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"method": "tau-norm"}, ValueError, "`method` must be one of.*Did you mean 'tau_norm'"),
        ({"methods": ["tau"]}, ValueError, "`methods` must be one of"),
        ({"by": "f1"}, ValueError, "`by` must be one of 'log_loss', 'accuracy'"),
        ({"strength": 1.0}, ValueError, "`strength` must be left out with method 'auto'"),
        ({"method": "crt", "strength": -1.0}, ValueError, "`strength` must be a finite number > 0"),
        ({"folds": 1}, ValueError, "`folds` must be an integer >= 2"),
        ({"class_counts": [3, 2]}, ValueError, "`class_counts` must be one count"),
        ({"target_prior": "even"}, ValueError, "`target_prior` must be one of 'uniform', 'train'"),
        ({"target_prior": [0.5, 0.5]}, ValueError, r"`target_prior` must be of shape \(5,\)"),
        ({"target_prior": [0.5] * 5}, ValueError, "`target_prior` must be probabilities that sum"),
        ({"source_prior": "fit"}, ValueError, "`source_prior` must be one of 'train', 'implied'"),
        ({"source_prior": [0.5, 0.5, 0, 0, 0]}, ValueError, "`source_prior` must be above 0"),
        ({"features": torch.ones(3, 8)}, TypeError, "`features` must be Features, as extract_fea"),
        ({"head": "1.x"}, ValueError, "head"),
    ],
)  # fmt: skip
def test_bad_options_change_nothing(simulated, change, error, message):
    model, held_out, _ = copy.deepcopy(simulated[0]), *simulated[1:]
    given = {"features": held_out, "class_counts": COUNTS} | change
    with pytest.raises(error, match=message):
        rebalance_head(model, **given)
    for name, value in simulated[0].state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_samples_that_do_not_fit_are_refused(simulated):
    model, held_out, test = copy.deepcopy(simulated[0]), *simulated[1:]
    for method in ("lws", "crt"):
        with pytest.raises(
            ValueError,
            match=r"`features` must be those of every class, got 'none of class 4'.*strength=1",
        ):
            rebalance_head(model, without(held_out, 4), COUNTS, method)
    named = ClassCounts(COUNTS.counts, ["a", "b", "c", "d", "e"])
    with pytest.raises(ValueError, match="none of class 'e'"):
        rebalance_head(model, without(held_out, 4), named, "class_means", strength=0.5)
    done = rebalance_head(model, without(held_out, 4), COUNTS, "logit_adjustment", strength=1.0)
    done.undo()
    with pytest.raises(
        ValueError, match="`test` must be of other samples than `features`, got '2000 of 2000"
    ):
        rebalance_head(model, test, COUNTS, test=test)
    other = bayes(torch.randn(5, 8))
    with pytest.raises(ValueError, match="those of this model, whose head turns them into"):
        rebalance_head(other, held_out, COUNTS)
    with pytest.raises(ValueError, match="those of this model, whose head turns them into"):
        rebalance_head(model, held_out, COUNTS, test=features_of(other, test.features, test.labels))
    sine = nn.Sequential(nn.Linear(8, 5))
    with pytest.raises(ValueError, match="8 features and 5 logits a sample, got '9 and 5'"):
        rebalance_head(
            sine, features_of(nn.Linear(9, 5), torch.randn(9, 9), torch.arange(9) % 5), COUNTS
        )
    with pytest.raises(ValueError, match="finite"):
        Features(torch.full((2, 3), torch.nan), torch.ones(2, 3), torch.tensor([0, 1]))


def test_a_class_without_a_sample_leaves_methods_that_need_none(simulated):
    model, held_out, test = copy.deepcopy(simulated[0]), *simulated[1:]
    few = without(held_out, 4)
    with pytest.warns(UserWarning, match=r"no sample of 1 of 5 classes \(4\).*left out \(lws, cl"):
        done = rebalance_head(model, few, COUNTS, "auto", test=test)
    tried = {each.method for each in done.choice.candidates}
    assert tried == {"none", "logit_adjustment", "tau_norm"}
    assert done.choice.pooled == {"few": [4], "medium": [3]} or 4 in done.choice.pooled["few"]
    assert done.differences["balanced_accuracy"].low > 0


def test_a_shared_weight_is_refused():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.num_classes = 5
            self.embedding, self.head = nn.Embedding(5, 6), nn.Linear(6, 5)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(x)

    model, x = Tied(), torch.randn(20, 6)
    features = extract_features(model, [(x, torch.arange(20) % 5)])
    before = model(x)
    with pytest.raises(ValueError, match="a weight of its own, got \"that of 'embedding'\""):
        rebalance_head(model, features, COUNTS, "tau_norm", strength=1.0)
    assert torch.equal(model(x), before)


def test_what_learns_learns_from_further_samples_and_is_judged_on_the_others(simulated):
    model, held_out, test = copy.deepcopy(simulated[0]), *simulated[1:]
    few = [*range(60), *(index for index in range(len(held_out)) if held_out.labels[index] == 4)]
    small = Features(*(getattr(held_out, n)[few] for n in ("features", "logits", "labels")))
    with pytest.raises(ValueError, match="`features` must be those of every class"):
        rebalance_head(model, small, COUNTS, "class_means", strength=0.3)
    done = rebalance_head(
        model, small, COUNTS, "class_means", strength=0.3, learn_from=held_out, test=test
    )
    both = [torch.cat([getattr(small, n), getattr(held_out, n)]) for n in ("features", "labels")]
    means = torch.stack([both[0][both[1] == c].double().mean(0) for c in range(5)])
    # The head of the nearest mean in the metric of both: its own means are the best explained.
    assert (model(means.float()).argmax(1) == torch.arange(5)).all()
    done.undo()
    done = rebalance_head(model, small, COUNTS, "auto", learn_from=held_out)
    assert done.choice.samples == len(small)
    assert sum(done.after["per_class_samples"]) == len(small)
    done.undo()
    with pytest.raises(ValueError, match="`test` must be of other samples than `learn_from`"):
        rebalance_head(model, small, COUNTS, "crt", learn_from=test, test=test)


def test_a_head_that_was_fitted_on_the_features_is_judged_without_them(simulated):
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(60, 40, generator=generator), torch.arange(60) % 3

    def fit(features, labels):  # knows its own samples by heart, and nothing else
        layer = nn.Linear(40, 3)
        with torch.no_grad():
            target = nn.functional.one_hot(labels, 3).float()
            layer.weight.copy_(torch.linalg.lstsq(features, target).solution.T * 9)
            layer.bias.zero_()
        return layer

    model = nn.Sequential(nn.Identity(), fit(x, y))
    found = features_of(model, x, y)
    counts = ClassCounts([30, 20, 10])
    by_heart = rebalance_head(model, found, counts, "none")
    honest = rebalance_head(model, found, counts, "none", refit=fit)
    assert by_heart.before["balanced_accuracy"] > 0.75
    assert honest.before["balanced_accuracy"] < 0.6
    with pytest.raises(ValueError, match="`refit` must be a function that gives heads of shape"):
        rebalance_head(model, found, counts, "none", refit=lambda f, t: nn.Linear(40, 4))


def test_of_large_classes_some_samples_are_used(simulated):
    model, held_out = copy.deepcopy(simulated[0]), simulated[1]
    with pytest.warns(UserWarning, match=r"max_samples: (\d+) of \d+ samples are used, at most"):
        done = rebalance_head(model, held_out, COUNTS, "crt", strength=0.1, max_samples=200)
    sizes = torch.bincount(held_out.labels)
    used = torch.tensor(done.after["per_class_samples"])
    cap = int(used.max())
    assert torch.equal(used, sizes.clamp_max(cap))
    assert sizes.clamp_max(cap).sum() <= 200 < sizes.clamp_max(cap + 1).sum()


@pytest.mark.parametrize("kind", ["class", "group"])
def test_scales_of_their_own_come_last(simulated, kind):
    model, held_out, test = copy.deepcopy(simulated[0]), *simulated[1:]
    with torch.no_grad():
        model[1].weight[0] *= 3
        held_out = features_of(model, held_out.features, held_out.labels)
        test = features_of(model, test.features, test.labels)
    plain = rebalance_head(model, held_out, COUNTS, "tau_norm", strength=0.0, test=test)
    weight, bias = model[1].weight.detach().clone(), model[1].bias.detach().clone()
    plain.undo()
    done = rebalance_head(
        model, held_out, COUNTS, "tau_norm", strength=0.0, test=test, calibrate=kind
    )
    scales, offsets = done.scaling
    assert done.temperature is None
    assert done.to_dict()["scales"] == scales.tolist()
    same(model[1].weight.detach(), weight * scales[:, None].float())
    same(model[1].bias.detach(), bias * scales.float() + offsets.float())
    assert done.after["calibration"]["nll"] < plain.after["calibration"]["nll"]
    with pytest.raises(ValueError, match="`calibrate` must be one of"):
        rebalance_head(model, held_out, COUNTS, calibrate="vector")
