import csv

import linear_probe as recipe
import options as recipe_options
import pytest
import text_lt
import vision_lt
from datasets import ClassLabel, Dataset, Features, Value

from ldam_plugins import DeferredSchedule


@pytest.mark.parametrize(
    ("start", "epoch"), [(160, 160), (0.8, 160), (0.801, 160), (0.8049, 160), (0.805, 161), (0, 0)]
)
def test_epoch_of_the_switch(start, epoch):
    assert recipe.switch_epoch(DeferredSchedule("drw", start=start), 200) == epoch


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_vision_run_is_probed_around_its_switch(tmp_path):
    flags = ["--epochs", "3", "--start", "1", "--ratio", "10", "--keep_checkpoints", "3"]
    flags += ["--eval_test_every", "3", "--output_dir", str(tmp_path / "run"), "--ema_decay", "0"]
    parsed = recipe_options.parse_options(vision_lt.VisionOptions, flags, default="digits_lt")
    vision_lt.main(parsed)
    output = tmp_path / "deep" / "probe.csv"
    options = recipe.ProbeOptions(runs=[str(tmp_path / "run")], output=str(output))
    recipe.main(options)
    rows = rows_of(output)
    assert [(row["epochs"], row["when"]) for row in rows] == [
        ("1", "before"),
        ("2", "after"),
        ("3", "after"),
    ]
    assert len({row["top1_error"] for row in rows}) > 1
    assert all(float(row["balanced_accuracy"]) > 0.5 for row in rows)
    assert {(row["loss"], row["schedule"], row["seed"]) for row in rows} == {("ldam", "drw", "0")}
    options.epochs = [7]
    with pytest.raises(ValueError, match=r"checkpoint of \(\[1, 2, 3\]\), got 7.*keep_checkpoints"):
        recipe.main(options)
    with pytest.raises(ValueError, match="`runs` must be at least one"):
        recipe.main(recipe.ProbeOptions())


@pytest.mark.parametrize("more", [[], ["--val_split", "0.3"]], ids=" ".join)
def test_text_run_is_probed_around_its_switch(tmp_path, more):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["a", "b"])})
    for split in ("train", "test"):
        texts = [f"apple pear {n}" for n in "xyzuvw"] + [f"iron zinc {n}" for n in "xyzuvw"]
        rows = Dataset.from_dict({"text": texts, "label": [0] * 6 + [1] * 6}, features=features)
        rows.to_parquet(tmp_path / "set" / f"{split}-00000-of-00001.parquet")
    flags = ["--dataset", str(tmp_path / "set"), "--output_dir", str(tmp_path / "run")]
    flags += ["--epochs", "2", "--start", "1", "--keep_checkpoints", "2", "--hidden_size", "8"]
    flags += ["--embedding_size", "8", "--batch_size", "4", "--rare_classes", "b"]
    flags += ["--rare_fraction", "0.5", "--model", "bilstm", *more]
    parsed = recipe_options.parse_options(text_lt.TextOptions, flags, default="stdlib_lt")
    text_lt.main(parsed)
    output = tmp_path / "probe.csv"
    options = recipe.ProbeOptions(runs=[str(tmp_path / "run")], recipe="text", output=str(output))
    recipe.main(options)
    rows = rows_of(output)
    assert [(row["epochs"], row["when"]) for row in rows] == [("1", "before"), ("2", "after")]
    assert all(float(row["top1_error"]) <= 50 for row in rows)
