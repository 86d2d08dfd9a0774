import pytest
import torch
import torch.nn.functional as F

from ldam_plugins import create_loss
from ldam_plugins.losses import FocalLoss, focal_loss

LOGITS, TARGET = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)


def test_focusing_by_nothing_is_cross_entropy():
    logits, target = 5 * torch.randn(16, 4, dtype=torch.float64), torch.arange(16) % 4
    torch.testing.assert_close(focal_loss(logits, target, gamma=0), F.cross_entropy(logits, target))


def test_what_it_says_of_itself():
    assert not FocalLoss.needs_cosine_head
    assert not FocalLoss.takes_chunked_head
    assert not FocalLoss.corrects_prior


@pytest.mark.parametrize(
    "make",
    [
        lambda: create_loss("focal", [3, 2, 1, 1], gamma=-1),
        lambda: focal_loss(LOGITS, TARGET, gamma=-1),
    ],
)
def test_a_negative_exponent_is_refused(make):
    with pytest.raises(ValueError, match="`gamma`"):
        make()
