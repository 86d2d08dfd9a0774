"""Each method against its closed form or another solver, in float64."""

import math

import numpy as np
import pytest
import torch
from frozen import draw, gaussians, long_tail
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestCentroid
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from ldam_plugins import list_losses
from ldam_plugins.heads.layers import CosineLinear
from ldam_plugins.losses import create_loss
from ldam_plugins.posthoc import METHODS, fit_head
from ldam_plugins.posthoc.methods import AUTO, Affine, Problem, best_temperature, even_weights

COUNTS = long_tail(300, 4, 20)
TARGET = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
EVEN = torch.full((4,), 0.25, dtype=torch.float64)


def problem(target=EVEN, **changes):
    generator = torch.Generator().manual_seed(0)
    means = gaussians(4, 6, generator)
    x, y = draw(means, COUNTS.counts, generator)
    head = Affine(torch.randn(4, 6, generator=generator).double(), torch.arange(4.0).double())
    given = {"source": COUNTS.prior(dtype=torch.float64), "target": target}
    return Problem(**{"head": head, "features": x, "labels": y, **given, **changes})


def apply(name, strength, given):
    return METHODS[name].apply(given, strength)


def test_every_loss_is_a_method():
    assert set(list_losses()) <= set(METHODS)
    assert set(AUTO) <= set(METHODS)


@pytest.mark.parametrize("target", [EVEN, TARGET])
@pytest.mark.parametrize("tau", [0.0, 0.7, 1.5])
def test_logit_adjustment(tau, target):
    given = problem(target)
    weight, bias = apply("logit_adjustment", tau, given)
    assert torch.equal(weight, given.head.weight)
    for index, (old, new) in enumerate(zip(given.head.bias.tolist(), bias.tolist(), strict=True)):
        share = COUNTS.counts[index] / COUNTS.counts.sum()
        expected = old - tau * math.log(share / float(target[index]))
        assert new == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
def test_tau_norm(tau):
    given = problem()
    weight, bias = apply("tau_norm", tau, given)
    rows = given.head.weight.tolist()
    for row, new in zip(rows, weight.tolist(), strict=True):
        length = math.sqrt(math.fsum(value * value for value in row))
        assert new == pytest.approx([value / length**tau for value in row], rel=1e-12)
    assert not bias.any()


def test_a_row_of_zeros_stays_one():
    given = problem()
    given.head.weight[1] = 0
    assert not apply("tau_norm", 1.0, given).weight[1].any()


@pytest.mark.parametrize("strength", [1e-3, 0.03, 1.0])
def test_crt_is_the_optimum_scikit_learn_finds(strength):
    given = problem(tolerance=1e-9)
    found = apply("crt", strength, given).logits(given.features).double().softmax(1)
    oracle = make_pipeline(
        StandardScaler(),
        LogisticRegression(C=strength, class_weight="balanced", tol=1e-10, max_iter=10_000),
    )
    x = given.features.double().numpy()
    expected = oracle.fit(x, given.labels.numpy()).predict_proba(x)
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-5)


def test_ce_is_the_optimum_without_weights_less_the_prior():
    given = problem(TARGET, tolerance=1e-9)
    found = apply("ce", 0.1, given).logits(given.features).double().softmax(1).numpy()
    x = StandardScaler().fit_transform(given.features.double().numpy())
    oracle = LogisticRegression(C=0.1, tol=1e-10, max_iter=10_000).fit(x, given.labels.numpy())
    expected = oracle.predict_proba(x) * TARGET.numpy() / (COUNTS.counts / COUNTS.counts.sum())
    expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_lws_is_the_optimum_of_another_solver():
    given = problem(tolerance=1e-6)
    weight, bias = apply("lws", 0.05, given)
    logits = given.head.logits(given.features).double().numpy()
    labels, weights = given.labels.numpy(), even_weights(given.labels).numpy()

    def objective(scales):
        scaled = logits * scales
        chosen = scaled[np.arange(len(labels)), labels]
        loss = weights @ (np.log(np.exp(scaled).sum(axis=1)) - chosen)
        return 0.05 * len(labels) * loss + ((scales - 1) ** 2).sum() / 2

    found = minimize(objective, np.ones(4), method="Nelder-Mead", tol=1e-10)
    scales = (weight / given.head.weight).mean(dim=1)
    np.testing.assert_allclose(scales.numpy(), found.x, atol=1e-4)
    torch.testing.assert_close(bias, scales * given.head.bias)
    torch.testing.assert_close(weight, scales[:, None] * given.head.weight)


def test_class_means_without_a_metric_are_the_nearest_centroid():
    given = problem()
    found = apply("class_means", 1.0, given).logits(given.features).argmax(1)
    oracle = NearestCentroid().fit(given.features.numpy(), given.labels.numpy())
    assert found.tolist() == oracle.predict(given.features.numpy()).tolist()


def test_class_means_with_the_whole_metric_are_linear_discriminants():
    given = problem()
    found = apply("class_means", 1e-9, given).logits(given.features).double().softmax(1)
    x, y = given.features.double().numpy(), given.labels.numpy()
    means = np.stack([x[y == label].mean(axis=0) for label in range(4)])
    covariance = (x - means[y]).T @ (x - means[y]) / (len(x) - 4)
    expected = [multivariate_normal(mean, covariance).logpdf(x) for mean in means]
    shares = torch.from_numpy(np.stack(expected, axis=1)).softmax(1)
    torch.testing.assert_close(found, shares, rtol=0, atol=1e-5)


def test_cosine_means_have_the_smallest_angle():
    given = problem()
    found = apply("cosine_means", None, given).logits(given.features).argmax(1)
    x = given.features.double().numpy()
    means = np.stack([x[given.labels == label].mean(axis=0) for label in range(4)])
    cosines = x @ (means / np.linalg.norm(means, axis=1, keepdims=True)).T
    assert found.tolist() == cosines.argmax(axis=1).tolist()


@pytest.mark.parametrize("name", ["tau_norm", "cosine_means"])
def test_logits_without_a_unit_are_scaled_before_the_prior_moves(name):
    strength = 1.0 if name == "tau_norm" else None
    even, moved = (apply(name, strength, problem(target)) for target in (EVEN, TARGET))
    logits = even.logits(problem().features)
    scale = 1 / best_temperature(logits, problem().labels, even_weights(problem().labels))
    torch.testing.assert_close(moved.weight, even.weight * scale)
    torch.testing.assert_close(moved.bias, even.bias * scale + (4 * TARGET).log())


SMOOTH = {"lws", "crt", "class_means", "ce", *list_losses()} - {"hinge", "ldam_hinge"}


@pytest.mark.parametrize("name", sorted(SMOOTH))
def test_another_target_prior_is_a_shift_of_the_bias(name):
    strength = METHODS[name].strengths(300)[0]
    even, moved = (apply(name, strength, problem(target)) for target in (EVEN, TARGET))
    torch.testing.assert_close(moved.weight, even.weight)
    shift = moved.bias - even.bias
    torch.testing.assert_close(shift - shift[0], TARGET.log() - TARGET[0].log())


def test_a_cosine_head_of_a_loss_keeps_its_predictions():
    given = problem(COUNTS.prior(dtype=torch.float64))  # the prior stays: no shift of the bias
    found = apply("ldam", 0.3, given)
    criterion = create_loss("ldam", COUNTS, max_margin=0.3)
    layer = fit_head(given.features, given.labels, criterion).layer
    assert isinstance(layer, CosineLinear)
    assert torch.equal(found.logits(given.features).argmax(1), layer(given.features).argmax(1))


@pytest.mark.parametrize("seed", range(3))
def test_temperature_against_a_grid(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(200, 4, generator=generator)
    labels = torch.randint(4, (200,), generator=generator)
    labels[::2] = logits[::2].argmax(1)
    weights = even_weights(labels)
    grid = np.exp(np.linspace(-3, 4, 70_001))
    losses = [
        float(weights[:, None].T @ -(logits.double() / t).log_softmax(1).gather(1, labels[:, None]))
        for t in grid[::100]
    ]
    near = int(np.argmin(losses)) * 100
    close = grid[max(near - 100, 0) : near + 101]
    fine = [
        float(weights @ -(logits.double() / t).log_softmax(1).gather(1, labels[:, None])[:, 0])
        for t in close
    ]
    expected = close[int(np.argmin(fine))]
    assert best_temperature(logits, labels, weights) == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize(
    ("name", "strength", "message"),
    [
        ("crt", 0.0, "`strength` must be a finite number > 0"),
        ("tau_norm", -1.0, "`strength` must be a finite number >= 0"),
        ("class_means", 1.5, r"`strength` must be in \(0, 1\]"),
        ("cosine_means", 1.0, "`strength` must be left out: the method has none"),
        ("none", 1.0, "`strength` must be left out"),
    ],
)
def test_strengths_out_of_bounds(name, strength, message):
    with pytest.raises(ValueError, match=message):
        METHODS[name].check_strength(strength)
