"""One ``Trainer.train()`` under a loss and a schedule of this package."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.utils import logging

from ldam_plugins._validation import invalid
from ldam_plugins.data.streams import StreamedRows
from ldam_plugins.data.training_labels import TrainingLabels
from ldam_plugins.integrations.transformers.mixup import FeatureMixup
from ldam_plugins.integrations.transformers.update_watch import UpdateWatch
from ldam_plugins.losses.base import ClassificationLoss
from ldam_plugins.losses.model_outputs import find_logits, one_label_a_row
from ldam_plugins.losses.reweighting import apply_stage
from ldam_plugins.samplers import DeferredSampler
from ldam_plugins.schedules import DeferredSchedule, Moment, Progress
from ldam_plugins.training.distributed import num_unpadded_rows

_NEVER = Moment(1.0)

logger = logging.get_logger(__name__)


class TrainingRun:
    """Loss, class weights and sampling of one training.

    Where several processes share an epoch that they cannot divide evenly, Accelerate fills up the
    last batches with examples of the same epoch. Those repeats are left out of the loss, so every
    example counts once, whatever the number of processes. (If repeats have no label, -100, the
    divisor of that one optimizer step is too small by their number.)

    Args:
        trainer: The Trainer; only a weak reference is kept.
        callback: The callback the run belongs to. While it is not among the Trainer's callbacks
            the loss refuses to be trained on.
        criterion: The loss, on the device of the training.
        schedule: When to re-weight or re-sample.
        total_steps: Optimizer steps of the whole training.
        train_dataloader: The data loader that the Trainer has prepared.
        labels: Labels of the training set, read only if examples are re-sampled.
        seed: Seed of re-sampling.
        mixup: Mixup of the features inside the model; None: no Mixup.
        mix_until: When the mixing ends.

    Raises:
        ValueError: ``start`` or ``mix_until`` is past the end, or an epoch while the length of one
            is not known; or examples are to be re-sampled and cannot be, or have a sampler of the
            user's own.
    """

    def __init__(
        self,
        trainer: Trainer,
        callback: TrainerCallback,
        criterion: ClassificationLoss,
        schedule: DeferredSchedule,
        *,
        total_steps: int,
        train_dataloader: Any,
        labels: TrainingLabels,
        seed: int,
        mixup: FeatureMixup | None = None,
        mix_until: Moment = _NEVER,
    ) -> None:
        self.criterion = criterion
        self.schedule = schedule
        self.stage: str | None = None
        self._trainer = weakref.ref(trainer)
        self._callback = callback
        self.mixup = mixup
        self._watch = UpdateWatch()
        self._total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch(trainer.args, train_dataloader, total_steps)
        self._check_start(total_steps, train_dataloader)
        hint = "Use a smaller one, or leave it out to mix to the end."
        self._mix_until = mix_until.step(total_steps, self._steps_per_epoch, hint=hint)
        restore_sampler(train_dataloader)
        self._last_round = _last_round(train_dataloader)
        self._sampler: DeferredSampler | None = None
        if schedule.is_resampling:
            self._sampler = self._make_sampler(train_dataloader, labels, total_steps, seed)

    def compute_loss(
        self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Loss in the form of ``Trainer.compute_loss_func``; :class:`UpdateWatch` follows it.

        Args:
            outputs: Output of the model.
            labels: Class indices (N,) or (N, 1), or soft targets (N, C).
            num_items_in_batch: Labels of the whole optimizer step, as the Trainer counts them.

        Raises:
            RuntimeError: the callback was removed from the Trainer, which still has its loss.
            ValueError: as :meth:`.ClassificationLoss.compute_loss_func`.
        """
        if torch.is_grad_enabled() and not self._is_wanted():
            raise RuntimeError(
                "the DRWCallback whose loss this Trainer uses was removed from its callbacks. "
                "Add one, or write `trainer.compute_loss_func = None`."
            )
        if torch.is_grad_enabled() and labels is not None:
            labels = one_label_a_row(labels)
            self._watch.note_call(labels, num_items_in_batch)
            if self.mixup is not None:
                classes = len(self.criterion.class_counts)
                if labels.ndim == 1 and num_items_in_batch is not None:
                    # The Trainer counts the entries of soft targets.
                    num_items_in_batch = num_items_in_batch * classes
                labels = self.mixup.mixed_targets(labels, classes)
            outputs, labels, num_items_in_batch = self._without_repeats(
                outputs, labels, num_items_in_batch
            )
        loss = self.criterion.compute_loss_func(outputs, labels, num_items_in_batch)
        if loss.requires_grad:
            self._watch.watch(loss)
        return loss

    def begin_epoch(self, state: TrainerState, train_dataloader: Any) -> None:
        """Give the data loader the order of a re-sampled epoch, before it is iterated.

        Raises:
            RuntimeError: the data set has another number of rows than when the training began.
        """
        if self._sampler is None:
            return
        rows, known = len(train_dataloader.dataset), len(self._sampler)
        if rows != known:
            raise RuntimeError(
                f"train_dataset has {rows} rows now and had {known} when the training began: rows "
                "that come or go cannot be re-sampled. Use schedule='drw'."
            )
        self._sampler.set_epoch(state.global_step // self._steps_per_epoch)
        restore_sampler(train_dataloader)
        if self.schedule.resamples(self._sampler.progress):
            order = _FixedOrder(self._sampler.order(), train_dataloader.get_sampler())
            train_dataloader.set_sampler(order)

    def begin_step(self, state: TrainerState) -> None:
        """Fill in the class weights of the coming optimizer step; log the stage if it is new."""
        progress = Progress(state.global_step, self._total_steps, self._steps_per_epoch)
        if progress.step >= self._mix_until:
            self.mixup = None
        if self._sampler is not None:
            progress = self._sampler.progress  # sampling changes between epochs only
        stage = apply_stage(self.criterion, self.schedule, progress)
        if stage != self.stage:
            self.stage = stage
            # A resumed run has the log of the run it goes on with.
            logged = [entry["drw_stage"] for entry in state.log_history if "drw_stage" in entry]
            if logged[-1:] != [stage]:
                self._running_trainer().log({"drw_stage": stage})

    def check_update(self) -> None:
        """Stop before an optimizer step that is not the criterion's, see :class:`UpdateWatch`."""
        self._watch.check(self._running_trainer(), type(self.criterion).__name__)

    def serves(self, callback: TrainerCallback) -> bool:
        """Whether this is a run of ``callback``."""
        return self._callback is callback

    def _without_repeats(
        self, outputs: Any, labels: Tensor, items: Tensor | int | None
    ) -> tuple[Any, Tensor, Tensor | int | None]:
        """Leave out the repeats that fill up the last batches of an epoch, and their count."""
        progress = self._running_trainer().accelerator.gradient_state
        if self._last_round is None or not progress.end_of_dataloader:
            return outputs, labels, items
        own = self._last_round.num_unpadded_rows
        if items is not None:  # counted over all micro-batches, of which the last is filled up
            items = items - self._last_round.repeats * labels[0].numel()
        if progress.sync_gradients and labels.ndim == 2:
            logits = find_logits(outputs, len(labels), len(self.criterion.class_counts))
            return {"logits": logits[:own]}, labels[:own], items
        if progress.sync_gradients:
            ignored = torch.full_like(labels[own:], self.criterion.ignore_index)
            labels = torch.cat([labels[:own], ignored])
        return outputs, labels, items

    def _running_trainer(self) -> Trainer:
        trainer = self._trainer()
        if trainer is None:
            raise RuntimeError("the Trainer of this DRWCallback does not exist any more")
        return trainer

    def _is_wanted(self) -> bool:
        return self._callback in self._running_trainer().callback_handler.callbacks

    def _check_start(self, total_steps: int, train_dataloader: Any) -> None:
        schedule = self.schedule
        in_epochs = schedule.starts_at_epoch and schedule.start != 0
        if in_epochs and not _has_length(train_dataloader):
            hint = (
                "An epoch of a dataset without length has no known end: use a share of the "
                'training (start=0.8) or DeferredSchedule("drw", start=1000, unit="step").'
            )
            raise invalid("start", "a float", schedule.start, hint=hint)
        if advice := schedule.advice(total_steps, self._steps_per_epoch):
            logger.warning(advice)

    def _make_sampler(
        self, loader: Any, known: TrainingLabels, total_steps: int, seed: int
    ) -> DeferredSampler:
        dataset = loader.dataset
        if isinstance(dataset, IterableDataset) or not hasattr(loader, "set_sampler"):
            hint = "Use schedule='drw', which needs no sampler."
            expected = "map-style, in the Trainer's own data loader, for re-sampling"
            raise invalid("train_dataset", expected, type(dataset).__name__, hint=hint)
        own = users_sampler(loader)
        if own is not None:
            hint = (
                f"schedule={self.schedule.kind!r} draws from all rows of train_dataset. Give the "
                "Trainer a train_dataset of the rows to train on, or use schedule='drw'."
            )
            raise invalid("sampler", "the Trainer's own shuffle", type(own).__name__, hint=hint)
        labels = known.read()
        if (labels == known.ignored).any():
            hint = "Leave them out: `train_dataset.filter(...)`, `torch.utils.data.Subset(...)`."
            expected = "given for every example where examples are re-sampled"
            raise invalid("labels", expected, known.ignored, hint=hint)
        return DeferredSampler(
            labels,
            self.schedule,
            epochs=total_steps / self._steps_per_epoch,
            steps_per_epoch=self._steps_per_epoch,
            num_classes=len(self.criterion.class_counts),
            seed=seed,
        )


class _FixedOrder(Sampler[int]):
    """The order of one epoch. It has no ``set_epoch``, which hosts would call with another one."""

    def __init__(self, order: np.ndarray, replaced: Any) -> None:
        self.order = order
        self.replaced = replaced

    def __iter__(self) -> Iterator[int]:
        return map(int, self.order)

    def __len__(self) -> int:
        return len(self.order)


def restore_sampler(loader: Any) -> None:
    """Give a data loader its own sampler back after a re-sampled epoch."""
    sampler = loader.get_sampler() if hasattr(loader, "get_sampler") else None
    if isinstance(sampler, _FixedOrder):
        loader.set_sampler(sampler.replaced)


def users_sampler(loader: Any) -> Any:
    """The sampler or batch sampler of a loader; None if it is a shuffle of the whole data set."""
    batches = getattr(loader, "batch_sampler", None)
    batches = getattr(loader, "sampler", None) if batches is None else batches
    if batches is None or isinstance(loader.dataset, IterableDataset):
        return None
    if isinstance(batches, BatchSamplerShard):
        batches = batches.batch_sampler
    if type(batches) is not BatchSampler:
        return batches
    sampler: Any = batches.sampler
    shuffles = type(sampler) in (RandomSampler, SeedableRandomSampler) and not sampler.replacement
    if shuffles and len(sampler) == len(sampler.data_source) == len(loader.dataset):
        return None
    return sampler


def prefers_rows(sampler: Any) -> bool:
    """Whether a sampler may draw some rows more often than others.

    Those of the hosts order or group the rows and treat all alike, but for two of torch, and so
    does that of a stream.
    """
    if isinstance(sampler, StreamedRows):
        return False
    host = type(sampler).__module__.partition(".")[0] in ("torch", "accelerate", "transformers")
    return not host or isinstance(sampler, SubsetRandomSampler | WeightedRandomSampler)


@dataclass(frozen=True)
class _LastRound:
    """The last batches of an epoch, one for each process, filled up with repeated examples.

    Attributes:
        num_unpadded_rows: Rows of this process's batch that are not repeats.
        repeats: Number of repeats in the batches of all processes.
    """

    num_unpadded_rows: int
    repeats: int


def _last_round(loader: Any) -> _LastRound | None:
    """The last batches of a loader; None if nothing is filled up, or it cannot be known."""
    shard = getattr(loader, "batch_sampler", None)
    if not isinstance(shard, BatchSamplerShard) or not isinstance(
        shard.batch_sampler, BatchSampler
    ):
        return None
    if shard.drop_last or not shard.even_batches or shard.batch_size is None:
        return None
    sampler: Any = shard.batch_sampler.sampler
    samples, processes = len(sampler), shard.num_processes
    size = shard.batch_size // (processes if shard.split_batches else 1)
    repeats = len(shard) * processes * size - samples
    own = num_unpadded_rows(samples, len(shard) - 1, size, shard.process_index, processes)
    return _LastRound(own, repeats) if processes > 1 and repeats else None


def _has_length(loader: Any) -> bool:
    try:
        return len(loader) > 0
    except TypeError:
        return False


def steps_per_epoch(args: TrainingArguments, loader: Any, total_steps: int) -> int:
    """Optimizer steps of one epoch as the Trainer counts them.

    Args:
        args: Arguments of the Trainer.
        loader: Its training data loader.
        total_steps: Optimizer steps of the whole training, the answer for a loader without length.
    """
    if not _has_length(loader):
        return total_steps
    return -(-len(loader) // args.gradient_accumulation_steps)
