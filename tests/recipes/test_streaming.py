"""Both recipes on data that are read as a stream."""

import io
import json
import os
import subprocess
import sys

import options as recipe_options
import pytest
import text_lt
import vision_lt
from dataset_hub import hub_of
from datasets import ClassLabel, Dataset, Features, Image
from hf_samples import text_hub
from PIL import Image as Pillow

KINDS = {"vision": (vision_lt, vision_lt.VisionOptions), "text": (text_lt, text_lt.TextOptions)}
SMALL = {
    "vision": ["--model", "cifar_resnet20", "--image_size", "8", "--workers", "0"],
    "text": ["--model", "bilstm", "--hidden_size", "4", "--embedding_size", "4"],
}


def image_hub(folder):
    folder.mkdir()
    features = Features({"img": Image(), "label": ClassLabel(names=["a", "b"])})
    for split, labels in (("train", [0] * 13 + [1] * 4), ("test", [0, 1] * 3)):
        files = []
        for row, label in enumerate(labels):
            file = io.BytesIO()
            Pillow.new("RGB", (8, 8), (90 * label, 10 * row, 5)).save(file, "PNG")
            files.append({"bytes": file.getvalue(), "path": None})
        table = Dataset.from_dict({"img": files, "label": labels}, features=features)
        table.to_parquet(folder / f"{split}.parquet")
    return folder


def parsed(kind, *flags):
    return recipe_options.parse_options(KINDS[kind][1], list(map(str, flags)), default="")


@pytest.mark.parametrize(("kind", "counts"), [("vision", [13, 4]), ("text", [40, 12])])
def test_a_streamed_run_goes_from_data_to_report_and_on(kind, counts, tmp_path):
    hub = {"vision": image_hub, "text": text_hub}[kind](tmp_path / "hub")
    flags = ["--dataset", hub, "--streaming", "--shuffle_buffer", 8, *SMALL[kind]]
    flags += ["--batch_size", 8, "--output_dir", tmp_path / "run"]
    main = KINDS[kind][0].main
    metrics = main(parsed(kind, *flags, "--epochs", 2, "--rebalance", "logit_adjustment:1"))
    assert metrics["rebalance"]["method"] == "logit_adjustment"
    assert list(metrics["class_counts"]) == counts
    assert sum(metrics["test"]["confusion"]["samples"]) == (6 if kind == "vision" else 18)
    assert (tmp_path / "run" / "report.html").exists()
    history = (tmp_path / "run" / "history.csv").read_text().splitlines()
    assert len(history) == 3
    assert history[2].split(",")[2] == "reweighted"


@pytest.mark.parametrize("kind", ["vision", "text"])
@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("--test_split 0.2", "test_split"),
        ("--val_split 0.1", "val_split"),
        ("--profile exp", "profile"),
        ("--schedule rs", "schedule"),
        ("--schedule drs", "schedule"),
        ("--schedule progressive", "schedule"),
        ("--group_column camera", "group_column"),
        ("--delimiter ;", "delimiter"),
        ("--encoding cp1252", "encoding"),
    ],
)
def test_what_needs_all_the_data_at_once_is_refused(kind, flags, name):
    parsed(kind, "--dataset", "hub", *flags.split())
    with pytest.raises(ValueError, match=f"`{name}` must be left out with --streaming"):
        parsed(kind, "--dataset", "hub", "--streaming", *flags.split())


@pytest.mark.parametrize("flags", ["--train_list a --test_list b", "--skip_corrupt"])
def test_lists_and_corrupt_images_are_not_streamed(flags):
    with pytest.raises(ValueError, match="left out with --streaming"):
        parsed("vision", "--dataset", "hub", "--streaming", *flags.split())


def test_counts_are_numbers_or_a_file(tmp_path):
    frame = 'label,count\n"b, c",3\na,40\n'
    (tmp_path / "counts.csv").write_text(frame)
    (tmp_path / "names.json").write_text(json.dumps({"a": 40, "b, c": 3}))
    (tmp_path / "list.json").write_text("[40, 3]")
    for given, found in (
        (["40", "3"], [40, 3]),
        ([str(tmp_path / "counts.csv")], {"a": 40, "b, c": 3}),
        ([str(tmp_path / "names.json")], {"a": 40, "b, c": 3}),
        ([str(tmp_path / "list.json")], [40, 3]),
    ):
        options = parsed("text", "--dataset", "hub", "--streaming", "--class_counts", *given)
        assert options.given_counts() == found


@pytest.mark.parametrize("flags", ["--class_counts 40 3", "--shuffle_buffer 7"])
def test_options_of_a_stream_are_refused_without_one(flags):
    with pytest.raises(ValueError, match="must be left out without --streaming"):
        parsed("text", "--dataset", "hub", *flags.split())


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "40"),
        ("gone.json", None),
        ("a.json", "{"),
        ("a.json", '{"a": 1.5}'),
        ("a.json", "7"),
        ("a.csv", "label,count\na,1\na,2\n"),
        ("a.csv", "label,count\na,many\n"),
        ("a.csv", "label\na\n"),
    ],
)
def test_bad_files_of_counts_are_refused(tmp_path, name, text):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="`class_counts` must be numbers, or one JSON or CSV file"):
        recipe_options.read_class_counts([str(tmp_path / name)])


STREAM_FROM_HUB = """
import json
from ldam_plugins.data import stream_texts
train, _ = stream_texts("owner/texts")
rows = sorted((row["text"], row["label"]) for row in train)
try:
    stream_texts("owner/absent")
except Exception as error:
    refused = str(error)
print(json.dumps([train.class_counts.counts.tolist(), rows, refused]))
"""


def test_data_are_streamed_from_a_hub_and_not_kept(tmp_path):
    """Over HTTP, in parts, as from huggingface.co; nothing but what describes them is on disk."""
    root = tmp_path / "hub" / "owner"
    root.mkdir(parents=True)
    folder = text_hub(root / "texts")
    home = tmp_path / "home"
    with hub_of(tmp_path / "hub") as (address, requests):
        online = {"HF_ENDPOINT": address, "HF_HOME": str(home)}
        online |= {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
        command = [sys.executable, "-c", STREAM_FROM_HUB]
        done = subprocess.run(command, env=os.environ | online, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts, rows, refused = json.loads(done.stdout.splitlines()[-1])
    table = Dataset.from_parquet(str(next(folder.glob("train*"))))
    assert rows == sorted(map(list, zip(table["text"], table["label"], strict=True)))
    assert counts == [40, 12]
    assert "`dataset` must be a hub id" in refused
    assert any(part for _, path, part in requests if "/train-" in path)
    assert not [file for file in home.rglob("*") if file.suffix in (".parquet", ".arrow")]
