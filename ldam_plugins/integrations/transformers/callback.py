"""LDAM-DRW for transformers.Trainer: one callback, and a registered loss."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ldam_plugins._validation import check_int, check_real, invalid
from ldam_plugins.counts import ClassCounts
from ldam_plugins.data.labels import GIVE_COUNTS, IGNORED, TrainingLabels
from ldam_plugins.heads.cosine import attach_cosine_head
from ldam_plugins.heads.finder import class_count
from ldam_plugins.heads.folding import fold_when_saved
from ldam_plugins.integrations.transformers.checks import (
    calling_trainer,
    check_forward,
    check_head,
    check_model_init,
    check_setup,
    check_sharding,
)
from ldam_plugins.integrations.transformers.mixup import FeatureMixup, remove_mixup
from ldam_plugins.integrations.transformers.training_run import (
    TrainingRun,
    give_back_sampler,
    users_sampler,
)
from ldam_plugins.losses.base import ClassificationLoss
from ldam_plugins.losses.ldam import DEFAULT_SCALE
from ldam_plugins.losses.registry import create_loss, loss_options
from ldam_plugins.losses.reweighting import warn_of_combination
from ldam_plugins.losses.trainer_checks import check_ignored
from ldam_plugins.schedules import DeferredSchedule

logger = logging.get_logger(__name__)
_DRAW_EVERY_ROW = (
    "SequentialSampler",
    "RandomSampler",
    "SeedableRandomSampler",
    "LengthGroupedSampler",
    "BatchRebalanceSampler",
)


class DRWCallback(TrainerCallback):
    """Train with LDAM and deferred re-weighting, or another loss and schedule of the package.

    ``Trainer(model=..., args=..., train_dataset=..., callbacks=[DRWCallback()])`` counts the
    training labels, puts a cosine head on the model, sets the Trainer's loss and re-weights the
    classes for the last fifth of the updates. ``Trainer(..., compute_loss_func=
    criterion.compute_loss_func, callbacks=[DRWCallback(criterion)])`` does the same in sight.

    * The loss of an update is ``sum_i w_i l_i / (items * mean weight of a training sample)`` over
      all micro-batches and processes, so the update does not depend on how the batch was cut,
      and its size does not jump when re-weighting begins.
    * Evaluation is plain cross-entropy, during the training and after it: the loss stays with the
      Trainer (``trainer.compute_loss_func``). On the model there is nothing but the cosine head.
    * The head is saved as a plain layer that gives the same largest logit, with probabilities of
      its own (several heads: see :func:`~ldam_plugins.fold_cosine_head`), by checkpoints,
      ``trainer.save_model()`` and ``model.save_pretrained()``, next to its exact weights, from
      which a run resumes to the bit. :func:`~ldam_plugins.fold_cosine_head` makes the model in
      memory plain as well.
    * There is no state: the stage follows from ``state.global_step``, also in a run that resumes
      a checkpoint written without the callback. Its name is logged as ``drw_stage`` at every
      change. One callback may serve several Trainers, and be copied and pickled at any time.
    * Which rows are trained on is the Trainer's matter. Re-sampling (``"rs"``, ``"drs"``,
      ``"progressive"``) takes the place of its own shuffle, never of a sampler of the user's.

    Args:
        criterion: The loss to use. Default: ``loss`` made for the training labels.
        loss: One of :func:`~ldam_plugins.list_losses`. Default: ``"ldam"``.
        class_counts: Training samples of each class. Default: the labels of ``train_dataset``, of
            which every example is loaded once if it is neither a ``datasets.Dataset`` without
            transform nor one of torchvision's or timm's own; with counts given none is. They must
            be given where labels cannot be read, as from an iterable dataset. Counts that differ
            from labels which are known without loading are used, with a warning.
        schedule: Kind of :class:`~ldam_plugins.DeferredSchedule`, or one made already (with
            ``unit="step"``, say).
        start: When the second stage begins: a float is a share of the training (default 0.8), an
            int a 0-based epoch.
        beta: Of the class weights and sampling probabilities. Default: 0.9999.
        scale: Scale s of the cosine head. Default: the criterion's, else 30.
        cosine_head: Whether to put one on the model. Default: for losses with a margin. It keeps
            the directions of the head it replaces. One that
            :func:`~ldam_plugins.use_cosine_head` put on before stays.
        seed: Of re-sampling. Default: the Trainer's ``data_seed``, else its ``seed``.
        mixup: Alpha of Mixup of the features that the head gets, as
            :class:`.FeatureMixup` describes it; 0: none.
        **options: Options of the loss, such as ``max_margin`` (LDAM) or ``gamma`` (focal).

    Raises:
        TypeError: ``criterion`` is no loss of this package, or an option the loss does not have.
        ValueError: a bad value, or two arguments that say the same thing; from the Trainer's
            constructor or ``train()``: any set-up in which something else would be trained.
    """

    def __init__(
        self,
        criterion: ClassificationLoss | None = None,
        *,
        loss: str | None = None,
        class_counts: ClassCounts | Sequence[int] | np.ndarray | Tensor | None = None,
        schedule: str | DeferredSchedule = "drw",
        start: float | int | None = None,
        beta: float | None = None,
        scale: float | None = None,
        cosine_head: bool | None = None,
        seed: int | None = None,
        mixup: float = 0.0,
        **options: Any,
    ) -> None:
        if class_counts is not None and not isinstance(class_counts, ClassCounts):
            class_counts = ClassCounts(class_counts)
        self.schedule = _schedule(schedule, start, beta)
        self.seed = None if seed is None else check_int("seed", seed, low=0)
        self.mixup = check_real("mixup", mixup, low=0)
        self.class_counts = class_counts
        self.criterion = criterion
        self._given = criterion
        self._loss, self._options = loss or "ldam", options
        if criterion is not None:
            _check_criterion(criterion, class_counts, {"loss": loss, **options})
        else:
            if "scale" in loss_options(self._loss):
                self._options = {"scale": DEFAULT_SCALE if scale is None else scale, **options}
            criterion = create_loss(self._loss, [1, 1], **self._options)  # refuses bad options now
        self._ignored = criterion.ignore_index
        self._cosine_head = criterion.needs_cosine_head if cosine_head is None else cosine_head
        self._scale = _head_scale(scale, criterion, self._cosine_head)
        self._untrained: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        """All but what is known of models."""
        return {name: value for name, value in self.__dict__.items() if name != "_untrained"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Know of no model."""
        self.__dict__ = {**state, "_untrained": weakref.WeakSet()}

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Check the set-up and put on the cosine head, before there is an optimizer."""
        trainer = calling_trainer(self)
        self._check(trainer)
        if self._cosine_head:
            check_model_init(trainer, self._scale)
            if attach_cosine_head(trainer.model, self._scale):
                self._untrained.add(trainer.model)
        fold_when_saved(trainer.model)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Make the loss, give it to the Trainer and work out the schedule."""
        trainer = calling_trainer(self)
        self._check(trainer)
        check_forward(trainer)
        if self._cosine_head:
            check_head(trainer.model, optimizer, self._scale)
        fold_when_saved(trainer.model)
        labels = self._labels(args, train_dataloader)
        self.criterion = self._criterion_for(trainer, labels)
        if state.is_world_process_zero:
            warn_of_combination(self.criterion, self.schedule)
            self._warn_of_sampler(train_dataloader)
        data_seed = args.seed if args.data_seed is None else args.data_seed
        run = TrainingRun(
            trainer,
            self,
            self.criterion.to(args.device),
            self.schedule,
            total_steps=state.max_steps,
            train_dataloader=train_dataloader,
            labels=labels,
            seed=data_seed if self.seed is None else self.seed,
            mixup=FeatureMixup(trainer, self.mixup) if self.mixup else None,
        )
        if state.is_world_process_zero:
            difference = labels.difference(self.criterion.class_counts)
            if difference is not None:
                warnings.warn(difference, stacklevel=2)
        trainer.compute_loss_func = run.compute_loss
        self._untrained.discard(trainer.model)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: Any = None,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Leave nothing on the model but the head, and the data loader as it was."""
        remove_mixup(model)
        give_back_sampler(train_dataloader)

    def on_epoch_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Give a re-sampled epoch its order."""
        self._running().begin_epoch(state, train_dataloader)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Fill in the class weights where a stage begins."""
        self._running().begin_step(state)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Stop before an update whose gradients are not the criterion's."""
        self._running().check_update()

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Say so when a head is evaluated that was put on and never trained."""
        model = calling_trainer(self).model
        if model in self._untrained:
            logger.warning(
                "DRWCallback put a cosine head on the model, with the old head's directions and "
                "without its bias, and it was not trained since. To evaluate a model as it was "
                "saved, leave the callback out."
            )
            self._untrained.discard(model)

    def _check(self, trainer: Trainer) -> None:
        check_setup(trainer, DRWCallback, resampling=self.schedule.is_resampling)
        check_sharding(trainer, cosine_head=self._cosine_head)
        check_ignored(self._ignored)
        loss = trainer.compute_loss_func
        ours = isinstance(getattr(loss, "__self__", None), TrainingRun)
        explicit = self._given is not None and loss == self._given.compute_loss_func
        if not (loss is None or ours or explicit):
            hint = "Write `compute_loss_func=criterion.compute_loss_func, "
            hint += "callbacks=[DRWCallback(criterion)]`, or leave the function out."
            expected = "that of the callback's criterion, or None"
            raise invalid("compute_loss_func", expected, loss, hint=hint)

    def _labels(self, args: TrainingArguments, train_dataloader: Any) -> TrainingLabels:
        """The labels of the training set, not read yet."""
        hint = GIVE_COUNTS
        if self.schedule.is_resampling:
            hint = "Use schedule='drw' and class_counts=[...]: re-sampling needs every label."
        ignored = self._options.get("ignore_index", IGNORED)
        if self._given is not None:
            ignored = self._given.ignore_index
        return TrainingLabels(train_dataloader, args, ignored=ignored, hint=hint)

    def _criterion_for(self, trainer: Trainer, labels: TrainingLabels) -> ClassificationLoss:
        """The loss given, or one made for the counts given, or for the training labels."""
        classes = class_count(trainer.model)
        counts = self.class_counts if self._given is None else self._given.class_counts
        if counts is None:
            counts = labels.count(classes)
        if classes is not None and len(counts) != classes:
            hint = f"Create the model with num_labels={len(counts)}, or give its counts."
            raise invalid("class_counts", f"{classes} counts", len(counts), hint=hint)
        if self._given is not None:
            return self._given
        return create_loss(self._loss, counts, **self._options)

    def _warn_of_sampler(self, train_dataloader: Any) -> None:
        """Say what a sampler of the user's own means for counts and weights."""
        sampler = users_sampler(train_dataloader)
        if sampler is None or sampler in _DRAW_EVERY_ROW:
            return
        counted = self._given is None and self.class_counts is None
        said = ["the classes were counted in the whole train_dataset"] if counted else []
        if self.schedule.is_reweighting:
            said += ["the class weights correct once more what a balancing sampler corrects"]
        if said:
            logger.warning(
                f"{sampler} chooses the rows that are trained on: {', and '.join(said)}. Give "
                "class_counts=[...] of the rows it draws, or leave balancing to one of the two."
            )

    def _running(self) -> TrainingRun:
        """The run of the Trainer that fires an event; the callback may serve others as well."""
        try:
            run = getattr(calling_trainer(self).compute_loss_func, "__self__", None)
        except RuntimeError:
            run = None
        if not isinstance(run, TrainingRun) or not run.serves(self):
            raise RuntimeError(
                "DRWCallback was added to a training that runs, or its loss was taken from the "
                "Trainer: add it before, and leave trainer.compute_loss_func alone."
            )
        return run


def _schedule(
    schedule: str | DeferredSchedule, start: float | int | None, beta: float | None
) -> DeferredSchedule:
    given: dict[str, Any] = {
        name: v for name, v in (("start", start), ("beta", beta)) if v is not None
    }
    if not isinstance(schedule, DeferredSchedule):
        return DeferredSchedule(schedule, **given)
    if given:
        hint = "The DeferredSchedule has its own."
        raise invalid(", ".join(given), "left out", list(given.values()), hint=hint)
    return schedule


def _check_criterion(
    criterion: ClassificationLoss, class_counts: ClassCounts | None, given: dict[str, Any]
) -> None:
    if not isinstance(criterion, ClassificationLoss):
        hint = "Make one with create_loss(name, class_counts), or name it: loss='ldam'."
        raise invalid("criterion", "a loss of ldam_plugins", criterion, hint=hint, error=TypeError)
    if criterion.reduction != "mean":
        raise invalid("criterion.reduction", "'mean'", criterion.reduction)
    if class_counts is not None and class_counts != criterion.class_counts:
        expected = f"those of the criterion, {criterion.class_counts}"
        raise invalid("class_counts", expected, class_counts)
    again = {name: value for name, value in given.items() if value is not None}
    if again:
        hint = "The criterion has its own."
        raise invalid(", ".join(again), "left out", list(again.values()), hint=hint)


def _head_scale(scale: float | None, criterion: ClassificationLoss, expected: bool) -> float:
    """Scale of the cosine head: the loss's own, the one given, or the paper's."""
    own = getattr(criterion, "scale", None)
    if scale is None:
        return DEFAULT_SCALE if own is None else own
    if own not in (None, scale):
        raise invalid("scale", f"{own:g} or left out, as the criterion's", scale)
    if own is None and not expected:
        hint = "This loss has no margin: cosine_head=True puts a cosine head on all the same."
        raise invalid("scale", "left out", scale, hint=hint)
    return check_real("scale", scale, low=0, low_open=True)
