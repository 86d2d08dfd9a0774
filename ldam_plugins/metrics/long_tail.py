"""Evaluation under a long tail: per class, by group, balanced, worst class, calibration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldam_plugins._validation import check_int, invalid
from ldam_plugins.counts import ClassCounts
from ldam_plugins.metrics.class_scores import averages, class_scores
from ldam_plugins.metrics.groups import group_metrics
from ldam_plugins.metrics.intervals import (
    ClassBootstrap,
    class_intervals,
    few_ranked,
    ranking_intervals,
    wilson,
)
from ldam_plugins.metrics.ranking import Ranking
from ldam_plugins.metrics.rows import TOP_K, check_groups, check_labels, check_scores, score_rows
from ldam_plugins.metrics.sparse_counts import SparseCounts
from ldam_plugins.metrics.views import error_views

ECE_BINS = 15
"""Equal-width confidence bins of the calibration error (Guo et al., ICML 2017)."""

_EDGES = torch.arange(1, ECE_BINS, dtype=torch.float64) / ECE_BINS


def long_tail_metrics(
    logits: Tensor | np.ndarray | Sequence[Sequence[float]],
    labels: Tensor | np.ndarray | Sequence[int],
    class_counts: ClassCounts | Sequence[int] | np.ndarray | Tensor,
    *,
    ignore_index: int = -100,
    groups: Sequence[Any] | np.ndarray | None = None,
    detailed: bool = False,
) -> dict[str, Any]:
    """Evaluate ``logits`` (N, C) against class indices ``labels`` (N,).

    Plain cross-entropy and accuracy: margins and class weights are for training only. All values
    are plain Python and ready for JSON. Errors are in %, all other shares and ``ece`` in 0..1:

    * ``top1_error``: share of wrong samples, in %.
    * ``balanced_error``, ``train_prior_error``: in %, as if all classes were equally frequent, or
      as frequent as in training; see :func:`~ldam_plugins.metrics.views.error_views`. Where the
      classes of the test set are of one size the first is ``top1_error``.
    * ``balanced_accuracy``: mean of the per-class accuracies, over classes with a test sample.
    * ``worst_class_accuracy``: the smallest of them; ``worst_class``: the index of its class.
    * ``per_class_accuracy``: list of C; None for a class without a test sample.
    * ``many``, ``medium``, ``few``: mean of the per-class accuracies of the group, each class
      counting once; None where no class of the group has a test sample.
    * ``nll``: mean cross-entropy of ``softmax(logits)``, in nats.
    * ``ece``: ``sum_b |sum of confidence in b - correct in b| / N`` over 15 equal-width bins
      ``(b / 15, (b + 1) / 15]`` of the confidence, the largest softmax probability.
    * ``macro_precision``, ``macro_recall``, ``macro_f1``: means over the classes that have a test
      sample or are predicted, 0/0 being 0; ``weighted_`` of the same: weighted by test samples.
      Both as scikit-learn has them. ``macro_recall`` is ``balanced_accuracy`` unless a class
      without a test sample is predicted.
    * ``per_class_precision``, ``per_class_f1``: lists of C; None where 0/0. The recall of a class
      is its accuracy. ``per_class_samples``: its test samples.
    * ``top5_accuracy``: share of samples whose class is among the five likeliest; with more than
      five classes only.
    * ``auroc``, ``average_precision``: with two classes only; None if one has no test sample. The
      first is the same whichever class is the positive one, the second is of the one with fewer
      training samples (class 1 if equal) and in ``per_class_average_precision`` of either. Samples
      are ranked by the difference of their logits, which does not saturate as probabilities do.

    Of several equal largest logits the first is the prediction.

    With ``detailed`` there are as well, at a cost that is for the end of a training:

    * ``intervals``: by name of a metric its 95 % interval (low, high), in the metric's unit, over
      other test samples of the same kind; it says nothing of other trainings. Shares have Wilson's
      (``top1_error``, ``top5_accuracy``, ``per_class_accuracy``, and a group of one class), all
      else a bootstrap stratified by class. ``few_examples``: the names of those that are too
      narrow, there being a class with fewer than 20 test samples (``auroc`` 50,
      ``average_precision`` 200). The class with the least accuracy
      is chosen for it: ``worst_class_accuracy`` is an interval that holds for all classes at once
      (Bonferroni), and ``worst_class_selection_bias`` is by how much the least accuracy is
      expected to be too low. ``nll`` and ``ece`` have none.
    * ``confusion``: ``true``, ``predicted`` and ``samples`` of each pair of classes that occurs.
    * ``by_group``, where ``groups`` are given: by name of a group ``samples``, ``classes`` that it
      has samples of, ``top1_error`` and ``balanced_error`` over those, ``intervals`` of the two,
      and ``few_examples`` as above.

    Memory is O(N + C) in addition to the logits.

    Args:
        logits: (N, C), floating; -inf is allowed for classes that are not the label.
        labels: (N,), integers.
        class_counts: *Training* samples per class (C): they define the groups.
        ignore_index: Label of the rows that are left out.
        groups: What each row belongs to (N,), such as a camera or a patient; by its text.
        detailed: Whether to give intervals, the confusion matrix and the groups.

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
    accumulator.update(logits, labels, groups)
    return accumulator.compute(detailed=detailed)


class MetricAccumulator:
    """The metrics of :func:`long_tail_metrics`, fed in batches.

    It keeps sums, and how many samples of which class were predicted as which: memory is O(C) and
    O(pairs that occur), with two classes O(N) for the scores. Counts are integers and the float64
    sums are exact (:func:`math.fsum`), so the result is the same to the bit for any order of the
    rows and any split: one batch or many, one process or several merged. Libraries of metrics do
    not promise this, which is why the sums are written out here.

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
        self._in_top = 0
        self._pairs = SparseCounts()
        self._scores: list[tuple[np.ndarray, np.ndarray]] = []
        self._groups: dict[str, SparseCounts] = {}
        self._bin_correct = np.zeros(ECE_BINS, dtype=np.int64)
        self._bin_confidence: list[list[float]] = [[] for _ in range(ECE_BINS)]
        self._nll: list[float] = []

    def update(
        self,
        logits: Tensor | np.ndarray | Sequence[Sequence[float]],
        labels: Tensor | np.ndarray | Sequence[int],
        groups: Sequence[Any] | np.ndarray | None = None,
    ) -> None:
        """Add the rows of a batch: ``logits`` (N, C), ``labels`` and ``groups`` (N,); N may be 0.

        Raises:
            TypeError: ``logits`` are not floats or ``labels`` not integers.
            ValueError: shapes, a label out of range, NaN or infinite logits; nothing is added.
        """
        classes = len(self.class_counts)
        scores = check_scores(logits, classes)
        target = check_labels(labels, scores, self.ignore_index)
        kept = target != self.ignore_index
        names = check_groups(groups, kept)
        rows = score_rows(scores, target, kept)
        target = target[kept]
        correct = rows.predicted == target
        self._samples += np.bincount(target, minlength=classes)
        self._correct += np.bincount(target[correct], minlength=classes)
        self._predicted += np.bincount(rows.predicted, minlength=classes)
        self._in_top += int((rows.ranks < TOP_K).sum())
        self._pairs.add(target * classes + rows.predicted)
        if classes == 2:
            self._scores.append((rows.differences, target))
        self._add_groups(names, 2 * target + correct)
        self._nll = _exact_parts(self._nll, rows.nll)
        self._add_confidence(rows.confidence, correct)

    def _add_groups(self, names: np.ndarray | None, codes: np.ndarray) -> None:
        for name in () if names is None else np.unique(names):
            self._groups.setdefault(str(name), SparseCounts()).add(codes[names == name])

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
        self._in_top += other._in_top
        self._pairs.merge(*other._pairs.items())
        self._scores += other._scores
        for name, counts in other._groups.items():
            self._groups.setdefault(name, SparseCounts()).merge(*counts.items())
        self._bin_correct += other._bin_correct
        self._nll = _exact_parts(self._nll, other._nll)
        pairs = zip(self._bin_confidence, other._bin_confidence, strict=True)
        self._bin_confidence = [_exact_parts(mine, added) for mine, added in pairs]

    def compute(self, *, detailed: bool = False) -> dict[str, Any]:
        """The metrics of all rows so far; keys as in :func:`long_tail_metrics`.

        Args:
            detailed: Whether to give intervals, the confusion matrix and the groups as well.

        Raises:
            ValueError: no row so far that counts.
        """
        total, correct = int(self._samples.sum()), int(self._correct.sum())
        if total == 0:
            expected = f"other than {self.ignore_index} (ignore_index) in at least one row"
            raise invalid("labels", expected, "no such row")
        gaps = zip(self._bin_confidence, self._bin_correct.tolist(), strict=True)
        ece = math.fsum(abs(math.fsum([*parts, -hits])) for parts, hits in gaps) / total
        found = {
            "top1_error": 100.0 * (total - correct) / total,
            **self._class_accuracies(),
            "nll": math.fsum(self._nll) / total,
            "ece": ece,
            **self._class_scores(),
        }
        classes, ranking = len(self.class_counts), self._ranking()
        if classes > TOP_K:
            found[f"top{TOP_K}_accuracy"] = self._in_top / total
        if classes == 2:
            found |= self._areas(ranking)
        return found | (self._details(ranking) if detailed else {})

    def _class_accuracies(self) -> dict[str, Any]:
        seen = self._samples > 0
        accuracy = self._correct / np.maximum(self._samples, 1)
        groups = self.class_counts.groups().items()
        by_class = _where(seen, accuracy)
        return {
            **error_views(by_class, self.class_counts),
            "balanced_accuracy": float(accuracy[seen].mean()),
            "worst_class_accuracy": float(accuracy[seen].min()),
            "worst_class": int(np.where(seen, accuracy, np.inf).argmin()),
            "per_class_accuracy": by_class,
            **{name: _mean_or_none(accuracy[ids][seen[ids]]) for name, ids in groups},
        }

    def _class_scores(self) -> dict[str, Any]:
        scores = class_scores(self._correct, self._samples, self._predicted)
        present = self._samples + self._predicted > 0
        means = averages(scores, self._samples, present)
        return {
            **{name: float(value) for name, value in means.items()},
            "per_class_precision": _where(self._predicted > 0, scores.precision),
            "per_class_f1": _where(present, scores.f1),
            "per_class_samples": self._samples.tolist(),
        }

    def _ranking(self) -> Ranking | None:
        """The samples of two classes in their order; None if there is none."""
        if len(self.class_counts) != 2 or not self._samples.all():
            return None
        return Ranking(*map(np.concatenate, zip(*self._scores, strict=True)))

    def _areas(self, ranking: Ranking | None) -> dict[str, Any]:
        if ranking is None:
            return dict.fromkeys(("auroc", "average_precision", "per_class_average_precision"))
        auroc, precisions = ranking.areas()
        return {
            "auroc": auroc,
            "average_precision": precisions[self._rarer()],
            "per_class_average_precision": list(precisions),
        }

    def _rarer(self) -> int:
        first, second = self.class_counts.counts
        return int(first >= second)

    def _details(self, ranking: Ranking | None) -> dict[str, Any]:
        classes, (codes, counts) = len(self.class_counts), self._pairs.items()
        true, predicted = np.divmod(codes, classes)
        bootstrap = ClassBootstrap(self._samples, true, predicted, counts)
        found = class_intervals(self.class_counts, self._correct, self._predicted, bootstrap)
        if classes > TOP_K:
            found[f"top{TOP_K}_accuracy"] = wilson(self._in_top, self._samples.sum()).tolist()
        if ranking is not None:
            areas = ranking_intervals(ranking)
            found |= areas
            found["average_precision"] = areas["per_class_average_precision"][self._rarer()]
            found["few_examples"] += few_ranked(int(self._samples.min()))
        confusion = {"true": true, "predicted": predicted, "samples": counts}
        by_group = {
            name: group_metrics(*self._groups[name].items()) for name in sorted(self._groups)
        }
        return {
            "intervals": found,
            "confusion": {name: column.tolist() for name, column in confusion.items()},
            **({"by_group": by_group} if by_group else {}),
        }


def _where(known: np.ndarray, values: np.ndarray) -> list[float | None]:
    pairs = zip(known.tolist(), values.tolist(), strict=True)
    return [value if there else None for there, value in pairs]


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
