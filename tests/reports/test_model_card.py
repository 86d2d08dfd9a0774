import re

import numpy as np
import pytest
from huggingface_hub import ModelCard, metadata_load

from ldam_plugins import ClassCounts
from ldam_plugins.metrics import long_tail_metrics
from ldam_plugins.reports.model_card import complete_card, is_hub_id, write_card
from ldam_plugins.training.history import run_metrics, write_metrics

NASTY = ("a|b", "<script>alert(1)</script>", "x\ny", "[link](javascript:x)", "猫")


def make_run(folder, counts, wrong=0, **options):
    """A run whose model is right but in ``wrong`` classes, of which it takes each for class 0."""
    labels = np.repeat(np.arange(len(counts)), 12)
    logits = np.eye(len(counts), dtype=np.float32)[labels] * 4
    logits[labels >= len(counts) - wrong] = np.eye(len(counts), dtype=np.float32)[0] * 4
    given = {"model": "m", "dataset": "own/photos", "loss": "ldam", "seed": 0, **options}
    test = long_tail_metrics(logits, labels, counts, detailed=True)
    times = {"train_seconds": 90.0, "examples_per_second": 3.0}
    metrics = run_metrics(options=given, class_counts=counts, device="cpu", test=test, **times)
    (folder / "model").mkdir()
    text = "# A model\n\n```python\nload('PATH/OF/THIS/FOLDER')\n```"
    write_card(folder / "model", text, library="timm", task="image-classification")
    write_metrics(folder, metrics)
    return test


def test_front_matter_is_what_a_hub_reads(tmp_path):
    counts = ClassCounts([500, 50, 5], class_names=["cat", "fox", "lynx"])
    test = make_run(tmp_path, counts, wrong=1)
    path = complete_card(tmp_path)
    front = metadata_load(path)
    assert front["library_name"] == "timm"
    assert front["pipeline_tag"] == "image-classification"
    assert front["datasets"] == ["own/photos"]
    data = ModelCard.load(path).data
    assert data.model_name == tmp_path.name
    found = {each.metric_name: each.metric_value for each in data.eval_results}
    assert found == {
        "Accuracy": pytest.approx(1 - test["top1_error"] / 100, abs=1e-4),
        "Balanced accuracy": pytest.approx(2 / 3, abs=1e-4),
        "Macro F1": pytest.approx(test["macro_f1"], abs=1e-4),
        "Accuracy, many (> 100)": 1.0,
        "Accuracy, medium (20..100)": 1.0,
        "Accuracy, few (< 20)": 0.0,
    }
    of_data = {(each.dataset_type, each.dataset_split) for each in data.eval_results}
    assert of_data == {("own/photos", "test")}
    # As its client writes it again: nothing was lost or moved.
    assert str(ModelCard.load(path)) == path.read_text(encoding="utf-8")


def test_text_says_data_results_recipe_and_limits(tmp_path):
    counts = ClassCounts([500, 50, 5], class_names=["cat", "fox", "lynx"])
    make_run(tmp_path, counts, wrong=1)
    text = complete_card(tmp_path).read_text()
    titles = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert titles == [
        *("Intended use", "Training data", "Results", "Limits", "How it was trained", "Citation"),
    ]
    assert "`own/photos`: 555 training samples in 3 classes, the largest 100 times" in text
    assert "| lynx | 5 | few | 12 | 0.00 % | 0.0..24.2 |" in text
    assert "- 1 of 3 classes had fewer than 20 training samples; their mean accuracy is 0" in text
    assert "- Never right in the class lynx." in text
    assert "| seed | 0 |" in text
    assert "cao2019ldam" in text
    assert re.search(r"```bash\n\S+", text), "the command of this process"
    assert text.count("To be written by who") == 2


def test_what_a_person_wrote_is_left_alone(tmp_path):
    make_run(tmp_path, ClassCounts([30, 3]))
    card = complete_card(tmp_path)
    card.write_text(card.read_text().replace("To be written by who", "For keepers of zoos. Who"))
    before = card.read_bytes()
    assert complete_card(tmp_path) is None
    assert card.read_bytes() == before
    card.write_text("# My own words")
    assert complete_card(tmp_path) is None
    assert card.read_text() == "# My own words"
    card.unlink()
    assert complete_card(tmp_path) is None


def test_names_mean_themselves_and_folders_are_not_told(tmp_path):
    counts = ClassCounts([500, 400, 30, 20, 5], class_names=NASTY)
    make_run(tmp_path, counts, wrong=1, dataset="/home/me/secret/photos")
    text = complete_card(tmp_path).read_text(encoding="utf-8")
    assert "secret" not in text.replace(text.split("```bash")[1].split("```")[0], "")
    assert "<script" not in text
    assert not re.search(r"(?<!\\)\]\(", text)
    rows = [line for line in text.splitlines() if re.match(r"\|.*\| (many|medium|few) \|", line)]
    assert len(rows) == 5
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {7}


def test_of_very_many_classes_both_ends_are_shown(tmp_path):
    make_run(tmp_path, ClassCounts(np.arange(1000, 0, -1)))
    text = complete_card(tmp_path).read_text()
    assert "900 classes between these are left out." in text
    assert len(text) < 20_000


def test_hub_ids_are_no_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    assert is_hub_id("google/vit-base-patch16-224")
    for name in (None, "resnet18", "runs/a", "/data/photos", "a/b/c", "a b/c", "..//x"):
        assert not is_hub_id(name)
