import os
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from ldam_plugins.training.checkpoints import (
    begin_run,
    checkpoints,
    drop_partial_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    write_checkpoint,
)
from ldam_plugins.training.history import read_history


def write(folder, text):
    from pathlib import Path

    Path(folder).mkdir(parents=True)
    (Path(folder) / "state").write_text(text)


def test_checkpoints_are_found_and_pruned(tmp_path):
    assert newest_checkpoint(tmp_path) == (None, 0)
    for epochs in (1, 2, 10):
        write_checkpoint(tmp_path, epochs, lambda f, e=epochs: write(f, str(e)), keep=2)
    path, epochs = newest_checkpoint(tmp_path)
    assert (epochs, (path / "state").read_text()) == (10, "10")
    kept = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert kept == ["epoch_00002", "epoch_00010"]


def test_half_written_checkpoint_is_never_picked_up(tmp_path):
    write_checkpoint(tmp_path, 1, lambda f: write(f, "whole"))

    def fail(folder):
        write(folder, "half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_checkpoint(tmp_path, 2, fail)
    path, epochs = newest_checkpoint(tmp_path)
    assert (epochs, (path / "state").read_text()) == (1, "whole")


def test_what_is_no_checkpoint_is_left_alone(tmp_path):
    folder = tmp_path / "checkpoints"
    (folder / "epoch_notes").mkdir(parents=True)
    (folder / "epoch_00009").write_text("a file")
    (folder / ".epoch_x.partial").write_text("a file")
    assert newest_checkpoint(tmp_path) == (None, 0)
    drop_partial_checkpoints(tmp_path)
    write_checkpoint(tmp_path, 1, lambda f: write(f, "1"))
    write_checkpoint(tmp_path, 2, lambda f: write(f, "2"))
    names = {".epoch_x.partial", "epoch_00002", "epoch_00009", "epoch_notes"}
    assert {path.name for path in folder.iterdir()} == names


def test_a_checkpoint_written_again_takes_the_place_of_the_first(tmp_path):
    for text in ("first", "second"):
        path = write_checkpoint(tmp_path, 1, lambda f, t=text: write(f, t))
    assert (path / "state").read_text() == "second"
    assert list(path.parent.iterdir()) == [path]


def test_a_checkpoint_is_on_the_disk_before_older_ones_go(tmp_path, monkeypatch):
    """Names of what was brought to the disk, and removed, in this order."""
    write_checkpoint(tmp_path, 1, lambda f: write(f, "1"))
    order, flush, remove = [], os.fsync, shutil.rmtree

    def noted_flush(descriptor):
        order.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        flush(descriptor)

    def noted_remove(path, *args, **options):
        order.append(f"removed {path.name}")
        remove(path, *args, **options)

    monkeypatch.setattr(os, "fsync", noted_flush)
    monkeypatch.setattr(shutil, "rmtree", noted_remove)
    write_checkpoint(tmp_path, 2, lambda f: write(f, "2"))
    removal = order.index("removed epoch_00001")
    assert {"state", ".epoch_00002.partial"} <= set(order[:removal])
    assert order[removal - 1] == "checkpoints"  # the new name in it


# With Accelerate

ROW = {"lr": 0.1, "stage": "uniform", "train_loss": 1.0, "val_error": None, "seconds": 1.0}


class Run:
    """A model, an average that Accelerate has not prepared, and the folder of their run."""

    def __init__(self, folder):
        self.folder, self.accelerator = folder, Accelerator(cpu=True)
        self.model, self.average = nn.Linear(2, 2), nn.Linear(2, 2)
        self.net = self.accelerator.prepare(self.model)
        self.models = {"average": self.average}

    def begin(self, options, **more):
        return begin_run(self.accelerator, self.folder, options, models=self.models, **more)

    def save(self, epochs, **more):
        return save_checkpoint(self.accelerator, self.folder, epochs, models=self.models, **more)

    def weights(self):
        return torch.stack([self.model.weight, self.average.weight]).detach().clone()


def test_a_run_is_begun_saved_and_resumed(tmp_path):
    first = Run(tmp_path)
    epochs, history = first.begin({"lr": 0.1})
    assert epochs == 0
    for epoch in range(3):
        history.append(epoch=epoch, **ROW)
        path = first.save(epoch + 1, keep=2)
    assert list(checkpoints(tmp_path)) == [2, 3]
    assert {"model.safetensors", "average.safetensors"} <= set(os.listdir(path))
    history.append(epoch=3, **ROW)  # killed before the checkpoint
    (tmp_path / "checkpoints" / ".epoch_00004.partial").mkdir()
    second = Run(tmp_path)
    assert not torch.equal(second.weights(), first.weights())
    epochs, history = second.begin({"lr": 0.1}, resume="auto")
    assert epochs == 3
    assert torch.equal(second.weights(), first.weights())
    assert [row["epoch"] for row in read_history(tmp_path)] == [0, 1, 2]
    assert len(os.listdir(tmp_path / "checkpoints")) == 2
    with pytest.raises(ValueError, match=r"lr: 0.1 there, 0.2 now"):
        second.begin({"lr": 0.2}, resume=True)
    with pytest.raises(ValueError, match="holds no run"):
        second.begin({"lr": 0.1})


def test_without_a_checkpoint_nothing_is_loaded(tmp_path):
    run = Run(tmp_path)
    before = run.weights()
    assert load_checkpoint(run.accelerator, tmp_path, models=run.models) == 0
    assert torch.equal(run.weights(), before)
