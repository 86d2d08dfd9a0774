"""Extract features on several processes: ``accelerate launch feature_run.py OUTPUT_DIR``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ldam_plugins.posthoc import Features, extract_features


def samples() -> tuple[nn.Module, TensorDataset]:
    """A model, and 11 samples, which no two processes can share evenly."""
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 5))
    x = torch.randn(11, 3, generator=generator)
    return model, TensorDataset(x, torch.arange(11) % 5)


def main(folder: Path) -> None:
    """Each process writes all that it got."""
    accelerator = Accelerator(cpu=True)
    model, data = samples()
    if not accelerator.is_main_process:  # statistics of its own: the first one's are taken
        model[1].running_mean.add_(1.0)
    rank = accelerator.process_index
    loader = accelerator.prepare(DataLoader(data, 2))
    found = {"memory": extract_features(model, loader, accelerator=accelerator)}
    found["files"] = extract_features(
        model, loader, accelerator=accelerator, memmap_dir=folder / "files"
    )
    for turn in range(2):
        found[f"cache{turn}"] = extract_features(
            model, loader, accelerator=accelerator, cache_dir=folder / "cache"
        )
    for name, features in found.items():
        features.save(folder / f"{name}_{rank}.safetensors")
    assert isinstance(found["files"], Features)
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
