"""One folder a class."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from image_sets import (
    CLASSES,
    TEST,
    TRAIN,
    check_is_refused,
    class_folders,
    linked,
    png,
    then,
    write,
)

from ldam_plugins.data import load_images, load_texts
from ldam_plugins.data.notes import DataNotes


def test_a_test_folder_is_preferred_and_any_can_be_named(tmp_path):
    class_folders(tmp_path, test="val")
    write(tmp_path / "test" / "ant" / "0.png", png("test", 0))
    write(tmp_path / "train" / "ant" / ".hidden.png", "not an image")
    assert load_images(tmp_path)[1].labels.tolist() == [0]
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


def no_image(root):
    write(root / "train" / "dog" / "IMG_1.mov", "")
    write(root / "val" / "dog" / "0.png", png("test", 0))
    return {"dataset": root}


def boxes(root):
    for split in ("train", "val"):
        write(root / split / "images" / "0.png", png("train", 0))
        write(root / split / "labels" / "0.txt", "0 .5 .5 1 1")
    return {"dataset": root}


def flat(root):
    """The training pictures in class folders without a split."""
    for row, label in enumerate(TRAIN):
        write(root / CLASSES[label] / f"{row}.png", png("train", row))
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


def told(root, **options):
    """Both parts, and what is said of them."""
    notes = DataNotes()
    train, test = load_images(root, **options, notes=notes)
    return train, test, notes


def files_of(images):
    return [Path(images.describe(i)).name for i in range(len(images))]


@pytest.mark.parametrize("deeper", ["", "set", "set/set"])
def test_folders_without_splits_are_split(deeper, tmp_path):
    flat(tmp_path / "set" / deeper)
    write(tmp_path / "set" / "__MACOSX" / "ant" / "._0.png", "")
    write(tmp_path / "set" / ".DS_Store", "")
    train, test, notes = told(tmp_path / "set", test_split=0.3, seed=1)
    assert train.class_names == CLASSES
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 0, 1, 2], [0, 1])
    assert sorted(files_of(train) + files_of(test)) == [f"{row}.png" for row in range(6)]
    assert notes.said == [
        "Held out to test on: 2 of 6 examples, 0.3 of each class.",
        "Classes of which the only example is trained on, 1: 'cat'.",
    ]


@pytest.mark.parametrize(
    ("train", "test"),
    [("Train", "Test"), ("training", "validation"), ("TRAIN", "Valid"), ("seg_train", "test")],
)
@pytest.mark.parametrize("deeper", ["", "set/"])
def test_splits_by_other_names(train, test, deeper, tmp_path):
    class_folders(tmp_path / "made")
    (tmp_path / "set").mkdir()
    (tmp_path / "made").rename(tmp_path / "set" / deeper)
    for old, new in (("train", train), ("val", test)):
        (tmp_path / "set" / deeper / old).rename(tmp_path / "set" / deeper / new)
    parts = load_images(tmp_path / "set")
    assert [part.labels.tolist() for part in parts] == [list(TRAIN), list(TEST)]
    named = load_images(tmp_path / "set", train_split="train", test_split=test.lower())
    assert [part.rows.tolist() for part in named] == [part.rows.tolist() for part in parts]


def test_what_systems_leave_is_no_class_and_what_is_left_out_is_counted(tmp_path):
    class_folders(tmp_path)
    for name in ("__MACOSX", ".ipynb_checkpoints", "@eaDir"):
        write(tmp_path / "train" / name / "0.png", png("train", 0))
    for name in ("Thumbs.db", "desktop.ini", ".DS_Store"):
        write(tmp_path / "train" / "ant" / name, "")
    write(tmp_path / "train" / "dog" / "notes.txt", "")
    write(tmp_path / "val" / "dog" / "0.png", png("test", 0))
    write(tmp_path / "train" / "elk" / "0.png", png("train", 0))
    train, test, notes = told(tmp_path)
    assert train.class_names == test.class_names == (*CLASSES, "elk")
    assert (train.labels.tolist(), test.labels.tolist()) == ([*TRAIN, 3], list(TEST))
    assert notes.left_out == {
        "files that are no images by name": 1,
        "examples of split val whose class training has not": 1,
    }
    assert any("Folders that hold no image" in said and "train/dog" in said for said in notes.said)
    assert "Split val has no example of 1 classes: 'elk'." in notes.said


def test_names_that_differ_in_blanks_are_one_class_and_others_stay_apart(tmp_path):
    class_folders(tmp_path)
    for name in ("bee ", "Cat", "my cat", "\u732b"):
        for split in ("train", "val"):
            write(tmp_path / split / name / "9.png", png("train", 0))
    train, test, notes = told(tmp_path)
    assert train.class_names == ("ant", "bee", "Cat", "cat", "my cat", "\u732b")
    assert np.bincount(train.labels).tolist() == [3, 3, 1, 1, 1, 1]
    assert np.bincount(test.labels).tolist() == [1, 2, 1, 2, 1, 1]
    assert "differ in blanks only: 'bee' (2), 'bee ' (1)" in " ".join(notes.said)
    assert "look like one class: 'Cat' and 'cat'" in " ".join(notes.said)


def test_a_class_called_train(tmp_path):
    for name in ("bus", "train"):
        for row in range(3):
            write(tmp_path / name / f"{row}.png", png("train", row))
    train, test = load_images(tmp_path, test_split=0.3)
    assert train.class_names == ("bus", "train")
    assert (len(train), len(test)) == (4, 2)


def test_files_as_the_web_leaves_them_are_images(tmp_path):
    names = ["a%20b.jpg", "c.jpg?id=1&w=2", "d.jpg.1", "e.final.JPG", "f.jpeg.webp", "g.avif"]
    for name in (*names, "h.jpg.txt"):
        for split in ("train", "val"):
            write(tmp_path / split / "ant" / name, png("train", 0))
            write(tmp_path / split / "bee" / "0.png", png("train", 0))
    train, _, notes = told(tmp_path)
    assert sorted(files_of(train)) == sorted([*names, "0.png"])
    assert train.find_corrupt() == []
    assert notes.left_out["files that are no images by name"] == 2


def test_images_beside_the_class_folders_are_counted(tmp_path):
    for name in ("ant", "bee"):
        for row in range(3):
            write(tmp_path / name / f"{row}.png", png("train", row))
    write(tmp_path / "loose.png", png("train", 0))
    write(tmp_path / ".hidden.png", png("train", 0))
    notes = DataNotes()
    train, test = load_images(tmp_path, test_split=0.5, notes=notes)
    assert len(train) + len(test) == 6
    assert notes.left_out == {"images beside the folders of classes": 1}
    assert any("'loose.png'" in said for said in notes.said)


def test_texts_in_class_folders(tmp_path):
    for split, count in (("train", 3), ("test", 2)):
        for name in ("neg", "pos"):
            for row in range(count):
                write(tmp_path / split / name / f"{row}.txt", f"{name} {row}\n".encode())
    write(tmp_path / "README.md", "about")
    train, test = load_texts(tmp_path)
    assert train["text"][:2] == ["neg 0\n", "neg 1\n"]
    assert train.features["label"].names == ["neg", "pos"]
    assert (train["label"][:], test["label"][:]) == ([0, 0, 0, 1, 1, 1], [0, 0, 1, 1])
    train, test = load_texts(tmp_path / "train", test_split=0.4)
    assert (len(train), len(test)) == (4, 2)
    write(tmp_path / "train" / "pos" / "0.txt", "caf\xe9 f\xfcr alle".encode("latin-1"))
    with pytest.raises(ValueError, match=r"pos/0\.txt, line 1: not UTF-8.*--encoding cp1252"):
        load_texts(tmp_path)
    assert load_texts(tmp_path, encoding="cp1252")[0]["text"][3] == "caf\xe9 f\xfcr alle"


def test_files_without_a_text(tmp_path):
    for name in ("neg", "pos"):
        for row in range(4):
            write(tmp_path / name / f"{row}.txt", f"{name} {row}" if row else " ")
    with pytest.raises(ValueError, match=r"2 of 8 files .*'neg/0.txt'.*--skip_empty"):
        load_texts(tmp_path, test_split=0.4)
    notes = DataNotes()
    train, test = load_texts(tmp_path, test_split=0.4, skip_empty=True, notes=notes)
    assert train["label"][:] + test["label"][:] == [0, 0, 1, 1, 0, 1]
    assert notes.left_out == {"files without text": 2}


@pytest.mark.parametrize("ending", ["", ".md", ".png"])
def test_files_that_do_not_end_as_texts_do(ending, tmp_path):
    for name in ("neg", "pos"):
        for row in range(4):
            write(tmp_path / name / f"{row}{ending}", name)
    with pytest.raises(ValueError, match=rf"files that end in \.txt.*There is 8 .*{ending}"):
        load_texts(tmp_path, test_split=0.4)


BAD = {
    "no image at all": (no_image, r"train/dog holds no image .*There is 1 \.mov\."),
    "flat": (flat, r"`test_split` must be given: .*class folders only.*--test_split 0\.2"),
    "flat, named": (then(flat, test_split="test"), r"must be a share in \(0, 1\): .*got 'test'"),
    "boxes": (boxes, "train looks like a data set for object detection"),
    "same twice": (then(class_folders, test_split="train"), "another split than `train_split`"),
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
