"""What evaluates and uses a trained model, on models that the recipes and timm have left."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import evaluate_model
import numpy as np
import pandas as pd
import predict
import pytest
import timm
import torch
import trained
import trained_options
from forked import run_forked
from paths import RECIPES
from PIL import Image
from vision_runs import picture_folder, vision_run

from ldam_plugins.integrations.timm.saved_model import save_model
from ldam_plugins.integrations.transformers.tokenizer import train_tokenizer
from ldam_plugins.reports.comparison import compare, read_classifier
from ldam_plugins.training.auto_tune import Tuned


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return picture_folder(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def finished(photos, tmp_path_factory):
    """A run of the recipe on the photos."""
    out = tmp_path_factory.mktemp("runs") / "run"
    flags = ("--model", "test_resnet", "--image_size", 32, "--epochs", 1, "--start", 0)
    vision_run(out, "--dataset", photos, *flags, "--batch_size", 8, "--workers", 0, "--quiet")
    return out


def evaluated(model, *flags, output):
    words = [str(model), *map(str, flags), "--output_dir", str(output), "--quiet"]
    return evaluate_model.main(*trained_options.parse(evaluate_model.EvaluateOptions, words))


def predicted(model, *flags, output):
    words = [str(model), *map(str, flags), "--output", str(output), "--quiet"]
    return predict.main(*trained_options.parse(predict.PredictOptions, words))


def test_a_run_is_measured_again_to_the_same(finished, tmp_path):
    before = json.loads((finished / "metrics.json").read_text())["test"]
    evaluated(finished, output=tmp_path / "out")
    after = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert after["test"] == before
    assert after["evaluated"] == str(finished)
    assert "How it was measured" in (tmp_path / "out" / "report.html").read_text()
    _, (found,) = compare([read_classifier(finished), read_classifier(tmp_path / "out")])
    assert {(part.gained, part.lost) for part in found.parts.values()} == {(0, 0)}
    with pytest.raises(ValueError, match="a folder that holds no run") as refused:
        evaluated(finished, output=tmp_path / "out")
    assert "--overwrite" in str(refused.value)
    assert "--resume" not in str(refused.value)  # which this recipe does not have
    trainings = evaluated(finished, "--part", "train", output=tmp_path / "train")
    assert sum(trainings["test"]["per_class_samples"]) == 19


def test_data_of_a_run_are_found_from_another_folder(finished, photos, tmp_path, monkeypatch):
    shutil.copytree(photos, tmp_path / "home" / "photos")
    copy = tmp_path / "home" / "runs" / "copy"
    shutil.copytree(finished, copy)
    stored = json.loads((copy / "options.json").read_text())
    (copy / "options.json").write_text(json.dumps({**stored, "dataset": "photos"}))
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    found = evaluated("../home/runs/copy", output=tmp_path / "out")
    assert sum(found["test"]["per_class_samples"]) == 15


def test_data_without_parts_are_all_measured_and_may_lack_classes(finished, photos, tmp_path):
    trained_on = json.loads((finished / "metrics.json").read_text())["class_counts"]
    found = evaluated(finished, "--dataset", f"{photos}/test", output=tmp_path / "all")
    assert found["test"]["per_class_samples"] == [5, 5, 5]
    assert list(found["class_counts"]) == trained_on == [9, 4, 6]
    few = tmp_path / "few"
    shutil.copytree(f"{photos}/test", few)
    shutil.rmtree(few / "10")
    some = evaluated(finished, "--dataset", few, output=tmp_path / "some")["test"]
    assert some["per_class_samples"] == [5, 5, 0]
    whole = found["test"]["per_class_accuracy"]
    assert some["per_class_accuracy"] == [*whole[:2], None]
    (few / "new").mkdir()
    shutil.copy(f"{photos}/test/2/00.png", few / "new" / "0.png")
    with pytest.raises(ValueError, match=r"model's 3 classes, got .*1 other.*\['new'\]"):
        evaluated(finished, "--dataset", few, output=tmp_path / "never")
    with pytest.raises(ValueError, match=r"`output_dir` must be a folder.*is a file"):
        evaluated(tmp_path / "no_model", output=finished / "metrics.json" / "never")
    assert not (tmp_path / "never").exists()


def test_texts_of_one_table_are_all_measured_by_several_processes_too(tmp_path):
    texts = [f"{word} please {row}" for row in range(20) for word in ("card", "refund", "top up")]
    model = tiny_bert(tmp_path / "model", texts, names=("up", "card", "refund"))
    labels = ["card", "refund", "up"] * 20
    table = tmp_path / "t.csv"
    pd.DataFrame({"text": texts, "label": labels}).to_csv(table, index=False)
    outs = {}
    for processes in (1, 2):
        outs[processes] = tmp_path / f"out{processes}"
        done = run_forked(
            RECIPES / "evaluate.py",
            [model, "--dataset", table, "--batch_size", 1, "--output_dir", outs[processes]],
            tmp_path / "log",
            environment={"ACCELERATE_USE_CPU": "true"},
            processes=processes,
        )
        assert done.returncode == 0, done.stderr
    assert_same(*(pd.read_csv(out / "predictions.csv") for out in outs.values()))
    one, two = (json.loads((out / "metrics.json").read_text()) for out in outs.values())
    assert one["test"]["per_class_accuracy"] == two["test"]["per_class_accuracy"]
    assert one["test"]["nll"] == pytest.approx(two["test"]["nll"], rel=1e-6)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert sum(one["test"]["per_class_samples"]) == 60


def test_classes_are_matched_by_name_and_others_are_refused(photos, tmp_path):
    model = timm.create_model("test_vit", num_classes=3)
    config = {"input_size": (3, 160, 160)}
    for folder, names in (("same", ("1", "10", "2")), ("turned", ("2", "1", "10"))):
        place = tmp_path / folder
        save_model(model, place, class_names=names, data_config=config, title="t", pretrained=None)
    same, turned = (
        evaluated(tmp_path / f, "--dataset", photos, output=tmp_path / f"{f}_out")
        for f in ("same", "turned")
    )
    assert same["class_names"] == ("1", "10", "2")
    assert turned["class_names"] == ("2", "1", "10")
    first, second = (found["test"]["predictions"] for found in (same, turned))
    assert first["probability"] == pytest.approx(second["probability"])
    by_name = [dict(enumerate(found["class_names"])) for found in (same, turned)]
    labels = [
        [names[i] for i in p["label"]] for names, p in zip(by_name, (first, second), strict=True)
    ]
    assert labels[0] == labels[1]
    save_model(
        *(model, tmp_path / "other"),
        **{"class_names": ("a", "b", "c"), "data_config": config, "title": "t", "pretrained": None},
    )
    with pytest.raises(ValueError, match="Of the model alone: \\['a', 'b', 'c'\\]"):
        evaluated(tmp_path / "other", "--dataset", photos, output=tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_predictions_are_those_of_the_run_and_what_cannot_be_read_is_listed(
    finished, photos, tmp_path
):
    folder = tmp_path / "new"
    folder.mkdir()
    known = pd.read_csv(finished / "predictions.csv", dtype={"predicted": str})
    for row, name in enumerate(known["example"]):
        source = name if name.startswith("/") else f"{photos}/{name}"
        (folder / f"{row:02d}.png").write_bytes(Path(source).read_bytes())
    (folder / "zz.jpg").write_bytes(b"no image")
    found = pd.read_csv(
        predicted(
            finished, "--dataset", folder, "--top", 2, "--rows", 4, output=tmp_path / "p.csv"
        ),
        dtype={"predicted": str, "predicted_2": str},
    )
    assert found["predicted"].tolist()[:-1] == known["predicted"].tolist()
    np.testing.assert_allclose(found["probability"][:-1], known["probability"], atol=1e-6)
    last = found.iloc[-1]
    assert (last["example"], last["error"]) == ("zz.jpg", "cannot be read")
    assert last[["predicted", "probability", "predicted_2"]].isna().all()
    assert list(found)[-2:] == ["probability_2", "error"]


def test_a_stopped_command_goes_on(finished, photos, tmp_path, monkeypatch):
    flags = ("--dataset", f"{photos}/test", "--rows", 4)
    whole = predicted(finished, *flags, output=tmp_path / "whole.csv").read_text()
    output, parts = tmp_path / "p.csv", tmp_path / "p.csv.partial"
    real, calls = predict.predict, []

    def stopped(*given):
        calls.append(given)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given)

    def stop(*more):
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            predicted(finished, *flags, *more, output=output)

    monkeypatch.setattr(predict, "predict", stopped)
    stop()
    assert sorted(path.name for path in parts.glob("*.csv")) == ["000000.csv", "000001.csv"]
    monkeypatch.setattr(predict, "predict", lambda *given: calls.append(given) or real(*given))
    calls.clear()
    assert predicted(finished, *flags, output=output).read_text() == whole
    assert len(calls) == 2  # of four parts
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.csv", "whole.csv"]
    with pytest.raises(ValueError, match="`output` must be a file that is not there"):
        predicted(finished, *flags, output=output)
    monkeypatch.setattr(predict, "predict", stopped)
    stop("--overwrite")
    monkeypatch.setattr(predict, "predict", real)
    output.unlink()
    with pytest.raises(ValueError, match=r"begun with another top\. Delete .*\.partial to"):
        predicted(finished, *flags, "--top", 1, output=output)
    part = parts / "000001.csv"
    part.write_text("".join(part.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match="is of other rows, in part 1"):
        predicted(finished, *flags, output=output)
    weights = finished / "model" / "model.safetensors"
    weights.touch()
    with pytest.raises(ValueError, match="was begun with another content of model"):
        predicted(finished, *flags, output=output)
    assert predicted(finished, *flags, "--overwrite", output=output).read_text() == whole


def test_a_lower_precision_is_that_of_autocast_and_is_told(finished, tmp_path):
    found = evaluated(finished, "--mixed_precision", "bf16", output=tmp_path / "out")
    assert found["mixed_precision"] == "bf16"
    full = evaluated(finished, output=tmp_path / "full")
    assert full["mixed_precision"] == "no"
    lower = found["test"]["nll"]
    assert lower != full["test"]["nll"] == pytest.approx(lower, rel=0.02)


def test_the_measured_precision_is_kept_until_the_table_is_whole(
    finished, photos, tmp_path, monkeypatch
):
    flags = ("--dataset", f"{photos}/test", "--rows", 4, "--batch_size", 3, "--mixed_precision")
    lower, full = (
        predicted(finished, *flags, each, output=tmp_path / f"{each}.csv").read_text()
        for each in ("bf16", "no")
    )
    seen, real = [], predict.predict

    def measured(precision):
        def tune(model, criterion, batches, **given):
            seen.append((criterion, given["passes"], [len(labels) for _, labels in batches()]))
            return Tuned(precision, source="measured")

        monkeypatch.setattr(trained, "auto_tune", tune)

    def stop(*given):
        monkeypatch.setattr(predict, "predict", fail)
        return real(*given)

    def fail(*given):
        raise KeyboardInterrupt

    measured("bf16")
    monkeypatch.setattr(predict, "predict", stop)
    with pytest.raises(KeyboardInterrupt):
        predicted(finished, *flags, "auto", output=tmp_path / "p.csv")
    measured("no")
    monkeypatch.setattr(predict, "predict", real)
    found = predicted(finished, *flags, "auto", output=tmp_path / "p.csv").read_text()
    assert found == lower != full
    assert seen == [(None, 5, [3])]  # 15 images, measured once


def assert_same(one, two):
    """Two tables of predictions are the same, but for the rounding of float32."""
    pd.testing.assert_frame_equal(one, two, check_exact=False, rtol=1e-5, atol=1e-7)


def test_several_processes_write_the_same_table(finished, photos, tmp_path):
    words = (finished, "--dataset", f"{photos}/test", "--rows", 4, "--quiet", "--num_processes")
    outputs = {}
    for processes in (1, 3):
        output = tmp_path / f"{processes}.csv"
        done = run_forked(
            RECIPES / "predict.py",
            [*words, processes, "--output", output],
            tmp_path / "log",
            environment={"ACCELERATE_USE_CPU": "true"},
            processes=processes,
        )
        assert done.returncode == 0, done.stderr
        outputs[processes] = pd.read_csv(output)
    assert_same(outputs[1], outputs[3])
    assert len(outputs[1]) == 15


def test_other_processes_than_meant_are_refused(finished, photos, tmp_path):
    with pytest.raises(RuntimeError, match="`num_processes` must be 2, as asked for, got 1"):
        predicted(finished, "--dataset", photos, "--num_processes", 2, output=tmp_path / "p.csv")
    assert not list(tmp_path.iterdir())


def tiny_bert(folder, texts, names):
    """A random BERT and its tokenizer in a folder."""
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = train_tokenizer(texts, vocab_size=60, min_frequency=1)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=1,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(names)),
        label2id={name: index for index, name in enumerate(names)},
        **sizes,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_texts_of_a_table_without_labels(tmp_path):
    from transformers import AutoTokenizer, BertForSequenceClassification

    names = ("card", "refund", "NA")
    folder = tiny_bert(tmp_path / "model", ["where is my card", "a refund please"], names)
    model = BertForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["where is my card", "", "a refund please", "card please"]
    table = tmp_path / "tickets.csv"
    pd.DataFrame({"id": list("abcd"), "message": texts}).to_csv(table, index=False)
    output = predicted(tmp_path / "model", "--dataset", table, output=tmp_path / "p.parquet")
    found = pd.read_parquet(output)
    assert found["example"].tolist() == list("abcd")
    assert found["error"].tolist() == ["", "no text", "", ""]
    assert found["predicted"][1] == ""
    for row in (0, 2, 3):
        with torch.inference_mode():
            logits = model(**tokenizer(texts[row], return_tensors="pt")).logits[0]
        expected = logits.double().softmax(0).numpy()
        order = np.argsort(-expected)
        assert [found[c][row] for c in ("predicted", "predicted_2", "predicted_3")] == [
            names[index] for index in order
        ]
        assert found["probability"][row] == pytest.approx(expected.max(), abs=1e-6)
    pd.DataFrame({"id": [1, 2], "label": ["card", "refund"]}).to_csv(
        tmp_path / "n.csv", index=False
    )
    with pytest.raises(ValueError, match="no column for certain could be the `text_column`"):
        evaluated(tmp_path / "model", "--dataset", tmp_path / "n.csv", output=tmp_path / "never")
    with pytest.raises(ValueError, match="`text_column` must be one of"):
        predicted(
            *(tmp_path / "model", "--dataset", table, "--text_column", "words"),
            output=tmp_path / "q.csv",
        )


def test_training_samples_are_no_test_set(finished, photos, tmp_path):
    with pytest.raises(ValueError, match="the run was not trained on, got '19 of 19"):
        evaluated(finished, "--dataset", f"{photos}/train", output=tmp_path / "never")
    mixed = tmp_path / "mixed"
    shutil.copytree(f"{photos}/test", mixed)
    shutil.copytree(f"{photos}/train", mixed, dirs_exist_ok=True)  # copies are other files
    evaluated(finished, "--dataset", mixed, output=tmp_path / "out")


def half_written(finished, folder, damage):
    shutil.copytree(finished, folder)
    weights = folder / "model" / "model.safetensors"
    if damage == "no model":
        shutil.rmtree(folder / "model")
    elif damage == "no weights":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:1000])
    return folder


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no model", "`model` must be a run that came to its end, got .*goes on .*--resume"),
        ("no weights", "`model` must be a model that timm can make and load"),
        ("half the weights", "`model` must be .*timm says: Error while deserializing"),
    ],
)
def test_a_run_that_is_half_there_is_named(damage, message, finished, photos, tmp_path):
    folder = half_written(finished, tmp_path / "half", damage)
    with pytest.raises(ValueError, match=message):
        predicted(folder, "--dataset", photos, output=tmp_path / "p.csv")
    with pytest.raises(ValueError, match=message):
        evaluated(folder, output=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["half"]


def test_a_model_of_texts_without_tokenizer_or_weights_is_named(tmp_path):
    texts = ["where is my card", "a refund please"]
    folder = tiny_bert(tmp_path / "model", texts, ("a", "b"))
    table = tmp_path / "t.csv"
    pd.DataFrame({"text": texts}).to_csv(table, index=False)
    (folder / "tokenizer_config.json").unlink()
    (folder / "tokenizer.json").rename(tmp_path / "kept.json")
    with pytest.raises(ValueError, match="`model` must be a folder with its tokenizer"):
        predicted(folder, "--dataset", table, output=tmp_path / "p.csv")
    (tmp_path / "kept.json").rename(folder / "tokenizer.json")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="transformers says: Error while deserializing"):
        predicted(folder, "--dataset", table, output=tmp_path / "p.csv")
    with pytest.raises(ValueError, match=r"got 'runs/none'\. There is no such folder"):
        predicted("runs/none", "--dataset", table, output=tmp_path / "p.csv")
    with pytest.raises(ValueError, match=r"got 'none'\. There is no such f"):
        predicted("none", "--dataset", table, output=tmp_path / "p.csv")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dataset", "nowhere"), "There is no such f"),
        (("--output", "p.txt"), "ends in .csv or .parquet"),
        ((), "`dataset` must be what is to be classified"),
    ],
)
def test_bad_input_is_named(finished, tmp_path, flags, message):
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    output = tmp_path / given.pop("--output", "p.csv")
    words = [word for pair in given.items() for word in pair]
    if output.suffix == ".txt":
        words = ["--dataset", str(tmp_path)]
    with pytest.raises(ValueError, match=message):
        predicted(finished, *words, output=output)
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_of_images_is_refused(finished, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="a folder with images"):
        predicted(finished, "--dataset", tmp_path / "empty", output=tmp_path / "p.csv")


def test_a_table_of_files(finished, tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("1.png", "2.png"):
        Image.new("RGB", (40, 40), "red").save(tmp_path / "images" / name)
    table = tmp_path / "list.csv"
    table.write_text("key,file\nx,2\ny,images/1.png\n")
    found = pd.read_csv(predicted(finished, "--dataset", table, output=tmp_path / "p.csv"))
    assert found["example"].tolist() == ["2", "images/1.png"]
    table.write_text("key,file\nx,2\ny,images/3.png\n")
    found = pd.read_csv(predicted(finished, "--dataset", table, output=tmp_path / "q.csv"))
    assert found["predicted"].notna().tolist() == [True, False]
    assert found["error"][1] == "cannot be read"
    table.write_text("key,file\nx,4\ny,images/3.png\n")
    with pytest.raises(ValueError, match=r"no column of .*list\.csv names images below"):
        predicted(finished, "--dataset", table, output=tmp_path / "r.csv")


def test_the_library_called_evaluate_is_found_beside_the_recipe_of_that_name():
    code = "import evaluate, evaluate.module; print(evaluate.__file__)"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(RECIPES)!r}); {code}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("evaluate/__init__.py")
    help_text = subprocess.run(
        [sys.executable, str(RECIPES / "evaluate.py"), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--part" in help_text.stdout
