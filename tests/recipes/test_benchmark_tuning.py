"""Tuning in the benchmark with real runs, made in this process."""

import json
from unittest.mock import patch

import benchmark
import pytest
import results_tables
import text_lt
import vision_lt
from accelerate.state import AcceleratorState
from options import parse_options
from study_options import TablesOptions
from untouchable import without_test_set

from ldam_plugins.benchmark.local import Outcome, ended_before
from ldam_plugins.benchmark.records import read_records, write_records
from ldam_plugins.reports import run_report

RECIPES = {
    "vision_lt.py": (vision_lt, vision_lt.VisionOptions, "load_images"),
    "text_lt.py": (text_lt, text_lt.TextOptions, "load_texts"),
}


@pytest.fixture
def ran(monkeypatch):
    """Cells run in this process, and trials without a test set; gives the names of what was run.

    A name put into ``ran.stop`` is where the grid is stopped.
    """

    class Ran(list):
        stop = None

    ran = Ran()

    def launch(options, tasks, show):
        for task in tasks:
            ended = ended_before(task)
            if ended is None and task.name == ran.stop:
                raise KeyboardInterrupt
            yield ended or in_process(task)

    def in_process(task):
        ran.append(task.name)
        recipe, kind, loader = RECIPES[task.recipe.name]
        load = getattr(recipe, loader)
        words = [*task.arguments, "--output_dir", str(task.folder), "--resume", "auto"]
        AcceleratorState._reset_state(reset_partial_state=True)
        guarded = without_test_set(load) if "trial" in task.name else load
        with patch.object(recipe, loader, guarded), patch.object(run_report, "write_report"):
            try:
                recipe.main(parse_options(kind, words, default="digits_lt"))
            except ValueError as error:
                return Outcome(task.name, "failed", f"ValueError: {error}", 1)
        return Outcome(task.name, "finished")

    monkeypatch.setattr(benchmark, "launch", launch)
    monkeypatch.setattr(benchmark, "write_experiment", lambda *a, **kw: "page")
    return ran


def grid(tmp_path, *words, name="grid"):
    flags = ["--preset", "digits_lt", "--output_dir", str(tmp_path / name), "--methods", "ce/none"]
    flags += ["ldam/rw:max_margin=0.2", "--set", "epochs=2", "eval_every=2", "--tune", "2"]
    return benchmark.parse([*flags, *words])


def trials(path):
    return json.loads((path / "search.json").read_text())["trials"]


METHODS = ("ce_none", "ldam_rw_max_margin-0.2")
TRIALS = [f"{method}, trial {number}" for number in (0, 1) for method in METHODS]
CELLS = [f"{method}_s{seed}" for seed in (0, 1) for method in METHODS]


def test_methods_are_tuned_without_the_test_set_and_go_on_where_they_stopped(
    tmp_path, ran, monkeypatch, capsys
):
    words = ["--seeds", "0", "1"]
    outcomes = benchmark.main(grid(tmp_path, *words))
    assert ran == [*TRIALS, *CELLS]
    assert [(outcome.name, outcome.status) for outcome in outcomes] == [
        (name, "finished") for name in CELLS
    ]
    folder = tmp_path / "grid"
    chosen = {}
    for method in METHODS:
        found = trials(folder / "tuning" / method)
        assert [len(trial) for trial in found] == [2, 2]
        best = min(found, key=lambda trial: trial["balanced_error"])
        for seed in (0, 1):
            cell = folder / "cells" / f"{method}_s{seed}"
            left, tuned = (
                json.loads((cell / f"{n}.json").read_text()) for n in ("metrics", "tuned")
            )
            used = {"scale": 30, **{k: v for k, v in left["options"].items() if v is not None}}
            assert {name: used[name] for name in tuned["values"]} == tuned["values"]
            assert (tuned["values"], tuned["found"]) == (best["values"], found)
            assert (left["options"]["val_split"], left["options"]["evaluate"]) == (None, None)
            assert sum(left["class_counts"]) == 294  # all training samples
            assert tuned["split"] == {
                "share": 0.2,
                "seed": 0,
                "samples": 60,
                "classes_without": ["9"],
            }
            chosen[cell.name] = tuned
    assert list(chosen["ce_none_s0"]["values"]) == ["lr"]
    assert list(chosen["ldam_rw_max_margin-0.2_s0"]["values"]) == ["lr", "scale", "beta"]

    # Stopped among the trials, and among the runs: nothing is run twice, and all is the same.
    for stop in (TRIALS[3], CELLS[1], None):
        ran.stop = stop
        if stop is None:
            benchmark.main(grid(tmp_path, *words, name="again"))
        else:
            with pytest.raises(KeyboardInterrupt):
                benchmark.main(grid(tmp_path, *words, name="again"))
    assert sorted(ran[8:]) == sorted([*TRIALS, *CELLS])
    again = tmp_path / "again" / "cells"
    assert {p.parent.name: json.loads(p.read_text()) for p in again.glob("*/tuned.json")} == chosen

    # What a search says is in the records, and stays there in the results of the documents.
    records = benchmark.collect_records(folder / "cells")
    assert {record["name"]: record["tuned"] for record in records} == chosen
    write_records(tmp_path / "results.jsonl", records)
    monkeypatch.setattr(results_tables, "RESULTS", tmp_path)
    options = TablesOptions(add=["own", str(tmp_path / "results.jsonl")])
    results_tables.main(options)
    assert {r["name"]: r["tuned"] for r in read_records(tmp_path / "own.jsonl")} == chosen


def test_a_trial_that_diverges_is_a_bad_one_and_a_method_without_a_good_one_fails(
    tmp_path, ran, capsys
):
    words = ["--methods", "ce/none", "ce/none:lr=1e12", "--tune_options", "lr=1e12:1e13"]
    words += ["weight_decay=0:1e-9"]
    outcomes = benchmark.main(grid(tmp_path, *words))
    assert [(outcome.name, outcome.status) for outcome in outcomes] == [
        ("ce_none_lr-1e12_s0", "failed"),
        ("ce_none_s0", "finished"),
    ]
    assert "all 2 trials failed, the last one with ValueError: `lr` must be one under" in (
        outcomes[0].message
    )
    first, second = trials(tmp_path / "grid" / "tuning" / "ce_none")
    assert "Has training diverged?" in second["failed"]
    left = json.loads((tmp_path / "grid" / "cells" / "ce_none_s0" / "tuned.json").read_text())
    assert left["values"] == first["values"] == {"lr": 0.1, "weight_decay": 2e-4}
    assert "a bad trial: ce_none, trial 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tune", "1"], r"`tune` must be an integer >= 2, got 1\. The first trial is the"),
        (["--tune_split", "1"], r"`tune_split` must be in \(0, 1\), got 1"),
        (["--tune_options", "lr=-1:1"], r"`lr of tune_options` must be a finite number > 0"),
        (["--tune_options", "tau"], r"`tune_options` must be options that a method of the grid"),
        (
            ["--tune_options", "max_margin"],
            r"a method of the grid takes.*That a method sets|sets it",
        ),
        (["--set", "val_split=0.1"], r"`val_split` must be left out with --tune.*--tune_split"),
        (
            ["--set", "val_split=0.1", "evaluate=validation"],
            r"`evaluate` must be left out in a grid",
        ),
        (
            [
                "--methods",
                "ce/drw:start=40",
                "--set",
                "epochs=50",
                "--tune_options",
                "epochs=30,60",
            ],
            r"cell 'ce_drw_start-40, trial 1': `start` must be before",
        ),
        (["--tune_options", "lr", "--tune", "0"], r"--tune_options has no effect without --tune"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_searches_start_nothing(tmp_path, ran, words, message):
    with pytest.raises((ValueError, UserWarning), match=message):
        benchmark.main(grid(tmp_path, *words))
    assert not ran
    assert not (tmp_path / "grid").exists()


def test_classes_of_one_sample_start_nothing(tmp_path, ran):
    words = ["--ratios", "120", "--profiles", "step"]
    benchmark.make_searches(grid(tmp_path, *words))
    single = lambda *a, **kw: (None, None, benchmark.ClassCounts([9, 1, 1]))  # noqa: E731
    left = lambda *a, **kw: (None, None, benchmark.ClassCounts([7, 1, 1]))  # noqa: E731
    with (
        patch.object(vision_lt, "load_data", single),
        patch.object(vision_lt, "hold_out", left),
        pytest.raises(ValueError, match=r"cell 'ce_none.*`tune`.*1 of 3 classes.*needs two"),
    ):
        benchmark.main(grid(tmp_path, *words))
    assert not ran
    assert not (tmp_path / "grid").exists()


def test_a_grid_file_may_say_what_is_tuned(tmp_path, capsys):
    path = tmp_path / "grid.yaml"
    path.write_text(
        "preset: digits_lt\nmethods: [erm, ldam_drw]\ntune: 4\n"
        'tune_options: ["lr=1e-3:1e-1", "scale=10,20,30"]\n'
    )
    benchmark.main(benchmark.parse([str(path), "--dry_run"]))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "# ce_none: 4 trials of lr=0.001:0.1, first:"
    assert "--seed 0 --val_split 0.2 --evaluate validation --output_dir" in lines[1]
    assert lines[2] == "# ldam_drw: 4 trials of lr=0.001:0.1 scale=10,20,30, first:"
    assert len(lines) == 6
