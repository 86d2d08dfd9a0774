"""Every layout gives the same six and four images."""

from __future__ import annotations

import errno
import json
import os
import pickle
import unicodedata
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
from paths import DATA
from PIL import Image

from ldam_plugins.data.images import LabelledImages, load_images, map_in_threads
from ldam_plugins.data.readers.base import ArraySource, FileSource, decode_image
from ldam_plugins.data.readers.paths import natural_key

CIFAR10 = DATA / "cifar10"

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
    monkeypatch.setattr("ldam_plugins.data.readers.base.decode_image", refuse)
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


# What a line of a list becomes: lists are published, and saved by editors, in all these forms.
FORMS = {
    "slash before": lambda path, label, root: f"/{path} {label}",
    "dot before": lambda path, label, root: f"./{path} {label}",
    "slashes twice": lambda path, label, root: f"{path.replace('/', '//')} {label}",
    "backslashes": lambda path, label, root: f"{path.replace('/', chr(92))} {label}",
    "backslash before": lambda path, label, root: f"{chr(92)}{path.replace('/', chr(92))} {label}",
    "quotes": lambda path, label, root: f'"{path}" {label}',
    "single quotes": lambda path, label, root: f"'/{path}'\t{label}",
    "comma": lambda path, label, root: f"{path},{label}",
    "quotes and comma": lambda path, label, root: f'"{path}", {label}',
    "semicolon": lambda path, label, root: f"{path};{label}",
    "blanks around": lambda path, label, root: f"  {path} \t {label}  \r",
    "label of several digits": lambda path, label, root: f"{path} 00{label}",
    "whole path": lambda path, label, root: f"{root}/{path} {label}",
}


@pytest.mark.parametrize("form", FORMS)
def test_lists_are_read_in_the_forms_they_are_published_in(form, tmp_path):
    given = lists(tmp_path)
    for name in ("train.txt", "test.txt"):
        lines = (line.split() for line in (tmp_path / name).read_text().splitlines())
        text = "\n".join(FORMS[form](path, label, tmp_path) for path, label in lines)
        write(tmp_path / name, f"{text}\n\n")
    train, test = load_images(**given)
    assert (train.labels.tolist(), test.labels.tolist()) == (list(TRAIN), list(TEST))
    assert train.describe(3) == str(tmp_path / "train" / "bee" / "3.png")
    assert train.find_corrupt() == test.find_corrupt() == []


@pytest.mark.parametrize("name", ["a b.png", "'a'.png", "a\\b.png", "a,1.png", "a 2.png", '"a"'])
def test_a_name_of_a_list_is_first_of_all_what_it_says(name, tmp_path):
    for path in (tmp_path / "train" / name, tmp_path / "train" / "a" / "b.png"):
        write(path, png("train", 0))
    write(tmp_path / "train.txt", f"train/{name} 0\n")
    train, _ = load_images(
        tmp_path, train_list=tmp_path / "train.txt", test_list=tmp_path / "train.txt"
    )
    assert train.describe(0) == str(tmp_path / "train" / name)


def normal_forms(name):
    return {form: unicodedata.normalize(form, name) for form in ("NFC", "NFD")}


ACCENTS = normal_forms("caf\N{LATIN SMALL LETTER E WITH ACUTE}")


@pytest.mark.parametrize(("disk", "listed"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFD", "NFD")])
def test_names_in_both_unicode_normal_forms_are_one(disk, listed, tmp_path):
    root = tmp_path / ACCENTS["NFD"]
    for split in ("train", "val"):
        for row in range(2):
            name = f"{ACCENTS[disk]}{row}.png"
            write(root / split / "tea" / name, png("train", row))
            write(root / split / ACCENTS[disk] / ACCENTS[disk] / name, png("train", row))
    other = f"{ACCENTS[listed]}"
    for split in ("train", "val"):
        names = [f"{split}/{other}/{other}/{other}0.png 0", f"{split}/tea/{other}1.png 1"]
        write(root / f"{split}.txt", "\n".join(names))
    given = {"train_list": root / "train.txt", "test_list": root / "val.txt"}
    train, _ = load_images(root, **given)
    assert train.find_corrupt() == []
    assert Path(train.describe(1)).name == f"{ACCENTS[disk]}1.png"
    for split in ("train", "val"):
        (root / split / ACCENTS[disk]).rename(
            root / split / ACCENTS[disk if split == "val" else listed]
        )
    train, test = load_images(root)
    assert train.class_names == test.class_names == (ACCENTS["NFC"], "tea")
    assert train.find_corrupt() == test.find_corrupt() == []
    # in annotations, too, and a file that is given in both forms is given twice
    entries = [{"id": row, "file_name": f"train/tea/{other}{row}.png"} for row in range(2)]
    content = {"images": entries, "categories": [{"id": 5, "name": ACCENTS[disk]}]}
    content["annotations"] = [{"image_id": row, "category_id": 5} for row in range(2)]
    write(root / "train2021.json", json.dumps(content))
    content["categories"] = [{"id": 5, "name": other}]
    write(root / "val2021.json", json.dumps(content))
    train, test = load_images(root)
    assert train.class_names == test.class_names == (ACCENTS["NFC"],)
    write(root / "train.txt", "".join(f"train/tea/{a}0.png 0\n" for a in ACCENTS.values()))
    with pytest.raises(ValueError, match=r"line 2: .* already given in .*line 1"):
        load_images(root, **given)


def test_of_two_files_whose_names_differ_in_the_normal_form_the_named_one_is_read(tmp_path):
    for row, (form, name) in enumerate(ACCENTS.items()):
        write(tmp_path / f"{name}.png", png("train", row))
        write(tmp_path / f"{form}.txt", f"{name}.png 0")
    given = {"train_list": tmp_path / "NFC.txt", "test_list": tmp_path / "NFD.txt"}
    for row, images in enumerate(load_images(tmp_path, **given)):
        assert np.array_equal(np.asarray(images[0][0]), np.asarray(picture("train", row)))


def test_labels_as_text_in_both_normal_forms_are_one_class(tmp_path):
    feature = datasets.Value("string")
    given = saved_to_disk(
        tmp_path, feature=feature, labels=[*ACCENTS.values(), "ant", "bee", "cat", "cat"]
    )
    train, test = load_images(**given, label_column="label")
    assert train.class_names == test.class_names == ("ant", "bee", ACCENTS["NFC"], "cat")
    assert train.labels.tolist() == [2, 2, 0, 1, 3, 3]


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


def test_the_ids_of_imagenet_have_one_order_as_text_and_by_number():
    random = np.random.default_rng(0)
    ids = [f"n{number:08d}" for number in random.integers(1, 10**8, 1000)]
    assert sorted(ids, key=natural_key) == sorted(ids)


def camera_trap(root, boxes, unused=()):
    """Images 0 to 3 with a box for each (image, category); ids are text, categories skip some."""
    names = {0: "empty", 3: "fox", 7: "hare", 12: "owl"}
    ids = sorted({category for _, category in boxes} | set(unused))
    content = {
        "info": {"version": "1.0"},
        "categories": [{"id": i, "name": names[i], "supercategory": "x"} for i in ids],
        "images": [{"id": f"cam-{i}", "file_name": f"loc\\{i}.png", "seq_id": 1} for i in range(4)],
        "annotations": [
            {"id": f"{i}-{k}", "image_id": f"cam-{i}", "category_id": c, "bbox": [0.5, 1, 2.5, 3]}
            for k, (i, c) in enumerate(boxes)
        ],
    }
    for row in range(4):
        write(root / "loc" / f"{row}.png", png("train", row))
    for name in ("train.json", "val.json"):
        write(root / name, json.dumps(content))


def test_boxes_of_one_species_make_one_label(tmp_path):
    camera_trap(tmp_path, [(0, 3), (0, 3), (1, 7), (2, 0), (3, 3), (0, 3), (1, 7)])
    train, test = load_images(tmp_path)
    assert train.class_names == test.class_names == ("empty", "fox", "hare")
    assert train.labels.tolist() == test.labels.tolist() == [1, 2, 0, 1]
    assert len(train) == 4


def test_the_smaller_part_of_inaturalist_is_read_where_it_is_alone(tmp_path):
    camera_trap(tmp_path, [(0, 3), (1, 7), (2, 3), (3, 7)])
    (tmp_path / "train.json").rename(tmp_path / "train_mini.json")
    assert load_images(tmp_path)[0].labels.tolist() == [0, 1, 0, 1]
    camera_trap(tmp_path, [(0, 7), (1, 7), (2, 3), (3, 7)])
    assert load_images(tmp_path)[0].labels.tolist() == [1, 1, 0, 1]


def test_categories_without_an_annotation_are_no_classes(tmp_path):
    camera_trap(tmp_path, [(0, 3), (1, 7), (2, 3), (3, 7)], unused=(0, 12))
    train, _ = load_images(tmp_path)
    assert (train.class_names, train.labels.tolist()) == (("fox", "hare"), [0, 1, 0, 1])


def test_boxes_of_two_species_in_an_image_are_refused(tmp_path):
    camera_trap(tmp_path, [(0, 3), (1, 7), (1, 3), (2, 0), (3, 3)])
    message = r"train\.json, annotations\[2\]: image 'cam-1' has .*'hare' and not 'fox'.*train_list"
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path)


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
        # older releases of Pillow open a YCbCr file as RGB
        assert stored.mode == mode or (mode, stored.mode) == ("YCbCr", "RGB")
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
