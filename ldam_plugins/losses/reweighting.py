"""A loss under a schedule: the weights of its stages, and the pairs that do not go together."""

from __future__ import annotations

import warnings

from ldam_plugins.losses.base import ClassificationLoss
from ldam_plugins.schedules import DeferredSchedule, Progress

_TWICE = (
    "the loss divides by the class prior at its optimum (tau={tau:g}) and the schedule does so "
    "again, which favours the rare classes beyond a balanced classifier. Use schedule 'none' with "
    "this loss, or this schedule with 'ce' or 'ldam'"
)


def apply_stage(
    loss: ClassificationLoss,
    schedule: DeferredSchedule,
    progress: Progress,
    last: str | None = None,
) -> str:
    """The stage of the coming update; fills in its class weights where the loss has others.

    A loss knows what it was filled with, so this may be called before every update: the weights are
    computed, and copied to its device, where a stage begins, and where someone has changed them.

    Args:
        loss: What is trained; its ``weight`` (C,) is written.
        schedule: What it is trained under.
        progress: The coming update.
        last: Stage that the loss was filled for. While it lasts, weights that were changed since
            are kept. None: the loss gets the stage's weights.
    """
    stage = schedule.stage(progress)
    if stage != last:
        # A schedule of one's own may move the weights within a stage.
        source = (schedule, stage if type(schedule) is DeferredSchedule else progress)
        loss.fill_weight(source, lambda: schedule.class_weights(loss.class_counts, progress))
    return stage


def combination_advice(loss: ClassificationLoss, schedule: DeferredSchedule) -> str | None:
    """Why a loss and a schedule do not go together; None where nothing is known against it.

    Nothing is corrected twice where the loss has ``tau=0``, or the schedule ``beta=0``.

    Example:
        >>> from ldam_plugins import create_loss
        >>> combination_advice(create_loss("ldam", [90, 9]), DeferredSchedule("drw"))
        >>> advice = combination_advice(create_loss("logit_adjusted", [90, 9]), DeferredSchedule())
        >>> advice.partition(':')[0]
        "loss LogitAdjustedLoss under schedule 'drw'"
    """
    # With class weights w and prior pi the optimum of a loss that corrects the prior is
    # f_y = log p(y | x) + log w_y - tau log pi_y (times the factors of vector scaling). tau = 1
    # alone is the balanced classifier; w ~ 1 / pi on top of it is as far from that one as plain
    # cross-entropy is, on the other side. Measured (recipes/results/README.md): more error, or no
    # gain beyond noise. Sampling throughout was not found to hurt.
    tau = getattr(loss, "tau", 1.0)
    late_sampling = schedule.is_resampling and schedule.is_deferred
    schedule_corrects = schedule.beta > 0 and (schedule.is_reweighting or late_sampling)
    if not (loss.corrects_prior and tau > 0 and schedule_corrects):
        return None
    why = _TWICE.format(tau=tau)
    return f"loss {type(loss).__name__} under schedule {schedule.kind!r}: {why}."


def warn_of_combination(
    loss: ClassificationLoss, schedule: DeferredSchedule, stacklevel: int = 2
) -> None:
    """Warn, once a place, where :func:`combination_advice` speaks against a combination.

    Call it on one process of a training. Who means it filters the warning:
    ``warnings.filterwarnings("ignore", "loss .* under schedule")``.

    Args:
        loss: What is trained.
        schedule: What it is trained under.
        stacklevel: Of ``warnings.warn``; 2 is the caller.
    """
    advice = combination_advice(loss, schedule)
    if advice:
        warnings.warn(advice, UserWarning, stacklevel=stacklevel)
