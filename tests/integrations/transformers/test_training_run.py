"""A run under a loss and a schedule: cut, resumed, re-sampled and compiled."""

import copy
import itertools

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler
from hf_samples import (
    COUNTS,
    Spy,
    effective_weights,
    ldam_oracle,
    logged,
    make_data,
    make_model,
    make_trainer,
    tensors,
)
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from transformers import Trainer, TrainerCallback
from transformers.utils import logging

from ldam_plugins import create_loss
from ldam_plugins.integrations.transformers import DRWCallback


def _parameters(trainer):
    return torch.cat([p.detach().flatten() for p in trainer.model.parameters()])


def _losses(trainer):
    return torch.tensor(logged(trainer, "loss"))


class TestSplit:
    """One update on all 64 rows, however they are cut, before and after the switch."""

    @pytest.mark.parametrize("name", ["Bert", "Llama", "ConvNext"])
    @pytest.mark.parametrize("loss", ["ce", "ldam"])
    def test_micro_batches_change_nothing(self, name, loss, tmp_path):
        data = make_data(name, [45, 15, 4])
        ends = []
        for size, parts in [(64, 1), (8, 8)]:
            trainer = make_trainer(
                tmp_path,
                make_model(name),
                data,
                [DRWCallback(loss=loss, start=1)],
                max_steps=2,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=parts,
                optim="sgd",
                max_grad_norm=0.0,
            )
            trainer.train()
            ends.append((_losses(trainer), _parameters(trainer)))
        (loss_one, one), (loss_many, many) = ends
        torch.testing.assert_close(loss_many, loss_one, rtol=1e-6, atol=0)
        assert (many - one).norm() <= 1e-6 * one.norm()

    def test_ragged_micro_batches_and_ignored_rows(self, tmp_path):
        data = make_data(counts=[16, 6, 2])
        labels = [-100 if i % 5 == 0 else y for i, y in enumerate(data["label"])]
        data = data.remove_columns("label").add_column("label", labels)
        kept = [labels.count(c) for c in range(3)]
        callback = DRWCallback(schedule="rw")
        trainer = make_trainer(
            tmp_path,
            data=data,
            callbacks=[callback],
            max_steps=1,
            per_device_train_batch_size=7,
            gradient_accumulation_steps=4,
        )
        twin = copy.deepcopy(trainer.model).train()
        trainer.train()
        assert callback.criterion.class_counts.counts.tolist() == kept
        inputs, labels = tensors(data)
        rows = labels >= 0
        logits = twin(**inputs).logits[rows]
        wanted = ldam_oracle(logits, labels[rows], kept, weights=effective_weights(kept))
        assert logged(trainer, "loss")[0] == pytest.approx(wanted.item(), rel=1e-5)


class TestResume:
    @pytest.mark.parametrize("kind", ["drw", "drs", "progressive"])
    @pytest.mark.parametrize("step", [2, 4, 5])  # 3 updates an epoch, the switch at 3
    def test_goes_on_to_the_bit(self, kind, step, tmp_path):
        def trainer():
            return make_trainer(
                tmp_path,
                make_model(dropout=0.1),
                callbacks=[DRWCallback(schedule=kind, start=0.34)],
                max_steps=7,
                save_strategy="steps",
                save_steps=1,
            )

        straight, resumed = trainer(), trainer()
        straight.train()
        resumed.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-{step}")
        assert torch.equal(_parameters(straight), _parameters(resumed))
        assert torch.equal(_losses(straight), _losses(resumed))

    @pytest.mark.parametrize(("kind", "start"), [("drw", 0.34), ("drs", 1)])
    def test_leaves_the_log_of_an_undisturbed_run(self, kind, start, tmp_path):
        def trainer(folder, **more):
            callback = DRWCallback(schedule=kind, start=start)
            saving = {"max_steps": 7, "save_strategy": "steps", "save_steps": 1, **more}
            return make_trainer(tmp_path / folder, callbacks=[callback], **saving)

        def entries(done):
            timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second")
            log = done.state.log_history
            return [{k: v for k, v in e.items() if k not in (*timed, "train_loss")} for e in log]

        straight = trainer("whole")
        straight.train()
        for step in (2, 3, 4):  # 3 updates an epoch, the switch at 3
            resumed = trainer("again", save_strategy="no")
            resumed.train(resume_from_checkpoint=f"{tmp_path}/whole/checkpoint-{step}")
            assert entries(resumed) == entries(straight)

    def test_a_schedule_goes_by_the_length_at_its_beginning(self, tmp_path):
        class Shortens(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                if state.global_step == 4:
                    state.max_steps = 5

        trainer = make_trainer(
            tmp_path, callbacks=[DRWCallback(start=0.8), Shortens()], max_steps=10
        )
        trainer.train()
        assert logged(trainer, "drw_stage") == ["uniform"]  # the switch was to be at 8

    def test_checkpoint_in_several_files(self, tmp_path):
        trainer = make_trainer(tmp_path, callbacks=[DRWCallback()])
        trainer.train()
        trainer.model.save_pretrained(tmp_path / "parts", max_shard_size="4KB")
        assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
        other = make_trainer(tmp_path, callbacks=[DRWCallback()])
        other._load_from_checkpoint(str(tmp_path / "parts"))
        assert torch.equal(_parameters(trainer), _parameters(other))

    @pytest.mark.parametrize(("name", "loss"), [("Bert", "ce"), ("Llama", "ldam")])
    def test_from_a_checkpoint_that_knew_nothing_of_it(self, name, loss, tmp_path):
        data = make_data(name)
        options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4}
        make_trainer(tmp_path, make_model(name), data, **options).train()
        callback = DRWCallback(loss=loss, start=0.5)
        spy = Spy(callback)
        trainer = make_trainer(tmp_path, make_model(name), data, [callback, spy], **options)
        trainer.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-4")
        assert logged(trainer, "drw_stage") == ["reweighted"]
        torch.testing.assert_close(
            torch.tensor(spy.weights), effective_weights().expand(2, 3), rtol=1e-6, atol=0
        )

    def test_from_an_ordinary_head_with_a_bias_says_what_to_write(self, tmp_path):
        options = {"save_strategy": "steps", "save_steps": 4}
        make_trainer(tmp_path, **options).train()
        trainer = make_trainer(tmp_path, callbacks=[DRWCallback()], **options)
        with pytest.raises(RuntimeError, match="use_cosine_head"):
            trainer.train(resume_from_checkpoint=f"{tmp_path}/checkpoint-4")


class TestSampling:
    def _labels_seen(self, trainer):
        seen = []
        stock = trainer.data_collator

        def note(rows):
            batch = stock(rows)
            seen.extend(batch["labels"].tolist())
            return batch

        trainer.data_collator = note
        trainer.train()
        return seen

    def test_deferred_sampling_balances_from_the_switch_on(self, tmp_path):
        counts = [160, 60, 20]
        trainer = make_trainer(
            tmp_path,
            data=make_data(counts=counts),
            callbacks=[DRWCallback(schedule="drs", start=1)],
            per_device_train_batch_size=24,
            max_steps=30,
        )
        seen = self._labels_seen(trainer)
        first, second, third = torch.tensor(seen)[:720].split(240)
        assert first.bincount().tolist() == counts  # every sample once
        assert second.bincount(minlength=3).min() > 50  # about 80 each
        assert not torch.equal(second, third)

    def test_another_seed_gives_another_order(self, tmp_path):
        orders = [
            self._labels_seen(
                make_trainer(tmp_path, callbacks=[DRWCallback(schedule="rs", seed=seed)])
            )
            for seed in (0, 0, 1)
        ]
        assert orders[0] == orders[1] != orders[2]


class _Own(Trainer):
    """Chooses the rows of an epoch itself."""

    own = None

    def _get_train_sampler(self, train_dataset=None):
        return type(self).own(self.train_dataset)


def _first_half(rows):
    return SubsetRandomSampler(range(len(rows) // 2))


OWN_SAMPLERS = {
    "SubsetRandomSampler": _first_half,
    "SequentialSampler": SequentialSampler,
    "WeightedRandomSampler": lambda rows: WeightedRandomSampler([1.0] * len(rows), len(rows)),
    "SeedableRandomSampler": lambda rows: RandomSampler(rows, replacement=True, num_samples=48),
}


class TestSamplerOfTheUsers:
    @pytest.mark.parametrize("kind", ["rs", "drs", "progressive"])
    @pytest.mark.parametrize("name", OWN_SAMPLERS)
    def test_is_not_replaced(self, name, kind, tmp_path, monkeypatch):
        monkeypatch.setattr(_Own, "own", staticmethod(OWN_SAMPLERS[name]))
        callback = DRWCallback(schedule=kind, start=0.5)
        trainer = make_trainer(tmp_path, callbacks=[callback], kind=_Own)
        with pytest.raises(ValueError, match=f"`sampler` must be .*'{name}'.*schedule='drw'"):
            trainer.train()

    def test_batches_of_the_users_are_not_replaced(self, tmp_path):
        class Pairs(BatchSampler):
            pass

        class OwnBatches(Trainer):
            def get_train_dataloader(self):
                batches = Pairs(RandomSampler(self.train_dataset), 2, drop_last=False)
                rows = self._remove_unused_columns(self.train_dataset)
                loader = DataLoader(rows, batch_sampler=batches, collate_fn=self.data_collator)
                return self.accelerator.prepare(loader)

        callback = DRWCallback(schedule="rs")
        trainer = make_trainer(tmp_path, callbacks=[callback], kind=OwnBatches)
        with pytest.raises(ValueError, match=r"`sampler` must be .*'Pairs'"):
            trainer.train()

    @pytest.mark.parametrize(
        ("kind", "counts", "said"),
        [
            ("drw", None, "counted in the whole train_dataset, and the class weights"),
            ("drw", COUNTS, "are trained on: the class weights"),
            ("none", None, "counted in the whole train_dataset. Give"),
            ("none", COUNTS, None),
        ],
    )
    def test_is_kept_by_other_schedules_and_spoken_of(
        self, kind, counts, said, tmp_path, monkeypatch, caplog
    ):
        monkeypatch.setattr(_Own, "own", staticmethod(_first_half))
        seen = []

        class Notes(_Own):
            def training_step(self, model, inputs, *rest):
                seen.append(len(inputs["labels"]))
                return super().training_step(model, inputs, *rest)

        callback = DRWCallback(schedule=kind, class_counts=counts)
        trainer = make_trainer(tmp_path, callbacks=[callback], kind=Notes, max_steps=2)
        logging.enable_propagation()
        trainer.train()
        logging.disable_propagation()
        assert sum(seen) == 12  # the kept half, once
        assert ("SubsetRandomSampler" in caplog.text) == (said is not None)
        assert (said or "") in caplog.text

    def test_a_kept_loader_gets_its_own_order_back(self, tmp_path):
        class KeepsLoader(Trainer):
            kept = None

            def get_train_dataloader(self):
                self.kept = self.kept or super().get_train_dataloader()
                return self.kept

        callback = DRWCallback(schedule="drs", start=1)
        trainer = make_trainer(tmp_path, callbacks=[callback], kind=KeepsLoader, max_steps=6)
        for _ in range(2):
            trainer.train()
            assert isinstance(trainer.kept.get_sampler(), SeedableRandomSampler)

    def test_rows_that_come_or_go_are_refused(self, tmp_path):
        class Grows(torch.utils.data.Dataset):
            rows = make_data().with_format("torch")
            size = 16

            def __len__(self):
                return self.size

            def __getitem__(self, row):
                return self.rows[row]

        data = Grows()

        class Grow(TrainerCallback):
            def on_epoch_end(self, args, state, control, **kwargs):
                data.size = 24

        callbacks = [DRWCallback(schedule="rs"), Grow()]
        data.size = 24
        trainer = make_trainer(tmp_path, data=data, callbacks=callbacks)
        trainer.train()
        trainer = make_trainer(tmp_path, data=data, callbacks=callbacks)
        data.size = 16
        with pytest.raises(RuntimeError, match="24 rows now and had 16"):
            trainer.train()


class TestCompile:
    def test_the_switch_compiles_nothing_anew(self, tmp_path):
        counters = torch._dynamo.utils.counters
        graphs = []

        class Count(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                graphs.append(counters["stats"]["unique_graphs"])

        torch._dynamo.reset()
        counters.clear()
        callback = DRWCallback(start=0.5)
        spy = Spy(callback)
        trainer = make_trainer(
            tmp_path,
            callbacks=[callback, spy, Count()],
            max_steps=6,
            torch_compile=True,
            torch_compile_backend="eager",
        )
        trainer.train()
        assert [weights != [1, 1, 1] for weights in spy.weights] == [False] * 3 + [True] * 3
        assert graphs[0] > 0
        assert graphs == [graphs[0]] * 6
        torch._dynamo.reset()


def test_weights_do_not_change_the_mean_size_of_the_loss():
    criterion = create_loss("ldam", COUNTS)
    logits = torch.zeros(24, 3)
    labels = torch.arange(3).repeat_interleave(torch.tensor(COUNTS))
    flat = create_loss("ce", COUNTS).compute_loss_func(logits, labels, 24)
    for weights in itertools.permutations([0.1, 1.0, 5.0]):
        criterion.weight.copy_(torch.tensor(weights))
        ce = create_loss("ce", COUNTS)
        ce.weight.copy_(criterion.weight)
        torch.testing.assert_close(ce.compute_loss_func(logits, labels, 24), flat)
