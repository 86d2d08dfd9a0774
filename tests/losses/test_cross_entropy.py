import pytest
import torch
import torch.nn.functional as F

from ldam_plugins import ClassCounts
from ldam_plugins.losses import CrossEntropyLoss, cross_entropy
from ldam_plugins.losses.reduction import REDUCTIONS

COUNTS = ClassCounts([5000, 1077, 232, 50])
CLASSES = len(COUNTS)


def batch():
    logits = 5 * torch.randn(16, CLASSES, dtype=torch.float64)
    return logits, torch.randint(CLASSES, (16,))


def test_cross_entropy_equals_torch():
    logits, target = batch()
    weight = COUNTS.weights(dtype=torch.float64)
    target[3] = -100
    target_probs = torch.softmax(batch()[0], dim=1)
    for reduction in REDUCTIONS:
        for aim in (target, target_probs):
            options = {"weight": weight, "reduction": reduction}
            expected = F.cross_entropy(logits, aim, **options)
            torch.testing.assert_close(cross_entropy(logits, aim, **options), expected)


def test_what_it_says_of_itself():
    assert CrossEntropyLoss.takes_chunked_head
    assert not CrossEntropyLoss.needs_cosine_head
    assert not CrossEntropyLoss.corrects_prior


def test_a_weight_of_another_shape_is_refused():
    logits, target = batch()
    with pytest.raises(ValueError, match=r"`weight` must be of shape \(4,\)"):
        cross_entropy(logits, target, weight=torch.ones(5))
