"""Sections of ``speed.py`` on whole trainings: processes, vision, text, memory, auto and more."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import chain, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from options import CoreOptions, parse_options
from speed_parts import usual_transform
from speed_timing import DEVICE, Contender, Row, calls_for, clock, compare, peak_of_tree, summary
from study_options import SpeedOptions
from text_lt import TextOptions, make_arguments, make_trainer, tokenize
from text_lt import load_data as load_texts
from text_lt import make_model as make_text_model
from text_lt import steps_per_epoch as text_steps
from text_lt import tune as tune_text
from timm.data import create_loader
from timm.task import ClassificationTask
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from transformers import Trainer, TrainingArguments
from vision_lt import (
    VisionOptions,
    compiled,
    join_processes,
    load_data,
    make_accelerator,
    make_model,
    make_optimizer,
    make_pipeline,
    make_train_step,
    tune,
)

from ldam_plugins import ClassCounts, DRWCallback
from ldam_plugins.integrations.timm.images import image_loader, on_device
from ldam_plugins.training import choose_precision, keep_freed_memory, read_history

Timed = Callable[[], float]
"""A contender that knows its seconds."""


def processes(options: SpeedOptions) -> Iterator[Row]:
    """The same training on digits by two processes and by one, start-up not counted."""
    seconds = [
        (seconds_of_processes(options, 2), seconds_of_processes(options, 1))
        for _ in range(options.repeats)
    ]
    what = f"{options.epochs} epochs of digits_lt by 2 processes"
    yield summary(what, "1 process", seconds)


def seconds_of_processes(options: SpeedOptions, count: int) -> float:
    """Training seconds of so many processes with one thread each, the batch shared out."""
    preset = parse_options(VisionOptions, [], default="digits_lt")
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(count)]
    launcher += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    flags = ["--batch_size", str(preset.batch_size // count), "--epochs", str(options.epochs)]
    environment = {"OMP_NUM_THREADS": "1"}
    if not torch.accelerator.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    found, _ = trained(["--schedule", "none", *flags], launcher, environment)
    if found["processes"] != count:
        raise RuntimeError(f"{count} processes were asked for, {found['processes']} ran")
    return found["train_seconds"]


def trained(
    flags: Sequence[str],
    launcher: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], list[float]]:
    """Metrics of a training by ``vision_lt.py`` in processes of its own, and seconds by epoch."""
    recipe = str(Path(__file__).with_name("vision_lt.py"))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *launcher, recipe, *flags, "--eval_test_every", "0"]
        command += ["--output_dir", folder]
        given = {**os.environ, **(environment or {})}
        done = subprocess.run(command, env=given, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
        found = json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))
        return found, [row["seconds"] for row in read_history(folder)]


def vision(options: SpeedOptions) -> Iterator[Row]:
    """Training steps from scratch, data included."""
    peers = {"usual loop": usual_steps, "timm loader and task": timm_steps}
    yield from steps_beside(options, from_scratch(options), peers)


def fine_tuning(options: SpeedOptions) -> Iterator[Row]:
    """Training steps of a pretrained model on photographs, data included."""
    yield from steps_beside(options, fine_tuned(options), {"usual loop": usual_steps})


def from_scratch(options: SpeedOptions) -> VisionOptions:
    """The paper's run."""
    flags = ["cifar10_lt", "--dataset", options.dataset, "--batch_size", str(options.batch_size)]
    return parse_options(VisionOptions, flags, default="")


def fine_tuned(options: SpeedOptions) -> VisionOptions:
    """A run on photographs, all of each seen, moved and mirrored."""
    flags = ["--dataset", options.photos, "--model", options.photo_model, "--batch_size", "32"]
    flags += ["--image_size", str(options.photo_size), "--augment", "crop_flip", "--padding", "8"]
    return parse_options(VisionOptions, [*flags, "--crop_mode", "squash"], default="")


def steps_beside(
    options: SpeedOptions, preset: VisionOptions, peers: Mapping[str, Callable[..., Contender]]
) -> Iterator[Row]:
    """Training steps of ours against those of each peer."""
    accelerator = make_accelerator(preset)
    compiles = options.compile and not preset.is_pretrained
    ours = vision_steps(accelerator, replace(preset, compile=compiles), options.steps)
    for name, peer in peers.items():
        theirs = peer(accelerator, preset, options.steps)
        ours()  # compiles, and starts the workers of the other
        theirs()
        what = f"{options.steps} steps of {preset.model}, batch {preset.batch_size}"
        yield compare(options, what, ours, theirs, name, once=True)


def quality(options: SpeedOptions) -> Iterator[Row]:
    """Whole trainings by presets, against the usual loop by the paper's protocol.

    Reckoned from some epochs of ours, whose first one compiles, and some steps of theirs. How well
    they do is in the results.
    """
    paper = from_scratch(options)
    steps = usual_steps(make_accelerator(paper), paper, options.steps)
    steps()  # starts the workers
    for name in PRESETS:
        turns = []
        for _ in range(options.repeats):
            one = clock(steps, 1) / options.steps
            images, ours = whole_training(options, name)
            turns.append((ours, one * images / paper.batch_size * paper.epochs))
        epochs = parse_options(VisionOptions, [name], default="").epochs
        peer = f"usual loop, {paper.epochs} epochs"
        yield summary(f"{name}, {epochs} epochs", peer, turns)


PRESETS = ("cifar10_lt", "cifar10_lt_fast")
"""What ``quality`` trains by."""


def whole_training(options: SpeedOptions, name: str) -> tuple[int, float]:
    """Images of an epoch, and seconds of a training by a preset, from three epochs of it."""
    preset = parse_options(VisionOptions, [name], default="")
    flags = [name, "--dataset", options.dataset, "--epochs", "3", "--schedule", "none"]
    flags += ["--sched", "constant", "--compile", "yes" if options.compile else "no"]
    found, (first, *others) = trained(flags)
    return sum(found["class_counts"]), first + statistics.median(others) * (preset.epochs - 1)


def growth(options: SpeedOptions) -> Iterator[Row]:
    """Training steps as classes and the side of the images grow, against the smallest of each."""
    preset = from_scratch(options)
    accelerator = make_accelerator(preset)
    step = partial(noise_steps, accelerator, preset, options.steps)
    what, smallest = f"{options.steps} steps of {preset.model}", step(CLASSES[0], SIDES[0])
    for classes in CLASSES[1:]:
        if classes <= options.max_classes:
            steps, few = step(classes, SIDES[0]), f"{CLASSES[0]} classes"
            yield compare(options, f"{what}, {classes} classes", steps, smallest, few, once=True)
    for side in SIDES[1:]:
        if side <= options.max_image:
            steps, small = step(CLASSES[0], side), f"{SIDES[0]} pixels a side"
            yield compare(options, f"{what}, {side} pixels", steps, smallest, small, once=True)


CLASSES, SIDES = (10, 100, 1000, 10_000), (32, 64, 128)
"""What ``growth`` goes through."""


def noise_steps(
    accelerator: Accelerator, options: VisionOptions, steps: int, classes: int, side: int
) -> Contender:
    """So many steps on a batch of noise, nothing loaded."""
    counts = ClassCounts([500] * classes)
    criterion = options.make_loss(counts).to(accelerator.device)
    net = make_model(options, criterion).to(accelerator.device).train()
    optimizer, _ = make_optimizer(options, net, accelerator.device)
    net, optimizer = accelerator.prepare(net, optimizer)
    train_step = make_train_step(accelerator, options, net, criterion, optimizer)
    images = torch.randn(options.batch_size, 3, side, side, device=accelerator.device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(classes, (options.batch_size,), device=accelerator.device)

    def run() -> None:
        with keep_freed_memory(accelerator.device):
            for _ in range(steps):
                train_step([(images, labels)])

    return run


def peak(options: SpeedOptions) -> Iterator[Row]:
    """Training steps, eager, against large products of as many floating-point operations.

    What the steps spend their time on is in the note.
    """
    for preset in (from_scratch(options), fine_tuned(options)):
        accelerator = make_accelerator(preset)
        steps = vision_steps(accelerator, preset, options.steps)
        what = f"{options.steps} steps of {preset.model}, batch {preset.batch_size}"
        precision = accelerator.mixed_precision
        yield beside_products(options, what, partial(clock, steps, 1), precision)
    with tempfile.TemporaryDirectory() as folder:
        texts, train, class_counts = texts_of(options, folder)
        timed = partial(text_seconds, texts, train, class_counts)
        what = f"{len(train)} texts of {texts.max_length} tokens, {texts.model}"
        precision = choose_precision(texts.mixed_precision)
        yield beside_products(options, what, timed, precision)


SIDE = 2048
"""Rows and columns of the matrices that ``peak`` multiplies."""


def beside_products(options: SpeedOptions, what: str, timed: Timed, precision: str) -> Row:
    """Steps against products of large matrices, in their precision, as fast as they go here.

    Operations are those of convolutions, matrix products and attention.
    """
    timed()  # what is made once
    with FlopCounterMode(display=False) as counter:
        timed()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        timed()
    kind = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    product = fastest_product(kind)
    calls, products = calls_for(1.0, product), operations_of(counter) / (2 * SIDE**3)
    seconds = [(timed(), products * clock(product, calls)) for _ in range(options.repeats)]
    name = str(kind).removeprefix("torch.")
    return summary(what, f"products of {SIDE} x {SIDE}, {name}", seconds, shares(profiled))


def operations_of(counter: FlopCounterMode) -> int:
    """Floating-point operations of training steps.

    Of a convolution the backward pass has twice those of the forward pass; what is counted there
    is more where it has groups.
    """
    counts = counter.get_flop_counts()["Global"]
    aten = torch.ops.aten
    backward = counts.get(aten.convolution_backward, 0)
    return counter.get_total_flops() - backward + 2 * counts.get(aten.convolution, 0)


def fastest_product(kind: torch.dtype) -> Contender:
    """A product of large matrices by the library that is faster at it here.

    That of matrix products is not the one of convolutions, and slow on CPUs of other makers.
    """
    left, right = (torch.randn(SIDE, SIDE, device=DEVICE).to(kind) for _ in range(2))
    channels = left.reshape(1, SIDE, -1, 64).to(memory_format=torch.channels_last)
    by_convolution = partial(nn.functional.conv2d, channels, right[:, :, None, None])
    contenders: list[Contender] = [partial(torch.mm, left, right), by_convolution]
    for contender in contenders:
        contender()
    return min(contenders, key=lambda contender: clock(contender, 3))


KINDS = {
    "convolution": "convolution",
    "matrix products": r"::(add|b|badd)?mm$|linear",
    "attention": "attention|softmax",
    "normalisation": "norm",
    "optimizer": "fused_|foreach|optimizer",
}
"""Operators that ``peak`` sums up, by a pattern of their names."""


def shares(profiled: profile) -> str:
    """Shares of the time of a profile, by kind of operator."""
    spent = defaultdict[str, float](float)
    for event in profiled.key_averages():
        kinds = [kind for kind, pattern in KINDS.items() if re.search(pattern, event.key.lower())]
        spent[[*kinds, "rest"][0]] += event.self_cpu_time_total
    total = sum(spent.values())
    return ", ".join(f"{kind} {spent[kind] / total:.0%}" for kind in [*KINDS, "rest"])


def memory(options: SpeedOptions) -> Iterator[Row]:
    """Most memory of trainings as large as those of vision, fine_tuning and text.

    Each is a process of its own, and what its loader's workers have counts with it.
    """
    for name, (ours, theirs, what, peer) in MEMORY.items():
        if name in options.memory_of:
            turns = [
                (megabytes_of(options, ours), megabytes_of(options, theirs))
                for _ in range(options.repeats)
            ]
            yield summary(f"{options.steps} steps of {what}", peer, turns, unit="megabytes")


def megabytes_of(options: SpeedOptions, contender: str) -> float:
    """Most memory of a new process that runs a function of this module, its children's with it."""
    line = "import json, sys; sys.path.insert(0, sys.argv[1]); import speed_training as s; "
    line += f"s.{contender}(s.SpeedOptions(**json.load(sys.stdin)))"
    command = [sys.executable, "-c", line, str(Path(__file__).parent)]
    with tempfile.TemporaryFile("w+") as log:
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True
        ) as process:
            assert process.stdin is not None
            json.dump(asdict(options), process.stdin)
            process.stdin.close()
            peak = peak_of_tree(process)
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{contender} failed: {log.read()[-2000:]}")
    return peak


def ours_from_scratch(options: SpeedOptions) -> None:
    """Steps of ``vision_lt.py``, in this process."""
    preset = replace(from_scratch(options), compile=options.compile)
    vision_steps(make_accelerator(preset), preset, options.steps)()


def usual_from_scratch(options: SpeedOptions) -> None:
    """The same of the usual loop."""
    preset = from_scratch(options)
    usual_steps(make_accelerator(preset), preset, options.steps)()


def ours_fine_tuned(options: SpeedOptions) -> None:
    """Steps of ``vision_lt.py`` on a pretrained model, in this process."""
    preset = fine_tuned(options)
    vision_steps(make_accelerator(preset), preset, options.steps)()


def usual_fine_tuned(options: SpeedOptions) -> None:
    """The same of the usual loop."""
    preset = fine_tuned(options)
    usual_steps(make_accelerator(preset), preset, options.steps)()


def ours_text(options: SpeedOptions) -> None:
    """An epoch of ``text_lt.py`` on some texts, in this process."""
    with tempfile.TemporaryDirectory() as folder:
        text_seconds(*texts_of(options, folder))


def padded_text(options: SpeedOptions) -> None:
    """The same of a plain Trainer on texts padded to the full length."""
    with tempfile.TemporaryDirectory() as folder:
        padded_seconds(*texts_of(options, folder))


MEMORY = {
    "vision": ("ours_from_scratch", "usual_from_scratch", "vision", "usual loop"),
    "fine_tuning": ("ours_fine_tuned", "usual_fine_tuned", "fine_tuning", "usual loop"),
    "text": ("ours_text", "padded_text", "text", "Trainer, padding='max_length', float32"),
}
"""The section that a training is as large as: ours and theirs, what they are, and the peer."""


def vision_steps(accelerator: Accelerator, options: VisionOptions, steps: int) -> Contender:
    """What ``vision_lt.py`` does in so many steps."""
    images, test, class_counts = load_data(options, show=False)
    criterion = options.make_loss(class_counts).to(accelerator.device)
    model = make_model(options, criterion)
    pipeline = make_pipeline(options, model)
    to_input = pipeline.make_input(accelerator.device)
    train_set, _ = pipeline.datasets(
        images, test.subset(range(1)), memory_limit=options.memory_limit
    )
    loader = image_loader(
        on_device(train_set, accelerator.device),
        workers=options.workers,
        batch_size=options.batch_size,
        shuffle=True,
        drop_last=True,
    )
    optimizer, _ = make_optimizer(options, model, accelerator.device)
    net = compiled(accelerator, model) if options.compile else model
    net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    batches, generator = endless(loader), torch.Generator()
    train_step = make_train_step(accelerator, options, net, criterion, optimizer)

    def run() -> None:
        net.train()
        with keep_freed_memory(accelerator.device):
            for _ in range(steps):
                pixels, labels = next(batches)
                train_step([(to_input(pixels, generator), labels)])

    return run


def usual_steps(accelerator: Accelerator, options: VisionOptions, steps: int) -> Contender:
    """PIL transforms in a DataLoader with two workers, float32, eager."""
    images, _, class_counts = load_data(options, show=False)
    criterion = options.make_loss(class_counts).to(accelerator.device)
    model = make_model(options, criterion).to(memory_format=torch.contiguous_format)
    size = make_pipeline(options, model).config["input_size"][-1]
    images.transform = usual_transform(size, options.padding, resize=options.is_pretrained)
    loader = DataLoader(
        images,
        options.batch_size,
        shuffle=True,
        num_workers=2,
        drop_last=True,
        persistent_workers=True,
    )
    optimizer, _ = make_optimizer(options, model, accelerator.device)
    model = model.to(accelerator.device)
    batches = endless(loader)

    def run() -> None:
        model.train()
        for _ in range(steps):
            pixels, labels = (part.to(accelerator.device) for part in next(batches))
            accelerator.backward(criterion(model(pixels), labels))
            optimizer.step()
            optimizer.zero_grad()

    return run


def timm_steps(accelerator: Accelerator, options: VisionOptions, steps: int) -> Contender:
    """The create_loader and ClassificationTask of timm, with the same model and loss."""
    images, _, class_counts = load_data(options, show=False)
    criterion = options.make_loss(class_counts).to(accelerator.device)
    model = make_model(options, criterion).to(accelerator.device)
    config = make_pipeline(options, model).config
    loader = create_loader(
        images,
        config["input_size"],
        options.batch_size,
        is_training=True,
        mean=config["mean"],
        std=config["std"],
        num_workers=2,
        use_prefetcher=torch.cuda.is_available(),
        device=accelerator.device,
        persistent_workers=True,
    )
    task = ClassificationTask(model, criterion, device=accelerator.device, verbose=False)
    optimizer, _ = make_optimizer(options, model, accelerator.device)
    batches = endless(loader)

    def run() -> None:
        model.train()
        for _ in range(steps):
            pixels, labels = (part.to(accelerator.device) for part in next(batches))
            accelerator.backward(task(pixels, labels)["loss"])
            optimizer.step()
            optimizer.zero_grad()

    return run


AUTO: dict[str, tuple[type[CoreOptions], list[str]]] = {
    "ResNet-32": (VisionOptions, ["cifar10_lt"]),
    "EfficientNet-Lite0, 96 pixels": (
        VisionOptions,
        ["--model", "efficientnet_lite0_imagenet", "--image_size", "96", "--epochs", "10"],
    ),
    "MiniLM": (TextOptions, ["--model", "minilm", "--loss", "ce", "--schedule", "none"]),
}
"""What ``auto`` trains: options of a recipe; the data are those of ``speed.py``."""


def auto(options: SpeedOptions) -> Iterator[Row]:
    """Training steps as ``--auto_tune`` runs them, against float32, eager; a process each."""
    for name, (kind, flags) in AUTO.items():
        is_text = kind is TextOptions
        flags = [*flags, "--dataset", options.text_dataset if is_text else options.dataset]
        preset = parse_options(kind, [*flags, "--quiet"], default="")
        build = auto_text if is_text else auto_vision
        with (
            in_process(build, preset, options.steps, True) as (ours, chosen),
            in_process(build, preset, options.steps, False) as (theirs, _),
        ):
            seconds = [(ours(), theirs()) for _ in range(options.repeats + 1)][1:]
            what, peer = f"{options.steps} steps of {name}", "float32, eager"
            yield summary(what, peer, seconds, chosen)


def auto_vision(options: VisionOptions, steps: int, tuned: bool) -> tuple[Timed, str]:
    """Steps of ``vision_lt.py`` in the precision that it chooses, or in float32; and which."""
    state = join_processes(options)
    images, _, class_counts = load_data(options, show=False)
    criterion = options.make_loss(class_counts).to(state.device)
    model = make_model(options, criterion)
    pipeline = make_pipeline(options, model)
    chosen = "no"
    if tuned:
        chosen = tune(state, options, model, criterion, pipeline, len(images)).precision
    run = vision_steps(make_accelerator(options, chosen), options, steps)
    return lambda: clock(run, 1), chosen


def auto_text(options: TextOptions, steps: int, tuned: bool) -> tuple[Timed, str]:
    """The same of ``text_lt.py``."""
    train, _, class_counts = load_texts(options)
    chosen = "no"
    if tuned:
        criterion = options.make_loss(class_counts)
        tokenizer, model = make_text_model(options, train, criterion)
        tokens, arguments = tokenize(options, tokenizer, train), make_arguments(options)
        epoch = text_steps(options, arguments, tokens)
        parts = (model, criterion, tokenizer, tokens, epoch)
        chosen = tune_text(options, arguments, *parts).precision
    options = replace(options, mixed_precision=chosen, epochs=1)
    some = shuffled(train, steps * options.batch_size)
    return lambda: text_seconds(options, some, class_counts), chosen


@contextmanager
def in_process(build: Callable[..., tuple[Timed, str]], *given: Any) -> Iterator[Any]:
    """A contender in a process of its own, for Accelerate has one precision a process."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, build, *given))
    process.start()
    there.close()

    def run() -> float:
        here.send(True)
        seconds: float = here.recv()
        return seconds

    try:
        yield run, here.recv()
    finally:
        here.close()  # which ends it
        process.join()


def serve(pipe: Any, build: Callable[..., tuple[Timed, str]], *given: Any) -> None:
    """In the process: run the contender each time it is asked for, and say how long it took."""
    run, note = build(*given)
    pipe.send(note)
    with suppress(EOFError):
        while pipe.recv():
            pipe.send(run())


def endless(loader: Any) -> Iterator[Any]:
    """The batches of epoch after epoch."""
    return chain.from_iterable(repeat(loader))


def text(options: SpeedOptions) -> Iterator[Row]:
    """Examples of the recipe's Trainer, in what it chooses, against those of a plain one.

    Set-up is not timed.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        preset, train, class_counts = texts_of(options, folder)
        kinds = {"": preset}
        if preset.model != "bilstm":
            kinds[", no dropout of attention"] = replace(preset, attention_dropout=0.0)
        ours = [
            stack.enter_context(in_process(auto_text, kind, options.steps, True))
            for kind in kinds.values()
        ]
        turns = [
            ([run() for run, _ in ours], padded_seconds(preset, train, class_counts))
            for _ in range(options.repeats + 1)
        ][1:]
    what = f"{len(train)} texts of {preset.max_length} tokens, {preset.model}"
    for index, (kind, (_, chosen)) in enumerate(zip(kinds, ours, strict=True)):
        seconds = [(mine[index], theirs) for mine, theirs in turns]
        yield summary(what + kind, "Trainer, padding='max_length', float32", seconds, chosen)


def texts_of(options: SpeedOptions, folder: str) -> tuple[TextOptions, Any, ClassCounts]:
    """The options of a training on texts, so many texts, and how many of a class there are."""
    flags = [f"--dataset={options.text_dataset}", f"--max_length={options.max_length}"]
    flags += [f"--model={options.text_model}", f"--batch_size={options.text_batch_size}"]
    flags += ["--epochs=1", f"--output_dir={folder}"]
    preset = parse_options(TextOptions, flags, default="imdb_lt")
    train, _, class_counts = load_texts(preset)
    return preset, shuffled(train, options.steps * preset.batch_size), class_counts


def shuffled(texts: Any, size: int) -> Any:
    """So many of the texts, or all, in a random order."""
    return texts.shuffle(seed=0).select(range(min(size, len(texts))))


def text_seconds(options: TextOptions, train: Any, class_counts: ClassCounts) -> float:
    """Seconds of one epoch the way of ``text_lt.py``."""
    criterion = options.make_loss(class_counts)
    tokenizer, model = make_text_model(options, train, criterion)
    arguments = quiet(make_arguments(options))
    tokens = tokenize(options, tokenizer, train)
    callbacks = [DRWCallback(criterion, schedule=options.make_schedule())]
    parts = (model, tokenizer, class_counts, tokens, tokens, callbacks)
    trainer = make_trainer(options, arguments, *parts)
    with keep_freed_memory(arguments.device), warnings.catch_warnings():
        # The few texts that are timed are not those that were counted.
        warnings.filterwarnings("ignore", "class_counts .* are not those of the labels")
        return trainer.train().metrics["train_runtime"]


def padded_seconds(options: TextOptions, train: Any, class_counts: ClassCounts) -> float:
    """Seconds of one epoch of a plain Trainer on texts padded to the full length."""
    plain = replace(options, loss="ce", max_margin=None, scale=None, gamma=None, tau=None)
    tokenizer, model = make_text_model(plain, train, plain.make_loss(class_counts))
    arguments = TrainingArguments(
        output_dir=options.output_dir,
        num_train_epochs=1,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.lr,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        report_to="none",
    )
    length = {"max_length": options.max_length, "padding": "max_length", "truncation": True}
    tokens = train.map(lambda batch: tokenizer(batch["text"], **length), batched=True)
    trainer = Trainer(model=model, args=quiet(arguments), train_dataset=tokens)
    return trainer.train().metrics["train_runtime"]


def quiet(arguments: TrainingArguments) -> TrainingArguments:
    """The same without evaluation, checkpoints and logs."""
    off = type(arguments.eval_strategy)("no")
    arguments.eval_strategy = arguments.save_strategy = arguments.logging_strategy = off
    arguments.disable_tqdm = True
    return arguments
