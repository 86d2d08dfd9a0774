"""Time the package against what one would use instead, side by side in one run.

    python recipes/speed.py                                     # all but processes, vision, text
    python recipes/speed.py --only vision --steps 90            # a whole epoch of CIFAR-10-LT
    python recipes/speed.py --only text --text_dataset stanfordnlp/imdb
    python recipes/speed.py --only loss head --json speed.json

One row a comparison: median seconds of ours and of the peer, and their ratio (below 1: ours is
faster) as median with least and largest over the repeats. The contenders of a row take turns, so
what else the machine does meets them alike. Sections:

* loss: LDAM forward and backward against ``nn.CrossEntropyLoss`` on 256 rows of logits;
* head: chunked cosine head and LDAM against the plain one, gradients of weight and features;
* counts, sampler, metrics, import: small things, against NumPy, torch, scikit-learn, torch alone;
* scaling: counts, sampler and image batches as they grow;
* processes: a training of ``vision_lt.py`` by two processes against one, a thread each;
* vision: training steps of ``vision_lt.py`` against a DataLoader with two workers and PIL
  transforms in float32, and against timm's create_loader and ClassificationTask;
* text: ``text_lt.py``, as it is and without dropout of attention, against a plain Trainer with
  padding to the full length in float32.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from accelerate import Accelerator
from options import option, parse_options
from PIL import Image
from sklearn.metrics import confusion_matrix
from text_lt import TextOptions, make_arguments, make_trainer, tokenize
from text_lt import load_data as load_texts
from text_lt import make_model as make_text_model
from timm.data import create_loader
from timm.task import ClassificationTask
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from transformers import HfArgumentParser, Trainer, TrainingArguments
from vision_lt import (
    VisionOptions,
    compiled,
    image_config,
    load_data,
    make_accelerator,
    make_datasets,
    make_input,
    make_loader,
    make_model,
    make_optimizer,
    on_device,
    update,
)

from ldam_plugins import (
    ClassCounts,
    DeferredSchedule,
    DRWCallback,
    LDAMLoss,
    register,
    use_cosine_head,
)
from ldam_plugins._checks import check_choice
from ldam_plugins.batches import RandomCropFlip, normalize
from ldam_plugins.experiment_tables import markdown, ratio_rows
from ldam_plugins.metrics import MetricAccumulator
from ldam_plugins.run_files import device_name, run_versions
from ldam_plugins.samplers import DeferredSampler

Row = dict[str, Any]
Contender = Callable[[], Any]
ROWS = 256
DEVICE = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
SEEN_BYTES = 1 << 26
"""Tensors from this size on go back to the system when freed, so their peaks can be seen."""
QUICK = ["loss", "head", "counts", "sampler", "metrics", "import", "scaling"]


@dataclass
class SpeedOptions:
    """What is timed, and how large it gets."""

    only: list[str] = option(QUICK, "sections to run: those above, processes, vision, text")
    repeats: int = option(7, "turns of each contender")
    seconds: float = option(0.1, "least seconds of a turn of the small things")
    max_classes: int = option(1_000_000, "classes the loss and the head grow to")
    max_logits: int = option(32_000_000, "entries of the largest (N, C) logits")
    max_rows: int = option(10_000_000, "rows that counts and sampler grow to")
    max_image: int = option(224, "pixels a side that images grow to")
    steps: int = option(30, "training steps of a turn of vision and text")
    epochs: int = option(100, "epochs of processes")
    dataset: str = option("uoft-cs/cifar10", "images of vision, cut to the long tail of the paper")
    compile: bool = option(True, "compile ours in vision, as --compile of vision_lt.py")
    text_dataset: str = option("stanfordnlp/imdb", "texts of text")
    text_model: str = option("minilm", "model of text")
    max_length: int = option(256, "tokens a text is cut or padded to")
    batch_size: int = option(128, "images a step")
    text_batch_size: int = option(32, "texts a step")
    threads: int = option(0, "threads of torch; 0: as torch decides")
    json: str | None = option(None, "file for the rows, with versions and device")


def main(options: SpeedOptions) -> list[Row]:
    """Run the sections, print the table, write the file; returns the rows."""
    for name in options.only:
        check_choice("only", name, SECTIONS)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.ones(7 << 20)  # a training process has had large blocks, which malloc then keeps
    register()
    rows = []
    for name in options.only:
        for row in SECTIONS[name](options):
            rows.append({"section": name, **row})
            print(f"{name}: {row['what']}: {row['ratio_median']:.2f}", file=sys.stderr)
    print(markdown(ratio_rows(rows)))
    if options.json:
        found = {
            "options": asdict(options),
            "versions": run_versions(),
            "device": device_name(DEVICE),
            "threads": torch.get_num_threads(),
            "rows": rows,
        }
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return rows


def compare(
    options: SpeedOptions,
    what: str,
    ours: Contender,
    peer: Contender,
    peer_name: str,
    *,
    note: str = "",
    once: bool = False,
) -> Row:
    """Let two contenders take turns; a turn is one call if ``once``, else as many as fill it."""
    calls = 1 if once else max(calls_for(options.seconds, ours), calls_for(options.seconds, peer))
    seconds = [(clock(ours, calls), clock(peer, calls)) for _ in range(options.repeats)]
    return summary(what, peer_name, seconds, note)


def summary(what: str, peer: str, seconds: list[tuple[float, float]], note: str = "") -> Row:
    """The row of a comparison from the seconds of ours and of the peer in each turn."""
    ratios = [mine / theirs for mine, theirs in seconds]
    return {
        "what": what,
        "peer": peer,
        "ours_seconds": statistics.median(mine for mine, _ in seconds),
        "peer_seconds": statistics.median(theirs for _, theirs in seconds),
        "ratio_median": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "seconds": seconds,
        "note": note,
    }


def calls_for(seconds: float, run: Contender) -> int:
    """Calls that take so long, after one to warm up."""
    run()
    return max(1, round(seconds / clock(run, 1)))


def clock(run: Contender, calls: int) -> float:
    """Mean seconds of a call."""
    began = time.perf_counter()
    for _ in range(calls):
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / calls


def peak_memory(run: Contender) -> float:
    """Largest growth of the process (on CUDA: of what it has on the device) in a run, in MB."""
    if DEVICE.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    process, done, peak = psutil.Process(), threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], process.memory_info().rss)

    before = process.memory_info().rss
    thread = threading.Thread(target=watch)
    thread.start()
    run()
    done.set()
    thread.join()
    return max(0, peak[0] - before) / 1e6


def powers(first: int, last: int) -> list[int]:
    """first, 10 first, ... up to last."""
    sizes = [first]
    while sizes[-1] * 10 <= last:
        sizes.append(sizes[-1] * 10)
    return sizes


def loss(options: SpeedOptions) -> Iterator[Row]:
    """LDAM against cross-entropy; classes grow by tens, and 8,142 is iNaturalist 2018."""
    sizes = [c for c in (10, 100, 1000, 8142, *powers(10_000, 10**6)) if c <= options.max_classes]
    for classes in sizes:
        rows = min(ROWS, max(1, options.max_logits // classes))
        for dtype in (torch.float32, torch.bfloat16):
            logits = (3 * torch.randn(rows, classes)).to(DEVICE, dtype).requires_grad_()
            index = torch.randint(classes, (rows,)).to(DEVICE)
            criterion = LDAMLoss(torch.arange(1, classes + 1)).to(DEVICE)
            weight = (torch.rand(classes) + 0.5).to(DEVICE)
            masses = nn.functional.normalize(torch.rand(rows, classes), p=1).to(DEVICE)
            ignored = index.where(torch.arange(rows, device=DEVICE) % 4 > 0, -100)
            kinds = {
                "plain": (index, None),
                "weighted": (index, weight),
                "ignored": (ignored, None),
                "soft": (masses, None),
            }
            for kind, (target, weights) in kinds.items():
                criterion.weight.copy_(torch.ones(classes) if weights is None else weights)
                theirs = nn.CrossEntropyLoss(None if weights is None else weights.to(dtype))
                mass = target.to(dtype) if kind == "soft" else target
                what = f"LDAM {kind}, {rows} x {classes}, {str(dtype)[6:]}"
                ours, peer = (
                    gradient_of(criterion, logits, target),
                    gradient_of(theirs, logits, mass),
                )
                yield compare(
                    options,
                    what,
                    ours,
                    peer,
                    "nn.CrossEntropyLoss",
                    note=peaks(ours, peer) if logits.nbytes >= SEEN_BYTES else "",
                )


def peaks(ours: Contender, peer: Contender) -> str:
    """Peak memory of both, what they were given aside."""
    ours(), peer()
    return f"peak {peak_memory(ours):.0f} MB, theirs {peak_memory(peer):.0f} MB"


def gradient_of(criterion: nn.Module, logits: Tensor, target: Tensor) -> Contender:
    """Forward and backward pass of a loss."""
    return lambda: torch.autograd.grad(criterion(logits, target), logits)


def head(options: SpeedOptions) -> Iterator[Row]:
    """A chunked cosine head against the plain one; above ``max_logits`` against half of itself."""
    for classes in powers(1000, options.max_classes):
        ours, criterion = make_head(classes, chunked=True)
        fits = ROWS * classes <= options.max_logits
        other = make_head(classes if fits else classes // 2, chunked=not fits)
        extra = peak_memory(step_of(ours, criterion)) - 4e-6 * ours.weight.numel()
        yield compare(
            options,
            f"chunked head and LDAM, {ROWS} x 256 x {classes}",
            step_of(ours, criterion),
            step_of(*other),
            "plain head" if fits else "chunked head, half the classes",
            note=f"{max(0, extra):.0f} MB beside the weight and its gradient",
            once=True,
        )


def make_head(classes: int, *, chunked: bool) -> tuple[Any, LDAMLoss]:
    """A cosine head on 256 features, and its loss."""
    layer = use_cosine_head(nn.Linear(256, classes), chunked=chunked).to(DEVICE)
    return layer, LDAMLoss(torch.arange(1, classes + 1)).to(DEVICE)


def step_of(layer: Any, criterion: LDAMLoss) -> Contender:
    """Gradients of the weight and the features."""
    features = torch.randn(ROWS, 256, device=DEVICE, requires_grad=True)
    target = torch.randint(len(layer.weight), (ROWS,), device=DEVICE)
    inputs = (layer.weight, features)
    return lambda: torch.autograd.grad(criterion(layer(features), target), inputs)


def counts(options: SpeedOptions) -> Iterator[Row]:
    """Counting labels of an array and of a column of a dataset that also has images."""
    from datasets import ClassLabel, Dataset, Features, Value

    labels = np.random.default_rng(0).integers(0, 1000, options.max_rows)
    features = Features({"label": ClassLabel(num_classes=1000), "file": Value("int8")})
    columns = {"label": labels, "file": np.zeros(len(labels), np.int8)}
    column = Dataset.from_dict(columns, features=features)["label"]
    for what, source in (("an array", labels), ("a dataset column", column)):
        yield compare(
            options,
            f"counting {len(labels)} labels of {what}",
            partial(ClassCounts.from_labels, source, 1000),
            lambda: np.bincount(labels),
            "np.bincount of the array",
        )


def sampler(options: SpeedOptions) -> Iterator[Row]:
    """Building a balanced sampler, and drawing an epoch."""
    labels = np.random.default_rng(0).integers(0, 1000, options.max_rows)
    weights = torch.ones(len(labels))
    build = lambda: balanced(labels)  # noqa: E731
    built = build()
    yield compare(
        options,
        f"building a balanced sampler, {len(labels)} rows",
        build,
        lambda: np.argsort(labels),
        "np.argsort",
        note=f"{peak_memory(build):.0f} MB",
        once=True,
    )
    yield compare(
        options,
        f"an epoch of it, {len(labels)} rows",
        built.order,
        lambda: torch.multinomial(weights[: 2**24], len(labels), True),
        "draw of WeightedRandomSampler",
        once=True,
    )


def balanced(labels: np.ndarray) -> DeferredSampler:
    """A sampler that draws every class equally often."""
    return DeferredSampler(labels, DeferredSchedule("rs"), epochs=1)


def metrics(options: SpeedOptions) -> Iterator[Row]:
    """Metrics of 256 rows over many classes, against the confusion matrix of a few."""
    classes = min(100_000, options.max_classes)
    logits, labels = torch.randn(ROWS, classes), torch.randint(classes, (ROWS,))
    accumulator = MetricAccumulator(np.ones(classes, dtype=np.int64))
    few = min(classes, 2000)

    def ours() -> None:
        accumulator.update(logits, labels)
        accumulator.compute()

    yield compare(
        options,
        f"all metrics over {classes} classes",
        ours,
        lambda: confusion_matrix(labels % few, logits.argmax(1) % few, labels=range(few)),
        f"sklearn's confusion matrix of {few}",
        note=f"{peak_memory(ours):.0f} MB",
        once=True,
    )


def start_up(options: SpeedOptions) -> Iterator[Row]:
    """Importing the package, against torch and NumPy alone."""
    run = lambda line: subprocess.run([sys.executable, "-c", line], check=True)  # noqa: E731
    row = compare(
        options,
        "import ldam_plugins",
        lambda: run("import torch, numpy, ldam_plugins"),
        lambda: run("import torch, numpy"),
        "import torch, numpy",
        once=True,
    )
    added = statistics.median(mine - theirs for mine, theirs in row["seconds"])
    yield {**row, "note": f"{1000 * added:.0f} ms beyond torch"}


def scaling(options: SpeedOptions) -> Iterator[Row]:
    """Counts, sampler and image batches as they grow."""
    for rows in powers(10_000, options.max_rows):
        labels = np.random.default_rng(0).integers(0, 100, rows)
        counted = lambda labels=labels: ClassCounts.from_labels(labels, 100)  # noqa: E731
        peer = lambda labels=labels: np.bincount(labels)  # noqa: E731
        yield compare(options, f"counting {rows} labels", counted, peer, "np.bincount")
        built = balanced(labels)
        shuffle = lambda rows=rows: torch.randperm(rows)  # noqa: E731
        yield compare(options, f"balanced epoch of {rows}", built.order, shuffle, "torch.randperm")
    for size in (32, 64, 112, 224):
        if size <= options.max_image:
            yield image_batch(options, size)


def image_batch(options: SpeedOptions, size: int) -> Row:
    """Crop, flip and normalise a batch, as tensors and image by image."""
    pixels = torch.randint(256, (options.batch_size, 3, size, size), dtype=torch.uint8)
    images = [Image.fromarray(image) for image in pixels.permute(0, 2, 3, 1).numpy()]
    augment, generator, one = RandomCropFlip(4), torch.Generator(), usual_transform(size)
    return compare(
        options,
        f"{len(images)} augmented images of {size} x {size}",
        lambda: normalize(augment(pixels, generator), (0.5,) * 3, (0.2,) * 3),
        lambda: torch.stack([one(image) for image in images]),
        "torchvision on PIL images",
    )


def usual_transform(size: int) -> Any:
    """What training scripts for CIFAR do to an image."""
    return transforms.Compose(
        [
            transforms.RandomCrop(size, padding=4, pad_if_needed=True),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        ]
    )


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
    with tempfile.TemporaryDirectory() as folder:
        preset = parse_options(VisionOptions, [], default="digits_lt")
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count)]
        command += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
        command += [str(Path(__file__).with_name("vision_lt.py")), "--output_dir", folder]
        command += ["--schedule", "none", "--batch_size", str(preset.batch_size // count)]
        command += ["--epochs", str(options.epochs), "--eval_every", str(options.epochs)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if not torch.accelerator.is_available():
            environment["ACCELERATE_USE_CPU"] = "true"
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr[-2000:]}")
        found = json.loads((Path(folder) / "metrics.json").read_text(encoding="utf-8"))
    if found["processes"] != count:
        raise RuntimeError(f"{count} processes were asked for, {found['processes']} ran")
    return found["train_seconds"]


def vision(options: SpeedOptions) -> Iterator[Row]:
    """Training steps, data included."""
    flags = ["cifar10_lt", "--dataset", options.dataset, "--batch_size", str(options.batch_size)]
    preset = parse_options(VisionOptions, flags, default="cifar10_lt")
    accelerator = make_accelerator(preset)
    ours = vision_steps(accelerator, replace(preset, compile=options.compile), options.steps)
    peers = {"usual loop": usual_steps, "timm loader and task": timm_steps}
    for name, peer in peers.items():
        theirs = peer(accelerator, preset, options.steps)
        ours()  # compiles, and starts the workers of the other
        theirs()
        what = f"{options.steps} steps of {preset.model}, batch {preset.batch_size}"
        yield compare(options, what, ours, theirs, name, once=True)


def vision_steps(accelerator: Accelerator, options: VisionOptions, steps: int) -> Contender:
    """What ``vision_lt.py`` does in so many steps."""
    images, test, class_counts = load_data(options, show=False)
    criterion = options.make_loss(class_counts).to(accelerator.device)
    model = make_model(options, criterion)
    to_input = make_input(options, model, accelerator.device)
    train_set, _ = make_datasets(options, model, images, test.subset(range(1)))
    train_set = on_device(accelerator, train_set)
    loader = make_loader(
        options, train_set, batch_size=options.batch_size, shuffle=True, drop_last=True
    )
    optimizer, _ = make_optimizer(options, model, accelerator.device)
    net = compiled(accelerator, model) if options.compile else model
    net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    batches, generator = endless(loader), torch.Generator()

    def run() -> None:
        net.train()
        for _ in range(steps):
            pixels, labels = next(batches)
            batch = [(to_input(pixels, generator), labels)]
            update(accelerator, net, criterion, optimizer, batch, options.clip_grad)

    return run


def usual_steps(accelerator: Accelerator, options: VisionOptions, steps: int) -> Contender:
    """PIL transforms in a DataLoader with two workers, float32, eager."""
    images, _, class_counts = load_data(options, show=False)
    criterion = options.make_loss(class_counts).to(accelerator.device)
    model = make_model(options, criterion).to(memory_format=torch.contiguous_format)
    images.transform = usual_transform(image_config(options, model)["input_size"][-1])
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
    config = image_config(options, model)
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


def endless(loader: Any) -> Iterator[Any]:
    """The batches of epoch after epoch."""
    return chain.from_iterable(repeat(loader))


def text(options: SpeedOptions) -> Iterator[Row]:
    """Examples of one Trainer against those of another; set-up is not timed."""
    flags = [f"--dataset={options.text_dataset}", f"--max_length={options.max_length}"]
    flags += [f"--model={options.text_model}", f"--batch_size={options.text_batch_size}"]
    preset = parse_options(TextOptions, [*flags, "--epochs=1"], default="imdb_lt")
    examples = options.steps * preset.batch_size
    train, _, class_counts = load_texts(preset)
    train = train.shuffle(seed=0).select(range(min(examples, len(train))))
    with tempfile.TemporaryDirectory() as folder:
        preset = replace(preset, output_dir=folder)
        kinds = {"": preset}
        if preset.model != "bilstm":
            kinds[", no dropout of attention"] = replace(preset, attention_dropout=0.0)
        turns = [
            (
                [text_seconds(kind, train, class_counts) for kind in kinds.values()],
                padded_seconds(preset, train, class_counts),
            )
            for _ in range(options.repeats + 1)
        ][1:]
    what = f"{len(train)} texts of {preset.max_length} tokens, {preset.model}"
    for index, kind in enumerate(kinds):
        seconds = [(ours[index], theirs) for ours, theirs in turns]
        yield summary(what + kind, "Trainer, padding='max_length', float32", seconds)


def text_seconds(options: TextOptions, train: Any, class_counts: ClassCounts) -> float:
    """Seconds of one epoch the way of ``text_lt.py``."""
    criterion = options.make_loss(class_counts)
    tokenizer, model = make_text_model(options, train, criterion)
    arguments = quiet(make_arguments(options))
    tokens = tokenize(options, tokenizer, train)
    callbacks = [DRWCallback(criterion, schedule=options.make_schedule())]
    trainer = make_trainer(arguments, model, tokenizer, class_counts, tokens, tokens, callbacks)
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


SECTIONS: dict[str, Callable[[SpeedOptions], Iterator[Row]]] = {
    "loss": loss,
    "head": head,
    "counts": counts,
    "sampler": sampler,
    "metrics": metrics,
    "import": start_up,
    "scaling": scaling,
    "processes": processes,
    "vision": vision,
    "text": text,
}


if __name__ == "__main__":
    main(*HfArgumentParser(SpeedOptions, allow_abbrev=False).parse_args_into_dataclasses())
