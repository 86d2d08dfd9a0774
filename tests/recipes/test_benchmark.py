import csv
import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import benchmark
import pytest
import torch
from small_cells import began, calls, cells_in, gone
from study_options import GRIDS

from ldam_plugins.benchmark import local
from ldam_plugins.benchmark.local import (
    CellTask,
    run_cell,
    run_locally,
    share_choice,
    start_cell,
)
from ldam_plugins.benchmark.records import read_records
from ldam_plugins.benchmark.slurm import slurm_parameters
from ldam_plugins.training.auto_tune import Tuned
from ldam_plugins.training.environment import choose_precision
from ldam_plugins.training.preemption import PREEMPTED


@pytest.fixture
def cell(tmp_path):
    return cells_in(tmp_path)


def test_failed_cells_are_listed_with_the_end_of_their_log_and_others_finish(cell):
    modes = {"bad": "fail", "silent": "silent", "late": "late", "good": "finish"}
    runs = [cell(mode, name) for name, mode in modes.items()]
    found = {outcome.name: outcome for outcome in run_locally(runs)}
    assert {name: found[name].status for name in found} == {
        "bad": "failed",
        "silent": "failed",
        "late": "failed",
        "good": "finished",
    }
    assert found["bad"].message.splitlines()[-1] == "ValueError: `x` must be y"
    assert "step 3" in found["bad"].message
    assert "step 1" not in found["bad"].message
    assert "exit code 1" in found["bad"].message
    assert "exit code 0" in found["silent"].message


def test_finished_cells_are_skipped_and_failed_ones_tried_again(cell):
    good, bad = cell("finish", "good"), cell("fail", "bad")
    list(run_locally([good, bad]))
    again = {outcome.name: outcome.status for outcome in run_locally([good, bad])}
    assert again == {"good": "skipped", "bad": "failed"}
    assert (calls(good), calls(bad)) == (1, 2)


def test_a_folder_with_other_options_is_not_reused(cell):
    run = cell()
    assert run_cell(run).status == "finished"
    changed = cell(epochs=3)
    outcome = run_cell(changed)
    assert outcome.status == "failed"
    assert "epochs: '(absent)' there, 3 now" in outcome.message
    assert "Choose another --output_dir" in outcome.message
    assert calls(run) == 1
    # An option the recipe has got since counts as its default.
    newer = CellTask(**{**vars(changed), "defaults": {"mode": "finish", "epochs": 3}})
    assert run_cell(newer).status == "skipped"


def test_torn_metrics_are_named(cell):
    run = cell()
    run.folder.mkdir(parents=True)
    (run.folder / "metrics.json").write_text("{")
    outcome = run_cell(run)
    assert (outcome.status, calls(run)) == ("failed", 0)
    assert "JSONDecodeError" in outcome.message


def test_jobs_run_at_the_same_time(cell):
    runs = [cell("meet:b", "a"), cell("meet:a", "b"), cell("finish", "c")]
    assert {outcome.status for outcome in run_locally(runs, jobs=2)} == {"finished"}


def test_time_left_counts_what_runs_and_what_waits():
    left = local.seconds_left
    assert left([], [3.0, 3.0], 6, 2) is None
    assert left([30.0], [], 0, 2) == 0
    assert left([20.0, 40.0], [30.0], 0, 2) == 0  # the second of a pair, about to end
    assert left([30.0], [29.0], 6, 2) == 31 + 60  # not 30 * 7: two at once
    assert left([30.0], [10.0, 50.0], 1, 2) == 30  # one that takes longer is about to end
    assert left([30.0], [], 3, 1) == 90


def test_time_left_is_told_while_cells_run(cell):
    told = []
    list(run_locally([cell(name="a"), cell("fail", "b"), cell(name="c")], on_wait=told.append))
    known = [seconds for seconds in told if seconds is not None]
    assert told[0] is None
    assert known[-1] == 0
    assert max(known) > 0


def test_cells_share_the_cores_unless_told(cell, monkeypatch):
    monkeypatch.setattr(local, "usable_cores", lambda: 8)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    told, shared = cell(name="told"), cell(name="shared")
    list(run_locally([told], jobs=3))
    monkeypatch.delenv("OMP_NUM_THREADS")
    list(run_locally([shared], jobs=3))
    assert began(told)["environment"]["OMP_NUM_THREADS"] == "5"
    assert began(shared)["environment"]["OMP_NUM_THREADS"] == "2"
    assert local._share_of_machine(0, 20)["OMP_NUM_THREADS"] == "1"


def test_gpus_are_dealt_in_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def devices():
        return [local._share_of_machine(slot, 3)["CUDA_VISIBLE_DEVICES"] for slot in range(3)]

    assert devices() == ["0", "1", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert devices() == ["4", "6", "4"]


def test_a_stopped_grid_stops_its_cells_and_goes_on_later(cell):
    quick, slow = cell(name="quick"), cell("hang", "slow")
    outcomes = run_locally([quick, slow], jobs=2)
    assert next(outcomes).name == "quick"
    pid = began(slow)["pid"]
    outcomes.close()
    assert gone(pid)
    assert not (slow.folder / "metrics.json").exists()
    continued = cell("finish", "slow")
    assert [outcome.status for outcome in run_locally([quick, continued])] == [
        "skipped",
        "finished",
    ]
    assert (slow.folder / "calls.txt").read_text() == "auto\nauto\n"


def test_sigterm_stops_the_cells(cell):
    before = signal.getsignal(signal.SIGTERM)
    run = cell(f"signal:{int(signal.SIGTERM)}:0")
    with pytest.raises(SystemExit, match=str(PREEMPTED)):
        list(run_locally([run]))
    assert gone(began(run)["pid"])
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("run_it", [run_cell, lambda task: list(run_locally([task]))])
def test_a_cell_that_a_signal_meets_at_its_start_is_stopped(cell, run_it, monkeypatch):
    def start_and_signal(*given):
        process = start_cell(*given)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.5)
        return process

    monkeypatch.setattr(local, "start_cell", start_and_signal)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    task = cell("hang")
    try:
        with pytest.raises(KeyboardInterrupt):
            run_it(task)
    finally:
        signal.signal(signal.SIGINT, before)
    monkeypatch.setattr(local, "start_cell", start_cell)
    assert run_cell(cell("finish")).status == "finished"  # nothing holds its folder


def test_two_grids_do_not_run_one_cell_at_once(cell):
    run = cell("hang")
    process = start_cell(run, {})
    began(run)
    outcome = run_cell(run)
    assert outcome.status == "failed"
    assert "another process is running it" in outcome.message
    process.kill()
    process.wait()
    assert run_cell(cell("finish")).status == "finished"


def test_cells_share_what_the_first_of_them_measures(cell, tmp_path):
    file = tmp_path / "auto_tune.json"
    task = replace(cell(), auto_tune=file)
    assert "--auto_tune" not in task.command()  # but for the command that makes it again
    share_choice([task])
    assert not file.exists()
    run_cell(task)
    assert f"--auto_tune {file}" in (task.folder / local.LOG_FILE).read_text()
    # A grid whose finished runs are those of an earlier version goes on in their precision.
    metrics = task.folder / "metrics.json"
    metrics.write_text(json.dumps({**json.loads(metrics.read_text()), "mixed_precision": "bf16"}))
    share_choice([replace(cell(name="new"), auto_tune=file), task])
    assert Tuned.load(file).precision == "bf16"
    metrics.write_text(metrics.read_text().replace("bf16", "no"))
    share_choice([task])
    assert Tuned.load(file).precision == "bf16"


def tiny(tmp_path, *words):
    """A grid of one epoch on digits."""
    flags = ["--preset", "digits_lt", "--output_dir", str(tmp_path / "grid"), "--methods", "ce/rw"]
    return benchmark.parse([*flags, "--set", "epochs=1", "--set", "eval_test_every=1", *words])


def test_real_cells_finish_go_on_and_are_reported(tmp_path, capfd):
    (outcome,) = benchmark.main(tiny(tmp_path))
    assert (outcome.name, outcome.status) == ("ce_rw_s0", "finished")
    assert "| ce     | rw " in capfd.readouterr().out
    grid = tmp_path / "grid"
    (row,) = csv.DictReader((grid / "results.csv").read_text().splitlines())
    assert row["command"].endswith(
        "vision_lt.py digits_lt --loss ce --schedule rw --epochs 1 --eval_test_every 1 --seed 0 "
        f"--output_dir {grid}/cells/ce_rw_s0"
    )
    # Killed after its last checkpoint, the cell goes on from there and ends the same.
    metrics = grid / "cells" / "ce_rw_s0" / "metrics.json"
    before = json.loads(metrics.read_text())
    metrics.unlink()
    (outcome,) = benchmark.main(tiny(tmp_path))
    assert outcome.status == "finished"
    after = json.loads(metrics.read_text())
    assert (after["test"], after["train_seconds"]) == (before["test"], before["train_seconds"])
    assert after["auto_tune"]["source"] == "run"
    assert (grid / "auto_tune.json").exists()
    # What is kept of it holds the precision it ran in.
    (kept,) = read_records(grid / "results.jsonl")
    assert kept["mixed_precision"] == row["mixed_precision"] == choose_precision()
    # Another grid in the same folder: what is the same is skipped, what is not is refused.
    assert [outcome.status for outcome in benchmark.main(tiny(tmp_path))] == ["skipped"]
    capfd.readouterr()
    (refused,) = benchmark.main(tiny(tmp_path, "--set", "lr=0.5"))
    assert "lr: 0.1 there, 0.5 now" in refused.message
    shown = capfd.readouterr()
    assert "failed: ce_rw_s0" in shown.err
    assert "| ce " not in shown.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "epoch=3"], r"option in set.*Did you mean 'epochs'"),
        (["--set", "profile=none"], r"option in set.*got 'profile'\. Write --profiles none\."),
        (["--methods", "ce/drw", "--set", "start=7"], r"cell 'ce_drw_s0': `start` must be before"),
        (["--methods", "erm:max_margin=0.3"], r"cell 'ce_none_max_margin-0.3_s0'.*'max_margin'"),
        (["--methods", "erm", "--jobs", "0"], r"`jobs` must be an integer >= 1, got 0"),
        (["--set", "lr=-1"], r"cell 'ce_rw_s0': `lr` must be"),
        (["--set", "mixup=2,3"], r"cell 'ce_rw_s0'.*'3'"),
        (["--methods", "erm", "erm:head=linear"], r"different runs.*'ce_none_head-linear_s0'"),
        (["--methods", "erm", "--set", "scale=20"], r"cell 'ce_none_s0'.*'scale'.*--head cosine"),
        (["--baseline", "emr"], r"`baseline` must be.*Did you mean 'erm'"),
        (["--baseline", "erm:mixxup=0"], r"`option in baseline` must be.*Did you mean 'mixup'"),
    ],
)
def test_bad_grids_start_nothing(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        benchmark.main(tiny(tmp_path, *words))
    assert not (tmp_path / "grid").exists()


@pytest.mark.parametrize("recipe", ["vision", "text"])
def test_the_head_is_a_setting_of_methods_and_of_grids(recipe):
    words = ["--recipe", recipe, "--methods", "erm", "erm:head=cosine", "ldam_drw:head=linear"]
    runs = benchmark.make_tasks(benchmark.parse(words))
    assert [(run.name, run.options["head"]) for run in runs] == [
        ("ce_none_s0", "auto"),
        ("ce_none_head-cosine_s0", "cosine"),
        ("ldam_drw_head-linear_s0", "linear"),
    ]
    words = ["--recipe", recipe, "--methods", "erm", "ldam_drw", "--set", "head=cosine", "scale=20"]
    runs = benchmark.make_tasks(benchmark.parse(words))
    assert [(run.options["head"], run.options["scale"]) for run in runs] == [("cosine", 20)] * 2


def test_bad_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`grid` must be.*Did you mean 'cifar10_paper'"):
        benchmark.parse(["cifar_paper"])
    path = tmp_path / "grid.yaml"
    path.write_text("method: [erm]")
    with pytest.raises(ValueError, match=r"option in grid\.yaml.*Did you mean 'methods'"):
        benchmark.parse([str(path)])


def test_flags_add_to_the_settings_of_a_file_and_override_the_rest(tmp_path):
    path = tmp_path / "grid.yaml"
    path.write_text(
        "preset: digits_lt\nmethods: [erm]\nseeds: [0, 1]\n"
        "set: {epochs: 5, decay_milestones: [3, 4], compile: true}\nvary: {mixup: [0, 0.2]}\n"
        "launcher: slurm\nslurm: {timeout_min: 60, partition: gpu, exclusive: true}\n"
    )
    options = benchmark.parse([str(path), "--seeds", "7", "--set", "epochs=6"])
    assert options.seeds == [7]
    assert (options.launcher, slurm_parameters(options.slurm)) == (
        "slurm",
        {"timeout_min": 60, "slurm_partition": "gpu", "slurm_exclusive": True},
    )
    runs = benchmark.make_tasks(options)
    assert [run.name for run in runs] == ["ce_none_mixup-0_s7", "ce_none_mixup-0.2_s7"]
    expected = {"epochs": 6, "decay_milestones": [3, 4], "compile": True, "mixup": 0.2}
    assert {name: runs[1].options[name] for name in expected} == expected


@pytest.mark.parametrize("preset", [["--preset", ""], ["--preset="], []], ids=str)
@pytest.mark.parametrize("recipe", ["vision", "text"])
def test_own_data_is_not_cut_without_a_preset(tmp_path, recipe, preset, capsys):
    flags = [*preset, "--recipe", recipe, "--methods", "erm", "--set", "dataset=own"]
    options = benchmark.parse([*flags, "--output_dir", str(tmp_path)])
    (run,) = benchmark.make_tasks(options)
    assert run.arguments[:2] == ("--loss", "ce")
    assert "--profile" not in run.arguments
    assert (run.options["dataset"], run.options["profile"]) == ("own", "none")
    (cut,) = benchmark.make_tasks(benchmark.parse([*flags, "--profiles", "step", "--ratios", "9"]))
    assert (cut.options["profile"], cut.options["ratio"]) == ("step", 9)
    benchmark.main(benchmark.parse([*flags, "--dry_run"]))
    assert f"python {Path(run.command()[1])} --loss ce --schedule none" in capsys.readouterr().out


def test_the_long_tail_is_the_presets_where_there_is_one():
    for preset, name, ratio in (("cifar10_lt", "exp", 100), ("inat2018", "none", 1)):
        flags = ["--preset", preset, "--methods", "erm", "--set", "dataset=own"]
        (run,) = benchmark.make_tasks(benchmark.parse(flags))
        assert (run.options["profile"], run.options["ratio"]) == (name, ratio)


def test_without_a_grid_the_four_methods_run_on_what_is_named():
    settings = {
        "": ("digits", "exp", "cifar_resnet20"),
        "--set dataset=own": ("own", "none", "efficientnet_lite0_imagenet"),
        "--set=dataset=own": ("own", "none", "efficientnet_lite0_imagenet"),
        "--vary dataset=own,other": ("own", "none", "efficientnet_lite0_imagenet"),
        "--recipe text": ("stdlib_docstrings", "none", "bilstm"),
        "--recipe text --set dataset=own": ("own", "none", "minilm"),
    }
    for flags, (dataset, profile, model) in settings.items():
        runs = benchmark.make_tasks(benchmark.parse(flags.split()))
        found = [(run.options["loss"], run.options["schedule"]) for run in runs[:4]]
        assert found == [("ce", "none"), ("ce", "rw"), ("ldam", "none"), ("ldam", "drw")]
        assert (runs[0].options["dataset"], runs[0].options["model"]) == (dataset, model)
        assert runs[0].options["profile"] == profile


@pytest.mark.parametrize(
    ("grid", "cells"),
    [
        ("digits_quick", 4),
        ("digits", 40),
        ("digits_mixup", 32),
        ("digits_sensitivity", 16),
        ("stdlib", 40),
        ("stdlib_mixup", 16),
        ("imdb", 12),
        ("cifar10_paper", 10),
    ],
)
def test_grids_are_what_they_say(grid, cells, capsys):
    options = benchmark.parse([grid, "--dry_run"])
    assert benchmark.main(options) == []
    lines = capsys.readouterr().out.splitlines()
    assert len(set(lines)) == cells
    assert all(line.startswith("python ") for line in lines)
    assert {path.stem for path in GRIDS.glob("*.yaml")} >= {grid}
