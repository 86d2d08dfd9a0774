"""A head that is re-balanced and calibrated at the end of a Trainer's training."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from ldam_plugins._validation import check_choice, invalid
from ldam_plugins.choices import AUTOMATIC, NONE
from ldam_plugins.counts import ClassCounts
from ldam_plugins.heads.finder import class_count
from ldam_plugins.integrations.transformers.callback import DRWCallback
from ldam_plugins.integrations.transformers.checks import calling_trainer
from ldam_plugins.posthoc import Features, Finished, LastStep, extract_features
from ldam_plugins.posthoc.last_step import refuse_sharded, scratch_folder

EVAL_DATASET = "eval_dataset"

logger = logging.get_logger(__name__)


class RebalanceCallback(TrainerCallback):
    """Make the head of a Trainer's model fair to rare classes when its training ends.

    ``Trainer(..., callbacks=[RebalanceCallback("logit_adjustment:1")])``: at the end of
    ``train()`` the last layer of the model in memory is changed by :func:`.rebalance_head`, and
    ``trainer.save_model()``, ``trainer.evaluate()`` and ``trainer.predict()`` are of the changed
    one. What is saved is of the host's own form and needs nothing of this package to be loaded.
    ``callback.record`` then says what was done and why, with metrics before and after;
    ``callback.undo()`` puts the old head back.

    * Checkpoints are written before and hold the head as it was trained: a run that resumes one
      goes on as if there were no callback, and re-balances at its own end. So does one that
      resumes the last checkpoint, where nothing is left to train.
    * ``load_best_model_at_end``: the Trainer loads the best checkpoint first; that model is
      changed. Its metric was measured before the change.
    * Several processes (DDP): each extracts its part of the features; the first one decides, and
      all have the same head, bit for bit.
    * FSDP, DeepSpeed and tensor parallelism are refused when the training begins, as no process
      holds the whole head: re-balance the saved model, ``python recipes/rebalance.py MODEL``.
    * PEFT adapters are refused too: merge them, ``model.merge_and_unload()``, then call
      :func:`.rebalance_head`. ``recipes/text_lt.py`` does so.
    * Beside :class:`.DRWCallback` it comes last in ``callbacks``. A cosine head is folded into a
      plain one, in memory as well; "before" is of the folded head. What LDAM or class weights have
      taught is not the training prior: ``"auto"`` sees that on held-out samples, a strength of 1
      corrects once more what is corrected.
    * A second ``train()`` of the same Trainer begins with the changed head: call ``undo()`` first.

    Args:
        rebalance: ``"auto"``, a method, or a method with its strength, see :class:`.LastStep`.
        held_out: Samples that the model is not trained on, by which method and strength are chosen:
            a data set as the Trainer takes it for evaluation, or ``"eval_dataset"`` for the
            Trainer's own, if that is not the test set. None: they are chosen by cross-fitting on
            the training set, which a model that knows it by heart says little of.
        calibrate: ``"none"``, ``"temperature"``, ``"group"`` or ``"class"``; needs ``held_out``.
        class_counts: Training samples of each class. Default: counted while their features are
            extracted.
        test: A test set, on which before and after are then measured; it decides nothing. Without
            one they are measured on ``held_out``, else on the training set, by cross-fitting.
        by: What is chosen by, ``"log_loss"`` or ``"accuracy"``.
        seed: Of the division into folds.

    Raises:
        TypeError: ``held_out`` is text, but not ``"eval_dataset"``.
        ValueError: an unknown method, a strength that it does not take, or ``calibrate`` without
            ``held_out``. From ``train()``, before the first step: a set-up that is refused, as
            above, no ``eval_dataset``, or a head without a bias that would get one; at its end:
            what :func:`.rebalance_head` refuses. The model is then as it was trained.
    """

    record: dict[str, Any] | None
    """What was done: ``rebalance``, ``before`` and ``after``, as in ``metrics.json`` of a run."""

    def __init__(
        self,
        rebalance: str = AUTOMATIC,
        *,
        held_out: Any = None,
        calibrate: str = NONE,
        class_counts: ClassCounts | Sequence[int] | np.ndarray | Tensor | None = None,
        test: Any = None,
        by: str = "log_loss",
        seed: int = 0,
    ) -> None:
        self.step = LastStep(rebalance, calibrate, by, seed)
        if isinstance(held_out, str):
            check_choice("held_out", held_out, [EVAL_DATASET])
        if calibrate != NONE and held_out is None:
            hint = "On the samples that it was trained on a model is too sure."
            raise invalid("calibrate", f"{NONE!r} without `held_out`", calibrate, hint=hint)
        if class_counts is not None and not isinstance(class_counts, ClassCounts):
            class_counts = ClassCounts(class_counts)
        self.class_counts = class_counts
        self.held_out, self.test = held_out, test
        self.record = None
        self._finished: Finished | None = None

    def undo(self) -> None:
        """Put the head back as it was trained; call it on every process.

        Raises:
            RuntimeError: nothing was changed.
        """
        if self._finished is None:
            raise RuntimeError("RebalanceCallback has changed no head, or undone it: train first.")
        self._finished.undo()
        self._finished = self.record = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Refuse what could not be done at the end."""
        trainer = calling_trainer(self)
        refuse_sharded(trainer.accelerator.distributed_type)
        callbacks = trainer.callback_handler.callbacks
        if any(isinstance(one, DRWCallback) for one in callbacks[callbacks.index(self) :]):
            hint = "Write callbacks=[DRWCallback(...), RebalanceCallback(...)]."
            raise invalid("callbacks", "with RebalanceCallback last", "DRWCallback", hint=hint)
        model = _unwrapped(trainer)
        if hasattr(model, "merge_and_unload"):
            hint = "Merge them after the training, and call rebalance_head on the merged model."
            raise invalid("model", "one without adapters", type(model).__name__, hint=hint)
        self.step.check_model(model)
        classes = class_count(model)
        counts = self.class_counts
        if counts is not None and classes is not None and len(counts) != classes:
            raise invalid("class_counts", f"{classes} counts", len(counts))
        held_out = _dataset(trainer, self.held_out)
        if self.held_out is not None and not len(held_out):
            raise invalid("held_out", "at least one sample", "none")

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Change the head of the model in memory."""
        trainer = calling_trainer(self)
        model = _unwrapped(trainer)
        sets = {"train": trainer.train_dataset, "validation": _dataset(trainer, self.held_out)}
        sets |= {"test": self.test}
        with scratch_folder(args.output_dir) as folder:
            parts: dict[str, Callable[[], Features]] = {
                part: partial(trainer_features, trainer, model, samples, folder / part)
                for part, samples in sets.items()
                if samples is not None
            }
            counts = self.class_counts
            if counts is None:
                features = parts["train"]()
                classes = features.logits.shape[1]
                counts = ClassCounts.from_labels(features.head_labels(), num_classes=classes)
                parts["train"] = lambda: features
            self._finished = self.step.run(model, counts, parts)
        self.record = self._finished.record
        if state.is_world_process_zero:
            done = self.record["rebalance"]
            strength = "" if done["strength"] is None else f", strength {done['strength']:.4g}"
            logger.info(f"RebalanceCallback: {done['method']}{strength}.")


def trainer_features(
    trainer: Trainer, model: Any, dataset: Any, folder: str | os.PathLike[str] | None
) -> Features:
    """Features of a data set by the data loader that a Trainer makes for it, on every process.

    Args:
        trainer: The Trainer.
        model: Its model, without wrappers.
        dataset: As the Trainer takes it for evaluation.
        folder: Where they are kept, see :func:`.extract_features`; None: in memory.
    """
    config = getattr(model, "config", None)
    names = getattr(config, "id2label", None) or {}
    return extract_features(
        model,
        trainer.get_test_dataloader(dataset),
        class_names=[names[index] for index in sorted(names)] or None,
        accelerator=trainer.accelerator,
        memmap_dir=None if folder is None else Path(folder),
        progress=not trainer.args.disable_tqdm,
    )


def _unwrapped(trainer: Trainer) -> Any:
    return trainer.accelerator.unwrap_model(
        trainer.model, keep_fp32_wrapper=True, keep_torch_compile=False
    )


def _dataset(trainer: Trainer, given: Any) -> Any:
    """The data set that is meant."""
    if not isinstance(given, str):
        return given
    if trainer.eval_dataset is None or isinstance(trainer.eval_dataset, dict):
        hint = "Give the data set itself: RebalanceCallback(held_out=...)."
        shown = None if trainer.eval_dataset is None else "several"
        raise invalid("eval_dataset", "one data set, as `held_out` says so", shown, hint=hint)
    return trainer.eval_dataset
