"""Precision, recall and F1 of each class, and their averages, from counts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class ClassScores(NamedTuple):
    """Precision, recall and F1 of each class, (C, ...), in 0..1; 0 where one is 0/0."""

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray


def class_scores(correct: np.ndarray, samples: np.ndarray, predicted: np.ndarray) -> ClassScores:
    """``TP / (TP + FP)``, ``TP / (TP + FN)`` and ``2 TP / (2 TP + FP + FN)`` of each class.

    Args:
        correct: Samples of the class that are predicted as such, TP, (C, ...).
        samples: Test samples of the class, TP + FN, of that shape.
        predicted: Samples that are predicted as the class, TP + FP, of that shape.
    """
    # By hand, since scikit-learn wants the rows, 7 ms for 10,000 of 100 classes, which 2,000
    # bootstrap samples would take again and again. Tests hold the two together.
    return ClassScores(
        _ratio(correct, predicted),
        _ratio(correct, samples),
        _ratio(2 * correct, samples + predicted),
    )


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.zeros(np.broadcast(part, whole).shape), where=whole > 0)


def averages(
    scores: ClassScores, samples: np.ndarray, present: np.ndarray
) -> dict[str, np.ndarray]:
    """``macro_`` and ``weighted_`` ``precision``, ``recall`` and ``f1``, of shape (...).

    Args:
        scores: Of each class, (C, ...).
        samples: Test samples of each class, (C,): the weights.
        present: Whether the class is in the test set or predicted, (C,): macro averages are over
            these, as scikit-learn's are.
    """
    weights = samples / samples.sum()
    found = {f"macro_{name}": each[present].mean(axis=0) for name, each in scores._asdict().items()}
    return found | {f"weighted_{n}": weights @ each for n, each in scores._asdict().items()}
