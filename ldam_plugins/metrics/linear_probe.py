"""How good the features of a classifier are, whatever its head: a linear probe."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import nn

from ldam_plugins._validation import invalid
from ldam_plugins.counts import ClassCounts
from ldam_plugins.heads.inputs import with_head_inputs
from ldam_plugins.metrics.long_tail import long_tail_metrics

_ITERATIONS = 2000


def linear_probe(
    train_features: np.ndarray,
    train_labels: np.ndarray,
    test_features: np.ndarray,
    test_labels: np.ndarray,
    class_counts: ClassCounts,
    *,
    inverse_strength: float = 1.0,
) -> dict[str, Any]:
    """Fit a linear classifier to frozen features and evaluate it on test features.

    Multinomial logistic regression on standardised features, each class weighing the same
    (``class_weight="balanced"``), so that the result is about the features and not about a head
    that has learned the training frequencies. Where possible fit it to many samples of every class:
    with a few samples of a class the result depends on their number as well.

    Args:
        train_features: (N, D).
        train_labels: (N,) class indices; every class at least once.
        test_features: (M, D).
        test_labels: (M,).
        class_counts: Samples per class that the *network* was trained on: they define the groups.
        inverse_strength: ``C`` of scikit-learn's ``LogisticRegression``; a larger value means less
            L2 regularisation.

    Returns:
        As :func:`~ldam_plugins.metrics.long_tail.long_tail_metrics`.

    Raises:
        ValueError: a class without a training sample, or arrays that do not fit each other.

    Source: Kang et al., ICLR 2020, arXiv 1910.09217 (features and classifier trained apart).
    """
    # Imported here, as it takes a second and `metrics` is imported by every training.
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    missing = np.setdiff1d(np.arange(len(class_counts)), train_labels)
    if len(missing):
        expected = f"of all {len(class_counts)} classes"
        raise invalid("train_labels", expected, f"none of {missing.tolist()}")
    probe = make_pipeline(
        StandardScaler(),
        LogisticRegression(
            C=inverse_strength, class_weight="balanced", max_iter=_ITERATIONS, random_state=0
        ),
    )
    probe.fit(train_features, train_labels)
    return long_tail_metrics(probe.predict_log_proba(test_features), test_labels, class_counts)


def head_inputs(
    model: nn.Module, batches: Iterable[Any], run: Callable[[nn.Module, Any], Any]
) -> np.ndarray:
    """The features (N, D) that are the input of the last layer of ``model``, in evaluation mode.

    Args:
        model: A classifier with one linear or cosine head (see `find_head`).
        batches: Batches of any form.
        run: ``run(model, batch)`` calls the model once on a batch.

    Raises:
        ValueError: several heads, or a head that is called more than once or on more than one
            vector a sample.
    """
    return torch.cat([features for features, _ in with_head_inputs(model, batches, run)]).numpy()
