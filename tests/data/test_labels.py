"""Labels are read from whatever a Trainer trains on, as its data loader would give them."""

import random
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from hf_samples import COUNTS, logged, make_data, make_model, make_trainer
from PIL import Image
from timm.data.dataset import ImageDataset
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset, random_split
from torch.utils.data import Dataset as TorchDataset
from torchvision.datasets import CIFAR10, MNIST, ImageFolder
from transformers import BatchEncoding, TrainerCallback, default_data_collator

from ldam_plugins import DRWCallback
from ldam_plugins.data.labels import TrainingLabels, class_indices, count_labels, known_labels

LABELS = [2, 0, 1, 0, 0, 1]


def _read(data, collate=default_data_collator, size=4, **options):
    loader = DataLoader(data, size, collate_fn=collate, **options)
    return TrainingLabels(loader, _arguments(size))


def _arguments(size=4):
    return SimpleNamespace(world_size=1, process_index=0, train_batch_size=size, disable_tqdm=True)


def _table(name="label", **more):
    return Dataset.from_dict({name: LABELS, "text": ["x"] * len(LABELS), **more})


class _Rows(TorchDataset):
    """Rows as dicts; loading one draws random numbers, as augmentations do."""

    def __init__(self, rows=LABELS, name="labels", **attributes):
        self.rows, self.name, self.loaded = rows, name, []
        vars(self).update(attributes)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        self.loaded.append(index)
        noise = torch.rand(1).item() + np.random.rand() + random.random()
        return {"x": torch.full((2,), noise), self.name: self.rows[index]}


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
        _table(),
        _table("labels"),
        _table("label_ids"),
        _table(labels=LABELS),
        _table().with_format("torch"),
        _table().with_transform(lambda rows: {"pixels": rows["text"], "labels": rows["label"]}),
        Dataset.from_dict({"label": [[y] for y in LABELS]}),
        _Rows(),
        _Rows(name="label"),
        _Rows([torch.tensor(y) for y in LABELS]),
        _Rows([torch.tensor([y]) for y in LABELS]),
        _Rows(np.asarray(LABELS, np.uint8)),
        _Given(*(BatchEncoding({"labels": y}) for y in LABELS)),
        _Given(*(_Example(7, y) for y in LABELS)),
        Subset(_table(), range(6)),
        Subset(Subset(_Rows(), [5, 4, 3, 2, 1, 0]), [5, 4, 3, 2, 1, 0]),
        ConcatDataset([Subset(_table(), [0, 1]), Subset(_Rows(), [2, 3, 4, 5])]),
    ],
)
def test_order_and_counts(data):
    labels = _read(data, _never)
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
        assert _read(_Rows(**{name: values})).read().tolist() == LABELS

    def test_of_a_transform(self):
        data = _table().with_transform(_doubled)
        assert _read(data).read().tolist() == [4, 0, 2, 0, 0, 2]
        assert _read(Subset(data, [1, 0])).read().tolist() == [0, 4]

    def test_of_a_subset_that_labels_anew(self):
        class Other(Subset):
            def __getitem__(self, index):
                return {"labels": 2 - self.dataset[self.indices[index]]["label"]}

            def __getitems__(self, indices):
                return [self[index] for index in indices]

        assert _read(Other(_table(), range(6))).read().tolist() == [2 - y for y in LABELS]

    def test_of_a_table_that_gives_its_batches_itself(self):
        class Other(Dataset):
            def __getitems__(self, keys):
                return [{"labels": 2 - row["label"]} for row in super().__getitems__(keys)]

        table = _table()
        assert _read(Other(table.data)).read().tolist() == [2 - y for y in LABELS]


@pytest.fixture
def folder(tmp_path):
    """Images of class a, a, a, b, b, c."""
    for number, name in enumerate("aaabbc"):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.new("RGB", (2, 2)).save(tmp_path / name / f"{number}.png")
    return tmp_path


class _NoImage:
    def __call__(self, image):
        raise AssertionError("decoded")


def _cifar(kind=CIFAR10, **attributes):
    data = object.__new__(kind)
    vars(data).update(
        {"data": np.zeros((6, 2, 2, 3), np.uint8), "targets": LABELS, "transform": _NoImage()},
        target_transform=None,
    )
    vars(data).update(attributes)
    return data


class TestKnownWithoutLoading:
    def test_folders_of_torchvision_and_timm(self, folder):
        assert known_labels(ImageFolder(folder, transform=_NoImage())).tolist() == [
            0,
            0,
            0,
            1,
            1,
            2,
        ]
        assert known_labels(ImageDataset(folder, transform=_NoImage())).tolist() == [
            0,
            0,
            0,
            1,
            1,
            2,
        ]
        part, _ = random_split(ImageFolder(folder), [4, 2], torch.Generator().manual_seed(0))
        assert known_labels(part).tolist() == [part[i][1] for i in range(4)]
        both = ConcatDataset([part, Subset(_table("labels"), torch.tensor([0, 5]))])
        assert known_labels(both).tolist() == [*(part[i][1] for i in range(4)), 2, 1]

    def test_what_a_folder_gives_and_not_its_targets(self, folder):
        data = ImageFolder(folder)
        data.targets = [9] * 6  # its __getitem__ takes no notice
        assert known_labels(data).tolist() == [0, 0, 0, 1, 1, 2]

    @pytest.mark.parametrize("kind", [CIFAR10, MNIST])
    def test_arrays_of_torchvision(self, kind):
        assert known_labels(_cifar(kind)).tolist() == LABELS
        assert known_labels(_cifar(kind, targets=torch.tensor(LABELS))).tolist() == LABELS

    def test_not_under_a_target_transform(self, folder):
        def swap(target):
            return 2 - target

        for data in (
            ImageFolder(folder, target_transform=swap),
            ImageDataset(folder, target_transform=swap),
        ):
            assert known_labels(data) is None
            assert known_labels(Subset(data, [0])) is None
        assert _read(ImageFolder(folder, target_transform=swap), _pairs).read().tolist() == [
            *(2, 2, 2, 1, 1, 0)
        ]

    def test_not_of_a_class_that_gives_other_examples(self, folder):
        class Merged(ImageFolder):
            def __getitem__(self, index):
                image, target = super().__getitem__(index)
                return image, min(target, 1)

        assert known_labels(Merged(folder)) is None
        assert _read(Merged(folder), _pairs).read().tolist() == [0, 0, 0, 1, 1, 1]

    def test_no_other_column_is_decoded(self):
        data = _table().with_format("torch")
        data.set_format("numpy", columns=["label"])
        assert known_labels(data).tolist() == LABELS


def _pairs(rows):
    return {"labels": torch.tensor([row[1] for row in rows])}


class TestExamplesAreLoaded:
    def test_once_and_for_all_that_ask(self):
        data = _Rows()
        labels = _read(data)
        labels.count(3)
        labels.read()
        assert data.loaded == [0, 1, 2, 3, 4, 5]

    def test_only_those_of_a_subset(self):
        data = _Rows()
        assert _read(Subset(data, [5, 0])).read().tolist() == [1, 2]
        assert data.loaded == [5, 0]

    def test_in_the_workers_of_the_loader(self):
        data = _Rows()
        assert _read(data, num_workers=1).read().tolist() == LABELS
        assert not data.loaded  # in this process

    def test_progress_is_shown(self, capsys, monkeypatch):
        monkeypatch.setattr("ldam_plugins.data.labels._SECONDS_BEFORE_A_BAR", 0.0)
        labels = _read(_Rows())
        labels.args.disable_tqdm = False
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
                    _read(_Rows([0, None])).read()
            elif count:
                _read(_Rows()).read()
            states.append(draw())
        assert states[0] == states[1]

    def test_a_row_that_cannot_be_loaded(self):
        class Broken(_Rows):
            def __getitem__(self, index):
                return {"labels": 0} if index != 5 else 1 / 0

        wanted = r"ZeroDivisionError in row {}: .*class_counts="
        with pytest.raises(ValueError, match=wanted.format(5)) as caught:
            _read(Broken()).read()
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        with pytest.raises(ValueError, match=r"in row 4\.\.5: .*class_counts="):
            _read(Broken(), num_workers=1).read()


class TestCollatorsAreNotNeeded:
    def test_that_drop_examples(self):
        data = _Given(*({"labels": y} for y in LABELS[:3]), None, {"labels": 0})
        labels = _read(data, _never)
        assert labels.read().tolist() == [2, 0, 1, -100, 0]
        assert labels.count(3).counts.tolist() == [2, 1, 1]

    def test_that_mix(self):
        pairs = _Given(*((torch.zeros(2), y) for y in LABELS))

        def mix(rows):
            assert len(rows) in (4, 2)  # never a single one
            masses = torch.eye(3)[[y for _, y in rows]]
            return {"labels": masses.lerp(masses.flip(0), 0.3)}

        assert _read(pairs, mix).read().tolist() == LABELS

    def test_that_take_examples_without_names(self):
        data = TensorDataset(torch.randn(6, 2), torch.tensor(LABELS))

        def collate(rows):
            assert len(rows) in (4, 2)
            x, y = zip(*rows, strict=True)
            return {"x": torch.stack(x), "labels": torch.stack(y)}

        assert _read(data, collate).read().tolist() == LABELS

    def test_that_look_labels_up(self):
        data = _Given(*((torch.zeros(2), number) for number in range(6)))

        def collate(rows):
            return {"labels": torch.tensor([LABELS[number] for _, number in rows])}

        with pytest.raises(ValueError, match=r"data_collator.*class_counts="):
            _read(data, collate).read()

    @pytest.mark.parametrize(
        "example",
        [(torch.zeros(2), 3, 1), (torch.zeros(2), torch.eye(2)[0]), torch.zeros(2), {"y": 1}],
    )
    def test_a_label_that_is_not_certain(self, example):
        with pytest.raises(ValueError, match=r"examples hold one label.*class_counts="):
            _read(_Given(example, example), _never).read()

    def test_labels_that_differ(self):
        with pytest.raises(ValueError, match="different 'labels', 'label'"):
            _read(_Given({"label": 0, "labels": 1}), _never).read()


def test_names_of_classes_are_kept():
    features = Features({"label": ClassLabel(names=["a", "b", "c"]), "text": Value("string")})
    data = _table().cast(features)
    assert _read(data).count(3).class_names == ("a", "b", "c")
    assert _read(Subset(data, range(6))).count(3).class_names == ("a", "b", "c")


@pytest.mark.parametrize("ignored", [-100, 255])
def test_ignored_rows_count_nowhere(ignored):
    loader = DataLoader(_Rows([*LABELS, ignored, ignored]))
    labels = TrainingLabels(loader, _arguments(), ignored=ignored)
    assert labels.count(3).counts.tolist() == [3, 2, 1]
    assert len(labels.read()) == 8


class TestDifference:
    def test_names_both(self):
        told = _read(_table()).difference(count_labels(np.array([0, 1, 1, 2, 2, 2]), 3))
        assert "[1, 2, 3]" in told
        assert "[3, 2, 1]" in told
        assert _read(_table()).difference(count_labels(np.asarray(LABELS), 3)) is None

    def test_is_not_asked_of_examples(self):
        data = _Rows()
        assert _read(data).difference(count_labels(np.array([0, 1, 2]), 3)) is None
        assert not data.loaded

    @pytest.mark.parametrize("labels", [["a", "b"], [[0, 1], [1, 1]], [None, 1], [0, 9]])
    def test_is_not_asked_of_other_labels(self, labels):
        data = Dataset.from_dict({"label": labels})
        assert _read(data).difference(count_labels(np.array([0, 1]), 2)) is None


FILTERED = r'filter\(lambda row: row\["label"\] is not None\)'
CAST = r'cast_column\("label", Value\("int64"\)\)'


@pytest.mark.parametrize(
    ("labels", "error", "of_column", "of_rows"),
    [
        ([0, None, 1], ValueError, f"None in row 1.*{FILTERED}", "None in row 1.*Subset"),
        ([0.0, None, 1.0], ValueError, FILTERED, "Subset"),
        (
            [0.0, float("nan")],
            ValueError,
            r'row\["label"\] == row\["label"\]',
            "nan in row 1.*-100",
        ),
        ([None, None], ValueError, FILTERED, "None in row 0"),
        (["a", None], ValueError, FILTERED, "None in row 1"),
        ([0.0, 1.0], TypeError, CAST, r"int\(label\)"),
        ([True, False], TypeError, CAST, r"int\(label\)"),
        ([0.5, 1.0], TypeError, "no LDAM", "no LDAM"),
        (["a", "b"], TypeError, r'class_encode_column\("label"\)', "index of the class"),
        ([[1, 1], [0, 1]], TypeError, "multi-hot", "multi-hot"),
        ([[1, 0], [0, 1]], TypeError, "index of the 1", "index of the 1"),
        ([[0, 2], [1]], TypeError, "one a token", "one a token"),
        ([[0, 2], [1, 0]], TypeError, "one a token", "one a token"),
        ([[0.7, 0.3], [0.2, 0.8]], TypeError, "class_counts=", "class_counts="),
    ],
)
def test_labels_that_are_no_class_indices(labels, error, of_column, of_rows):
    with pytest.raises(error, match=of_column):
        _read(Dataset.from_dict({"label": labels})).read()
    with pytest.raises(error, match=of_rows):
        _read(_Rows(labels)).read()
    with pytest.raises(error):
        class_indices(labels)


def test_the_way_out_of_each_column_leads_on():
    def read(data):
        return _read(data).read().tolist()

    table = Dataset.from_dict({"label": [0, None, 1]})
    assert read(table.filter(lambda row: row["label"] is not None)) == [0, 1]
    table = Dataset.from_dict({"label": [0.0, float("nan"), 1.0]})
    table = table.filter(lambda row: row["label"] == row["label"])
    assert read(table.cast_column("label", Value("int64"))) == [0, 1]
    for values in ([True, False], [1.0, 0.0]):
        table = Dataset.from_dict({"label": values})
        assert read(table.cast_column("label", Value("int64"))) == [1, 0]
    table = Dataset.from_dict({"label": ["b", "a"]})
    assert read(table.class_encode_column("label")) == [1, 0]


@pytest.mark.parametrize(
    ("labels", "classes", "column", "message"),
    [
        ([1, 2, 3], 3, "label", r'got \'1\.\.3\'.*subtract 1.*\{"label": row\["label"\] - 1\}'),
        ([5, 6], 3, None, r"subtract 5, let `__getitem__` return `label - 5`"),
        ([0, 5, 9], 3, "y", r'without gaps.*\{"y": \[0, 5, 9\]\.index\(row\["y"\]\)\}'),
        ([0, 1, 2, 3], 3, "label", "num_labels=4"),
        ([0, 1, 5, 9], 3, "label", "num_labels=4 and number the classes without gaps"),
        ([1, 2, 3], 4, "label", "class 0.*Labels count from 0.*subtract 1"),
        ([1, 2, 3], None, "label", "class 0.*Labels count from 0.*subtract 1"),
        ([0, 1], 4, "label", r"class 2, 3\. .*num_labels=2"),
        ([0, 2, 3], 4, "label", "class 1.*Every class needs a training sample"),
        ([0, -100, -1], 2, "label", "'-1 in row 2'.*label them -100"),
        ([-100], 2, "label", "1 examples labelled -100"),
        ([], 2, "label", "no example"),
    ],
)
def test_labels_of_another_numbering(labels, classes, column, message):
    with pytest.raises(ValueError, match=message):
        count_labels(np.asarray(labels, dtype=np.int64), classes, column=column)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Dataset.from_dict({"y": LABELS}), r'rename_column\("...", "label"\)'),
        (_table(labels=LABELS[::-1]), "remove_columns"),
        (_table().to_iterable_dataset(), "class_counts="),
        (SimpleNamespace(), "class_counts="),
    ],
)
def test_bad_data_says_what_to_write(data, message):
    loader = SimpleNamespace(dataset=data, collate_fn=default_data_collator)
    with pytest.raises(ValueError, match=message):
        TrainingLabels(loader, _arguments()).read()


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
            masses = torch.nn.functional.one_hot(labels, 3).float()
            share = float(torch.rand(()))
            return {"input_ids": tokens, "labels": masses.lerp(masses.roll(1, 0), share)}

        losses = []
        for given in (None, COUNTS):
            callback = DRWCallback(class_counts=given)
            trainer = make_trainer(tmp_path, make_model(), rows, [callback], data_collator=mix)
            trainer.train()
            losses.append(logged(trainer, "loss"))
        assert losses[0] == losses[1]
