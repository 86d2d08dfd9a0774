"""Which method, and how strong: chosen by stratified cross-fitting, or that nothing is to be done.

What a method learns from labels is learned on four fifths of the samples and judged on the others,
five times over, so that no sample judges what was learned from it. All candidates are judged on the
same samples; what one is better by than the head as it is is a mean of paired differences, and it
is chosen only if that is more than noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ldam_plugins._validation import check_choice, check_int
from ldam_plugins.choices import CRITERIA
from ldam_plugins.counts import ClassCounts
from ldam_plugins.posthoc.linear_head import ROWS_AT_ONCE
from ldam_plugins.posthoc.methods import (
    NONE,
    Affine,
    Problem,
    best_temperature,
    find_method,
    rescaling,
)

LEVEL = 0.95
FEW = 10
"""A class with fewer judged samples is pooled with others of its group."""
_Z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
_TOLERANCE = 1e-3


class Difference(NamedTuple):
    """A mean over classes with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def is_more_than_noise(self) -> bool:
        """Whether the interval is above 0."""
        return self.low > 0


class Candidate(NamedTuple):
    """A method with a strength, and how good it is by cross-fitting.

    Attributes:
        method: Its name.
        strength: Its strength, None for one without.
        log_loss: Mean over the classes (by their target shares), at the best temperature.
        accuracy: Likewise, in 0..1.
        gain: By how much the criterion is better than that of the head as it is.
        accuracy_gain: The same of the accuracy.
    """

    method: str
    strength: float | None
    log_loss: float
    accuracy: float
    gain: Difference
    accuracy_gain: Difference


@dataclass(frozen=True, eq=False)
class Choice:
    """What was chosen, and among what.

    Args:
        by: The criterion, one of :data:`CRITERIA`.
        chosen: The candidate that is applied.
        best: The one that came out best; ``chosen`` unless it is no better than noise.
        candidates: All, in the order in which they were tried.
        folds: Of the cross-fitting.
        samples: That were judged.
        pooled: Classes that were judged together with others of their group, by group.
        logits: Of ``chosen`` for each sample (N, C), from heads that had not learned from it.
        judged: Whether each sample was judged, bool (N,).
    """

    by: str
    chosen: Candidate
    best: Candidate
    candidates: tuple[Candidate, ...]
    folds: int
    samples: int
    pooled: dict[str, list[int]]
    logits: Tensor
    judged: Tensor

    @property
    def is_more_than_noise(self) -> bool:
        """Whether the best candidate is better than the head as it is by more than noise."""
        return self.best.method != NONE and self.chosen is self.best

    def verdict(self) -> str:
        """What came out, in a sentence."""
        best, unit = self.best, "nats" if self.by == "log_loss" else "points"
        factor = 1 if self.by == "log_loss" else 100
        name = self.by.replace("_", " ")
        value, low, high = (factor * number for number in best.gain)
        strength = "" if best.strength is None else f" of strength {best.strength:.4g}"
        told = f"{best.method}{strength} has the best {name} of {len(self.candidates)} candidates"
        if best.method == NONE:
            return f"The head as it is has the best {name} of {len(self.candidates)} candidates."
        told += f" on {self.samples} samples: better than the head as it is by {value:.3g} {unit}"
        told += f" ({low:.3g} to {high:.3g})"
        if best.gain.is_more_than_noise:
            return f"{told}, which is more than noise."
        return f"{told}, which may be noise."

    def to_dict(self) -> dict[str, Any]:
        """What there is to record of it, ready for JSON."""
        return {
            "by": self.by,
            "method": self.chosen.method,
            "strength": self.chosen.strength,
            "gain": list(self.best.gain),
            "more_than_noise": self.is_more_than_noise,
            "verdict": self.verdict(),
            "folds": self.folds,
            "samples": self.samples,
            "pooled": self.pooled,
            "candidates": [
                {
                    **each._asdict(),
                    "gain": list(each.gain),
                    "accuracy_gain": list(each.accuracy_gain),
                }
                for each in self.candidates
            ],
        }


def choose(
    problem: Problem,
    class_counts: ClassCounts,
    methods: Sequence[tuple[str, float | None]],
    *,
    by: str = "log_loss",
    folds: int = 5,
    seed: int = 0,
    keep_best: bool = False,
) -> Choice:
    """Choose among methods by cross-fitting.

    Args:
        problem: The head and labelled features, every class with a sample.
        class_counts: Training samples per class: they define the groups for pooling.
        methods: Names, each with a strength or None to try those of its grid. The head as it is
            always takes part.
        by: ``"log_loss"`` or ``"accuracy"``; of candidates whose accuracy is the best but for noise
            that of the least log loss is taken.
        folds: At least 2.
        seed: Of the division into folds.
        keep_best: Whether the best one is applied even if it is no better than noise, where it is
            the strength alone that is to be chosen.

    Raises:
        ValueError: an unknown criterion or method, or fewer than two folds.
    """
    check_choice("by", by, CRITERIA)
    fold = problem_folds(problem, check_int("folds", folds, low=2), seed)
    judged = fold >= 0
    cells = pool_classes(problem.labels[judged], class_counts, problem.target)
    names = dict.fromkeys([(NONE, None), *methods])
    rough = replace(problem, tolerance=max(_TOLERANCE, problem.tolerance))
    base = None if problem.fold_heads else problem.head.logits(problem.features)
    candidates: list[Candidate] = []
    right: list[Tensor] = []
    for name, given in names:
        method = find_method(name)
        grid = method.strengths(len(problem.labels)) if given is None else (given,)
        for strength in grid:
            logits = chosen_rows(cross_fitted(rough, name, strength, fold, base), judged)
            scores = _Scores.of(logits, problem.labels[judged], cells)
            if not candidates:
                first = scores
            candidates.append(scores.candidate(name, strength, first, cells, by))
            right.append(scores.correct)
    best = candidates[_best(candidates, right, cells, by, start=int(keep_best))]
    real = best.gain.is_more_than_noise and best.accuracy_gain.high >= 0
    chosen = best if real or keep_best else candidates[0]
    logits = cross_fitted(rough, chosen.method, chosen.strength, fold, base)
    return Choice(
        by,
        chosen,
        best,
        tuple(candidates),
        folds,
        int(judged.sum()),
        cells.pooled,
        logits,
        judged,
    )


def _best(
    candidates: Sequence[Candidate], right: Sequence[Tensor], cells: Cells, by: str, *, start: int
) -> int:
    """The place of the best candidate, from ``start`` on; of equal ones the first.

    An accuracy of a class with ten samples takes ten values: many candidates are as good as the
    best but for noise. Of these the one with the least log loss is taken.
    """
    places = range(start, len(candidates))
    best = max(places, key=lambda place: candidates[place].gain.value)
    if by == "log_loss":
        return best
    equal = [place for place in places if cells.mean(right[best] - right[place]).low <= 0]
    return min(equal, key=lambda place: candidates[place].log_loss)


def chosen_rows(rows: Tensor, chosen: Tensor) -> Tensor:
    """``rows[chosen]``, without a copy where that is all of them."""
    return rows if bool(chosen.all()) else rows[chosen]


def cross_fitted(
    problem: Problem,
    method: str,
    strength: float | None,
    fold: Tensor,
    base: Tensor | None = None,
) -> Tensor:
    """Logits (N, C) of each sample, from a head that did not learn from it.

    Args:
        problem: The head and labelled features.
        method: Its name.
        strength: Its strength.
        fold: Of each sample, see :func:`stratified_folds`. Samples of no fold are learned from
            always, and their logits are of no use.
        base: Logits (N, C) of the given head, if they are known.
    """
    found = find_method(method)
    judged = fold >= 0
    logits = torch.zeros(len(problem.labels), len(problem.source))
    if not (found.learns or problem.fold_heads):
        head = found.apply(problem, strength)
        _write_logits(logits, problem, head, judged, base)
        return logits
    for index in range(int(fold.max()) + 1):
        held_out = fold == index
        part = problem.rows(~held_out)
        if problem.fold_heads:
            part = replace(part, head=problem.fold_heads[index])
        _write_logits(logits, problem, found.apply(part, strength), held_out, base)
    return logits


def _write_logits(
    logits: Tensor, problem: Problem, head: Affine, rows: Tensor, base: Tensor | None
) -> None:
    """Write the logits of some rows, bool (N,), of a head."""
    known = None if base is None else rescaling(problem.head, head)
    for chosen in rows.nonzero().squeeze(1).split(ROWS_AT_ONCE):
        if base is None or known is None:
            logits[chosen] = head.logits(problem.features[chosen])
        else:
            logits[chosen] = (base[chosen].double() * known[0] + known[1]).float()


def problem_folds(problem: Problem, folds: int, seed: int = 0) -> Tensor:
    """The fold of each sample, as of :func:`stratified_folds`; the ``others`` are in none."""
    _, labels = problem.judges()
    others = problem.labels[len(labels) :]
    fold = stratified_folds(labels, folds, seed, others=others)
    return torch.cat([fold, torch.full_like(others, -1)])


def stratified_folds(
    labels: Tensor, folds: int, seed: int = 0, others: Tensor | None = None
) -> Tensor:
    """The fold of each sample, int64 (N,): each class is spread over the folds evenly.

    A class with a single sample is in no fold (-1), so that it is always learned from.

    Args:
        labels: (N,).
        folds: How many.
        seed: Of the order within a class.
        others: Classes of further samples that are always learned from (M,): a single sample of one
            of these is in a fold.
    """
    rng = np.random.default_rng(seed)
    found = np.full(len(labels), -1)
    classes = labels.numpy()
    known = set() if others is None else set(others.unique().tolist())
    start = 0
    for label in np.unique(classes):
        rows = rng.permutation(np.flatnonzero(classes == label))
        if len(rows) > 1 or int(label) in known:
            found[rows] = (start + np.arange(len(rows))) % folds
            start += len(rows)  # so that the folds are of one size
    return torch.from_numpy(found)


@dataclass(frozen=True, eq=False)
class Cells:
    """Classes, and groups of classes with few samples, each judged by the mean of its samples.

    Args:
        cell: Of each sample, int64 (N,).
        share: What each cell counts in the mean, (K,), the sum is 1.
        pooled: Classes that share a cell, by group.
        of_class: The cell of each class, (C,).
    """

    cell: Tensor
    share: Tensor
    pooled: dict[str, list[int]]
    of_class: Tensor

    def weights(self) -> Tensor:
        """A weight a sample, float64 (N,), with sum 1."""
        sizes = torch.bincount(self.cell, minlength=len(self.share))
        return (self.share / sizes.double())[self.cell]

    def mean(self, values: Tensor, spread: float | None = None) -> Difference:
        """The mean over the cells of values of the samples, with its interval.

        Args:
            values: (N,).
            spread: Least variance within a cell of fewer than :data:`FEW` samples, which may all
                be alike by chance; default: that of all values.
        """
        sizes = torch.bincount(self.cell, minlength=len(self.share)).double()
        sums = torch.zeros_like(self.share).index_add_(0, self.cell, values.double())
        means = sums / sizes
        squares = torch.zeros_like(self.share).index_add_(
            0, self.cell, (values - means[self.cell]).square()
        )
        own = squares / (sizes - 1).clamp_min(1)
        least = variance_of(values) if spread is None else spread
        variance = torch.where(sizes < FEW, own.clamp_min(least), own)
        middle = float(self.share @ means)
        half = _Z * float((self.share.square() * variance / sizes).sum().sqrt())
        return Difference(middle, middle - half, middle + half)


def variance_of(values: Tensor) -> float:
    """The variance of some values, 0 of a single one."""
    return float(values.double().var()) if len(values) > 1 else 0.0


def pool_classes(
    labels: Tensor, class_counts: ClassCounts, target: Tensor, least: int = FEW
) -> Cells:
    """Cells of the classes: those with fewer than ``least`` samples share that of their group.

    So that a class with one sample does not decide by that sample as much as a class with a
    hundred: within a pool each sample counts the same, the pool as much as its classes together.

    Args:
        labels: Of the samples that are judged, (N,).
        class_counts: Training samples per class: they define the groups.
        target: Share of each class, (C,).
        least: Samples.
    """
    sizes = torch.bincount(labels, minlength=len(target))
    cell = torch.full_like(sizes, -1)
    own = (sizes >= least).nonzero().squeeze(1)
    cell[own] = torch.arange(len(own))
    count, pooled = len(own), {}
    waiting: list[int] = []
    for name, ids in reversed(class_counts.groups().items()):
        few = [index for index in ids if cell[index] < 0]
        if few:
            pooled[name] = few
        waiting += few
        if waiting and int(sizes[waiting].sum()):
            cell[waiting] = count
            count, waiting = count + 1, []
    if waiting:  # none of them has a sample that is judged: they count with the smallest other
        cell[waiting] = int(sizes[own].argmin()) if len(own) else count - 1
    share = torch.zeros(count, dtype=torch.float64).index_add_(0, cell, target)
    return Cells(cell[labels], share, pooled, cell)


class _Scores(NamedTuple):
    """Of each judged sample: log loss, and whether the prediction is right."""

    loss: Tensor
    correct: Tensor

    @classmethod
    def of(cls, logits: Tensor, labels: Tensor, cells: Cells) -> _Scores:
        scale = 1 / best_temperature(logits, labels, cells.weights(), precision=1e-3)
        loss = torch.empty(len(labels), dtype=torch.float64)
        predicted = torch.empty_like(labels)
        for start in range(0, len(labels), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            log_p = (logits[rows].double() * scale).log_softmax(dim=1)
            loss[rows] = -log_p.gather(1, labels[rows, None]).squeeze(1)
            predicted[rows] = logits[rows].argmax(dim=1)
        return cls(loss, (predicted == labels).double())

    def candidate(
        self, method: str, strength: float | None, base: _Scores, cells: Cells, by: str
    ) -> Candidate:
        accuracy_gain = cells.mean(self.correct - base.correct)
        gain = accuracy_gain if by == "accuracy" else cells.mean(base.loss - self.loss)
        return Candidate(
            method,
            strength,
            cells.mean(self.loss).value,
            cells.mean(self.correct).value,
            gain,
            accuracy_gain,
        )
