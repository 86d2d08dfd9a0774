import errno
import json
import os
import subprocess
import sys

import pytest
from filelock import FileLock

from ldam_plugins.training import run_dir as run_folder
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
    (tmp_path / entry).mkdir()
    with pytest.raises(ValueError, match=f"`output_dir` must be.*{entry}.*--output_dir.*--resume"):
        claim_output_dir(tmp_path, OPTIONS, resume=False)
    assert names(tmp_path) == [entry]


def test_of_two_claims_at_the_same_moment_one_is_refused(tmp_path, monkeypatch):
    claim_output_dir(tmp_path, OPTIONS, resume=False)
    late, seen, check = {**OPTIONS, "seed": 1}, [], run_folder._check_no_run
    monkeypatch.setattr(
        run_folder, "_check_no_run", lambda folder: check(folder) if seen else seen.append(folder)
    )
    with pytest.raises(ValueError, match="holds no run"):
        claim_output_dir(tmp_path, late, resume=False)
    assert json.loads((tmp_path / "options.json").read_text()) == OPTIONS


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
    with pytest.raises(ValueError, match="add --resume"):  # it holds a run, whoever is at work
        claim_output_dir(tmp_path, OPTIONS, resume=False)
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
