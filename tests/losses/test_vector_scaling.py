import pytest
import torch

from ldam_plugins import ClassCounts, create_loss
from ldam_plugins.losses import VectorScalingLoss, vector_scaling_loss

COUNTS = ClassCounts([5000, 1077, 232, 50])
LOGITS, TARGET = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 4


def test_without_factors_it_is_logit_adjustment():
    got = create_loss("vector_scaling", COUNTS, gamma=0, tau=0.7)(LOGITS, TARGET)
    torch.testing.assert_close(got, create_loss("logit_adjusted", COUNTS, tau=0.7)(LOGITS, TARGET))


def test_what_it_says_of_itself():
    assert VectorScalingLoss.corrects_prior
    assert not VectorScalingLoss.needs_cosine_head
    assert not VectorScalingLoss.takes_chunked_head


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: create_loss("vector_scaling", COUNTS, tau=-1), "tau"),
        (lambda: create_loss("vector_scaling", COUNTS, gamma=-1), "gamma"),
        (
            lambda: vector_scaling_loss(LOGITS, TARGET, torch.ones(3), torch.ones(4)),
            "multiplicative",
        ),
        (lambda: vector_scaling_loss(LOGITS, TARGET, torch.ones(4), torch.ones(3)), "additive"),
    ],
)
def test_bad_input_is_refused(make, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        make()
