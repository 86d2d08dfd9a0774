import frozen_features as recipe
import pytest
from image_sets import class_folders

from ldam_plugins.benchmark.records import read_records


def test_images_of_class_folders(tmp_path):
    folder, out = class_folders(tmp_path / "photos")["dataset"], tmp_path / "out"
    flags = ["--dataset", str(folder), "--image_size", "32", "--output_dir", str(out)]
    flags += ["--losses", "ce", "ldam", "--max_margins", "0.3", "--schedules", "none", "rw"]
    records = recipe.main(*recipe.parse(flags))
    cells = [
        tuple(record["options"][name] for name in ("loss", "head", "schedule", "posthoc_tau"))
        for record in records
    ]
    # Adjusted afterwards is what has learned the training prior: no weights.
    assert sorted(cells) == sorted(
        (loss, head, *rest)
        for loss in ("ce", "ldam")
        for head in ("linear", "cosine")
        for rest in (("none", 0.0), ("none", 1.0), ("rw", 0.0))
    )
    assert {record["options"]["model"] for record in records} == {"efficientnet_lite0_imagenet"}
    assert all(record["class_counts"] == [3, 2, 1] for record in records)
    assert len(read_records(out / "results.jsonl")) == 12
    assert (out / "report.html").exists()

    again = ["--features", str(out), *flags[:-1], "none", "--output_dir", str(tmp_path / "again")]
    repeated = recipe.main(*recipe.parse(again))
    by_name = {record["name"]: record for record in records}
    assert [record["test"] for record in repeated] == [
        by_name[record["name"]]["test"] for record in repeated
    ]
    other = [*again, "--image_size", "64"]
    with pytest.raises(ValueError, match="`features` must be a folder of features of"):
        recipe.main(*recipe.parse(other))


def test_images_of_a_model_of_transformers_are_cropped_by_its_processor():
    _, data = recipe.parse(["--dataset", "digits", "--model", "./folder"])
    assert (data.is_of_transformers, data.crop_pct, data.crop_mode) == (True, None, None)
    _, data = recipe.parse(["--dataset", "digits", "--model", "resnet18"])
    assert (data.crop_pct, data.crop_mode) == (1.0, "squash")


def test_texts(tmp_path):
    train = tmp_path / "texts" / "train.csv"
    train.parent.mkdir()
    train.write_text(
        "text,label\n"
        + "".join(f"the card payment of {n} failed,card\n" for n in range(6))
        + "".join(f"how is the weather in month {n},weather\n" for n in range(3))
    )
    (train.parent / "test.csv").write_text(
        "text,label\nmy card was declined,card\nwill it rain and be windy,weather\n"
    )
    flags = ["--recipe", "text", "--dataset", str(train.parent), "--max_length", "16"]
    flags += ["--losses", "ce", "--heads", "cosine", "--output_dir", str(tmp_path / "out")]
    records = recipe.main(*recipe.parse(flags))
    assert [record["options"]["schedule"] for record in records] == ["none", "none", "rw", "drw"]
    assert [record["test"]["top1_error"] for record in records] == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "x", "--lr", "0.1"], "`arguments` must be options of the data or the netw"),
        (["--dataset", "x", "--epochs=3"], "options of its training have no effect"),
        ([], "`dataset` must be given, or a preset first"),
        (["--dataset", "x", "--losses", "cee"], "`losses` must be one of"),
        (["--dataset", "x", "--schedules", "drs"], "`schedules` must be one of"),
        (["--dataset", "x", "--heads", "round"], "`heads` must be one of"),
    ],
)
def test_bad_options(flags, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        recipe.main(*recipe.parse([*flags, "--output_dir", str(tmp_path / "out")]))
    assert not (tmp_path / "out").exists()
