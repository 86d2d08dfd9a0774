"""Batches augmented at once equal torchvision's image by image."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

from ldam_plugins.data import LabelledImages
from ldam_plugins.data.in_memory import (
    CropFlip,
    InMemoryImages,
    RandomCropFlip,
    crop_flip,
    normalize,
)
from ldam_plugins.data.readers.base import FileSource
from ldam_plugins.data.readers.paths import find_files

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


# Augmentation


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


# Normalisation


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
        (lambda x: InMemoryImages(x.float(), torch.zeros(4).long()), TypeError, "`pixels`"),
        (lambda x: InMemoryImages(x, torch.zeros(4)), TypeError, "`labels` must be an int64"),
        (lambda x: InMemoryImages(x, torch.zeros(3).long()), ValueError, r"labels \(N,\) = \(3,"),
        (lambda x: InMemoryImages(x[:, :1], torch.zeros(4).long()), ValueError, r"\(4, 1, 5, 6\)"),
    ],
)
def test_bad_arguments(call, kind, message):
    with pytest.raises(kind, match=message):
        call(random_images(4, 3, 5, 6))


# InMemoryImages


@pytest.fixture
def files(tmp_path):
    pixels = random_images(150, 6, 5, 3).numpy()
    names = [f"{row}.png" for row in range(150)]
    for name, image in zip(names, pixels, strict=True):
        Image.fromarray(image).save(tmp_path / name)
    assert find_files(tmp_path, names, str) == names
    return LabelledImages(FileSource(tmp_path, names), np.arange(150) % 7, tuple("abcdefg"))


def test_pixels_are_those_of_the_files(files):
    held = InMemoryImages.from_images(files)
    assert held.pixels.shape == (150, 3, 6, 5)
    assert held.pixels.is_contiguous()
    assert held.class_names == files.class_names
    assert len(held) == 150
    for row in (0, 63, 64, 149):
        image, label = held[row]
        assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(files.image(row)))
        assert label == files.labels[row]
        assert type(label) is int
    moved = held.to("cpu")
    assert torch.equal(moved.pixels, held.pixels)
    part = InMemoryImages.from_images(files.subset([149, 3]))
    assert torch.equal(part.pixels, held.pixels[[149, 3]])


def test_resizing_is_bicubic(files):
    held = InMemoryImages.from_images(files, size=4)
    expected = files.image(9).resize((4, 4), Image.Resampling.BICUBIC)
    assert np.array_equal(held.pixels[9].permute(1, 2, 0).numpy(), np.asarray(expected))


def test_pixels_can_be_mapped_from_a_file(files, tmp_path):
    path = tmp_path / "pixels.npy"
    mapped = InMemoryImages.from_images(files, path=path)
    assert torch.equal(mapped.pixels, InMemoryImages.from_images(files).pixels)
    stored = np.load(path, mmap_mode="r+")
    assert np.array_equal(stored, mapped.pixels.numpy())
    stored[0] = 0
    assert mapped.pixels[0].sum() == 0
    with pytest.raises(FileExistsError, match=r"`path` must be .*pixels.npy"):
        InMemoryImages.from_images(files, path=path)


def test_what_cannot_be_held(files, tmp_path):
    Image.new("RGB", (7, 6)).save(tmp_path / "100.png")
    with pytest.raises(ValueError, match=r"100.png` must be of one size, got \(7, 6\).*\(5, 6\)"):
        InMemoryImages.from_images(files)
    assert len(InMemoryImages.from_images(files, size=5)) == 150
    (tmp_path / "80.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"80.png cannot be read .*--skip_corrupt"):
        InMemoryImages.from_images(files, size=5)
    with pytest.raises(ValueError, match="`size` must be an integer >= 1, got 0"):
        InMemoryImages.from_images(files, size=0)
    files.transform = transforms.ToTensor()
    with pytest.raises(TypeError, match=r"`images.transform` must be one that gives uint8"):
        InMemoryImages.from_images(files)
    with pytest.raises(ValueError, match=r"`size` must be None where images have a transform"):
        InMemoryImages.from_images(files, size=5)


def test_a_set_in_memory_is_what_its_files_give(files):
    files.transform = transforms.Compose(
        [transforms.Resize(4), transforms.CenterCrop(4), transforms.PILToTensor()]
    )
    held = InMemoryImages.from_images(files)
    assert held.pixels.shape == (150, 3, 4, 4)
    for row in (0, 77, 149):
        assert torch.equal(held.pixels[row], files[row][0])
        assert held.labels[row] == files[row][1]


def test_no_file_is_left_behind_by_a_failure(files, tmp_path):
    (tmp_path / "80.png").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"80\.png"):
        InMemoryImages.from_images(files, path=tmp_path / "pixels.npy")
    assert [path.suffix for path in tmp_path.iterdir() if path.suffix != ".png"] == []


@pytest.fixture
def held():
    return InMemoryImages(random_images(50, 3, 4, 4), torch.arange(50) % 5, "abcde")


def loader(dataset, **options):
    return torch.utils.data.DataLoader(dataset, 8, collate_fn=InMemoryImages.collate, **options)


def test_a_loader_fetches_whole_batches(held, monkeypatch):
    monkeypatch.setattr(InMemoryImages, "__getitem__", None)
    batches = list(loader(held, shuffle=True, generator=torch.Generator().manual_seed(0)))
    assert [len(labels) for _, labels in batches] == [8] * 6 + [2]
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert images.dtype == torch.uint8
    assert labels.dtype == torch.int64
    place = {image.numpy().tobytes(): row for row, image in enumerate(held.pixels)}
    rows = [place[image.numpy().tobytes()] for image in images]
    assert sorted(rows) == list(range(50))
    assert rows != sorted(rows)
    assert labels.tolist() == [row % 5 for row in rows]


def test_subsets_and_single_items_collate_alike(held):
    few = torch.utils.data.Subset(held, [7, 3, 5])
    images, labels = next(iter(loader(few)))
    assert torch.equal(images, held.pixels[[7, 3, 5]])
    assert labels.tolist() == [2, 3, 0]
    images, labels = InMemoryImages.collate([held[7], held[3]])
    assert torch.equal(images, held.pixels[[7, 3]])
    assert labels.tolist() == [2, 3]


def test_accelerate_changes_nothing(held):
    accelerate = pytest.importorskip("accelerate")
    plain = list(loader(held))
    prepared = accelerate.Accelerator(cpu=True).prepare(loader(held))
    for (images, labels), (expected, expected_labels) in zip(prepared, plain, strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(labels, expected_labels)


@pytest.mark.gpu
def test_the_device_does_not_matter(held):
    augment = RandomCropFlip(2)
    on_cpu = augment(held.pixels, torch.Generator().manual_seed(0))
    on_gpu = augment(held.to("cuda").pixels, torch.Generator().manual_seed(0))
    assert torch.equal(on_gpu.cpu(), on_cpu)
    images, labels = held.to("cuda").__getitems__([4, 2])
    assert torch.equal(images.cpu(), held.pixels[[4, 2]])
    assert labels.tolist() == [4, 2]
    close = normalize(on_gpu, MEAN, STD).cpu() - normalize(on_cpu, MEAN, STD)
    assert close.abs().max() < 1e-6
