"""DRWCallback: what it trains, when it switches, and what it leaves behind."""

import copy
import pickle

import pytest
import torch
from hf_samples import (
    COUNTS,
    Spy,
    effective_weights,
    logged,
    make_data,
    make_model,
    make_trainer,
    tensors,
)
from transformers import TrainerCallback
from transformers.utils import logging

from ldam_plugins import DeferredSchedule, LDAMLoss, create_loss, fold_cosine_head, list_losses
from ldam_plugins.heads import CosineLinear, cosine_heads
from ldam_plugins.heads.guard import HeadGuard
from ldam_plugins.integrations.transformers import DRWCallback


def _parameters(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def _losses(trainer):
    return torch.tensor(logged(trainer, "loss"))


class _Boom(TrainerCallback):
    """An error of somebody else, at the event and update asked for."""

    def __init__(self, event, step=2):
        self.step = step
        setattr(self, event, self._explode)

    def _explode(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise RuntimeError("boom")


class TestOneArgument:
    def test_trains_the_same_as_the_explicit_pair(self, tmp_path):
        alone = make_trainer(tmp_path, make_model(dropout=0.1), callbacks=[DRWCallback()])
        alone.train()
        criterion = LDAMLoss(COUNTS)
        pair = make_trainer(
            tmp_path,
            make_model(dropout=0.1),
            compute_loss_func=criterion.compute_loss_func,
            callbacks=[DRWCallback(criterion, start=0.8)],
        )
        pair.train()
        torch.testing.assert_close(_losses(alone), _losses(pair), rtol=1e-6, atol=0)
        torch.testing.assert_close(_parameters(alone), _parameters(pair), rtol=1e-6, atol=1e-7)

    def test_a_prior_corrected_twice_is_warned_about(self, tmp_path):
        trainer = make_trainer(tmp_path, callbacks=[DRWCallback(loss="logit_adjusted")])
        with pytest.warns(UserWarning, match="LogitAdjustedLoss under schedule 'drw'"):
            trainer.train()

    def test_everything_can_be_given(self, tmp_path):
        criterion = LDAMLoss(COUNTS, max_margin=0.3, scale=10.0)
        callback = DRWCallback(criterion, class_counts=COUNTS, start=0.5, beta=0.99)
        trainer = make_trainer(tmp_path, callbacks=[callback])
        trainer.train()
        assert cosine_heads(trainer.model)["classifier"].scale == 10
        assert callback.criterion is criterion
        torch.testing.assert_close(criterion.weight, effective_weights(beta=0.99))

    @pytest.mark.parametrize("kind", ["none", "rw", "rs", "drw", "drs", "progressive"])
    def test_every_schedule(self, kind, tmp_path):
        callback = DRWCallback(schedule=kind, start=0.5, loss="ce")
        spy = Spy(callback)
        trainer = make_trainer(tmp_path, callbacks=[callback, spy], max_steps=6)  # 3 an epoch
        trainer.train()
        assert not cosine_heads(trainer.model)  # the baseline keeps the stock head
        weighted = {"rw": [True] * 6, "drw": [False] * 3 + [True] * 3}.get(kind, [False] * 6)
        wanted = [effective_weights() if w else torch.ones(3) for w in weighted]
        torch.testing.assert_close(torch.tensor(spy.weights), torch.stack(wanted))
        stages = {
            "none": ["uniform"],
            "rw": ["reweighted"],
            "rs": ["resampled"],
            "drw": ["uniform", "reweighted"],
            "drs": ["uniform", "resampled"],
            "progressive": ["resampled"],
        }
        assert logged(trainer, "drw_stage") == stages[kind]

    @pytest.mark.parametrize("name", list_losses())
    def test_every_loss(self, name, tmp_path):
        options = {"max_steps": 1, "per_device_train_batch_size": 24}
        trainer = make_trainer(tmp_path, callbacks=[DRWCallback(loss=name)], **options)
        twin = copy.deepcopy(trainer.model)
        trainer.train()
        inputs, labels = tensors(make_data())
        expected = create_loss(name, COUNTS)(twin.train()(**inputs).logits, labels)
        assert logged(trainer, "loss")[0] == pytest.approx(expected.item(), rel=1e-5)

    @pytest.mark.parametrize(
        ("start", "first"),
        [(0.5, 3), (0.51, 4), (1, 3), (0, 0), (DeferredSchedule("drw", 5, "step"), 5)],
    )
    def test_switches_at_the_update_asked_for(self, start, first, tmp_path):
        given = {"schedule": start} if isinstance(start, DeferredSchedule) else {"start": start}
        callback = DRWCallback(**given)
        spy = Spy(callback)
        trainer = make_trainer(tmp_path, callbacks=[callback, spy], max_steps=6)
        trainer.train()
        assert [weights != [1, 1, 1] for weights in spy.weights] == [i >= first for i in range(6)]
        entries = [e for e in trainer.state.log_history if "drw_stage" in e]
        assert entries[-1]["drw_stage"] == "reweighted"
        assert entries[-1]["step"] == first


class TestEvaluation:
    def test_is_plain_cross_entropy_before_and_after_the_switch_and_the_training(self, tmp_path):
        data = make_data(seed=2)
        trainer = make_trainer(
            tmp_path,
            callbacks=[DRWCallback(start=0.5)],
            eval_dataset=data,
            eval_strategy="steps",
            eval_steps=1,
            learning_rate=0.0,
            load_best_model_at_end=False,
        )
        trainer.train()
        inputs, labels = tensors(data)
        with torch.no_grad():
            logits = trainer.model.eval()(**inputs).logits
        expected = torch.nn.functional.cross_entropy(logits, labels).item()
        assert logged(trainer, "eval_loss") == pytest.approx([expected] * 4, rel=1e-5)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)
        found = trainer.predict(data)
        assert torch.allclose(torch.tensor(found.predictions), logits, atol=1e-5)

    def test_best_model_is_not_chosen_by_the_switch_and_keeps_its_exact_head(self, tmp_path):
        trainer = make_trainer(
            tmp_path,
            callbacks=[DRWCallback(start=0.25)],
            eval_dataset=make_data(seed=2),
            learning_rate=0.3,
            max_steps=6,
            eval_strategy="steps",
            eval_steps=1,
            save_strategy="steps",
            save_steps=1,
            load_best_model_at_end=True,
        )
        trainer.train()
        losses = logged(trainer, "eval_loss")
        best = losses.index(min(losses)) + 1
        assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
        assert isinstance(trainer.model.classifier, CosineLinear)
        assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=1e-6)

    def test_a_saved_model_still_predicts_the_same_under_the_callback(self, tmp_path, caplog):
        trainer = make_trainer(tmp_path, callbacks=[DRWCallback()])
        trainer.train()
        trainer.save_model(tmp_path / "saved")
        wanted = trainer.predict(make_data(seed=2))
        stock = type(trainer.model).from_pretrained(tmp_path / "saved")
        other = make_trainer(tmp_path, stock, callbacks=[DRWCallback()])
        logging.enable_propagation()
        found = other.predict(make_data(seed=2))
        logging.disable_propagation()
        assert "leave the callback out" in caplog.text
        assert found.predictions == pytest.approx(wanted.predictions, abs=1e-4)

    def test_a_head_of_zeros_gets_directions(self, tmp_path):
        model = make_model()
        torch.nn.init.zeros_(model.classifier.weight)
        trainer = make_trainer(tmp_path, model, callbacks=[DRWCallback()])
        torch.testing.assert_close(trainer.model.classifier.weight.norm(dim=1), torch.ones(3))


class TestOneCallbackForManyTrainings:
    OTHER = (9, 7, 5)

    def _trainer(self, folder, callback, counts=COUNTS, **more):
        options = {"max_steps": 6, **more}
        return make_trainer(folder, data=make_data(counts=counts), callbacks=[callback], **options)

    def _alone(self, folder, counts=COUNTS):
        trainer = self._trainer(folder, DRWCallback(start=0.5), counts)
        trainer.train()
        return _losses(trainer)

    def test_folds_in_any_order(self, tmp_path):
        shared = DRWCallback(start=0.5)
        folds = [self._trainer(tmp_path, shared, counts) for counts in (COUNTS, self.OTHER)]
        for fold in reversed(folds):
            fold.train()
        for fold, counts in zip(folds, (COUNTS, self.OTHER), strict=True):
            assert torch.equal(_losses(fold), self._alone(tmp_path, counts))
            assert fold.evaluate(make_data())["eval_loss"] > 0

    @pytest.mark.parametrize("given", [True, False])
    def test_a_training_inside_another(self, given, tmp_path):
        shared = DRWCallback(LDAMLoss(COUNTS) if given else None, start=0.5)
        inner = []

        class Nests(TrainerCallback):
            def on_step_end(_, args, state, control, **kwargs):
                if state.global_step == 1:
                    inner.append(self._trainer(tmp_path, shared))
                    random = torch.get_rng_state()
                    inner[0].train()
                    torch.set_rng_state(random)

        outer = self._trainer(tmp_path, shared)
        outer.add_callback(Nests())
        outer.train()
        assert torch.equal(_losses(outer), self._alone(tmp_path))
        assert torch.equal(_losses(inner[0]), self._alone(tmp_path))

    @pytest.mark.parametrize("when", ["before", "during", "after"])
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
    def test_copies_train_the_same(self, when, copied, tmp_path):
        shared = DRWCallback(start=0.5)
        copies = [copied(shared)] if when == "before" else []

        class Copies(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                copies.append(copied(shared))

        trainer = self._trainer(tmp_path, shared)
        if when == "during":
            trainer.add_callback(Copies())
        trainer.train()
        copies = copies or [copied(shared)]
        other = self._trainer(tmp_path, copies[-1])
        other.train()
        assert torch.equal(_losses(other), _losses(trainer))

    def test_only_the_model_that_was_not_trained_is_spoken_of(self, tmp_path, caplog):
        shared = DRWCallback()
        trained, new = (self._trainer(tmp_path, shared) for _ in range(2))
        trained.train()
        logging.enable_propagation()
        trained.evaluate(make_data())
        assert "leave the callback out" not in caplog.text
        new.evaluate(make_data())
        logging.disable_propagation()
        assert "leave the callback out" in caplog.text


class TestAttach:
    def test_trains_the_same_as_one_that_was_given(self, tmp_path):
        given = make_trainer(tmp_path, make_model(dropout=0.1), callbacks=[DRWCallback(start=0.5)])
        given.train()
        attached = make_trainer(tmp_path, make_model(dropout=0.1))
        DRWCallback(start=0.5).attach(attached)
        assert isinstance(attached.model.classifier, CosineLinear)
        attached.train()
        assert torch.equal(_losses(given), _losses(attached))
        assert torch.equal(_parameters(given), _parameters(attached))
        assert logged(attached, "drw_stage") == ["uniform", "reweighted"]

    def test_does_without_the_call_stack(self, tmp_path, monkeypatch):
        callback, trainer = DRWCallback(start=0.5), make_trainer(tmp_path)
        callback.attach(trainer)
        module = "ldam_plugins.integrations.transformers.callback"
        for search in ("find_trainer", "calling_trainer"):
            monkeypatch.setattr(f"{module}.{search}", None)  # a call would fail
        trainer.train()
        trainer.train()
        assert trainer.evaluate(make_data())["eval_loss"] > 0

    def test_explicit_pair(self, tmp_path):
        criterion = LDAMLoss(COUNTS)
        trainer = make_trainer(tmp_path, compute_loss_func=criterion.compute_loss_func)
        callback = DRWCallback(criterion)
        callback.attach(trainer)
        trainer.train()
        assert callback.criterion is criterion

    def test_an_untrained_head_is_spoken_of(self, tmp_path, caplog):
        trainer = make_trainer(tmp_path)
        DRWCallback().attach(trainer)
        logging.enable_propagation()
        trainer.evaluate(make_data())
        logging.disable_propagation()
        assert "leave the callback out" in caplog.text

    def test_twice_is_refused(self, tmp_path):
        callback, trainer = DRWCallback(), make_trainer(tmp_path)
        callback.attach(trainer)
        for again in (callback, DRWCallback()):
            with pytest.raises(ValueError, match=r"`trainer` must be one without a DRWCallback"):
                again.attach(trainer)
        other = make_trainer(tmp_path, callbacks=[DRWCallback()])
        with pytest.raises(ValueError, match=r"`trainer` must be one without a DRWCallback"):
            DRWCallback().attach(other)

    def test_a_second_trainer_is_refused(self, tmp_path):
        callback, trainer = DRWCallback(), make_trainer(tmp_path)
        callback.attach(trainer)
        second = make_trainer(tmp_path)
        with pytest.raises(ValueError, match=r"got 'a second one'\. Make one for each"):
            callback.attach(second)
        assert not cosine_heads(second.model)
        with pytest.raises(ValueError, match=r"attached to another Trainer.* Make one for each"):
            make_trainer(tmp_path, callbacks=[callback])

    def test_a_callback_that_was_removed_may_be_attached_again(self, tmp_path):
        callback, first, second = DRWCallback(), make_trainer(tmp_path), make_trainer(tmp_path)
        callback.attach(first)
        first.remove_callback(callback)
        callback.attach(second)
        second.train()

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
    def test_a_copy_is_attached_to_none(self, copied, tmp_path):
        callback, trainer = DRWCallback(), make_trainer(tmp_path)
        callback.attach(trainer)
        second = make_trainer(tmp_path)
        copied(callback).attach(second)
        second.train()
        trainer.train()
        assert torch.equal(_losses(trainer), _losses(second))

    @pytest.mark.parametrize("loss", ["ldam", "ce"])
    def test_a_training_that_runs_is_refused(self, loss, tmp_path):
        class Late(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                DRWCallback(loss=loss).attach(trainer)

        trainer = make_trainer(tmp_path, callbacks=[Late()])
        with pytest.raises(ValueError, match=r"not training.*before `trainer\.train\(\)`"):
            trainer.train()

    def test_after_a_training_the_optimizer_must_hold_the_head(self, tmp_path):
        trainer = make_trainer(tmp_path)
        trainer.train()
        with pytest.raises(ValueError, match="before the optimizer is made"):
            DRWCallback().attach(trainer)
        assert not cosine_heads(trainer.model)
        assert not any(isinstance(c, DRWCallback) for c in trainer.callback_handler.callbacks)
        DRWCallback(loss="ce", start=0.5).attach(trainer)
        trainer.train()
        assert logged(trainer, "drw_stage") == ["uniform", "reweighted"]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"label_smoothing_factor": 0.1}, "remove label_smoothing_factor"),
            ({"compute_loss_func": lambda *a, **k: None}, "criterion.compute_loss_func"),
            ({"model_init": lambda: make_model()}, r"use_cosine_head\(model, scale=30\)"),
        ],
    )
    def test_refuses_what_the_constructor_refuses(self, options, message, tmp_path):
        trainer = make_trainer(tmp_path, **options)
        with pytest.raises(ValueError, match=message):
            DRWCallback().attach(trainer)
        assert not cosine_heads(trainer.model)


class TestWhatIsLeft:
    def test_nothing_on_the_model_but_the_head_and_its_guard(self, tmp_path):
        trainer = make_trainer(tmp_path, callbacks=[DRWCallback()])
        trainer.train()
        for module in trainer.model.modules():
            assert not module._forward_hooks
            assert all(type(h) is HeadGuard for h in module._forward_pre_hooks.values())
        inputs, labels = tensors(make_data())
        output = trainer.model(**inputs, labels=labels)
        stock = torch.nn.functional.cross_entropy(output.logits, labels)
        torch.testing.assert_close(output.loss, stock)

    @pytest.mark.parametrize(
        "event", ["on_step_begin", "on_substep_end", "on_step_end", "on_epoch_end", "on_log"]
    )
    def test_after_an_error_too_and_the_next_training_works(self, event, tmp_path):
        boom = _Boom(event, 3 if event == "on_epoch_end" else 2)
        trainer = make_trainer(
            tmp_path,
            callbacks=[DRWCallback(), boom],
            gradient_accumulation_steps=2,
            per_device_train_batch_size=4,
            max_steps=5,
        )
        with pytest.raises(RuntimeError, match="boom"):
            trainer.train()
        inputs, labels = tensors(make_data())
        output = trainer.model.train()(**inputs, labels=labels)
        stock = torch.nn.functional.cross_entropy(output.logits, labels)
        torch.testing.assert_close(output.loss, stock)
        trainer.remove_callback(boom)
        trainer.train()
        assert trainer.state.global_step == 5

    def test_a_second_training_goes_on_with_the_head(self, tmp_path):
        trainer = make_trainer(tmp_path, callbacks=[DRWCallback(start=0.5)])
        trainer.train()
        before = trainer.model.classifier.weight.clone()
        trainer.train()
        assert not torch.equal(before, trainer.model.classifier.weight)
        assert logged(trainer, "drw_stage") == ["uniform", "reweighted"]

    def test_a_second_training_counts_the_classes_of_its_own_data(self, tmp_path):
        callback = DRWCallback(start=0.5)
        trainer = make_trainer(tmp_path, callbacks=[callback])
        for counts in (COUNTS, [9, 7, 5]):
            trainer.train_dataset = make_data(counts=counts)
            trainer.train()
            assert callback.criterion.class_counts.counts.tolist() == counts
            torch.testing.assert_close(callback.criterion.weight, effective_weights(counts))

    def test_a_removed_callback_is_missed(self, tmp_path):
        trainer = make_trainer(tmp_path, callbacks=[DRWCallback()])
        trainer.train()
        trainer.remove_callback(DRWCallback)
        with pytest.raises(RuntimeError, match="compute_loss_func = None"):
            trainer.train()

    def test_a_copy_is_saved_folded_as_well(self, tmp_path):
        trainer = make_trainer(tmp_path, callbacks=[DRWCallback()])
        trainer.train()
        twin = copy.deepcopy(trainer.model)
        saved = twin.state_dict()
        folded = fold_cosine_head(trainer.model).state_dict()
        assert set(saved) - set(folded) == {
            "classifier.cosine_moments",
            "classifier.cosine_weight",
        }
        for key, tensor in folded.items():
            torch.testing.assert_close(saved[key], tensor)
        twin.load_state_dict(saved)
        assert torch.equal(twin.classifier.weight, saved["classifier.cosine_weight"])
