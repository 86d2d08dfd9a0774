import math

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, balanced_accuracy_score

from ldam_plugins import ClassCounts
from ldam_plugins.metrics import error_views, long_tail_metrics


def rows(seed=0, counts=(400, 60, 9)):
    generator = np.random.default_rng(seed)
    labels = generator.permutation(np.repeat([0, 1, 2], (50, 30, 20)))
    logits = generator.normal(size=(len(labels), 3))
    logits[np.arange(len(labels)), labels] += np.array([3.0, 1.0, 0.2])[labels]
    return logits, labels, ClassCounts(list(counts))


def test_views_are_those_of_scikit_learn_with_the_weights_of_the_classes():
    logits, labels, counts = rows()
    predicted = logits.argmax(1)
    result = long_tail_metrics(logits, labels, counts)
    expected = 100 * (1 - balanced_accuracy_score(labels, predicted))
    assert result["balanced_error"] == pytest.approx(expected, rel=1e-12)
    weight = (counts.counts / np.bincount(labels))[labels]
    expected = 100 * (1 - accuracy_score(labels, predicted, sample_weight=weight))
    assert result["train_prior_error"] == pytest.approx(expected, rel=1e-12)
    assert result["balanced_error"] != pytest.approx(result["train_prior_error"], abs=1)


def test_balanced_error_is_the_balanced_accuracy_to_the_bit():
    for seed in range(20):
        result = long_tail_metrics(*rows(seed))
        assert result["balanced_error"] == 100 * (1 - result["balanced_accuracy"])
        assert error_views(result["per_class_accuracy"], rows()[2]) == {
            name: result[name] for name in ("balanced_error", "train_prior_error")
        }


def test_a_test_set_like_the_training_set_has_its_prior_and_a_balanced_one_its_top1_error():
    logits, labels, _ = rows()
    result = long_tail_metrics(logits, labels, ClassCounts.from_labels(labels))
    assert result["train_prior_error"] == pytest.approx(result["top1_error"])
    each = np.concatenate([np.flatnonzero(labels == c)[:20] for c in range(3)])
    result = long_tail_metrics(logits[each], labels[each], [400, 60, 9])
    assert result["balanced_error"] == pytest.approx(result["top1_error"])


def test_classes_without_a_test_sample_leave_the_prior_to_the_others():
    found = error_views([0.9, None, 0.5], ClassCounts([30, 1000, 10]))
    assert found["balanced_error"] == pytest.approx(30)
    assert found["train_prior_error"] == pytest.approx(100 * (1 - (0.75 * 0.9 + 0.25 * 0.5)))
    assert not any(map(math.isnan, found.values()))


@pytest.mark.parametrize(
    ("accuracies", "message"), [([0.5], "one accuracy for each of the 2"), ([None] * 2, "at least")]
)
def test_bad_accuracies(accuracies, message):
    with pytest.raises(ValueError, match=rf"`per_class_accuracy` must be .*{message}"):
        error_views(accuracies, ClassCounts([5, 5]))
