"""Batches augmented at once equal torchvision's image by image."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torchvision import transforms
from torchvision.transforms import functional

from ldam_plugins.data.augment import CropFlip, RandomCropFlip, crop_flip, normalize

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def random_images(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, shape, dtype=torch.uint8, generator=generator)


def one_by_one(images, draws):
    out = []
    for row, image in enumerate(images):
        padded = functional.pad(image, [draws.padding] * 4)
        height, width = image.shape[1:]
        crop = functional.crop(padded, int(draws.top[row]), int(draws.left[row]), height, width)
        out.append(functional.hflip(crop) if draws.flip[row] else crop)
    return torch.stack(out)


@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 5, 9), (1, 9, 4)])
def test_every_offset_and_flip_equals_torchvision(padding, shape):
    places = range(2 * padding + 1)
    every = list(itertools.product(places, places, (False, True)))
    top, left, flip = (torch.tensor(column) for column in zip(*every, strict=True))
    draws = CropFlip(top, left, flip, padding)
    images = random_images(len(every), *shape)
    before = images.clone()
    augmented = draws.apply(images)
    assert augmented.dtype == torch.uint8
    assert augmented.is_contiguous()
    assert torch.equal(augmented, one_by_one(images, draws))
    assert torch.equal(images, before)


def test_random_batch_equals_torchvision_and_repeats():
    images = random_images(64, 3, 32, 32)
    augment = RandomCropFlip()
    draws = augment.draw(64, torch.Generator().manual_seed(7))
    expected = one_by_one(images, draws)
    assert torch.equal(augment(images, torch.Generator().manual_seed(7)), expected)
    strided = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(augment(strided, torch.Generator().manual_seed(7)), expected)
    assert not torch.equal(augment(images, torch.Generator().manual_seed(8)), expected)


def test_a_part_of_the_draws_fits_a_part_of_the_batch():
    images = random_images(30, 3, 8, 8)
    draws = RandomCropFlip(2).draw(30, torch.Generator().manual_seed(0))
    whole = draws.apply(images)
    parts = [draws[rows].apply(images[rows]) for rows in (slice(0, 7), slice(7, 30))]
    assert torch.equal(torch.cat(parts), whole)
    odd = torch.arange(1, 30, 2)
    assert torch.equal(draws[odd].apply(images[odd]), whole[odd])
    assert len(draws[odd]) == 15


def test_draws_are_uniform_and_independent():
    draws = RandomCropFlip(4, 0.25).draw(81_000, torch.Generator().manual_seed(0))
    cells = np.bincount((draws.top * 9 + draws.left).numpy(), minlength=81)
    assert len(cells) == 81
    # the 99.9 % point of chi-square with 80 degrees of freedom
    assert ((cells - 1000) ** 2 / 1000).sum() < 124.8
    for place in range(9):
        share = draws.flip[draws.top == place].double().mean().item()
        assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 9000) ** 0.5


def test_the_distribution_is_that_of_torchvision():
    """Each of the 18 outcomes of a 1 x 1 offset grid is as frequent as the transforms make it."""
    image = torch.arange(1, 10, dtype=torch.uint8).view(1, 3, 3).expand(3, 3, 3)
    outcomes = {}
    for top, left, flip in itertools.product(range(3), range(3), (False, True)):
        draws = CropFlip(torch.tensor([top]), torch.tensor([left]), torch.tensor([flip]), 1)
        outcomes[one_by_one(image[None], draws).numpy().tobytes()] = len(outcomes)
    assert len(outcomes) == 18
    theirs = transforms.Compose(
        [transforms.RandomCrop(3, padding=1), transforms.RandomHorizontalFlip(0.5)]
    )
    torch.manual_seed(0)
    drawn = [outcomes[theirs(image).numpy().tobytes()] for _ in range(3600)]
    batch = RandomCropFlip(1)(image.expand(3600, 3, 3, 3), torch.Generator().manual_seed(0))
    ours = [outcomes[one.numpy().tobytes()] for one in batch]
    for counts in (np.bincount(drawn, minlength=18), np.bincount(ours, minlength=18)):
        # the 99.9 % point of chi-square with 17 degrees of freedom
        assert ((counts - 200) ** 2 / 200).sum() < 40.8


@pytest.mark.parametrize("probability", [0, 1])
def test_flips_can_be_certain(probability):
    draws = RandomCropFlip(0, probability).draw(1000, torch.Generator().manual_seed(0))
    assert draws.flip.tolist() == [bool(probability)] * 1000


def test_crop_flip_compiles_to_one_graph_for_any_draws():
    images = random_images(8, 3, 8, 8)
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(crop_flip, backend=backend, fullgraph=True)
    for seed in range(3):
        draws = RandomCropFlip(2).draw(8, torch.Generator().manual_seed(seed))
        given = (images, draws.top, draws.left, draws.flip)
        assert torch.equal(compiled(*given, padding=2), draws.apply(images))
    assert len(graphs) == 1


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_normalize_equals_torchvision_for_every_value(memory_format):
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    theirs = transforms.Normalize(MEAN, STD)
    expected = torch.stack(
        [theirs(functional.to_tensor(image.permute(1, 2, 0).numpy())) for image in values]
    )
    ours = normalize(values, MEAN, STD, memory_format=memory_format)
    assert ours.dtype == torch.float32
    assert ours.is_contiguous(memory_format=memory_format)
    assert (ours - expected).abs().max() < 1e-6
    exact = (values.double() / 255 - torch.tensor(MEAN).double()[:, None, None]) / torch.tensor(
        STD
    ).double()[:, None, None]
    assert (ours - exact).abs().max() < 5e-7
    as_tensors = normalize(
        values, torch.tensor(MEAN), torch.tensor(STD), memory_format=memory_format
    )
    assert torch.equal(as_tensors, ours)


def test_normalize_rounds_once_to_half_precision():
    images = random_images(2, 3, 4, 4)
    full = normalize(images, MEAN, STD)
    assert torch.equal(normalize(images, MEAN, STD, dtype=torch.bfloat16), full.bfloat16())


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda x: normalize(x.float(), MEAN, STD), TypeError, "`images` must be a uint8 tensor"),
        (lambda x: normalize(x[0], MEAN, STD), ValueError, r"`images` must be of shape \(N, C"),
        (lambda x: normalize(x, MEAN[:2], STD), ValueError, "`mean` must be one value for each"),
        (lambda x: normalize(x, MEAN, (0.2,) * 4), ValueError, "`std` must be one value for each"),
        (lambda x: normalize(x, MEAN, (0.2, 0, 1)), ValueError, "`std` must be .*> 0, got 0"),
        (lambda x: normalize(x, MEAN, STD, dtype=torch.int8), TypeError, "`dtype` must be a fl"),
        (lambda x: RandomCropFlip(-1), ValueError, "`padding` must be an integer >= 0, got -1"),
        (lambda x: RandomCropFlip(1.0), TypeError, "`padding`"),
        (lambda x: RandomCropFlip(1, 1.5), ValueError, r"`flip_probability` must be in \[0, 1\]"),
        (lambda x: RandomCropFlip()(x.float(), torch.Generator()), TypeError, "uint8"),
        (
            lambda x: RandomCropFlip().draw(3, torch.Generator()).apply(x),
            ValueError,
            "`images` must be as many as the 3 draws, got 4",
        ),
    ],
)
def test_bad_arguments(call, kind, message):
    with pytest.raises(kind, match=message):
        call(random_images(4, 3, 5, 6))
