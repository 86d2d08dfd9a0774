import numpy as np
import pytest
import torch

from ldam_plugins.metrics import Predictions


def test_batches_in_any_order_are_the_table_of_all_rows():
    logits = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    labels = [0, 1, 2, 3, 4, 5, 0]
    first, second = Predictions(6, top=3), Predictions(6, top=3)
    first.update([5, 6, 0], logits[[5, 6, 0]], [5, 0, 0])
    second.update(range(1, 5), logits[1:5], torch.tensor(labels[1:5]))
    second.merge(first)
    found = second.columns(list("abcdefg"))
    expected = logits.double().softmax(1)
    likeliest, order = expected.sort(dim=1, descending=True)
    assert found["example"] == list("abcdefg")
    assert found["label"] == labels
    of_label = expected[range(7), labels]
    np.testing.assert_allclose(found["label_probability"], of_label, rtol=1e-12)
    for rank, end in enumerate(("", "_2", "_3")):
        assert found[f"predicted{end}"] == order[:, rank].tolist()
        np.testing.assert_allclose(found[f"probability{end}"], likeliest[:, rank], rtol=1e-12)
    assert "predicted_4" not in found


def test_labels_may_be_unknown_and_classes_few():
    found = Predictions(2)
    found.update([0], torch.tensor([[1.0, 1.0]]))
    columns = found.columns(["a"])
    assert columns["label"] == [-1]
    assert columns["label_probability"] == [None]
    assert columns["predicted"] == [0]  # of classes as likely the first
    assert "probability_2" in columns
    assert "probability_3" not in columns


@pytest.mark.parametrize("rows", [[0, 0], [0, 2], [1]])
def test_an_example_that_is_missing_or_there_twice_is_refused(rows):
    found = Predictions(2)
    found.update(rows, torch.zeros(len(rows), 2))
    with pytest.raises(ValueError, match="each of 2 examples once"):
        found.columns(["a", "b"])
    with pytest.raises(ValueError, match="at least one"):
        Predictions(2).columns([])
