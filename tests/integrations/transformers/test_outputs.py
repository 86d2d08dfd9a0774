"""Whatever form a model's output has: one tensor is the logits, for the loss and the metrics."""

from typing import NamedTuple

import pytest
import torch
from hf_samples import COUNTS, ldam_oracle, logged, make_data, make_model, make_trainer
from torch import nn
from transformers import Trainer, TrainerCallback, default_data_collator
from transformers.modeling_outputs import SequenceClassifierOutput

from ldam_plugins import LongTailMetrics, create_loss, use_cosine_head
from ldam_plugins.integrations.transformers import DRWCallback
from ldam_plugins.losses.model_outputs import find_logits
from ldam_plugins.metrics import long_tail_metrics


class _Named(NamedTuple):
    logits: torch.Tensor
    features: torch.Tensor


class _NamedLast(NamedTuple):
    features: torch.Tensor
    logits: torch.Tensor


class _Output(SequenceClassifierOutput):
    pass


# What forward returns of its logits z (N, C) and features h (N, H).
WHOLE = {
    "dict": lambda z, h: {"logits": z},
    "dict, features first": lambda z, h: {"features": h, "tokens": h[:, None], "logits": z},
    "dict, another name": lambda z, h: {"features": h, "scores": z},
    "output of transformers": lambda z, h: SequenceClassifierOutput(logits=z, hidden_states=(h,)),
    "tuple, features first": lambda z, h: (h, z),
    "list, features first": lambda z, h: [h, z],
    "named tuple, features first": lambda z, h: _NamedLast(h, z),
}
LOST = {
    "tensor": lambda z, h: z,
    "tuple of one": lambda z, h: (z,),
    "tuple": lambda z, h: (z, h),
    "list": lambda z, h: [z, h],
    "named tuple": lambda z, h: _Named(z, h),
}


class _Net(nn.Module):
    def __init__(self, form=WHOLE["dict"]):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.classifier, self.form = nn.Embedding(50, 16), nn.Linear(16, 3), form

    def forward(self, input_ids, labels=None):
        features = self.embed(input_ids).mean(1)
        return self.form(self.classifier(features), features)


def _trainer(folder, model, **options):
    options = {"callbacks": [DRWCallback()], "per_device_train_batch_size": 24, **options}
    return make_trainer(folder, model, **{"max_steps": 1, **options})


def _right(model, data):
    with torch.no_grad():
        features = model.embed(torch.tensor(data["input_ids"])).mean(1)
        return model.classifier.eval()(features), torch.tensor(data["label"])


@pytest.mark.parametrize("form", WHOLE, ids=str)
def test_loss_and_metrics_take_the_same_logits(form, tmp_path):
    data, model = make_data(), _Net(WHOLE[form])
    trainer = _trainer(
        tmp_path, model, compute_metrics=LongTailMetrics(COUNTS), eval_dataset=data, data=data
    )
    want = ldam_oracle(*_right(model, data))
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(want.item(), rel=1e-5)
    logits, labels = _right(model, data)
    found = trainer.evaluate()
    for key, value in long_tail_metrics(logits, labels, COUNTS).items():
        if isinstance(value, float):
            assert found[f"eval_{key}"] == pytest.approx(value, rel=1e-5)
    plain = nn.functional.cross_entropy(logits, labels)
    assert found["eval_loss"] == pytest.approx(plain.item(), rel=1e-5)


@pytest.mark.parametrize("form", LOST, ids=str)
def test_logits_the_trainer_would_drop_are_refused_before_the_first_update(form, tmp_path):
    model = _Net(LOST[form])
    trainer = _trainer(tmp_path, model)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r'returns a dict.*\{"logits": logits, \.\.\.\}'):
        trainer.train()
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("form", ["tensor", "tuple"])
def test_nor_does_the_loss_alone_take_them_from_a_trainer(form, tmp_path):
    loss = create_loss("ce", COUNTS).compute_loss_func
    trainer = _trainer(tmp_path, _Net(LOST[form]), callbacks=[], compute_loss_func=loss)
    for call in (trainer.train, lambda: trainer.predict(make_data())):
        with pytest.raises(ValueError, match="returns a dict"):
            call()


def test_a_trainer_that_predicts_in_its_own_way_may_keep_tensors(tmp_path):
    class Own(Trainer):
        def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
            labels = inputs.pop("labels")
            with torch.no_grad():
                logits = model(**inputs)
            return nn.functional.cross_entropy(logits, labels), logits, labels

    model = _Net(LOST["tensor"])
    trainer = _trainer(tmp_path, model, kind=Own)
    trainer.train()
    logits, _ = _right(model, make_data())
    found = torch.from_numpy(trainer.predict(make_data()).predictions)
    torch.testing.assert_close(found, logits)


def test_two_outputs_of_one_shape_are_not_guessed_between(tmp_path):
    model = _Net(lambda z, h: (h, z, z + 1))
    with pytest.raises(ValueError, match="or one so named"):
        _trainer(tmp_path, model).train()


def test_a_second_tensor_of_the_logits_shape_beside_named_ones(tmp_path):
    data, model = make_data(), _Net(lambda z, h: {"teacher": -z, "logits": z})
    metric = {"compute_metrics": LongTailMetrics(COUNTS), "eval_dataset": data, "data": data}
    trainer = _trainer(tmp_path, model, **metric)
    want = ldam_oracle(*_right(model, data))
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(want.item(), rel=1e-5)
    with pytest.raises(ValueError, match="preprocess_logits_for_metrics"):
        trainer.evaluate()
    trainer.preprocess_logits_for_metrics = lambda outputs, labels: outputs[1]
    error = long_tail_metrics(*_right(model, data), COUNTS)["top1_error"]
    assert trainer.evaluate()["eval_top1_error"] == pytest.approx(error)


def test_find_logits_in_objects_and_arrays():
    logits = torch.zeros(4, 3)
    assert find_logits(logits.numpy(), 4, 3).shape == (4, 3)
    assert find_logits(_Output(logits=logits), 4, 3) is logits
    assert find_logits({"logits": (logits, logits[:, :2])}, 4, 3) is logits
    with pytest.raises(ValueError, match=r"\(4, 3\).*\[\(3, 4\)\]"):
        find_logits((logits.T,), 4, 3)
    with pytest.raises(ValueError, match="'NoneType'"):
        find_logits(None, 4, 3)


class TestLabels:
    def test_with_a_second_axis_train_as_without(self, tmp_path):
        def column(rows):
            batch = default_data_collator(rows)
            return {**batch, "labels": batch["labels"][:, None]}

        data = make_data()
        lists = data.remove_columns("label").add_column("labels", [[y] for y in data["label"]])
        runs = [
            {},
            {"data": lists},
            {"data_collator": column},
            {"data": lists, "callbacks": [DRWCallback(class_counts=COUNTS, start=0.5)]},
        ]
        losses = []
        for options in runs:
            options = {"callbacks": [DRWCallback(start=0.5)], **options}
            trainer = make_trainer(tmp_path, make_model(), eval_dataset=data, **options)
            trainer.train()
            losses.append([*logged(trainer, "loss"), trainer.evaluate()["eval_loss"]])
        assert losses[1:] == [losses[0]] * 3

    def test_one_a_token_is_told_so(self, tmp_path):
        model = _Net(lambda z, h: {"logits": z[:, None].expand(-1, 8, -1)})
        trainer = _trainer(tmp_path, use_cosine_head(model, head="classifier"))
        with pytest.raises(ValueError, match="not one a token"):
            trainer.train()

    @pytest.mark.parametrize("keyword_only", [False, True])
    def test_a_forward_that_needs_them_is_refused(self, keyword_only, tmp_path):
        class Needs(_Net):
            def forward(self, input_ids, labels):
                return super().forward(input_ids)

        class NeedsByName(_Net):
            def forward(self, input_ids, *, labels):
                return super().forward(input_ids)

        trainer = _trainer(tmp_path, NeedsByName() if keyword_only else Needs())
        with pytest.raises(ValueError, match="labels=None"):
            trainer.train()
        _trainer(tmp_path, _Net()).train()  # which is what the error asks for

    @pytest.mark.parametrize("by_key", [False, True])
    def test_a_forward_that_uses_them_unasked_is_told_so(self, by_key, tmp_path):
        class Uses(_Net):
            def forward(self, input_ids, labels=None):
                outputs = super().forward(input_ids)
                return {"loss": nn.functional.cross_entropy(outputs["logits"], labels), **outputs}

        class UsesByKey(_Net):
            def forward(self, **batch):
                outputs = super().forward(batch["input_ids"])
                return {"loss": outputs["logits"].mean() * batch["labels"].sum(), **outputs}

        model = UsesByKey() if by_key else Uses()
        options = {
            "remove_unused_columns": False,
            "data": make_data().remove_columns("attention_mask"),
        }
        trainer = _trainer(tmp_path, use_cosine_head(model, head="classifier"), **options)
        with pytest.raises(ValueError, match=r"works without labels.*labels=None") as caught:
            trainer.train()
        assert isinstance(caught.value.__cause__, KeyError if by_key else TypeError)
        assert "forward" not in vars(model)

    def test_another_error_of_a_forward_stays_its_own(self, tmp_path):
        class Wrong(_Net):
            def forward(self, input_ids, labels=None):
                raise TypeError("an own one")

        with pytest.raises(TypeError, match=r"^an own one$"):
            _trainer(tmp_path, use_cosine_head(Wrong(), head="classifier")).train()

    def test_a_forward_without_them_drops_a_column(self, tmp_path):
        class Without(_Net):
            def forward(self, input_ids):
                return super().forward(input_ids)

        data = make_data().rename_column("label", "labels")
        with pytest.raises(ValueError, match=r'rename_column\("...", "label"\)'):
            _trainer(tmp_path, Without(), data=data).train()
        given = {"data": data, "callbacks": [DRWCallback(class_counts=COUNTS)]}
        with pytest.raises(ValueError, match=r'label_names=\["labels"\]'):
            _trainer(tmp_path, Without(), **given).train()
        _trainer(tmp_path, Without(), data=data, label_names=["labels"]).train()
        _trainer(tmp_path, Without(), data=data.rename_column("labels", "label")).train()


class TestGivenCounts:
    """Counts that the labels contradict are used, with one warning."""

    @pytest.mark.parametrize("explicit", [False, True])
    def test_that_differ_from_known_labels(self, explicit, tmp_path):
        callback = DRWCallback(class_counts=COUNTS[::-1])
        if explicit:
            callback = DRWCallback(create_loss("ldam", COUNTS[::-1]))
        trainer = make_trainer(tmp_path, callbacks=[callback], max_steps=2)
        with pytest.warns(UserWarning, match="class_counts") as told:
            trainer.train()
        assert len(told) == 1
        assert "[2, 6, 16] " in str(told[0].message)
        assert "[16, 6, 2] " in str(told[0].message)
        assert callback.criterion.class_counts.counts.tolist() == COUNTS[::-1]

    def test_that_agree_or_cannot_be_checked_cheaply(self, tmp_path):
        class Rows(torch.utils.data.Dataset):
            loaded = 0

            def __len__(self):
                return 24

            def __getitem__(self, index):
                self.loaded += 1
                return data[index]

        class Loaded(TrainerCallback):
            def on_train_begin(self, args, state, control, **kwargs):
                assert not rows.loaded

        data, rows = make_data(), Rows()
        _trainer(tmp_path, make_model(), callbacks=[DRWCallback(class_counts=COUNTS)]).train()
        given = [DRWCallback(class_counts=COUNTS[::-1]), Loaded()]
        _trainer(tmp_path, make_model(), data=rows, callbacks=given).train()

    def test_that_differ_from_labels_read_for_sampling(self, tmp_path):
        rows = [dict(row) for row in make_data()]
        given = [DRWCallback(class_counts=COUNTS[::-1], schedule="rs")]
        trainer = _trainer(tmp_path, make_model(), data=rows, callbacks=given)
        with pytest.warns(UserWarning, match=r"0: 2 given, 16 found"):
            trainer.train()
