"""Tables of the hub, and of folders laid out like one: images and texts."""

from __future__ import annotations

import unicodedata

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value
from image_sets import (
    CLASSES,
    TEST,
    TRAIN,
    check_is_refused,
    hub_layout,
    picture,
    png,
    saved_to_disk,
    table,
    then,
    write,
)
from paths import DATA

from ldam_plugins.data import load_images
from ldam_plugins.data.notes import DataNotes
from ldam_plugins.data.texts import load_texts

CIFAR10 = DATA / "cifar10"


def test_fine_label_of_two_class_columns(tmp_path):
    made = {}
    for split in ("train", "test"):
        rows = table(split, label="fine_label")
        coarse = datasets.ClassLabel(names=["all"])
        made[split] = rows.add_column("coarse_label", [0] * len(rows), feature=coarse)
    datasets.DatasetDict(made).save_to_disk(str(tmp_path))
    notes = DataNotes()
    assert load_images(tmp_path, notes=notes)[0].class_names == CLASSES
    assert notes.said == [
        "The classes are those of column 'fine_label'; --label_column takes another: "
        "'coarse_label'."
    ]
    assert load_images(tmp_path, label_column="coarse_label")[0].class_names == ("all",)


def normal_forms(name):
    return {form: unicodedata.normalize(form, name) for form in ("NFC", "NFD")}


ACCENTS = normal_forms("caf\N{LATIN SMALL LETTER E WITH ACUTE}")


def test_labels_as_text_in_both_normal_forms_are_one_class(tmp_path):
    feature = datasets.Value("string")
    given = saved_to_disk(
        tmp_path, feature=feature, labels=[*ACCENTS.values(), "ant", "bee", "cat", "cat"]
    )
    train, test = load_images(**given, label_column="label")
    assert train.class_names == test.class_names == ("ant", "bee", ACCENTS["NFC"], "cat")
    assert train.labels.tolist() == [2, 2, 0, 1, 3, 3]


def test_a_slice_of_a_split_gives_its_images(tmp_path):
    given = saved_to_disk(tmp_path) | {"train_split": "train[2:]", "test_split": "valid[:50%]"}
    train, test = load_images(**given)
    assert (train.labels.tolist(), test.labels.tolist()) == (list(TRAIN[2:]), list(TEST[:2]))
    assert train.image(1).getpixel((0, 0)) == picture("train", 3).getpixel((0, 0))


@pytest.mark.skipif(not CIFAR10.is_dir(), reason="the shared copy of CIFAR-10 is not here")
def test_cifar10():
    train, test = load_images(CIFAR10)
    assert np.bincount(train.labels).tolist() == [5000] * 10
    assert np.bincount(test.labels).tolist() == [1000] * 10
    assert train.class_names[:2] == ("airplane", "automobile")
    assert train[49999][0].size == (32, 32)


def test_classes_that_one_side_lacks_are_told(tmp_path):
    train = ["ant", "bee ", "bee", "elk", "elk", "ant"]
    given = saved_to_disk(tmp_path, feature=datasets.Value("string"), labels=train)
    notes = DataNotes()
    train, test = load_images(**given, label_column="label", notes=notes)
    assert train.class_names == test.class_names == ("ant", "bee", "elk")
    assert train.labels.tolist() == [0, 1, 1, 2, 2, 0]
    assert test.labels.tolist() == [0, 1]
    assert [test.describe(i) for i in range(2)] == [f"row {i} of split valid" for i in range(2)]
    assert notes.left_out == {"examples of split valid whose class training has not": 2}
    assert any("no example of 1 classes: 'elk'" in said for said in notes.said)
    assert any("differ in blanks only" in said for said in notes.said)


@pytest.mark.parametrize(
    ("kind", "labels", "names"),
    [("int64", [1, 5, 3, 1, 1, 0], ("0", "1", "3", "5")), ("bool", [True] * 5 + [False], None)],
)
def test_sparse_integers_and_truths_are_classes(kind, labels, names, tmp_path):
    given = saved_to_disk(tmp_path, feature=datasets.Value(kind), labels=labels)
    train, _ = load_images(**given, label_column="label")
    assert train.class_names == (names or ("False", "True"))
    assert [train.class_names[label] for label in train.labels] == list(map(str, labels))


def test_rows_without_a_label_are_left_out_and_counted(tmp_path):
    feature = datasets.ClassLabel(names=list(CLASSES))
    given = saved_to_disk(tmp_path, feature=feature, labels=[0, -1, None, 1, 1, 2])
    notes = DataNotes()
    train, _ = load_images(**given, skip_empty=True, notes=notes)
    assert train.labels.tolist() == [0, 1, 1, 2]
    assert [train.describe(i)[:5] for i in range(4)] == ["row 0", "row 3", "row 4", "row 5"]
    assert notes.left_out == {"rows of split train without label": 2}


def test_splits_of_several_files(tmp_path):
    for split in ("train", "test"):
        for shard in range(2):
            rows = table(split).shard(2, shard, contiguous=True)
            rows.to_parquet(tmp_path / f"{split}-0000{shard}-of-00002.parquet")
    train, test = load_images(tmp_path, cache_dir=tmp_path / ".cache")
    assert (train.labels.tolist(), test.labels.tolist()) == (list(TRAIN), list(TEST))
    (tmp_path / "texts").mkdir()
    for split in ("train", "test"):
        for shard in range(2):
            line = f"text,label\n{split} {shard},{shard}\n"
            write(tmp_path / "texts" / f"{split}-0000{shard}-of-00002.csv", line)
    assert load_texts(tmp_path / "texts")[0]["text"][:] == ["train 0", "train 1"]


def test_one_parquet_file_is_split(tmp_path):
    table("train").to_parquet(tmp_path / "all.parquet")
    cache = tmp_path / ".cache"
    train, test = load_images(tmp_path / "all.parquet", test_split=0.3, cache_dir=cache)
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 0, 1, 2], [0, 1])


def labelled(feature, labels):
    def build(root):
        return saved_to_disk(root, feature=feature, labels=labels) | {"label_column": "label"}

    return build


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


BAD = {
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
    "test classes in another order": (other_order, "split valid must have .*not so: their order"),
    "fractions": (labelled(datasets.Value("float64"), [0.5] * 6), "a column of one class a row"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told(case, tmp_path):
    check_is_refused(*BAD[case], tmp_path / "set")


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


ROWS = {"text": ["good film", "bad film", "so so"], "label": [1, 0, 1]}


NAMED = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})


@pytest.fixture
def hub_folder(tmp_path):
    """Write parquet files as the hub lays them out; returns the folder."""

    def write(train=ROWS, test=None, features=None, test_split="test"):
        folder = tmp_path / "set"
        (folder / "data").mkdir(parents=True)
        for split, rows in (("train", train), (test_split, test or train)):
            name = f"{split}-00000-of-00001.parquet"
            Dataset.from_dict(rows, features=features).to_parquet(folder / "data" / name)
        return folder

    return write


def contents(dataset):
    return dataset["text"][:], dataset["label"][:], dataset.features["label"].names


def test_folder_in_hub_layout(hub_folder):
    train, test = load_texts(hub_folder(features=NAMED))
    for part in (train, test):
        assert contents(part) == (ROWS["text"], [1, 0, 1], ["neg", "pos"])
        assert part.column_names == ["text", "label"]


def test_saved_dataset(tmp_path):
    part = Dataset.from_dict(ROWS, features=NAMED)
    DatasetDict({"train": part, "validation": part}).save_to_disk(tmp_path / "saved")
    _, test = load_texts(str(tmp_path / "saved"))
    assert contents(test) == (ROWS["text"], [1, 0, 1], ["neg", "pos"])


def lengths(batch):
    return {"length": [len(text) for text in batch["text"]]}


def test_what_is_made_of_a_hub_folder_is_kept(hub_folder):
    folder = hub_folder(features=NAMED)
    first, again = (load_texts(folder)[0].map(lengths, batched=True) for _ in range(2))
    assert first.cache_files == again.cache_files != []
    assert again["length"][:] == [len(text) for text in ROWS["text"]]


def test_nothing_is_left_in_a_saved_dataset(tmp_path):
    part = Dataset.from_dict(ROWS, features=NAMED)
    DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "saved")
    before = sorted(tmp_path.rglob("*"))
    train, _ = load_texts(tmp_path / "saved")
    assert len(train.map(lengths, batched=True)) == len(ROWS["text"])
    assert sorted(tmp_path.rglob("*")) == before


def test_labels_as_strings_become_classes_in_sorted_order(hub_folder):
    train = {"text": ["a", "b", "c"], "label": ["zoo", "bar", "zoo"]}
    test = {"text": ["d"], "label": ["zoo"]}
    parts = load_texts(hub_folder(train, test))
    assert contents(parts[0]) == (["a", "b", "c"], [1, 0, 1], ["bar", "zoo"])
    assert contents(parts[1]) == (["d"], [1], ["bar", "zoo"])


def test_columns_and_splits_by_name(hub_folder):
    rows = {"review": ["a", "b"], "title": ["x", "y"], "stars": [0, 1], "label": [1, 0]}
    folder = hub_folder(rows, test_split="dev")
    train, test = load_texts(
        folder,
        text_column="review",
        label_column="stars",
        train_split="dev",
        test_split="train",
    )
    assert contents(train) == contents(test) == (["a", "b"], [0, 1], ["0", "1"])


def test_columns_by_type(hub_folder):
    rows = {"sentence": ["a", "b"], "intent": [1, 0]}
    features = Features({"sentence": Value("string"), "intent": ClassLabel(names=["x", "y"])})
    train, _ = load_texts(hub_folder(rows, features=features))
    assert contents(train) == (["a", "b"], [1, 0], ["x", "y"])


def test_column_called_text_goes_before_other_strings(hub_folder):
    rows = {"id": ["1", "2"], **{name: values[:2] for name, values in ROWS.items()}}
    train, _ = load_texts(hub_folder(rows))
    assert train["text"][:] == ["good film", "bad film"]


def test_empty_texts_stop_unless_left_out(hub_folder):
    rows = {"text": ["a", " \n", None, "d"], "label": [0, 0, 1, 1]}
    folder = hub_folder(rows, ROWS)
    with pytest.raises(ValueError, match=r"split train, got none in 2 rows.*row 1.*--skip_empty"):
        load_texts(folder)
    train, test = load_texts(folder, skip_empty=True)
    assert contents(train)[:2] == (["a", "d"], [0, 1])
    assert len(test) == 3


def expect(message, folder, **options):
    with pytest.raises(ValueError, match=message):
        load_texts(folder, **options)


def test_missing_things_are_named_with_what_there_is(hub_folder, tmp_path):
    folder = hub_folder(features=NAMED)
    expect(r"`text_column` must be one of 'text', 'label', got 'body'", folder, text_column="body")
    expect(r"`label_column` must be one of .*got 'labl'.*'label'", folder, label_column="labl")
    expect(r"`train_split` must be one of 'train', 'test', got 'tr'", folder, train_split="tr")
    expect(r"`test_split` must be one of 'train', 'test', got 'val'", folder, test_split="val")
    expect(r"`text_column` must be a column of strings", folder, text_column="label")
    expect("dataset", tmp_path / "nowhere" / "at all")


def test_slices_of_splits_as_in_datasets(hub_folder):
    folder = hub_folder(features=NAMED)
    train, test = load_texts(folder, train_split="train[:2]", test_split="train[2:]")
    assert contents(train) == (["good film", "bad film"], [1, 0], ["neg", "pos"])
    assert contents(test) == (["so so"], [1], ["neg", "pos"])
    _, test = load_texts(folder, test_split="test[34%:]")
    assert test["text"][:] == ["bad film", "so so"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_split": "train[x]"}, r"`train_split` must be a split or a slice of one, such as"),
        ({"train_split": "train[:200%]"}, r"`train_split` must be a split or a slice of one"),
        ({"test_split": "test[:9]+train[:2]"}, r"`test_split` must be a split or a slice of one"),
        ({"test_split": "tset[:9]"}, r"`test_split` must be one of 'train', 'test', got 'tset'"),
        ({"test_split": "test[2:1]"}, r"`test_split` must be a slice that holds one of 3 rows"),
        ({"test_split": "train"}, r"`test_split` must be other rows than `train_split`"),
    ],
)
def test_bad_slices_are_refused(hub_folder, options, message):
    expect(message, hub_folder(features=NAMED), **options)


def test_ambiguous_columns_are_named(hub_folder):
    rows = {"question": ["a"], "answer": ["b"], "label": [0]}
    expect(r"'question', 'answer' could be the `text_column`.*label \(int64\)", hub_folder(rows))


def test_no_column_of_labels(hub_folder):
    rows = {"text": ["a"], "score": [1]}
    expect(r"no column could be the `label_column`.*text \(string\), score", hub_folder(rows))


def test_no_test_split(hub_folder):
    folder = hub_folder(test_split="extra")
    expect("`test_split` must be one of 'train', 'extra', got None. None is named test", folder)


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        ([0.0, 0.5, 1.0], Value("float32"), r"label \(0\.5\)'. Cut the numbers into classes"),
        ([[0, 1], [1, 0], [1, 1]], Sequence(Value("int64")), "Several labels a text"),
        ([0, -1, 1], Value("int64"), "row 1 of split train has label -1"),
        ([0, None, 1], Value("int64"), "1 rows of split train have no 'label'"),
    ],
)
def test_labels_that_are_not_one_class_a_text(hub_folder, labels, feature, message):
    features = Features({"text": Value("string"), "label": feature})
    expect(message, hub_folder({**ROWS, "label": labels}, features=features), label_column="label")


def test_whole_numbers_that_pandas_keeps_as_floats(hub_folder):
    rows = {"text": ["a", "b", "c", "d"], "label": [2.0, 10.0, None, 2.0]}
    folder = hub_folder(rows)
    expect("1 rows of split train have no 'label'", folder)
    train, test = load_texts(folder, skip_empty=True)
    assert contents(train) == contents(test) == (["a", "b", "d"], [0, 1, 0], ["2", "10"])


def test_columns_that_are_found_by_name_are_told(hub_folder):
    rows = {"review": ["a", "b"], "Sentiment": ["bad", "good"]}
    notes = DataNotes()
    train, _ = load_texts(hub_folder(rows), notes=notes)
    assert contents(train) == (["a", "b"], [0, 1], ["bad", "good"])
    found = "'review' as --text_column, 'Sentiment' as --label_column"
    assert notes.said == [f"Columns read from split train: {found}."]


def test_one_split_that_was_saved(tmp_path):
    rows = {"text": [f"t{row}" for row in range(8)], "label": [0, 1] * 4}
    Dataset.from_dict(rows).save_to_disk(str(tmp_path))
    train, test = load_texts(tmp_path, test_split=0.25)
    assert sorted(train["text"][:] + test["text"][:]) == rows["text"]
    expect("None is named test.*--test_split 0.2", tmp_path)


def test_label_of_the_test_set_that_training_has_not(hub_folder):
    train = {"text": ["a", "b"], "label": ["x", "y"]}
    folder = hub_folder(train, {"text": ["c"], "label": ["z"]})
    expect("split test has no class that training has: 'z' there, 'x', 'y' in training", folder)


def test_a_test_set_whose_classes_are_in_another_order_is_refused(tmp_path):
    made = {}
    for split, names in (("train", ["neg", "pos"]), ("test", ["pos", "neg"])):
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        made[split] = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    DatasetDict(made).save_to_disk(str(tmp_path))
    expect("column 'label' of split test must have the classes .*not so: their order", tmp_path)
