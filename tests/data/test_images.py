"""Labelled images: decoded when asked for, cut, and corrupt ones found."""

from __future__ import annotations

import errno
import pickle

import datasets
import numpy as np
import pytest
import torch
from image_sets import CLASSES, TRAIN, hub_layout, png, write
from tqdm.contrib import concurrent

from ldam_plugins.data.images import LabelledImages, load_images, map_in_threads
from ldam_plugins.data.readers.base import ArraySource, FileSource


def test_labels_need_no_pixels(tmp_path, monkeypatch):
    def refuse(*_):
        raise AssertionError("decoded")

    given = hub_layout(tmp_path / "set")
    monkeypatch.setattr("ldam_plugins.data.readers.base.decode_image", refuse)
    monkeypatch.setattr(datasets.Image, "decode_example", refuse)
    train, _ = load_images(**given)
    assert train.labels.tolist() == list(TRAIN)
    with pytest.raises(ValueError, match="decoded"):
        train[0]


@pytest.fixture
def damaged(tmp_path):
    for row in range(150):
        write(tmp_path / f"{row}.png", png("train", 0))
    write(tmp_path / "3.png", png("train", 0)[:40])
    write(tmp_path / "70.png", b"")
    write(tmp_path / "149.png", "text")
    names = [f"{row}.png" for row in range(150)]
    return LabelledImages(FileSource(tmp_path, names), np.arange(150) % 3, CLASSES)


def test_corrupt_images_are_named_found_and_left_out(damaged, capsys, monkeypatch):
    with pytest.raises(ValueError, match=r"/3\.png cannot be read .*--skip_corrupt"):
        damaged[3]
    assert damaged.find_corrupt() == [3, 70, 149]
    assert capsys.readouterr().err == ""
    thread_map = concurrent.thread_map  # whose bar waits a second otherwise
    monkeypatch.setattr(
        concurrent, "thread_map", lambda *given, **more: thread_map(*given, **{**more, "delay": 0})
    )
    assert damaged.find_corrupt(progress=True) == [3, 70, 149]
    assert "/3 [" in capsys.readouterr().err
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


def test_a_dataset_is_a_name_or_a_path():
    with pytest.raises(TypeError, match="`dataset` must be a name or a path, got 3"):
        load_images(3)
    with pytest.raises(TypeError, match="`train_list`"):
        load_images(".", train_list=["a"])
