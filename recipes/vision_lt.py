"""Train a timm model on long-tailed images with LDAM-DRW, or any loss and schedule beside it.

    accelerate launch recipes/vision_lt.py                         # digits, under two minutes
    accelerate launch recipes/vision_lt.py cifar10_lt              # the paper's run
    accelerate launch recipes/vision_lt.py cifar10_lt --loss ce --schedule none

A preset of ``recipes/presets`` (or a YAML or JSON file) may come first, flags after it override it.
Presets hold the paper's settings and say where they come from. Without one the preset is
``digits_lt``, a CIFAR ResNet-20 on a long tail of scikit-learn's digits, unless ``--dataset`` says
otherwise. Everything a run leaves is in ``--output_dir``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, broadcast, set_seed
from options import RESUME, parse_options
from safetensors.torch import load_model, save_model
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from tqdm import trange
from vision_model import read_model, write_model
from vision_setup import (
    VisionOptions,
    check_images,
    compiled,
    images_record,
    load_data,
    make_accelerator,
    make_average,
    make_datasets,
    make_input,
    make_loader,
    make_model,
    make_optimizer,
    make_sampler,
    make_target,
    make_update,
    mixes,
    on_device,
    transformed,
    updates_per_epoch,
)

from ldam_plugins import register
from ldam_plugins.data import LabelledImages
from ldam_plugins.data.in_memory import InMemoryImages
from ldam_plugins.losses import apply_stage, warn_of_combination
from ldam_plugins.losses.base import ClassificationLoss
from ldam_plugins.metrics import MetricAccumulator
from ldam_plugins.reports.run_report import per_class_table, write_report
from ldam_plugins.schedules import Progress
from ldam_plugins.training.environment import (
    drop_partial_checkpoints,
    keep_freed_memory,
    newest_checkpoint,
    num_unpadded_rows,
    seed_epoch,
    until_preempted,
    write_checkpoint,
)
from ldam_plugins.training.history import (
    HistoryWriter,
    device_name,
    read_history,
    run_versions,
    write_metrics,
)
from ldam_plugins.training.run_dir import claim_output_dir
from ldam_plugins.training.run_lock import folders_held

AVERAGE_FILE = "average.safetensors"


@folders_held()
def main(options: VisionOptions) -> dict[str, Any]:
    """Train and evaluate once; returns what ``metrics.json`` holds."""
    register()
    accelerator = make_accelerator(options)
    set_seed(options.seed)
    train, test, counts = load_data(options, show=accelerator.is_main_process)
    criterion = options.make_loss(counts).to(accelerator.device)
    if accelerator.is_main_process:
        warn_of_combination(criterion, options.make_schedule())
    model = make_model(options, criterion)
    check_images(options, model, len(train), accelerator.num_processes)
    train_set, test_set = make_datasets(
        options, model, train, test, show=accelerator.is_main_process
    )
    images = images_record(options, model)
    with keep_freed_memory(accelerator.device):
        model = fit(accelerator, options, model, criterion, train_set, test_set)
        if accelerator.is_main_process:
            write_model(options, model, train.class_names)
        workers = 0 if isinstance(test_set, InMemoryImages) else options.workers
        result = measure(accelerator, options, criterion, test, workers)
    metrics = {
        "options": asdict(options),
        "versions": run_versions(),
        "class_counts": counts.counts,
        "class_names": counts.class_names,
        "images": images,
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "test": result,
    }
    if accelerator.is_main_process:
        save_outputs(options, metrics)
        print(per_class_table(result, counts))
    accelerator.end_training()
    return metrics


def save_outputs(options: VisionOptions, metrics: dict[str, Any]) -> None:
    """Write the metrics and the report."""
    seconds = sum(row["seconds"] for row in read_history(options.output_dir))
    metrics["train_seconds"] = seconds
    metrics["examples_per_second"] = sum(metrics["class_counts"]) * options.epochs / seconds
    write_metrics(options.output_dir, metrics)
    write_report(options.output_dir)


def fit(
    accelerator: Accelerator,
    options: VisionOptions,
    model: nn.Module,
    criterion: ClassificationLoss,
    train_set: Any,
    test_set: Any,
) -> nn.Module:
    """Train to the last epoch, from the newest checkpoint if there is one.

    Test errors on the way, for the history, are of the model in training, cosine head and mixed
    precision included.

    Returns:
        The model of the last epoch, or its moving average if there is one.
    """
    schedule, classes = options.make_schedule(), len(criterion.class_counts)
    sampler = make_sampler(accelerator, options, schedule, train_set, classes)
    steps = updates_per_epoch(accelerator, options, len(sampler))
    to_input = make_input(options, model, accelerator.device)
    train_set, test_set = (on_device(accelerator, images) for images in (train_set, test_set))
    order = {"sampler": sampler, "drop_last": mixes(options)}
    loader = make_loader(options, train_set, batch_size=options.batch_size, **order)
    test_loader = make_loader(options, test_set, batch_size=4 * options.batch_size)
    optimizer, lr_scheduler = make_optimizer(options, model, accelerator.device)
    ema = make_average(accelerator, options, model)
    net = compiled(accelerator, model) if options.compile else model
    net, optimizer, loader, test_loader = accelerator.prepare(net, optimizer, loader, test_loader)
    mix = make_target(options, classes)
    update = make_update(accelerator, options, net, criterion, optimizer)
    first_epoch, history = begin(accelerator, options, criterion, ema)
    stage = None
    epochs = trange(
        first_epoch, options.epochs, unit="epoch", disable=not accelerator.is_main_process
    )
    for epoch in until_preempted(epochs):
        began = time.perf_counter()
        # All that is random in an epoch follows from this, so a resumed run repeats it.
        generator = seed_epoch(options.seed, epoch, accelerator.process_index)
        lr_scheduler.step(epoch)
        loader.set_epoch(epoch)
        sampler.set_epoch(epoch)
        net.train()
        total = torch.zeros((), device=accelerator.device)
        samples = without_repeats(accelerator, loader, options.batch_size, len(sampler))
        for step, parts in enumerate(grouped(samples, options.accumulation), epoch * steps):
            progress = Progress(step, options.epochs * steps, steps)
            stage = apply_stage(criterion, schedule, progress, stage)
            parts = [mix(to_input(images, generator), labels) for images, labels in parts]
            total += update(parts)
            if ema is not None:
                ema.update(model)
        row = {
            "epoch": epoch,
            "lr": optimizer.param_groups[0]["lr"],
            "stage": stage,
            "train_loss": total.item() / steps,
            "test_error": None,
            "seconds": time.perf_counter() - began,
        }
        if (epoch + 1) % options.eval_every == 0 or epoch + 1 == options.epochs:
            on_the_way = evaluate(accelerator, ema or net, criterion, to_input, test_loader)
            row["test_error"] = on_the_way["top1_error"]
        shown = {"loss": row["train_loss"], "error": row["test_error"], "stage": row["stage"]}
        epochs.set_postfix({key: value for key, value in shown.items() if value is not None})
        accelerator.log({k: v for k, v in row.items() if isinstance(v, float)}, step=epoch)
        if history is not None:
            history.append(**row)
        save_epoch(accelerator, options, epoch + 1, ema)
    return model if ema is None else ema.module


def begin(
    accelerator: Accelerator,
    options: VisionOptions,
    criterion: ClassificationLoss,
    ema: ModelEmaV3 | None,
) -> tuple[int, HistoryWriter | None]:
    """Claim the folder or load its newest checkpoint: first epoch to train, and the history."""
    if accelerator.is_main_process:
        # Of a run that is resumed the classes must be the same, in the same order.
        run = {**asdict(options), "class_names": criterion.class_counts.class_names}
        claim_output_dir(options.output_dir, run, resume=RESUME[options.resume])
        drop_partial_checkpoints(options.output_dir)
    accelerator.wait_for_everyone()
    config = {name: str(value) for name, value in asdict(options).items()}
    accelerator.init_trackers("vision_lt", config=config)
    checkpoint, epochs = newest_checkpoint(options.output_dir)
    if checkpoint is not None:
        accelerator.load_state(str(checkpoint))
        if ema is not None:
            load_model(ema.module, str(checkpoint / AVERAGE_FILE))
    main = accelerator.is_main_process
    return epochs, HistoryWriter(options.output_dir, start_epoch=epochs) if main else None


def save_epoch(
    accelerator: Accelerator, options: VisionOptions, epochs: int, ema: ModelEmaV3 | None
) -> None:
    """Write the checkpoint of an epoch, whole or not at all."""

    def save(folder: str) -> None:
        accelerator.save_state(folder)
        if ema is not None and accelerator.is_main_process:
            save_model(ema.module, str(Path(folder, AVERAGE_FILE)))
        accelerator.wait_for_everyone()

    write_checkpoint(options.output_dir, epochs, save, options.keep_checkpoints)


def without_repeats(
    accelerator: Accelerator, loader: Iterable[Any], batch_size: int, samples: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of this process, without labels for rows that repeat samples to fill them up."""
    process, processes = accelerator.process_index, accelerator.num_processes
    for index, (images, labels) in enumerate(loader):
        yield images, labels[: num_unpadded_rows(samples, index, batch_size, process, processes)]


def grouped(loader: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """The micro-batches of one update after another."""
    batches = iter(loader)
    while group := list(islice(batches, size)):
        yield group


def measure(
    accelerator: Accelerator,
    options: VisionOptions,
    criterion: ClassificationLoss,
    test: LabelledImages,
    workers: int,
) -> dict[str, Any]:
    """Metrics of the saved model on the test images, both as anyone gets them who has timm."""
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    model, transform = read_model(options)
    images, size = transformed(test, transform), 4 * options.batch_size
    loader = make_loader(options, images, batch_size=size, num_workers=workers)
    loader = accelerator.prepare(loader)
    net = model.to(accelerator.device)
    return evaluate(accelerator, net, criterion, lambda batch: batch, loader, autocast=False)


@torch.compiler.set_stance("force_eager")  # two more shapes are not worth two more compilations
@torch.inference_mode()
def evaluate(
    accelerator: Accelerator,
    net: nn.Module,
    criterion: ClassificationLoss,
    to_input: Callable[..., Tensor],
    loader: Iterable[tuple[Tensor, Tensor]],
    autocast: bool = True,
) -> dict[str, Any]:
    """Metrics of the whole test set, by plain cross-entropy and accuracy."""
    net.eval()
    for buffer in net.buffers():  # each process has kept batch statistics of its own
        buffer.copy_(broadcast(buffer))
    metrics = MetricAccumulator(criterion.class_counts)
    for images, labels in loader:
        with accelerator.autocast(AutocastKwargs(enabled=autocast)):
            logits = net(to_input(images))
        metrics.update(*accelerator.gather_for_metrics((logits.float(), labels)))
    return metrics.compute()


if __name__ == "__main__":
    main(parse_options(VisionOptions, default="digits_lt"))
