"""Evaluation under a long tail: per class, by group, balanced, worst class, calibration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldam_plugins._tensor_checks import check_logits
from ldam_plugins._validation import check_int, invalid
from ldam_plugins.counts import ClassCounts, check_label_range, label_array
from ldam_plugins.metrics.views import error_views

ECE_BINS = 15
"""Equal-width confidence bins of the calibration error (Guo et al., ICML 2017)."""

_CHUNK_ELEMENTS = 1 << 22
_EDGES = torch.arange(1, ECE_BINS, dtype=torch.float64) / ECE_BINS


def long_tail_metrics(
    logits: Tensor | np.ndarray | Sequence[Sequence[float]],
    labels: Tensor | np.ndarray | Sequence[int],
    class_counts: ClassCounts | Sequence[int] | np.ndarray | Tensor,
    *,
    ignore_index: int = -100,
) -> dict[str, Any]:
    """Evaluate ``logits`` (N, C) against class indices ``labels`` (N,).

    Plain cross-entropy and accuracy: margins and class weights are for training only. All values
    are Python floats (or None) and ready for JSON; accuracies and ``ece`` are in 0..1:

    * ``top1_error``: share of wrong samples, in %.
    * ``balanced_error``, ``train_prior_error``: in %, as if all classes were equally frequent, or
      as frequent as in training; see :func:`~ldam_plugins.metrics.views.error_views`. Where the
      classes of the test set are of one size the first is ``top1_error``.
    * ``balanced_accuracy``: mean of the per-class accuracies, over classes with a test sample.
    * ``worst_class_accuracy``: the smallest of them.
    * ``macro_f1``: mean of ``2 TP / (2 TP + FP + FN)`` over the classes with a test sample or a
      prediction, as scikit-learn's ``f1_score(average="macro")``.
    * ``per_class_accuracy``: list of C; None for a class without a test sample.
    * ``many``, ``medium``, ``few``: mean of the per-class accuracies of the group, each class
      counting once; None where no class of the group has a test sample.
    * ``nll``: mean cross-entropy of ``softmax(logits)``, in nats.
    * ``ece``: ``sum_b |sum of confidence in b - correct in b| / N`` over 15 equal-width bins
      ``(b / 15, (b + 1) / 15]`` of the confidence, the largest softmax probability.

    Of several equal largest logits the first is the prediction. Memory is O(N + C) in addition to
    the logits.

    Args:
        logits: (N, C), floating; -inf is allowed for classes that are not the label.
        labels: (N,), integers.
        class_counts: *Training* samples per class (C): they define the groups.
        ignore_index: Label of the rows that are left out.

    Raises:
        TypeError: ``logits`` are not floats or ``labels`` not integers.
        ValueError: shapes that do not fit each other or the counts, a label out of range, NaN or
            infinite logits, or no row that counts.

    Source: groups and their means, Liu et al., CVPR 2019, arXiv 1904.05160; calibration error,
    Guo et al., ICML 2017, arXiv 1706.04599.

    Example:
        >>> logits = [[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 0.0]]
        >>> result = long_tail_metrics(logits, [0, 1, 1, 0], ClassCounts([500, 5]))
        >>> result["top1_error"], result["balanced_accuracy"]
        (25.0, 0.75)
        >>> result["many"], result["medium"], result["few"]
        (1.0, None, 0.5)
    """
    accumulator = MetricAccumulator(class_counts, ignore_index=ignore_index)
    accumulator.update(logits, labels)
    return accumulator.compute()


class MetricAccumulator:
    """The metrics of :func:`long_tail_metrics`, fed in batches.

    It keeps sums only, so memory is O(C). Counts are integers and the float64 sums are exact
    (:func:`math.fsum`), so the result is the same to the bit for any order of the rows and any
    split: one batch or many, one process or several merged. Libraries of metrics do not promise
    this, which is why the sums are written out here.

    Args:
        class_counts: Training samples per class, as :class:`~ldam_plugins.counts.ClassCounts` or
            as bare counts.
        ignore_index: Label of the rows that are left out.

    Example:
        >>> whole, part = MetricAccumulator([500, 5]), MetricAccumulator([500, 5])
        >>> whole.update(torch.tensor([[2.0, 0.0]]), torch.tensor([0]))
        >>> part.update(torch.tensor([[2.0, 0.0]]), torch.tensor([1]))
        >>> whole.merge(part)
        >>> whole.compute()["per_class_accuracy"]
        [1.0, 0.0]
    """

    def __init__(
        self,
        class_counts: ClassCounts | Sequence[int] | np.ndarray | Tensor,
        *,
        ignore_index: int = -100,
    ) -> None:
        if not isinstance(class_counts, ClassCounts):
            class_counts = ClassCounts(class_counts)
        self.class_counts = class_counts
        self.ignore_index = check_int("ignore_index", ignore_index)
        self.reset()

    def reset(self) -> None:
        """Remove all rows."""
        self._samples = np.zeros(len(self.class_counts), dtype=np.int64)
        self._correct = np.zeros(len(self.class_counts), dtype=np.int64)
        self._predicted = np.zeros(len(self.class_counts), dtype=np.int64)
        self._bin_correct = np.zeros(ECE_BINS, dtype=np.int64)
        self._bin_confidence: list[list[float]] = [[] for _ in range(ECE_BINS)]
        self._nll: list[float] = []

    def update(
        self,
        logits: Tensor | np.ndarray | Sequence[Sequence[float]],
        labels: Tensor | np.ndarray | Sequence[int],
    ) -> None:
        """Add the rows of a batch: ``logits`` (N, C), ``labels`` (N,); N may be 0.

        Raises:
            TypeError: ``logits`` are not floats or ``labels`` not integers.
            ValueError: shapes, a label out of range, NaN or infinite logits; nothing is added.
        """
        scores = _check_scores(logits, len(self.class_counts))
        target = _check_labels(labels, scores, self.ignore_index)
        kept = target != self.ignore_index
        nll, confidence, predicted = _score_rows(scores, target, kept)
        target = target[kept]
        correct = predicted == target
        self._samples += np.bincount(target, minlength=len(self._samples))
        self._correct += np.bincount(target[correct], minlength=len(self._samples))
        self._predicted += np.bincount(predicted, minlength=len(self._samples))
        self._nll = _exact_parts(self._nll, nll)
        self._add_confidence(confidence, correct)

    def _add_confidence(self, confidence: np.ndarray, correct: np.ndarray) -> None:
        bins = torch.bucketize(torch.from_numpy(confidence), _EDGES).numpy()
        self._bin_correct += np.bincount(bins[correct], minlength=ECE_BINS)
        for index in np.unique(bins):
            parts = self._bin_confidence[index]
            self._bin_confidence[index] = _exact_parts(parts, confidence[bins == index])

    def merge(self, other: MetricAccumulator) -> None:
        """Add the rows that another accumulator has seen, of another process for instance.

        Raises:
            ValueError: it has other class counts or another ``ignore_index``.
        """
        ours, theirs = self.class_counts, other.class_counts
        if ours != theirs or self.ignore_index != other.ignore_index:
            expected = f"an accumulator for {ours!r} and ignore_index {self.ignore_index}"
            raise invalid("other", expected, (theirs, other.ignore_index))
        self._samples += other._samples
        self._correct += other._correct
        self._predicted += other._predicted
        self._bin_correct += other._bin_correct
        self._nll = _exact_parts(self._nll, other._nll)
        pairs = zip(self._bin_confidence, other._bin_confidence, strict=True)
        self._bin_confidence = [_exact_parts(mine, added) for mine, added in pairs]

    def compute(self) -> dict[str, Any]:
        """The metrics of all rows so far; keys as in :func:`long_tail_metrics`.

        Raises:
            ValueError: no row so far that counts.
        """
        total, correct = int(self._samples.sum()), int(self._correct.sum())
        if total == 0:
            expected = f"other than {self.ignore_index} (ignore_index) in at least one row"
            raise invalid("labels", expected, "no such row")
        gaps = zip(self._bin_confidence, self._bin_correct.tolist(), strict=True)
        ece = math.fsum(abs(math.fsum([*parts, -hits])) for parts, hits in gaps) / total
        return {
            "top1_error": 100.0 * (total - correct) / total,
            **self._class_accuracies(),
            "nll": math.fsum(self._nll) / total,
            "ece": ece,
        }

    def _class_accuracies(self) -> dict[str, Any]:
        seen = self._samples > 0
        accuracy = self._correct / np.maximum(self._samples, 1)
        pairs = zip(accuracy.tolist(), seen.tolist(), strict=True)
        groups = self.class_counts.groups().items()
        by_class = [value if known else None for value, known in pairs]
        return {
            **error_views(by_class, self.class_counts),
            "balanced_accuracy": float(accuracy[seen].mean()),
            "worst_class_accuracy": float(accuracy[seen].min()),
            "macro_f1": self._macro_f1(),
            "per_class_accuracy": by_class,
            **{name: _mean_or_none(accuracy[ids][seen[ids]]) for name, ids in groups},
        }

    def _macro_f1(self) -> float:
        named = self._samples + self._predicted  # 2 TP + FN + FP
        return float((2 * self._correct[named > 0] / named[named > 0]).mean())


def _mean_or_none(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _exact_parts(parts: list[float], values: Iterable[float]) -> list[float]:
    """The exact sum of ``parts`` and ``values`` as a short list of floats, largest first.

    Each float is the correctly rounded sum of what the ones before it leave, so the list depends on
    the exact sum alone.
    """
    rest = [*parts, *values]
    exact: list[float] = []
    while rounded := math.fsum(rest):
        exact.append(rounded)
        rest.append(-rounded)
    return exact


def _check_scores(logits: Any, num_classes: int) -> Tensor:
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


def _check_labels(labels: Any, logits: Tensor, ignore_index: int) -> np.ndarray:
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


@torch.no_grad()
def _score_rows(
    logits: Tensor, target: np.ndarray, kept: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cross-entropy, confidence (float64) and prediction (int64) of the kept rows."""
    chunk = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    scored = [(np.zeros(0), np.zeros(0), np.zeros(0, dtype=np.int64))]
    for start in range(0, len(logits), chunk):
        part = logits[start : start + chunk]
        rows = start + np.flatnonzero(kept[start : start + chunk])
        if len(rows) < len(part):
            part = part[torch.from_numpy(rows - start).to(part.device)]
        scored.append(_score_chunk(part, target[rows], rows))
    nll, confidence, predicted = (np.concatenate(column) for column in zip(*scored, strict=True))
    return nll, confidence, predicted


def _score_chunk(
    logits: Tensor, target: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
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
        hint = "Has training diverged? A smaller learning rate or gradient clipping may help."
        raise invalid("logits", "finite", f"{found} in row {rows[bad[0]]}", hint=hint)
    confidence = np.fromiter(map(math.exp, chosen[:, 1].tolist()), float, len(chosen))
    return -chosen[:, 0], confidence, predicted.cpu().numpy()
