"""Temperature and calibration errors, against the metrics of the package and plain loops."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from frozen import bayes, draw, features_of, gaussians
from head_models import Net
from scipy.optimize import minimize
from torch import nn

from ldam_plugins import ClassCounts, use_cosine_head
from ldam_plugins.heads import cosine_heads
from ldam_plugins.metrics import long_tail_metrics
from ldam_plugins.posthoc import (
    Features,
    calibration_error,
    extract_features,
    fit_temperature,
    fit_vector_scaling,
)
from ldam_plugins.posthoc.methods import best_temperature


def simulated(samples=600, factor=3.0, seed=0):
    """A model that is right about p(x | c) and too sure of it by a factor, and its features."""
    generator = torch.Generator().manual_seed(seed)
    means = gaussians(4, 6, generator)
    model = bayes(means)
    with torch.no_grad():
        for parameter in model[1].parameters():
            parameter *= factor
    x, y = draw(means, [samples // 4] * 4, generator)
    return model, features_of(model, x, y)


def test_errors_are_those_of_the_metrics_and_of_a_loop():
    _, features = simulated(200)
    logits, labels = features.logits, features.labels
    found = calibration_error(logits, labels)
    metrics = long_tail_metrics(logits, labels, ClassCounts([50] * 4))
    assert found["ece"] == pytest.approx(metrics["ece"], abs=1e-12)
    assert found["nll"] == pytest.approx(metrics["nll"], abs=1e-12)
    probabilities = logits.double().softmax(1).numpy()
    errors = []
    for label in range(4):
        total = 0.0
        for b in range(15):
            inside = (probabilities[:, label] > b / 15) & (probabilities[:, label] <= (b + 1) / 15)
            gap = probabilities[inside, label] - (labels.numpy()[inside] == label)
            total += abs(gap.sum()) / 200
        errors.append(total)
    assert found["classwise_ece"] == pytest.approx(np.mean(errors), abs=1e-12)
    bins = found["bins"]
    assert sum(bins["samples"]) == 200
    apart = [
        size * abs(sure - right)
        for size, sure, right in zip(
            bins["samples"], bins["confidence"], bins["accuracy"], strict=True
        )
        if size
    ]
    assert sum(apart) / 200 == pytest.approx(found["ece"], abs=1e-12)


def test_samples_are_weighted_to_a_mix_of_classes():
    _, features = simulated(240)
    chosen = torch.cat([torch.arange(60), torch.arange(60, 240, 6)])  # 60, 10, 10, 10
    logits, labels = features.logits[chosen], features.labels[chosen]
    prior = torch.tensor([1 / 7, 2 / 7, 2 / 7, 2 / 7])
    found = calibration_error(logits, labels, prior=prior)
    # Twelve of each sample of the rare classes are as many.
    repeated = torch.cat([torch.arange(60), torch.arange(60, 90).repeat(12)])
    expected = calibration_error(logits[repeated], labels[repeated])
    for name in ("nll", "ece", "classwise_ece"):
        assert found[name] == pytest.approx(expected[name], abs=1e-12)
        low, high = found["intervals"][name]
        assert low <= found[name] <= high
    for name in ("confidence", "accuracy", "share"):
        known = [value for value in expected["bins"][name] if value is not None]
        values = [value for value in found["bins"][name] if value is not None]
        assert values == pytest.approx(known)
    assert sum(found["bins"]["samples"]) == 90


@pytest.mark.parametrize("factor", [1.0, 1.3, 3.0])
def test_intervals_hold_what_many_samples_show(factor):
    """Of a model that is well calibrated, too."""
    _, many = simulated(40_000, factor)
    truth = calibration_error(many.logits, many.labels, intervals=False)
    held = {"nll": 0, "ece": 0, "classwise_ece": 0}
    for seed in range(20):
        chosen = torch.randperm(len(many), generator=torch.Generator().manual_seed(seed))[:400]
        found = calibration_error(many.logits[chosen], many.labels[chosen])
        for name in held:
            low, high = found["intervals"][name]
            assert 0 <= low <= high
            held[name] += low <= truth[name] <= high
    assert min(held.values()) >= 17, held


def test_chance_alone_is_no_calibration_error():
    _, features = simulated(400, 1.0)
    found = calibration_error(features.logits, features.labels)
    assert found["ece"] > 0.02
    assert found["intervals"]["ece"][0] == 0
    assert found["intervals"]["classwise_ece"][0] == 0


@pytest.mark.parametrize("prior", ["features", "uniform"])
def test_temperature_is_folded_into_the_last_layer(prior):
    model, features = simulated()
    chosen = torch.cat([torch.arange(300), torch.arange(300, 600, 7)])
    features = features_of(model, features.features[chosen], features.labels[chosen])
    before = copy.deepcopy(model)
    found = fit_temperature(model, features, prior=prior)
    assert found.temperature == pytest.approx(3.0, rel=0.2)
    counts = torch.bincount(features.labels).double()
    even = 1 / counts[features.labels]
    weights = even if prior == "uniform" else torch.ones_like(even)
    assert found.temperature == pytest.approx(
        best_temperature(features.logits, features.labels, weights), rel=1e-4
    )
    x = features.features
    torch.testing.assert_close(
        model(x).double(), before(x).double() / found.temperature, rtol=1e-6, atol=1e-6
    )
    assert found.after["ece"] < found.before["ece"]
    assert found.after["nll"] < found.before["nll"]
    assert set(found.to_dict()["after"]["intervals"]) == {"nll", "ece", "classwise_ece"}
    found.undo()
    assert torch.equal(model(x), before(x))


def test_a_cosine_head_is_folded_first_and_put_back():
    model = use_cosine_head(Net()).eval()
    x = torch.randn(60, 6)
    features = extract_features(model, [(x, torch.arange(60) % 5)])
    cosine = model(x)
    found = fit_temperature(model, features)
    assert not cosine_heads(model)
    folded = model(x)
    assert torch.equal(folded.argmax(1), cosine.argmax(1))
    measured = calibration_error(folded.detach(), features.labels)
    assert found.after["nll"] == pytest.approx(measured["nll"], abs=1e-5)
    found.undo()
    assert torch.equal(model(x), cosine)
    model.train()(x)  # the head is watched again


def test_16_bits_are_measured_as_rounded():
    model, features = simulated()
    model = model.bfloat16()
    x = features.features.bfloat16()
    wide = nn.Sequential(model[0], copy.deepcopy(model[1]).float())
    features = features_of(wide, x.float(), features.labels)
    found = fit_temperature(model, features)
    rounded = model[1].float()(x.float()).detach()
    assert found.after["nll"] == pytest.approx(
        calibration_error(rounded, features.labels)["nll"], abs=1e-5
    )


def test_bad_input_changes_nothing():
    model, features = simulated()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="`prior` must be one of 'features', 'uniform'"):
        fit_temperature(model, features, prior="even")
    other = features_of(bayes(torch.randn(4, 6)), features.features, features.labels)
    with pytest.raises(ValueError, match=r"those of this model, whose head.*logits that differ by"):
        fit_temperature(model, other)
    wide = features_of(nn.Linear(7, 4), torch.randn(8, 7), torch.arange(8) % 4)
    with pytest.raises(ValueError, match="6 features and 4 logits a sample, got '7 and 4'"):
        fit_temperature(model, wide)
    labels = features_of(model, features.features, features.labels + 1)
    with pytest.raises(ValueError, match="4 in row"):
        fit_temperature(model, labels)
    with pytest.raises(ValueError, match="one for each of 600 rows"):
        calibration_error(features.logits, features.labels[:5])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_scales_of_classes_are_the_optimum_of_the_objective_and_pool_small_classes():
    generator = torch.Generator().manual_seed(0)
    counts = ClassCounts([200, 60, 4, 3])
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor([80, 40, 6, 5]))
    x = 1.5 * torch.eye(4)[labels] + torch.randn(len(labels), 4, generator=generator)
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 4))
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(4) * torch.tensor([4.0, 1.0, 2.0, 2.0])[:, None])
        model[1].bias.zero_()
        before = Features(x, model(x), labels)
    found = fit_vector_scaling(model, before, counts)
    scales, offsets = found.scaling
    # The two small classes share theirs.
    assert (scales[2], offsets[2]) == (scales[3], offsets[3])
    assert found.after["nll"] < found.before["nll"]
    first = 1 / fit_temperature(nn.Sequential(nn.Identity(), _linear(before)), before).temperature
    cell = torch.tensor([1, 2, 0, 0])

    def objective(v):
        z = before.logits.double() * first * torch.from_numpy(v[:3])[cell]
        z = z + torch.from_numpy(v[3:])[cell]
        ridge = ((v[:3] - 1) ** 2).sum() + (v[3:] ** 2).sum()
        return float(nn.functional.cross_entropy(z, labels)) + ridge / 2 / len(labels)

    best = minimize(
        objective,
        np.r_[np.ones(3), np.zeros(3)],
        method="Nelder-Mead",
        options={"xatol": 1e-8, "fatol": 1e-12, "maxiter": 20000, "maxfev": 20000},
    )
    expected = first * best.x[:3][cell.numpy()]
    np.testing.assert_allclose(scales.numpy(), expected, rtol=1e-3)
    found.undo()
    assert torch.equal(model(x), before.logits)
    with pytest.raises(ValueError, match="`per` must be one of"):
        fit_vector_scaling(model, before, counts, per="sample")
    with pytest.raises(ValueError, match="`class_counts` must be one count for each of 4"):
        fit_vector_scaling(model, before, ClassCounts([3, 2]))


def _linear(features):
    layer = nn.Linear(4, 4)
    with torch.no_grad():
        weight = torch.linalg.lstsq(features.features, features.logits).solution.T
        layer.weight.copy_(weight)
        layer.bias.zero_()
    return layer


def test_samples_that_are_all_right_do_not_make_a_model_sure():
    """Without an error there is no best temperature: the lower, the better, on these alone."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    logits = 4 * F.one_hot(labels, 3) + torch.rand(60, 3, generator=generator)
    few = Features(logits, logits, labels)
    model = nn.Linear(3, 3)
    with torch.no_grad():
        model.weight.copy_(torch.eye(3))
        model.bias.zero_()
    with pytest.warns(UserWarning, match="all 60 samples .* it stays 1"):
        assert fit_temperature(model, few).temperature == 1
    labels[0] = 1  # one that is wrong
    assert fit_temperature(model, Features(logits, logits, labels)).temperature > 0.1
