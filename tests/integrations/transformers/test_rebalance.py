"""A Trainer whose model is re-balanced at the end of the training."""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from hf_samples import make_data, make_model, make_trainer
from paths import HELPERS
from torch import nn

from ldam_plugins import DRWCallback, RebalanceCallback
from ldam_plugins.heads import cosine_heads
from ldam_plugins.integrations.transformers import rebalance

COUNTS = [16, 6, 4]


def trained(tmp_path, *callbacks, model=None, **options):
    trainer = make_trainer(
        tmp_path / "trainer",
        make_model() if model is None else model,
        make_data(counts=COUNTS),
        [*callbacks],
        **{"max_steps": 2, **options},
    )
    trainer.train()
    return trainer


def same(first, second):
    return all(first[name].equal(second[name]) for name in first)


@pytest.mark.filterwarnings("ignore:the model errs on:UserWarning")
def test_the_saved_model_is_the_trained_one_adjusted(tmp_path):
    callback = RebalanceCallback("logit_adjustment:1")
    trainer = trained(tmp_path, callback)
    plain = trained(tmp_path / "plain").model.state_dict()
    head = trainer.model.state_dict()
    assert {name for name in head if not head[name].equal(plain[name])} == {"classifier.bias"}
    shares = np.array(COUNTS) / sum(COUNTS)
    shift = (head["classifier.bias"] - plain["classifier.bias"]).numpy()
    np.testing.assert_allclose(shift, -np.log(3 * shares), atol=1e-6)
    trainer.save_model(tmp_path / "saved")
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert same(loaded.state_dict(), head)
    done = callback.record["rebalance"]
    assert (done["method"], done["chosen_on"], done["measured_on"]) == (
        "logit_adjustment",
        "train",
        "cross-fitting",
    )
    callback.undo()
    assert same(trainer.model.state_dict(), plain)
    with pytest.raises(RuntimeError, match="changed no head"):
        callback.undo()
    assert not (tmp_path / "trainer" / ".features").exists()


def test_the_best_model_is_what_is_changed_and_it_decides_on_held_out_samples(tmp_path):
    held_out = make_data(counts=[9, 8, 7], seed=2)
    callback = RebalanceCallback(
        "class_means", held_out="eval_dataset", calibrate="class", test=make_data(seed=3)
    )
    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1}
    options |= {"save_steps": 1, "load_best_model_at_end": True, "learning_rate": 0.1}
    trainer = trained(
        tmp_path,
        DRWCallback(),
        callback,
        eval_dataset=held_out,
        max_steps=3,
        metric_for_best_model="loss",
        **options,
    )
    assert not cosine_heads(trainer.model)
    assert type(trainer.model.classifier) is nn.Linear
    best = transformers.AutoModelForSequenceClassification.from_pretrained(
        trainer.state.best_model_checkpoint
    ).state_dict()
    now = trainer.model.state_dict()
    assert all(now[name].equal(best[name]) for name in best if "classifier" not in name)
    done = callback.record["rebalance"]
    assert (done["method"], done["chosen_on"], done["measured_on"]) == (
        "class_means",
        "validation",
        "test",
    )
    assert len(done["scales"]) == 3
    logits = trainer.predict(make_data(seed=3)).predictions
    assert np.isfinite(logits).all()
    callback.undo()
    assert cosine_heads(trainer.model)


def test_a_resumed_training_is_rebalanced_at_its_own_end(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
    make = RebalanceCallback
    whole = trained(tmp_path, make("tau_norm:1"), **options).model.state_dict()
    for step in (2, 4):  # in the middle; and with nothing left to train
        trainer = make_trainer(
            tmp_path / "trainer",
            make_model(),
            make_data(counts=COUNTS),
            [make("tau_norm:1")],
            **options,
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "trainer" / f"checkpoint-{step}"))
        assert same(trainer.model.state_dict(), whole)


def test_two_processes_have_the_same_bits(tmp_path):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", "2", "--main_process_port", "0"]
    command += [str(HELPERS / "rebalance_run.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (first, record), (second, other) = (
        torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(2)
    )
    assert same(first, second)
    assert record["rebalance"] == other["rebalance"]
    saved = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    assert same(saved.state_dict(), first)


class Wrapped(nn.Module):
    def merge_and_unload(self):
        """As adapters have."""


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RebalanceCallback("nomethod"), "`rebalance` must be one of"),
        (lambda: RebalanceCallback("tau_norm:-2"), "`strength` must be"),
        (lambda: RebalanceCallback(calibrate="temperature"), "without `held_out`"),
        (lambda: RebalanceCallback(held_out="test"), "`held_out` must be one of"),
        (lambda: RebalanceCallback(class_counts=[3, 0, 2]), "no training sample in class 1"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("callbacks", "model", "message"),
    [
        ([RebalanceCallback(), DRWCallback()], "Bert", "with RebalanceCallback last"),
        ([RebalanceCallback("crt")], "GPT2", "`rebalance` must be one that needs no bias"),
        ([RebalanceCallback(held_out="eval_dataset")], "Bert", "`eval_dataset` must be one data"),
        ([RebalanceCallback(class_counts=[1, 2])], "Bert", "`class_counts` must be 3 counts"),
    ],
)
def test_what_could_not_be_done_is_refused_before_the_training(callbacks, model, message, tmp_path):
    model = make_model(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, *copy.deepcopy(callbacks), model=model)
    after = model.state_dict()
    assert all(after[name].equal(before[name]) for name in before if "classifier" not in name)


def test_sharded_and_adapted_models_are_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(rebalance, "_unwrapped", lambda trainer: Wrapped())
        with pytest.raises(ValueError, match="`model` must be one without adapters"):
            trained(tmp_path, RebalanceCallback())
    with pytest.raises(ValueError, match=r"rebalance, calibrate.*FSDP.*recipes/rebalance.py"):
        rebalance.refuse_sharded("FSDP")
