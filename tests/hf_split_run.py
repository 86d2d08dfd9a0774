"""One process of a distributed run: ``python hf_split_run.py OUT``; see test_hf_distributed.py."""

import sys
import tempfile

import torch
from hf_samples import logged, make_data, make_model, make_trainer

from ldam_plugins.hf_plugin import DRWCallback

COUNTS = [45, 15, 4]


def run(folder, *, loss="ldam", schedule="drw", start=1, size=64, parts=1, resume=None, **options):
    """Losses, parameters, evaluation loss and the labels met by this process."""
    defaults = {"max_steps": 2, "optim": "sgd", "max_grad_norm": 0.0}
    data = make_data(counts=COUNTS)
    callback = DRWCallback(loss=loss, schedule=schedule, start=start)
    trainer = make_trainer(
        folder,
        make_model(),
        data,
        [callback],
        eval_dataset=data.select(range(32)),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=parts,
        **{**defaults, **options},
    )
    seen, collate = [], trainer.data_collator

    def note(rows):
        seen.extend(row["label"] for row in rows)
        return collate(rows)

    trainer.data_collator = note
    trainer.train(resume_from_checkpoint=resume)
    seen = list(seen)  # before the rows of the evaluation
    return {
        "losses": logged(trainer, "loss"),
        "parameters": torch.cat([p.detach().flatten() for p in trainer.model.parameters()]),
        "eval_loss": trainer.evaluate()["eval_loss"],
        "seen": seen,
        "processes": trainer.accelerator.num_processes,
        "rank": trainer.args.process_index,
    }


def runs(folder, processes):
    """The runs whose results must not depend on the number of processes."""
    found = {}
    for loss in ("ce", "ldam"):
        found[loss, "whole"] = run(folder, loss=loss, size=64 // processes)
        found[loss, "parts"] = run(folder, loss=loss, size=8, parts=8 // processes)
    sampled = {"schedule": "drs", "start": 1, "size": 16 // processes, "max_steps": 11}
    saving = {"save_strategy": "steps", "save_steps": 1}
    found["drs", "straight"] = run(folder, **sampled, **saving)
    for step in (3, 6):  # 4 updates an epoch: before the switch, and inside a re-sampled epoch
        checkpoint = f"{folder}/checkpoint-{step}"
        found["drs", step] = run(folder, **sampled, resume=checkpoint)
    return found


def main():
    out = sys.argv[1]
    processes = int(sys.argv[2])
    folder = tempfile.mkdtemp() if processes == 1 else f"{out}.runs"
    found = runs(folder, processes)
    rank = next(iter(found.values()))["rank"]
    torch.save(found, f"{out}.{rank}")
    if processes > 1:  # one that ends with its threads of gloo running may be aborted
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
