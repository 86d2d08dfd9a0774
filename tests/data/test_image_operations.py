"""Operations on whole batches equal torchvision's on single images, pixel for pixel."""

import pytest
import torch
from single_images import as_it_is, one_by_one
from sklearn.datasets import load_sample_images

from ldam_plugins.data.augment_policies import AutoAugment, RandAugment, TrivialAugmentWide
from ldam_plugins.data.image_operations import OPERATIONS, SIGNED, apply_operations

STRENGTHS = [policy().strength for policy in (RandAugment, AutoAugment, TrivialAugmentWide)]


def every_magnitude(name, height, width):
    """Those of all policies at all of their steps, with both signs."""
    place = OPERATIONS.index(name)
    amounts = torch.cat([each.magnitudes(height, width)[place] for each in STRENGTHS]).unique()
    return torch.cat([amounts, -amounts[amounts > 0]]) if name in SIGNED else amounts


def noise(rows, height, width):
    """Random images, each channel within limits of its own: dark ones, pale ones, one colour."""
    low, high = torch.randint(256, (2, rows, 3, 1, 1)).sort(0).values
    return (low + torch.rand(rows, 3, height, width) * (high - low + 1)).to(torch.uint8)


def photographs(rows, side):
    """Parts of two photographs."""
    pictures = [torch.from_numpy(image.copy()) for image in load_sample_images().images]
    pixels = torch.stack(pictures).permute(0, 3, 1, 2)
    tiles = pixels.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5)
    tiles = tiles.reshape(-1, 3, side, side)
    return tiles[torch.linspace(0, len(tiles) - 1, rows).long()]


@pytest.mark.parametrize("size", [(32, 32), (28, 28), (17, 33), (2, 5), (64, 48)], ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_is_that_of_torchvision(name, size):
    amounts = every_magnitude(name, *size).repeat(4 if name not in SIGNED else 1)
    operations = torch.full((len(amounts),), OPERATIONS.index(name))
    images = noise(len(amounts), *size)
    before = images.clone()
    found = apply_operations(images, operations, amounts)
    assert torch.equal(found, one_by_one(images, operations, amounts))
    assert torch.equal(images, before)
    assert found.dtype == torch.uint8


@pytest.mark.parametrize("side", [32, 64])
def test_mixed_operations_on_photographs(side):
    """All operations in one batch, in any order and memory layout."""
    pairs = [
        (OPERATIONS.index(name), amount)
        for name in OPERATIONS
        for amount in every_magnitude(name, side, side).tolist()[::4]
    ]
    pairs = [pairs[row] for row in torch.randperm(len(pairs)).tolist()]
    operations, amounts = torch.tensor([p for p, _ in pairs]), torch.tensor([m for _, m in pairs])
    images = photographs(len(pairs), side)
    expected = one_by_one(images, operations, amounts)
    assert torch.equal(apply_operations(images, operations, amounts), expected)
    other = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(apply_operations(other, operations, amounts), expected)


@pytest.mark.parametrize("size", [(32, 32), (17, 33)], ids=str)
@pytest.mark.parametrize("name", ["ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"])
def test_only_what_is_halfway_between_two_pixels_depends_on_the_cpu(name, size):
    amounts = every_magnitude(name, *size)
    operations = torch.full((len(amounts),), OPERATIONS.index(name))
    images = noise(len(amounts), *size)
    found = apply_operations(images, operations, amounts)
    nudged = torch.stack(
        [as_it_is(images, operations, amounts * factor) for factor in (1 - 1e-6, 1, 1 + 1e-6)]
    )
    assert (found == nudged).any(0).all()
    assert (found == nudged[1]).float().mean() > 0.98


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", OPERATIONS)
def test_each_operation_on_ten_thousand_images(name):
    images = torch.cat([noise(5000, 32, 32), photographs(5000, 32)])
    amounts = every_magnitude(name, 32, 32)
    amounts = amounts[torch.randint(len(amounts), (len(images),))]
    operations = torch.full((len(images),), OPERATIONS.index(name))
    found = apply_operations(images, operations, amounts)
    assert torch.equal(found, one_by_one(images, operations, amounts))


def test_an_empty_batch_stays_empty():
    images = torch.zeros(0, 3, 8, 8, dtype=torch.uint8)
    found = apply_operations(images, torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    assert found.shape == images.shape


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"images": torch.zeros(4, 3, 8, 8)}, TypeError, "`images` must be a uint8 tensor"),
        (
            {"images": torch.zeros(4, 1, 8, 8, dtype=torch.uint8)},
            ValueError,
            r"`images` must be of shape \(N, 3, H, W\), got \(4, 1, 8, 8\)\. Grey images",
        ),
        (
            {"images": torch.zeros(4, 4, 8, 8, dtype=torch.uint8)},
            ValueError,
            r"`images` must be of shape \(N, 3, H, W\), got \(4, 4, 8, 8\)",
        ),
        (
            {"operation": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"`operation` must be one for each of 4 images, got \(3,\)",
        ),
        ({"magnitude": torch.zeros(4, 2)}, ValueError, "`magnitude` must be one for each of 4"),
        ({"operation": torch.full((4,), 15)}, ValueError, "`operation` must be .*below 15, got 15"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_arguments(change, kind, message):
    usual = {
        "images": torch.zeros(4, 3, 8, 8, dtype=torch.uint8),
        "operation": torch.zeros(4, dtype=torch.int64),
        "magnitude": torch.zeros(4),
    }
    with pytest.raises(kind, match=message):
        apply_operations(**(usual | change))
