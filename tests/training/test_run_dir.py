import errno
import json
import os
import subprocess
import sys

import pytest
from filelock import FileLock

from ldam_plugins.training.history import HistoryWriter
from ldam_plugins.training.run_dir import (
    HOLDER_FILE,
    LOCK_FILE,
    RUN_ENTRIES,
    claim_output_dir,
    folders_held,
    hold_folder,
)

OPTIONS = {"model": "resnet", "lr": 0.1, "seed": 0, "milestones": [1, 2], "list": None}


def names(folder):
    """What is in a folder, but for its lock."""
    return sorted(set(os.listdir(folder)) - {LOCK_FILE, HOLDER_FILE})


def test_claim_makes_the_folder_and_keeps_the_options(tmp_path):
    folder = claim_output_dir(tmp_path / "a" / "b", OPTIONS, resume=False)
    assert folder == tmp_path / "a" / "b"
    assert names(folder) == ["options.json"]
    assert json.loads((folder / "options.json").read_text()) == OPTIONS


def test_claim_leaves_files_alone_that_are_no_run(tmp_path):
    (tmp_path / "slurm.log").write_text("x")
    claim_output_dir(tmp_path, OPTIONS, resume=False)
    assert names(tmp_path) == ["options.json", "slurm.log"]


@pytest.mark.parametrize("entry", RUN_ENTRIES)
def test_claim_refuses_a_folder_that_holds_a_run(tmp_path, entry):
    """One of another program is a folder that must not be written over as well."""
    (tmp_path / entry).mkdir()
    with pytest.raises(ValueError, match=f"`output_dir` must be.*{entry}.*--output_dir.*--resume"):
        claim_output_dir(tmp_path, OPTIONS, resume=False)
    assert names(tmp_path) == [entry]


def saved_run(folder, options=OPTIONS):
    """A run as it is after its first epoch; returns what it has written."""
    claim_output_dir(folder, options, resume=False)
    HistoryWriter(folder)
    for name in ("checkpoints/epoch_00001", "checkpoints/checkpoint-7", "model"):
        (folder / name).mkdir(parents=True)
    (folder / "checkpoints" / "checkpoint-7" / "whole").touch()
    files = ("metrics.json", "report.html", "training_curve.png", "model/config.json")
    files += ("confusion.csv", "confusion_validation.csv", "confusion.png", "split.csv")
    for name in (*files, "predictions.csv", "predictions_validation.csv"):
        (folder / name).touch()


def test_a_run_that_had_saved_nothing_does_not_block_its_folder(tmp_path):
    claim_output_dir(tmp_path, OPTIONS, resume=False)
    HistoryWriter(tmp_path)
    (tmp_path / "checkpoints" / ".epoch_00001.partial").mkdir(parents=True)
    for resume in (False, "auto"):
        other = {**OPTIONS, "lr": 0.2, "resume": resume}
        claim_output_dir(tmp_path, other, resume=resume)
        assert json.loads((tmp_path / "options.json").read_text()) == other
        assert names(tmp_path) == ["options.json"]


def test_one_that_had_saved_something_does(tmp_path):
    saved_run(tmp_path)
    before = names(tmp_path)
    with pytest.raises(ValueError, match="add --resume to go on, or --overwrite to delete"):
        claim_output_dir(tmp_path, OPTIONS, resume=False)
    with pytest.raises(ValueError, match=r"lr: 0.1 there, 0.2 now"):
        claim_output_dir(tmp_path, {**OPTIONS, "lr": 0.2}, resume="auto")
    assert names(tmp_path) == before


def test_overwrite_deletes_what_a_run_wrote_and_nothing_else(tmp_path):
    folder = tmp_path / "run"
    saved_run(folder)
    mine = ["notes.txt", "checkpoints/mine.pt", "log.txt"]
    for name in mine:
        (folder / name).touch()
    claim_output_dir(folder, {**OPTIONS, "lr": 0.2}, resume=False, overwrite=True)
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert left - {LOCK_FILE, HOLDER_FILE} == {"options.json", *mine}
    assert json.loads((folder / "options.json").read_text())["lr"] == 0.2
    claim_output_dir(tmp_path / "new", OPTIONS, resume=False, overwrite=True)
    with pytest.raises(ValueError, match="`overwrite` must be left out with --resume"):
        claim_output_dir(folder, OPTIONS, resume=True, overwrite=True)


@pytest.mark.parametrize("entry", ["model", "metrics.json"])
def test_overwrite_refuses_a_folder_that_is_no_runs(tmp_path, entry):
    (tmp_path / entry).mkdir()
    (tmp_path / entry / "config.json").touch()
    with pytest.raises(ValueError, match=f"`overwrite` must be .*'{entry}' but no options"):
        claim_output_dir(tmp_path, OPTIONS, resume=False, overwrite=True)
    assert (tmp_path / entry / "config.json").exists()


def test_overwrite_follows_no_link(tmp_path):
    saved_run(tmp_path / "run")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "config.json").touch()
    (tmp_path / "run" / "model" / "config.json").unlink()
    (tmp_path / "run" / "model").rmdir()
    (tmp_path / "run" / "model").symlink_to(tmp_path / "kept")
    claim_output_dir(tmp_path / "run", OPTIONS, resume=False, overwrite=True)
    assert (tmp_path / "kept" / "config.json").exists()
    assert not (tmp_path / "run" / "model").exists()


def test_a_resumed_run_may_have_more_epochs_unless_there_is_a_reason(tmp_path):
    options = {**OPTIONS, "epochs": 4}
    claim_output_dir(tmp_path, options, resume=False)
    more = {**options, "epochs": 6}
    with pytest.raises(ValueError, match=r"`epochs` must be 4 as in the run in .* got 6\. Because"):
        claim_output_dir(tmp_path, more, resume=True, may_grow={"epochs": "Because."})
    with pytest.raises(ValueError, match="epochs: 4 there, 6 now"):
        claim_output_dir(tmp_path, more, resume=True)
    claim_output_dir(tmp_path, more, resume=True, may_grow={"epochs": None})
    assert json.loads((tmp_path / "options.json").read_text()) == more
    with pytest.raises(ValueError, match="epochs: 6 there, 4 now"):
        claim_output_dir(tmp_path, options, resume=True, may_grow={"epochs": None})


@pytest.mark.parametrize("resume", [True, False])
def test_claim_refuses_what_cannot_be_a_folder(tmp_path, resume):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "inside"):
        with pytest.raises(ValueError, match=r"`output_dir` must be.*file"):
            claim_output_dir(path, OPTIONS, resume=resume)
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_claim_refuses_an_unwritable_folder():
    with pytest.raises(ValueError, match=r"can be written, got '/proc/self'.*--output_dir"):
        claim_output_dir("/proc/self", OPTIONS, resume=False)


def test_resume_goes_on_with_the_same_options(tmp_path):
    claim_output_dir(tmp_path, OPTIONS, resume=False)
    (tmp_path / "checkpoints").mkdir()
    now = {**OPTIONS, "milestones": (1, 2), "output_dir": "elsewhere", "resume": True}
    assert claim_output_dir(tmp_path, now, resume=True) == tmp_path
    assert json.loads((tmp_path / "options.json").read_text()) == OPTIONS


def test_resume_names_the_options_that_differ(tmp_path):
    claim_output_dir(tmp_path, {**OPTIONS, "old": 1}, resume=False)
    with pytest.raises(ValueError, match="`options`") as error:
        claim_output_dir(tmp_path, {**OPTIONS, "lr": 0.2, "new": 3}, resume=True)
    message = str(error.value)
    assert "lr: 0.1 there, 0.2 now" in message
    assert "old: 1 there, '(absent)' now" in message
    assert "new: '(absent)' there, 3 now" in message
    assert "seed" not in message
    free = ("lr", "old", "new")
    claim_output_dir(tmp_path, {**OPTIONS, "lr": 0.2}, resume=True, may_change=free)


def test_runs_of_a_version_without_an_option_go_on_where_it_is_none(tmp_path):
    claim_output_dir(tmp_path, OPTIONS, resume=False)
    claim_output_dir(tmp_path, {**OPTIONS, "new": None}, resume=True)
    with pytest.raises(ValueError, match=r"new: '\(absent\)' there, False now"):
        claim_output_dir(tmp_path, {**OPTIONS, "new": False}, resume=True)


def test_resume_of_no_run_names_the_folder_and_makes_none(tmp_path):
    with pytest.raises(ValueError, match=r"run to resume, got '.*nowhere'.*leave out --resume"):
        claim_output_dir(tmp_path / "nowhere", OPTIONS, resume=True)
    assert names(tmp_path) == []


@pytest.mark.parametrize("content", ["", "{", "[1]", "3"])
def test_resume_with_torn_options(tmp_path, content):
    (tmp_path / "options.json").write_text(content)
    with pytest.raises(ValueError, match=r"cannot be read.*--output_dir"):
        claim_output_dir(tmp_path, OPTIONS, resume=True)


def test_options_that_json_cannot_hold_leave_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match=r"`options\['lr'\]` must be a finite number"):
        claim_output_dir(tmp_path / "new", {"lr": float("nan")}, resume=False)
    with pytest.raises(TypeError, match="must be a number, text, list or mapping"):
        claim_output_dir(tmp_path / "new", {"model": object()}, resume=False)
    assert names(tmp_path) == []


# The lock: held for as long as a run is at work in the folder, and no longer

# Another process that claims the folder, says so, and stays until its input is closed.
OTHER = """
import os, sys
from ldam_plugins.training.run_dir import claim_output_dir, folders_held
with folders_held():
    resume = sys.argv[2] if sys.argv[2] != "new" else False
    claim_output_dir(sys.argv[1], OPTIONS, resume=resume)
    child = os.fork() if "fork" in sys.argv else 1  # as a worker of a data loader
    if child:
        print("claimed", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    started = []

    def start(*words):
        code = OTHER.replace("OPTIONS", repr(OPTIONS))
        command = [sys.executable, "-c", code, str(tmp_path), *words]
        pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
        started.append(subprocess.Popen(command, text=True, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_a_second_process_is_refused_and_told_who_is_there(other, tmp_path, monkeypatch):
    monkeypatch.setattr("ldam_plugins.training.run_dir._WAIT", 0.1)
    first = other("new")
    assert first.stdout.readline() == "claimed\n"
    holder = f"process {first.pid} on host .* trains there"
    for resume in (True, "auto"):
        with pytest.raises(ValueError, match=f"`output_dir` must be .*{holder}"):
            claim_output_dir(tmp_path, OPTIONS, resume=resume)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=f"`output_dir` must be .*{holder}"):
            claim_output_dir(tmp_path, OPTIONS, resume=False, overwrite=overwrite)
    (tmp_path / HOLDER_FILE).unlink()
    with pytest.raises(ValueError, match="in which no other run is at work; another process"):
        HistoryWriter(tmp_path)


def test_a_killed_process_leaves_no_lock_nor_does_its_worker_hold_one(other, tmp_path, monkeypatch):
    monkeypatch.setattr("ldam_plugins.training.run_dir._WAIT", 0.1)
    first = other("new", "fork")
    assert first.stdout.readline() == "claimed\n"
    first.kill()
    first.wait()
    with folders_held():
        claim_output_dir(tmp_path, OPTIONS, resume=True)
        second = other("auto")
        _, said = second.communicate()
        assert second.returncode != 0
        assert f"process {os.getpid()} on host" in said


def test_one_process_may_hold_a_folder_several_times(tmp_path):
    locks = [hold_folder(tmp_path) for _ in range(2)]
    assert locks[0] is locks[1]
    HistoryWriter(tmp_path)


def test_blocks_within_each_other_hold_a_folder_to_the_end_of_the_outer_one(other, tmp_path):
    claim_output_dir(tmp_path, OPTIONS, resume=False)
    with folders_held():
        with folders_held():
            hold_folder(tmp_path)
        second = other("auto")
        second.communicate()
        assert second.returncode != 0
    third = other("auto")
    assert third.stdout.readline() == "claimed\n"


def test_a_file_system_that_cannot_lock_is_named(tmp_path, monkeypatch):
    def acquire(*args, **options):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with pytest.raises(ValueError, match=r"can be locked, got .*Choose .*No locks available"):
        hold_folder(tmp_path)
