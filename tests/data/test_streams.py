import io

import numpy as np
import pyarrow.parquet as pq
import pytest
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pillow
from torch.utils.data import DataLoader

from ldam_plugins.data import load_texts, stream_images, stream_texts
from ldam_plugins.data.notes import DataNotes
from ldam_plugins.data.readers import hub_streams


def grey(value):
    file = io.BytesIO()
    Pillow.new("L", (2, 2), value).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": f"{value}.png"}


def write(folder, split, columns, features=None, shards=1):
    folder.mkdir(exist_ok=True)
    table = Dataset.from_dict(columns, features=features)
    for index in range(shards):
        name = f"{split}-{index:05d}-of-{shards:05d}.parquet"
        table.shard(shards, index).to_parquet(folder / name)


@pytest.fixture
def images(tmp_path):
    """23 images, each of its own grey, in three files; classes of 14, 6 and 3."""
    names = ["cat", "dog", "none", "eel"]
    features = Features({"img": Image(), "label": ClassLabel(names=names)})
    labels = np.repeat([0, 1, 3], [14, 6, 3]).tolist()
    columns = {"img": [grey(value) for value in range(23)], "label": labels}
    write(tmp_path / "hub", "train", columns, features, shards=3)
    columns = {"img": [grey(value) for value in range(5)], "label": [0, 1, 2, 3, 0]}
    write(tmp_path / "hub", "test", columns, features)
    return tmp_path / "hub"


def greys(images):
    return [image.getpixel((0, 0))[0] for image, _ in images]


def test_every_row_is_read_once_an_epoch_in_an_order_of_its_own(images):
    notes = DataNotes()
    train, test = stream_images(images, shuffle_buffer=8, seed=3, notes=notes)
    assert train.class_names == ("cat", "dog", "eel")
    assert train.class_counts.counts.tolist() == [14, 6, 3]
    assert (len(train), len(test), test.counts.tolist()) == (23, 4, [2, 1, 1])
    orders = []
    for epoch in (0, 1, 0):
        train.rows.set_epoch(epoch)
        orders.append(greys(train))
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(23))
    assert orders[0] == orders[2] != orders[1]
    assert orders[0] != sorted(orders[0])
    assert [label for _, label in test] == [0, 1, 2, 0]
    assert any("'none'" in said for said in notes.said)
    assert notes.left_out == {"examples of split test whose class training has not": 1}


@pytest.mark.parametrize(
    ("processes", "drop_last"), [(1, False), (2, False), (3, False), (2, True)]
)
def test_processes_see_disjoint_rows_and_as_many_batches(images, processes, drop_last):
    seen, batches = [], []
    for process in range(processes):
        train, _ = stream_images(images, shuffle_buffer=8)
        train.rows.set_epoch(2)
        loader = DataLoader(train, 3, sampler=train.rows, drop_last=drop_last)
        shard = BatchSamplerShard(loader.batch_sampler, processes, process)
        parts = [greys(train[row] for row in batch) for batch in shard]
        assert len(parts) == len(shard)
        batches.append(len(parts))
        seen.append(parts)
    assert len(set(batches)) == 1
    in_turn = [batch for turn in zip(*seen, strict=True) for batch in turn]
    flat = [value for batch in in_turn for value in batch]
    known = 3 * processes * batches[0] if drop_last else 23
    assert len(set(flat[:known])) == known
    # The same order as that of one process, whatever their number.
    train.rows.set_epoch(2)
    assert flat[:known] == greys(train)[:known]


def test_what_is_skipped_is_what_was_trained_on(images):
    train, _ = stream_images(images, shuffle_buffer=8)
    train.rows.set_epoch(1)
    loader = DataLoader(train, 4, sampler=train.rows)
    whole = [[row.label for row in batch] for batch in loader.batch_sampler]
    rest = SkipBatchSampler(loader.batch_sampler, skip_batches=2)
    assert [[row.label for row in batch] for batch in rest] == whole[2:]


def test_worker_processes_decode_in_the_same_order(images):
    train, _ = stream_images(images, shuffle_buffer=8)
    train.transform = lambda image: image.getpixel((0, 0))[0]
    here = [value for value, _ in train]
    loader = DataLoader(train, 4, sampler=train.rows, num_workers=1)
    assert [int(value) for values, _ in loader for value in values] == here


def test_a_stream_has_no_random_access(images):
    train, _ = stream_images(images)
    with pytest.raises(TypeError, match=r"sampler=stream\.rows"):
        next(iter(DataLoader(train, 2)))


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    features = Features({"img": Image(), "label": ClassLabel(names=["cat", "dog"])})
    broken = {"bytes": b"no image", "path": "broken.png"}
    columns = {"img": [grey(1), broken], "label": [0, 1]}
    for split in ("train", "test"):
        write(tmp_path / "hub", split, columns, features)
    train, _ = stream_images(tmp_path / "hub")
    with pytest.raises(ValueError, match=r"broken\.png, of class 'dog'.*split train"):
        list(train)


@pytest.mark.parametrize("outside", ["../secret.png", "/etc/hostname", "https://example.org/x.png"])
def test_a_path_that_leads_out_of_the_data_is_not_read(tmp_path, outside):
    features = Features({"img": Image(decode=False), "label": ClassLabel(names=["cat", "dog"])})
    rows = [grey(1), {"bytes": None, "path": outside}]
    table = Dataset.from_dict({"img": rows, "label": [0, 1]}, features=features).data.table
    (tmp_path / "hub").mkdir()
    for split in ("train", "test"):  # `Dataset.to_parquet` would open the file itself
        pq.write_table(table.cast(features.arrow_schema), tmp_path / "hub" / f"{split}.parquet")
    train, _ = stream_images(tmp_path / "hub")
    with pytest.raises(ValueError, match="leads out of"):
        list(train)


TEXTS = {"train": ["a a", "b", "c", "d", "e"], "test": ["x", "y"]}
LABELS = {"train": ["no", "NA", "no", " no", "NA"], "test": ["NA", "no"]}


@pytest.mark.parametrize("form", ["parquet", "csv", "jsonl"])
def test_texts_have_the_classes_that_load_texts_gives_them(tmp_path, form):
    folder = tmp_path / "texts"
    folder.mkdir()
    for split in TEXTS:
        columns = {"text": TEXTS[split], "label": LABELS[split]}
        if form == "parquet":
            write(folder, split, columns)
        elif form == "csv":
            Dataset.from_dict(columns).to_csv(folder / f"{split}.csv")
        else:
            Dataset.from_dict(columns).to_json(folder / f"{split}.jsonl")
    train, test = stream_texts(folder)
    stored = load_texts(folder)
    for stream, table in zip((train, test), stored, strict=True):
        assert stream.features == table.features
        found = sorted((row["text"], row["label"]) for row in stream)
        assert found == sorted(zip(table["text"], table["label"], strict=True))
    assert train.counts.tolist() == [2, 3]


def test_integer_labels_are_classes_in_the_order_of_the_numbers(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / "hub", split, {"text": ["a", "b", "c"], "label": [40, 3, 40]})
    train, _ = stream_texts(tmp_path / "hub")
    assert (train.class_names, train.counts.tolist()) == (("3", "40"), [1, 2])
    assert sorted(row["label"] for row in train) == [0, 1, 1]


@pytest.mark.parametrize(
    ("given", "named"),
    [([2, 3], True), ({"no": 3, "NA": 2}, True), ({"no": 3, "NA": 2}, False)],
)
def test_counts_that_are_given_are_not_counted(tmp_path, given, named, monkeypatch):
    names = Features({"text": Value("string"), "label": ClassLabel(names=["NA", "no"])})
    for split in TEXTS:
        labels = [label.strip() for label in LABELS[split]]
        columns = {"text": TEXTS[split], "label": labels}
        write(tmp_path / "hub", split, columns, names if named else None)
    counted = []
    count = hub_streams._RowCount.__call__
    monkeypatch.setattr(
        hub_streams._RowCount,
        "__call__",
        lambda self, split, *rest: counted.append(split) or count(self, split, *rest),
    )
    train, test = stream_texts(tmp_path / "hub", class_counts=given)
    assert counted == ["test"]
    assert (train.class_names, train.counts.tolist()) == (("NA", "no"), [2, 3])
    assert len(list(train)) == 5
    assert len(test) == 2


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([2, 3, 4], "must be 2 counts"),
        ([2.5, 3], "whole number"),
        ({"NA": 2, "yes": 3}, "yes"),
    ],
)
def test_counts_of_other_classes_are_refused(tmp_path, given, reason):
    names = Features({"text": Value("string"), "label": ClassLabel(names=["NA", "no"])})
    for split in TEXTS:
        columns = {"text": TEXTS[split], "label": [label.strip() for label in LABELS[split]]}
        write(tmp_path / "hub", split, columns, names)
    with pytest.raises(ValueError, match=reason):
        stream_texts(tmp_path / "hub", class_counts=given)


@pytest.mark.parametrize("given", [{"NA": 1, "no": 4}, {"NA": 2, "no": 4}, {"NA": 2}])
def test_counts_that_are_not_those_of_the_rows_stop_the_first_epoch(tmp_path, given):
    for split in TEXTS:
        columns = {"text": TEXTS[split], "label": [label.strip() for label in LABELS[split]]}
        write(tmp_path / "hub", split, columns)
    given = given if len(given) > 1 else {**given, "yes": 1}
    with pytest.raises(ValueError, match="class_counts"):
        list(stream_texts(tmp_path / "hub", class_counts=given)[0])


def test_rows_without_text_or_label_stop_or_are_left_out_and_counted(tmp_path):
    columns = {"text": ["a", None, "c", " ", "e"], "label": ["x", "x", None, "y", "y"]}
    for split in ("train", "test"):
        write(tmp_path / "hub", split, columns)
    with pytest.raises(ValueError, match="skip_empty"):
        stream_texts(tmp_path / "hub")
    with pytest.raises(ValueError, match="skip_empty"):
        list(stream_texts(tmp_path / "hub", class_counts={"x": 1, "y": 1}, skip_empty=False)[0])
    notes = DataNotes()
    train, _ = stream_texts(tmp_path / "hub", skip_empty=True, notes=notes)
    assert sorted(row["text"] for row in train) == ["a", "e"]
    assert notes.left_out["rows of split train without 'text'"] == 2
    assert notes.left_out["rows of split train without 'label'"] == 1


def test_rows_that_are_sorted_by_class_are_told(tmp_path):
    columns = {"text": ["a"] * 40, "label": ["x"] * 20 + ["y"] * 20}
    mixed = {**columns, "label": ["x", "y", "y", "x"] * 10}
    for name, train in (("sorted", columns), ("mixed", mixed)):
        write(tmp_path / name, "train", train)
        write(tmp_path / name, "test", columns)
    for name, buffer, told in (("sorted", 10, True), ("sorted", 40, False), ("mixed", 10, False)):
        notes = DataNotes()
        stream_texts(tmp_path / name, shuffle_buffer=buffer, notes=notes)
        assert any("sorted by class" in said for said in notes.said) == told


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"test_split": "train[:10%]"}, "whole split"),
        ({"test_split": "validation"}, "one of 'train', 'test'"),
        ({"text_column": "words"}, "text_column"),
        ({"label_column": "score"}, "label_column"),
        ({"shuffle_buffer": 0}, "shuffle_buffer"),
    ],
)
def test_what_cannot_be_streamed_is_refused(tmp_path, options, reason):
    columns = {"text": ["a", "b"], "label": ["x", "y"], "score": [0.5, 1.5]}
    for split in ("train", "test"):
        write(tmp_path / "hub", split, columns)
    with pytest.raises(ValueError, match=reason):
        stream_texts(tmp_path / "hub", **options)


def test_a_stream_without_a_part_to_test_on_is_not_divided(tmp_path):
    write(tmp_path / "hub", "train", {"text": ["a", "b"], "label": ["x", "y"]})
    with pytest.raises(ValueError, match="not divided"):
        stream_texts(tmp_path / "hub")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("text;label\na;x\nb;y\n", "commas between the columns"),
        ("text,label\n\xe9,x\nb,y\n", r"split train .* cannot be read .*UTF-8"),
    ],
)
def test_other_csv_files_are_told(tmp_path, text, reason):
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=reason):
        stream_texts(tmp_path)


def test_what_is_on_the_disk_anyway_is_told(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,x\nb,y\n")
    for load, name in ((stream_images, "digits"), (stream_texts, tmp_path / "a.csv")):
        with pytest.raises(ValueError, match="leave --streaming out"):
            load(name)
