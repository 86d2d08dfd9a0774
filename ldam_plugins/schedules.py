"""When classes are re-weighted or re-sampled: pure functions of the progress of a training."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ldam_plugins._validation import check_choice, check_int, check_real, invalid
from ldam_plugins.choices import SCHEDULES as KINDS
from ldam_plugins.choices import START_UNITS as UNITS
from ldam_plugins.counts import ClassCounts


@dataclass(frozen=True)
class Progress:
    """How far a training has come. The training loop counts, this only holds the numbers.

    Args:
        step: Optimizer steps done, so also the 0-based index of the next one.
        total_steps: Optimizer steps of the whole training.
        steps_per_epoch: Optimizer steps of one epoch.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: ``step`` is negative, or another argument is less than 1.
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
        """Share of the training that is done, ``step / total_steps``, at most 1."""
        return min(self.step / self.total_steps, 1.0)


@dataclass(frozen=True)
class Moment:
    """A moment of a training, such as the switch to its second stage.

    Args:
        at: A float in [0, 1] is a share of the whole training, an int a 0-based epoch.
        unit: What ``at`` counts: ``"fraction"``, ``"epoch"`` or ``"step"`` (optimizer steps).
            ``"auto"`` goes by the type of ``at``, as above.
        name: What errors call ``at``.

    Raises:
        TypeError: ``at`` is not a number of the right kind.
        ValueError: unknown ``unit``, or ``at`` out of range.

    Example:
        >>> Moment(0.8).step(total_steps=30, steps_per_epoch=3)
        24
    """

    at: float | int
    unit: str = "auto"
    name: str = "at"

    def __post_init__(self) -> None:
        check_choice("unit", self.unit, UNITS)
        if self.known_unit == "fraction":
            check_real(self.name, self.at, low=0, high=1)
        else:
            check_int(self.name, self.at, low=0)  # type: ignore[arg-type]

    @property
    def known_unit(self) -> str:
        """What ``at`` counts, ``"auto"`` resolved."""
        if self.unit != "auto":
            return self.unit
        return "fraction" if isinstance(self.at, float) else "epoch"

    def step(self, total_steps: int, steps_per_epoch: int, *, hint: str = "") -> int:
        """First optimizer step (0-based) at or after the moment.

        A share of the training is rounded up to a whole step; that of 1.0 is ``total_steps``, which
        never comes.

        Args:
            total_steps: Optimizer steps of the whole training.
            steps_per_epoch: Optimizer steps of one epoch.
            hint: What the error tells the user to write instead.

        Raises:
            ValueError: an epoch or a step past the end of the training.
        """
        if self.known_unit == "fraction":
            # Rounded first: 0.7 * 10 is a little above 7 in floating point.
            return math.ceil(round(self.at * total_steps, 6))
        in_epochs = self.known_unit == "epoch"
        step = int(self.at) * (steps_per_epoch if in_epochs else 1)
        if step >= total_steps:
            length = total_steps / steps_per_epoch if in_epochs else total_steps
            expected = f"before the end of the training at {self.known_unit} {length:g}"
            raise invalid(self.name, expected, self.at, hint=hint)
        return step


@dataclass(frozen=True)
class DeferredSchedule:
    """Which classes get more weight or more samples, and from when on.

    =============== ==========================================================================
    ``none``        all samples alike, throughout
    ``rw``          class-balanced weights from the beginning
    ``drw``         class-balanced weights from ``start`` on (deferred re-weighting)
    ``rs``          class-balanced sampling from the beginning
    ``drs``         class-balanced sampling from ``start`` on (deferred re-sampling)
    ``progressive`` sampling that moves from the data's distribution to a balanced one,
                    ``p_c = (1 - t) n_c / N + t / C`` when the share t of the training is done
    =============== ==========================================================================

    With weights ``w_c = class_counts.weights(beta)``, class-balanced sampling draws class c with
    probability ``n_c w_c / sum_j n_j w_j``.

    A schedule has no state. The stage follows from the :class:`Progress`, so a resumed training is
    in the right stage.

    Source: Cao et al., NeurIPS 2019, arXiv 1906.07413, algorithm 1; progressive: Kang et al.,
    ICLR 2020, arXiv 1910.09217, equation 3.

    Args:
        kind: One of the above.
        start: When the second stage of ``drw`` and ``drs`` begins: a float in [0, 1] is a share
            of the whole training, an int a 0-based epoch; 0 is from the beginning. The other kinds
            have one stage and do not use it.
        unit: What ``start`` counts: ``"fraction"``, ``"epoch"`` or ``"step"`` (optimizer steps).
            ``"auto"`` goes by the type of ``start``, as above.
        beta: That of :meth:`ClassCounts.weights`, for weights and for sampling: 0 changes nothing,
            towards 1 gives inverse frequency. Not used by ``none`` and ``progressive``.

    Raises:
        TypeError: ``start`` or ``beta`` is not a number of the right kind.
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
        check_real("beta", self.beta, low=0, high=1, high_open=True)
        self._moment()  # checks `start` and `unit`

    @property
    def is_deferred(self) -> bool:
        """Whether there is a second stage that begins at ``start``."""
        return self.kind in ("drw", "drs")

    @property
    def is_reweighting(self) -> bool:
        """Whether classes are weighted at any time of the training."""
        return self.kind in ("rw", "drw")

    @property
    def is_resampling(self) -> bool:
        """Whether classes are sampled other than uniformly at any time of the training."""
        return self.kind in ("rs", "drs", "progressive")

    @property
    def uses_beta(self) -> bool:
        """Whether ``beta`` has an effect: not where nothing is balanced, nor in ``progressive``."""
        return self.kind in ("rw", "drw", "rs", "drs")

    @property
    def starts_at_epoch(self) -> bool:
        """Whether a second stage begins at an epoch, so that the length of one must be known."""
        return self.is_deferred and self._moment().known_unit == "epoch"

    @property
    def starts_at_share(self) -> bool:
        """Whether a second stage begins at a share of the training, so that its length counts."""
        return self.is_deferred and self._moment().known_unit == "fraction"

    def start_step(self, total_steps: int, steps_per_epoch: int) -> int:
        """First optimizer step (0-based) of the second stage; 0 for kinds that have one stage.

        A share of the training is rounded up to a whole step, and for ``drs`` to a whole epoch,
        which is sampled at its beginning. A second stage that never begins, as at ``start=1.0``,
        has the answer ``total_steps`` or more.

        Args:
            total_steps: Optimizer steps of the whole training.
            steps_per_epoch: Optimizer steps of one epoch.

        Raises:
            ValueError: ``start`` is an epoch or a step past the end of the training.
        """
        if not self.is_deferred:
            return 0
        hint = "Use a smaller start, or kind 'none' for no second stage."
        step = self._moment().step(total_steps, steps_per_epoch, hint=hint)
        return -(-step // steps_per_epoch) * steps_per_epoch if self.is_resampling else step

    def advice(self, total_steps: int, steps_per_epoch: int) -> str | None:
        """What to do about a second stage that never begins; None where it does, or there is none.

        Example:
            >>> DeferredSchedule("drw", 0.8).advice(total_steps=9, steps_per_epoch=3)
            >>> print(DeferredSchedule("drs", 0.8).advice(total_steps=9, steps_per_epoch=3))
            The second stage of 'drs' never begins: start=0.8 of 9 updates, 3 an epoch. Train \
longer, start earlier, or use schedule 'rs' or 'none'.
        """
        if self.start_step(total_steps, steps_per_epoch) < total_steps:
            return None
        length = f"start={self.start} of {total_steps} updates, {steps_per_epoch} an epoch"
        hint = f"Train longer, start earlier, or use schedule {self.kind.removeprefix('d')!r} or"
        return f"The second stage of {self.kind!r} never begins: {length}. {hint} 'none'."

    def start_epoch(self, epochs: int) -> int:
        """Epoch (0-based) in which the second stage begins; 0 for kinds that have one stage.

        Also the number of epochs that are complete by then. A share of the training is rounded
        down to a whole epoch.

        Args:
            epochs: Epochs of the whole training.

        Raises:
            ValueError: ``start`` is past the end of the training, or counts optimizer steps, of
                which an epoch has an unknown number here.

        Example:
            >>> [DeferredSchedule("drw", start).start_epoch(200) for start in (160, 0.8, 0.801)]
            [160, 160, 160]
        """
        if not self.is_deferred:
            return 0
        unit = self._moment().known_unit
        if unit == "step":
            hint = "Use start_step(), which knows the steps of an epoch."
            raise invalid("unit", "'epoch' or 'fraction'", unit, hint=hint)
        if unit == "fraction":
            return math.floor(round(self.start * epochs, 6))
        return self.start_step(epochs, steps_per_epoch=1)

    def reweights(self, progress: Progress) -> bool:
        """Whether the optimizer step at ``progress`` uses class weights."""
        return self.is_reweighting and self._has_started(progress)

    def resamples(self, progress: Progress) -> bool:
        """Whether an epoch that begins at ``progress`` samples classes other than uniformly."""
        return self.is_resampling and self._has_started(progress)

    def stage(self, progress: Progress) -> str:
        """Name of the stage for logs: ``"uniform"``, ``"reweighted"`` or ``"resampled"``."""
        if self.reweights(progress):
            return "reweighted"
        return "resampled" if self.resamples(progress) else "uniform"

    def class_weights(self, class_counts: ClassCounts, progress: Progress) -> Tensor:
        """Weight of each class at ``progress``, shape (C,), sum C; ones unless it re-weights."""
        return class_counts.weights(self.beta if self.reweights(progress) else 0.0)

    def class_probabilities(self, class_counts: ClassCounts, progress: Progress) -> Tensor:
        """Probability that a sample drawn at ``progress`` is of each class, shape (C,), float64."""
        prior = class_counts.prior(dtype=torch.float64)
        if not self.resamples(progress):
            return prior
        if self.kind == "progressive":
            share = progress.share
            return (1 - share) * prior + share / len(class_counts)
        weighted = prior * class_counts.weights(self.beta, dtype=torch.float64)
        return weighted / weighted.sum()

    def _moment(self) -> Moment:
        """When the second stage begins, where there is one."""
        return Moment(self.start, self.unit, name="start")

    def _has_started(self, progress: Progress) -> bool:
        """Whether the last stage is reached; kinds that have one stage begin with it."""
        return progress.step >= self.start_step(progress.total_steps, progress.steps_per_epoch)
