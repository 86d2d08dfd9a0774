"""Names of files: normal forms, order and links."""

from __future__ import annotations

import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from image_sets import TRAIN, lists, picture, png, write

from ldam_plugins.data import load_images
from ldam_plugins.data.readers.paths import natural_key


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


def test_the_ids_of_imagenet_have_one_order_as_text_and_by_number():
    random = np.random.default_rng(0)
    ids = [f"n{number:08d}" for number in random.integers(1, 10**8, 1000)]
    assert sorted(ids, key=natural_key) == sorted(ids)


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
