"""One folder a class."""

from __future__ import annotations

from pathlib import Path

import pytest
from image_sets import TEST, TRAIN, check_is_refused, class_folders, linked, png, then, write

from ldam_plugins.data import load_images


def test_a_test_folder_is_preferred_and_any_can_be_named(tmp_path):
    class_folders(tmp_path, test="val")
    write(tmp_path / "test" / "ant" / "0.png", png("test", 0))
    write(tmp_path / "train" / "ant" / ".hidden.png", "not an image")
    with pytest.raises(ValueError, match="'bee', 'cat'"):
        load_images(tmp_path)
    train, test = load_images(tmp_path, test_split="val")
    assert len(train) == len(TRAIN)
    assert test.labels.tolist() == list(TEST)


FOLDERS = ("2", "10", "1", "b10", "B9", "b2", "02x", "n01", "Zoo", "apple")


def test_classes_of_folders_are_numbered_as_in_timms_reader(tmp_path):
    from timm.data.readers.reader_image_folder import ReaderImageFolder

    for split in ("train", "val"):
        for name in FOLDERS:
            write(tmp_path / split / name / "0.png", png("train", 0))
    train, test = load_images(tmp_path)
    assert train.class_names == ("1", "2", "02x", "10", "apple", "b2", "B9", "b10", "n01", "Zoo")
    theirs = ReaderImageFolder(str(tmp_path / "train")).class_to_idx
    assert {name: label for label, name in enumerate(train.class_names)} == theirs
    for images in (train, test):
        for row in range(len(images)):
            assert images.class_names[images.labels[row]] == Path(images.describe(row)).parent.name
    # names that are one to timm, or no number to anybody, have an order as well
    for name in ("01", "001", "B2", "\N{SUPERSCRIPT TWO}"):
        write(tmp_path / "train" / name / "0.png", png("train", 0))
        write(tmp_path / "val" / name / "0.png", png("train", 0))
    names = load_images(tmp_path)[0].class_names
    assert names[:4] == ("001", "01", "1", "2")
    assert names[-1] == "\N{SUPERSCRIPT TWO}"
    assert names.index("B2") == names.index("b2") - 1


def empty_class(root):
    class_folders(root)
    write(root / "train" / "dog" / "notes.txt", "")
    return {"dataset": root}


def only_train(root):
    class_folders(root, test="later")
    return {"dataset": root}


def circle(root):
    class_folders(root)
    (root / "train" / "ant" / "again").symlink_to(root / "train")
    return {"dataset": root}


def both_normal_forms(root):
    class_folders(root)
    for name in ("e\u0301", "\xe9"):
        write(root / "train" / name / "0.png", png("train", 0))
    return {"dataset": root}


BAD = {
    "empty class": (empty_class, "train/dog holds no image"),
    "empty train": (lambda r: [(r / "train").mkdir(parents=True), {"dataset": r}][1], "test_split"),
    "no test": (only_train, "`test_split` must be one of 'later', 'train'.*None is named test"),
    "no such test": (then(only_train, test_split="../x"), "`test_split` must be one of .*'../x'"),
    "circle": (circle, "again is a link to a folder"),
    "class folder out": (linked("moved", "train/bee", class_folders), "bee leads out of"),
    "split folder out": (linked("moved", "train", class_folders), "train leads out of"),
    "folder twice": (both_normal_forms, r"folders 'e\\u0301' and '\\xe9' in .*one name in two"),
    "image file out": (linked("secret/0.png", "train/bee/3.png", class_folders), "3.png leads out"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told(case, tmp_path):
    check_is_refused(*BAD[case], tmp_path / "set")
