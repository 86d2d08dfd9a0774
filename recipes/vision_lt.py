"""Train an image classifier of timm or transformers with LDAM-DRW, or any loss and schedule.

    python recipes/vision_lt.py                         # digits, under two minutes
    python recipes/vision_lt.py cifar10_lt              # the paper's run
    accelerate launch --multi_gpu --num_processes 2 recipes/vision_lt.py cifar10_lt

A preset of ``recipes/presets`` (or a YAML or JSON file) may come first, flags after it override it.
Presets hold the paper's settings and say where they come from. Without one the preset is
``digits_lt``, a CIFAR ResNet-20 on a long tail of scikit-learn's digits, unless ``--dataset`` says
otherwise. Everything a run writes is in ``--output_dir``.
"""

from __future__ import annotations

from options import VisionOptions, command_line

if __name__ == "__main__":  # --help and a misspelt flag are answered before torch is imported
    options = command_line(VisionOptions, default="digits_lt")

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from options import (
    RESUME,
    choose_threads,
    held_out_record,
    keep_split,
    keep_tuned,
    last_step_record,
    load_validation,
    print_header,
    print_kept,
    print_outcome,
    split_samples,
    stream_data,
    tuned_for,
    warn_of_start,
    without_untrained,
)
from timm.data import Mixup
from timm.data.mixup import mixup_target
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ldam_plugins import ClassCounts, reports
from ldam_plugins.data import LabelledImages, load_images, long_tail_indices
from ldam_plugins.data.in_memory import InMemoryImages
from ldam_plugins.data.notes import DataNotes
from ldam_plugins.data.streams import StreamedImages, StreamedRows, stream_images
from ldam_plugins.heads import freeze_backbone
from ldam_plugins.heads.choice import put_head, wants_cosine_head, warn_of_linear_head
from ldam_plugins.integrations.timm.adapters import add_adapters, merged
from ldam_plugins.integrations.timm.images import (
    ImagePipeline,
    InputLoader,
    image_loader,
    on_device,
    transformed,
)
from ldam_plugins.integrations.timm.mixup import Remix
from ldam_plugins.integrations.timm.models import check_trains_on, create_classifier
from ldam_plugins.integrations.timm.saved_model import load_model, save_model
from ldam_plugins.kernels.batch_norm import use_fast_batch_norm
from ldam_plugins.losses import apply_stage, warn_of_combination
from ldam_plugins.losses.base import ClassificationLoss
from ldam_plugins.posthoc import Features, Finished, extract_features
from ldam_plugins.posthoc.last_step import scratch_folder
from ldam_plugins.reports.console import RunBar
from ldam_plugins.samplers import DeferredSampler
from ldam_plugins.schedules import DeferredSchedule, Progress
from ldam_plugins.training import (
    BestModel,
    TrainStep,
    begin_run,
    check_converges,
    check_processes,
    check_tracker,
    choose_precision,
    epoch_batches,
    evaluate,
    folders_held,
    keep_freed_memory,
    micro_batches,
    refuse_deepspeed,
    run_metrics,
    save_checkpoint,
    seed_epoch,
    training_times,
    unpadded_batches,
    until_preempted,
    write_metrics,
)
from ldam_plugins.training.auto_tune import Tuned
from ldam_plugins.training.distributed import is_sharded
from ldam_plugins.training.options import (
    check_choice,
    check_int,
    invalid,
)


@folders_held()
def main(options: VisionOptions) -> dict[str, Any]:
    """Train and evaluate once; returns what its files of results hold."""
    state = join_processes(options)
    choose_threads(options)
    accept_default_workers(options)
    set_seed(options.seed)
    options.check_model()
    notes = DataNotes()
    show = state.is_main_process and not options.quiet
    if options.streaming:
        train, test, counts = stream_data(options, stream_parts, show, notes)
    else:
        train, test, counts = load_data(options, show, notes)
    train, validation, counts = hold_out(options, train, counts, show, notes)
    counts = counts.with_limits(many_above=options.many, few_below=options.few)
    watched = watched_images(options, validation, test)
    unread = options.measures_test and "test_error" not in watched and not options.streaming
    if unread and not options.skip_corrupt:
        refuse_corrupt(test, show=show)
    criterion = options.make_loss(counts).to(state.device)
    if state.is_main_process:
        warn_of_combination(criterion, options.make_schedule())
        warn_of_linear_head(criterion, wants_cosine_head(criterion, options.head))
    if show:
        print_header(
            options,
            counts,
            "images",
            held_out=0 if validation is None else len(validation),
            test=len(test) if options.measures_test else 0,
            device=state.device,
            processes=state.num_processes,
        )
    model = make_model(options, criterion)
    options.check_last_step(model)
    pipeline = make_pipeline(options, model)
    check_trains_on(
        model,
        pipeline.config["input_size"],
        name=options.model,
        samples=len(train),
        batch_size=options.batch_size,
        fills_batches=state.num_processes > 1 or options.mixes,
    )
    if options.lora_rank:
        size = pipeline.config["input_size"]
        model = add_adapters(model, options.lora_rank, options.lora_alpha, size)
    train_set: Any
    train_set, *eval_sets = pipeline.datasets(
        train,
        *watched.values(),
        memory_limit=options.memory_limit,
        progress=show,
    )
    with keep_freed_memory(state.device):
        tuned = tune(state, options, model, criterion, pipeline, len(train_set))
        accelerator = make_accelerator(options, tuned.precision)
        parts = dict(zip(watched, eval_sets, strict=True))
        model, selection = fit(
            accelerator, options, tuned, model, criterion, pipeline, train_set, parts, notes
        )
        model = merged(model)
        images = {"train": train, "validation": validation}
        images |= {"test": test} if options.measures_test else {}
        workers = 0 if isinstance(train_set, InMemoryImages) else options.workers
        finished = finish(accelerator, options, model, pipeline, counts, images, workers)
        if accelerator.is_main_process:
            leave_model(options, model, pipeline, train.class_names)
        held_out: dict[str, Any] = {} if selection is None else {"selection": selection}
        if validation is not None:
            labels = validation if options.streaming else validation.labels
            held_out["held_out"] = held_out_record(labels, counts)
            found = measure(accelerator, options, counts, validation, workers)
            held_out["validation"] = found
        result = None
        if options.measures_test:
            result = measure(accelerator, options, counts, test, workers)
    held_out |= last_step_record(finished, result or held_out.get("validation"))
    metrics = run_metrics(
        options=asdict(options),
        **notes.record(),
        class_counts=counts,
        device=accelerator.device,
        images=pipeline.record(),
        processes=accelerator.num_processes,
        mixed_precision=accelerator.mixed_precision,
        auto_tune=asdict(tuned),
        **held_out,
        test=result,
    )
    if accelerator.is_main_process:
        save_outputs(options, metrics, counts, test if options.measures_test else validation)
    accelerator.end_training()
    return metrics


def fit(
    accelerator: Accelerator,
    options: VisionOptions,
    tuned: Tuned,
    model: nn.Module,
    criterion: ClassificationLoss,
    pipeline: ImagePipeline,
    train_set: Any,
    eval_sets: dict[str, Any],
    notes: DataNotes,
) -> tuple[nn.Module, dict[str, Any] | None]:
    """Train to the last epoch, from the newest checkpoint if there is one.

    ``eval_sets`` are the images whose error is watched during training, by its column in the
    history. These errors are of the model in training, cosine head and mixed precision included.
    ``notes`` are those of the data: of data that were divided ``split.csv`` is written.

    Returns:
        The model of the last epoch, or its moving average if there is one; with ``--select`` that
        of the best epoch, and what is to be said of it.
    """
    schedule, counts = options.make_schedule(), criterion.class_counts
    samples, batch_size = len(train_set), options.batch_size
    steps = steps_per_epoch(accelerator, options, samples)
    warn_of_start(schedule, options.epochs * steps, steps)
    sampler = make_sampler(accelerator, options, schedule, train_set, len(counts))
    train_set = on_device(train_set, accelerator.device)
    loader = image_loader(
        train_set,
        workers=options.workers,
        batch_size=batch_size,
        sampler=sampler,
        drop_last=options.mixes,
    )
    eval_loaders = [
        image_loader(
            on_device(images, accelerator.device),
            workers=options.workers,
            batch_size=4 * batch_size,
        )
        for images in eval_sets.values()
    ]
    to_input = pipeline.make_input(accelerator.device)
    sam, mix, plain = options.make_sam(), make_mixing(options, counts), make_target(options, counts)
    optimizer, lr_scheduler = make_optimizer(options, model, accelerator.device)
    ema = make_average(accelerator, options, model)
    evaluated = model if ema is None else ema.module
    rule = options.make_selection(steps)
    best = None if rule is None else BestModel(evaluated, rule, options.epochs)
    beside: dict[str, nn.Module] = {} if ema is None else {"average": ema.module}
    beside |= {} if best is None else {"best": best}
    net = compiled(accelerator, model) if tuned.compile else model
    net, optimizer, loader, *eval_loaders = accelerator.prepare(
        net, optimizer, loader, *eval_loaders
    )
    train_step = make_train_step(accelerator, options, net, criterion, optimizer)
    # The classes of a run that is resumed must be the same, in the same order.
    run = {**asdict(options), "class_names": counts.class_names}
    first_epoch, history = begin_run(
        accelerator,
        options.output_dir,
        run,
        resume=RESUME[options.resume],
        may_grow=options.may_grow(),
        overwrite=options.overwrite,
        models=beside,
        test_error="test_error" in eval_sets,
    )
    keep_split(options, notes, write=accelerator.is_main_process)
    keep_tuned(options, tuned, write=accelerator.is_main_process)
    config = {name: str(value) for name, value in asdict(options).items()}
    accelerator.init_trackers("vision_lt", config=config)
    stage = None
    show = accelerator.is_main_process and not options.quiet
    bar = RunBar(options.epochs, steps, first_epoch, show=show)
    for epoch in until_preempted(range(first_epoch, options.epochs)):
        if best is not None and best.stops:
            break
        bar.begin_epoch(epoch)
        began = time.perf_counter()
        # All random numbers of an epoch follow from this, so a resumed run repeats them.
        generator = seed_epoch(options.seed, epoch, accelerator.process_index)
        lr_scheduler.step(epoch)
        loader.set_epoch(epoch)
        sampler.set_epoch(epoch)
        net.train()
        total = torch.zeros((), device=accelerator.device)
        batches = unpadded_batches(accelerator, loader, batch_size=batch_size, samples=samples)
        for step, group in enumerate(micro_batches(batches, options.accumulation), epoch * steps):
            progress = Progress(step, options.epochs * steps, steps)
            stage = apply_stage(criterion, schedule, progress, stage)
            make = mix if options.mixes_at(progress) else plain
            parts = [make(to_input(x, generator), labels) for x, labels in group]
            total += train_step(parts, rho=sam.rho_at(progress))
            if ema is not None:
                ema.update(model)
            bar.step()
        row = {
            "epoch": epoch,
            "lr": max(group["lr"] for group in optimizer.param_groups),
            "stage": stage,
            "train_loss": total.item() / steps,
            "seconds": time.perf_counter() - began,
        }
        check_converges(row["train_loss"], model, options.lr, epoch)
        for column, eval_loader in zip(eval_sets, eval_loaders, strict=True):
            if options.evaluates(column, epoch):
                found = evaluate(accelerator, ema or net, eval_loader, counts, to_input=to_input)
                row[column] = found["top1_error"]
                if best is not None and column == "val_error":
                    best.update(evaluated, epoch, found[options.select])
        shown = {"stage": row["stage"], "loss": row["train_loss"]}
        bar.show(**shown, **{name: row.get(name) for name in eval_sets})
        accelerator.log({k: v for k, v in row.items() if isinstance(v, float)}, step=epoch)
        if history is not None:
            history.append(**row)
        save_checkpoint(
            accelerator,
            options.output_dir,
            epoch + 1,
            keep=options.keep_checkpoints,
            models=beside,
        )
    bar.close()
    if best is None:
        return evaluated, None
    evaluated.load_state_dict(best.module.state_dict())
    return evaluated, best.rule.record(best.scores)


def finish(
    accelerator: Accelerator,
    options: VisionOptions,
    model: nn.Module,
    pipeline: ImagePipeline,
    counts: ClassCounts,
    images: dict[str, Any],
    workers: int,
) -> Finished | None:
    """Re-balance and calibrate the head of the trained model, if that is asked for.

    ``images`` are those of ``train``, ``validation`` (None if nothing is held out) and, where it is
    measured, ``test``.
    """
    step = options.make_last_step()
    if step is None:
        return None
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    model = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    to_input = pipeline.make_input(accelerator.device)
    with scratch_folder(options.output_dir) as folder:

        def extract(part: str) -> Features:
            # Of each pair the second one is not augmented.
            _, plain = pipeline.datasets(images[part], images[part], memory_limit=0)
            loader = image_loader(plain, workers=workers, batch_size=4 * options.batch_size)
            return extract_features(
                model,
                InputLoader(accelerator.prepare(loader), to_input),
                class_names=counts.class_names,
                accelerator=accelerator,
                memmap_dir=folder / part,
                progress=not options.quiet,
            )

        parts = {part: partial(extract, part) for part, of in images.items() if of is not None}
        return step.run(model, counts, parts)


def measure(
    accelerator: Accelerator,
    options: VisionOptions,
    counts: ClassCounts,
    images: LabelledImages,
    workers: int,
) -> dict[str, Any]:
    """Metrics of the saved model on some images, used as anyone does who has its library only."""
    accelerator.free_memory()
    accelerator.wait_for_everyone()
    if options.is_of_transformers:
        from ldam_plugins.integrations.transformers.images import load_image_classifier

        model, transform = load_image_classifier(model_folder(options))
    else:
        model, transform = load_model(model_folder(options))
    loader = image_loader(
        transformed(images, transform), workers=workers, batch_size=4 * options.batch_size
    )
    loader = accelerator.prepare(loader)
    return evaluate(
        accelerator,
        model.to(accelerator.device),
        loader,
        counts,
        autocast=False,
        groups=images.groups,
        detailed=True,
        examples=None if options.streaming else images.examples().names,
    )


def leave_model(
    options: VisionOptions, model: Any, pipeline: ImagePipeline, class_names: Sequence[str]
) -> None:
    """Write the model for the loaders of its own library."""
    folder, title = model_folder(options), Path(options.output_dir).name
    if options.is_of_transformers:
        model.save(folder, title=title, pretrained=options.model)
        return
    save_model(
        model,
        folder,
        class_names=class_names,
        data_config=pipeline.config,
        title=title,
        pretrained=options.model if options.is_pretrained else None,
    )


def save_outputs(
    options: VisionOptions,
    metrics: dict[str, Any],
    counts: ClassCounts,
    measured: LabelledImages | None,
) -> None:
    """Write the metrics and the report, and print the accuracy of each class."""
    times = training_times(options.output_dir, counts.total)
    write_metrics(options.output_dir, metrics | times)
    if measured is not None and not options.streaming:
        reports.write_mistakes(options.output_dir, measured.image, options.measured_part)
    reports.write_report(options.output_dir)
    print_outcome(options, metrics, counts)


def join_processes(options: VisionOptions) -> PartialState:
    """The processes that were launched, if they are those that were asked for."""
    check_tracker(options.report_to)
    torch.backends.cudnn.benchmark = True  # batches have one shape: the fastest kernels are kept
    state = PartialState(cpu=not torch.accelerator.is_available())
    check_processes(state.num_processes, options.num_processes)
    return state


def accept_default_workers(options: VisionOptions) -> None:
    """No warning of torch that there are more loader processes than cores, unless they were given.

    As many by default on every machine: the random numbers of augmentations go by them.
    """
    if options.workers == VisionOptions.workers:
        warnings.filterwarnings("ignore", "This DataLoader will create")


def tune(
    state: PartialState,
    options: VisionOptions,
    model: nn.Module,
    criterion: ClassificationLoss,
    pipeline: ImagePipeline,
    samples: int,
) -> Tuned:
    """How the model is trained fastest here, found by passes over a batch of noise of its size."""

    def noise() -> list[tuple[Tensor, Tensor]]:
        rows = min(options.batch_size, samples)
        images = torch.randn(rows, *pipeline.config["input_size"])
        labels = torch.arange(rows) % len(criterion.class_counts)
        return [(images.to(memory_format=torch.channels_last), labels)]

    steps = steps_per_epoch(state, options, samples)
    return tuned_for(
        options,
        model,
        criterion,
        noise,
        device=state.device,
        compile=options.compile,
        passes=options.epochs * steps * options.accumulation,
        unmeasured="by rule, as the model is sharded" if is_sharded(state) else None,
        compiled=partial(compiled, state),
    )


def make_accelerator(options: VisionOptions, precision: str | None = None) -> Accelerator:
    """Accelerate, in the precision that was chosen; unless told by its rule."""
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision=precision or choose_precision(options.mixed_precision),
        log_with=None if options.report_to == "none" else options.report_to,
        project_dir=options.output_dir,
    )
    hint = "Use recipes/accelerate/ddp.yaml; recipes/text_lt.py takes ZeRO-2."
    refuse_deepspeed(accelerator.state.deepspeed_plugin, stages=range(4), hint=hint)
    return accelerator


def load_data(
    options: VisionOptions, show: bool, notes: DataNotes | None = None
) -> tuple[LabelledImages, LabelledImages, ClassCounts]:
    """The training images, cut to a long tail if asked for, the test images, images per class.

    What there is to say of them is printed with ``show``, and kept in ``notes``.
    """
    notes = DataNotes() if notes is None else notes
    train, test = load_parts(options, options.test_split, notes)
    if options.skip_corrupt:
        train = without_corrupt(train, "training", show, notes)
        if options.measures_test:
            test = without_corrupt(test, "test", show, notes)
    if show:
        notes.print()
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
        print_kept(options, ClassCounts(before), counts)
    return train, test, counts


def load_parts(
    options: VisionOptions, test_split: float | str | None, notes: DataNotes
) -> tuple[LabelledImages, LabelledImages]:
    """The images to train on and those of another part."""
    train, other = load_images(
        options.dataset,
        image_column=options.image_column,
        label_column=options.label_column,
        test_split=test_split,
        train_list=options.train_list,
        test_list=options.test_list,
        group_column=options.group_column,
        encoding=options.encoding,
        delimiter=options.delimiter,
        skip_empty=options.skip_empty,
        split_file=options.split_file,
        seed=options.subset_seed,
        min_kept=options.min_kept,
        notes=notes,
    )
    names = train.class_names
    return without_untrained((train, other), train.labels, names, LabelledImages.of_classes, notes)


def stream_parts(
    options: VisionOptions, test_split: Any, notes: DataNotes, *, progress: bool = False
) -> tuple[Any, Any]:
    """The images to train on and those of another part, as streams."""
    return stream_images(
        options.dataset,
        image_column=options.image_column,
        label_column=options.label_column,
        test_split=test_split,
        class_counts=options.given_counts(),
        shuffle_buffer=options.shuffle_buffer,
        skip_empty=options.skip_empty,
        seed=options.seed,
        progress=progress,
        notes=notes,
    )


def hold_out(
    options: VisionOptions,
    train: LabelledImages,
    counts: ClassCounts,
    show: bool,
    notes: DataNotes | None = None,
) -> tuple[LabelledImages, LabelledImages | None, ClassCounts]:
    """The images to train on, those of --val_split, and how many of a class are left."""
    if not options.holds_out:
        return train, None, counts
    if isinstance(options.val_split, str):
        notes = DataNotes() if notes is None else notes
        load = stream_parts if options.streaming else load_parts
        validation = load_validation(options, load, notes)
        if options.skip_corrupt:
            validation = without_corrupt(validation, "validation", show, notes)
        if show:
            notes.print()
        return train, validation, counts
    kept, held_out = split_samples(options, train.examples(), counts, show=show, notes=notes)
    validation, train = train.subset(held_out), train.subset(kept)
    counts = ClassCounts.from_labels(train.labels, class_names=train.class_names)
    return train, validation, counts


def watched_images(
    options: VisionOptions, validation: LabelledImages | None, test: LabelledImages
) -> dict[str, LabelledImages]:
    """The images that are evaluated during training, by the column of their error."""
    watched = {} if validation is None else {"val_error": validation}
    return watched | ({"test_error": test} if options.eval_test_every else {})


def without_corrupt(
    images: LabelledImages, name: str, show: bool, notes: DataNotes
) -> LabelledImages:
    """The images that can be decoded; how many cannot is noted."""
    corrupt = images.find_corrupt(progress=show)
    if corrupt:
        some = ", ".join(images.describe(index) for index in corrupt[:3])
        more = ", ..." if len(corrupt) > 3 else ""
        notes.leave_out(f"{name} images that cannot be read", len(corrupt), f"{some}{more}")
    return images.without(corrupt)


def refuse_corrupt(images: LabelledImages, show: bool) -> None:
    """Raise the error of the first image that cannot be decoded, if there is one.

    Test images that are first read after the training must not stop a run there.
    """
    for index in images.find_corrupt(progress=show):
        images.image(index)


def make_model(options: VisionOptions, criterion: ClassificationLoss) -> nn.Module:
    """The model with a head for the classes, of the kind asked for."""
    model: nn.Module
    if options.is_of_transformers:  # whose import takes seconds
        from transformers.utils.logging import disable_progress_bar

        from ldam_plugins.integrations.transformers.images import create_image_classifier

        disable_progress_bar()
        model = create_image_classifier(
            options.model, criterion.class_counts, image_size=options.image_size
        )
    else:
        model = create_classifier(
            options.model,
            criterion.class_counts,
            image_size=options.image_size,
            pretrained=options.pretrained,
        )
    model = put_head(model, criterion, options.head, scale=options.scale, init=options.head_init)
    if options.freeze is not None:
        freeze_backbone(model)
    return model.to(memory_format=torch.channels_last)


def make_pipeline(options: VisionOptions, model: nn.Module) -> ImagePipeline:
    """What is done to the images before the model gets them."""
    return ImagePipeline.of_model(
        model,
        image_size=options.image_size,
        crop_pct=options.crop_pct,
        crop_mode=options.crop_mode,
        augmentation=options.augment,
        padding=options.padding,
        hflip=options.hflip,
        crop_scale=options.crop_scale or None,
        color_jitter=options.color_jitter,
        policy=options.aug,
        cutout=options.cutout,
        erasing=options.erasing,
    )


def model_folder(options: VisionOptions) -> Path:
    """The folder of the saved model."""
    return Path(options.output_dir, "model")


def compiled(accelerator: Accelerator | PartialState, model: nn.Module) -> nn.Module:
    """The compiled model; on a CPU with a batch normalisation that compiles well."""
    if accelerator.device.type == "cpu":
        use_fast_batch_norm(model)
    net: Any = torch.compile(model, dynamic=False)
    return net


def steps_per_epoch(
    accelerator: Accelerator | PartialState, options: VisionOptions, samples: int
) -> int:
    """Optimizer steps of an epoch, in which the sampler and the schedule count.

    timm mixes pairs of images, so where any are mixed only whole batches are trained on, also when
    the mixing has ended: all epochs have the same number of steps.

    Raises:
        ValueError: there is not one.
    """
    batches = epoch_batches(
        samples, options.batch_size, accelerator.num_processes, drop_last=options.mixes
    )
    hint = f"Choose a smaller --batch_size; there are {samples} training images."
    check_int("whole batches an epoch", batches, low=1, hint=hint)
    return math.ceil(batches / options.accumulation)


def make_sampler(
    accelerator: Accelerator,
    options: VisionOptions,
    schedule: DeferredSchedule,
    images: Any,
    classes: int,
) -> DeferredSampler | StreamedRows:
    """The order of the training images under the schedule; of streamed ones that of the stream."""
    if isinstance(images, StreamedImages):
        return images.rows
    return DeferredSampler(
        images.labels,
        schedule,
        epochs=options.epochs,
        steps_per_epoch=steps_per_epoch(accelerator, options, len(images)),
        num_classes=classes,
        seed=options.seed,
    )


def make_optimizer(
    options: VisionOptions, model: nn.Module, device: torch.device
) -> tuple[Any, Any]:
    """Timm's optimizer, fused into one kernel where possible, and timm's scheduler."""
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
        layer_decay=options.layer_decay,
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


def make_train_step(
    accelerator: Accelerator,
    options: VisionOptions,
    net: nn.Module,
    criterion: ClassificationLoss,
    optimizer: torch.optim.Optimizer,
) -> TrainStep:
    """The optimizer step on what Accelerate has prepared."""
    clip, replay = options.clip_grad, options.compile is True
    return TrainStep(accelerator, net, criterion, optimizer, clip_grad=clip, replay=replay)


def make_average(
    accelerator: Accelerator, options: VisionOptions, model: nn.Module
) -> ModelEmaV3 | None:
    """Timm's moving average of the weights, if one is asked for."""
    if not options.ema_decay:
        return None
    return ModelEmaV3(model.to(accelerator.device), decay=options.ema_decay)


def make_mixing(options: VisionOptions, counts: ClassCounts) -> Callable[..., Any]:
    """Timm's Mixup and CutMix: (images, labels) -> (images, target); those as they are if none."""
    if not options.mixes:
        return make_target(options, counts)
    if options.batch_size % 2:
        expected = "even for --mixup and --cutmix, which mix pairs of images"
        raise invalid("batch_size", expected, options.batch_size)
    alphas = options.mixup, options.cutmix
    if options.mixup_prior == "remix":
        return Remix(counts, *alphas, smoothing=options.smoothing)
    return Mixup(*alphas, label_smoothing=options.smoothing, num_classes=len(counts))


def make_target(
    options: VisionOptions, counts: ClassCounts
) -> Callable[..., tuple[Tensor, Tensor]]:
    """Timm's label smoothing: (images, labels) -> (images, target)."""
    if options.smoothing:
        return lambda x, y: (x, mixup_target(y, len(counts), smoothing=options.smoothing))
    return lambda x, y: (x, y)


if __name__ == "__main__":
    main(options)
