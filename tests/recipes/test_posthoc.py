"""A record a run and method, from finished runs."""

import posthoc as recipe
import pytest
from vision_runs import vision_run

from ldam_plugins.benchmark.records import read_records

TINY = ["--epochs", "1", "--ratio", "10", "--start", "0.5", "--loss", "ce", "--schedule", "none"]
TINY += ["--lr", "0.05", "--decay_milestones", "1", "--val_split", "0.2"]


def test_a_record_a_method_and_the_run_stays_as_it_is(tmp_path, capsys):
    run = tmp_path / "seed0"
    metrics = vision_run(run, *TINY)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    words = [str(run), "--output_dir", str(tmp_path / "out"), "--quiet", "--methods"]
    words += ["none", "logit_adjustment:1", "class_means"]
    records = recipe.main(recipe.parse(words))
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before
    kept = read_records(tmp_path / "out" / "results.jsonl")
    assert sorted(r["options"]["rebalance"] for r in kept) == sorted(words[-3:])
    by_method = {record["options"]["rebalance"]: record for record in records}
    # As it is, it is what the run measured.
    none = by_method["none"]["test"]
    assert none["per_class_accuracy"] == metrics["test"]["per_class_accuracy"]
    assert by_method["class_means"]["rebalance"]["chosen_on"] == "validation"
    assert by_method["class_means"]["rebalance"]["strength"] in (0.1, 0.3, 1.0)
    assert (tmp_path / "out" / "report.html").exists()
    again = recipe.main(recipe.parse([*words[:-2], "class_means"]))  # its features are found
    assert again[1]["test"] == by_method["class_means"]["test"]
    assert len([*(tmp_path / "out" / "features").iterdir()]) == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "`runs` must be at least one finished run folder"),
        (["nowhere"], "`runs` must be the folder of a finished run"),
        (["nowhere", "--methods", "crt:0"], "`strength` must be"),
        (["nowhere", "--choose_on", "test"], "`choose_on` must be auto, train or validation"),
    ],
)
def test_bad_options(words, message):
    with pytest.raises(ValueError, match=message):
        recipe.parse(words)
