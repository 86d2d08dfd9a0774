"""Long runs, many classes, and machines that fail under a run."""

import errno
import gc
import os
import shutil
from pathlib import Path

import options as recipe_options
import psutil
import pytest
import safetensors.torch
import text_lt
import torch
import vision_lt
from hf_samples import text_hub
from image_sets import class_folders
from vision_runs import vision_run

from ldam_plugins import ClassCounts, DeferredSchedule, create_loss, use_cosine_head
from ldam_plugins.integrations.transformers.run_callbacks import (
    newest_trainer_checkpoint,
    trainer_checkpoints,
)
from ldam_plugins.schedules import Progress
from ldam_plugins.training.checkpoints import newest_checkpoint
from ldam_plugins.training.history import HistoryWriter

TINY = ["--epochs", "3", "--start", "1", "--ratio", "100", "--mixed_precision", "no"]


def vision(out, *flags):
    return vision_run(out, *TINY, *flags)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    save, calls = torch.save, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) > 3:  # of the second checkpoint
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        message = r"epoch_00002 cannot be written .*No space left.*Make room.*--resume"
        with pytest.raises(OSError, match=message):
            vision(tmp_path / "run")
    assert newest_checkpoint(tmp_path / "run")[1] == 1
    assert len(os.listdir(tmp_path / "run" / "checkpoints")) == 1
    assert vision(tmp_path / "run", "--resume")["test"] == vision(tmp_path / "whole")["test"]


@pytest.fixture
def disk(request, tmp_path):
    """A file system of its own, of 64 MB or so, which the test may fill or make read-only."""
    disk, size = tmp_path / "disk", getattr(request, "param", "64m")
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size={size} tmpfs {disk} 2>/dev/null"):
        pytest.skip("needs the right to mount a small file system")
    yield disk
    while os.path.ismount(disk):  # what make_read_only mounts lies over it
        assert os.system(f"umount {disk} || umount --lazy {disk}") == 0


@pytest.mark.parametrize("disk", ["4m"], indirect=True)
def test_a_disk_that_is_really_full(disk):
    # The model and its momentum are 2.2 MB: one checkpoint fits, a second beside it does not.
    with pytest.raises(OSError, match=r"epoch_00002 cannot be written .*Make room"):
        vision(disk / "run")
    assert newest_checkpoint(disk / "run")[1] == 1
    (held,) = (disk / "run" / "checkpoints").iterdir()
    safetensors.torch.load_file(held / "model.safetensors")


def make_read_only(disk):
    """For all that is opened from now on; files that are open forbid it of the disk itself."""
    assert os.system(f"mount --bind {disk} {disk} && mount -o remount,bind,ro {disk}") == 0


@pytest.mark.parametrize("moment", ["checkpoint", "history"])
def test_a_folder_that_becomes_read_only(disk, moment, tmp_path, monkeypatch):
    """Before the second checkpoint is written, or the row of the history before it."""
    save, append, calls = vision_lt.save_checkpoint, HistoryWriter.append, []

    def strike(name):
        calls.append(name)
        if name == moment and calls.count(name) == 2:
            make_read_only(disk)

    with monkeypatch.context() as patch:
        patch.setattr(
            vision_lt, "save_checkpoint", lambda *a, **k: (strike("checkpoint"), save(*a, **k))
        )
        patch.setattr(
            HistoryWriter, "append", lambda self, **row: (strike("history"), append(self, **row))
        )
        with pytest.raises(OSError, match=r"cannot be written .*Read-only.*mend.*--resume"):
            vision(disk / "run")
    assert newest_checkpoint(disk / "run")[1] == 1
    safetensors.torch.load_file(newest_checkpoint(disk / "run")[0] / "model.safetensors")
    with pytest.raises(ValueError, match=r"`output_dir` must be .*can be written.*Read-only"):
        vision(disk / "run", "--resume")
    os.system(f"umount {disk}")
    assert vision(disk / "run", "--resume")["test"] == vision(tmp_path / "whole")["test"]


@pytest.mark.parametrize("fault", ["read-only", "full"])
def test_a_disk_that_fails_under_a_text_run(disk, fault, tmp_path, monkeypatch):
    text_hub(tmp_path / "texts")
    flags = ["--dataset", tmp_path / "texts", "--epochs", 3, "--start", 1, "--hidden_size", 8]
    flags += [
        "--model",
        "bilstm",
        "--embedding_size",
        8,
        "--mixed_precision",
        "no",
        "--output_dir",
        disk / "run",
    ]

    def run(*more):
        given = list(map(str, [*flags, *more]))
        return text_lt.main(recipe_options.parse_options(text_lt.TextOptions, given, default=""))

    save, calls = text_lt.Trainer._save_checkpoint, []

    def strike(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2 and fault == "read-only":
            make_read_only(disk)
        elif len(calls) == 2:
            (disk / "other").write_bytes(bytes(shutil.disk_usage(disk).free - 8192))
        save(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(text_lt.Trainer, "_save_checkpoint", strike)
        with pytest.raises(OSError, match=r"`?output_dir.* cannot be written .*--resume"):
            run()
    kept = newest_trainer_checkpoint(disk / "run" / "checkpoints")
    safetensors.torch.load_file(Path(kept) / "model.safetensors")
    assert trainer_checkpoints(disk / "run" / "checkpoints").keys() == {1}
    (disk / "other").unlink() if fault == "full" else os.system(f"umount {disk}")
    assert run("--resume")["test"]["top1_error"] >= 0
    assert trainer_checkpoints(disk / "run" / "checkpoints").keys() == {3}


# The connection of the dead worker, which torch's thread may have been about to answer.
@pytest.mark.filterwarnings("ignore:.*<socket.socket:pytest.PytestUnraisableExceptionWarning")
def test_a_worker_that_dies_is_told(tmp_path, monkeypatch):
    class_folders(tmp_path / "set")
    here = os.getpid()
    plain = vision_lt.LabelledImages.image

    def dies(self, index):
        if os.getpid() != here and self.source.root.endswith("set") and index == 4:
            os._exit(9)
        return plain(self, index)

    monkeypatch.setattr(vision_lt.LabelledImages, "image", dies)
    flags = [
        "--dataset",
        tmp_path / "set",
        "--memory_limit",
        0,
        "--workers",
        1,
        "--profile",
        "none",
    ]
    flags += ["--image_size", 16, "--model", "cifar_resnet20", "--batch_size", 2]
    with pytest.raises(RuntimeError, match=r"DataLoader worker .* exited unexpectedly"):
        vision(tmp_path / "run", *flags)
    gc.collect()  # what is left of the worker goes here, not in another test
    assert newest_checkpoint(tmp_path / "run") == (None, 0)
    monkeypatch.setattr(vision_lt.LabelledImages, "image", plain)
    vision(tmp_path / "run", *flags, "--resume")


def steps(count, classes, features=32, batch=16):
    """Updates of a cosine head under LDAM-DRW, the loss asked for by number of the update."""
    counts = ClassCounts([max(1, 1000 - c % 1000) for c in range(classes)])
    model = use_cosine_head(torch.nn.Sequential(torch.nn.Linear(features, classes)))
    criterion = create_loss("ldam", counts)
    schedule = DeferredSchedule("drw", start=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    for step in range(count):
        weights = schedule.class_weights(counts, Progress(step, count, max(count // 10, 1)))
        criterion.weight.copy_(weights)
        x = torch.randn(batch, features, generator=generator)
        y = torch.randint(classes, (batch,), generator=generator)
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def memory():
    gc.collect()
    tensors = sum(1 for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
    return psutil.Process().memory_info().rss, tensors


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.exhaustive)])
def test_memory_is_flat(count):
    readings = []
    for step, loss in enumerate(steps(count, classes=200)):
        assert loss == loss
        if step >= count // 5 and step % (count // 10) == 0:
            readings.append(memory())
    resident, tensors = zip(*readings, strict=True)
    assert max(resident) <= 1.01 * resident[0]
    assert len(set(tensors)) == 1


@pytest.mark.exhaustive
@pytest.mark.parametrize(("classes", "limit"), [(8_142, 0.5e9), (100_000, 4e9)])
def test_many_classes_fit(classes, limit, capsys):
    """2048 features, as of a ResNet-50, in batches of 64; head, momentum and gradient included."""
    before = psutil.Process().memory_info().rss
    peak = 0
    for loss in steps(4, classes, features=2048, batch=64):
        assert loss == loss
        peak = max(peak, psutil.Process().memory_info().rss - before)
    with capsys.disabled():
        print(f"\n{classes} classes: {peak / 1e9:.2f} GB")
    assert peak < limit
