"""What is re-weighted or re-sampled when: pure functions of the progress of a training."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldam_plugins._validation import check_choice, check_int, check_real, invalid
from ldam_plugins.counts import ClassCounts

KINDS = ("none", "rw", "rs", "drw", "drs", "progressive")
UNITS = ("auto", "fraction", "epoch", "step")


@dataclass(frozen=True)
class Progress:
    """Where a training is: the caller owns the count.

    Args:
        step: Optimizer updates done, so the 0-based number of the coming one.
        total_steps: Updates of the whole training.
        steps_per_epoch: Updates of one epoch.
    """

    step: int
    total_steps: int
    steps_per_epoch: int

    def __post_init__(self) -> None:
        check_int("step", self.step, low=0)
        check_int("total_steps", self.total_steps, low=1)
        check_int("steps_per_epoch", self.steps_per_epoch, low=1)

    @property
    def share(self) -> float:
        """Share of the training that is done, in [0, 1]."""
        return min(self.step / self.total_steps, 1.0)


@dataclass(frozen=True)
class DeferredSchedule:
    """Which classes count more, and from when on.

    ========== ===================================================================
    ``none``   uniform throughout
    ``rw``     class-balanced weights from the beginning
    ``drw``    class-balanced weights from ``start`` on (deferred re-weighting)
    ``rs``     class-balanced sampling from the beginning
    ``drs``    class-balanced sampling from ``start`` on (deferred re-sampling)
    ``progressive`` sampling that moves from the data's distribution to a balanced one,
               ``p_c = (1 - t) n_c / N + t / C`` at the share t of the training
    ========== ===================================================================

    There is no state: a resumed training is in the right stage because the stage follows from
    its progress.

    Source: Cao et al., NeurIPS 2019, arXiv 1906.07413, algorithm 1; progressive: Kang et al.,
    ICLR 2020, arXiv 1910.09217, equation 3.

    Args:
        kind: One of the above.
        start: When the second stage of ``drw`` and ``drs`` begins: a float in [0, 1] is a share
            of the whole training, an int a 0-based epoch; 0 is from the beginning.
        unit: What ``start`` counts. ``"auto"`` goes by its type as above; ``"fraction"``,
            ``"epoch"`` or ``"step"`` (optimizer updates) say it.
        beta: Of :meth:`ClassCounts.weights`, for weights and for sampling: 0 changes nothing,
            towards 1 gives inverse frequency.

    Raises:
        TypeError: ``start`` is not a number.
        ValueError: unknown ``kind`` or ``unit``, or ``start`` or ``beta`` out of range.

    Example:
        >>> schedule = DeferredSchedule("drw", start=160)
        >>> schedule.start_step(total_steps=200 * 97, steps_per_epoch=97)
        15520
        >>> schedule.stage(Progress(15520, 200 * 97, 97))
        'reweighted'
    """

    kind: str = "drw"
    start: float | int = 0.8
    unit: str = "auto"
    beta: float = 0.9999

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        check_choice("unit", self.unit, UNITS)
        check_real("beta", self.beta, low=0, high=1, high_open=True)
        if self._counts_in() == "fraction":
            check_real("start", self.start, low=0, high=1)
        else:
            check_int("start", self.start, low=0)  # type: ignore[arg-type]

    def start_step(self, total_steps: int, steps_per_epoch: int) -> int:
        """First update (0-based) of the second stage; 0 for kinds that have only one.

        Raises:
            ValueError: ``start`` lies past the end of the training.
        """
        if self.kind not in ("drw", "drs"):
            return 0
        unit = self._counts_in()
        if unit == "fraction":
            # Rounded first: 0.7 * 10 is a little above 7 in floating point.
            return math.ceil(round(self.start * total_steps, 6))
        step = int(self.start) * (steps_per_epoch if unit == "epoch" else 1)
        if step >= total_steps:
            length = total_steps / steps_per_epoch if unit == "epoch" else total_steps
            expected = f"before the end of the training at {unit} {length:g}"
            hint = "Use a smaller start, or kind 'none' for no second stage."
            raise invalid("start", expected, self.start, hint=hint)
        return step

    def reweights(self, progress: Progress) -> bool:
        """Whether the update at ``progress`` weighs classes."""
        return self.kind == "rw" or (self.kind == "drw" and self._started(progress))

    def resamples(self, progress: Progress) -> bool:
        """Whether an epoch that begins at ``progress`` samples classes other than uniformly."""
        deferred = self.kind == "drs" and self._started(progress)
        return self.kind in ("rs", "progressive") or deferred

    def stage(self, progress: Progress) -> str:
        """Name of the stage for logs: ``"uniform"``, ``"reweighted"`` or ``"resampled"``."""
        if self.reweights(progress):
            return "reweighted"
        return "resampled" if self.resamples(progress) else "uniform"

    def class_weights(self, class_counts: ClassCounts, progress: Progress) -> Tensor:
        """Weight of each class at ``progress``, (C,), sum C: ones outside the second stage."""
        return class_counts.weights(self.beta if self.reweights(progress) else 0.0)

    def class_probabilities(self, class_counts: ClassCounts, progress: Progress) -> Tensor:
        """Probability that a sample drawn at ``progress`` is of each class, (C,) float64."""
        prior = class_counts.prior(dtype=torch.float64)
        if not self.resamples(progress):
            return prior
        if self.kind == "progressive":
            share = progress.share
            return (1 - share) * prior + share / len(class_counts)
        mass = prior * class_counts.weights(self.beta, dtype=torch.float64)
        return mass / mass.sum()

    def _counts_in(self) -> str:
        if self.unit != "auto":
            return self.unit
        return "fraction" if isinstance(self.start, float) else "epoch"

    def _started(self, progress: Progress) -> bool:
        return progress.step >= self.start_step(progress.total_steps, progress.steps_per_epoch)
