"""What cross-fitting chooses: on simulated features the strength that is known to be best."""

import copy
import math

import numpy as np
import pytest
import torch
from frozen import bayes, draw, features_of, gaussians, long_tail
from torch import nn

from ldam_plugins import ClassCounts
from ldam_plugins.posthoc import rebalance_head
from ldam_plugins.posthoc.choice import Cells, pool_classes, stratified_folds
from ldam_plugins.posthoc.methods import AUTO

CHEAP = ("none", "logit_adjustment", "tau_norm", "class_means")
BEST = {
    "prior 0": ("none", None),
    "prior 0.5": ("logit_adjustment", 0.5),
    "prior 1": ("logit_adjustment", 1.0),
    "prior 1.5": ("logit_adjustment", 1.5),
    "norm 0.25": ("tau_norm", 1.0),
    "norm 0.5": ("tau_norm", 1.0),
}
"""Simulated heads by what was added to log p(x | c): some of the log prior, or to the length of
the rows: a power of the prior. What takes it out again is the best that there is."""


def simulated(kind, seed, samples):
    """The model, held-out features, the class counts, and a balanced test of 20,000 rows."""
    generator = torch.Generator().manual_seed(seed)
    word, amount = kind.split()
    means = gaussians(10, 16, generator, even=word == "norm")
    counts = long_tail(samples, 10, 100)
    prior = counts.prior(dtype=torch.float64)
    model = bayes(means, float(amount) * prior.log() if word == "prior" else 0.0)
    if word == "norm":  # means of one length need no bias
        with torch.no_grad():
            model[1].weight *= (prior / prior.max())[:, None] ** float(amount)
            model[1].bias.zero_()
    features = features_of(model, *draw(means, counts.counts, generator))
    return model, features, counts, draw(means, [2000] * 10, generator)


def accuracies(kind, seed, samples, **options):
    """Of the balanced test: as it is, with the known best, and as chosen; and the choice."""
    model, features, counts, (x, y) = simulated(kind, seed, samples)

    def accuracy():
        with torch.no_grad():
            return (model(x).argmax(1) == y).double().mean().item()

    before = accuracy()
    method, strength = BEST[kind]
    known = rebalance_head(model, features, counts, method, strength=strength)
    best = accuracy()
    known.undo()
    done = rebalance_head(model, features, counts, "auto", **options)
    return before, best, accuracy(), done


def check(rows, *, near=True):
    before, best, after = (np.array([row[index] for row in rows]) for index in range(3))
    assert (before - after).max() <= 0.005
    if near:
        assert np.mean(best - after <= 0.01) >= 0.95, best - after


@pytest.mark.parametrize("kind", BEST)
def test_auto_is_near_the_known_best(kind):
    rows = [accuracies(kind, seed, 1500, methods=CHEAP) for seed in range(2)]
    check(rows)
    assert all(row[3].choice.is_more_than_noise == (kind != "prior 0") for row in rows)


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", BEST)
def test_auto_on_twenty_seeds(kind):
    check([accuracies(kind, seed, 2000, methods=AUTO) for seed in range(20)])


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", BEST)
def test_auto_by_accuracy_on_twenty_seeds(kind):
    """The rarest class has eight samples: four points of accuracy may be noise, and it says so."""
    rows = [accuracies(kind, seed, 2000, methods=AUTO, by="accuracy") for seed in range(20)]
    check(rows, near=kind != "prior 0.5")


def test_noise_is_left_alone():
    # Features without a word on the class: whatever is learned is worth nothing.
    generator = torch.Generator().manual_seed(0)
    counts = ClassCounts([300, 100, 30])
    model = nn.Sequential(nn.Identity(), nn.Linear(8, 3))
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.zero_()
    x = torch.randn(430, 8, generator=generator)
    labels = torch.repeat_interleave(torch.arange(3), torch.tensor([300, 100, 30]))
    features = features_of(model, x, labels)
    done = rebalance_head(model, features, counts, "auto", methods=("crt", "class_means", "lws"))
    assert done.method == "none"
    assert not done.choice.is_more_than_noise
    assert "The head as it is has the best log loss" in done.choice.verdict() or "noise" in str(
        done
    )
    assert done.after["per_class_accuracy"] == done.before["per_class_accuracy"]


def test_a_strength_alone_is_chosen_without_asking_whether():
    model, features, counts, _ = simulated("prior 0", 0, 800)
    done = rebalance_head(model, features, counts, "logit_adjustment")
    assert (done.method, done.strength) == ("logit_adjustment", 0.25)
    assert len(done.choice.candidates) == 9
    assert done.choice.candidates[0].method == "none"


def test_the_target_prior_is_what_it_is_chosen_for():
    model, features, counts, _ = simulated("prior 1", 0, 1500)
    same = copy.deepcopy(model)
    done = rebalance_head(model, features, counts, "auto", target_prior="train", methods=CHEAP)
    assert done.method in ("none", "logit_adjustment")
    x = features.features
    assert torch.equal(model(x).argmax(1), same(x).argmax(1))


def test_folds_have_all_of_each_class_but_single_samples():
    labels = torch.tensor([0] * 23 + [1] * 7 + [2] * 2 + [3])
    folds = stratified_folds(labels, 5, seed=1)
    assert folds[-1] == -1
    sizes = torch.bincount(folds[:-1])
    assert sizes.max() - sizes.min() <= 1
    for label, count in ((0, 23), (1, 7), (2, 2)):
        found = torch.bincount(folds[labels == label], minlength=5)
        assert found.sum() == count
        assert found.max() - found.min() <= 1
    assert not torch.equal(folds, stratified_folds(labels, 5, seed=2))
    assert torch.equal(folds, stratified_folds(labels, 5, seed=1))


def test_classes_with_few_samples_are_pooled_by_group():
    counts = ClassCounts([500, 200, 50, 30, 8, 4, 2, 1])
    labels = torch.repeat_interleave(torch.arange(8), torch.tensor([50, 20, 12, 5, 4, 2, 1, 0]))
    target = torch.full((8,), 1 / 8, dtype=torch.float64)
    cells = pool_classes(labels, counts, target)
    assert cells.pooled == {"medium": [3], "few": [4, 5, 6, 7]}
    values = torch.arange(len(labels)).double()
    by_hand = sum(float(values[labels == label].mean()) / 8 for label in range(4))
    by_hand += float(values[labels >= 4].mean()) * 4 / 8  # seven samples stand for four classes
    assert cells.mean(values).value == pytest.approx(by_hand)
    assert float(cells.weights() @ values) == pytest.approx(by_hand)
    alone = pool_classes(labels[labels < 4], counts, target)  # no sample of the few is judged
    assert float(alone.share.sum()) == pytest.approx(1)


def test_the_interval_of_a_mean_over_classes():
    rng, held = np.random.default_rng(0), 0
    sizes, share = [40, 15, 12], torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    cell = torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    for _ in range(300):
        values = torch.from_numpy(rng.normal(size=67) * np.array([1.0, 2.0, 0.5])[cell.numpy()])
        _, low, high = Cells(cell, share, {}, torch.arange(3)).mean(values)
        held += low <= 0 <= high
    assert 0.9 < held / 300 < 0.99
    same = Cells(
        torch.zeros(20, dtype=torch.int64), torch.ones(1, dtype=torch.float64), {}, torch.zeros(1)
    )
    value, low, high = same.mean(torch.tensor([1.0, 3.0] * 10))
    assert value == 2
    assert high - low == pytest.approx(2 * 1.959964 * math.sqrt(20 / 19 / 20), rel=1e-5)
    # Two samples that are alike do not say that all are.
    few = torch.tensor([0] * 20 + [1] * 2)
    two = Cells(few, torch.tensor([0.0, 1.0], dtype=torch.float64), {}, torch.arange(2))
    values = torch.tensor([1.0, 3.0] * 10 + [5.0, 5.0])
    value, low, high = two.mean(values)
    assert value == 5
    assert high - low == pytest.approx(2 * 1.959964 * math.sqrt(float(values.var()) / 2), rel=1e-5)
