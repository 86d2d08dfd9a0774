import pytest
import torch

from ldam_plugins.losses import HingeLoss, LDAMHingeLoss, hinge_loss

LOGITS = torch.tensor([[3.0, 1.0, -2.0], [0.0, 4.0, 1.0]])


def test_only_the_highest_of_the_others_counts():
    margins = torch.tensor([0.1, 0.2, 0.3])
    rows = hinge_loss(LOGITS, torch.tensor([0, 2]), margins, scale=10.0, reduction="none")
    assert rows.tolist() == [0.0, 4.0 - 1.0 + 3.0]  # 1 - 3 + 1 is below 0


def test_margins_are_of_the_counts_or_one_for_all():
    counts = [16, 1]
    assert LDAMHingeLoss(counts).margins.tolist() == [0.25, 0.5]
    assert HingeLoss(counts).margins.tolist() == [0.5, 0.5]


def test_what_it_says_of_itself():
    for loss in (LDAMHingeLoss, HingeLoss):
        assert loss.needs_cosine_head
        assert not loss.takes_chunked_head
        assert not loss.corrects_prior


@pytest.mark.parametrize(("given", "name"), [({"scale": 0}, "scale"), ({}, "margins")])
def test_bad_input_is_refused(given, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        hinge_loss(LOGITS, torch.tensor([0, 2]), torch.ones(2), **given)
