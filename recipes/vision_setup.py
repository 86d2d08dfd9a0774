"""What ``vision_lt.py`` trains, and on what: options, images, model, loaders, optimizer."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import numpy as np
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
    tell_kept,
)
from timm.data import Mixup, create_transform, resolve_data_config
from timm.data.mixup import mixup_target
from timm.models import parse_model_name, resolve_model_input_args, split_model_name_tag
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ldam_plugins import ClassCounts, use_cosine_head
from ldam_plugins._validation import check_choice, check_int, invalid
from ldam_plugins.data import LabelledImages, load_images, long_tail_indices
from ldam_plugins.data.augment import RandomCropFlip, normalize
from ldam_plugins.data.in_memory import InMemoryImages
from ldam_plugins.heads import find_head
from ldam_plugins.kernels.batch_norm import use_fast_batch_norm
from ldam_plugins.losses.base import ClassificationLoss
from ldam_plugins.samplers import DeferredSampler
from ldam_plugins.schedules import DeferredSchedule
from ldam_plugins.training.environment import (
    check_processes,
    check_tracker,
    choose_precision,
    epoch_batches,
    refuse_deepspeed,
)
from ldam_plugins.training.step import TrainStep

SCHEDULERS = ("cosine", "multistep", "step", "poly", "tanh", "constant")
CROP_MODES = ("center", "squash", "border")
SMALL = 64
"""Longest side of the images that ``--augment auto`` moves and mirrors."""


@dataclass
class VisionOptions(CoreOptions):
    """Options of the recipe; presets set those that make an experiment."""

    LIMITS = CoreOptions.LIMITS | {
        "image_size": COUNT,
        "memory_limit": {"low": 0},
        "crop_pct": {"low": 0, "high": 1, "low_open": True},
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
    model: str = option(
        "cifar_resnet32",
        "what timm.create_model takes: resnet18.a1_in1k, hf-hub:..., local-dir:...",
    )
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
    crop_pct: float | None = option(
        None, "share of the resized image that evaluation crops [crop_flip: 1; timm: the model's]"
    )
    crop_mode: str | None = option(
        None, "timm's crop of images that are not square [the model's]", choices=CROP_MODES
    )
    augment: str = option(
        "auto",
        "augmentation: crop_flip moves and mirrors the image, timm cuts random parts of it and "
        f"jitters the colours; auto: crop_flip up to {SMALL} pixels a side, else timm",
        choices=("auto", "crop_flip", "timm"),
    )
    padding: int = option(4, "border of the random crop of --augment crop_flip")
    hflip: float = option(0.5, "probability of a horizontal flip")
    memory_limit: int = option(
        2**31,
        "bytes of decoded images a process may hold in memory, of training and test together [2 "
        "GiB]; more, or images that timm augments, are decoded each time. The same images either "
        "way",
    )
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
    hint = "Use recipes/accelerate/ddp.yaml; recipes/text_lt.py takes ZeRO-2."
    refuse_deepspeed(accelerator.state.deepspeed_plugin, stages=range(4), hint=hint)
    return accelerator


def load_data(
    options: VisionOptions, show: bool
) -> tuple[LabelledImages, LabelledImages, ClassCounts]:
    """The training images, cut to a long tail if asked for, the test images, images per class."""
    train, test = load_images(
        options.dataset,
        image_column=options.image_column,
        label_column=options.label_column,
        test_split=options.test_split,
        train_list=options.train_list,
        test_list=options.test_list,
    )
    if options.skip_corrupt:
        train = without_corrupt(train, "training", show)
        test = without_corrupt(test, "test", show)
    classes = len(train.class_names)
    keep = long_tail_indices(
        train.labels,
        options.ratio,
        options.profile,
        options.subset_seed,
        classes,
        options.class_order,
    )
    before = np.bincount(train.labels, minlength=classes)
    train = train.subset(keep)
    counts = ClassCounts.from_labels(train.labels, class_names=train.class_names)
    if show:
        tell_kept(options, ClassCounts(before), counts)
    return train, test, counts


def without_corrupt(images: LabelledImages, name: str, show: bool) -> LabelledImages:
    """The images that can be decoded; how many cannot is printed."""
    corrupt = images.find_corrupt(progress=show)
    if show and corrupt:
        some = ", ".join(images.describe(index) for index in corrupt[:3])
        more = ", ..." if len(corrupt) > 3 else ""
        print(f"{len(corrupt)} of {len(images)} {name} images cannot be read: {some}{more}")
    return images.without(corrupt)


def make_model(options: VisionOptions, criterion: ClassificationLoss) -> nn.Module:
    """The timm model with a head for the classes, a cosine one where the loss needs it."""
    check_model_name(options.model)
    classes = len(criterion.class_counts)
    try:
        # Models of a fixed size are made for that of the images.
        given = resolve_model_input_args(options.model, {"img_size": options.image_size})
        given |= {"num_classes": classes, "pretrained": options.pretrained}
        model = timm.create_model(**given)
    except (OSError, RuntimeError, ValueError) as error:
        expected = "a model that timm can make with these options"
        raise invalid("model", expected, options.model, hint=f"timm says: {error}") from error
    if criterion.needs_cosine_head or options.head == "cosine":
        use_cosine_head(model, options.scale or 30.0)
    elif options.pretrained:
        order_classes(model, criterion.class_counts)
    return model.to(memory_format=torch.channels_last)


def check_model_name(name: str) -> None:
    """Check a name of timm's own, with or without a tag; what has a source is timm's to find."""
    source, _ = parse_model_name(name)
    if source is None:
        architecture, tag = split_model_name_tag(name)
        if not timm.is_model(architecture):
            check_choice("model", architecture, timm.list_models())
        if tag:
            check_choice("model", name, timm.list_models(architecture, include_tags=True))


def order_classes(model: Any, counts: ClassCounts) -> None:
    """Bring the classes of a head that was trained for the same names into the data's order."""
    trained = model.pretrained_cfg.get("label_names")
    names = list(counts.class_names or ())
    if not isinstance(trained, list | tuple) or sorted(trained) != sorted(names):
        return
    order = [list(trained).index(name) for name in names]
    for name in find_head(model):
        for parameter in model.get_submodule(name).parameters(recurse=False):
            parameter.data = parameter.data[order]


def image_config(options: VisionOptions, model: nn.Module) -> dict[str, Any]:
    """How images become the model's input: size, crop, interpolation, mean and std, for timm.

    Evaluation goes by it, and it is saved with the model.
    """
    given = {"crop_pct": options.crop_pct, "crop_mode": options.crop_mode}
    if options.image_size is not None:
        given["img_size"] = options.image_size
    config = resolve_data_config(given, model=model)
    if augmentation(options, config) == "crop_flip" and options.crop_pct is None:
        config["crop_pct"] = 1.0  # as in training: the image to its edges
    return config


def augmentation(options: VisionOptions, config: Mapping[str, Any]) -> str:
    """What ``--augment auto`` stands for."""
    small = max(config["input_size"][1:]) <= SMALL
    return ("crop_flip" if small else "timm") if options.augment == "auto" else options.augment


def images_record(options: VisionOptions, model: nn.Module) -> dict[str, Any]:
    """What was done to the images, for ``metrics.json``."""
    config = image_config(options, model)
    kind = augmentation(options, config)
    own = {"padding": options.padding} if kind == "crop_flip" else {}
    return {"augmentation": {"kind": kind, "hflip": options.hflip, **own}, "evaluation": config}


def make_datasets(
    options: VisionOptions,
    model: nn.Module,
    train: LabelledImages,
    test: LabelledImages,
    show: bool = False,
) -> tuple[Dataset, Dataset]:
    """Images as uint8 tensors of the model's size, decoded in memory where that is to hold them.

    Where they are held makes no difference to what they are: a set in memory is what the set of
    files gives. timm's augmentation needs the files, each time anew.
    """
    config = image_config(options, model)
    plain = create_transform(**config, normalize=False)
    test = transformed(test, plain)
    if augmentation(options, config) == "timm":
        augment = create_transform(is_training=True, hflip=options.hflip, normalize=False, **config)
        return transformed(train, augment), test
    train = transformed(train, plain)
    if (len(train) + len(test)) * math.prod(config["input_size"]) > options.memory_limit:
        return train, test
    held = [InMemoryImages.from_images(part, progress=show) for part in (train, test)]
    return held[0], held[1]


def transformed(images: LabelledImages, transform: Callable[..., Any]) -> LabelledImages:
    """The images through ``transform``; those that are given stay as they are."""
    images = copy.copy(images)
    images.transform = transform
    return images


def make_input(
    options: VisionOptions, model: nn.Module, device: torch.device
) -> Callable[..., Tensor]:
    """What turns a batch of a loader into the model's input, augmented if given a generator."""
    config = image_config(options, model)
    mean, std = (torch.tensor(config[name], device=device) for name in ("mean", "std"))
    crop_flip = augmentation(options, config) == "crop_flip"
    augment = RandomCropFlip(options.padding, options.hflip)

    def to_input(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if crop_flip and generator is not None:  # timm's augmentation is done by the loader
            images = augment(images, generator)
        return normalize(images, mean, std, memory_format=torch.channels_last)

    return to_input


def check_images(options: VisionOptions, model: nn.Module, images: int, processes: int) -> None:
    """Try the model on its smallest batch before anything is written.

    Raises:
        ValueError: it does not train on the images, or not on the single one that is left over.
    """
    size = image_config(options, model)["input_size"]
    # Accelerate fills up the last batches of several processes.
    last = 0 if processes > 1 or mixes(options) else images % options.batch_size
    alone = (last or options.batch_size) == 1
    error = failure(model, 1, size) if alone else None
    if alone and error is None:
        return
    unfit = failure(model, 2, size)
    if unfit is not None:
        expected = "one that gives logits (N, C) in training on images of " + "x".join(
            map(str, size)
        )
        hint = f"It fails: {unfit}. Choose another --model or --image_size."
        raise invalid("model", expected, options.model, hint=hint) from unfit
    if error is not None:
        larger = itertools.count(options.batch_size + 1)
        other = next(size for size in larger if images % size != 1)
        hint = f"{options.model} cannot train on one image ({error}), and one would be a batch"
        hint += f" of the {images}. Choose another --batch_size, such as {other}."
        expected = "one that leaves no batch of a single image"
        # Whole as it is: where in the model it failed is nothing to mend.
        raise invalid("batch_size", expected, options.batch_size, hint=hint) from None


def failure(model: nn.Module, rows: int, size: tuple[int, ...]) -> Exception | None:
    """The error of a copy of the model in training mode on so many images, if there is one."""
    try:
        with torch.no_grad():
            logits = copy.deepcopy(model).train()(torch.zeros(rows, 3, *size[1:]))
    except Exception as error:  # models answer a wrong size with nearly any exception
        return error
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    return None if shape == (rows, model.num_classes) else TypeError(f"the output is {shape}")


def make_loader(options: VisionOptions, images: Dataset, **order: Any) -> DataLoader:
    """A loader of whole batches from memory, or of single images by workers."""
    if isinstance(images, InMemoryImages):
        return DataLoader(images, collate_fn=InMemoryImages.collate, **order)
    usual = {"num_workers": options.workers, "pin_memory": torch.accelerator.is_available()}
    return DataLoader(images, **usual | order)


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


def mixes(options: VisionOptions) -> bool:
    """Whether images are mixed, which timm does in even, so here in whole batches only."""
    return bool(options.mixup or options.cutmix)


def updates_per_epoch(accelerator: Accelerator, options: VisionOptions, images: int) -> int:
    """Updates of an epoch: what the loop makes, and the sampler and the schedule count in.

    Raises:
        ValueError: there is not one.
    """
    batches = epoch_batches(
        images, options.batch_size, accelerator.num_processes, drop_last=mixes(options)
    )
    hint = f"Choose a smaller --batch_size; there are {images} training images."
    check_int("whole batches an epoch", batches, low=1, hint=hint)
    return math.ceil(batches / options.accumulation)


def make_sampler(
    accelerator: Accelerator,
    options: VisionOptions,
    schedule: DeferredSchedule,
    images: Any,
    classes: int,
) -> DeferredSampler:
    """The order of the training images under the schedule."""
    return DeferredSampler(
        images.labels,
        schedule,
        epochs=options.epochs,
        steps_per_epoch=updates_per_epoch(accelerator, options, len(images)),
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
) -> TrainStep:
    """What turns micro-batches into an update, of all that Accelerate has prepared."""
    clip, replay = options.clip_grad, options.compile
    return TrainStep(accelerator, net, criterion, optimizer, clip_grad=clip, replay=replay)


def make_average(
    accelerator: Accelerator, options: VisionOptions, model: nn.Module
) -> ModelEmaV3 | None:
    """Moving average of the weights by timm, if one is asked for."""
    if not options.ema_decay:
        return None
    return ModelEmaV3(model.to(accelerator.device), decay=options.ema_decay)


def make_target(options: VisionOptions, classes: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """Mixup, CutMix and label smoothing by timm: (images, labels) -> (images, targets)."""
    if mixes(options):
        if options.batch_size % 2:
            expected = "even for --mixup and --cutmix, which mix pairs of images"
            raise invalid("batch_size", expected, options.batch_size)
        return Mixup(
            options.mixup, options.cutmix, label_smoothing=options.smoothing, num_classes=classes
        )
    if options.smoothing:
        return lambda x, y: (x, mixup_target(y, classes, smoothing=options.smoothing))
    return lambda x, y: (x, y)
