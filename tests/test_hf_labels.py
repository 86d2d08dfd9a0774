"""Labels are counted from whatever a Trainer trains on."""

import random

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from torch.utils.data import ConcatDataset, Subset, TensorDataset
from torch.utils.data import Dataset as TorchDataset
from transformers import default_data_collator

from ldam_plugins.hf_labels import count_labels, read_labels

LABELS = [2, 0, 1, 0, 0, 1]


def _table(name="label", **more):
    return Dataset.from_dict({name: LABELS, "text": ["x"] * len(LABELS), **more})


class _Rows(TorchDataset):
    """Rows as dicts; loading one draws random numbers, as augmentations do."""

    def __init__(self, labels=LABELS, name="labels", **attributes):
        self.rows, self.name, self.loaded = labels, name, []
        vars(self).update(attributes)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.loaded.append(index)
        noise = torch.rand(1).item() + np.random.rand() + random.random()
        return {"x": torch.full((2,), noise), self.name: self.rows[index]}


@pytest.mark.parametrize(
    "data",
    [
        _table(),
        _table("labels"),
        _table("label_ids"),
        _table(labels=LABELS),
        _table().with_format("torch"),
        _table().with_transform(lambda rows: {"pixels": rows["text"], "labels": rows["label"]}),
        _Rows(),
        _Rows(name="label"),
        _Rows([torch.tensor(y) for y in LABELS]),
        _Rows(targets=LABELS),
        Subset(_table(), range(6)),
        Subset(Subset(_Rows(), [5, 4, 3, 2, 1, 0]), [5, 4, 3, 2, 1, 0]),
        ConcatDataset([Subset(_table(), [0, 1]), Subset(_Rows(), [2, 3, 4, 5])]),
    ],
)
def test_order_and_counts(data):
    labels = read_labels(data, default_data_collator)
    assert labels.dtype == np.int64
    assert labels.tolist() == LABELS
    assert count_labels(data, 3, default_data_collator).counts.tolist() == [3, 2, 1]
    assert count_labels(data, None, default_data_collator).counts.tolist() == [3, 2, 1]


def test_tuples_go_through_the_collator():
    data = TensorDataset(torch.randn(6, 2), torch.tensor(LABELS))

    def collate(rows):
        return {"x": torch.stack([x for x, _ in rows]), "labels": torch.stack([y for _, y in rows])}

    assert read_labels(data, collate).tolist() == LABELS


def test_no_other_column_is_decoded():
    def fail(rows):
        raise AssertionError("decoded")

    data = _table().with_format("torch")
    data.set_format("numpy", columns=["label"])
    assert read_labels(data, fail).tolist() == LABELS


def test_targets_are_believed_only_if_the_rows_bear_them_out():
    true = _Rows(targets=LABELS)
    assert read_labels(true, default_data_collator).tolist() == LABELS
    assert true.loaded == [0, 3, 5]
    shifted = _Rows(targets=[y + 1 for y in LABELS])
    assert read_labels(shifted, default_data_collator).tolist() == LABELS


def test_a_transform_that_makes_other_labels_is_followed():
    data = _table().with_transform(lambda rows: {"labels": [2 - y for y in rows["label"]]})
    assert read_labels(data, default_data_collator).tolist() == [2 - y for y in LABELS]


def test_counting_leaves_the_random_states_alone():
    def draw():
        return torch.rand(1).item(), np.random.rand(), random.random()

    states = []
    for count in (True, False):
        torch.manual_seed(5)
        np.random.seed(5)
        random.seed(5)
        if count:
            read_labels(_Rows(), default_data_collator)
        states.append(draw())
    assert states[0] == states[1]


def test_names_of_classes_are_kept():
    features = Features({"label": ClassLabel(names=["a", "b", "c"]), "text": Value("string")})
    counts = count_labels(_table().cast(features), 3, default_data_collator)
    assert counts.class_names == ("a", "b", "c")


def test_ignored_rows_count_nowhere():
    data = Dataset.from_dict({"label": [*LABELS, -100, -100]})
    assert count_labels(data, 3, default_data_collator).counts.tolist() == [3, 2, 1]
    assert len(read_labels(data, default_data_collator)) == 8


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (Dataset.from_dict({"y": LABELS}), ValueError, "rename_column"),
        (_table(labels=LABELS[::-1]), ValueError, "remove_columns"),
        (_Rows(name="y"), ValueError, "Name the labels so"),
        (_Rows([[1, 0], [0, 1]]), TypeError, "multi-hot"),
        (_Rows(["a", "b"]), TypeError, "class_encode_column"),
        (_table().to_iterable_dataset(), ValueError, "class_counts="),
    ],
)
def test_bad_data_says_what_to_write(data, error, message):
    with pytest.raises(error, match=message):
        read_labels(data, default_data_collator)
