"""Two errors of a classifier: where classes are equally frequent, and where as in training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ldam_plugins._validation import invalid
from ldam_plugins.counts import ClassCounts


def error_views(
    per_class_accuracy: Sequence[float | None] | np.ndarray, class_counts: ClassCounts
) -> dict[str, float]:
    """The error in % where classes are equally frequent, and where they are as in training.

    * ``balanced_error``: ``100 (1 - mean_c acc_c)``.
    * ``train_prior_error``: ``100 (1 - sum_c pi_c acc_c)`` with ``pi_c = n_c / N``, the share of
      class c in the training samples. It is what a stream of data like the training set would see,
      and what helps the one may hurt the other.

    Neither depends on how many test samples a class has, so both can be compared between test sets
    of any mix. Of a class without a test sample the accuracy is unknown: both are then over the
    classes that have one, ``pi`` normalised over them. It stands for all classes as far as the
    missing ones are as hard as the others; they are None in ``per_class_accuracy``.

    Args:
        per_class_accuracy: (C,), in 0..1; None for a class without a test sample.
        class_counts: Training samples per class.

    Raises:
        ValueError: another number of accuracies than of classes, or all of them None.

    Example:
        >>> error_views([1.0, 0.5], ClassCounts([30, 10]))
        {'balanced_error': 25.0, 'train_prior_error': 12.5}
    """
    accuracy = np.array(per_class_accuracy, dtype=float)  # None becomes NaN
    if accuracy.shape != (len(class_counts),):
        expected = f"one accuracy for each of the {len(class_counts)} classes"
        raise invalid("per_class_accuracy", expected, accuracy.shape)
    seen = ~np.isnan(accuracy)
    if not seen.any():
        raise invalid("per_class_accuracy", "known of at least one class", "None of all")
    known, samples = accuracy[seen], class_counts.counts[seen]
    return {
        "balanced_error": 100.0 * (1.0 - float(known.mean())),
        "train_prior_error": 100.0 * (1.0 - float(np.average(known, weights=samples))),
    }
