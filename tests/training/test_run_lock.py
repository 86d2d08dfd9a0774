"""A run folder is locked for as long as a run is at work in it, and no longer."""

import errno
import os
import subprocess
import sys

import pytest
from filelock import FileLock

from ldam_plugins.training.history import HistoryWriter
from ldam_plugins.training.run_dir import claim_output_dir
from ldam_plugins.training.run_lock import HOLDER_FILE, folders_held, hold_folder

OPTIONS = {"lr": 0.1}
# Another process that claims the folder, says so, and stays until its input is closed.
OTHER = """
import os, sys
from ldam_plugins.training.run_dir import claim_output_dir
from ldam_plugins.training.run_lock import folders_held
with folders_held():
    resume = sys.argv[2] if sys.argv[2] != "new" else False
    claim_output_dir(sys.argv[1], {"lr": 0.1}, resume=resume)
    child = os.fork() if "fork" in sys.argv else 1  # as a worker of a data loader
    if child:
        print("claimed", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    started = []

    def start(*words):
        command = [sys.executable, "-c", OTHER, str(tmp_path), *words]
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


def test_a_file_system_that_cannot_lock_is_named(tmp_path, monkeypatch):
    def acquire(*args, **options):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(FileLock, "acquire", acquire)
    with pytest.raises(ValueError, match=r"can be locked, got .*Choose .*No locks available"):
        hold_folder(tmp_path)
