"""Which epoch of a run is its result: the last one, or the best on held-out training samples."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ldam_plugins._validation import check_choice, check_int
from ldam_plugins.choices import METRICS
from ldam_plugins.schedules import DeferredSchedule

LESS_IS_BETTER = ("nll",)


@dataclass(frozen=True)
class SelectionRule:
    """The best epoch by a metric on held-out samples, and when to stop looking for a better one.

    A pure function of the scores so far, so a resumed run selects as an undisturbed one.

    Under a deferred schedule only epochs that end in its second stage are candidates: a model from
    before the switch is one of another method, the plain loss without re-weighting. For the same
    reason no run stops before the switch. An earlier epoch that scored better than the selected one
    is in the :meth:`record`: the second stage did not pay there.

    Of equal scores the first counts. A score that is not a number is never the best.

    Args:
        metric: One of :data:`ldam_plugins.choices.METRICS`.
        first_epoch: First candidate, see :func:`first_candidate`.
        patience: Stop when so many epochs have brought nothing better than the best candidate;
            None: never.

    Raises:
        TypeError, ValueError: an unknown metric, a negative epoch, a patience below 1.

    Example:
        >>> rule = SelectionRule("balanced_accuracy", first_epoch=2, patience=2)
        >>> scores = {0: 0.9, 1: 0.5, 2: 0.7, 3: 0.8, 4: 0.6}
        >>> rule.best(scores), rule.better_before(scores), rule.stops(scores)
        (3, 0, False)
        >>> rule.stops({**scores, 5: 0.8})
        True
    """

    metric: str
    first_epoch: int = 0
    patience: int | None = None

    def __post_init__(self) -> None:
        check_choice("metric", self.metric, METRICS)
        check_int("first_epoch", self.first_epoch, low=0)
        if self.patience is not None:
            check_int("patience", self.patience, low=1)

    def best(self, scores: Mapping[int, float]) -> int | None:
        """The best candidate among the epochs (0-based) that were scored; None without one."""
        return self._best({e: s for e, s in scores.items() if e >= self.first_epoch})

    def better_before(self, scores: Mapping[int, float]) -> int | None:
        """The best epoch before the first candidate if it beats all candidates, else None."""
        earlier = self._best({e: s for e, s in scores.items() if e < self.first_epoch})
        best = self.best(scores)
        if earlier is None or best is None or not self._beats(scores[earlier], scores[best]):
            return None
        return earlier

    def stops(self, scores: Mapping[int, float]) -> bool:
        """Whether the epoch that was scored last is ``patience`` epochs past the best candidate."""
        best = self.best(scores)
        if best is None or self.patience is None:
            return False
        return max(scores) - best >= self.patience

    def record(self, scores: Mapping[int, float]) -> dict[str, Any]:
        """What ``metrics.json`` says of the selection; epochs are 0-based.

        ``metric``, ``epoch`` and ``score`` of the model that is left, the ``first_candidate``, and
        ``better_before``: epoch and score as of :meth:`better_before`, or None.
        """
        best, earlier = self.best(scores), self.better_before(scores)
        return {
            "metric": self.metric,
            "epoch": best,
            "score": None if best is None else scores[best],
            "first_candidate": self.first_epoch,
            "better_before": None
            if earlier is None
            else {"epoch": earlier, "score": scores[earlier]},
        }

    def _best(self, scores: Mapping[int, float]) -> int | None:
        found = None
        for epoch in sorted(scores):
            if math.isnan(scores[epoch]):
                continue
            if found is None or self._beats(scores[epoch], scores[found]):
                found = epoch
        return found

    def _beats(self, score: float, other: float) -> bool:
        return score < other if self.metric in LESS_IS_BETTER else score > other


def first_candidate(schedule: DeferredSchedule, epochs: int, steps_per_epoch: int) -> int:
    """First epoch (0-based) whose last update is in the schedule's last stage; 0 if none is.

    Example:
        >>> schedules = [DeferredSchedule("drw", start) for start in (8, 0.85, 1.0)]
        >>> [first_candidate(schedule, 10, 5) for schedule in schedules]
        [8, 8, 0]
    """
    first = schedule.start_step(epochs * steps_per_epoch, steps_per_epoch) // steps_per_epoch
    return first if first < epochs else 0


class BestModel(nn.Module):
    """A copy of the best model so far, and the score of every epoch, for checkpoints.

    As it is a module it is saved and loaded like a moving average, with the checkpoint
    (``models={"best": best}`` of :func:`~ldam_plugins.training.save_checkpoint`), so the two always
    tell of the same epochs.

    Args:
        model: The model in training; the copy is kept on the CPU.
        rule: What is best.
        epochs: Epochs of the whole training.
    """

    def __init__(self, model: nn.Module, rule: SelectionRule, epochs: int) -> None:
        super().__init__()
        self.rule = rule
        self.module = copy.deepcopy(model).cpu()
        self._scores: torch.Tensor
        unscored = torch.full((epochs,), math.nan, dtype=torch.float64)
        self.register_buffer("_scores", unscored)

    def update(self, model: nn.Module, epoch: int, score: float) -> bool:
        """Note the score of an epoch, and keep its model if it is the best; returns whether so."""
        self._scores[epoch] = score
        if self.rule.best(self.scores) != epoch:
            return False
        self.module.load_state_dict(model.state_dict())
        return True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        """A training may have become longer: epochs that the state does not know are unscored."""
        known = state_dict[f"{prefix}_scores"]
        if len(known) < len(self._scores):
            padded = torch.full_like(self._scores, math.nan)
            padded[: len(known)] = known
            state_dict[f"{prefix}_scores"] = padded
        super()._load_from_state_dict(state_dict, prefix, *more)

    @property
    def scores(self) -> dict[int, float]:
        """The score of each epoch that was scored."""
        scored = enumerate(self._scores.tolist())
        return {epoch: score for epoch, score in scored if not math.isnan(score)}

    @property
    def stops(self) -> bool:
        """Whether the training is to stop now, see :meth:`SelectionRule.stops`."""
        return bool(self.scores) and self.rule.stops(self.scores)
