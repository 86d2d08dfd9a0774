"""Labels that are known without loading, and what is said of others."""

import numpy as np
import pytest
import torch
from datasets import Dataset, Value
from labelled_rows import LABELS, LabelRows, label_table, labels_of
from PIL import Image
from timm.data.dataset import ImageDataset
from torch.utils.data import ConcatDataset, Subset, random_split
from torchvision.datasets import CIFAR10, MNIST, ImageFolder

from ldam_plugins.data.labels import class_indices, count_labels, known_labels


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
        both = ConcatDataset([part, Subset(label_table("labels"), torch.tensor([0, 5]))])
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
        assert labels_of(ImageFolder(folder, target_transform=swap), _pairs).read().tolist() == [
            *(2, 2, 2, 1, 1, 0)
        ]

    def test_not_of_a_class_that_gives_other_examples(self, folder):
        class Merged(ImageFolder):
            def __getitem__(self, index):
                image, target = super().__getitem__(index)
                return image, min(target, 1)

        assert known_labels(Merged(folder)) is None
        assert labels_of(Merged(folder), _pairs).read().tolist() == [0, 0, 0, 1, 1, 1]

    def test_no_other_column_is_decoded(self):
        data = label_table().with_format("torch")
        data.set_format("numpy", columns=["label"])
        assert known_labels(data).tolist() == LABELS


def _pairs(rows):
    return {"labels": torch.tensor([row[1] for row in rows])}


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
        labels_of(Dataset.from_dict({"label": labels})).read()
    with pytest.raises(error, match=of_rows):
        labels_of(LabelRows(labels)).read()
    with pytest.raises(error):
        class_indices(labels)


def test_the_way_out_of_each_column_leads_on():
    def read(data):
        return labels_of(data).read().tolist()

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
