import itertools
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch import distributed
from torch.utils.data import BatchSampler

from ldam_plugins.training.environment import (
    any_process,
    check_processes,
    check_tracker,
    choose_precision,
    defer_sigterm,
    drop_partial_checkpoints,
    epoch_batches,
    newest_checkpoint,
    seed_epoch,
    until_preempted,
    write_checkpoint,
)


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ({"amx_tile": True, "amx_bf16": True, "avx512_bf16": True}, "bf16"),
        ({"amx_tile": False, "amx_bf16": False, "avx512_bf16": True}, "no"),
        ({"amx_tile": False, "amx_bf16": True, "avx512_bf16": True}, "no"),
        ({"amx_tile": True, "amx_int8": True, "avx512_bf16": True}, "no"),
        ({"architecture": "aarch64", "bf16": True, "sve": True}, "no"),
        ({}, "no"),
    ],
)
def test_auto_precision_on_a_cpu_is_bf16_only_with_amx(monkeypatch, units, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units, raising=False)
    assert choose_precision() == expected


@pytest.mark.parametrize(("capability", "expected"), [((8, 0), "bf16"), ((7, 5), "no")])
def test_auto_precision_follows_the_gpu(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert choose_precision() == expected


def test_requested_precision_is_taken():
    assert [choose_precision(p) for p in ("no", "bf16", "fp16")] == ["no", "bf16", "fp16"]
    with pytest.raises(ValueError, match=r"`mixed_precision`.*Did you mean 'bf16'"):
        choose_precision("bf-16")


def test_processes_must_be_as_many_as_asked_for(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    check_processes(1)
    check_processes(2, 2)
    with pytest.raises(RuntimeError, match=r"must be 2, as asked for, got 1\. .*torchrun"):
        check_processes(1, 2)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_processes(2)
    with pytest.raises(RuntimeError, match="must be 2"):
        check_processes(1)


FAULTS = """
import resource, sys, torch
from ldam_plugins.training.environment import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(1 << 24)  # 64 MiB, 16,384 pages
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10

found = [faults()]
with keep_freed_memory(sys.argv[1]):
    faults()  # the heap grows once
    found.append(faults())
print(*found, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc is meant")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_freed_memory_is_kept(device):
    command = [sys.executable, "-c", FAULTS, device]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    before, within, after = map(float, done.stdout.split())
    assert before > 10_000
    assert after > 1_000  # part of the heap may serve again
    assert within < 1_000 if device == "cpu" else within > 10_000


def drawn(seed, epoch, process):
    """Numbers of every generator that an epoch of a training draws from."""
    own = seed_epoch(seed, epoch, process)
    numbers = [random.random() for _ in range(4)], np.random.random(4).tolist()
    return [*numbers, torch.rand(4).tolist(), torch.rand(4, generator=own).tolist()]


def test_no_process_draws_what_another_does_in_any_epoch():
    times = list(itertools.product((0, 1), (0, 1, 2, 3), (0, 1, 2)))
    streams = [tuple(stream) for time in times for stream in drawn(*time)]
    assert len(set(streams)) == 4 * len(times)
    assert drawn(1, 2, 1) == drawn(1, 2, 1)
    with pytest.raises(ValueError, match="`epoch` must be an integer >= 0, got -1"):
        seed_epoch(0, -1)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_batches_of_an_epoch_are_counted_as_accelerate_deals_them(processes, drop_last):
    for samples, size in itertools.product((1, 7, 8, 9, 23, 24, 25, 48), (1, 4, 8)):
        batches = BatchSampler(range(samples), size, drop_last)
        dealt = [
            len(list(BatchSamplerShard(batches, processes, process)))
            for process in range(processes)
        ]
        assert set(dealt) == {epoch_batches(samples, size, processes, drop_last=drop_last)}


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


@pytest.mark.parametrize("spelled", ["--num_processes 2", "--num-processes=2"])
def test_launcher_that_started_one_of_two_is_noticed(tmp_path, spelled):
    script = tmp_path / "script.py"
    script.write_text(
        "from ldam_plugins.training.environment import check_processes; check_processes(1)"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *spelled.split()]
    environment = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    done = subprocess.run([*command, str(script)], env=environment, capture_output=True, text=True)
    assert "`num_processes` must be 2, as asked for, got 1" in done.stderr


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


class _Left(Exception):
    """How a block or loop is left early."""


@pytest.fixture
def sigterm():
    """Asks for SIGTERM's handler, which is put back in the end."""
    before = signal.getsignal(signal.SIGTERM)
    yield lambda: signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)


def _epochs(then):
    for epoch in until_preempted(range(3)):
        if epoch == 1:
            then()


def _raise():
    raise _Left


@pytest.mark.parametrize("kind", [signal.SIG_DFL, signal.SIG_IGN, lambda *_: None])
def test_sigterm_has_its_handler_back(kind, sigterm):
    signal.signal(signal.SIGTERM, kind)
    with defer_sigterm() as told:
        assert sigterm() is not kind
    with pytest.raises(_Left), defer_sigterm():
        raise _Left
    assert sigterm() is kind
    with defer_sigterm() as told:
        signal.raise_signal(signal.SIGTERM)
        assert told.is_set()
    assert sigterm() is kind
    for _ in until_preempted(range(3)):
        break
    assert sigterm() is kind
    with pytest.raises(_Left):
        _epochs(_raise)
    assert sigterm() is kind
    with pytest.raises(SystemExit) as ended:
        _epochs(lambda: signal.raise_signal(signal.SIGTERM))
    assert ended.value.code == 143
    assert sigterm() is kind


def test_a_handler_that_others_set_since_is_theirs(sigterm):
    theirs = lambda *_: None  # noqa: E731
    with defer_sigterm():
        signal.signal(signal.SIGTERM, theirs)
    assert sigterm() is theirs


def test_blocks_within_each_other(sigterm):
    before = sigterm()
    with defer_sigterm() as outer:
        note = sigterm()
        with defer_sigterm() as inner:
            signal.raise_signal(signal.SIGTERM)
        assert inner.is_set()
        assert not outer.is_set()
        assert sigterm() is note
    assert sigterm() is before


def test_sigterm_after_what_it_is_noted_for_is_the_old_handlers(sigterm):
    got, runs = [], [True]
    signal.signal(signal.SIGTERM, lambda *_: got.append(1))
    block = defer_sigterm(lambda frame: runs[0])
    told = block.__enter__()  # and is never left
    runs[0] = False
    signal.raise_signal(signal.SIGTERM)
    assert not told.is_set()
    assert got == [1]
    block.__exit__(None, None, None)


def test_other_threads_are_not_told_and_do_no_harm(sigterm):
    before, found = sigterm(), []

    def run():
        with defer_sigterm() as told:
            found.append((sigterm(), told.is_set()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(before, False)]


def test_a_handler_that_is_not_pythons_is_left_as_it_is(sigterm, monkeypatch, caplog):
    before = sigterm()
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    with defer_sigterm() as told:
        pass
    monkeypatch.undo()
    assert sigterm() is before
    assert not told.is_set()
    assert "not Python's" in caplog.text


def test_missing_tracker_is_refused():
    check_tracker("none")
    with pytest.raises(ModuleNotFoundError, match="pip install no_such_tracker"):
        check_tracker("no_such_tracker")


@pytest.fixture
def backend_of_another_name():
    """gloo by a name that holds that of NVIDIA's."""

    def make(store, rank, size, timeout):
        return distributed.ProcessGroupGloo(store, rank, size, timeout)

    if not hasattr(distributed.Backend, "NOTNCCL"):
        distributed.Backend.register_backend("notnccl", make, devices=["cpu"])
    distributed.init_process_group("notnccl", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("backend_of_another_name")
def test_any_process_asks_through_whatever_backend_there_is():
    assert any_process(True)
    assert not any_process(False)
