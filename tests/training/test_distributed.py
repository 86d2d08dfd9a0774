import itertools
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from torch import distributed
from torch.utils.data import BatchSampler

from ldam_plugins.training.distributed import (
    any_process,
    check_processes,
    epoch_batches,
    unpadded_batches,
)


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


@pytest.mark.parametrize("spelled", ["--num_processes 2", "--num-processes=2"])
def test_launcher_that_started_one_of_two_is_noticed(tmp_path, spelled):
    script = tmp_path / "script.py"
    script.write_text(
        "from ldam_plugins.training.distributed import check_processes; check_processes(1)"
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", *spelled.split()]
    environment = {key: value for key, value in os.environ.items() if key != "WORLD_SIZE"}
    done = subprocess.run([*command, str(script)], env=environment, capture_output=True, text=True)
    assert "`num_processes` must be 2, as asked for, got 1" in done.stderr


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


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("samples", [8, 13, 24])
def test_every_sample_of_an_epoch_has_its_label_once(samples, processes):
    seen = []
    for process in range(processes):
        shard = BatchSamplerShard(BatchSampler(range(samples), 4, False), processes, process)
        loader = [(torch.tensor(rows), torch.tensor(rows)) for rows in shard]
        accelerator = SimpleNamespace(process_index=process, num_processes=processes)
        for inputs, labels in unpadded_batches(accelerator, loader, batch_size=4, samples=samples):
            assert torch.equal(inputs[: len(labels)], labels)
            seen += labels.tolist()
    assert sorted(seen) == list(range(samples))
