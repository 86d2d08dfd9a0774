import pytest
import torch
import torch.nn.functional as F

from ldam_plugins import ClassCounts, create_loss
from ldam_plugins.losses import LogitAdjustedLoss, logit_adjusted_loss

COUNTS = ClassCounts([5000, 1077, 232, 50])
LOGITS, TARGET = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 4


def test_it_is_the_balanced_softmax():
    n = torch.tensor(COUNTS.counts, dtype=torch.float64)
    shares = n * LOGITS.exp() / (n * LOGITS.exp()).sum(1, keepdim=True)
    expected = -shares.log().gather(1, TARGET[:, None]).mean()
    torch.testing.assert_close(create_loss("logit_adjusted", COUNTS)(LOGITS, TARGET), expected)


def test_without_strength_it_is_cross_entropy():
    prior = COUNTS.prior()
    got = logit_adjusted_loss(LOGITS, TARGET, prior, tau=0)
    torch.testing.assert_close(got, F.cross_entropy(LOGITS, TARGET))


def test_what_it_says_of_itself():
    assert LogitAdjustedLoss.corrects_prior
    assert not LogitAdjustedLoss.needs_cosine_head
    assert not LogitAdjustedLoss.takes_chunked_head


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: create_loss("logit_adjusted", COUNTS, tau=-1), "tau"),
        (lambda: logit_adjusted_loss(LOGITS, TARGET, torch.ones(4), tau=-1), "tau"),
        (lambda: logit_adjusted_loss(LOGITS, TARGET, torch.ones(3)), "prior"),
    ],
)
def test_bad_input_is_refused(make, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        make()
