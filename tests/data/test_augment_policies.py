"""Policies draw what torchvision's do, as often, and do the same to a batch as to its parts."""

import collections
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from single_images import one_by_one
from torchvision import transforms
from torchvision.transforms import AutoAugmentPolicy, autoaugment

from ldam_plugins.choices import NONE
from ldam_plugins.choices import POLICIES as WORDS
from ldam_plugins.data.augment_policies import (
    CIFAR10_PAIRS,
    POLICIES,
    AutoAugment,
    PolicyDraws,
    RandAugment,
    TrivialAugmentWide,
    create_policy,
)
from ldam_plugins.data.image_operations import OPERATIONS, SIGNED

PAIRS = {
    "RandAugment": (RandAugment(), transforms.RandAugment()),
    "RandAugment, three strong ones": (RandAugment(3, 4, 5), transforms.RandAugment(3, 4, 5)),
    "AutoAugment": (AutoAugment(), transforms.AutoAugment(AutoAugmentPolicy.CIFAR10)),
    "TrivialAugment": (TrivialAugmentWide(), transforms.TrivialAugmentWide()),
    "TrivialAugment, few steps": (TrivialAugmentWide(4), transforms.TrivialAugmentWide(4)),
}
EACH = pytest.mark.parametrize("policy", [ours for ours, _ in PAIRS.values()], ids=list(PAIRS))


def pictures(rows, height=12, width=20):
    return torch.randint(256, (rows, 3, height, width), dtype=torch.uint8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def applied(operations, amounts):
    """What an image went through; what does nothing by its name is left out."""
    return tuple(
        (name, round(amount, 4) + 0.0)
        for name, amount in zip(operations, amounts, strict=True)
        if name != "Identity"
    )


def ours_of(policy, images):
    """What each image goes through, and what becomes of it."""
    draws = policy.draw(len(images), seeded())
    names = [[OPERATIONS[place] for place in row] for row in draws.operation.tolist()]
    amounts = draws.magnitude(*images.shape[2:]).tolist()
    return list(map(applied, names, amounts)), draws.apply(images)


def theirs_of(policy, images, monkeypatch):
    apply_op, seen, results = autoaugment._apply_op, [], []

    def noted(image, name, magnitude, **options):
        seen[-1].append((name, magnitude))
        return apply_op(image, name, magnitude, **options)

    monkeypatch.setattr(autoaugment, "_apply_op", noted)
    for image in images:
        seen.append([])
        results.append(policy(image))
    through = [applied([name for name, _ in one], [size for _, size in one]) for one in seen]
    return through, torch.stack(results)


def same_frequencies(first, second):
    """The p-value of that both samples are of one distribution; rare outcomes count as one."""
    counts = [collections.Counter(sample) for sample in (first, second)]
    table = np.array([[count[key] for count in counts] for key in sorted({*first, *second})])
    rare = table.sum(1) < 20
    table = np.vstack([table[~rare], table[rare].sum(0, keepdims=True) + 1])
    return stats.chi2_contingency(table).pvalue


@pytest.mark.parametrize("rows", [1000, pytest.param(10_000, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", PAIRS)
def test_the_distribution_is_that_of_torchvision(name, rows, monkeypatch):
    ours, theirs = PAIRS[name]
    images = pictures(rows)
    found, changed = ours_of(ours, images)
    expected, changed_by_theirs = theirs_of(theirs, images, monkeypatch)
    assert same_frequencies(found, expected) > 1e-3
    assert same_frequencies(sum(found, ()), sum(expected, ())) > 1e-3
    for operation in OPERATIONS:
        sizes = [
            [size for row in rows for name, size in row if name == operation]
            for rows in (found, expected)
        ]
        if min(map(len, sizes)) >= 30:
            spread = np.hypot(*(np.std(each) / len(each) ** 0.5 for each in sizes))
            assert abs(np.mean(sizes[0]) - np.mean(sizes[1])) <= 4.5 * spread + 1e-9
    values = [batch.double().flatten(1) for batch in (changed, changed_by_theirs)]
    for moment in (lambda x: x.mean(1), lambda x: x.std(1), lambda x: (x == 0).double().mean(1)):
        assert stats.ttest_ind(*map(moment, values)).pvalue > 1e-3


def test_the_pairs_of_auto_augment_are_those_of_torchvision():
    theirs = transforms.AutoAugment(AutoAugmentPolicy.CIFAR10).policies
    assert [[(name, p, level or 0) for name, p, level in pair] for pair in theirs] == [
        [*pair] for pair in CIFAR10_PAIRS
    ]


@pytest.mark.parametrize("name", PAIRS)
def test_steps_have_the_magnitudes_of_torchvision(name):
    ours, theirs = PAIRS[name]
    bins = ours.strength.bins
    size = () if isinstance(ours, TrivialAugmentWide) else ((48, 33),)
    space = theirs._augmentation_space(bins, *size)
    for operation, row in zip(OPERATIONS, ours.strength.magnitudes(48, 33), strict=True):
        if operation in space:
            magnitudes, signed = space[operation]
            assert torch.equal(row, magnitudes.float().expand(bins))
            assert signed == (operation in SIGNED)


@EACH
def test_each_image_gets_its_operations_one_after_the_other(policy):
    images = expected = pictures(60)
    draws = policy.draw(60, seeded())
    magnitude = draws.magnitude(*images.shape[2:])
    for step in range(draws.operation.shape[1]):
        expected = one_by_one(expected, draws.operation[:, step], magnitude[:, step])
    assert torch.equal(draws.apply(images), expected)


@EACH
def test_a_part_of_the_draws_fits_a_part_of_the_batch(policy):
    images = pictures(50)
    draws = policy.draw(50, seeded())
    whole = draws.apply(images)
    parts = [draws[rows].apply(images[rows]) for rows in (slice(0, 7), slice(7, 50))]
    assert torch.equal(torch.cat(parts), whole)
    odd = torch.arange(1, 50, 2)
    assert torch.equal(draws[odd].apply(images[odd]), whole[odd])
    assert len(draws[odd]) == 25


@EACH
def test_a_generator_repeats_its_augmentation(policy):
    images = pictures(64)
    before = images.clone()
    first = policy(images, seeded(3))
    assert torch.equal(policy(images, seeded(3)), first)
    assert not torch.equal(policy(images, seeded(4)), first)
    assert torch.equal(images, before)


def test_rand_augment_without_operations_does_nothing():
    images = pictures(5)
    assert torch.equal(RandAugment(0)(images, seeded()), images)


def test_policies_have_their_words():
    assert (NONE, *POLICIES) == WORDS
    assert [type(create_policy(word)) for word in POLICIES] == [*POLICIES.values()]


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: RandAugment(-1), ValueError, "`num_ops` must be an integer >= 0, got -1"),
        (lambda: RandAugment(magnitude=31), ValueError, "`magnitude` must be .* <= 30, got 31"),
        (lambda: RandAugment(magnitude=9.0), TypeError, "`magnitude` must be an integer"),
        (lambda: TrivialAugmentWide(1), ValueError, "`num_magnitude_bins` must be .* >= 2, got 1"),
        (lambda: create_policy("randaug"), ValueError, "`policy` .*Did you mean 'randaugment'"),
        (
            lambda: RandAugment()(torch.zeros(2, 1, 8, 8, dtype=torch.uint8), seeded()),
            ValueError,
            r"`images` must be of shape \(N, 3, H, W\), got \(2, 1, 8, 8\)",
        ),
        (lambda: AutoAugment()(torch.zeros(2, 3, 8, 8), seeded()), TypeError, "uint8"),
        (
            lambda: AutoAugment().draw(3, seeded()).apply(pictures(4)),
            ValueError,
            "`images` must be as many as the 3 draws, got 4",
        ),
        (
            lambda: AutoAugment().draw(3, SimpleNamespace(device=torch.device("cuda"))),
            ValueError,
            "`generator` must be on the CPU, got 'cuda'",
        ),
    ],
)
def test_bad_arguments(call, kind, message):
    with pytest.raises(kind, match=message):
        call()


def test_draws_keep_what_they_are_of():
    draws = TrivialAugmentWide().draw(9, seeded())
    assert isinstance(draws[:4], PolicyDraws)
    assert draws[:4].strength == draws.strength
