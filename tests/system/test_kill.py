"""A run that is killed at any moment and resumed ends with the bits of an undisturbed one."""

import os
import random
import signal
import time

import pytest
import torch
from hf_samples import text_hub
from image_sets import write
from kill_run import TEXT, VISION, finish, fork, kill_after, killed_at, result
from PIL import Image

from ldam_plugins.training.history import read_history
from ldam_plugins.training.preemption import PREEMPTED


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return text_hub(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of 30 and 10 training images as files, which workers read and transform."""
    path, draw = tmp_path_factory.mktemp("images"), random.Random(0)
    for split, counts in (("train", (30, 10)), ("test", (6, 6))):
        for c, count in enumerate(counts):
            for i in range(count):
                pixels = bytes(draw.randrange(256) for _ in range(24 * 24 * 3))
                file = write(path / split / "ab"[c] / f"{i}.png", b"")
                Image.frombytes("RGB", (24, 24), pixels).save(file)
    return path


def check_same(out, whole):
    (left, measured), (right, expected) = result(out), result(whole)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert measured == expected
    columns = ("epoch", "stage", "val_error", "test_error")
    left, right = ([[row[c] for c in columns] for row in read_history(run)] for run in (out, whole))
    assert left == right
    (newest,) = (out / "checkpoints").iterdir()  # all others are dropped, half-written ones too
    assert not newest.name.startswith(".")


def test_vision_run_killed_and_preempted(tmp_path):
    flags = [*VISION, "--ema_decay", 0.5, "--mixup", 0.2, "--schedule", "drs"]
    finish("vision", [*flags, "--output_dir", tmp_path / "whole"], start=fork)
    flags += ["--output_dir", tmp_path / "broken"]
    killed = killed_at("vision", "checkpoint:4", flags, tmp_path, start=fork)
    assert killed.returncode == -signal.SIGKILL
    assert any(p.name.endswith(".partial") for p in (tmp_path / "broken/checkpoints").iterdir())
    preempted = killed_at("vision", "step:3", flags, tmp_path, signal.SIGTERM)
    assert preempted.returncode == PREEMPTED == 143
    assert "--resume" in preempted.stdout
    killed = killed_at("vision", "evaluation:2", flags, tmp_path, start=fork)
    assert killed.returncode == -signal.SIGKILL
    finish("vision", flags, start=fork)
    check_same(tmp_path / "broken", tmp_path / "whole")


def test_text_run_killed_and_preempted(texts, tmp_path):
    flags = [*TEXT, "--dataset", texts, "--ema_decay", 0.5]
    finish("text", [*flags, "--output_dir", tmp_path / "whole"], start=fork)
    flags += ["--output_dir", tmp_path / "broken"]
    preempted = killed_at("text", "step:3", flags, tmp_path, signal.SIGTERM)
    assert preempted.returncode == PREEMPTED
    (saved,) = (tmp_path / "broken" / "checkpoints").iterdir()
    assert saved.name == "checkpoint-3"  # of 7 updates an epoch
    killed = killed_at("text", "checkpoint:2", flags, tmp_path, start=fork)
    assert killed.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "broken" / "checkpoints").iterdir())) == 2
    finish("text", flags, start=fork)
    check_same(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.exhaustive
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("schedule", ["drw", "drs"])
def test_text_run_preempted_inside_epochs(schedule, processes, texts, tmp_path):
    """Inside the first epoch, inside the next one, and inside one that began with a resumed run."""
    flags = [*TEXT, "--dataset", texts, "--schedule", schedule, "--batch_size", 4 // processes]
    finish("text", [*flags, "--output_dir", tmp_path / "whole"], processes=processes)
    flags += ["--output_dir", tmp_path / "broken"]
    # 13 updates an epoch; several processes ask each other at updates 10, 20, 30.
    moments = [("step:3", 3), ("step:15", 18), ("step:12", 26), ("step:4", 30)]
    if processes > 1:
        moments = [("step:3", 10), ("step:9", 20), ("step:10", 26), ("step:4", 30)]
    for number, (moment, update) in enumerate(moments):
        sort = signal.SIGKILL if number == 2 else signal.SIGTERM
        stopped = killed_at("text", moment, flags, tmp_path, sort, processes=processes)
        assert stopped.returncode != 0
        newest = max(int(p.name.split("-")[1]) for p in (tmp_path / "broken/checkpoints").iterdir())
        assert newest == update
    finish("text", flags, processes=processes)
    check_same(tmp_path / "broken", tmp_path / "whole")


LATE = ["--sam_start=1", "--sam_every=2", "--mixup=1", "--mix_until=0.6"]
MATRIX = {
    "none": ("vision", ["--schedule", "none"], 1),
    "drw, average, mixup": ("vision", ["--ema_decay", 0.5, "--mixup", 0.2], 1),
    "drs": ("vision", ["--schedule", "drs"], 1),
    "drw, 2 processes": ("vision", ["--ema_decay", 0.5], 2),
    "all that comes late, 2 processes": (
        "vision",
        [*LATE, "--sam=0.05", "--cutmix=1", "--mixup_prior=remix", "--ema_decay=0.5"],
        2,
    ),
    "files and workers": ("images", [], 1),
    "text none": ("text", ["--schedule", "none", "--loss", "ce"], 1),
    "text drw": ("text", [], 1),
    "text drw, all that comes late": (
        "text",
        [*LATE, "--sam=0.1", "--ema_decay=0.5"],
        1,
    ),
    "text drw, average, 2 processes": ("text", ["--ema_decay", 0.5], 2),
    "text drs": ("text", ["--schedule", "drs"], 1),
    "text drw, 2 processes": ("text", [], 2),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", MATRIX)
def test_killed_at_random_moments(case, texts, images, tmp_path):
    """Three kills a case, 36 in all, each somewhere in the last 70 % of a whole run's time."""
    kind, more, processes = MATRIX[case]
    recipe = "text" if kind == "text" else "vision"
    flags = [*TEXT, "--dataset", texts] if kind == "text" else list(VISION)
    if kind == "images":
        flags += ["--dataset", images, "--image_size", 16, "--memory_limit", 0, "--workers", 2]
        flags += ["--profile", "none", "--batch_size", 8, "--model", "cifar_resnet20"]
    flags += more
    began = time.monotonic()
    finish(recipe, [*flags, "--output_dir", tmp_path / "whole"], processes=processes)
    seconds = time.monotonic() - began
    flags += ["--output_dir", tmp_path / "broken"]
    moments = random.Random(os.environ.get("KILL_SEED", case))
    for _ in range(3):
        kill_after(recipe, flags, seconds * moments.uniform(0.3, 1), processes=processes)
    finish(recipe, flags, processes=processes)
    check_same(tmp_path / "broken", tmp_path / "whole")
