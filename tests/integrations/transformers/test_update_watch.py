"""Subclasses of Trainer with losses of their own: the update is right, or refused before it."""

import copy

import pytest
import torch
from hf_samples import COUNTS, ldam_oracle, logged, make_data, make_model, make_trainer, tensors
from transformers import Trainer, TrainerCallback

from ldam_plugins import LDAMLoss
from ldam_plugins.integrations.transformers import DRWCallback


class Drops(Trainer):
    """As in many a script: the count is taken and not handed on."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs)


class DropsInStep(Trainer):
    def training_step(self, model, inputs, num_items_in_batch=None):
        return super().training_step(model, inputs)


class CountsNothing(Trainer):
    def get_batch_samples(self, *args):
        return super().get_batch_samples(*args)[0], None


class CallsTheModel(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        return self.compute_loss_func(model(**inputs), labels)


class CountsItsPart(Trainer):
    """The micro-batch's rows instead of the update's."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        items = torch.tensor(len(inputs["labels"]))
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=items)


class CountsPerStep(Trainer):
    def _get_num_items_in_batch(self, batch_samples, device):
        return batch_samples[0]["labels"].ne(-100).sum()


class Halves(Trainer):
    """Distillation, say: the loss is one part of what is trained on, for a reason."""

    def compute_loss(self, model, inputs, return_outputs=False, **count):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **count)
        total = 0.5 * loss + 0.5 * outputs["logits"].square().mean() * 0
        return (total, outputs) if return_outputs else total


class Twice(Trainer):
    """Two passes, averaged (R-Drop)."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        again = dict(inputs)
        first = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        other = super().compute_loss(model, again, num_items_in_batch=num_items_in_batch)
        return (first + other) / 2


class Parameters(TrainerCallback):
    def on_step_end(self, args, state, control, *, model, **kwargs):
        raise AssertionError("an update was made")


def updated(tmp_path, kind, *, callback=True, parts=3, data=None, **more):
    """A Trainer of ``kind`` for one update of plain SGD, and its model as it was."""
    criterion = LDAMLoss(COUNTS)
    callbacks = [DRWCallback(criterion, schedule="none", cosine_head=False)] if callback else []
    trainer = make_trainer(
        tmp_path,
        make_model(),
        data,
        callbacks,
        kind=kind,
        compute_loss_func=criterion.compute_loss_func,
        max_steps=1,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=parts,
        optim="sgd",
        max_grad_norm=0.0,
        **more,
    )
    return trainer, copy.deepcopy(trainer.model).train()


def right_step(model, size=1.0):
    """Weight of the head after the update, by the formula on all rows at once."""
    inputs, labels = tensors(make_data())
    (size * ldam_oracle(model(**inputs).logits, labels)).backward()
    return model.classifier.weight - 0.01 * model.classifier.weight.grad


@pytest.mark.parametrize("callback", [True, False])
@pytest.mark.parametrize("kind", [Drops, DropsInStep, CountsNothing, CallsTheModel])
def test_a_missing_count_is_refused_where_an_update_has_parts(kind, callback, tmp_path):
    trainer, _ = updated(tmp_path, kind, callback=callback)
    trainer.add_callback(Parameters())
    with pytest.raises(
        ValueError, match=rf"`num_items_in_batch` .*compute_loss\(\) of {kind.__name__}"
    ):
        trainer.train()


@pytest.mark.parametrize("callback", [True, False])
@pytest.mark.parametrize("kind", [Drops, CallsTheModel])
def test_a_missing_count_does_no_harm_where_an_update_is_one_part(kind, callback, tmp_path):
    trainer, twin = updated(tmp_path, kind, callback=callback, parts=1)
    trainer.args.per_device_train_batch_size = trainer._train_batch_size = 24
    trainer.train()
    torch.testing.assert_close(trainer.model.classifier.weight, right_step(twin))


@pytest.mark.parametrize("kind", [CountsItsPart, CountsPerStep])
def test_a_wrong_count_is_refused_before_an_update(kind, tmp_path):
    trainer, _ = updated(tmp_path, kind)
    trainer.add_callback(Parameters())
    message = rf"`num_items_in_batch` must be 24, .*got 8\. The loss of {kind.__name__}"
    with pytest.raises(ValueError, match=message):
        trainer.train()


@pytest.mark.parametrize(("kind", "size"), [(Trainer, 1.0), (Halves, 0.5), (Twice, 1.0)])
def test_what_a_subclass_makes_of_the_loss_is_its_own_matter(kind, size, tmp_path):
    trainer, twin = updated(tmp_path, kind)
    trainer.train()
    torch.testing.assert_close(trainer.model.classifier.weight, right_step(twin, size))


def test_labels_counted_as_if_they_were_shifted_are_refused(tmp_path):
    trainer, _ = updated(tmp_path, Trainer)
    trainer._loss_shifts_labels = True  # as of a model whose loss_type is "ForCausalLM"
    with pytest.raises(ValueError, match=r"must be 24, .*got 21"):
        trainer.train()


@pytest.mark.parametrize("mark", [255, -1])
@pytest.mark.parametrize("callback", [True, False])
def test_rows_that_the_trainer_counts_and_the_loss_ignores_are_refused(mark, callback, tmp_path):
    data = make_data()
    labels = [mark, mark, *data["label"][2:]]
    data = data.remove_columns("label").add_column("label", labels)
    criterion = LDAMLoss(COUNTS, ignore_index=mark)
    given = [DRWCallback(criterion, cosine_head=False)] if callback else []

    def train():
        loss = criterion.compute_loss_func
        make_trainer(tmp_path, data=data, callbacks=given, compute_loss_func=loss).train()

    with pytest.raises(ValueError, match=f"`ignore_index` must be -100 here, got {mark}.*map"):
        train()


def test_ignored_rows_of_an_option_are_refused_as_well(tmp_path):
    with pytest.raises(ValueError, match="`ignore_index` must be -100 here, got 7"):
        make_trainer(tmp_path, callbacks=[DRWCallback(loss="ce", ignore_index=7)])


def test_what_trainer_and_loss_ignore_alike_counts_nowhere(tmp_path):
    data = make_data()
    labels = [-100] * 6 + data["label"][6:]
    data = data.remove_columns("label").add_column("label", labels)
    trainer, twin = updated(tmp_path, Trainer, callback=False, data=data)
    trainer.train()
    inputs, targets = tensors(data)
    kept = targets >= 0
    wanted = ldam_oracle(twin(**inputs).logits[kept], targets[kept])
    assert logged(trainer, "loss")[0] == pytest.approx(wanted.item(), rel=1e-5)
