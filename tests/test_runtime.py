import os
import platform
import subprocess
import sys

import pytest
import torch
from torch import distributed

from ldam_plugins.runtime import (
    any_process,
    check_processes,
    check_tracker,
    choose_precision,
    device_of_collectives,
    newest_checkpoint,
    write_checkpoint,
)


@pytest.mark.parametrize(
    ("units", "expected"),
    [
        ({"amx_bf16": True, "avx512_bf16": False}, "bf16"),
        ({"amx_bf16": False, "avx512_bf16": True}, "bf16"),
        ({"amx_bf16": False, "avx512_bf16": False}, "no"),
        ({}, "no"),
    ],
)
def test_auto_precision_follows_the_cpu(monkeypatch, units, expected):
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
from ldam_plugins.runtime import keep_freed_memory

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
    script.write_text("from ldam_plugins.runtime import check_processes; check_processes(1)")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *spelled.split()]
    environment = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    done = subprocess.run([*command, str(script)], env=environment, capture_output=True, text=True)
    assert "`num_processes` must be 2, as asked for, got 1" in done.stderr


def test_missing_tracker_is_refused():
    check_tracker("none")
    with pytest.raises(ModuleNotFoundError, match="pip install no_such_tracker"):
        check_tracker("no_such_tracker")


@pytest.mark.parametrize(
    ("config", "device"),
    [
        ("cpu:gloo,cuda:gloo", "cpu"),
        ("cpu:gloo,cuda:nccl", "cpu"),
        ("cuda:nccl,cpu:gloo", "cpu"),
        ("cuda:nccl", "cuda"),
        ("cpu:mpi,cuda:mpi", "cpu"),
        ("cpu:ucc,cuda:ucc", "cpu"),
        ("xpu:xccl", "xpu"),
        ("npu:hccl", "npu"),
        ("hpu:hccl", "hpu"),
        ("cpu:other", "cpu"),
    ],
)
def test_processes_talk_on_a_device_that_the_backend_serves(config, device):
    assert device_of_collectives(config) == device


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
