"""What the metrics take from each row of logits, and which rows they refuse."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldam_plugins._tensor_checks import check_logits
from ldam_plugins._validation import DIVERGED, invalid
from ldam_plugins.counts import check_label_range, label_array

TOP_K = 5
"""A class among so many likeliest ones counts in ``top5_accuracy``."""

_CHUNK_ELEMENTS = 1 << 22


def check_scores(logits: Any, num_classes: int) -> Tensor:
    """Logits as a floating tensor (N, C), on their device."""
    scores = _as_tensor(logits)
    check_logits(scores)
    if scores.shape[1] != num_classes:
        expected = f"of shape (N, {num_classes}), one column for each class count"
        raise invalid("logits", expected, tuple(scores.shape))
    return scores


def _as_tensor(logits: Any) -> Tensor:
    if isinstance(logits, Tensor):
        return logits
    try:
        array = np.asarray(logits)
    except ValueError as error:
        expected = "of shape (N, C)"
        raise invalid("logits", expected, "rows of different lengths") from error
    if not np.issubdtype(array.dtype, np.number):
        raise invalid("logits", "floating-point numbers", array.dtype, error=TypeError)
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))


def check_labels(labels: Any, logits: Tensor, ignore_index: int) -> np.ndarray:
    """Labels as an int64 array (N,) on the CPU, each 0..C-1 or ``ignore_index``."""
    shape = tuple(np.shape(labels))
    if len(shape) == 2:
        if shape[1] == 1:
            hint = "Drop the second axis: `labels.squeeze(-1)`."
        elif shape == tuple(logits.shape):
            hint = "One-hot or soft labels have no class index: give `labels.argmax(-1)`."
        else:
            hint = "The metrics are for one class a row, not one a token or pixel."
        raise invalid("labels", "class indices of shape (N,)", shape, hint=hint)
    target = label_array(labels)
    if len(target) != len(logits):
        expected = f"of shape ({len(logits)},), one for each row of `logits`"
        raise invalid("labels", expected, target.shape)
    check_label_range(np.where(target == ignore_index, 0, target), logits.shape[1])
    return target


def check_groups(groups: Any, kept: np.ndarray) -> np.ndarray | None:
    """The groups of the kept rows as text, (M,)."""
    if groups is None:
        return None
    names = np.asarray([str(group) for group in groups], dtype=object)
    if len(names) != len(kept):
        raise invalid("groups", f"of shape ({len(kept)},), one for each label", (len(names),))
    return names[kept]


class Rows(NamedTuple):
    """What is counted of each row.

    Cross-entropy and confidence (float64), the prediction, with more than :data:`TOP_K` classes the
    rank of the label from 0, and with two classes the difference of the logits (float64).
    """

    nll: np.ndarray
    confidence: np.ndarray
    predicted: np.ndarray
    ranks: np.ndarray
    differences: np.ndarray


@torch.no_grad()
def score_rows(logits: Tensor, target: np.ndarray, kept: np.ndarray) -> Rows:
    """What is counted of the kept rows."""
    chunk = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    integers = np.zeros(0, dtype=np.int64)
    scored = [Rows(np.zeros(0), np.zeros(0), integers, integers, np.zeros(0))]
    for start in range(0, len(logits), chunk):
        part = logits[start : start + chunk]
        rows = start + np.flatnonzero(kept[start : start + chunk])
        if len(rows) < len(part):
            part = part[torch.from_numpy(rows - start).to(part.device)]
        scored.append(_score_chunk(part, target[rows], rows))
    return Rows(*(np.concatenate(column) for column in zip(*scored, strict=True)))


def _score_chunk(logits: Tensor, target: np.ndarray, rows: np.ndarray) -> Rows:
    # Apple's MPS has no float64.
    logits = (logits.cpu() if logits.device.type == "mps" else logits).double()
    label = torch.from_numpy(target).to(logits.device)
    predicted = logits.argmax(dim=1)
    # log_softmax sums each row in one thread. logsumexp may split a row over threads, and then the
    # result depends on the number of rows.
    log_probs = logits.log_softmax(dim=1)
    chosen = log_probs.gather(1, torch.stack([label, predicted], dim=1)).cpu().numpy()
    bad = np.flatnonzero(~np.isfinite(chosen).all(axis=1))
    if len(bad):
        found = "NaN" if logits[int(bad[0])].isnan().any() else "an infinite value"
        raise invalid("logits", "finite", f"{found} in row {rows[bad[0]]}", hint=DIVERGED)
    confidence = np.fromiter(map(math.exp, chosen[:, 1].tolist()), float, len(chosen))
    return Rows(
        -chosen[:, 0],
        confidence,
        predicted.cpu().numpy(),
        _ranks(logits, label, predicted),
        _differences(logits),
    )


def _ranks(logits: Tensor, label: Tensor, predicted: Tensor) -> np.ndarray:
    """How many classes come before the label; of equal logits the first class comes first."""
    ranks = np.zeros(len(logits), dtype=np.int64)
    if logits.shape[1] <= TOP_K:
        return ranks
    wrong = (predicted != label).nonzero()[:, 0]
    label, logits = label[wrong, None], logits[wrong]
    own = logits.gather(1, label)
    before = (logits > own).sum(dim=1)
    near = (before < TOP_K).nonzero()[:, 0]  # only there do equal logits make a difference
    earlier = torch.arange(logits.shape[1], device=logits.device) < label[near]
    before[near] += ((logits[near] == own[near]) & earlier).sum(dim=1)
    ranks[wrong.cpu().numpy()] = before.cpu().numpy()
    return ranks


def _differences(logits: Tensor) -> np.ndarray:
    """How much more class 1 has than class 0 of two; empty with more."""
    if logits.shape[1] != 2:
        return np.zeros(0)
    return (logits[:, 1] - logits[:, 0]).cpu().numpy()
