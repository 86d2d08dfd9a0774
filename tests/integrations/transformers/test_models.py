"""Every model family: what is trained, against an oracle, and what plain transformers reloads."""

import copy

import pytest
import torch
from hf_samples import (
    COUNTS,
    MODELS,
    effective_weights,
    ldam_oracle,
    logged,
    make_data,
    make_model,
    make_trainer,
    tensors,
)
from transformers import Trainer

from ldam_plugins import DeferredSchedule, use_cosine_head
from ldam_plugins.heads import cosine_heads
from ldam_plugins.integrations.transformers import DRWCallback

RATE = 0.01


def _vector(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def _oracle_run(model, data, weights_per_step):
    """Plain gradient descent on the whole set; returns the losses."""
    inputs, labels = tensors(data)
    model.train()
    losses = []
    for weights in weights_per_step:
        loss = ldam_oracle(model(**inputs).logits, labels, weights=weights)
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= RATE * parameter.grad
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", MODELS)
def test_trains_ldam_drw_and_reloads_as_a_stock_model(name, tmp_path):
    data = make_data(name)
    trainer = make_trainer(
        tmp_path,
        make_model(name),
        data,
        [DRWCallback(start=2)],  # an epoch is one update
        max_steps=3,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=3,
        optim="sgd",
        learning_rate=RATE,
        max_grad_norm=0.0,
        save_strategy="steps",
        save_steps=3,
    )
    (head,) = cosine_heads(trainer.model).values()
    twin = copy.deepcopy(trainer.model)
    trainer.train()

    ones = torch.ones(len(COUNTS))
    expected = _oracle_run(twin, data, [ones, ones, effective_weights()])
    assert logged(trainer, "loss") == pytest.approx(expected, rel=2e-5)
    for trained, wanted in zip(trainer.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(trained, wanted, rtol=1e-4, atol=1e-5)

    inputs, _ = tensors(data)
    trainer.model.eval()
    trainer.save_model(tmp_path / "saved")
    with torch.no_grad():
        logits = trainer.model(**inputs).logits
        assert logits.abs().max() <= head.scale * (1 + 1e-5)
        for folder in ("saved", "checkpoint-3"):
            stock, found = type(trainer.model).from_pretrained(
                tmp_path / folder, output_loading_info=True
            )
            assert not cosine_heads(stock)
            assert not found["missing_keys"]
            assert not found["mismatched_keys"]
            reloaded = stock.eval()(**inputs).logits
            assert torch.equal(reloaded.argmax(1), logits.argmax(1))
            turned = torch.nn.functional.cosine_similarity(reloaded, logits)
            assert turned.min() > 1 - 1e-5  # one positive factor a row apart


class TestOtherKinds:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_models(self, dtype, tmp_path):
        trainer = make_trainer(
            tmp_path, make_model().to(dtype), callbacks=[DRWCallback(start=0.5)], learning_rate=1e-3
        )
        trainer.train()
        assert trainer.model.classifier.weight.dtype == dtype
        assert torch.tensor(logged(trainer, "loss")).isfinite().all()

    @pytest.mark.parametrize("start", [0.5, DeferredSchedule("drw", 2, "step")])
    def test_iterable_data_without_length(self, start, tmp_path):
        given = {"schedule": start} if isinstance(start, DeferredSchedule) else {"start": start}
        trainer = make_trainer(
            tmp_path,
            data=make_data().to_iterable_dataset(),
            callbacks=[DRWCallback(class_counts=COUNTS, **given)],
        )
        trainer.train()
        stages = [
            (e["drw_stage"], e["step"]) for e in trainer.state.log_history if "drw_stage" in e
        ]
        assert stages == [("uniform", 0), ("reweighted", 2)]

    def test_a_head_put_on_before_stays(self, tmp_path):
        model = use_cosine_head(make_model(), init="keep")
        head = model.classifier
        trainer = make_trainer(tmp_path, model, callbacks=[DRWCallback()])
        assert trainer.model.classifier is head
        trainer.train()

    def test_a_chunked_head_trains_as_the_plain_one(self, tmp_path):
        losses = []
        for chunked in (False, True):
            model = use_cosine_head(make_model(), init="keep", chunked=chunked)
            trainer = make_trainer(tmp_path, model, callbacks=[DRWCallback(start=0.5)])
            trainer.train()
            assert trainer.model.classifier.chunked is chunked
            losses.append(logged(trainer, "loss"))
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)

    def test_model_init_that_puts_the_head_on(self, tmp_path):
        trainer = make_trainer(
            tmp_path, model_init=lambda: use_cosine_head(make_model()), callbacks=[DRWCallback()]
        )
        trainer.train()
        assert "classifier.cosine_weight" in trainer.model.state_dict()

    @pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # by peft
    def test_lora_trains_the_head_in_full(self, tmp_path):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"])
        model = peft.get_peft_model(use_cosine_head(make_model()), config)
        trainer = make_trainer(
            tmp_path, model, callbacks=[DRWCallback()], save_strategy="steps", save_steps=2
        )
        before = _vector(trainer.model)
        trainer.train()
        (head,) = [h for h in cosine_heads(model).values() if h.weight.requires_grad]
        assert (_vector(trainer.model) != before).any()
        again = peft.get_peft_model(use_cosine_head(make_model()), config)
        resumed = make_trainer(tmp_path, again, callbacks=[DRWCallback()])
        resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-2")
        (other,) = [h for h in cosine_heads(again).values() if h.weight.requires_grad]
        assert torch.equal(head.weight, other.weight)

    def test_a_subclass_may_add_to_the_loss(self, tmp_path):
        class Penalised(Trainer):
            def compute_loss(self, model, inputs, return_outputs=False, **options):
                loss, outputs = super().compute_loss(model, inputs, True, **options)
                loss = loss + 0.01 * outputs["logits"].pow(2).mean()
                return (loss, outputs) if return_outputs else loss

        trainer = make_trainer(tmp_path, callbacks=[DRWCallback()], kind=Penalised)
        trainer.train()
        assert trainer.state.global_step == 4
