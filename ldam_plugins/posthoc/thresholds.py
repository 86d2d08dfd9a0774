"""Thresholds chosen on held-out samples: from where on a class is answered, and when none is.

What is chosen is a small file beside the model, :class:`Thresholds`; the model stays as it is.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldam_plugins._validation import check_choice, check_real, invalid
from ldam_plugins.training.files import to_json, write_atomic

AIMS = ("f1", "precision", "recall", "cost")
"""What the threshold of two classes can be chosen for."""
STARTS = (0.1, 0.5)
"""Shares of the samples at which :func:`choose_abstention` begins to answer."""
_SLACK = 1e-6
_WEIGHTS = (".safetensors", ".bin", ".pth", ".tar")


@dataclass(frozen=True)
class TwoClassThreshold:
    """From which probability of the positive class on it is answered.

    Args:
        threshold: ``positive if p >= threshold``. It stands halfway between two scores, so that
            rounding does not move a sample across it.
        precision: On the samples that it was chosen on; None where nothing is answered positive.
        recall: Likewise.
        f1: Likewise.
        cost: Likewise, the mean cost of a sample; None unless it was chosen for the cost.
    """

    threshold: float
    precision: float | None
    recall: float
    f1: float
    cost: float | None = None


@dataclass(frozen=True)
class Abstention:
    """From which confidence on there is an answer, and what that gave where it was chosen.

    Args:
        threshold: ``answered if confidence >= threshold``, a millionth below the last that is
            answered, or halfway to the next; None if no share of the samples is known to err so
            little.
        answered: Samples with an answer, of those it was chosen on.
        errors: Wrong ones among them.
        samples: All samples it was chosen on.
    """

    threshold: float | None
    answered: int
    errors: int
    samples: int


def choose_threshold(
    scores: np.ndarray | Sequence[float],
    positive: np.ndarray | Sequence[bool],
    aim: str = "f1",
    *,
    at_least: float | None = None,
    costs: tuple[float, float] | None = None,
) -> TwoClassThreshold:
    """Choose from which score on a sample of two classes is called positive.

    * ``"f1"``: the highest ``2 TP / (2 TP + FP + FN)``;
    * ``"precision"``: the highest recall where ``TP / (TP + FP) >= at_least``;
    * ``"recall"``: the highest precision where ``TP / (TP + FN) >= at_least``;
    * ``"cost"``: the lowest ``(costs[0] FP + costs[1] FN) / N``; that may be to call none positive.

    All scores are tried. What it gives on these samples is the best of many, so it is a little
    less on others: measure it on samples that did not choose it.

    Args:
        scores: Probability of the positive class (N,), in [0, 1].
        positive: Whether each sample is positive (N,).
        aim: One of :data:`AIMS`.
        at_least: The precision or recall that is asked for, in (0, 1].
        costs: Of a false positive and of a false negative, not negative and not both 0.

    Raises:
        ValueError: an unknown aim, scores that are no probabilities, no sample of a class, or a
            precision that no score reaches; the message says which one is reached.

    Example:
        >>> choose_threshold([0.1, 0.2, 0.3, 0.9], [False, True, False, True]).threshold
        0.15...
        >>> found = choose_threshold([0.1, 0.2, 0.3, 0.9], [0, 1, 0, 1], "precision", at_least=0.9)
        >>> found.threshold, found.recall
        (0.6, 0.5)
    """
    check_choice("aim", aim, AIMS)
    if aim in ("precision", "recall"):
        check_real("at_least", at_least, low=0, high=1, low_open=True)  # type: ignore[arg-type]
    p, is_positive = _checked(scores, positive)
    order = np.argsort(-p, kind="stable")
    p, hits = p[order], np.concatenate([[0], np.cumsum(is_positive[order])])
    called = np.concatenate([[0], np.flatnonzero(np.append(p[1:] < p[:-1], True)) + 1])
    tp = hits[called].astype(float)
    fp, fn = called - tp, hits[-1] - tp
    recall, f1 = tp / hits[-1], 2 * tp / (2 * tp + fp + fn)
    precision = tp / np.maximum(called, 1)
    cost = None
    if aim == "cost":
        cost = _mean_cost(fp, fn, len(p), costs)
        best = int(cost.argmin())
    elif aim == "f1":
        best = int(f1.argmax())
    else:
        bound, other = (precision, recall) if aim == "precision" else (recall, precision)
        allowed = (bound >= at_least) & (called > 0)
        if not allowed.any():
            reached = f"at most {bound[called > 0].max():.4g} is reached on {len(p)} samples"
            raise invalid(
                "at_least", f"a {aim} that is reached", at_least, hint=f"{reached.capitalize()}."
            )
        best = int(np.lexsort((-bound, -np.where(allowed, other, -1)))[0])
    return TwoClassThreshold(
        _between(p, int(called[best])),
        float(precision[best]) if called[best] else None,
        float(recall[best]),
        float(f1[best]),
        None if cost is None else float(cost[best]),
    )


def threshold_figures(
    scores: np.ndarray | Sequence[float],
    positive: np.ndarray | Sequence[bool],
    threshold: float,
    *,
    costs: tuple[float, float] | None = None,
) -> dict[str, Any]:
    """What a threshold gives on some samples: precision and recall with 95 % intervals, F1, cost.

    Args:
        scores: As in :func:`choose_threshold`.
        positive: Likewise.
        threshold: Scores from here on are called positive.
        costs: Of a false positive and a false negative; without them there is no ``cost``.

    Returns:
        ``precision`` (None where nothing is called positive), ``recall``, ``f1``, ``called`` and
        ``samples``, ``cost``, and ``intervals`` of precision and recall by Clopper and Pearson.

    Raises:
        ValueError: as :func:`choose_threshold`.
    """
    p, is_positive = _checked(scores, positive)
    called = p >= threshold
    tp, n_called, n_positive = (int(x.sum()) for x in (called & is_positive, called, is_positive))
    fp, fn = n_called - tp, n_positive - tp
    found: dict[str, Any] = {
        "precision": tp / n_called if n_called else None,
        "recall": tp / n_positive,
        "f1": 2 * tp / (2 * tp + fp + fn),
        "called": n_called,
        "samples": len(p),
        "intervals": {
            "precision": clopper_pearson(tp, n_called) if n_called else None,
            "recall": clopper_pearson(tp, n_positive),
        },
    }
    if costs is not None:
        found["cost"] = float(_mean_cost(np.array(fp), np.array(fn), len(p), costs))
    return found


def choose_abstention(
    confidence: np.ndarray | Sequence[float],
    correct: np.ndarray | Sequence[bool],
    risk: float,
    *,
    level: float = 0.95,
) -> Abstention:
    """Choose below which confidence there is no answer, so that few of the answers are wrong.

    With probability ``level`` over the held-out samples, the share of wrong answers among new
    samples that are answered is at most ``risk``; for any classifier and any number of classes, if
    new samples are drawn as these were. That the threshold is itself chosen is accounted for. In
    the order of their confidence, one more sample is answered as long as a binomial test rejects
    "those answered err more often than ``risk``"::

        P(Binomial(answered, risk) <= errors) <= (1 - level) / starts

    that is, as long as Clopper and Pearson's upper bound of the error is at most ``risk``. This is
    a fixed-sequence test: what was rejected before costs nothing. It begins at a tenth and at half
    of the samples (:data:`STARTS`), or where that is more at the fewest that could show it without
    any error (:func:`needed_samples`); each start has its share of the error probability, and the
    one that leads to more answers counts.

    Args:
        confidence: Of each sample's answer (N,), such as its probability; larger is surer.
        correct: Whether the answer is right (N,).
        risk: Share of wrong answers that is allowed, in (0, 1).
        level: How sure that is, in (0, 1).

    Raises:
        ValueError: a number out of range, or lengths that differ.

    Source: fixed-sequence tests with several starts, Angelopoulos et al., "Learn then Test",
    arXiv 2110.01052; answering at a guaranteed risk, Geifman and El-Yaniv, NeurIPS 2017,
    arXiv 1705.08500; the interval, Clopper and Pearson, Biometrika 26 (1934).

    Example:
        >>> found = choose_abstention(np.linspace(0, 1, 400), np.arange(400) >= 100, risk=0.1)
        >>> found.answered, found.errors
        (321, 21)
    """
    from scipy.stats import binom

    check_real("risk", risk, low=0, high=1, low_open=True, high_open=True)
    check_real("level", level, low=0, high=1, low_open=True, high_open=True)
    sure, right = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=bool)
    if sure.ndim != 1 or sure.shape != right.shape or not len(sure):
        expected = f"of shape ({len(right)},), one for each of `correct`, at least one"
        raise invalid("confidence", expected, sure.shape)
    if np.isnan(sure).any():
        raise invalid("confidence", "without NaN", "NaN")
    order = np.argsort(-sure, kind="stable")
    sure = sure[order]
    answered = np.flatnonzero(np.append(sure[1:] < sure[:-1], True)) + 1  # equal ones together
    errors = np.cumsum(~right[order])[answered - 1]
    tail = binom.cdf(errors, answered, risk)
    # What there is to begin at must not follow from the errors, nor how many tests there are.
    fewest = needed_samples(risk, level)
    starts = {max(fewest, math.ceil(share * len(sure))) for share in STARTS}
    best = -1
    for start in sorted(starts):
        first = int(np.searchsorted(answered, start))
        kept = tail[first:] > (1 - level) / len(starts)
        run = int(kept.argmax()) if kept.any() else len(kept)
        best = max(best, first + run - 1) if run else best
    if best < 0:
        return Abstention(None, 0, 0, len(sure))
    count = int(answered[best])
    last = float(sure[count - 1])  # rounding must not move it, nor others come in
    threshold = max(_between(sure, count), last - _SLACK)
    return Abstention(threshold, count, int(errors[best]), len(sure))


def needed_samples(risk: float, level: float = 0.95) -> int:
    """Answers without an error that show, at this level, that at most ``risk`` of them are wrong.

    Example:
        >>> needed_samples(0.05)
        72
    """
    return math.ceil(math.log((1 - level) / len(STARTS)) / math.log1p(-risk))


def clopper_pearson(successes: int, trials: int, level: float = 0.95) -> list[float]:
    """The exact interval of a share, from ``successes`` of ``trials``.

    Source: Clopper and Pearson, Biometrika 26 (1934).

    Example:
        >>> [round(end, 3) for end in clopper_pearson(0, 10)]
        [0.0, 0.308]
    """
    from scipy.stats import binomtest

    found = binomtest(successes, trials).proportion_ci(level, method="exact")
    return [float(found.low), float(found.high)]


class Decisions(NamedTuple):
    """What is answered for each of N samples.

    Attributes:
        answers: Class index (N,), also of those that are not answered.
        confidence: How sure each is (N,): the probability of the answer, after the threshold.
        abstained: Whether there is no answer (N,).
    """

    answers: np.ndarray
    confidence: np.ndarray
    abstained: np.ndarray


@dataclass(frozen=True)
class Thresholds:
    """How probabilities become answers.

    Args:
        class_names: In the order of the logits.
        positive: Name of the class that has a threshold of its own, of two.
        threshold: It is answered from this probability on; without it from 1/2.
        abstain_below: There is no answer below this confidence.
        weights: SHA-256 of the weights that they were chosen for.
        facts: What they were chosen for, on what, and what they gave; for people.

    Raises:
        ValueError: the positive class is not one of two, or a number is out of range.
    """

    class_names: tuple[str, ...]
    positive: str | None = None
    threshold: float | None = None
    abstain_below: float | None = None
    weights: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if (self.positive is None) != (self.threshold is None):
            raise invalid("threshold", "given together with `positive`", self.threshold)
        if self.threshold is not None:
            check_real("threshold", self.threshold, low=0)
            check_choice("positive", self.positive, self.class_names)
            if len(self.class_names) != 2:
                raise invalid("class_names", "two, if one has a threshold", list(self.class_names))
        if self.abstain_below is not None:
            check_real("abstain_below", self.abstain_below, low=0)

    def decide(self, probabilities: np.ndarray) -> Decisions:
        """The answers for probabilities (N, C).

        A threshold t stands for odds: confidence is the probability of the answer once the odds
        ``p / (1 - p)`` of the positive class are divided by ``t / (1 - t)``, so it is 1/2 at t.
        """
        from scipy.special import expit, logit

        p = np.asarray(probabilities, dtype=float)
        if self.threshold is None:
            answers = p.argmax(axis=1)
            confidence = p[np.arange(len(p)), answers]
        else:
            place = self.class_names.index(str(self.positive))
            score = p[:, place]
            answers = np.where(score >= self.threshold, place, 1 - place)
            confidence = p[np.arange(len(p)), answers]
            if 0 < self.threshold < 1:
                confidence = expit(np.abs(logit(score) - logit(self.threshold)))
        return Decisions(answers, confidence, confidence < (self.abstain_below or 0))

    def worded(self) -> str:
        """A sentence of what is answered, and why."""
        found = []
        if self.threshold is not None:
            aim = self.facts.get("threshold_for")
            why = f" (chosen for {aim})" if aim else ""
            found.append(f"{self.positive!r} from a probability of {self.threshold:.4g} on{why}")
        if self.abstain_below is not None:
            risk, level = self.facts.get("risk"), self.facts.get("confidence")
            why = f" (at most {risk:.3g} of the answers wrong, {level:.3g} sure)" if risk else ""
            found.append(f"no answer below a confidence of {self.abstain_below:.4g}{why}")
        on = self.facts.get("chosen_on")
        return f"Thresholds: {'; '.join(found) or 'none'}{f'. Chosen on {on}' if on else ''}."

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them as JSON, whole or not at all."""
        write_atomic(path, to_json(asdict(self), name="thresholds").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Thresholds:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file cannot be read or is no such file.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(**{**found, "class_names": tuple(found["class_names"])})
        except (OSError, KeyError, TypeError, ValueError) as error:
            expected = "a file that recipes/thresholds.py wrote"
            raise invalid("thresholds", expected, str(path), hint=f"{error}") from error


def weights_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file of weights, or of those in a folder.

    Raises:
        ValueError: there are none.
    """
    place = Path(path)
    files = [place] if place.is_file() else sorted(place.glob("*"))
    files = [file for file in files if file.is_file() and file.suffix in _WEIGHTS]
    if not files:
        raise invalid("path", "a folder with weights", str(path))
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _checked(scores: Any, positive: Any) -> tuple[np.ndarray, np.ndarray]:
    p, is_positive = np.asarray(scores, dtype=float), np.asarray(positive).astype(bool)
    if p.ndim != 1 or p.shape != is_positive.shape:
        expected = f"of shape ({len(is_positive)},), one for each of `positive`"
        raise invalid("scores", expected, p.shape)
    if not ((p >= 0) & (p <= 1)).all():
        raise invalid("scores", "probabilities in [0, 1]", float(p[~((p >= 0) & (p <= 1))][0]))
    if is_positive.all() or not is_positive.any():
        shown = f"{int(is_positive.sum())} of {len(p)} samples"
        raise invalid("positive", "true of some samples and false of others", shown)
    return p, is_positive


def _mean_cost(
    fp: np.ndarray, fn: np.ndarray, samples: int, costs: tuple[float, float] | None
) -> np.ndarray:
    if costs is None or min(costs) < 0 or max(costs) <= 0 or not all(map(math.isfinite, costs)):
        expected = "those of a false positive and a false negative, not negative and not both 0"
        raise invalid("costs", expected, costs)
    return (costs[0] * fp + costs[1] * fn) / samples


def _between(descending: np.ndarray, count: int) -> float:
    """A value that the first ``count`` are not below, and all others are, away from both."""
    above = descending[count - 1] if count else None
    below = descending[count] if count < len(descending) else 0.0
    if above is None:
        return float((below + 1) / 2) if below < 1 else math.nextafter(1, 2)
    middle = (above + below) / 2
    return float(middle if middle > below else above)
