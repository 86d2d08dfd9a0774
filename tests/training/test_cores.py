"""Cores that are free, and threads, on made-up machines."""

import logging
from types import SimpleNamespace

import pytest
import torch

from ldam_plugins.training import cores
from ldam_plugins.training.cores import CoreWatch, fit_threads, usable_cores


class Machine:
    """Eight cores, of which this process may use some; others use some; a clock."""

    def __init__(self, monkeypatch):
        self.allowed, self.quota, self.threads = range(8), None, 8
        self.seconds, self.others, self.own = 0.0, 0.0, 1.0
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr(cores, "_allowed", lambda: list(self.allowed))
        monkeypatch.setattr(cores, "_quota", lambda: self.quota)
        monkeypatch.setattr(cores.time, "perf_counter", lambda: self.seconds)
        monkeypatch.setattr(cores.psutil, "cpu_times", self.cpu_times)
        monkeypatch.setattr(torch, "get_num_threads", lambda: self.threads)
        monkeypatch.setattr(torch, "set_num_threads", lambda n: setattr(self, "threads", n))
        monkeypatch.setattr(
            cores.psutil,
            "Process",
            lambda: SimpleNamespace(
                pid=1,
                cpu_times=lambda: SimpleNamespace(user=self.own * self.seconds, system=0.0),
                parent=lambda: None,
            ),
        )

    def cpu_times(self, percpu):
        """Others keep the first cores busy, this process one more; idle time is not busy."""
        busy = (self.others + self.own) * self.seconds / len(self.allowed)
        return [Times(busy if core in self.allowed else self.seconds, 5.0) for core in range(8)]

    def watched(self, seconds=2.0, processes=1):
        watch = CoreWatch(processes)
        self.seconds += seconds
        return watch


class Times(tuple):
    """CPU times of a core as psutil has them: ``user`` and ``idle``."""

    def __new__(cls, user, idle):
        self = super().__new__(cls, (user, idle))
        self.idle = idle
        return self


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def test_what_others_use_is_not_free(machine):
    machine.others = 2.7
    watch = machine.watched()
    assert watch.others() == pytest.approx(2.7)
    assert watch.free() == 5
    machine.others = 30.0
    assert watch.free() == 1


def test_the_own_time_does_not_count(machine):
    machine.own = 6.0
    assert machine.watched().others() == pytest.approx(0.0)


def test_a_short_look_says_nothing(machine):
    machine.others = 8.0
    assert machine.watched(0.4).others() == 0.0


def test_affinity_and_quota_are_the_most(machine):
    assert machine.watched().free() == 8
    machine.allowed = range(3)
    assert (usable_cores(), machine.watched().free()) == (3, 3)
    machine.quota = 1.5
    assert usable_cores() == 2
    machine.quota = 0.2
    assert usable_cores() == 1


@pytest.mark.parametrize(
    ("others", "processes", "kept", "threads"),
    [
        (0, 1, None, 8),
        (3, 1, None, 5),
        (3, 2, None, 2),
        (8, 4, None, 1),
        (3, 1, 8, 8),
        (0, 2, 8, 4),
    ],
)
def test_threads_are_those_that_are_free(machine, others, processes, kept, threads):
    machine.others = others
    assert fit_threads(machine.watched(processes=processes), kept=kept) == threads
    assert machine.threads == threads


def test_threads_are_never_raised(machine):
    machine.threads = 4
    assert fit_threads(machine.watched()) == 4


def test_given_threads_are_kept_and_a_crowd_is_told(machine, monkeypatch, caplog):
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    assert fit_threads(machine.watched()) == 8
    assert caplog.messages == []
    machine.others = 2.0
    assert fit_threads(machine.watched()) == 8
    assert machine.threads == 8
    told = "8 threads of this run share 8 cores, and other programs use 2.0: steps may take"
    assert caplog.messages[0].startswith(told)
    caplog.clear()
    machine.others = 0.0
    fit_threads(machine.watched(processes=2))
    assert caplog.messages[0].startswith("16 threads of this run share 8 cores: steps may take")
    assert caplog.records[0].levelno == logging.WARNING


@pytest.mark.parametrize(
    ("files", "own", "quota"),
    [
        ({}, "", None),
        ({"cpu.max": "max 100000"}, "0::/\n", None),
        ({"cpu.max": "150000 100000"}, "0::/\n", 1.5),
        ({"cpu.max": "400000 100000", "a/b/cpu.max": "max 100000"}, "0::/a/b\n", 4.0),
        ({"a/cpu.max": "50000 100000", "a/b/cpu.max": "200000 100000"}, "0::/a/b\n", 0.5),
        ({"a/cpu.max": "50000 100000"}, "0::/b\n", None),
        ({"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, "3:cpu:/x\n", None),
        (
            {"cpu/x/cpu.cfs_quota_us": "300000", "cpu/x/cpu.cfs_period_us": "100000"},
            "4:memory:/y\n3:cpuacct,cpu:/x\n",
            3.0,
        ),
        ({"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "100000"}, "", 1.0),
        ({"cpu.max": "200000 100000"}, "0::/../../elsewhere\n", 2.0),
    ],
)
def test_quotas_of_control_groups(tmp_path, files, own, quota):
    root = tmp_path / "cgroup"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    (tmp_path / "own").write_text(own)
    assert cores._quota(root, tmp_path / "own") == quota


def test_this_machine_has_cores():
    watch = CoreWatch()
    assert 1 <= watch.free() <= usable_cores()
    assert watch.others() == 0.0  # too short a look
