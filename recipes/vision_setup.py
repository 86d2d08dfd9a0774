"""What ``vision_lt.py`` trains, and on what: options, images, model, loaders, optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from inspect import signature
from typing import Any

import timm
import torch
from accelerate import Accelerator
from options import (
    COUNT,
    COUNT_OR_0,
    NOT_NEGATIVE,
    POSITIVE,
    SHARE,
    SHARE_BELOW_1,
    CoreOptions,
    option,
)
from timm.data import Mixup, create_transform, resolve_data_config
from timm.data.mixup import mixup_target
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ldam_plugins import ClassCounts, use_cosine_head
from ldam_plugins._checks import check_choice, must_be
from ldam_plugins.batch_norm import use_fast_batch_norm
from ldam_plugins.batches import InMemoryImages, RandomCropFlip, normalize
from ldam_plugins.data import LabelledImages, load_images
from ldam_plugins.long_tail import long_tail_indices
from ldam_plugins.loss_base import ClassificationLoss
from ldam_plugins.runtime import check_processes, check_tracker, choose_precision
from ldam_plugins.samplers import DeferredSampler
from ldam_plugins.schedules import DeferredSchedule
from ldam_plugins.updates import Update

SCHEDULERS = ("cosine", "multistep", "step", "poly", "tanh", "constant")


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
    compile: bool = option(
        False, "compile the model; on one GPU, replay its passes as a CUDA graph"
    )
    eval_every: int = option(1, "epochs between evaluations; the last is always evaluated")


def make_accelerator(options: VisionOptions) -> Accelerator:
    """Accelerate on whatever was launched, after a check that it is what was asked for."""
    check_tracker(options.report_to)
    torch.backends.cudnn.benchmark = True  # batches have one shape: the fastest kernels are kept
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
        train.labels,
        options.ratio,
        options.profile,
        options.subset_seed,
        classes,
        options.class_order,
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


def make_loader(options: VisionOptions, images: Dataset, **order: Any) -> DataLoader:
    """A loader of whole batches from memory, or of single images by workers."""
    if isinstance(images, InMemoryImages):
        return DataLoader(images, collate_fn=InMemoryImages.collate, **order)
    gpu = torch.accelerator.is_available()
    return DataLoader(images, num_workers=options.workers, pin_memory=gpu, **order)


def on_device(accelerator: Accelerator, images: Any) -> Any:
    """Images of memory on the device where they leave it room, all others as they are."""
    if not isinstance(images, InMemoryImages) or accelerator.device.type != "cuda":
        return images
    free, _ = torch.cuda.mem_get_info(accelerator.device)
    return images.to(accelerator.device) if images.pixels.nbytes <= free / 4 else images


def compiled(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The compiled model; on a CPU its batch normalisation becomes one that compiles to less."""
    if accelerator.device.type == "cpu":
        use_fast_batch_norm(model)
    net: Any = torch.compile(model, dynamic=False)
    return net


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
    """Timm's optimizer, in one kernel where it can be, and its scheduler."""
    check_choice("opt", options.opt, list_optimizers())
    known = signature(get_optimizer_class(options.opt, bind_defaults=False)).parameters
    fused = device.type in ("cpu", "cuda") and "fused" in known
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


def make_update(
    accelerator: Accelerator,
    options: VisionOptions,
    net: nn.Module,
    criterion: ClassificationLoss,
    optimizer: torch.optim.Optimizer,
) -> Update:
    """What turns micro-batches into an update, of all that Accelerate has prepared."""
    clip, replay = options.clip_grad, options.compile
    return Update(accelerator, net, criterion, optimizer, clip_grad=clip, replay=replay)


def make_average(
    accelerator: Accelerator, options: VisionOptions, model: nn.Module
) -> ModelEmaV3 | None:
    """Moving average of the weights by timm, if one is asked for."""
    if not options.ema_decay:
        return None
    return ModelEmaV3(model.to(accelerator.device), decay=options.ema_decay)


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
