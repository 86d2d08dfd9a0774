"""Priors that are estimated, against closed forms and another solver."""

import numpy as np
import pytest
import torch
from frozen import bayes, draw, features_of, gaussians, long_tail
from scipy.optimize import minimize

from ldam_plugins import ClassCounts
from ldam_plugins.posthoc import (
    adjust_to_prior,
    adjusted_logits,
    estimate_prior,
    implied_prior,
)

EVEN = torch.full((5,), 0.2, dtype=torch.float64)
TRUE = np.array([0.05, 0.1, 0.15, 0.3, 0.4])


def simulated(counts, *, seed=0, log_prior=0.0, spread=1.0):
    """Logits and labels of a model that has learned ``log_prior``, with samples of some counts."""
    generator = torch.Generator().manual_seed(seed)
    means = spread * gaussians(5, 8, generator)
    x, y = draw(means, counts, generator)
    with torch.no_grad():
        return bayes(means, log_prior)(x), y


def test_two_kinds_of_samples_have_a_closed_form():
    # m_a samples with p(1 | a) = 0.9, m_b with p(1 | b) = 0.3, learned under shares of 0.6, 0.4.
    p, sizes, source = (0.9, 0.3), (37, 63), (0.6, 0.4)
    r = [[(1 - each) / source[0], each / source[1]] for each in p]
    d = [each[1] - each[0] for each in r]
    expected = -(sizes[0] * d[0] * r[1][0] + sizes[1] * d[1] * r[0][0])
    expected /= d[0] * d[1] * sum(sizes)
    assert 0 < expected < 1
    rows = [[np.log(1 - each), np.log(each)] for each in p]
    logits = torch.tensor([rows[0]] * sizes[0] + [rows[1]] * sizes[1], dtype=torch.float64)
    found = estimate_prior(logits, torch.tensor(source), tolerance=1e-15)
    assert found.prior.tolist() == pytest.approx([1 - expected, expected], abs=1e-6)
    # The variance of the share: the inverse of -d^2 log likelihood.
    share = float(found.prior[1])
    information = sum(
        m * (a / (b[0] + share * a)) ** 2 for m, a, b in zip(sizes, d, r, strict=True)
    )
    assert found.standard_error.tolist() == pytest.approx([information**-0.5] * 2, rel=1e-6)


def test_it_is_the_greatest_likelihood_by_another_solver():
    logits, _ = simulated((TRUE * 400).astype(int))
    found = estimate_prior(logits, EVEN, tolerance=1e-13)
    ratios = logits.double().softmax(1).numpy() / 0.2

    def objective(free):
        shares = np.exp(np.r_[free, 0.0])
        return -np.log(ratios @ (shares / shares.sum())).sum()

    best = minimize(objective, np.zeros(4), method="BFGS", options={"gtol": 1e-8}).x
    expected = np.exp(np.r_[best, 0.0])
    np.testing.assert_allclose(found.prior.numpy(), expected / expected.sum(), atol=1e-5)


def test_its_errors_are_as_large_as_it_says():
    off, rng = [], np.random.default_rng(0)
    for seed in range(30):
        logits, _ = simulated(rng.multinomial(600, TRUE), seed=seed, spread=1.5)
        found = estimate_prior(logits, EVEN)
        assert found.is_trusted, found.reasons
        off.append(((found.prior.numpy() - TRUE) / found.standard_error.numpy()) ** 2)
    assert 0.7 < np.mean(off) < 1.4


def test_too_few_samples_are_told():
    logits, _ = simulated((TRUE * 40).astype(int), spread=0.4)
    found = estimate_prior(logits, EVEN)
    assert not found.is_trusted
    assert "is not known" in found.reasons[0]
    assert "too few samples" in found.reasons[0]
    logits, _ = simulated((TRUE * 400).astype(int), spread=0.1)
    assert not estimate_prior(logits, EVEN).is_trusted
    logits, _ = simulated((TRUE * 400).astype(int), spread=2.0)
    cut = estimate_prior(logits, EVEN, max_iterations=2)
    assert cut.reasons == ("EM did not converge in 2 iterations",)
    assert cut.iterations == 2


def test_labelled_samples_show_what_is_wrong():
    target, _ = simulated((TRUE * 2000).astype(int))
    held_out = simulated([300] * 5, seed=1)
    assert estimate_prior(target, EVEN, held_out=held_out).is_trusted
    wrong_source = torch.tensor([0.6, 0.1, 0.1, 0.1, 0.1], dtype=torch.float64)
    found = estimate_prior(target, wrong_source, held_out=held_out)
    assert any("the same estimate is off by" in reason for reason in found.reasons)
    # Samples of none of the classes, which all look like one of them.
    strangers = torch.tensor([[0.0, 0.0, 0.4, 0.0, 0.0]]).repeat(1000, 1)
    found = estimate_prior(torch.cat([target, strangers]), EVEN, held_out=held_out)
    assert any("more than the shares has changed" in reason for reason in found.reasons)


@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_the_prior_that_a_model_has_learned(factor):
    counts = long_tail(4000, 5, 20)
    learned = counts.prior(dtype=torch.float64) ** 0.4  # as of weights that go half of the way
    learned /= learned.sum()
    logits, labels = simulated(counts.counts, log_prior=learned.log())
    found = implied_prior(factor * logits, labels)
    assert found.temperature == pytest.approx(factor, rel=0.1)
    np.testing.assert_allclose(found.prior.log().numpy(), learned.log().numpy(), atol=0.35)
    # At the optimum the probabilities of each class sum to its samples.
    shares = torch.tensor(counts.counts / counts.counts.sum())
    even = factor * logits.double() / found.temperature + shares.log() - found.prior.log()
    sums = even.softmax(1).sum(0)
    np.testing.assert_allclose(sums.numpy(), counts.counts, rtol=1e-4)


def test_a_model_is_moved_to_the_prior_of_unlabelled_samples():
    generator = torch.Generator().manual_seed(0)
    means = gaussians(5, 8, generator)
    counts = long_tail(1000, 5, 20)
    source = counts.prior(dtype=torch.float64)
    model = bayes(means, source.log())
    x, y = draw(means, (TRUE * 2000).astype(int), generator)
    target = features_of(model, x, y)
    held_out = features_of(model, *draw(means, counts.counts, generator))
    before = (model(x).argmax(1) == y).double().mean()
    expected = adjusted_logits(target.logits, counts, target.logits)
    adjust_to_prior(model, counts, target, held_out=held_out)
    torch.testing.assert_close(model(x).detach(), expected, rtol=1e-5, atol=1e-5)
    assert (model(x).argmax(1) == y).double().mean() > before + 0.03
    few = features_of(model, x[:20], y[:20])
    with pytest.warns(UserWarning, match="estimated class shares cannot be trusted: the share of"):
        adjust_to_prior(model, [0.2] * 5, few)


def test_the_train_prior_is_that_of_counts():
    logits = torch.randn(4, 2)
    assert torch.equal(adjusted_logits(logits, ClassCounts([9, 1]), "train"), logits)
    with pytest.raises(ValueError, match="`target_prior` must be other than 'train'"):
        adjusted_logits(logits, [0.9, 0.1], "train")


def test_bad_input_is_named():
    logits, labels = simulated([5] * 5)
    with pytest.raises(ValueError, match=r"`logits` must be of shape \(N, 5\)"):
        estimate_prior(logits[:, :4], EVEN)
    with pytest.raises(ValueError, match=r"`logits` must be of shape \(N, 5\)"):
        estimate_prior(logits[:0], EVEN)
    with pytest.raises(TypeError, match="`logits` must be a floating-point tensor"):
        estimate_prior(logits.long(), EVEN)
    bad = logits.clone()
    bad[3, 1] = torch.nan
    with pytest.raises(ValueError, match="`logits` must be finite, got 'NaN or infinity in row 3"):
        estimate_prior(bad, EVEN)
    with pytest.raises(ValueError, match="`held_out` must be one label for each of 25 rows"):
        estimate_prior(logits, EVEN, held_out=(logits, labels[:3]))
    with pytest.raises(ValueError, match="those of every class, got 'none of class 4'"):
        implied_prior(logits[:20], labels[:20])
    with pytest.raises(ValueError, match="one for each of 25 rows"):
        implied_prior(logits, labels[:3])
