import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from accelerate.state import AcceleratorState


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module", autouse=True)
def _no_accelerator_of_another_module():
    """Accelerate keeps the device and the precision of the first accelerator of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
