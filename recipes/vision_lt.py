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

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from options import (
    COUNT,
    COUNT_OR_0,
    NOT_NEGATIVE,
    POSITIVE,
    RESUME,
    SHARE,
    SHARE_BELOW_1,
    CoreOptions,
    option,
    parse_options,
)
from safetensors.torch import load_model, save_model
from timm.data import Mixup, create_transform, resolve_data_config
from timm.data.mixup import mixup_target
from timm.models import save_for_hf
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import trange

from ldam_plugins import ClassCounts, fold_cosine_head, register, use_cosine_head
from ldam_plugins._checks import check_choice, check_int, must_be
from ldam_plugins.batches import InMemoryImages, RandomCropFlip, normalize
from ldam_plugins.combinations import enter_stage, warn_of_combination
from ldam_plugins.data import LabelledImages, load_images
from ldam_plugins.heads import cosine_heads
from ldam_plugins.long_tail import long_tail_indices
from ldam_plugins.loss_base import ClassificationLoss
from ldam_plugins.metrics import MetricAccumulator
from ldam_plugins.reports import per_class_table, write_report
from ldam_plugins.run_files import (
    HistoryWriter,
    claim_output_dir,
    device_name,
    read_history,
    run_versions,
    write_metrics,
)
from ldam_plugins.runtime import (
    check_processes,
    check_tracker,
    choose_precision,
    drop_partial_checkpoints,
    newest_checkpoint,
    own_rows,
    until_preempted,
    write_checkpoint,
)
from ldam_plugins.samplers import DeferredSampler
from ldam_plugins.schedules import DeferredSchedule, Progress

SCHEDULERS = ("cosine", "multistep", "step", "poly", "tanh", "constant")
AVERAGE_FILE = "average.safetensors"


@dataclass
class VisionOptions(CoreOptions):
    """Options of the recipe; presets set those that make an experiment."""

    LIMITS = CoreOptions.LIMITS | {
        "image_size": COUNT,
        "in_memory": COUNT_OR_0,
        "padding": COUNT_OR_0,
        "hflip": SHARE,
        "workers": COUNT_OR_0,
        "momentum": SHARE_BELOW_1,
        "weight_decay": NOT_NEGATIVE,
        "warmup_epochs": COUNT_OR_0,
        "warmup_lr": NOT_NEGATIVE,
        "decay_milestones": COUNT_OR_0,
        "decay_rate": NOT_NEGATIVE,
        "min_lr": NOT_NEGATIVE,
        "mixup": NOT_NEGATIVE,
        "cutmix": NOT_NEGATIVE,
        "smoothing": SHARE_BELOW_1,
        "ema_decay": SHARE_BELOW_1,
        "clip_grad": POSITIVE,
        "eval_every": COUNT,
    }

    dataset: str = option("digits", "hub id, local folder, or digits")
    model: str = option("cifar_resnet32", "name of a timm model")
    epochs: int = option(200, "epochs of training")
    batch_size: int = option(128, "images a process and micro-batch")
    lr: float = option(0.1, "learning rate")
    output_dir: str = option("runs/vision_lt", "folder of the run")
    image_column: str | None = option(None, "image column of a hub dataset [by its type]")
    label_column: str | None = option(None, "label column of a hub dataset [by its type]")
    test_split: str | None = option(None, "split or folder to test on [test, else validation]")
    train_list: str | None = option(None, "list or JSON file of the training images")
    test_list: str | None = option(None, "list or JSON file of the test images")
    skip_corrupt: bool = option(False, "leave out images that cannot be decoded, and count them")
    image_size: int | None = option(None, "side of the images the model gets [the model's own]")
    in_memory: int = option(64, "largest side of images that are held in memory decoded")
    padding: int = option(4, "border of the random crop of images held in memory")
    hflip: float = option(0.5, "probability of a horizontal flip")
    workers: int = option(4, "loader processes for images not held in memory")
    pretrained: bool = option(False, "begin from timm's pretrained weights")
    head: str = option("auto", "auto: cosine where the loss needs it", choices=("auto", "cosine"))
    opt: str = option("sgd", "optimizer of timm")
    momentum: float = option(0.9, "momentum of the optimizer")
    weight_decay: float = option(2e-4, "weight decay of all parameters")
    sched: str = option("cosine", "learning rate scheduler of timm", choices=SCHEDULERS)
    warmup_epochs: int = option(0, "epochs of linear warm-up")
    warmup_lr: float = option(1e-5, "learning rate the warm-up begins with")
    decay_milestones: list[int] = option([], "epochs (0-based) at which multistep decays")
    decay_rate: float = option(0.01, "factor of each decay")
    min_lr: float = option(0.0, "least learning rate of the cosine scheduler")
    mixup: float = option(0.0, "alpha of Mixup")
    cutmix: float = option(0.0, "alpha of CutMix")
    smoothing: float = option(0.0, "label smoothing")
    ema_decay: float = option(0.0, "decay of the weight average that is evaluated; 0: none")
    clip_grad: float | None = option(None, "largest gradient norm")
    compile: bool = option(False, "compile the model")
    eval_every: int = option(1, "epochs between evaluations; the last is always evaluated")


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
    to_input = make_input(options, model, accelerator.device)
    train_set, test_set = make_datasets(options, model, train, test)
    model, result = fit(accelerator, options, model, criterion, to_input, train_set, test_set)
    metrics = {
        "options": asdict(options),
        "versions": run_versions(),
        "class_counts": counts.counts,
        "class_names": counts.class_names,
        "device": device_name(accelerator.device),
        "processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "test": result,
    }
    if accelerator.is_main_process:
        leave(options, model, metrics)
        print(per_class_table(result, counts))
    accelerator.end_training()
    return metrics


def leave(options: VisionOptions, model: nn.Module, metrics: dict[str, Any]) -> None:
    """Write the metrics, the report and the model that timm loads without this package's head."""
    seconds = sum(row["seconds"] for row in read_history(options.output_dir))
    metrics["train_seconds"] = seconds
    metrics["examples_per_second"] = sum(metrics["class_counts"]) * options.epochs / seconds
    write_metrics(options.output_dir, metrics)
    write_report(options.output_dir)
    if cosine_heads(model):
        fold_cosine_head(model)
    model.to(memory_format=torch.contiguous_format)
    save_for_hf(model, str(Path(options.output_dir, "model")), safe_serialization=True)


def make_accelerator(options: VisionOptions) -> Accelerator:
    """Accelerate on whatever was launched, after a check that it is what was asked for."""
    check_tracker(options.report_to)
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=choose_precision(options.mixed_precision),
        log_with=None if options.report_to == "none" else options.report_to,
        project_dir=options.output_dir,
    )
    check_processes(accelerator.num_processes, options.num_processes)
    return accelerator


def load_data(
    options: VisionOptions, show: bool
) -> tuple[LabelledImages, LabelledImages, ClassCounts]:
    """The long-tailed training images, the test images, and the training images per class."""
    train, test = load_images(
        options.dataset,
        image_column=options.image_column,
        label_column=options.label_column,
        test_split=options.test_split,
        train_list=options.train_list,
        test_list=options.test_list,
    )
    if options.skip_corrupt:
        train, test = (part.without(part.find_corrupt(progress=show)) for part in (train, test))
    classes = len(train.class_names)
    keep = long_tail_indices(
        train.labels, options.ratio, options.profile, options.subset_seed, classes
    )
    train = train.subset(keep)
    return train, test, ClassCounts.from_labels(train.labels, class_names=train.class_names)


def make_model(options: VisionOptions, criterion: ClassificationLoss) -> nn.Module:
    """The timm model with a head for the classes, a cosine one where the loss needs it."""
    check_choice("model", options.model, timm.list_models())
    classes = len(criterion.class_counts)
    model = timm.create_model(options.model, pretrained=options.pretrained, num_classes=classes)
    if criterion.needs_cosine_head or options.head == "cosine":
        use_cosine_head(model, options.scale or 30.0)
    return model.to(memory_format=torch.channels_last)


def image_config(options: VisionOptions, model: nn.Module) -> dict[str, Any]:
    """Size, mean, std and interpolation of the model's images, as timm resolves them."""
    given = {} if options.image_size is None else {"img_size": options.image_size}
    config = resolve_data_config(given, model=model)
    keys = ("input_size", "mean", "std", "interpolation", "crop_pct")
    return {key: config[key] for key in keys}


def make_datasets(
    options: VisionOptions, model: nn.Module, train: LabelledImages, test: LabelledImages
) -> tuple[Dataset, Dataset]:
    """Small images decoded in memory, larger ones behind timm's transforms."""
    config = image_config(options, model)
    size = config["input_size"][-1]
    if size <= options.in_memory:
        return InMemoryImages.from_images(train, size), InMemoryImages.from_images(test, size)
    train.transform = create_transform(is_training=True, hflip=options.hflip, **config)
    test.transform = create_transform(**config)
    return train, test


def make_input(
    options: VisionOptions, model: nn.Module, device: torch.device
) -> Callable[..., Tensor]:
    """What turns a batch of a loader into the model's input, augmented if given a generator."""
    config = image_config(options, model)
    mean, std = (torch.tensor(config[name], device=device) for name in ("mean", "std"))
    augment = RandomCropFlip(options.padding, options.hflip)

    def to_input(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if images.dtype == torch.uint8:  # from memory; else timm's transforms did it all
            images = images if generator is None else augment(images, generator)
            images = normalize(images, mean, std)
        return images.contiguous(memory_format=torch.channels_last)

    return to_input


def on_device(accelerator: Accelerator, images: Any) -> Any:
    """Images of memory on the device where they leave it room, all others as they are."""
    if not isinstance(images, InMemoryImages) or accelerator.device.type != "cuda":
        return images
    free, _ = torch.cuda.mem_get_info(accelerator.device)
    return images.to(accelerator.device) if images.pixels.nbytes <= free / 4 else images


def compiled(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The compiled model, on one GPU replayed as CUDA graphs: small steps wait for launches."""
    graphs = accelerator.device.type == "cuda" and accelerator.num_processes == 1
    net: Any = torch.compile(model, dynamic=False, mode="reduce-overhead" if graphs else None)
    return net


def make_loader(options: VisionOptions, images: Dataset, **order: Any) -> DataLoader:
    """A loader of whole batches from memory, or of single images by workers."""
    if isinstance(images, InMemoryImages):
        return DataLoader(images, collate_fn=InMemoryImages.collate, **order)
    gpu = torch.accelerator.is_available()
    return DataLoader(images, num_workers=options.workers, pin_memory=gpu, **order)


def make_sampler(
    accelerator: Accelerator,
    options: VisionOptions,
    schedule: DeferredSchedule,
    images: Any,
    classes: int,
) -> DeferredSampler:
    """The order of the training images under the schedule."""
    update_size = options.batch_size * accelerator.num_processes * options.accumulation
    return DeferredSampler(
        images.labels,
        schedule,
        epochs=options.epochs,
        steps_per_epoch=math.ceil(len(images) / update_size),
        num_classes=classes,
        seed=options.seed,
    )


def make_optimizer(
    options: VisionOptions, model: nn.Module, device: torch.device
) -> tuple[Any, Any]:
    """Timm's optimizer, in one kernel on a GPU where it can be, and its scheduler."""
    check_choice("opt", options.opt, list_optimizers())
    known = signature(get_optimizer_class(options.opt, bind_defaults=False)).parameters
    fused = device.type == "cuda" and "fused" in known
    optimizer = create_optimizer_v2(
        model,
        opt=options.opt,
        lr=options.lr,
        weight_decay=options.weight_decay,
        momentum=options.momentum,
        filter_bias_and_bn=False,
        **({"fused": True} if fused else {}),
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        options.sched,
        num_epochs=options.epochs,
        # timm's multistep decays one epoch before the milestone it is given.
        decay_milestones=[epoch + 1 for epoch in options.decay_milestones],
        decay_rate=options.decay_rate,
        warmup_epochs=options.warmup_epochs,
        warmup_lr=options.warmup_lr,
        min_lr=options.min_lr,
    )
    return optimizer, scheduler


def make_target(options: VisionOptions, classes: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """Mixup, CutMix and label smoothing by timm: (images, labels) -> (images, targets)."""
    if options.mixup or options.cutmix:
        if options.batch_size % 2:
            wanted = "even for --mixup and --cutmix, which mix pairs of images"
            raise ValueError(must_be("batch_size", wanted, options.batch_size))
        return Mixup(
            options.mixup, options.cutmix, label_smoothing=options.smoothing, num_classes=classes
        )
    if options.smoothing:
        return lambda x, y: (x, mixup_target(y, classes, smoothing=options.smoothing))
    return lambda x, y: (x, y)


def fit(
    accelerator: Accelerator,
    options: VisionOptions,
    model: nn.Module,
    criterion: ClassificationLoss,
    to_input: Callable[..., Tensor],
    train_set: Any,
    test_set: Any,
) -> tuple[nn.Module, dict[str, Any]]:
    """Train to the last epoch, from the newest checkpoint if there is one.

    Returns:
        The model of the last epoch (its moving average if there is one) and its test metrics.
    """
    schedule, classes = options.make_schedule(), len(criterion.class_counts)
    sampler = make_sampler(accelerator, options, schedule, train_set, classes)
    train_set, test_set = (on_device(accelerator, images) for images in (train_set, test_set))
    mixing = bool(options.mixup or options.cutmix)  # timm mixes even batches only
    loader = make_loader(
        options, train_set, sampler=sampler, batch_size=options.batch_size, drop_last=mixing
    )
    test_loader = make_loader(options, test_set, batch_size=4 * options.batch_size)
    optimizer, lr_scheduler = make_optimizer(options, model, accelerator.device)
    ema = make_average(accelerator, options, model)
    net = compiled(accelerator, model) if options.compile else model
    net, optimizer, loader, test_loader = accelerator.prepare(net, optimizer, loader, test_loader)
    way_out = f"Choose a smaller --batch_size; there are {len(sampler)} training images."
    batches = check_int("whole batches an epoch", len(loader), low=1, way_out=way_out)
    steps = math.ceil(batches / options.accumulation)
    mix = make_target(options, classes)
    first_epoch, history = begin(accelerator, options, ema)
    result = stage = None
    epochs = trange(
        first_epoch, options.epochs, unit="epoch", disable=not accelerator.is_main_process
    )
    for epoch in until_preempted(epochs):
        began = time.perf_counter()
        # All that is random in an epoch follows from this, so a resumed run repeats it.
        set_seed((options.seed * 10_007 + epoch) % 2**31, device_specific=True)
        generator = torch.Generator().manual_seed(torch.initial_seed())
        lr_scheduler.step(epoch)
        loader.set_epoch(epoch)
        sampler.set_epoch(epoch)
        net.train()
        total = torch.zeros((), device=accelerator.device)
        samples = without_repeats(accelerator, loader, options.batch_size, len(sampler))
        for step, parts in enumerate(grouped(samples, options.accumulation), epoch * steps):
            progress = Progress(step, options.epochs * steps, steps)
            stage = enter_stage(criterion, schedule, progress, stage)
            parts = [mix(to_input(images, generator), labels) for images, labels in parts]
            total += update(accelerator, net, criterion, optimizer, parts, options.clip_grad)
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
            result = evaluate(accelerator, ema or net, criterion, to_input, test_loader)
            row["test_error"] = result["top1_error"]
        shown = {"loss": row["train_loss"], "error": row["test_error"], "stage": row["stage"]}
        epochs.set_postfix({key: value for key, value in shown.items() if value is not None})
        accelerator.log({k: v for k, v in row.items() if isinstance(v, float)}, step=epoch)
        if history is not None:
            history.append(**row)
        save_epoch(accelerator, options, epoch + 1, ema)
    if result is None:  # nothing was left to train
        result = evaluate(accelerator, ema or net, criterion, to_input, test_loader)
    return (model if ema is None else ema.module), result


def make_average(
    accelerator: Accelerator, options: VisionOptions, model: nn.Module
) -> ModelEmaV3 | None:
    """Moving average of the weights by timm, if one is asked for."""
    if not options.ema_decay:
        return None
    return ModelEmaV3(model.to(accelerator.device), decay=options.ema_decay)


def begin(
    accelerator: Accelerator, options: VisionOptions, ema: ModelEmaV3 | None
) -> tuple[int, HistoryWriter | None]:
    """Claim the folder or load its newest checkpoint: first epoch to train, and the history."""
    if accelerator.is_main_process:
        claim_output_dir(options.output_dir, asdict(options), resume=RESUME[options.resume])
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
        yield images, labels[: own_rows(samples, index, batch_size, process, processes)]


def grouped(loader: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """The micro-batches of one update after another."""
    batches = iter(loader)
    while group := list(islice(batches, size)):
        yield group


def update(
    accelerator: Accelerator,
    net: nn.Module,
    criterion: ClassificationLoss,
    optimizer: torch.optim.Optimizer,
    batches: list[tuple[Tensor, Tensor]],
    clip_grad: float | None,
) -> Tensor:
    """One update from micro-batches of all processes; returns its loss.

    Every part is divided by the denominator of the whole, so the update does not depend on how
    the batch was cut: it is the mean over the whole batch that one process would compute. Images
    past the last target are repeats and have no part in it.
    """
    whole = accelerator.reduce(sum(criterion.denominator(y) for _, y in batches), "sum")
    loss = torch.zeros((), device=accelerator.device)
    for index, (images, target) in enumerate(batches):
        last = index + 1 == len(batches)
        with contextlib.nullcontext() if last else accelerator.no_sync(net):
            part = criterion(net(images)[: len(target)], target, whole)
            # DDP averages the gradients over the processes; they are to be summed. (A denominator
            # divided by 3 would be rounded.)
            part = part * accelerator.num_processes
            accelerator.backward(part)
        loss += part.detach()
    if clip_grad is not None:
        accelerator.clip_grad_norm_(net.parameters(), clip_grad)
    optimizer.step()
    optimizer.zero_grad()
    return accelerator.reduce(loss, "mean")


@torch.inference_mode()
def evaluate(
    accelerator: Accelerator,
    net: nn.Module,
    criterion: ClassificationLoss,
    to_input: Callable[..., Tensor],
    loader: Iterable[tuple[Tensor, Tensor]],
) -> dict[str, Any]:
    """Metrics of the whole test set, by plain cross-entropy and accuracy."""
    net.eval()
    for buffer in net.buffers():  # each process has kept batch statistics of its own
        buffer.copy_(broadcast(buffer))
    metrics = MetricAccumulator(criterion.class_counts)
    for images, labels in loader:
        with accelerator.autocast():
            logits = net(to_input(images))
        metrics.update(*accelerator.gather_for_metrics((logits.float(), labels)))
    return metrics.compute()


if __name__ == "__main__":
    main(parse_options(VisionOptions, default="digits_lt"))
