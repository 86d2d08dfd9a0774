"""Every layout gives the same six and four images."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path

import datasets
import numpy as np
import pytest
import sklearn.datasets
import torch
from image_sets import (
    CLASSES,
    TEST,
    TRAIN,
    class_folders,
    hub_layout,
    inaturalist,
    inaturalist_named,
    lists,
    picture,
    png,
    saved_to_disk,
    table,
    tiny_imagenet,
    write,
)
from PIL import Image

from ldam_plugins.data import LabelledImages, load_images, map_in_threads
from ldam_plugins.image_sources import ArraySource, FileSource, decode_image

CIFAR10 = Path(__file__).parents[2] / "shared" / "data" / "cifar10"

LAYOUTS = {
    "class folders": class_folders,
    "lists": lists,
    "inaturalist": inaturalist,
    "inaturalist, files named": inaturalist_named,
    "inaturalist, no categories": lambda root: inaturalist(root, categories=False),
    "tiny imagenet": tiny_imagenet,
    "hub layout": hub_layout,
    "hub layout, validation": lambda root: hub_layout(root, test="validation"),
    "saved, other columns": lambda root: saved_to_disk(root, image="image", label="fine_label"),
    "saved, integers": lambda root: (
        saved_to_disk(root, feature=datasets.Value("int64")) | {"label_column": "label"}
    ),
    "saved, strings": lambda root: (
        saved_to_disk(root, feature=datasets.Value("string")) | {"label_column": "label"}
    ),
    "saved to disk": saved_to_disk,
}
NAMES = {
    "lists": ("0", "1", "2"),
    "inaturalist, no categories": ("3", "10", "17"),
    "tiny imagenet": ("ant (n01)", "bee (n02)", "cat (n03)"),
    "saved, integers": ("0", "1", "2"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_images(layout, tmp_path):
    train, test = load_images(**LAYOUTS[layout](tmp_path / "set"))
    for images, split, labels in ((train, "train", TRAIN), (test, "test", TEST)):
        assert images.labels.dtype == np.int64
        assert images.labels.tolist() == list(labels)
        assert images.class_names == NAMES.get(layout, CLASSES)
        assert len(images) == len(labels)
        for row, label in enumerate(labels):
            image, got = images[row]
            assert got == label
            assert type(got) is int
            assert image.mode == "RGB"
            assert np.array_equal(np.asarray(image), np.asarray(picture(split, row)))


def test_places_are_named(tmp_path):
    train, _ = load_images(**class_folders(tmp_path / "a"))
    assert train.describe(3) == str(tmp_path / "a" / "train" / "bee" / "3.png")
    _, test = load_images(**hub_layout(tmp_path / "b"))
    assert test.describe(3) == "row 3 of split test"
    assert test.subset([3, 1]).describe(1) == "row 1 of split test"


def test_labels_need_no_pixels(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("decoded")

    given = hub_layout(tmp_path / "set")
    monkeypatch.setattr("ldam_plugins.image_sources.decode_image", refuse)
    monkeypatch.setattr(datasets.Image, "decode_example", refuse)
    train, _ = load_images(**given)
    assert train.labels.tolist() == list(TRAIN)
    with pytest.raises(ValueError, match="decoded"):
        train[0]


def test_fine_label_of_two_class_columns(tmp_path):
    made = {}
    for split in ("train", "test"):
        rows = table(split, label="fine_label")
        coarse = datasets.ClassLabel(names=["all"])
        made[split] = rows.add_column("coarse_label", [0] * len(rows), feature=coarse)
    datasets.DatasetDict(made).save_to_disk(str(tmp_path))
    assert load_images(tmp_path)[0].class_names == CLASSES
    assert load_images(tmp_path, label_column="coarse_label")[0].class_names == ("all",)


def test_a_test_folder_is_preferred_and_any_can_be_named(tmp_path):
    class_folders(tmp_path, test="val")
    write(tmp_path / "test" / "ant" / "0.png", png("test", 0))
    write(tmp_path / "train" / "ant" / ".hidden.png", "not an image")
    with pytest.raises(ValueError, match="'bee', 'cat'"):
        load_images(tmp_path)
    train, test = load_images(tmp_path, test_split="val")
    assert len(train) == len(TRAIN)
    assert test.labels.tolist() == list(TEST)


def test_byte_order_mark_tabs_and_windows_ends(tmp_path):
    given = lists(tmp_path)
    text = (tmp_path / "train.txt").read_text()
    text = text.replace(" ", "\t").replace("\n", "\r\n") + "\r\n"
    write(tmp_path / "train.txt", b"\xef\xbb\xbf" + text.encode())
    train, _ = load_images(**given)
    assert train.labels.tolist() == list(TRAIN)
    assert train.find_corrupt() == []


def test_digits_are_balanced_disjoint_and_the_same_every_time():
    digits = sklearn.datasets.load_digits()
    known = {image.tobytes(): label for image, label in zip(digits.images, digits.target)}  # noqa: B905
    train, test = load_images("digits")
    assert np.bincount(train.labels).tolist() == [120] * 10
    assert np.bincount(test.labels).tolist() == [54] * 10
    seen = set()
    for images in (train, test):
        for row in range(len(images)):
            image, label = images[row]
            grey = np.asarray(image)[:, :, 0] * (16 / 255)
            assert known[grey.round().tobytes()] == label
            seen.add(grey.round().tobytes())
    assert len(seen) == len(train) + len(test)
    assert train.labels[:12].tolist() == load_images("digits")[0].labels[:12].tolist()
    assert train.labels[:6].tolist() == [0, 2, 3, 5, 6, 7]  # the same on every machine


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="the shared copy of CIFAR-10 is not here")
def test_cifar10():
    train, test = load_images(CIFAR10)
    assert np.bincount(train.labels).tolist() == [5000] * 10
    assert np.bincount(test.labels).tolist() == [1000] * 10
    assert train.class_names[:2] == ("airplane", "automobile")
    assert train[49999][0].size == (32, 32)


# Pixels


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16"])
def test_every_mode_becomes_rgb(mode, tmp_path):
    value = 255 if mode == "1" else 180
    image = Image.new("RGB", (4, 3), (value,) * 3)
    if mode == "I;16":
        image = Image.fromarray(np.full((3, 4), value * 257, dtype=np.uint16))
    else:
        image = image.convert(mode, palette=Image.Palette.ADAPTIVE)
    options = {"transparency": bytes([0, 9])} if mode == "P" else {}
    file = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png")
    image.save(file, **options)
    with Image.open(file) as stored:
        assert stored.mode == mode
    decoded = decode_image(str(file))
    assert decoded.mode == "RGB"
    assert np.asarray(decoded).shape == (3, 4, 3)
    # the conversion to YCbCr itself rounds
    assert np.abs(np.asarray(decoded).astype(int) - value).max() <= (mode == "YCbCr")


def test_pixels_of_undefined_range_are_refused(tmp_path):
    Image.new("F", (4, 3), 0.5).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="mode 'F'"):
        decode_image(str(tmp_path / "a.tif"))


@pytest.mark.parametrize("kind", ["eps", "pcx"])
def test_only_usual_formats_are_opened(kind, tmp_path):
    """Pillow knows more of them, and hands EPS to another program."""
    Image.new("RGB", (4, 3)).save(tmp_path / f"a.{kind}")
    (tmp_path / f"a.{kind}").rename(tmp_path / "a.jpg")
    images = LabelledImages(FileSource(tmp_path, ["a.jpg"]), [0], ("a",))
    with pytest.raises(ValueError, match=r"a\.jpg cannot be read .*cannot identify"):
        images[0]


# LabelledImages


@pytest.fixture
def damaged(tmp_path):
    for row in range(150):
        write(tmp_path / f"{row}.png", png("train", 0))
    write(tmp_path / "3.png", png("train", 0)[:40])
    write(tmp_path / "70.png", b"")
    write(tmp_path / "149.png", "text")
    names = [f"{row}.png" for row in range(150)]
    return LabelledImages(FileSource(tmp_path, names), np.arange(150) % 3, CLASSES)


def test_corrupt_images_are_named_found_and_left_out(damaged, capsys):
    with pytest.raises(ValueError, match=r"/3\.png cannot be read .*--skip_corrupt"):
        damaged[3]
    assert damaged.find_corrupt() == [3, 70, 149]
    assert capsys.readouterr().err == ""
    assert damaged.find_corrupt(progress=True) == [3, 70, 149]
    assert "3/3" in capsys.readouterr().err
    left = damaged.without([3, 70, 149])
    assert len(left) == 147
    assert left.find_corrupt() == []
    assert left.labels.tolist() == [r % 3 for r in range(150) if r not in (3, 70, 149)]
    assert left.describe(3).endswith("/4.png")
    assert damaged.subset([70, 4]).find_corrupt() == [0]


def test_exhausted_machine_is_no_corrupt_image():
    class Source(ArraySource):
        def read(self, row):
            raise OSError(errno.EMFILE, "Too many open files")

    images = LabelledImages(Source(np.zeros((2, 3, 3), np.uint8), "x"), [0, 0], ("a",))
    with pytest.raises(OSError, match="Too many open files"):
        images.find_corrupt()


def test_subset_transform_and_workers():
    source = ArraySource(np.arange(6, dtype=np.uint8).reshape(6, 1, 1).repeat(4, 1), "x")
    images = LabelledImages(source, np.array([0, 1, 0, 1, 0, 1]), ("a", "b"))
    images.transform = lambda image: image.size
    assert images[0] == ((1, 4), 0)
    few = images.subset(np.array([5, 0, 5]))
    assert few.transform is images.transform
    assert few.labels.tolist() == [1, 0, 1]
    assert few.subset([1]).image(0).getpixel((0, 0)) == (0, 0, 0)
    assert few.image(-1).getpixel((0, 0)) == (5, 5, 5)
    few.transform = _to_tensor
    again = pickle.loads(pickle.dumps(few))
    batch, labels = next(iter(torch.utils.data.DataLoader(again, batch_size=3)))
    assert batch[:, 0, 0, 0].tolist() == [5, 0, 5]
    assert labels.tolist() == [1, 0, 1]
    with pytest.raises(IndexError):
        few[3]
    assert len(list(few)) == 3
    with pytest.raises(ValueError, match="read-only"):
        few.labels[0] = 0


def _to_tensor(image):
    return torch.from_numpy(np.asarray(image).copy())


@pytest.mark.parametrize(
    ("indices", "kind", "message"),
    [
        ([0, 2], ValueError, r"indices.max\(\).* must be an integer <= 1, got 2"),
        ([-1], ValueError, r"indices.min\(\).* must be an integer >= 0, got -1"),
        ([0.0], TypeError, "`indices` must be a sequence of integers, got 'float64'"),
        ([True, False], TypeError, "got 'bool'"),
        ([], ValueError, "at least one image"),
    ],
)
def test_bad_indices(indices, kind, message):
    images = LabelledImages(ArraySource(np.zeros((2, 3, 3), np.uint8), "x"), [0, 1], ("a", "b"))
    with pytest.raises(kind, match=message):
        images.subset(indices)
    if indices:
        with pytest.raises(kind, match=message):
            images.without(indices)
    else:
        assert len(images.without(indices)) == 2


@pytest.mark.parametrize(
    ("labels", "message"),
    [([0], "one label for each of the 2 images"), ([0, 2], "max"), ([-1, 0], "min")],
)
def test_bad_labels(labels, message):
    with pytest.raises(ValueError, match=message):
        LabelledImages(ArraySource(np.zeros((2, 3, 3), np.uint8), "x"), labels, ("a", "b"))


def test_map_in_threads_covers_every_index_in_order():
    for count in (0, 1, 63, 64, 65, 1000):
        blocks = list(map_in_threads(count, list))
        assert [index for block in blocks for index in block] == list(range(count))


def test_labels_are_integers():
    with pytest.raises(TypeError, match="`labels` must be a sequence of integers, got 'float64'"):
        LabelledImages(ArraySource(np.zeros((2, 3, 3), np.uint8), "x"), [0.0, 1.5], ("a", "b"))


# Links


def test_a_link_beside_the_splits_is_nobodys_business(tmp_path):
    given = class_folders(tmp_path / "set")
    (tmp_path / "set" / "elsewhere").symlink_to(tmp_path)
    assert len(load_images(**given)[0]) == len(TRAIN)


def test_a_link_inside_the_root_is_followed(tmp_path):
    given = lists(tmp_path)
    (tmp_path / "train" / "ant" / "0.png").rename(tmp_path / "zero.png")
    (tmp_path / "train" / "ant" / "0.png").symlink_to(tmp_path / "zero.png")
    train, _ = load_images(**given)
    assert train.image(0).getpixel((0, 0)) == picture("train", 0).getpixel((0, 0))
    train, _ = load_images(tmp_path)
    assert train.image(0).getpixel((0, 0)) == picture("train", 0).getpixel((0, 0))
    os.symlink(tmp_path, tmp_path.parent / "elsewhere")
    assert len(load_images(tmp_path.parent / "elsewhere")[0]) == len(TRAIN)
