"""Remix mixes as timm does, and moves labels by the paper's rule."""

import numpy as np
import pytest
import torch
from timm.data import Mixup

from ldam_plugins import ClassCounts
from ldam_plugins.integrations.timm.mixup import Remix

COUNTS = ClassCounts([300, 100, 99, 5])


def batch(rows=12):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(rows, 3, 8, 8, generator=generator)
    return images, torch.randint(4, (rows,), generator=generator)


def share_by_the_rule(lam, own, other, kappa, tau):
    if own / other >= kappa and lam < tau:
        return 0.0
    if own / other <= 1 / kappa and 1 - lam < tau:
        return 1.0
    return lam


@pytest.mark.parametrize(("kappa", "tau"), [(3, 0.5), (1, 0.3), (20, 1)])
def test_labels_follow_the_rule(kappa, tau):
    remix = Remix(COUNTS, mixup=1, kappa=kappa, tau=tau)
    pairs = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    moved = 0
    for lam in (0.0, 0.2, 0.3, 0.499, 0.5, 0.501, 0.7, 0.8, 1.0):
        shares = torch.full((16,), lam, dtype=torch.float64)
        found = remix.label_shares(shares, *pairs.T)
        n = COUNTS.counts[pairs.numpy()]
        expected = [share_by_the_rule(lam, *pair, kappa, tau) for pair in n]
        assert found.tolist() == expected
        moved += int((found != shares).sum())
    assert moved >= 10


@pytest.mark.parametrize(
    "alphas", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}], ids=str
)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_images_are_those_of_timm_and_so_are_labels_of_even_classes(alphas, smoothing):
    mixup, cutmix = alphas.get("mixup", 0.0), alphas.get("cutmix", 0.0)
    stock = Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=4)
    differ = 0
    for seed in range(8):
        found = []
        even = Remix(ClassCounts([7] * 4), **alphas, smoothing=smoothing)
        for mix in (stock, even, Remix(COUNTS, **alphas, smoothing=smoothing)):
            np.random.seed(seed)
            found.append(mix(*batch()))
        (images, target), (same_images, same), (long_images, moved) = found
        assert torch.equal(images, same_images)
        assert torch.equal(images, long_images)
        torch.testing.assert_close(same, target)
        torch.testing.assert_close(moved.sum(1), torch.ones(12))
        differ += int(not torch.allclose(moved, target))
    assert differ > 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "`mixup` must be a finite number > 0, got 0.0"),
        ({"mixup": 1, "kappa": 0.5}, "`kappa` must be a finite number >= 1, got 0.5"),
        ({"mixup": 1, "tau": 2}, r"`tau` must be in \[0, 1\], got 2"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Remix(COUNTS, **options)
