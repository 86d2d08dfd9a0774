"""Sharpness-aware steps of a Trainer: those of the formula, through all that draws."""

import copy
from functools import partial

import pytest
import torch
from hf_samples import COUNTS, logged, make_model, make_trainer
from transformers import TrainerCallback

from ldam_plugins import DRWCallback
from ldam_plugins.integrations.transformers import SharpnessAwareTrainer
from ldam_plugins.training import SharpnessAware
from ldam_plugins.training.environment import note_random_state

RHO = 0.2
ONE_BATCH = {"max_steps": 1, "per_device_train_batch_size": sum(COUNTS), "optim": "sgd"}
ONE_BATCH |= {"max_grad_norm": 0.0, "learning_rate": 1.0}


class Before(TrainerCallback):
    """Note the model and the random numbers before the first step."""

    def on_step_begin(self, args, state, control, *, model, **kwargs):
        self.model, self.rewind = copy.deepcopy(model), note_random_state("cpu")


def trained(folder, kind=SharpnessAwareTrainer, callback=None, **options):
    before = Before()
    callback = callback or DRWCallback(schedule="rw")
    trainer = make_trainer(
        folder,
        make_model(dropout=0.2).double(),
        callbacks=[callback, before],
        kind=kind,
        **{**ONE_BATCH, **options},
    )
    trainer.train()
    return trainer, before, callback


def uphill(rho=RHO, **when):
    return partial(SharpnessAwareTrainer, sam=SharpnessAware(rho, **when))


def step_of(before, trainer):
    """What one step has taken off the weights, by name."""
    left = dict(trainer.model.named_parameters())
    return {name: (p - left[name]).detach() for name, p in before.model.named_parameters()}


def gradients(before, criterion, batches, move=None):
    """Those of the whole batch with the random numbers of the step, at moved weights."""
    model = copy.deepcopy(before.model).train()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += move[name] if move else 0
    before.rewind()
    total = sum(len(batch["labels"]) for batch in batches)
    for batch in batches:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        criterion.compute_loss_func(model(**inputs), batch["labels"], total).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("parts", [1, 3])
def test_a_step_is_that_of_the_gradient_uphill(parts, tmp_path):
    size = sum(COUNTS) // parts
    cut = {"gradient_accumulation_steps": parts, "per_device_train_batch_size": size}
    seen, kind = [], uphill()

    def noting(**given):
        trainer = kind(**given)
        collate = trainer.data_collator
        trainer.data_collator = lambda rows: seen.append(batch := collate(rows)) or batch
        return trainer

    trainer, before, callback = trained(tmp_path, noting, **cut)
    assert len(seen) == parts
    first = gradients(before, callback.criterion, seen)
    length = torch.cat([g.flatten() for g in first.values()]).norm()
    move = {name: RHO * gradient / length for name, gradient in first.items()}
    move |= {n: 0 for n, _ in before.model.named_parameters() if n not in move}
    expected = gradients(before, callback.criterion, seen, move)
    found = step_of(before, trainer)
    assert not torch.allclose(expected["classifier.weight"], first["classifier.weight"], rtol=0.01)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-9)


def test_a_far_smaller_move_is_a_plain_step_under_dropout_and_mixup(tmp_path):
    """So both passes draw the same masks, partners and shares, and the log is of the first."""
    ends = []
    for rho in (0.0, 1e-9):
        trainer, *_ = trained(
            tmp_path, uphill(rho), DRWCallback(mixup=1.0), max_steps=3, learning_rate=0.01
        )
        flat = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
        ends.append((flat, logged(trainer, "loss")))
    (plain, losses), (moved, same) = ends
    assert same == pytest.approx(losses, rel=1e-6)
    assert (plain - moved).norm() <= 1e-6 * plain.norm()
    assert not torch.equal(plain, moved)


def test_steps_are_sharpness_aware_when_told(tmp_path, monkeypatch):
    calls, step = [], SharpnessAwareTrainer._step_uphill
    monkeypatch.setattr(
        SharpnessAwareTrainer,
        "_step_uphill",
        lambda self, *given: calls.append(self.state.global_step) or step(self, *given),
    )
    late = uphill(start=1, every=2)  # three steps an epoch
    trained(tmp_path, late, max_steps=9, per_device_train_batch_size=8, learning_rate=0.01)
    assert calls == [3, 5, 7]
    with pytest.raises(ValueError, match=r"`start` must be before the end .* at epoch 3, got 3"):
        trained(tmp_path, uphill(start=3), max_steps=9, per_device_train_batch_size=8)
