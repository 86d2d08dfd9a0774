"""Sections of ``speed.py`` that time single parts: loss, head, counts, images, import and more."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix
from speed_timing import DEVICE, Contender, Row, compare, peak_memory
from study_options import SpeedOptions
from timm import create_model
from torch import Tensor, nn
from torchvision import transforms

from ldam_plugins import ClassCounts, DeferredSchedule, LDAMLoss, use_cosine_head
from ldam_plugins.data.augment import RandomCropFlip, normalize
from ldam_plugins.data.augment_policies import AutoAugment, RandAugment, TrivialAugmentWide
from ldam_plugins.data.erasing import Cutout, RandomErasing
from ldam_plugins.metrics import MetricAccumulator
from ldam_plugins.samplers import DeferredSampler

ROWS = 256
SEEN_BYTES = 1 << 26
"""Tensors from this size on go back to the system when freed, so their peaks can be seen."""


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
            target_probs = nn.functional.normalize(torch.rand(rows, classes), p=1).to(DEVICE)
            ignored = index.where(torch.arange(rows, device=DEVICE) % 4 > 0, -100)
            kinds = {
                "plain": (index, None),
                "weighted": (index, weight),
                "ignored": (ignored, None),
                "soft": (target_probs, None),
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


FIRST_STEP = """
import importlib, os, runpy, sys

module, owner, name, *sys.argv = sys.argv[1:]
owner = getattr(importlib.import_module(module), owner)
step = getattr(owner, name)
setattr(owner, name, lambda *given, **more: (step(*given, **more), os._exit(0)))
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Ends a recipe after its first step: module, class and method that make one, then the recipe."""
STEP_OF = {
    "vision_lt": ("ldam_plugins.training.step", "TrainStep", "__call__"),
    "text_lt": ("transformers", "Trainer", "training_step"),
}


def recipe_starts(options: SpeedOptions) -> Iterator[Row]:
    """``--help`` of recipes, and the first step of training, against what they cannot do without.

    What a launched training takes beyond an empty script that imports its libraries is in the note.
    """
    python, folder = sys.executable, Path(__file__).parent
    run = lambda *words: subprocess.run(words, check=True, capture_output=True)  # noqa: E731
    for name in ("vision_lt", "text_lt", "benchmark", "predict"):
        yield compare(
            options,
            f"{name}.py --help",
            partial(run, python, str(folder / f"{name}.py"), "--help"),
            partial(run, python, "-c", "from transformers import HfArgumentParser"),
            "import of HfArgumentParser",
            once=True,
        )
    with tempfile.TemporaryDirectory() as temporary:
        scripts = {"first": FIRST_STEP, "empty": "import torch, timm, accelerate"}
        for name, text in scripts.items():
            Path(temporary, f"{name}.py").write_text(text, encoding="utf-8")
        launch = [python, "-m", "accelerate.commands.launch"]
        for name, step in STEP_OF.items():
            words = [str(folder / f"{name}.py"), "--quiet", "--overwrite"]
            words += ["--output_dir", f"{temporary}/run"]
            row = compare(
                options,
                f"first step of {name}.py",
                partial(run, *launch, f"{temporary}/first.py", *step, *words),
                partial(run, *launch, f"{temporary}/empty.py"),
                "launch that imports torch, timm, accelerate",
                once=True,
            )
            added = statistics.median(mine - theirs for mine, theirs in row["seconds"])
            yield {**row, "note": f"{added:.1f} s beyond it"}


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


def augmentation(options: SpeedOptions) -> Iterator[Row]:
    """Each augmentation of a batch of 32 x 32, against a training step and torchvision."""
    pixels = torch.randint(256, (options.batch_size, 3, 32, 32), dtype=torch.uint8)
    batch, usual, generator = pixels.to(DEVICE), (0.5,) * 3, torch.Generator()
    values = normalize(batch, usual, usual, memory_format=torch.channels_last)
    cifar10 = transforms.AutoAugmentPolicy.CIFAR10
    contenders: dict[str, tuple[Any, Tensor, Any, Tensor]] = {
        "RandAugment": (RandAugment(), batch, transforms.RandAugment(), pixels),
        "AutoAugment": (AutoAugment(), batch, transforms.AutoAugment(cifar10), pixels),
        "TrivialAugment": (TrivialAugmentWide(), batch, transforms.TrivialAugmentWide(), pixels),
        "Random Erasing": (RandomErasing(), values, transforms.RandomErasing(), values),
        "Cutout": (Cutout(16), values, None, values),
    }
    step = resnet_step(values)
    for name, (ours, given, theirs, single) in contenders.items():
        run = partial(ours, given, generator)
        what = f"{name}, {len(batch)} images of 32 x 32"
        yield compare(options, what, run, step, "cifar_resnet32, both passes", once=True)
        if theirs is not None:
            one_by_one = lambda one=theirs, of=single: torch.stack([one(x) for x in of])  # noqa: E731
            yield compare(options, what, run, one_by_one, "torchvision, image by image")


def resnet_step(images: Tensor) -> Contender:
    """Forward and backward pass of a CIFAR ResNet-32 in training, without its optimizer."""
    model = create_model("cifar_resnet32").to(images.device, memory_format=torch.channels_last)
    labels = torch.randint(10, (len(images),), device=images.device)
    criterion, parameters = LDAMLoss([500] * 10).to(images.device), [*model.parameters()]
    return lambda: torch.autograd.grad(criterion(model(images), labels), parameters)


def usual_transform(size: int, padding: int = 4, *, resize: bool = False) -> Any:
    """What training scripts for small images do to one; photographs are resized first."""
    return transforms.Compose(
        [
            *([transforms.Resize((size, size))] if resize else []),
            transforms.RandomCrop(size, padding=padding, pad_if_needed=True),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
        ]
    )
