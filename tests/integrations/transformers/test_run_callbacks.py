"""CheckpointCallback: whose checkpoints it drops, and what becomes of SIGTERM."""

import copy
import pickle
import signal
from pathlib import Path

import pytest
from hf_samples import make_data, make_model, make_trainer
from transformers import Trainer, TrainerCallback

from ldam_plugins import DeferredSchedule
from ldam_plugins.integrations.transformers import DRWCallback
from ldam_plugins.integrations.transformers.run_callbacks import (
    CheckpointCallback,
    HistoryCallback,
    newest_trainer_checkpoint,
)
from ldam_plugins.training.history import read_history

SAVING = {"save_strategy": "steps", "save_steps": 1}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


class Calls(TrainerCallback):
    """Calls a function at the end of an update."""

    def __init__(self, step, function):
        self.step, self.function = step, function

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.function()


@pytest.fixture(autouse=True)
def sigterm():
    before = signal.getsignal(signal.SIGTERM)
    yield lambda: signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)


class TestCheckpoints:
    def test_the_best_one_stays(self, tmp_path):
        errors = iter([3.0, 1.0, 2.0, 5.0])
        trainer = make_trainer(
            tmp_path,
            callbacks=[CheckpointCallback(keep=1)],
            eval_dataset=make_data(),
            compute_metrics=lambda _: {"error": next(errors)},
            eval_strategy="steps",
            eval_steps=1,
            metric_for_best_model="error",
            greater_is_better=False,
            load_best_model_at_end=True,
            **SAVING,
        )
        trainer.train()
        assert names(tmp_path) == ["checkpoint-2", "checkpoint-4"]
        assert Path(trainer.state.best_model_checkpoint) == tmp_path / "checkpoint-2"

    def test_what_is_of_others_stays(self, tmp_path):
        (tmp_path / "checkpoint-notes.txt").write_text("a file")
        for name in ("checkpoint-500", "checkpoint-1-old", "checkpoint-3"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "whole").touch()
        theirs = set(names(tmp_path)) - {"checkpoint-3"}  # which this run writes over
        make_trainer(tmp_path, callbacks=[CheckpointCallback(keep=1)], **SAVING).train()
        assert set(names(tmp_path)) == theirs | {"checkpoint-4"}

    def test_a_resumed_run_drops_those_it_goes_on_from(self, tmp_path):
        make_trainer(
            tmp_path, callbacks=[CheckpointCallback(keep=2)], max_steps=3, **SAVING
        ).train()
        assert names(tmp_path) == ["checkpoint-2", "checkpoint-3"]
        trainer = make_trainer(tmp_path, callbacks=[CheckpointCallback()], max_steps=5, **SAVING)
        trainer.train(resume_from_checkpoint=newest_trainer_checkpoint(tmp_path))
        assert names(tmp_path) == ["checkpoint-5"]

    def test_one_that_is_written_over_is_not_whole_meanwhile(self, tmp_path):
        whole = tmp_path / "checkpoint-2" / "whole"
        whole.parent.mkdir()
        whole.touch()
        found = []

        class Notes(Trainer):
            def _save_checkpoint(self, *args, **options):
                found.append(whole.exists())
                return super()._save_checkpoint(*args, **options)

        options = {"kind": Notes, "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
        make_trainer(tmp_path, callbacks=[CheckpointCallback()], **options).train()
        assert found == [False]
        assert whole.exists()

    def test_are_on_the_disk_before_older_ones_go(self, tmp_path, monkeypatch):
        done = []
        monkeypatch.setattr(
            "ldam_plugins.integrations.transformers.run_callbacks.flush_folder",
            lambda p: done.append(p.name),
        )
        monkeypatch.setattr("shutil.rmtree", lambda p: done.append(f"removed {p.name}"))
        trainer = make_trainer(tmp_path, callbacks=[CheckpointCallback()], max_steps=2, **SAVING)
        trainer.train()
        assert done == ["checkpoint-1", "checkpoint-2", "removed checkpoint-1"]

    def test_a_search_of_hyperparameters_is_refused(self, tmp_path):
        trainer = make_trainer(tmp_path, callbacks=[CheckpointCallback()])
        callback, state = CheckpointCallback(), trainer.state
        state.is_hyper_param_search = True
        with pytest.raises(ValueError, match="`callbacks` must be without CheckpointCallback"):
            callback.on_train_begin(trainer.args, state, trainer.control)


class TestSigterm:
    @pytest.mark.parametrize("jit", [False, True])
    def test_has_its_handler_back_after_a_training(self, jit, tmp_path, sigterm):
        before = sigterm()
        callbacks = [CheckpointCallback()]
        make_trainer(tmp_path, callbacks=callbacks, enable_jit_checkpoint=jit).train()
        assert sigterm() is before

    @pytest.mark.parametrize("kind", [signal.SIG_IGN, "handler"])
    def test_is_the_old_handlers_after_an_error(self, kind, tmp_path, sigterm):
        got = []
        before = kind if kind == signal.SIG_IGN else lambda *_: got.append(1)
        signal.signal(signal.SIGTERM, before)
        callback = CheckpointCallback()
        boom = Calls(2, lambda: 1 / 0)
        trainer = make_trainer(tmp_path, callbacks=[callback, boom])
        with pytest.raises(ZeroDivisionError):
            trainer.train()
        signal.raise_signal(signal.SIGTERM)
        assert not callback._told.is_set()
        assert got == ([] if kind == signal.SIG_IGN else [1])
        assert sigterm() is before
        trainer.remove_callback(boom)
        trainer.train()
        assert sigterm() is before

    def test_ends_a_training_with_a_whole_checkpoint(self, tmp_path, sigterm):
        before = sigterm()
        terminate = Calls(1, lambda: signal.raise_signal(signal.SIGTERM))
        trainer = make_trainer(tmp_path, callbacks=[terminate, CheckpointCallback()], max_steps=9)
        with pytest.raises(SystemExit) as ended:
            trainer.train()
        assert ended.value.code == 143
        assert newest_trainer_checkpoint(tmp_path) == str(tmp_path / "checkpoint-1")
        assert sigterm() is before

    def test_at_the_end_of_an_epoch_saves_no_update_twice(self, tmp_path):
        saved = []

        class Notes(Trainer):
            def _save_checkpoint(self, *args, **options):
                saved.append(self.state.global_step)
                return super()._save_checkpoint(*args, **options)

        terminate = Calls(3, lambda: signal.raise_signal(signal.SIGTERM))  # 3 updates an epoch
        callbacks = [terminate, CheckpointCallback()]
        trainer = make_trainer(tmp_path, callbacks=callbacks, kind=Notes, max_steps=9, **SAVING)
        with pytest.raises(SystemExit):
            trainer.train()
        assert saved == [1, 2, 3]


def test_where_an_epoch_ends_follows_from_the_data(tmp_path):
    """Not from max_steps, which may end inside an epoch: 3 updates each, of which there are 4."""
    seen = []

    class Notes(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(checkpoints._is_inside_epoch(state))

    checkpoints = CheckpointCallback()
    history = HistoryCallback(tmp_path, DeferredSchedule("none"))
    trainer = make_trainer(
        tmp_path,
        callbacks=[checkpoints, history, Notes()],
        eval_dataset=make_data(),
        compute_metrics=lambda _: {"top1_error": 0.0},
        eval_strategy="epoch",
        logging_strategy="epoch",
        max_steps=4,
    )
    trainer.train()
    assert seen == [True, True, False, True]
    assert [row["epoch"] for row in read_history(tmp_path)] == [0, 1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_callbacks_can_be_copied_at_any_time(copied, tmp_path):
    history = HistoryCallback(tmp_path, DeferredSchedule("none"))
    callbacks = [DRWCallback(), CheckpointCallback(keep=3), history]
    copies = [copied(callback) for callback in callbacks]
    during = Calls(1, lambda: copies.extend(copied(callback) for callback in callbacks))
    make_trainer(tmp_path, make_model(), callbacks=[*callbacks, during], max_steps=2).train()
    copies += [copied(callback) for callback in callbacks]
    assert [type(one) for one in copies] == [type(one) for one in callbacks] * 3
    assert {one.keep for one in copies[1::3]} == {3}
