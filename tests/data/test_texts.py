import sys

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value
from paths import DATA

from ldam_plugins.data.readers import stdlib_docstrings as docstrings
from ldam_plugins.data.readers.stdlib_docstrings import read_docstrings
from ldam_plugins.data.texts import load_texts, subsample_classes

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
        ([0.0, 1.0, 1.0], Value("float32"), r"label \(float32\)'. Cast it.*cast_column"),
        ([[0, 1], [1, 0], [1, 1]], Sequence(Value("int64")), "Several labels a text"),
        ([0, -1, 1], Value("int64"), "row 1 of split train has label -1"),
        ([0, None, 1], Value("int64"), "1 rows of split train have no 'label'"),
    ],
)
def test_labels_that_are_not_one_class_a_text(hub_folder, labels, feature, message):
    features = Features({"text": Value("string"), "label": feature})
    expect(message, hub_folder({**ROWS, "label": labels}, features=features), label_column="label")


def test_label_of_the_test_set_that_training_has_not(hub_folder):
    train = {"text": ["a", "b"], "label": ["x", "y"]}
    folder = hub_folder(train, {"text": ["c"], "label": ["z"]})
    expect("split test has labels that training has not: 'z'", folder)


def test_a_test_set_whose_classes_are_in_another_order_is_refused(tmp_path):
    made = {}
    for split, names in (("train", ["neg", "pos"]), ("test", ["pos", "neg"])):
        features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
        made[split] = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    DatasetDict(made).save_to_disk(str(tmp_path))
    expect("column 'label' of split test must have the classes .*not so: their order", tmp_path)


def test_thin_classes_keeps_a_share_of_the_rare_ones():
    labels = np.array([0, 1] * 50)
    kept = subsample_classes(labels, ["neg", "pos"], ["neg"], 0.1)
    assert np.bincount(labels[kept]).tolist() == [5, 50]
    assert (np.diff(kept) > 0).all()
    order = np.flatnonzero(labels == 0)
    np.random.RandomState(0).shuffle(order)
    assert set(kept[labels[kept] == 0]) == set(order[:5])
    other = subsample_classes(labels, ["neg", "pos"], ["neg"], 0.1, seed=1)
    assert set(other) != set(kept)


def test_thin_classes_without_rare_classes_keeps_all():
    assert subsample_classes([1, 0, 1], ["a", "b"], [], 0.1).tolist() == [0, 1, 2]
    assert subsample_classes([1, 0, 1], ["a", "b"], ["a", "b"], 1).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("rare", "fraction", "message"),
    [
        (["negative"], 0.1, "`rare_classes` must be one of 'neg', 'pos', got 'negative'"),
        (["neg"], 0.0, r"`rare_fraction` must be in \(0, 1\], got 0.0"),
        (["neg"], 0.3, "large enough that 'neg' keeps one of 3 samples, got 0.3"),
    ],
)
def test_thin_classes_refuses(rare, fraction, message):
    with pytest.raises(ValueError, match=message):
        subsample_classes([0, 0, 0, 1], ["neg", "pos"], rare, fraction)


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small standard library of two modules with enough texts, and others."""
    monkeypatch.setattr(docstrings, "MIN_TEXTS", 5)
    source = "\n".join(f'def f{i}():\n    """Text {i} of {{0}}."""' for i in range(5))
    (tmp_path / "ast.py").write_text(
        f'"""About  trees\n    and nodes."""\nimport antigravity_\n{source.format("ast")}\n'
        'class C:\n    """Shared by two modules."""\n    def m(self):\n        "Text 4 of ast."\n'
    )
    (tmp_path / "json" / "tests").mkdir(parents=True)
    (tmp_path / "json" / "__init__.py").write_text('"""Shared by two modules."""\n')
    (tmp_path / "json" / "a.py").write_text(
        f'if True:\n    def g():\n        """Deep in the module."""\n{source.format("json")}\n'
        'def h():\n    """Two words."""\n'
    )
    (tmp_path / "json" / "tests" / "b.py").write_text('"""Not a text of the library."""\n')
    (tmp_path / "os.py").write_text('"""Too few texts here."""\n')
    (tmp_path / "foreign.py").write_text(source.format("foreign"))
    return tmp_path


def test_docstrings_of_a_library(library):
    train, test, names = read_docstrings(library)
    assert names == ("ast", "json")
    texts = [*train[0], *test[0]]
    labels = np.concatenate([train[1], test[1]])
    found = {
        name: {t for t, y in zip(texts, labels, strict=True) if y == c}
        for c, name in enumerate(names)
    }
    assert found["ast"] == {"About trees and nodes.", *(f"Text {i} of ast." for i in range(5))}
    assert found["json"] == {"Deep in the module.", *(f"Text {i} of json." for i in range(5))}
    assert len(texts) == 12
    assert np.bincount(test[1]).tolist() == [1, 1]
    assert read_docstrings(library)[0][0] == train[0]


def test_docstrings_need_sources(tmp_path):
    with pytest.raises(ValueError, match="sources of Python's standard library"):
        read_docstrings(tmp_path)


def test_embedded_docstrings_import_nothing():
    before = set(sys.modules)
    train, test = load_texts("stdlib_docstrings")
    for name in ("antigravity", "this", "tkinter", "turtle"):
        assert name in before or name not in sys.modules
    assert 4000 < len(train) + len(test) < 9000
    counts = np.bincount(np.array(train["label"]))
    names = train.features["label"].names
    assert len(names) == len(counts) == len(set(test["label"]))
    assert counts.min() >= 16
    assert counts.max() / counts.min() > 10
    assert not set(train["text"]) & set(test["text"])
    assert {"asyncio", "email", "logging"} <= set(names)


@pytest.mark.parametrize(
    "option", [{"text_column": "text"}, {"label_column": "label"}, {"test_split": "test"}]
)
def test_embedded_docstrings_have_no_columns_to_choose(option):
    expect(f"`{next(iter(option))}` must be left out", "stdlib_docstrings", **option)


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the shared data beside the checkout")
@pytest.mark.parametrize(("name", "rows", "classes"), [("banking77", (10003, 3080), 77)])
def test_real_data(name, rows, classes):
    train, test = load_texts(DATA / name)
    assert (len(train), len(test)) == rows
    assert len(train.features["label"].names) == classes
