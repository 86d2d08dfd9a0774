"""Every layout gives the same six and four images; what is none is told what there is."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
from image_sets import (
    CLASSES,
    TEST,
    TRAIN,
    check_is_refused,
    class_folders,
    hub_layout,
    inaturalist,
    inaturalist_named,
    lists,
    picture,
    png,
    saved_to_disk,
    then,
    tiny_imagenet,
    write,
)

from ldam_plugins.data import load_images, load_texts
from ldam_plugins.data.readers import IMAGE_READERS, TEXT_READERS

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


def test_a_link_beside_the_splits_is_nobodys_business(tmp_path):
    given = class_folders(tmp_path / "set")
    (tmp_path / "set" / "elsewhere").symlink_to(tmp_path)
    assert len(load_images(**given)[0]) == len(TRAIN)


def missing_folder(root):
    return {"dataset": root / "nothing"}


def unknown_folder(root):
    write(root / "pictures" / "a.png", png("train", 0))
    return {"dataset": root}


def only_train(root):
    class_folders(root, test="later")
    return {"dataset": root}


BAD = {
    "no name": (lambda _: {"dataset": ""}, "`dataset` must be .*got ''"),
    "missing folder": (missing_folder, "`dataset` must be .*folder that is there.*nothing'"),
    "unknown folder": (unknown_folder, "no known kind.*wnids.txt.*There is 'pictures'"),
    "columns of a folder": (then(class_folders, image_column="x"), "`image_column` must be left"),
    "columns of digits": (lambda _: {"dataset": "digits", "label_column": "x"}, "left out"),
    "split of a list": (then(lists, test_split="val"), "`test_split` must be left out, got 'val'"),
    "no such train": (then(only_train, test_split="later", train_split="x"), "no known kind.*x/<"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told(case, tmp_path):
    check_is_refused(*BAD[case], tmp_path / "set")


def test_an_unknown_data_set_is_told_every_known_layout(tmp_path):
    write(tmp_path / "pictures" / "a.png", png("train", 0))
    for given in (tmp_path, "no/such/folder"):
        with pytest.raises(ValueError, match="Known layouts: ") as caught:
            load_images(given)
        for reader in IMAGE_READERS:
            assert reader.layout.format(train_split="train") in str(caught.value)
    with pytest.raises(ValueError, match=r"`dataset` must be .*got ''") as caught:
        load_texts("")
    assert all(
        reader.layout.format(train_split="train") in str(caught.value) for reader in TEXT_READERS
    )
