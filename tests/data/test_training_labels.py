"""Labels are read from any data set, as its data loader would give them."""

import random
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from hf_samples import COUNTS, logged, make_data, make_model, make_trainer
from labelled_rows import LABELS, LabelRows, label_table, labels_of
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset
from torch.utils.data import Dataset as TorchDataset
from transformers import BatchEncoding, TrainerCallback, default_data_collator

from ldam_plugins import DRWCallback
from ldam_plugins.data.labels import count_labels
from ldam_plugins.data.training_labels import TrainingLabels


class _Given(TorchDataset):
    """Examples as they are."""

    def __init__(self, *examples):
        self.examples = examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]


@dataclass
class _Example:
    x: int
    label: int


def _never(rows):
    raise AssertionError("collated")


def _doubled(rows):
    return {"labels": [2 * y for y in rows["label"]]}


@pytest.mark.parametrize(
    "data",
    [
        label_table(),
        label_table("labels"),
        label_table("label_ids"),
        label_table(labels=LABELS),
        label_table().with_format("torch"),
        label_table().with_transform(
            lambda rows: {"pixels": rows["text"], "labels": rows["label"]}
        ),
        Dataset.from_dict({"label": [[y] for y in LABELS]}),
        LabelRows(),
        LabelRows(name="label"),
        LabelRows([torch.tensor(y) for y in LABELS]),
        LabelRows([torch.tensor([y]) for y in LABELS]),
        LabelRows(np.asarray(LABELS, np.uint8)),
        _Given(*(BatchEncoding({"labels": y}) for y in LABELS)),
        _Given(*(_Example(7, y) for y in LABELS)),
        Subset(label_table(), range(6)),
        Subset(Subset(LabelRows(), [5, 4, 3, 2, 1, 0]), [5, 4, 3, 2, 1, 0]),
        ConcatDataset([Subset(label_table(), [0, 1]), Subset(LabelRows(), [2, 3, 4, 5])]),
    ],
)
def test_order_and_counts(data):
    labels = labels_of(data, _never)
    assert labels.read().dtype == np.int64
    assert labels.read().tolist() == LABELS
    assert labels.count(3).counts.tolist() == [3, 2, 1]
    assert labels.count(None).counts.tolist() == [3, 2, 1]


class TestAttributesAreNotBelieved:
    """What a data set keeps beside its examples says nothing of what it gives."""

    @pytest.mark.parametrize("name", ["targets", "labels", "label", "y"])
    @pytest.mark.parametrize(
        "values",
        [
            LABELS[::-1],
            [2, 1, 0, 1, 0, 1],  # right in the first, middle and last row
            dict(zip("abcdef", LABELS, strict=True)),
            pd.Series(LABELS, index=[40, 7, 3, 2, 1, 0]),
            torch.tensor(LABELS[::-1]),
        ],
    )
    def test_of_a_data_set_of_ones_own(self, name, values):
        assert labels_of(LabelRows(**{name: values})).read().tolist() == LABELS

    def test_of_a_transform(self):
        data = label_table().with_transform(_doubled)
        assert labels_of(data).read().tolist() == [4, 0, 2, 0, 0, 2]
        assert labels_of(Subset(data, [1, 0])).read().tolist() == [0, 4]

    def test_of_a_subset_that_labels_anew(self):
        class Other(Subset):
            def __getitem__(self, index):
                return {"labels": 2 - self.dataset[self.indices[index]]["label"]}

            def __getitems__(self, indices):
                return [self[index] for index in indices]

        assert labels_of(Other(label_table(), range(6))).read().tolist() == [2 - y for y in LABELS]

    def test_of_a_table_that_gives_its_batches_itself(self):
        class Other(Dataset):
            def __getitems__(self, keys):
                return [{"labels": 2 - row["label"]} for row in super().__getitems__(keys)]

        table = label_table()
        assert labels_of(Other(table.data)).read().tolist() == [2 - y for y in LABELS]


class TestExamplesAreLoaded:
    def test_once_and_for_all_that_ask(self):
        data = LabelRows()
        labels = labels_of(data)
        labels.count(3)
        labels.read()
        assert data.loaded == [0, 1, 2, 3, 4, 5]

    def test_only_those_of_a_subset(self):
        data = LabelRows()
        assert labels_of(Subset(data, [5, 0])).read().tolist() == [1, 2]
        assert data.loaded == [5, 0]

    def test_in_the_workers_of_the_loader(self):
        data = LabelRows()
        assert labels_of(data, num_workers=1).read().tolist() == LABELS
        assert not data.loaded  # in this process

    def test_progress_is_shown(self, capsys, monkeypatch):
        monkeypatch.setattr("ldam_plugins.data.training_labels._SECONDS_BEFORE_A_BAR", 0.0)
        labels = labels_of(LabelRows())
        labels.progress = True
        labels.read()
        assert "Reading labels: 100%" in capsys.readouterr().err

    @pytest.mark.parametrize("fails", [False, True])
    def test_random_states_stay(self, fails):
        def draw():
            return torch.rand(1).item(), np.random.rand(), random.random()

        states = []
        for count in (True, False):
            torch.manual_seed(5)
            np.random.seed(5)
            random.seed(5)
            if count and fails:
                with pytest.raises(ValueError, match="row 1"):
                    labels_of(LabelRows([0, None])).read()
            elif count:
                labels_of(LabelRows()).read()
            states.append(draw())
        assert states[0] == states[1]

    def test_a_row_that_cannot_be_loaded(self):
        class Broken(LabelRows):
            def __getitem__(self, index):
                return {"labels": 0} if index != 5 else 1 / 0

        wanted = r"ZeroDivisionError in row {}: .*class_counts="
        with pytest.raises(ValueError, match=wanted.format(5)) as caught:
            labels_of(Broken()).read()
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        with pytest.raises(ValueError, match=r"in row 4\.\.5: .*class_counts="):
            labels_of(Broken(), num_workers=1).read()


class TestCollatorsAreNotNeeded:
    def test_that_drop_examples(self):
        data = _Given(*({"labels": y} for y in LABELS[:3]), None, {"labels": 0})
        labels = labels_of(data, _never)
        assert labels.read().tolist() == [2, 0, 1, -100, 0]
        assert labels.count(3).counts.tolist() == [2, 1, 1]

    def test_that_mix(self):
        pairs = _Given(*((torch.zeros(2), y) for y in LABELS))

        def mix(rows):
            assert len(rows) in (4, 2)  # never a single one
            target_probs = torch.eye(3)[[y for _, y in rows]]
            return {"labels": target_probs.lerp(target_probs.flip(0), 0.3)}

        assert labels_of(pairs, mix).read().tolist() == LABELS

    def test_that_take_examples_without_names(self):
        data = TensorDataset(torch.randn(6, 2), torch.tensor(LABELS))

        def collate(rows):
            assert len(rows) in (4, 2)
            x, y = zip(*rows, strict=True)
            return {"x": torch.stack(x), "labels": torch.stack(y)}

        assert labels_of(data, collate).read().tolist() == LABELS

    def test_that_look_labels_up(self):
        data = _Given(*((torch.zeros(2), number) for number in range(6)))

        def collate(rows):
            return {"labels": torch.tensor([LABELS[number] for _, number in rows])}

        with pytest.raises(ValueError, match=r"data_collator.*class_counts="):
            labels_of(data, collate).read()

    @pytest.mark.parametrize(
        "example",
        [(torch.zeros(2), 3, 1), (torch.zeros(2), torch.eye(2)[0]), torch.zeros(2), {"y": 1}],
    )
    def test_a_label_that_is_not_certain(self, example):
        with pytest.raises(ValueError, match=r"examples hold one label.*class_counts="):
            labels_of(_Given(example, example), _never).read()

    def test_labels_that_differ(self):
        with pytest.raises(ValueError, match="different 'labels', 'label'"):
            labels_of(_Given({"label": 0, "labels": 1}), _never).read()


def test_names_of_classes_are_kept():
    features = Features({"label": ClassLabel(names=["a", "b", "c"]), "text": Value("string")})
    data = label_table().cast(features)
    assert labels_of(data).count(3).class_names == ("a", "b", "c")
    assert labels_of(Subset(data, range(6))).count(3).class_names == ("a", "b", "c")


@pytest.mark.parametrize("ignored", [-100, 255])
def test_ignored_rows_count_nowhere(ignored):
    loader = DataLoader(LabelRows([*LABELS, ignored, ignored]))
    labels = TrainingLabels(loader, 4, ignored=ignored)
    assert labels.count(3).counts.tolist() == [3, 2, 1]
    assert len(labels.read()) == 8


class TestDifference:
    def test_names_both(self):
        told = labels_of(label_table()).difference(count_labels(np.array([0, 1, 1, 2, 2, 2]), 3))
        assert "[1, 2, 3]" in told
        assert "[3, 2, 1]" in told
        assert labels_of(label_table()).difference(count_labels(np.asarray(LABELS), 3)) is None

    def test_is_not_asked_of_examples(self):
        data = LabelRows()
        assert labels_of(data).difference(count_labels(np.array([0, 1, 2]), 3)) is None
        assert not data.loaded

    @pytest.mark.parametrize("labels", [["a", "b"], [[0, 1], [1, 1]], [None, 1], [0, 9]])
    def test_is_not_asked_of_other_labels(self, labels):
        data = Dataset.from_dict({"label": labels})
        assert labels_of(data).difference(count_labels(np.array([0, 1]), 2)) is None


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Dataset.from_dict({"y": LABELS}), r'rename_column\("...", "label"\)'),
        (label_table(labels=LABELS[::-1]), "remove_columns"),
        (label_table().to_iterable_dataset(), "class_counts="),
        (SimpleNamespace(), "class_counts="),
    ],
)
def test_bad_data_says_what_to_write(data, message):
    loader = SimpleNamespace(dataset=data, collate_fn=default_data_collator)
    with pytest.raises(ValueError, match=message):
        TrainingLabels(loader, 4).read()


class _Rounds(TorchDataset):
    """Rows of a table whose labels a ``__getitem__`` looks up, beside an attribute or two."""

    def __init__(self, table, **attributes):
        self.table, self.loaded = table, 0
        vars(self).update(attributes)

    def __len__(self):
        return len(self.table)

    def __getitem__(self, index):
        self.loaded += 1
        return self.table[index]


class _LoadedBeforeTheFirstUpdate(TrainerCallback):
    def on_train_begin(self, args, state, control, *, train_dataloader, **kwargs):
        self.loaded = train_dataloader.dataset.loaded


class TestInATraining:
    def _counts(self, tmp_path, data, **options):
        callback, told = DRWCallback(schedule="rs"), _LoadedBeforeTheFirstUpdate()
        trainer = make_trainer(
            tmp_path, make_model(), data, [callback, told], max_steps=2, **options
        )
        trainer.train()
        assert told.loaded == len(data)  # once, though counted and sampled by
        return callback.criterion.class_counts.counts.tolist()

    @pytest.mark.parametrize("name", ["labels", "targets"])
    @pytest.mark.parametrize("kind", ["dict", "series", "other order"])
    def test_no_attribute_is_taken_for_the_labels(self, name, kind, tmp_path):
        table = make_data()
        values = {
            "dict": dict(enumerate(table["label"], start=100)),
            "series": pd.Series(table["label"], index=range(7, 31)),
            "other order": [0, 1, 2] * 8,
        }[kind]
        assert self._counts(tmp_path, _Rounds(table, **{name: values})) == COUNTS

    def test_labels_that_a_column_is_mapped_to(self, tmp_path):
        table = make_data(counts=[12, 8, 4])  # transformed to 12, 4 and 8
        table = table.with_transform(
            lambda rows: {"input_ids": rows["input_ids"], "label": [-y % 3 for y in rows["label"]]}
        )
        callback = DRWCallback()
        make_trainer(tmp_path, make_model(), table, [callback], max_steps=1).train()
        assert callback.criterion.class_counts.counts.tolist() == [12, 4, 8]

    def test_examples_that_the_collator_drops(self, tmp_path):
        rows = [*make_data(), None]

        def whole(batch):
            return default_data_collator([row for row in batch if row is not None])

        callback = DRWCallback()
        options = {"data_collator": whole, "max_steps": 4}
        trainer = make_trainer(tmp_path, make_model(), rows, [callback], **options)
        trainer.train()
        assert callback.criterion.class_counts.counts.tolist() == COUNTS

    def test_a_collator_that_mixes_gets_the_same_batches_as_with_given_counts(self, tmp_path):
        rows = [(row["input_ids"], row["label"]) for row in make_data()]

        def mix(batch):
            tokens, labels = (torch.tensor(part) for part in zip(*batch, strict=True))
            target_probs = torch.nn.functional.one_hot(labels, 3).float()
            share = float(torch.rand(()))
            return {
                "input_ids": tokens,
                "labels": target_probs.lerp(target_probs.roll(1, 0), share),
            }

        losses = []
        for given in (None, COUNTS):
            callback = DRWCallback(class_counts=given)
            trainer = make_trainer(tmp_path, make_model(), rows, [callback], data_collator=mix)
            trainer.train()
            losses.append(logged(trainer, "loss"))
        assert losses[0] == losses[1]
