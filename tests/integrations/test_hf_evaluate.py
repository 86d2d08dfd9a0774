import pickle
import socket

import evaluate
import numpy as np
import pytest
import torch
from transformers import EvalPrediction, Trainer, TrainerCallback, TrainingArguments

import ldam_plugins
from ldam_plugins import ClassCounts, LongTailMetrics
from ldam_plugins.metrics import long_tail_metrics

COUNTS = ClassCounts([500, 50, 5], class_names=["dog", "cat", "lynx"])
FLAT = ["top1_error", "balanced_error", "train_prior_error", "balanced_accuracy"]
FLAT += ["worst_class_accuracy", "many", "medium", "few", "nll", "ece"]
FLAT += [f"{mean}_{n}" for mean in ("macro", "weighted") for n in ("precision", "recall", "f1")]


@pytest.fixture(autouse=True)
def _offline_and_without_locks(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("network or lock used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr("evaluate.module.FileLock", refuse)


@pytest.fixture
def rows():
    labels = torch.arange(31) % 3
    logits = torch.randn(31, 3)
    logits[torch.arange(31), labels] += 1
    return logits, labels


def expected(rows):
    return long_tail_metrics(*rows, COUNTS)


def test_package_gives_the_class():
    assert ldam_plugins.LongTailMetrics is LongTailMetrics
    assert issubclass(LongTailMetrics, evaluate.Metric)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_compute(rows, dtype):
    logits, labels = rows[0].to(dtype), rows[1]
    metric = LongTailMetrics(COUNTS)
    assert metric.name == "long_tail_metrics"
    result = metric.compute(predictions=logits, references=labels)
    assert result == long_tail_metrics(logits, labels, COUNTS)


def test_add_and_add_batch_then_compute_and_again(rows):
    logits, labels = rows
    metric = LongTailMetrics(COUNTS)
    for _ in range(2):
        metric.add(prediction=logits[0].tolist(), reference=0)
        metric.add_batch(predictions=logits[1:20].numpy(), references=labels[1:20].numpy())
        metric.add_batch(predictions=logits[20:], references=labels[20:])
        assert metric.compute() == expected(rows)


def test_ignored_references(rows):
    logits, labels = rows
    kept = long_tail_metrics(logits[1:], labels[1:], COUNTS)
    labels[0] = -100
    assert LongTailMetrics(COUNTS).compute(predictions=logits, references=labels) == kept


def test_two_at_once_and_combined_wait_for_no_lock(rows):
    logits, labels = rows
    first, second = LongTailMetrics(COUNTS), LongTailMetrics([5, 50, 500])
    first.add_batch(predictions=logits, references=labels)
    second.add_batch(predictions=logits, references=labels)
    assert first.compute() == expected(rows)
    assert second.compute()["few"] == expected(rows)["many"]
    both = evaluate.combine({"a": first, "b": second})
    result = both.compute(predictions=logits, references=labels)
    assert (result["a_many"], result["b_few"]) == (expected(rows)["many"],) * 2


def test_pickle(rows):
    metric = pickle.loads(pickle.dumps(LongTailMetrics(COUNTS, per_class=True)))
    assert metric.compute(predictions=rows[0], references=rows[1]) == expected(rows)
    assert metric((rows[0], rows[1]))["accuracy_lynx"] == expected(rows)["per_class_accuracy"][2]


def test_call_gives_floats_only(rows):
    prediction = EvalPrediction(rows[0].numpy(), rows[1].numpy())
    result = LongTailMetrics(COUNTS)(prediction)
    assert list(result) == FLAT
    assert all(type(value) is float for value in result.values())
    assert result.items() <= expected(rows).items()


def test_call_leaves_out_groups_and_classes_without_sample():
    logits, labels = np.eye(3, dtype=np.float32)[:2], np.arange(2)
    result = LongTailMetrics(COUNTS, per_class=True)((logits, labels))
    names = [name for name in FLAT if name != "few"]
    each = [f"{kind}_{c}" for kind in ("accuracy", "precision", "f1") for c in ("dog", "cat")]
    assert list(result) == [*names, *each]
    unnamed = LongTailMetrics(COUNTS.counts, per_class=True)((logits, labels))
    assert list(unnamed)[-2:] == ["f1_0", "f1_1"]
    logits[1] = logits[0]  # "cat" is never predicted
    result = LongTailMetrics(COUNTS, per_class=True)((logits, labels))
    assert "precision_cat" not in result
    assert (result["accuracy_cat"], result["f1_cat"]) == (0, 0)


def test_details_are_the_ends_of_intervals_for_trainer_and_all_for_evaluate(rows):
    prediction = EvalPrediction(rows[0].numpy(), rows[1].numpy())
    whole = long_tail_metrics(*rows, COUNTS, detailed=True)
    flat = LongTailMetrics(COUNTS, detailed=True)(prediction)
    assert all(type(value) is float for value in flat.values())
    for name in set(FLAT) - {"nll", "ece"}:
        assert [flat[f"{name}_low"], flat[f"{name}_high"]] == whole["intervals"][name]
    assert "nll_low" not in flat
    groups = ["a", "b"] * 15 + ["a"]
    metric = LongTailMetrics(COUNTS, detailed=True)
    given = {"predictions": rows[0].double().tolist(), "references": rows[1].tolist()}
    expected = long_tail_metrics(*given.values(), COUNTS, groups=groups, detailed=True)
    assert metric.compute(**given, groups=groups) == expected
    assert set(expected["by_group"]) == {"a", "b"}
    with pytest.raises(ValueError, match=r"`groups` must be left out.*detailed=True"):
        LongTailMetrics(COUNTS).compute(**given, groups=groups)


def test_call_takes_lists_of_batches(rows):
    logits, labels = (part.numpy() for part in rows)
    metric = LongTailMetrics(COUNTS)
    batches = EvalPrediction([logits[:20], logits[20:]], [labels[:20], labels[20:]])
    assert metric(batches) == metric((logits, labels))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_call_takes_the_output_of_the_logits_shape(rows, place):
    logits, labels = (part.numpy() for part in rows)
    others = [np.zeros((31, 7)), (np.zeros((31, 4, 3)), np.zeros((31, 4, 3)))]
    others.insert(place, logits)
    metric = LongTailMetrics(COUNTS)
    assert metric(EvalPrediction(tuple(others), labels)) == metric((logits, labels))


def test_call_does_not_guess_between_outputs_of_one_shape(rows):
    logits, labels = (part.numpy() for part in rows)
    prediction = EvalPrediction((logits, logits[::-1]), labels)
    with pytest.raises(ValueError, match="preprocess_logits_for_metrics"):
        LongTailMetrics(COUNTS)(prediction)


@pytest.mark.parametrize("outputs", [(), lambda logits: logits[1:], lambda logits: logits[:1]])
def test_call_says_where_lost_logits_went(rows, outputs):
    logits, labels = (part.numpy() for part in rows)
    outputs = outputs(logits) if callable(outputs) else outputs
    with pytest.raises(ValueError, match=r'drops the first item: .* \{"logits": logits\}'):
        LongTailMetrics(COUNTS)(EvalPrediction(outputs, labels))


def test_call_takes_labels_with_a_second_axis(rows):
    logits, labels = rows
    metric = LongTailMetrics(COUNTS)
    for column in (labels[:, None], labels.numpy()[:, None]):
        assert metric((logits, column)) == metric((logits, labels))


def test_call_after_an_error_starts_anew(rows):
    metric = LongTailMetrics(COUNTS)
    metric((rows[0], rows[1]), compute_result=False)
    with pytest.raises(ValueError, match="NaN in row 0"):
        metric((rows[0] * float("nan"), rows[1]), compute_result=False)
    assert metric((rows[0], rows[1])).items() <= expected(rows).items()


@pytest.mark.parametrize("compute_result", [True, False])
def test_two_label_arrays_are_refused(rows, compute_result):
    with pytest.raises(ValueError, match=r"`labels` must be one array.*label_names"):
        LongTailMetrics(COUNTS)((rows[0], (rows[1], rows[1])), compute_result)


def test_soft_labels_are_refused(rows):
    soft = torch.eye(3)[rows[1]].numpy()
    with pytest.raises(ValueError, match=r"`labels`.*labels\.argmax"):
        LongTailMetrics(COUNTS)(EvalPrediction(rows[0].numpy(), soft))


def test_classes_of_one_name_have_no_keys_of_their_own():
    with pytest.raises(ValueError, match=r"`per_class`.*'accuracy_cat'"):
        LongTailMetrics(ClassCounts([5, 5], class_names=["cat", "cat"]), per_class=True)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))

    def forward(self, rows, labels):
        logits = rows * self.scale
        return {"loss": logits.sum(), "logits": logits, "features": rows[:, :2]}


@pytest.mark.parametrize(
    "options", [{}, {"batch_eval_metrics": True}, {"eval_do_concat_batches": False}]
)
def test_trainer(rows, tmp_path, options):
    dataset = [{"rows": row, "labels": int(label)} for row, label in zip(*rows, strict=True)]
    arguments = TrainingArguments(
        output_dir=tmp_path, per_device_eval_batch_size=4, report_to="none", use_cpu=True, **options
    )
    trainer = Trainer(Model(), arguments, compute_metrics=LongTailMetrics(COUNTS))
    for _ in range(2):
        result = trainer.evaluate(dataset)
        assert {key: result[f"eval_{key}"] for key in FLAT}.items() <= expected(rows).items()


class Breaks(Model):
    """A model whose memory runs out in the third batch, once."""

    def __init__(self):
        super().__init__()
        self.batches = 0

    def forward(self, rows, labels):
        self.batches += 1
        if self.batches == 3:
            raise RuntimeError("out of memory")
        return super().forward(rows, labels)


def make_trainer(folder, model, metric, *, batches=True, callbacks=None):
    arguments = TrainingArguments(
        output_dir=folder,
        per_device_eval_batch_size=4,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        batch_eval_metrics=batches,
    )
    return Trainer(model, arguments, compute_metrics=metric, callbacks=callbacks)


def examples(rows):
    return [{"rows": row, "labels": int(label)} for row, label in zip(*rows, strict=True)]


def flat(result):
    return {key: result[f"eval_{key}"] for key in FLAT}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("batches", [False, True])
def test_a_broken_evaluation_is_not_counted(rows, tmp_path, wrapped, batches):
    metric = LongTailMetrics(COUNTS)
    given = (lambda pred, compute_result=True: metric(pred, compute_result)) if wrapped else metric
    broken = make_trainer(tmp_path, Breaks(), given)
    with pytest.raises(RuntimeError, match="out of memory"):
        broken.evaluate(examples((-rows[0], rows[1])))
    again = broken if batches else make_trainer(tmp_path, Model(), given, batches=False)
    assert flat(again.evaluate(examples(rows))).items() <= expected(rows).items()
    result = again.predict(examples(rows), metric_key_prefix="eval").metrics
    assert flat(result).items() <= expected(rows).items()


def test_an_evaluation_within_another_counts_its_own_rows(rows, tmp_path):
    class Within(TrainerCallback):
        found = ()

        def on_prediction_step(self, args, state, control, **kwargs):
            if not self.found:
                self.found = [None]
                self.found = [inner.evaluate(examples(few))]

    few = (rows[0][:7], rows[1][:7])
    metric, within = LongTailMetrics(COUNTS), Within()
    inner = make_trainer(tmp_path, Model(), metric)
    outer = make_trainer(tmp_path, Model(), metric, callbacks=[within])
    assert flat(outer.evaluate(examples(rows))).items() <= expected(rows).items()
    assert flat(within.found[0]).items() <= expected(few).items()


def test_a_loop_of_ones_own_is_reset(rows):
    metric = LongTailMetrics(COUNTS)
    metric((-rows[0], rows[1]), compute_result=False)
    metric.reset()
    assert metric((rows[0][:9], rows[1][:9]), compute_result=False) == {}
    assert metric((rows[0][9:], rows[1][9:])).items() <= expected(rows).items()


@pytest.mark.parametrize("bad", [{"references": ["a"]}, {"references": [7]}])
def test_compute_after_an_error_starts_anew(rows, bad):
    metric = LongTailMetrics(COUNTS)
    metric.add_batch(predictions=-rows[0], references=rows[1])
    with pytest.raises(ValueError, match=r"'a'|7 in row 31"):
        metric.compute(predictions=rows[0][:1], **bad)
    assert metric.compute(predictions=rows[0], references=rows[1]) == expected(rows)
