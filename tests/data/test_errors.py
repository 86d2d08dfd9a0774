"""Every bad set gets a message that names the place and helps."""

from __future__ import annotations

import json

import datasets
import pytest
from image_sets import (
    CLASSES,
    class_folders,
    hub_layout,
    inaturalist,
    lists,
    picture,
    png,
    saved_to_disk,
    table,
    tiny_imagenet,
    write,
)

from ldam_plugins.data import load_images


def edit_list(text: str, name: str = "train.txt"):
    def build(root):
        given = lists(root)
        write(root / name, text)
        return given

    return build


def edit_json(change, name: str = "train2018.json"):
    def build(root):
        given = inaturalist(root)
        content = json.loads((root / name).read_text())
        content = change(content) or content
        write(root / name, content if isinstance(content, (str, bytes)) else json.dumps(content))
        return given

    return build


def edit_tiny(name: str, text: str):
    def build(root):
        tiny_imagenet(root)
        write(root / name, text)
        return {"dataset": root}

    return build


def set_field(key: str, row: int, field: str, value):
    def change(content):
        content[key][row][field] = value

    return edit_json(change)


def linked(target: str, link: str, source=lists):
    """Put a link to something outside of the root where a file or folder was."""

    def build(root):
        given = source(root / "root")
        write(root / "secret" / "0.png", png("train", 0))
        path = root / "root" / link
        path.rename(root / "moved")
        path.symlink_to(root / target)
        return given

    return build


def labelled(feature, labels):
    def build(root):
        return saved_to_disk(root, feature=feature, labels=labels) | {"label_column": "label"}

    return build


def then(build, **more):
    return lambda root: build(root) | more


def missing_folder(root):
    return {"dataset": root / "nothing"}


def missing_annotations(root):
    given = inaturalist(root)
    (root / "val2018.json").unlink()
    return given


def two_years(root):
    inaturalist(root)
    write(root / "train2019.json", "{}")
    return {"dataset": root}


def unknown_folder(root):
    write(root / "pictures" / "a.png", png("train", 0))
    return {"dataset": root}


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


def accent_out(root):
    given = edit_list("\xe9/0.png 0")(root / "root")
    write(root / "secret" / "0.png", png("train", 0))
    (root / "root" / "e\u0301").symlink_to(root / "secret")
    return given


def broken_parquet(root):
    given = hub_layout(root)
    write(root / "plain_text" / "train-00000-of-00001.parquet", "PAR1 no table PAR1")
    return given


def other_order(root):
    names = {"train": list(CLASSES), "valid": list(CLASSES[::-1])}
    made = {s: table(s, feature=datasets.ClassLabel(names=n)) for s, n in names.items()}
    datasets.DatasetDict(made).save_to_disk(str(root))
    return {"dataset": root}


def no_image_column(root):
    root.mkdir()
    for split in ("train", "test"):
        rows = datasets.Dataset.from_dict({"text": ["a"], "label": [0]})
        rows.to_parquet(root / f"{split}.parquet")
    return {"dataset": root, "cache_dir": root / ".cache"}


LINE = "train/ant/0.png 0\n"
BAD = {
    "no name": (lambda _: {"dataset": ""}, "`dataset` must be .*got ''"),
    "missing folder": (missing_folder, "`dataset` must be .*folder that is there.*nothing'"),
    "unknown folder": (unknown_folder, "no known kind.*wnids.txt.*There is 'pictures'"),
    "empty class": (empty_class, "train/dog holds no image"),
    "empty train": (lambda r: [(r / "train").mkdir(parents=True), {"dataset": r}][1], "test_split"),
    "no test": (only_train, "`test_split` must be one of 'later', 'train'.*None is named test"),
    "no such train": (then(only_train, test_split="later", train_split="x"), "no known kind.*x/<"),
    "no such test": (then(only_train, test_split="../x"), "`test_split` must be one of .*'../x'"),
    "circle": (circle, "again is a link to a folder"),
    "class folder out": (linked("moved", "train/bee", class_folders), "bee leads out of"),
    "split folder out": (linked("moved", "train", class_folders), "train leads out of"),
    "folder twice": (both_normal_forms, r"folders 'e\\u0301' and '\\xe9' in .*one name in two"),
    "listed folder out, decomposed": (accent_out, "line 1: there is no file"),
    "image file out": (linked("secret/0.png", "train/bee/3.png", class_folders), "3.png leads out"),
    "columns of a folder": (then(class_folders, image_column="x"), "`image_column` must be left"),
    "columns of digits": (lambda _: {"dataset": "digits", "label_column": "x"}, "left out"),
    "split of a list": (then(lists, test_split="val"), "`test_split` must be left out, got 'val'"),
    "one list": (then(lists, test_list=None), "`test_list` must be given"),
    "lists of two kinds": (then(lists, test_list="a.json"), "`test_list` must be of the kind"),
    "list without root": (then(lists, dataset="none"), "`dataset` must be the folder.*'none'"),
    "list missing": (then(lists, train_list="none.txt"), "none.txt cannot be read"),
    "list a folder": (lambda r: lists(r) | {"train_list": r}, "cannot be read"),
    "list empty": (edit_list(" \n\n"), r"train.txt is empty"),
    "list not text": (edit_list(LINE.encode() + b"\xff\xfe 1"), "train.txt, line 2: not UTF-8"),
    "no label": (edit_list(LINE + "train/ant/1.png"), "line 2: must be a path and a label"),
    "blank line": (edit_list(LINE + "\n" + LINE), "line 2: must be a path"),
    "label alone": (edit_list("17"), "line 1: must be a path"),
    "label negative": (edit_list("train/ant/1.png -1"), "line 1: must be .*-1'"),
    "label a fraction": (edit_list("train/ant/1.png 1.5"), "line 1: must be"),
    "label a word": (edit_list("train/ant/1.png ant"), "line 1: must be"),
    "label in other digits": (edit_list("train/ant/1.png ٣"), "line 1: must be"),
    "label beyond the lines": (edit_list("train/ant/1.png 1"), "label 1 is too large for the 1"),
    "label endless": (edit_list("train/ant/1.png " + "9" * 5000), "is too large"),
    "test label new": (
        edit_list("val/ant/0.png 3", "test.txt"),
        "test.txt, line 1: label 3 .*3 cl",
    ),
    "path absolute": (edit_list("/etc/hosts 0"), "line 1: path '/etc/hosts' must be relative"),
    "path absolute and out": (edit_list("/../x.png 0"), "line 1: path '/../x.png' leads out of"),
    "path out by backslashes": (
        edit_list("..\\x.png 0"),
        r"line 1: path '..\\\\x.png' leads out of",
    ),
    "path out in quotes": (edit_list("'/../x.png' 0"), "line 1: .*leads out of"),
    "labels twice": (edit_list("train/ant/0.png 0 0"), "no file 'train/ant/0.png 0'"),
    "a table's titles": (edit_list("path,label\n" + LINE), "line 1: must be a path and a label"),
    "path out": (edit_list(LINE + "../x.png 0"), "line 2: path '../x.png' leads out of"),
    "path out and in": (edit_list("train/../../a/b.png 0"), "leads out of"),
    "path missing": (edit_list("train/ant/9.png 0"), "line 1: there is no file 'train/ant/9.png'"),
    "path a folder": (edit_list("train/ant 0"), "there is no file 'train/ant'"),
    "path with a null": (edit_list("train/a\0nt/1.png 0"), r"path 'train/a\\x00nt/1.png' cannot"),
    "path endless": (edit_list("a" * 5000 + "/b.png 0"), "line 1: "),
    "path twice": (edit_list(LINE + LINE), "line 2: .*already given in .*line 1"),
    "listed link out": (linked("secret/0.png", "train/ant/0.png"), "line 1: .*leads out of"),
    "listed folder out": (linked("moved", "train/ant"), "line 1: .*leads out of"),
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
    "tiny unknown id": (edit_tiny("wnids.txt", "n01\nn02\nn04"), "differ: 'n03', 'n04'"),
    "tiny id twice": (edit_tiny("wnids.txt", "n01\nn02\nn03\nn03"), "differ: an id is repeated"),
    "tiny val line": (edit_tiny("val/val_annotations.txt", "val_0.JPEG"), "line 1: must begin"),
    "tiny val id": (edit_tiny("val/val_annotations.txt", "val_0.JPEG\tn99"), "line 1: must begin"),
    "tiny val file": (edit_tiny("val/val_annotations.txt", "../a n01"), "line 1: there is no file"),
    "tiny val out": (edit_tiny("val/val_annotations.txt", "../../../a n01"), "leads out of"),
    "tiny words": (edit_tiny("words.txt", "n01 ant"), "words.txt, line 1: must be an id, a tab"),
    "no such column": (
        then(saved_to_disk, label_column="x"),
        r"`label_column` .*img \(Image\), label",
    ),
    "no such image column": (
        then(saved_to_disk, image_column="x"),
        "`image_column` must be one of 'img', 'label', got 'x'",
    ),
    "column not labels": (then(saved_to_disk, label_column="img"), "a column of class labels"),
    "column not images": (then(saved_to_disk, image_column="label"), "a column of images"),
    "no image column": (no_image_column, r"no column could be the `image_column`.*text \(string\)"),
    "no such split": (
        then(saved_to_disk, train_split="x"),
        "`train_split` must be one of 'train', 'va",
    ),
    "no test split": (lambda r: saved_to_disk(r, test="later"), "None is named test, validation"),
    "broken parquet": (broken_parquet, "cannot be read"),
    "unlabelled rows": (
        labelled(datasets.ClassLabel(names=list(CLASSES)), [0, 0, -1, 1, 1, 2]),
        "row 2 of split train has label -1.*choose a split",
    ),
    "missing labels": (
        labelled(datasets.Value("int64"), [0, None, 0, 1, 1, 2]),
        "1 rows of split train have no 'label'",
    ),
    "label beyond the rows": (
        labelled(datasets.Value("int64"), [0, 0, 0, 1, 1, 6]),
        "row 5 of split train has label 6, which must be in 0..5",
    ),
    "test label unseen": (
        labelled(datasets.Value("string"), ["ant"] * 6),
        "valid has labels that training has not: 'bee', 'cat'",
    ),
    "test classes in another order": (other_order, "split valid must have .*not so: their order"),
    "fractions": (labelled(datasets.Value("float64"), [0.5] * 6), "a column of class labels"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told(case, tmp_path):
    build, message = BAD[case]
    given = build(tmp_path / "set")
    with pytest.raises(ValueError, match=message):
        load_images(**given)


def test_a_dataset_is_a_name_or_a_path():
    with pytest.raises(TypeError, match="`dataset` must be a name or a path, got 3"):
        load_images(3)
    with pytest.raises(TypeError, match="`train_list`"):
        load_images(".", train_list=["a"])


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        (ConnectionError("offline"), ConnectionError, "'a/b'.*could not be reached.*hub layout"),
        (datasets.exceptions.DatasetNotFoundError("gone"), ValueError, "'a/b'.*none of that name"),
        (RuntimeError("odd"), ValueError, "'a/b' cannot be read: odd"),
    ],
)
def test_hub_failures(raised, kind, message, monkeypatch):
    def fail(*_, **__):
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(kind, match=message):
        load_images("a/b")


def test_a_table_cannot_name_files_elsewhere(tmp_path):
    write(tmp_path / "secret.png", png("train", 0))
    inside = write(tmp_path / "set" / "inside.png", png("train", 5))
    rows = [{"bytes": None, "path": str(tmp_path / "secret.png")}, None]
    rows += [{"bytes": None, "path": str(inside)}]
    features = datasets.Features(
        {"img": datasets.Image(), "label": table("train").features["label"]}
    )
    for split in ("train", "test"):
        rows_of_split = {"img": rows, "label": [0, 1, 2]}
        made = datasets.Dataset.from_dict(rows_of_split, features=features)
        made.to_parquet(tmp_path / "set" / f"{split}.parquet")
    train, _ = load_images(tmp_path / "set", cache_dir=tmp_path / ".cache")
    with pytest.raises(ValueError, match=r"row 0 of split train cannot be read .*leads out of"):
        train[0]
    with pytest.raises(ValueError, match=r"row 1 of split train cannot be read .*is empty here"):
        train[1]
    assert train[2][0].getpixel((0, 0)) == picture("train", 5).getpixel((0, 0))
