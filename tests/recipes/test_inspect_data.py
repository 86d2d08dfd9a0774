import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import frozen_features
import inspect_data as recipe
import numpy as np
import options as recipe_options
import pandas as pd
import pytest
import text_lt
import vision_lt
import yaml
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image
from study_options import LOADING, REGIMES

from ldam_plugins.data import audit_texts
from ldam_plugins.data.readers.base import text_table
from ldam_plugins.losses import loss_options

RESULTS = Path(__file__).parents[2] / recipe.EVIDENCE
ENTRIES = yaml.safe_load(recipe.ADVICE.read_bytes())


def picture(seed):
    pixels = np.random.RandomState(seed).randint(0, 255, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((48, 48), Image.Resampling.BICUBIC)


@pytest.fixture
def photos(tmp_path):
    """Two classes under three names, a leak with another label, and a damaged file."""
    root = tmp_path / "my photos"
    for split, names in (("train", ("Cat", "cat ", "dog")), ("test", ("Cat", "cat ", "dog"))):
        for place, name in enumerate(names):
            (root / split / name).mkdir(parents=True)
            for row in range(4 if split == "train" else 2):
                seed = 100 * (split == "test") + 10 * place + row
                picture(seed).save(root / split / name / f"{row}.png")
    picture(0).save(root / "test" / "dog" / "9.png")
    whole = (root / "train" / "dog" / "0.png").read_bytes()
    (root / "train" / "dog" / "0.png").write_bytes(whole[:300])
    return root


def parsed_command(printed):
    """The options that the advised command gives its recipe."""
    line = next(x for x in printed.splitlines() if x.startswith(("accelerate launch", "python ")))
    words = shlex.split(line)
    kind = {"vision_lt": vision_lt.VisionOptions, "text_lt": text_lt.TextOptions}
    at = next(place for place, word in enumerate(words) if word.endswith(".py"))
    return recipe_options.parse_options(kind[Path(words[at]).stem], words[at + 1 :], default="")


def test_photographs_are_inspected(photos, tmp_path, capsys):
    output = tmp_path / "deep" / "out"
    recipe.main(recipe.parse([str(photos), "--output_dir", str(output)]))
    printed = capsys.readouterr().out
    assert "12 to train on, 7 to test on, 3 classes" in printed
    assert "1 image cannot be read" in printed
    assert "Class names that look like one: 'Cat', 'cat '" in printed
    assert re.search(r"1 image of the 7 to test on \(14.3%\) has a twin .*1 equal", printed)
    assert "1 pair of images with different labels: 1 equal" in printed
    leaks = pd.read_csv(output / "leaks.csv")
    assert leaks["label"].tolist() == ["dog"]
    assert leaks["other_example"][0].endswith("train/Cat/0.png")
    assert pd.read_csv(output / "unreadable.csv")["example"][0].endswith("train/dog/0.png")
    page = (output / "report.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 4  # both sides of the leak and of the conflict
    assert not re.search(r"https?://|<script", page)
    assert json.loads((output / "audit.json").read_text())["look_alikes"] == [["Cat", "cat "]]
    options = parsed_command(printed)
    assert (options.dataset, options.skip_corrupt, options.head) == (str(photos), True, "linear")
    (photos / "test" / "dog" / "9.png").unlink()
    recipe.main(recipe.parse([str(photos), "--output_dir", str(output)]))
    assert not (output / "leaks.csv").exists()


def test_texts_are_inspected(tmp_path, capsys):
    features = Features({"body": Value("string"), "label": ClassLabel(names=["a", "b"])})
    rows = [(f"Parcel {n * 7919} <b>was</b> sent to street {n * n}", n % 8 == 0) for n in range(80)]
    for split, part in (("train", rows[:60]), ("test", [*rows[60:], rows[3]])):
        table = {"body": [text for text, _ in part], "label": [int(label) for _, label in part]}
        file = tmp_path / "set" / f"{split}-00000-of-00001.parquet"
        Dataset.from_dict(table, features=features).to_parquet(file)
    flags = ["--dataset", str(tmp_path / "set"), "--output_dir", str(tmp_path / "out")]
    audit = recipe.main(recipe.parse([*flags, "--model", "bilstm", "--max_length", "4"]))
    printed = capsys.readouterr().out
    assert audit.kind == "texts"
    assert "1 text of the 21 to test on (4.8%) has a twin in the training set: 1 equal" in printed
    assert "longer than 4 tokens" in printed
    assert "<b>was</b>" not in (tmp_path / "out" / "report.html").read_text()  # escaped
    options = parsed_command(printed)
    assert (options.model, options.max_length, options.loss) == ("bilstm", 4, "ce")


def some_texts(classes, ratio):
    """As many of the first class as ``ratio``, one of each other."""
    labels = np.array([0] * ratio + list(range(1, classes)))
    names = [f"class {label}" for label in range(classes)]
    return audit_texts(text_table([f"text {n}" for n in range(len(labels))], labels, names))


@pytest.mark.parametrize(
    ("classes", "ratio", "chosen"),
    [(2, 4, ("none", "linear")), (2, 40, ("rw", "linear")), (12, 40, ("rw", "cosine"))],
)
def test_advice_follows_the_table(classes, ratio, chosen):
    audit = some_texts(classes, ratio)
    advice = recipe.advise(recipe.parse(["some texts"]), audit)
    options = parsed_command(advice.command)
    assert (options.dataset, options.loss, options.model) == ("some texts", "ce", "minilm")
    assert (options.schedule, options.head) == chosen
    assert (options.batch_size, options.epochs) == (8, 24)


@pytest.mark.parametrize(
    ("samples", "fitted"),
    [
        (3200, {}),
        (1600, {"epochs": 12}),
        (320_000, {"epochs": 1}),
        (100, {"batch_size": 8, "epochs": 24}),
    ],
)
def test_epochs_fit_the_size_of_the_set(samples, fitted):
    audit = SimpleNamespace(sizes={"train": samples})
    assert recipe.fitted_lengths({"batch_size": 32, "epochs": 6}, (600, 6000), audit) == fitted


def test_frozen_networks_are_compared():
    advice = recipe.advise(recipe.parse(["x", "--regime", "frozen"]), some_texts(2, 4))
    words = shlex.split(advice.command)
    assert words[:2] == ["python", "recipes/frozen_features.py"]
    options, data = frozen_features.parse(words[2:])
    assert (options.recipe, data.dataset, data.max_length) == ("text", "x", 16)
    assert "On frozen features" in advice.reasons[0][2]


def test_a_share_stands_for_a_test_set_that_is_not_there(photos, tmp_path, capsys):
    output = tmp_path / "out"
    recipe.main(recipe.parse([str(photos / "train"), "--output_dir", str(output)]))
    printed = capsys.readouterr().out
    assert "There is no test set: what --test_split 0.2 holds out stands for one" in printed
    assert parsed_command(printed).test_split == 0.2
    with pytest.raises(ValueError, match=r"`test_split` must be .*'validation'"):
        recipe.load(recipe.parse([str(photos), "--test_split", "validation"]))


def test_what_is_one_kind_is_not_read_as_the_other(photos, monkeypatch):
    """`datasets` would copy a folder of photographs into its cache to find no text there."""
    monkeypatch.delitem(recipe.LOADERS, "texts")
    options, kind, _ = recipe.load(recipe.parse([str(photos / "train")]))
    assert (kind, options.test_split) == ("images", "0.2")


def test_one_class_is_told(tmp_path, capsys):
    file = tmp_path / "mine.csv"
    file.write_text("\n".join(["body,class", *(f"a text {n},x" for n in range(20))]))
    recipe.main(recipe.parse([str(file), "--output_dir", str(tmp_path / "out")]))
    assert "All is of one class, 'x'" in capsys.readouterr().out


def test_share_is_held_out_as_the_recipe_would(tmp_path, capsys):
    rows = [f"Parcel {n * 7919} was sent to street {n * n},{'ab'[n % 8 == 0]}" for n in range(40)]
    file = tmp_path / "mine.csv"
    file.write_text("\n".join(["body,class", *rows]))
    flags = [str(file), "--test_split", "0.25", "--subset_seed", "3"]
    audit = recipe.main(recipe.parse([*flags, "--output_dir", str(tmp_path / "out")]))
    options = parsed_command(capsys.readouterr().out)
    assert (options.test_split, options.subset_seed) == (0.25, 3)
    assert options.output_dir == "runs/mine"
    assert [len(part) for part in text_lt.load_data(options)[:2]] == list(audit.sizes.values())


@pytest.mark.parametrize("entry", [*ENTRIES["methods"], *ENTRIES["training"]], ids=str)
def test_entries_of_the_advice_hold(entry):
    if entry["evidence"] is not None:
        assert f"## {entry['evidence']}\n" in RESULTS.read_text()
    recipes = {"images": vision_lt.VisionOptions, "texts": text_lt.TextOptions}
    kind = recipes[entry["data"]] if entry["regime"] != "frozen" else frozen_features.FrozenOptions
    assert set(entry["options"]) <= set(kind.__dataclass_fields__)
    if "loss" in entry["options"]:
        free = {"loss", "schedule", "start", "head"}
        assert set(entry["options"]) - free <= set(loss_options(entry["options"]["loss"]))


@pytest.mark.parametrize("part", ["methods", "training"])
def test_every_regime_has_advice(part):
    last = {(entry["data"], entry["regime"]): entry for entry in ENTRIES[part]}
    assert set(last) == {(data, regime) for data in LOADING for regime in REGIMES}
    assert not any(name.startswith("max_") for entry in last.values() for name in entry)


def test_what_is_neither_is_refused_before_anything_is_read(tmp_path):
    (tmp_path / "set").mkdir()
    flags = [str(tmp_path / "set"), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match=r"As images: .*As texts: .*--kind images"):
        recipe.main(recipe.parse(flags))
    with pytest.raises(ValueError, match="`text_column` must be left out for images"):
        recipe.main(recipe.parse([*flags, "--kind", "images", "--text_column", "x"]))
    with pytest.raises(ValueError, match="`dataset` must be a data set to look at"):
        recipe.parse([])
