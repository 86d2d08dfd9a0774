"""Every set-up in which something else than asked for would be trained stops with a way out."""

import copy

import pytest
import torch
from hf_samples import COUNTS, logged, make_data, make_model, make_trainer, tensors
from transformers import Trainer

from ldam_plugins import ClassCounts, DeferredSchedule, LDAMLoss, create_loss, use_cosine_head
from ldam_plugins.heads import cosine_heads
from ldam_plugins.integrations.transformers import DRWCallback


def _relabel(data, labels, name="label"):
    return data.remove_columns("label").add_column(name, labels)


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"loss": "ldma"}, ValueError, "'ldam'"),
            ({"schedule": "dwr"}, ValueError, "'drw'"),
            ({"start": 1.5}, ValueError, "start"),
            ({"start": -1}, ValueError, "start"),
            ({"beta": 1.0}, ValueError, "beta"),
            ({"seed": -1}, ValueError, "seed"),
            ({"scale": 0.0}, ValueError, "scale"),
            ({"loss": "ce", "scale": 30.0}, ValueError, "cosine_head=True"),
            ({"loss": "ce", "scale": 30.0, "head": "linear"}, ValueError, "cosine_head=True"),
            ({"head": "cosin"}, ValueError, "'cosine'"),
            ({"head": "linear", "cosine_head": False}, ValueError, "beside cosine_head"),
            ({"cosine_head": "linear"}, TypeError, "cosine_head"),
            ({"head": "linear", "scale": 0.0}, ValueError, "scale"),
            ({"gamma": 1.0}, TypeError, "gamma"),
            ({"max_margin": -1.0}, ValueError, "max_margin"),
            ({"class_counts": [3, 0]}, ValueError, "no training sample"),
            ({"schedule": DeferredSchedule(), "start": 0.5}, ValueError, "start"),
            ({"criterion": torch.nn.CrossEntropyLoss()}, TypeError, "create_loss"),
            ({"criterion": LDAMLoss(COUNTS, reduction="sum")}, ValueError, "reduction"),
            ({"criterion": LDAMLoss(COUNTS), "loss": "ce"}, ValueError, "loss"),
            ({"criterion": LDAMLoss(COUNTS), "max_margin": 0.3}, ValueError, "max_margin"),
            ({"criterion": LDAMLoss(COUNTS), "scale": 20.0}, ValueError, "scale"),
            ({"criterion": LDAMLoss(COUNTS), "class_counts": [1, 1, 1]}, ValueError, "counts"),
        ],
    )
    def test_refused_at_once(self, options, error, message):
        with pytest.raises(error, match=message):
            DRWCallback(**options)

    def test_scale_reaches_head_and_loss(self, tmp_path):
        callback = DRWCallback(scale=12.0)
        trainer = make_trainer(tmp_path, callbacks=[callback], max_steps=1)
        trainer.train()
        assert cosine_heads(trainer.model)["classifier"].scale == callback.criterion.scale == 12

    def test_other_losses_can_have_the_head(self, tmp_path):
        callback = DRWCallback(loss="ce", cosine_head=True, scale=16.0)
        trainer = make_trainer(tmp_path, callbacks=[callback])
        assert cosine_heads(trainer.model)["classifier"].scale == 16

    @pytest.mark.parametrize("given", [{"head": "cosine"}, {"cosine_head": True}], ids=str)
    def test_a_head_that_is_there_stays(self, given, tmp_path):
        model = use_cosine_head(make_model(), 16.0)
        head = model.classifier
        callback = DRWCallback(loss="ce", scale=16.0, schedule="none", **given)
        trainer = make_trainer(tmp_path, model, callbacks=[callback], max_steps=1)
        trainer.train()
        assert trainer.model.classifier is head

    def test_another_scale_than_that_of_the_head_is_refused(self, tmp_path):
        model = use_cosine_head(make_model(), 16.0)
        with pytest.raises(ValueError, match=r"`scale` must be 16, got 20.*fold_cosine_head"):
            make_trainer(
                tmp_path, model, callbacks=[DRWCallback(loss="ce", head="cosine", scale=20)]
            )


@pytest.mark.parametrize("given", [{"head": "linear"}, {"cosine_head": False}], ids=str)
class TestLinearHead:
    """A linear head under a loss with margins, where it is asked for."""

    @pytest.mark.parametrize("scale", [None, 4.0])
    def test_margins_are_taken_off_the_logits_as_they_are(self, given, scale, tmp_path):
        callback = DRWCallback(schedule="none", scale=scale, **given)
        options = {"max_steps": 1, "per_device_train_batch_size": 24}
        trainer = make_trainer(tmp_path, callbacks=[callback], **options)
        inputs, labels = tensors(make_data())
        with torch.no_grad():
            logits = copy.deepcopy(trainer.model).train()(**inputs).logits
        shift = (scale or 1) * ClassCounts(COUNTS).margins(0.5)[labels]
        logits[torch.arange(len(labels)), labels] -= shift
        with pytest.warns(UserWarning, match="loss LDAMLoss on a linear head") as caught:
            trainer.train()
        assert sum("on a linear head" in str(each.message) for each in caught) == 1
        expected = torch.nn.functional.cross_entropy(logits, labels)
        assert logged(trainer, "loss")[0] == pytest.approx(expected.item(), rel=1e-5)
        assert not cosine_heads(trainer.model)

    def test_a_criterion_keeps_its_scale(self, given, tmp_path):
        callback = DRWCallback(LDAMLoss(COUNTS, scale=3.0), **given)
        trainer = make_trainer(tmp_path, callbacks=[callback], max_steps=1)
        with pytest.warns(UserWarning, match=r"0\.5 \* 3 = 1\.5"):
            trainer.train()

    @pytest.mark.parametrize("loss", ["ldam", "ce"])
    def test_a_cosine_head_is_refused(self, given, loss, tmp_path):
        model = use_cosine_head(make_model())
        with pytest.raises(ValueError, match=r"linear head.*'classifier'.*fold_cosine_head"):
            make_trainer(tmp_path, model, callbacks=[DRWCallback(loss=loss, **given)])
        trainer = make_trainer(tmp_path, callbacks=[DRWCallback(loss=loss, **given)])
        use_cosine_head(trainer.model)
        with pytest.raises(ValueError, match=r"linear head.*'classifier'.*fold_cosine_head"):
            trainer.train()

    def test_a_model_that_is_built_anew_needs_no_head(self, given, tmp_path):
        callback = DRWCallback(schedule="none", **given)
        options = {"model_init": lambda: make_model(), "max_steps": 1}
        trainer = make_trainer(tmp_path, callbacks=[callback], **options)
        with pytest.warns(UserWarning, match="on a linear head"):
            trainer.train()


class TestRefusedByTheConstructor:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"label_smoothing_factor": 0.1}, "remove label_smoothing_factor"),
            ({"label_names": ["target"]}, "rename_column"),
            ({"compute_loss_func": lambda *a, **k: None}, "criterion.compute_loss_func"),
            ({"compute_loss_func": LDAMLoss(COUNTS).compute_loss_func}, r"DRWCallback\(criterion"),
            ({"model": make_model(problem_type="regression")}, "problem_type"),
            ({"model": make_model(problem_type="multi_label_classification")}, "problem_type"),
            ({"model": make_model(num_labels=1)}, "num_labels=2"),
            ({"model": make_model(return_dict=False)}, "return_dict"),
            ({"model_init": lambda: make_model()}, r"use_cosine_head\(model, scale=30\)"),
            ({"model": use_cosine_head(make_model(), 20.0)}, "scale"),
            ({"model": torch.nn.Sequential(torch.nn.LSTM(4, 3))}, r"head=\.\.\."),
        ],
    )
    def test_with_a_way_out(self, options, message, tmp_path):
        with pytest.raises(ValueError, match=message):
            make_trainer(tmp_path, callbacks=[DRWCallback()], **options)

    def test_a_second_callback(self, tmp_path):
        with pytest.raises(ValueError, match="remove the others"):
            make_trainer(tmp_path, callbacks=[DRWCallback(), DRWCallback()])

    def test_sampling_by_length_and_by_class(self, tmp_path):
        with pytest.raises(ValueError, match="train_sampling_strategy"):
            make_trainer(
                tmp_path,
                callbacks=[DRWCallback(schedule="rs")],
                train_sampling_strategy="group_by_length",
            )

    def test_losses_scaled_twice(self, tmp_path):
        class Scaled(Trainer):
            loss_is_scaled_for_ga = False

        with pytest.raises(ValueError, match="loss_is_scaled_for_ga"):
            make_trainer(tmp_path, callbacks=[DRWCallback()], kind=Scaled)

    def test_outside_a_trainer(self):
        with pytest.raises(RuntimeError, match="Trainer"):
            DRWCallback().on_init_end(None, None, None)


class TestRefusedByTrain:
    def test_a_head_that_the_optimizer_does_not_hold(self, tmp_path):
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        trainer = make_trainer(
            tmp_path, model, callbacks=[DRWCallback()], optimizers=(optimizer, None)
        )
        with pytest.raises(ValueError, match="before the optimizer is made"):
            trainer.train()

    def test_a_callback_added_too_late_for_the_head(self, tmp_path):
        trainer = make_trainer(tmp_path)
        trainer.add_callback(DRWCallback())
        with pytest.raises(ValueError, match=r"Trainer\(callbacks="):
            trainer.train()

    def test_a_callback_added_late_to_a_model_with_the_head_works(self, tmp_path):
        trainer = make_trainer(tmp_path, use_cosine_head(make_model()))
        trainer.add_callback(DRWCallback())
        trainer.train()
        assert "classifier.cosine_weight" in trainer.model.state_dict()

    def test_a_frozen_head(self, tmp_path):
        model = use_cosine_head(make_model())
        model.classifier.requires_grad_(False)
        trainer = make_trainer(tmp_path, model, callbacks=[DRWCallback()])
        with pytest.raises(ValueError, match="requires_grad_"):
            trainer.train()

    @pytest.mark.parametrize("uses_labels", [True, False])
    def test_a_trainer_with_a_loss_of_its_own(self, uses_labels, tmp_path):
        class Own(Trainer):
            def compute_loss(self, model, inputs, return_outputs=False, **options):
                labels = inputs["labels"] if uses_labels else inputs.pop("labels")
                outputs = model(**inputs)
                loss = torch.nn.functional.cross_entropy(outputs["logits"], labels)
                return (loss, outputs) if return_outputs else loss

        trainer = make_trainer(tmp_path, callbacks=[DRWCallback()], kind=Own)
        before = [p.clone() for p in trainer.model.parameters()]
        with pytest.raises(RuntimeError, match=r"super\(\).compute_loss"):
            trainer.train()
        assert all(map(torch.equal, before, trainer.model.parameters()))  # not one update

    @pytest.mark.parametrize(
        ("labels", "error", "message"),
        [
            (["cat"] * 24, TypeError, "class_encode_column"),
            ([0.5] * 24, TypeError, "no LDAM"),
            ([0.0, 1.0, 2.0] * 8, TypeError, "cast_column"),
            ([[1, 0, 1]] * 24, TypeError, "multi-hot"),
            ([0] * 12 + [1] * 12, ValueError, "no training sample in class 2"),
            ([0, 1, 2, 3] * 6, ValueError, "num_labels=4"),
            ([1, 2, 3, 3] * 6, ValueError, "subtract 1"),
            ([0, 2, 4, 4] * 6, ValueError, "without gaps"),
            ([0, 1, None, 2] * 6, ValueError, "is not None"),
            ([[0, 1, 2, 2]] * 24, TypeError, "one a token"),
            ([0, 1, 2, -1] * 6, ValueError, "-1"),
        ],
    )
    def test_labels_that_are_not_classes(self, labels, error, message, tmp_path):
        trainer = make_trainer(
            tmp_path, data=_relabel(make_data(), labels), callbacks=[DRWCallback()]
        )
        with pytest.raises(error, match=message):
            trainer.train()

    def test_labels_under_another_name(self, tmp_path):
        data = make_data().rename_column("label", "intent")
        trainer = make_trainer(tmp_path, data=data, callbacks=[DRWCallback()])
        with pytest.raises(ValueError, match="rename_column"):
            trainer.train()
        trainer = make_trainer(tmp_path, data=data, callbacks=[DRWCallback(class_counts=COUNTS)])
        with pytest.raises(ValueError, match="labels"):
            trainer.train()

    @pytest.mark.parametrize(
        "callback",
        [lambda: DRWCallback(class_counts=[5, 5]), lambda: DRWCallback(create_loss("ce", [5, 5]))],
    )
    def test_counts_of_other_classes(self, callback, tmp_path):
        trainer = make_trainer(tmp_path, callbacks=[callback()])
        with pytest.raises(ValueError, match="num_labels=2"):
            trainer.train()

    def test_a_start_past_the_end(self, tmp_path):
        trainer = make_trainer(tmp_path, callbacks=[DRWCallback(start=7)])
        with pytest.raises(ValueError, match="start"):
            trainer.train()

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({}, "class_counts="),
            ({"class_counts": COUNTS, "start": 1}, 'unit="step"'),
            ({"class_counts": COUNTS, "schedule": "drs", "start": 0.5}, "schedule='drw'"),
        ],
    )
    def test_iterable_data_without_length(self, options, message, tmp_path):
        data = make_data().to_iterable_dataset()
        trainer = make_trainer(tmp_path, data=data, callbacks=[DRWCallback(**options)])
        with pytest.raises(ValueError, match=message):
            trainer.train()

    def test_ignored_rows_cannot_be_resampled(self, tmp_path):
        data = _relabel(make_data(), [0, 1, 2, -100] * 6)
        trainer = make_trainer(tmp_path, data=data, callbacks=[DRWCallback(schedule="rs")])
        with pytest.raises(ValueError, match="filter"):
            trainer.train()

    def test_a_callback_added_while_training(self):
        with pytest.raises(RuntimeError, match="before"):
            DRWCallback().on_step_begin(None, None, None)
