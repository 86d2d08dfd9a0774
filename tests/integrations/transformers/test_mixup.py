"""Mixup of features under the Trainer: its arithmetic, and where it keeps out."""

import copy

import numpy as np
import pytest
import torch
from hf_samples import (
    COUNTS,
    effective_weights,
    logged,
    make_data,
    make_model,
    make_trainer,
    tensors,
)
from transformers import Trainer, TrainerCallback

from ldam_plugins import use_cosine_head
from ldam_plugins.heads.guard import HeadGuard
from ldam_plugins.integrations.transformers import DRWCallback
from ldam_plugins.integrations.transformers.checks import calling_trainer

ONE_BATCH = {"max_steps": 1, "per_device_train_batch_size": sum(COUNTS), "optim": "sgd"}
ONE_BATCH |= {"max_grad_norm": 0.0}


@pytest.fixture
def fixed(monkeypatch):
    """Let every batch be mixed with the rows in reverse, 0.3 to 0.7."""
    monkeypatch.setattr(np.random, "beta", lambda *_: 0.3)
    monkeypatch.setattr(torch, "randperm", lambda n, **_: torch.arange(n).flip(0))


def flat(tensors):
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


def ldam_of_soft_targets(logits, target_probs, scale=30.0):
    """Re-weighted LDAM of the paper, the margin of each class in proportion to its mass."""
    n, weights = torch.tensor(COUNTS, dtype=torch.float64), effective_weights().double()
    margins = 0.5 * (n / n.min()) ** -0.25
    rows = (weights * target_probs * (logits - scale * target_probs * margins).log_softmax(1)).sum(
        1
    )
    return -rows.mean() / ((n * weights).sum() / n.sum())


@pytest.mark.parametrize("parts", [1, 3])
def test_the_loss_is_that_of_mixed_features_and_targets(parts, fixed, tmp_path):
    size = sum(COUNTS) // parts
    options = {**ONE_BATCH, "per_device_train_batch_size": size}
    model = make_model().double()
    trainer = make_trainer(
        tmp_path,
        model,
        callbacks=[DRWCallback(mixup=0.2, schedule="rw")],
        gradient_accumulation_steps=parts,
        **options,
    )
    seen, collate = [], trainer.data_collator
    trainer.data_collator = lambda rows: seen.append(batch := collate(rows)) or batch
    twin = copy.deepcopy(trainer.model)
    trainer.train()
    losses = []
    for batch in seen:
        batch = dict(batch)
        labels = batch.pop("labels")
        features = twin.bert(**batch).pooler_output
        mixed = 0.3 * features + 0.7 * features.flip(0)
        target_probs = torch.nn.functional.one_hot(labels, 3).double()
        target_probs = 0.3 * target_probs + 0.7 * target_probs.flip(0)
        losses.append(ldam_of_soft_targets(twin.classifier(mixed), target_probs))
    assert len(losses) == parts
    expected = sum(losses) / parts
    assert logged(trainer, "loss")[0] == pytest.approx(expected.item(), rel=1e-6)
    expected.backward()
    new, old = (flat(model.parameters()) for model in (trainer.model, twin))
    gradient = flat(parameter.grad for parameter in twin.parameters())
    step = (old - new) / trainer.args.learning_rate
    assert (step - gradient).norm() <= 1e-6 * gradient.norm()


def test_nothing_but_the_order_changes_where_nothing_is_mixed(tmp_path, monkeypatch):
    """With lam 0 every row is replaced by its partner, features and soft targets alike."""
    monkeypatch.setattr(np.random, "beta", lambda *_: 0.0)
    ends = []
    for mixup in (0.0, 0.2):
        trainer = make_trainer(
            tmp_path,
            make_model().double(),
            callbacks=[DRWCallback(mixup=mixup, start=2)],
            per_device_train_batch_size=5,
            gradient_accumulation_steps=2,
            num_train_epochs=3,
            max_steps=-1,
            max_grad_norm=0.0,
            optim="sgd",
        )
        trainer.train()
        ends.append(flat(trainer.model.parameters()))
    assert (ends[0] - ends[1]).norm() <= 1e-12 * ends[0].norm()


def test_evaluation_and_calls_by_hand_are_not_mixed(fixed, tmp_path):
    data = make_data()
    callback = DRWCallback(mixup=0.2)
    evaluating = {"eval_dataset": data, "eval_strategy": "steps", "eval_steps": 4}
    trainer = make_trainer(tmp_path, data=data, callbacks=[callback], **evaluating)
    inputs, labels = tensors(data)
    noted = []

    class Caller(Trainer):
        def log(self, logs, *arguments, **options):
            plain = copy.deepcopy(self.model).train()
            noted.append((self.model(**inputs).logits, plain(**inputs).logits))
            return super().log(logs, *arguments, **options)

    trainer.__class__ = Caller
    trainer.train()
    for inside, plain in noted:
        torch.testing.assert_close(inside, plain)
    logits = trainer.model.eval()(**inputs).logits
    stock = torch.nn.functional.cross_entropy(logits, labels)
    assert logged(trainer, "eval_loss") == pytest.approx([stock.item()], rel=1e-5)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(stock.item(), rel=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # dynamo's own look at it
def test_compiled_models_are_mixed_as_well(tmp_path):
    ends = []
    for mixup, compiled in ((0.0, True), (0.2, True), (0.0, True), (0.2, False)):
        trainer = make_trainer(
            tmp_path,
            make_model(),
            callbacks=[DRWCallback(mixup=mixup)],
            torch_compile=compiled,
            torch_compile_backend="eager" if compiled else None,
        )
        trainer.train()
        ends.append(logged(trainer, "loss"))
    plain, mixed, again, eager = ends
    assert plain == pytest.approx(again)
    assert eager == pytest.approx(mixed)
    assert plain != pytest.approx(mixed, rel=0.01)


def hooks(model):
    """Those of Mixup: the head has a guard of its own."""
    every = [hook for m in model.modules() for hook in m._forward_pre_hooks.values()]
    return [hook for hook in every if not isinstance(hook, HeadGuard)]


def test_nothing_is_left_on_the_model(tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[DRWCallback(mixup=0.2)])
    trainer.train()
    assert not hooks(trainer.model)


class Boom(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        raise RuntimeError("boom")


def test_hooks_left_by_an_error_do_nothing_and_go(fixed, tmp_path):
    model = use_cosine_head(make_model())
    broken = make_trainer(tmp_path, model, callbacks=[DRWCallback(mixup=0.2), Boom()])
    with pytest.raises(RuntimeError, match="boom"):
        broken.train()
    assert hooks(model)
    twin = copy.deepcopy(model)
    for module in twin.modules():
        module._forward_pre_hooks.clear()
    ends = []
    for one in (twin, model):
        callbacks = [DRWCallback(mixup=0.2)]
        trainer = make_trainer(tmp_path, one, callbacks=callbacks, **ONE_BATCH)
        trainer.train()
        ends.append(logged(trainer, "loss"))
    assert ends[0] == ends[1]
    assert not hooks(model)


@pytest.mark.parametrize("name", ["GPT2", "Llama"])
def test_features_of_single_tokens_are_refused(name, tmp_path):
    trainer = make_trainer(tmp_path, make_model(name), callbacks=[DRWCallback(mixup=0.2)])
    with pytest.raises(ValueError, match=r"`mixup` must be 0 for a head .*\(8, 8, 16\)"):
        trainer.train()


def test_rows_without_a_label_are_refused(tmp_path):
    data = make_data()
    labels = [-100, *data["label"][1:]]
    data = data.remove_columns("label").add_column("label", labels)
    trainer = make_trainer(tmp_path, data=data, callbacks=[DRWCallback(mixup=0.2)], **ONE_BATCH)
    with pytest.raises(ValueError, match=r"`labels` must be in 0..2 for Mixup"):
        trainer.train()


def test_a_model_that_goes_round_its_head_is_refused(tmp_path):
    model = make_model()

    def around(input_ids, attention_mask, **inputs):
        features = model.bert(input_ids, attention_mask).pooler_output
        return {"logits": torch.nn.functional.linear(features, model.classifier.weight)}

    trainer = make_trainer(tmp_path, model, callbacks=[DRWCallback(mixup=0.2)], **ONE_BATCH)
    model.forward = around
    with pytest.raises(RuntimeError, match="without its head"):
        trainer.train()


@pytest.mark.parametrize("mixup", [-0.1, float("nan"), float("inf")])
def test_bad_alpha(mixup):
    with pytest.raises(ValueError, match=r"`mixup` must be a finite number >= 0"):
        DRWCallback(mixup=mixup)


def test_mixing_ends_where_it_is_told_to(tmp_path):
    """The later steps are those of a training without it, which draws no partners."""
    noted = []

    class Targets(DRWCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            super().on_pre_optimizer_step(args, state, control, **kwargs)
            noted.append(calling_trainer(self).compute_loss_func.__self__.mixup is not None)

    options = {"max_steps": 9, "per_device_train_batch_size": 8}  # three steps an epoch
    make_trainer(tmp_path, callbacks=[Targets(mixup=1.0, mix_until=2)], **options).train()
    assert noted == [True] * 6 + [False] * 3
    noted.clear()
    make_trainer(tmp_path, callbacks=[Targets(mixup=1.0, mix_until=0.5)], **options).train()
    assert noted == [True] * 5 + [False] * 4
    late = make_trainer(tmp_path, callbacks=[DRWCallback(mixup=1.0, mix_until=3)], **options)
    with pytest.raises(ValueError, match=r"`mix_until` must be before the end .* at epoch 3"):
        late.train()
    with pytest.raises(ValueError, match=r"`mix_until` must be left out without mixup, got 0\.5"):
        DRWCallback(mix_until=0.5)
