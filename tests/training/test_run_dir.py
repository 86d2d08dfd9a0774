import json
import os
import sys

import pytest

from ldam_plugins.training import run_dir as run_folder
from ldam_plugins.training.run_dir import RUN_ENTRIES, claim_output_dir
from ldam_plugins.training.run_lock import HOLDER_FILE, LOCK_FILE

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
