"""What a training loop of your own needs beside Accelerate: resume, evaluation, SIGTERM, a report.

A whole run of LDAM-DRW in any number of processes. Killed at any moment and started again, it goes
on from its last whole epoch; SIGTERM ends it after the running epoch, with exit code 143. It leaves
``history.csv``, ``metrics.json``, checkpoints and a report in ``output_dir``:

.. code-block:: python

    import time

    import torch
    from accelerate import Accelerator
    from torch.utils.data import DataLoader

    from ldam_plugins import ClassCounts, DeferredSchedule, LDAMLoss, Progress, use_cosine_head
    from ldam_plugins.losses import apply_stage
    from ldam_plugins.reports import write_report
    from ldam_plugins.training import TrainStep, begin_run, evaluate, folders_held, run_metrics
    from ldam_plugins.training import save_checkpoint, seed_epoch, training_times
    from ldam_plugins.training import unpadded_batches, until_preempted, write_metrics


    @folders_held()  # no other process may work in the folder until the function returns
    def train(model, train_set, labels, test_set, output_dir, epochs=10, lr=0.1, batch_size=32):
        accelerator, counts = Accelerator(), ClassCounts.from_labels(labels)
        model = use_cosine_head(model, scale=30.0)
        criterion = LDAMLoss(counts, max_margin=0.5, scale=30.0).to(accelerator.device)
        schedule = DeferredSchedule("drw", start=0.8)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        loader = DataLoader(train_set, batch_size, shuffle=True)
        model, optimizer, loader, test_loader = accelerator.prepare(
            model, optimizer, loader, DataLoader(test_set, 4 * batch_size)
        )
        train_step = TrainStep(accelerator, model, criterion, optimizer)
        options = {"epochs": epochs, "lr": lr, "batch_size": batch_size}
        first_epoch, history = begin_run(accelerator, output_dir, options, resume="auto")
        steps, stage = len(loader), None
        for epoch in until_preempted(range(first_epoch, epochs)):
            began, total = time.perf_counter(), 0.0
            seed_epoch(0, epoch, accelerator.process_index)  # so that a resumed run repeats it
            model.train()
            batches = unpadded_batches(
                accelerator, loader, batch_size=batch_size, samples=len(train_set)
            )
            for step, batch in enumerate(batches, epoch * steps):
                progress = Progress(step, epochs * steps, steps)
                stage = apply_stage(criterion, schedule, progress, stage)
                total += train_step([batch]).item()
            seconds = time.perf_counter() - began
            if history is not None:  # on the main process
                row = {"lr": lr, "stage": stage, "train_loss": total / steps}
                history.append(epoch=epoch, seconds=seconds, **row)
            save_checkpoint(accelerator, output_dir, epoch + 1)
        test = evaluate(accelerator, model, test_loader, counts)
        if accelerator.is_main_process:
            metrics = run_metrics(
                options=options, class_counts=counts, device=accelerator.device, test=test
            )
            write_metrics(output_dir, metrics | training_times(output_dir, counts.total))
            write_report(output_dir)
        return test
"""

from typing import TYPE_CHECKING

from ldam_plugins._lazy import lazy_names

if TYPE_CHECKING:
    from ldam_plugins.training.checkpoints import (
        begin_run,
        load_checkpoint,
        newest_checkpoint,
        save_checkpoint,
        write_checkpoint,
    )
    from ldam_plugins.training.distributed import (
        any_process,
        check_processes,
        epoch_batches,
        num_unpadded_rows,
        refuse_deepspeed,
        unpadded_batches,
    )
    from ldam_plugins.training.environment import (
        check_tracker,
        choose_precision,
        default_device,
        device_name,
        keep_freed_memory,
        run_versions,
        seed_epoch,
    )
    from ldam_plugins.training.evaluation import evaluate
    from ldam_plugins.training.files import disk_errors, write_atomic
    from ldam_plugins.training.history import (
        HistoryWriter,
        read_history,
        read_metrics,
        run_metrics,
        training_times,
        write_metrics,
    )
    from ldam_plugins.training.preemption import PREEMPTED, defer_sigterm, until_preempted
    from ldam_plugins.training.run_dir import claim_output_dir, folders_held
    from ldam_plugins.training.sam import SharpnessAware
    from ldam_plugins.training.selection import BestModel, SelectionRule, first_candidate
    from ldam_plugins.training.step import TrainStep, check_converges, micro_batches

__all__ = [
    "PREEMPTED",
    "BestModel",
    "HistoryWriter",
    "SelectionRule",
    "SharpnessAware",
    "TrainStep",
    "any_process",
    "begin_run",
    "check_converges",
    "check_processes",
    "check_tracker",
    "choose_precision",
    "claim_output_dir",
    "default_device",
    "defer_sigterm",
    "device_name",
    "disk_errors",
    "epoch_batches",
    "evaluate",
    "first_candidate",
    "folders_held",
    "keep_freed_memory",
    "load_checkpoint",
    "micro_batches",
    "newest_checkpoint",
    "num_unpadded_rows",
    "read_history",
    "read_metrics",
    "refuse_deepspeed",
    "run_metrics",
    "run_versions",
    "save_checkpoint",
    "seed_epoch",
    "training_times",
    "unpadded_batches",
    "until_preempted",
    "write_atomic",
    "write_checkpoint",
    "write_metrics",
]

# Importing torch and accelerate takes seconds, which the command line of a recipe does not need.
_HOMES = {
    "checkpoints": (
        "begin_run",
        "load_checkpoint",
        "newest_checkpoint",
        "save_checkpoint",
        "write_checkpoint",
    ),
    "distributed": (
        "any_process",
        "check_processes",
        "epoch_batches",
        "num_unpadded_rows",
        "refuse_deepspeed",
        "unpadded_batches",
    ),
    "environment": (
        "check_tracker",
        "choose_precision",
        "default_device",
        "device_name",
        "keep_freed_memory",
        "run_versions",
        "seed_epoch",
    ),
    "evaluation": ("evaluate",),
    "files": ("disk_errors", "write_atomic"),
    "history": (
        "HistoryWriter",
        "read_history",
        "read_metrics",
        "run_metrics",
        "training_times",
        "write_metrics",
    ),
    "preemption": ("PREEMPTED", "defer_sigterm", "until_preempted"),
    "run_dir": ("claim_output_dir", "folders_held"),
    "sam": ("SharpnessAware",),
    "selection": ("BestModel", "SelectionRule", "first_candidate"),
    "step": ("TrainStep", "check_converges", "micro_batches"),
}
__getattr__, __dir__ = lazy_names(
    __name__,
    {name: f"ldam_plugins.training.{module}" for module, names in _HOMES.items() for name in names},
)
