import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import datasets
import pytest
import torch
from accelerate.state import AcceleratorState

LONG = ("tests/system", "tests/recipes", "tests/integrations", "tests/benchmark", "tests/training")


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest: the last ones end at about the same time."""
    items.sort(key=lambda item: not item.nodeid.startswith(LONG))


def pytest_collection_finish():
    """Look for garbage among what the tests make only: each training run has it looked for.

    Else that takes longer than the run, among all that torch and its like have imported.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _streams_end_at_once(monkeypatch):
    """``datasets`` waits for five seconds at the end of each shuffled stream, for Arrow's sake."""
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


@pytest.fixture(autouse=True)
def _no_accelerator_is_left():
    """Accelerate keeps the device and the precision of the first accelerator of a process."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
