"""Metrics of the samples that belong together: of a camera, a patient, an author."""

from __future__ import annotations

from typing import Any

import numpy as np

from ldam_plugins.metrics.intervals import FEW_EXAMPLES, mean_of_shares, wilson


def group_metrics(codes: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    """Both errors of the samples of a group, as in ``by_group`` of :func:`.long_tail_metrics`.

    The interval of the balanced error is too narrow, and among ``few_examples``, where the group
    has fewer than 20 samples of one of its classes.

    Args:
        codes: Twice the class, plus one where the prediction is right, ascending, (P,).
        counts: Samples of each, (P,).
    """
    classes, place = np.unique(codes // 2, return_inverse=True)
    samples, correct = np.zeros((2, len(classes)), dtype=np.int64)
    np.add.at(samples, place, counts)
    np.add.at(correct, place, counts * (codes % 2))
    total, right = int(samples.sum()), int(correct.sum())
    shares = {"top1_error": right / total, "balanced_error": float((correct / samples).mean())}
    ends = {
        "top1_error": wilson(right, total).tolist(),
        "balanced_error": mean_of_shares(correct, samples),
    }
    too_few = len(classes) > 1 and int(samples.min()) < FEW_EXAMPLES
    return {
        "samples": total,
        "classes": len(classes),
        **{name: 100.0 * (1.0 - share) for name, share in shares.items()},
        "intervals": {
            name: [100.0 * (1.0 - high), 100.0 * (1.0 - low)] for name, (low, high) in ends.items()
        },
        "few_examples": ["balanced_error"] if too_few else [],
    }
