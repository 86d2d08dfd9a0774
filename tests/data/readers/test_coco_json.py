"""COCO-style JSON, as iNaturalist and camera traps are published."""

from __future__ import annotations

import json

import pytest
from image_sets import check_is_refused, inaturalist, png, write

from ldam_plugins.data import load_images


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


def edit_json(change, name: str = "train2018.json"):
    def build(root):
        given = inaturalist(root)
        content = json.loads((root / name).read_text())
        content = change(content) or content
        write(root / name, content if isinstance(content, (str, bytes)) else json.dumps(content))
        return given

    return build


def set_field(key: str, row: int, field: str, value):
    def change(content):
        content[key][row][field] = value

    return edit_json(change)


def missing_annotations(root):
    given = inaturalist(root)
    (root / "val2018.json").unlink()
    return given


def two_years(root):
    inaturalist(root)
    write(root / "train2019.json", "{}")
    return {"dataset": root}


BAD = {
    "json missing": (missing_annotations, "val2018.json cannot be read.*'train2018.json'"),
    "json of two years": (two_years, "'train2018.json', 'train2019.json'; give `train_list`"),
    "json empty": (edit_json(lambda _: " "), "train2018.json is empty"),
    "json broken": (edit_json(lambda _: '{\n"images": ['), "train2018.json, line 2: not JSON"),
    "json not text": (edit_json(lambda _: b"\xff"), "line 1: not UTF-8"),
    "json a list": (edit_json(lambda _: "[]"), "must be a JSON object, got list"),
    "json too deep": (edit_json(lambda _: "[" * 200_000), "not annotations"),
    "json endless": (edit_json(lambda _: "9" * 5000), "not annotations"),
    "json no images": (edit_json(lambda c: c.pop("images") and None), "a list `images`.*it has"),
    "json images not a list": (edit_json(lambda c: {**c, "images": 1}), "a list `images`"),
    "json entry": (
        edit_json(lambda c: c["images"].insert(1, 5)),
        r"images\[1\]: must be an object",
    ),
    "json id missing": (
        set_field("images", 2, "id", None),
        r"images\[2\]: `id` must be int or str",
    ),
    "json id a truth": (set_field("images", 2, "id", True), "`id` must be int or str, got True"),
    "json id twice": (set_field("images", 2, "id", 100), r"images\[2\]: id 100 is repeated"),
    "json id unknown": (set_field("annotations", 0, "image_id", 9), r"annotations\[0\]: no image"),
    "json annotated twice": (set_field("annotations", 0, "image_id", 100), "an annotation already"),
    "json category negative": (set_field("annotations", 0, "category_id", -1), ">= 0, got -1"),
    "json category a fraction": (
        set_field("annotations", 0, "category_id", 1.5),
        "be int, got 1.5",
    ),
    "json category unknown": (set_field("annotations", 0, "category_id", 4), "no category 4"),
    "json category twice": (set_field("categories", 0, "id", 3), r"categories\[1\]: id 3 is rep"),
    "json name of a category": (set_field("categories", 0, "name", "dog"), "the names differ"),
    "json categories differ": (set_field("categories", 0, "id", 99), "must be equal: 17, 99"),
    "json no annotation": (
        edit_json(lambda c: c["annotations"].pop(0) and None),
        r"images\[5\]: there is no annotation",
    ),
    "json path out": (set_field("images", 1, "file_name", "../a.png"), r"images\[1\]: .*leads out"),
    "json path odd": (set_field("images", 1, "file_name", "\ud800/a"), r"images\[1\]: .*cannot be"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told(case, tmp_path):
    check_is_refused(*BAD[case], tmp_path / "set")
