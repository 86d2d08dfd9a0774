"""Small images held in memory are those of their files, and are fetched a batch at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from ldam_plugins.data import LabelledImages
from ldam_plugins.data.augment import RandomCropFlip, normalize
from ldam_plugins.data.in_memory import InMemoryImages
from ldam_plugins.data.readers.base import FileSource
from ldam_plugins.data.readers.paths import find_files

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def random_images(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, shape, dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda x: InMemoryImages(x.float(), torch.zeros(4).long()), TypeError, "`pixels`"),
        (lambda x: InMemoryImages(x, torch.zeros(4)), TypeError, "`labels` must be an int64"),
        (lambda x: InMemoryImages(x, torch.zeros(3).long()), ValueError, r"labels \(N,\) = \(3,"),
        (lambda x: InMemoryImages(x[:, :1], torch.zeros(4).long()), ValueError, r"\(4, 1, 5, 6\)"),
    ],
)
def test_bad_arguments(call, kind, message):
    with pytest.raises(kind, match=message):
        call(random_images(4, 3, 5, 6))


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
