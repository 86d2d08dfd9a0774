"""One process of a Trainer with a RebalanceCallback: ``accelerate launch rebalance_run.py OUT``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from hf_samples import make_data, make_model, make_trainer

from ldam_plugins import DRWCallback, RebalanceCallback


def main(out: Path) -> None:
    """Train, re-balance, save, and write what this process has in memory."""
    data = make_data(counts=[20, 9, 6])
    callback = RebalanceCallback(
        "class_means", held_out=make_data(counts=[9, 8, 7], seed=2), calibrate="temperature"
    )
    trainer = make_trainer(
        out / "trainer",
        make_model(),
        data,
        [DRWCallback(), callback],
        max_steps=2,
        per_device_train_batch_size=5,
    )
    trainer.train()
    model = trainer.accelerator.unwrap_model(trainer.model)
    rank = trainer.args.process_index
    torch.save((model.state_dict(), callback.record), out / f"rank{rank}.pt")
    trainer.save_model(str(out / "model"))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
