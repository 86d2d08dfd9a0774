"""LDAM-DRW for ``transformers.Trainer``, as one callback."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ldam_plugins._call_stack import find_trainer, trainer_calls
from ldam_plugins._validation import check_choice, check_int, check_real, invalid
from ldam_plugins.counts import ClassCounts
from ldam_plugins.data.labels import GIVE_COUNTS, IGNORED
from ldam_plugins.data.training_labels import TrainingLabels
from ldam_plugins.heads.choice import (
    HEADS,
    check_linear_head,
    head_scale,
    head_word,
    options_for_head,
    wants_cosine_head,
    warn_of_linear_head,
)
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
    prefers_rows,
    restore_sampler,
    users_sampler,
)
from ldam_plugins.losses.base import ClassificationLoss
from ldam_plugins.losses.registry import create_loss, loss_options
from ldam_plugins.losses.reweighting import warn_of_combination
from ldam_plugins.losses.trainer_checks import check_ignored
from ldam_plugins.schedules import DeferredSchedule, Moment

logger = logging.get_logger(__name__)


class DRWCallback(TrainerCallback):
    """Train with LDAM and deferred re-weighting, or another loss and schedule of the package.

    ``Trainer(model=..., args=..., train_dataset=..., callbacks=[DRWCallback()])`` counts the
    training labels, puts a cosine head on the model, sets the Trainer's loss and re-weights the
    classes in the last fifth of the training. ``Trainer(..., compute_loss_func=
    criterion.compute_loss_func, callbacks=[DRWCallback(criterion)])`` does the same with the loss
    in sight. A Trainer that exists already takes ``DRWCallback().attach(trainer)``.

    * The loss of an optimizer step is ``sum_i w_i l_i / (N * mean weight of a training sample)``,
      over the N samples of all its micro-batches and processes. So the step does not depend on how
      the batch was divided, and its size does not jump when re-weighting begins.
    * Evaluation uses plain cross-entropy, during the training and after it: the loss is kept by
      the Trainer (``trainer.compute_loss_func``). The model gets nothing but the cosine head.
    * Checkpoints, ``trainer.save_model()`` and ``model.save_pretrained()`` write the head as a
      plain layer, next to its exact weights, from which a run resumes bit for bit. The plain layer
      has the same largest logit on every input; its probabilities are its own (for models with
      several heads see :func:`~ldam_plugins.fold_cosine_head`, which also makes the model in
      memory plain).
    * There is no state: the stage follows from ``state.global_step``, also in a run that resumes
      a checkpoint written without the callback. The name of the stage is logged as ``drw_stage``
      at every change. One callback may serve several Trainers, and be copied and pickled.
    * The Trainer decides which rows are trained on. Re-sampling (``"rs"``, ``"drs"``,
      ``"progressive"``) replaces the Trainer's own shuffle, never a sampler of the user's.

    Args:
        criterion: The loss to use. Default: ``loss`` made for the training labels.
        loss: One of :func:`~ldam_plugins.list_losses`. Default: ``"ldam"``.
        class_counts: Number of training samples of each class. Default: counted in the labels of
            ``train_dataset``. A ``datasets.Dataset`` without transform and the data sets of
            torchvision and timm know their labels; of others every example is loaded once, and
            none is if counts are given. They must be given where labels cannot be read, as from an
            iterable dataset. Counts that differ from labels which are known without loading are
            used, with a warning.
        schedule: Kind of :class:`~ldam_plugins.DeferredSchedule`, or an object of it (with
            ``unit="step"``, say).
        start: When the second stage begins: a float is a share of the training (default 0.8), an
            int a 0-based epoch.
        beta: That of the class weights and sampling probabilities. Default: 0.9999.
        scale: Scale s of the cosine head and of the margins. Default: the criterion's, else 30,
            and 1 for margins on a linear head.
        head: ``"cosine"`` puts a cosine head on the model. It keeps the directions of the head it
            replaces. One that :func:`~ldam_plugins.use_cosine_head` put on before stays.
            ``"linear"`` trains the model's own head; margins are then taken off its logits as they
            are, with a warning. ``"auto"`` is ``"cosine"`` for losses with a margin; for others
            the model keeps the head it has.
        cosine_head: The same as a bool: True for ``head="cosine"``, False for ``"linear"``.
        seed: Seed of re-sampling. Default: the Trainer's ``data_seed``, else its ``seed``.
        mixup: Alpha of Mixup of the features that the head gets, see :class:`.FeatureMixup`;
            0: no Mixup.
        mix_until: When the mixing ends, written as ``start`` is. Default: with the training.
        **options: Options of the loss, such as ``max_margin`` (LDAM) or ``gamma`` (focal).

    Raises:
        TypeError: ``criterion`` is not a loss of this package, or an option is not one of the loss.
        ValueError: a bad value, or two arguments that say the same thing. Also from the Trainer's
            constructor, :meth:`attach` and ``train()``: any set-up in which something else than
            asked for would be trained.
    """

    _untrained: weakref.WeakSet[nn.Module]
    """Models that got a cosine head from this callback and were not trained since."""
    _attached: weakref.ref[Trainer] | None
    """The Trainer of :meth:`attach`."""

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
        head: str = "auto",
        cosine_head: bool | None = None,
        seed: int | None = None,
        mixup: float = 0.0,
        mix_until: float | int = 1.0,
        **options: Any,
    ) -> None:
        if class_counts is not None and not isinstance(class_counts, ClassCounts):
            class_counts = ClassCounts(class_counts)
        self.schedule = _schedule(schedule, start, beta)
        self.seed = None if seed is None else check_int("seed", seed, low=0)
        self.mixup = check_real("mixup", mixup, low=0)
        self._mix_until = Moment(mix_until, name="mix_until")
        if not mixup and mix_until != 1.0:
            raise invalid("mix_until", "left out without mixup", mix_until)
        self.class_counts = class_counts
        self.criterion = criterion
        self._given = criterion
        self._loss, self._options = loss or "ldam", options
        self.head = _head(head, cosine_head)
        if criterion is not None:
            _check_criterion(criterion, class_counts, {"loss": loss, **options})
        else:
            if "scale" in loss_options(self._loss) and scale is not None:
                self._options = {"scale": scale, **options}
            self._options = options_for_head(self._loss, self._options, self.head)
            criterion = create_loss(self._loss, [1, 1], **self._options)  # refuses bad options now
        self._ignored = criterion.ignore_index
        self._cosine_head = wants_cosine_head(criterion, self.head)
        if scale is not None and not (self._cosine_head or criterion.needs_cosine_head):
            hint = "This loss has no margin: cosine_head=True puts a cosine head on all the same."
            raise invalid("scale", "left out", scale, hint=hint)
        self._scale = head_scale(criterion, scale)
        self._forget_models()

    def attach(self, trainer: Trainer) -> None:
        """Add this callback to a Trainer that was made without it.

        Does what ``Trainer(callbacks=[...])`` does, cosine head included. Call it before
        ``train()``. The callback then belongs to this Trainer alone, and need not look for it on
        the call stack at each event.

        Args:
            trainer: The Trainer, without a DRWCallback.

        Raises:
            ValueError: the Trainer has a DRWCallback already, is training, or has an optimizer that
                does not hold the cosine head; this callback is attached to another Trainer; or
                any set-up that the Trainer's constructor refuses, too. Nothing is added then.
        """
        write = f"`{type(self).__name__}(...).attach(trainer)`"
        if any(isinstance(one, DRWCallback) for one in trainer.callback_handler.callbacks):
            hint = "Attach one callback, once."
            raise invalid("trainer", "one without a DRWCallback", "one that has it", hint=hint)
        if self._attached_trainer() is not None:
            expected = "the only one that the callback is attached to"
            raise invalid("trainer", expected, "a second one", hint=f"Make one for each: {write}.")
        if any(call.trainer is trainer for call in trainer_calls("train")):
            hint = f"Call {write} before `trainer.train()`."
            raise invalid("trainer", "one that is not training", "one that is", hint=hint)
        if trainer.optimizer is not None and self._cosine_head:
            check_head(trainer.model, trainer.optimizer, self._scale)
        self._join(trainer)
        trainer.add_callback(self)
        self._attached = weakref.ref(trainer)

    def __getstate__(self) -> dict[str, Any]:
        """All but what is known of models and Trainers: a copy is attached to none."""
        known = ("_untrained", "_attached")
        return {name: value for name, value in self.__dict__.items() if name not in known}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take the options over."""
        self.__dict__ = dict(state)
        self._forget_models()

    def _forget_models(self) -> None:
        """Know of no model whose head was not trained, and be attached to no Trainer."""
        self._untrained = weakref.WeakSet()
        self._attached = None

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Check the set-up and put on the cosine head, before there is an optimizer."""
        self._join(self._trainer(state))

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
        trainer = self._trainer(state)
        self._check(trainer)
        check_forward(trainer)
        if self._cosine_head:
            check_head(trainer.model, optimizer, self._scale)
        fold_when_saved(trainer.model)
        labels = self._labels(args, train_dataloader)
        self.criterion = self._criterion_for(trainer, labels)
        if state.is_world_process_zero:
            warn_of_combination(self.criterion, self.schedule)
            warn_of_linear_head(self.criterion, self._cosine_head)
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
            mix_until=self._mix_until,
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
        restore_sampler(train_dataloader)

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
        self._run(state).begin_epoch(state, train_dataloader)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Fill in the class weights where a stage begins."""
        self._run(state).begin_step(state)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Stop before an update whose gradients are not the criterion's."""
        self._run(state).check_update()

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Say so when a head is evaluated that was put on and never trained."""
        model = self._trainer(state).model
        if model in self._untrained:
            logger.warning(
                "DRWCallback put a cosine head on the model, with the old head's directions and "
                "without its bias, and it was not trained since. To evaluate a model as it was "
                "saved, leave the callback out."
            )
            self._untrained.discard(model)

    def _trainer(self, state: TrainerState) -> Trainer:
        """The Trainer that fires an event: the one attached to, else it is on the call stack."""
        attached = self._attached_trainer()
        if attached is None:
            return calling_trainer(self)
        if attached.state is not state:
            hint = f"Make one for each Trainer: `{type(self).__name__}(...).attach(trainer)`."
            expected = "without a DRWCallback that is attached to another Trainer"
            raise invalid("callbacks", expected, "one that is", hint=hint)
        return attached

    def _attached_trainer(self) -> Trainer | None:
        """The Trainer attached to, while it exists and has this callback."""
        trainer = self._attached() if self._attached else None
        if trainer is None or self not in trainer.callback_handler.callbacks:
            return None
        return trainer

    def _join(self, trainer: Trainer) -> None:
        """Check a Trainer that does not train yet, and put the cosine head on its model."""
        self._check(trainer)
        if self._cosine_head:
            check_model_init(trainer, self._scale)
            if attach_cosine_head(trainer.model, self._scale):
                self._untrained.add(trainer.model)
        fold_when_saved(trainer.model)

    def _check(self, trainer: Trainer) -> None:
        """Refuse set-ups in which something else than asked for would be trained."""
        check_setup(trainer, DRWCallback, resampling=self.schedule.is_resampling)
        check_sharding(trainer, cosine_head=self._cosine_head)
        check_ignored(self._ignored)
        if self.head == "linear":
            check_linear_head(trainer.model)
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
        return TrainingLabels(
            train_dataloader,
            args.train_batch_size,
            num_processes=args.world_size,
            process_index=args.process_index,
            progress=not args.disable_tqdm,
            ignored=ignored,
            hint=hint,
        )

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
        if sampler is None or not prefers_rows(sampler):
            return
        counted = self._given is None and self.class_counts is None
        said = ["the classes were counted in the whole train_dataset"] if counted else []
        if self.schedule.is_reweighting:
            said += ["the class weights correct once more what a balancing sampler corrects"]
        if said:
            logger.warning(
                f"{type(sampler).__name__} chooses the rows that are trained on: "
                f"{', and '.join(said)}. Give class_counts=[...] of the rows it draws, or leave "
                "balancing to one of the two."
            )

    def _run(self, state: TrainerState) -> TrainingRun:
        """The run of the Trainer that fires an event; the callback may serve others as well."""
        trainer = find_trainer() if self._attached_trainer() is None else self._trainer(state)
        run = getattr(getattr(trainer, "compute_loss_func", None), "__self__", None)
        if not isinstance(run, TrainingRun) or not run.serves(self):
            raise RuntimeError(
                "DRWCallback was added to a training that runs, or its loss was taken from the "
                "Trainer: add it before, and leave trainer.compute_loss_func alone."
            )
        return run


def _head(head: str, cosine_head: bool | None) -> str:
    """The word for the head, which may be given as ``cosine_head`` as well."""
    check_choice("head", head, HEADS)
    if cosine_head is None:
        return head
    if head != "auto":
        hint = "Both say which head is trained: give one of them."
        raise invalid("head", "left out beside cosine_head", head, hint=hint)
    return head_word(cosine_head)


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
