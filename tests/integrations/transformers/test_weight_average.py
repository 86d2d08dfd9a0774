"""The averages of a Trainer: those of timm, evaluated and saved, through every stop."""

import copy
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from hf_samples import make_data, make_model, make_trainer
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import nn
from transformers import Trainer, TrainerCallback

from ldam_plugins import DRWCallback
from ldam_plugins.integrations.transformers import WeightAverageTrainer
from ldam_plugins.integrations.transformers.weight_average import AVERAGE_FILE, WeightAverage

DECAY = 0.75


class Counting(nn.Module):
    """Has a buffer of floats, one of integers and one that is not saved, all changed by a pass."""

    def __init__(self):
        super().__init__()
        self.layer, self.frozen = nn.Linear(50, 3), nn.Linear(3, 3).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))
        self.register_buffer("cache", torch.zeros(()), persistent=False)

    def forward(self, input_ids, attention_mask=None, labels=None):
        if self.training:
            self.passes += 1
            self.cache += 1
            self.mean += input_ids.float().mean()
        logits = self.frozen(self.layer(nn.functional.one_hot(input_ids, 50).float().mean(1)))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Noting(TrainerCallback):
    """Follow the weights with timm's average, and keep them after each step."""

    def on_train_begin(self, args, state, control, *, model, **kwargs):
        self.theirs = ModelEmaV3(model, decay=DECAY)
        self.weights = []

    def on_step_end(self, args, state, control, *, model, **kwargs):
        self.theirs.update(model)
        self.weights.append(tensors_of(model))


def tensors_of(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def averaging(decay=DECAY):
    return partial(WeightAverageTrainer, ema_decay=decay)


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("parts", [1, 2])
def test_the_trained_model_is_the_average_of_timm(parts, tmp_path):
    noting = Noting()
    given = {"gradient_accumulation_steps": parts, "per_device_train_batch_size": 4}
    trainer = make_trainer(tmp_path, Counting(), kind=averaging(), callbacks=[noting], **given)
    trainer.train()
    found, theirs, last = tensors_of(trainer.model), noting.theirs.module, noting.weights[-1]
    for name, expected in tensors_of(theirs).items():
        expected = last[name] if name == "cache" else expected
        torch.testing.assert_close(found[name], expected, rtol=2e-7, atol=1e-7)
    assert found["passes"] == 4 * parts
    assert not torch.equal(found["layer.weight"], last["layer.weight"])
    assert not torch.equal(found["mean"], last["mean"])


def test_the_training_is_that_without_an_average(tmp_path):
    runs = []
    for kind in (Trainer, averaging(), averaging(0.0)):
        noting = Noting()
        options = {"eval_dataset": make_data(seed=2), "eval_strategy": "epoch"}
        drw = DRWCallback(class_counts=[16, 6, 2])
        trainer = make_trainer(
            tmp_path, make_model(dropout=0.2), kind=kind, callbacks=[drw, noting], **options
        )
        trainer.train()
        runs.append((noting.weights, tensors_of(trainer.model)))
    (plain, left), (weights, average), (_, of_decay_0) = runs
    assert all(same(*pair) for pair in zip(plain, weights, strict=True))
    assert same(of_decay_0, left)
    assert not same(average, left)


class Evaluated(TrainerCallback):
    """Note what is evaluated."""

    def __init__(self):
        self.seen = []

    def on_prediction_step(self, args, state, control, *, model, **kwargs):
        self.seen.append(tensors_of(model))


def test_evaluation_and_what_is_saved_are_of_the_average_and_training_goes_on(tmp_path):
    class Asks(TrainerCallback):
        def on_step_end(self, args, state, control, *, model, **kwargs):
            before = tensors_of(model)
            trainer.evaluate()
            assert same(evaluated.seen[-1], tensors_of(noting.theirs.module))
            trainer.save_model(str(tmp_path / "asked"))
            saved = load_file(tmp_path / "asked" / "model.safetensors")
            assert saved["bert.pooler.dense.weight"].equal(
                noting.theirs.module.bert.pooler.dense.weight
            )
            assert same(before, tensors_of(model))
            trainer.data_collator = None
            with pytest.raises(AttributeError):  # of the model, in the evaluation
                trainer.predict(make_data())
            trainer.data_collator = collate
            assert same(before, tensors_of(model))

    noting, evaluated, model = Noting(), Evaluated(), make_model()
    trainer = make_trainer(
        tmp_path,
        model,
        kind=averaging(),
        callbacks=[noting, evaluated, Asks()],
        eval_dataset=make_data(seed=2),
    )
    collate = trainer.data_collator
    trainer.train()
    at_the_end = tensors_of(model)
    trainer.evaluate()
    assert same(evaluated.seen[-1], at_the_end)
    assert len(noting.weights) == 4


@pytest.mark.parametrize("step", [2, 6])
def test_a_resumed_training_equals_the_undisturbed_one(step, tmp_path):
    def make(folder):
        model, drw = make_model(dropout=0.2), DRWCallback(start=0.5)
        saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}
        return make_trainer(tmp_path / folder, model, kind=averaging(), callbacks=[drw], **saving)

    whole, resumed = make("whole"), make("resumed")
    whole.train()
    checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
    average = load_file(checkpoint / AVERAGE_FILE)
    plain = load_file(checkpoint / "model.safetensors")
    assert not average["bert.pooler.dense.weight"].equal(plain["bert.pooler.dense.weight"])
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert same(tensors_of(resumed.model), tensors_of(whole.model))
    last = load_file(tmp_path / "whole" / "checkpoint-6" / AVERAGE_FILE)
    assert last["bert.pooler.dense.weight"].equal(whole.model.bert.pooler.dense.weight)


def test_a_checkpoint_without_averages_is_refused_and_so_are_those_of_others(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make_trainer(tmp_path, **saving).train()
    trainer = make_trainer(tmp_path, kind=averaging(), **saving)
    for resumed in (True, str(tmp_path / "checkpoint-1")):
        with pytest.raises(
            ValueError, match=r"`checkpoint` must be one with weight_average.*begin"
        ):
            trainer.train(resume_from_checkpoint=resumed)
    model = make_model()
    WeightAverage(nn.Linear(2, 2), DECAY).save(tmp_path)
    with pytest.raises(ValueError, match=r"averages of the parameters .*Not in both: bert"):
        WeightAverage(model, DECAY).load(tmp_path)


def test_the_best_epoch_is_that_of_the_averages(tmp_path):
    """The worst of them by its loss, which is not the last."""
    evaluated, ends = Evaluated(), {}

    class Ends(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            ends[state.global_step] = evaluated.seen[-1]

    trainer = make_trainer(
        tmp_path,
        kind=averaging(0.5),
        callbacks=[evaluated, Ends()],
        eval_dataset=make_data(),
        max_steps=9,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,
    )
    trainer.train()
    best = trainer.state.best_global_step
    assert best < 9
    assert same(tensors_of(trainer.model), ends[best])


def test_averages_of_half_precision_do_not_stand_still():
    model = nn.Linear(4, 4).bfloat16()
    average = WeightAverage(model, 0.999)
    exact, decay = model.weight.detach().double(), 0.999
    with torch.no_grad():
        for _ in range(200):
            model.weight += 0.01
            exact = decay * exact + (1 - decay) * model.weight.double()
            average.update(model)
    before = copy.deepcopy(model)
    with average.inside(model):
        assert model.weight.dtype == torch.bfloat16
        torch.testing.assert_close(model.weight.double(), exact, rtol=5e-3, atol=1e-3)
        assert not torch.equal(model.weight, before.weight)
    assert torch.equal(model.weight, before.weight)


def test_a_step_that_is_skipped_does_not_count(tmp_path, monkeypatch):
    counted, update = [], WeightAverage.update
    monkeypatch.setattr(
        WeightAverage, "update", lambda self, model: counted.append(1) or update(self, model)
    )
    make_trainer(tmp_path, kind=averaging()).train()
    assert len(counted) == 4
    wrapper = "accelerate.optimizer.AcceleratedOptimizer.step_was_skipped"
    monkeypatch.setattr(wrapper, property(lambda self: True))
    make_trainer(tmp_path, kind=averaging()).train()
    assert len(counted) == 4


def test_what_cannot_be_averaged_is_refused(tmp_path, monkeypatch):
    for decay in (1, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"`ema_decay` must be in \[0, 1\), got"):
            make_trainer(tmp_path, kind=averaging(decay))
    for sharded in ("FSDP", "DEEPSPEED"):
        monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self, it=sharded: it))
        with pytest.raises(ValueError, match=f"without shards for ema_decay, got '{sharded}'.*DDP"):
            make_trainer(tmp_path, kind=averaging())
