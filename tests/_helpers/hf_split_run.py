"""One process of a distributed run of the Trainer; see test_distributed.py.

``python hf_split_run.py OUT PROCESSES slice|whole``
"""

import sys
import tempfile
from functools import partial
from itertools import product
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from hf_samples import logged, make_data, make_model, make_trainer
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, default_data_collator

from ldam_plugins import LongTailMetrics, list_losses, use_cosine_head
from ldam_plugins.data import stream_texts
from ldam_plugins.integrations.transformers import (
    DRWCallback,
    SharpnessAwareTrainer,
    WeightAverageTrainer,
)
from ldam_plugins.integrations.transformers.streaming import StreamingTrainer
from ldam_plugins.training import SharpnessAware

COUNTS = [45, 15, 4]
BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-12}


def run(
    folder,
    *,
    loss="ldam",
    schedule="drw",
    start=1,
    size=64,
    parts=1,
    resume=None,
    chunked=None,
    **options,
):
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
    if chunked:
        use_cosine_head(trainer.model, chunked=True)
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
    found = {"labels": labels_read(folder)}
    for loss in ("ce", "ldam"):
        found[loss, "whole"] = run(folder, loss=loss, size=64 // processes)
        found[loss, "parts"] = run(folder, loss=loss, size=8, parts=8 // processes)
    found["ldam", "chunked"] = run(folder, size=8, parts=8 // processes, chunked=True)
    found["ldam", "uphill"] = run(folder, size=64 // processes, kind=uphill(0.3))
    found["ldam", "uphill, parts"] = run(folder, size=8, parts=8 // processes, kind=uphill(0.3))
    average = {"kind": partial(WeightAverageTrainer, ema_decay=0.5), "save_strategy": "epoch"}
    found["ldam", "average"] = run(folder, size=64 // processes, **average)
    found["ldam", "average, parts"] = run(folder, size=8, parts=8 // processes, **average)
    sampled = {"schedule": "drs", "start": 1, "size": 16 // processes, "max_steps": 11}
    saving = {"save_strategy": "steps", "save_steps": 1}
    found["drs", "straight"] = run(folder, **sampled, **saving)
    for step in (3, 6):  # 4 updates an epoch: before the switch, and inside a re-sampled epoch
        checkpoint = f"{folder}/checkpoint-{step}"
        found["drs", step] = run(folder, **sampled, resume=checkpoint)
    for step in (None, 3):  # 2 updates an epoch: straight, and from inside the second one
        found["stream", step] = streamed(folder, processes, step)
    found["refused"] = [refusal(folder, kind) for kind in (Drops, CallsBare, CountsItsPart)]
    return found


def uphill(rho):
    """A Trainer with sharpness-aware steps, if ``rho`` is not 0."""
    return partial(SharpnessAwareTrainer, sam=SharpnessAware(rho)) if rho else Trainer


def streamed(folder, processes, step):
    """Rows met by this process, and parameters, of a training on a stream of 37 texts."""
    hub = f"{folder}/hub"
    with PartialState().local_main_process_first():
        if not Path(hub).exists():
            columns = {"text": list(map(str, range(37))), "label": [i % 3 for i in range(37)]}
            table = datasets.Dataset.from_dict(columns)
            for split, shard in product(("train", "test"), range(2)):
                table.shard(2, shard).to_parquet(f"{hub}/{split}-{shard}.parquet")
    train, test = stream_texts(hub, shuffle_buffer=7)
    seen = []

    def collate(rows):
        seen.extend(row["input_ids"][0] for row in rows)
        return default_data_collator(rows)

    options = {"max_steps": -1, "num_train_epochs": 3, "optim": "sgd", "max_grad_norm": 0.0}
    options |= {"save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(
        f"{folder}/stream",
        make_model(),
        train.map(map_tokens),
        [DRWCallback(start=1)],
        kind=StreamingTrainer,
        data_collator=collate,
        eval_dataset=test.map(map_tokens),
        compute_metrics=LongTailMetrics([9] * 3),
        per_device_train_batch_size=24 // processes,
        per_device_eval_batch_size=5,
        **options,
    )
    trainer.train(resume_from_checkpoint=step and f"{folder}/stream/checkpoint-{step}")
    trained = list(seen)
    parameters = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])
    error = trainer.evaluate()["eval_top1_error"]
    return {"seen": trained, "parameters": parameters, "error": error}


def map_tokens(text):
    return {"input_ids": [int(text) + 3, 1, 2], "attention_mask": [1, 1, 1]}


class Rows(Dataset):
    """Examples that are counted as they are loaded; the labels are known by no attribute."""

    def __init__(self, broken=None):
        self.table, self.broken, self.loaded = make_data(counts=(9, 4, 2)), broken, 0

    def __len__(self):
        return len(self.table)

    def __getitem__(self, index):
        self.loaded += 1
        if index == self.broken:
            raise OSError("no such file")
        return self.table[index]


class Loaded(TrainerCallback):
    """Note how many examples were loaded before the first update."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.noted = self.rows.loaded


def labels_read(folder):
    """Counts and examples loaded of a training that re-samples; the error of a broken row."""
    found = {}
    for broken in (None, 13):
        rows, loaded = Rows(broken), Loaded()
        loaded.rows = rows
        callback = DRWCallback(schedule="rs")
        trainer = make_trainer(folder, make_model(), rows, [callback, loaded], max_steps=1)
        try:
            trainer.train()
        except ValueError as error:
            found["error"] = str(error)
        else:
            found["counts"] = callback.criterion.class_counts.counts.tolist()
            found["loaded"] = loaded.noted
    return found


class Drops(Trainer):
    """Does not hand on the count."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs)


class CallsBare(Trainer):
    """Hands the count on, and does not make up for the mean over the processes."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        return self.compute_loss_func(model(**inputs), labels, num_items_in_batch)


class CountsItsPart(Trainer):
    """Counts the rows of this process."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        items = torch.tensor(len(inputs["labels"]))
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch=items)


def refusal(folder, kind):
    """Why a subclass of the Trainer is not trained; "" if it is."""
    options = {"max_steps": 1, "per_device_train_batch_size": 8, "kind": kind}
    trainer = make_trainer(
        folder, make_model(), make_data(counts=COUNTS), [DRWCallback()], **options
    )
    try:
        trainer.train()
    except (RuntimeError, ValueError) as error:
        return str(error)
    return ""


class Parameters(TrainerCallback):
    """Note the parameters after every update."""

    def __init__(self):
        self.noted = []

    def on_step_end(self, args, state, control, *, model, **kwargs):
        self.noted.append(torch.cat([p.detach().flatten().clone() for p in model.parameters()]))


def soft_labels(rows):
    batch = default_data_collator(rows)
    target_probs = torch.nn.functional.one_hot(batch["labels"], len(COUNTS)).double()
    return {**batch, "labels": target_probs * 0.9 + 0.1 / len(COUNTS)}


def cases(whole):
    """Loss, soft targets, precision, counts and rho; 24 samples an update, fewer in the last."""
    for loss in list_losses() if whole else ("ce", "ldam"):
        for soft in (False, True):
            for dtype in (torch.float64, torch.float32)[: 2 if loss in ("ce", "ldam") else 1]:
                for counts in ((26, 8, 3), (18, 5, 2)) if whole else ((26, 8, 3),):  # 37 and 25
                    yield loss, soft, dtype, counts, 0.0
    yield "ldam", False, torch.float64, (26, 8, 3), 0.3


def epochs(folder, case, parts, processes):
    """Parameters after every update of an epoch before the switch and one after it."""
    loss, soft, dtype, counts, rho = case
    noted = Parameters()
    trainer = make_trainer(
        folder,
        make_model().to(dtype),
        make_data(counts=counts),
        [DRWCallback(loss=loss, class_counts=counts, start=1, beta=0.99), noted],
        kind=uphill(rho),
        data_collator=soft_labels if soft else default_data_collator,
        per_device_train_batch_size=24 // processes // parts,
        gradient_accumulation_steps=parts,
        num_train_epochs=2,
        max_steps=-1,
        optim="sgd",
        max_grad_norm=0.0,
    )
    trainer.train()
    return torch.stack(noted.noted)


class Answers(torch.nn.Module):
    """A model whose logits are its inputs."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, logits, labels=None):
        return {"loss": logits.new_zeros(()), "logits": logits}


def metrics(folder, rows=37):
    """What LongTailMetrics makes of an evaluation by the Trainer."""
    logits = 3 * torch.randn(rows, len(COUNTS), generator=torch.Generator().manual_seed(2))
    data = make_data(counts=(rows - 3, 2, 1)).select_columns("label")
    data = data.add_column("logits", logits.tolist())
    trainer = make_trainer(
        folder,
        Answers(),
        data,
        compute_metrics=LongTailMetrics(COUNTS),
        data_collator=default_data_collator,
        per_device_eval_batch_size=5,
    )
    return {k: v for k, v in trainer.predict(data).metrics.items() if not _is_time(k)}


def _is_time(key):
    return any(word in key for word in ("runtime", "second", "time", "loss"))


def matrix(folder, processes, accumulations, whole):
    """Parameters by case and accumulation, and metrics."""
    found = {
        (case, parts): epochs(folder, case, parts, processes)
        for case in cases(whole)
        for parts in accumulations
    }
    return {"cases": found, "metrics": metrics(folder)}


def main():
    out, extent = sys.argv[1], sys.argv[3]
    processes = int(sys.argv[2])
    folder = tempfile.mkdtemp() if processes == 1 else f"{out}.runs"
    if extent == "whole":
        found = matrix(folder, processes, (1, 2, 4), True)
    else:
        found = runs(folder, processes) | {"matrix": matrix(folder, processes, (1, 4), False)}
    rank = int(torch.distributed.get_rank()) if torch.distributed.is_initialized() else 0
    torch.save(found, f"{out}.{rank}")
    if processes > 1:  # one that ends with its threads of gloo running may be aborted
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
