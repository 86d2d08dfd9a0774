"""Which loss, head and weights on features of a pretrained network, in minutes on a CPU.

    python recipes/frozen_features.py --dataset path/to/photos
    python recipes/frozen_features.py cifar10_lt --dataset path/to/cifar10
    python recipes/frozen_features.py --recipe text banking77_lt --dataset path/to/banking77

The network is not trained: each image or text goes through it once, and every method is a
classifier on the features it gives, solved to its optimum by L-BFGS (`ldam_plugins.posthoc`).
Images are resized to a square without a crop or augmentation; of texts the features are the mean
over the tokens of the last layer. Unless told, the networks are those that packages bring:
EfficientNet-Lite0 (ImageNet) at 128 pixels and MiniLM.

Every loss is solved for on every head and under every schedule. What was trained without weights
by a loss that does not correct the class prior is also measured with its logits adjusted afterwards
(``posthoc_tau``). Sampling classes has the expectation of weighting them, so ``rs`` and ``drs``
would be ``rw`` and ``drw`` here; on a linear head ``drw`` ends where ``rw`` does and is left out.
With ``--methods`` (``all``, or those of ``posthoc.py``) the linear classifier of cross-entropy is
re-balanced by each of them, its strength chosen by cross-fitting on the training features, for
which cross-entropy too is solved anew without each fold: the option ``rebalance`` of the records.

A preset of ``recipes/presets`` may come first; of its options and flags those are used that choose
the data and the network. Left in ``--output_dir``: the features, ``report.html``, ``results.md``,
``results.csv`` and ``results.jsonl``, as ``recipes/benchmark.py`` leaves them.
"""

from __future__ import annotations

from study_options import DATA_OPTIONS, FROZEN_HEADS, FROZEN_SCHEDULES, FrozenOptions
from study_options import parse_frozen as parse
from trained_options import APPLIED

from ldam_plugins.training.command_line import begin_study

if __name__ == "__main__":  # --help and a misspelt flag are answered before torch is imported
    chosen = begin_study(parse)

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import posthoc
import text_lt
import torch
import vision_lt
from options import CoreOptions
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import AutoModel, AutoTokenizer, DataCollatorWithPadding

from ldam_plugins import ClassCounts, DeferredSchedule, create_loss, list_losses, register
from ldam_plugins.benchmark.report import write_experiment
from ldam_plugins.benchmark.tables import interval_rows, markdown
from ldam_plugins.choices import NONE
from ldam_plugins.heads.choice import options_for_head
from ldam_plugins.integrations.timm.images import InputLoader, image_loader
from ldam_plugins.integrations.transformers.run_callbacks import pretrained_source
from ldam_plugins.losses import loss_options
from ldam_plugins.losses.registry import loss_class
from ldam_plugins.metrics.long_tail import long_tail_metrics
from ldam_plugins.posthoc import (
    Features,
    adjusted_logits,
    extract_features,
    fit_head,
    parse_method,
)
from ldam_plugins.posthoc.choice import CRITERIA
from ldam_plugins.posthoc.feature_files import digest_of_batches
from ldam_plugins.training import keep_freed_memory, run_metrics
from ldam_plugins.training.cores import fit_threads
from ldam_plugins.training.files import to_json
from ldam_plugins.training.options import check_choice, check_int, invalid


def main(options: FrozenOptions, data: CoreOptions) -> list[dict[str, Any]]:
    """Solve for each classifier; returns the record of each."""
    fit_threads()
    register()
    cells = list(make_cells(options))
    methods = APPLIED if options.methods == ["all"] else options.methods
    options.methods = [*dict.fromkeys(methods)]
    for method in options.methods:
        parse_method(method, "methods")
    check_choice("by", options.by, CRITERIA)
    check_int("folds", options.folds, low=2)
    if options.features is None:
        extract(options, data)
    train, test = load_features(options.features or options.output_dir, data)
    counts = ClassCounts.from_labels(train.labels, class_names=train.class_names)
    records: list[dict[str, Any]] = []
    for cell in tqdm(cells, unit="classifier"):
        records += solve(options, data, cell, train, test, counts)
    if options.methods:
        records += rebalanced(options, data, train, test, counts)
    page = write_experiment(options.output_dir, records, baseline="ce/none")
    print(f"{markdown(interval_rows(records))}\n\n{page}")
    return records


def extract(options: FrozenOptions, data: CoreOptions) -> None:
    """Keep the features of the training and of the test set in a file each."""
    get_features = FEATURES[options.recipe]
    with keep_freed_memory("cpu"):
        for part, features in get_features(data):
            features.save(features_file(options.output_dir, part))


def load_features(folder: str, data: CoreOptions) -> tuple[Features, Features]:
    """The features that a run left, if it made them of the same data and network."""
    found = []
    for part in ("train", "test"):
        path = features_file(folder, part)
        features = Features.load(path)
        if features.origin["options"] != origin(data)["options"]:
            expected = f"a folder of features of {origin(data)['options']}"
            raise invalid("features", expected, features.origin["options"])
        found.append(features)
    train, test = found
    return train, test


def features_file(folder: str, part: str) -> Path:
    """Where a run keeps the features of its training or test set."""
    return Path(folder, "features", f"{part}.safetensors")


def origin(data: CoreOptions) -> dict[str, str]:
    """What features are made of, for their file."""
    return {"options": to_json(data_options(data), name="options")}


def data_options(data: CoreOptions) -> dict[str, Any]:
    """The options that choose the data and the network."""
    names = (field.name for field in fields(data))
    return {name: getattr(data, name) for name in names if name in DATA_OPTIONS}


def make_cells(options: FrozenOptions) -> Iterator[dict[str, Any]]:
    """Loss, head, schedule and options of the loss of each classifier."""
    for name, known in (
        ("losses", list_losses()),
        ("heads", FROZEN_HEADS),
        ("schedules", FROZEN_SCHEDULES),
    ):
        for value in getattr(options, name):
            check_choice(name, value, known)
    chosen = (dict.fromkeys(each) for each in (options.losses, options.heads, options.schedules))
    for loss, head, schedule in product(*chosen):
        if (head, schedule) == ("linear", "drw"):
            continue
        margins = options.max_margins if "max_margin" in loss_options(loss) else [None]
        for margin in margins:
            yield {"loss": loss, "head": head, "schedule": schedule, "max_margin": margin}


def solve(
    options: FrozenOptions,
    data: CoreOptions,
    cell: dict[str, Any],
    train: Features,
    test: Features,
    counts: ClassCounts,
) -> Iterator[dict[str, Any]]:
    """The record of one classifier, and that of its logits adjusted afterwards."""
    began = time.perf_counter()
    given = {key: cell[key] for key in ("max_margin",) if cell[key] is not None}
    criterion = create_loss(
        cell["loss"], counts, **options_for_head(cell["loss"], given, cell["head"])
    )
    schedule = DeferredSchedule(cell["schedule"], beta=options.beta)
    fitted = fit_head(
        train.features,
        train.labels,
        criterion,
        head=cell["head"],
        scale=options.scale if cell["head"] == "cosine" else None,
        schedule=schedule,
        weight_decay=options.weight_decay,
        seed=options.seed,
    )
    seconds = time.perf_counter() - began
    with torch.inference_mode():
        logits = fitted.layer(test.features)
    tunable = loss_class(cell["loss"]).corrects_prior or cell["schedule"] != "none"
    for tau in (0.0,) if tunable or not options.posthoc_tau else (0.0, options.posthoc_tau):
        made = {
            **data_options(data),
            **cell,
            "scale": options.scale if cell["head"] == "cosine" else None,
            "beta": options.beta,
            "weight_decay": options.weight_decay,
            "posthoc_tau": tau,
            "rebalance": NONE,
            "seed": options.seed,
        }
        record = {
            "name": "_".join(f"{key}-{value}" for key, value in [*cell.items(), ("tau", tau)]),
            "command": f"python {' '.join(sys.argv)}",
            "mixed_precision": "no",
            **run_metrics(
                options=made,
                class_counts=counts,
                device="cpu",
                threads=torch.get_num_threads(),
                solver={
                    "iterations": fitted.iterations,
                    "gradient": fitted.gradient,
                    "converged": fitted.converged,
                },
                train_seconds=seconds,
                examples_per_second=len(train) * fitted.iterations / seconds,
                test=long_tail_metrics(
                    adjusted_logits(logits, counts, tau=tau), test.labels, counts
                ),
            ),
        }
        yield json.loads(to_json(record, name="record"))  # numbers as any reader gets them


def rebalanced(
    options: FrozenOptions,
    data: CoreOptions,
    train: Features,
    test: Features,
    counts: ClassCounts,
) -> Iterator[dict[str, Any]]:
    """The record of the linear classifier of cross-entropy after each method."""
    fitted: dict[str, nn.Linear] = {}

    def fit(features: Tensor, labels: Tensor) -> nn.Linear:
        key = digest_of_batches([features, labels])  # the folds of all methods are the same
        if key not in fitted:
            fitted[key] = solve_anew(features, labels)
        return fitted[key]

    def solve_anew(features: Tensor, labels: Tensor) -> nn.Linear:
        criterion = create_loss("ce", ClassCounts.from_labels(labels, num_classes=len(counts)))
        decay = options.weight_decay
        return fit_head(features, labels, criterion, head="linear", weight_decay=decay).layer

    model = nn.Sequential(nn.Identity(), fit(train.features, train.labels))
    with torch.inference_mode():
        own, tested = (replace(each, logits=model(each.features)) for each in (train, test))
    given = options.methods
    # The head as it is stands among the cells already.
    chosen = replace(options, methods=[each for each in given if each != NONE])
    for made in posthoc.apply_methods(model, own, counts, tested, chosen, refit=fit):
        of = {
            **data_options(data),
            **{"loss": "ce", "head": "linear", "schedule": "none", "max_margin": None},
            "scale": None,
            "beta": options.beta,
            "weight_decay": options.weight_decay,
            "posthoc_tau": 0.0,
            "rebalance": made.method,
            "seed": options.seed,
        }
        name = f"ce_linear_{made.method.replace(':', '-')}"
        yield posthoc.record(
            of, made, counts, name=name, chosen_on="train, refitted", samples=len(train)
        )


def image_features(data: vision_lt.VisionOptions) -> Iterator[tuple[str, Features]]:
    """The features of the training and of the test images."""
    train, test, counts = vision_lt.load_data(data, show=True)
    model = vision_lt.make_model(data, data.make_loss(counts))
    pipeline = vision_lt.make_pipeline(data, model)
    to_input = pipeline.make_input(torch.device("cpu"))

    for part, images in (("train", train), ("test", test)):
        # Of each pair the second one is not augmented.
        loader = image_loader(
            pipeline.datasets(images, images, memory_limit=0)[1],
            workers=data.workers,
            batch_size=data.batch_size,
        )
        inputs = InputLoader(loader, to_input)
        names = counts.class_names
        yield (
            part,
            extract_features(model, inputs, class_names=names, origin=origin(data), progress=True),
        )


def text_features(data: text_lt.TextOptions) -> Iterator[tuple[str, Features]]:
    """The features of the training and of the test texts."""
    train, test, counts = text_lt.load_data(data, show=True)
    folder = pretrained_source(data.model)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    tokenizer.model_max_length = min(data.max_length, tokenizer.model_max_length)
    model = MeanOfTokens(folder, len(counts))

    for part, texts in (("train", train), ("test", test)):
        tokens = text_lt.tokenize(data, tokenizer, texts)
        # Texts of one length together, so that little is padded.
        order = np.argsort([len(ids) for ids in tokens["input_ids"]], kind="stable")
        loader = DataLoader(
            tokens.select(order), data.batch_size, collate_fn=DataCollatorWithPadding(tokenizer)
        )
        names = counts.class_names
        yield (
            part,
            extract_features(
                model, loader, head="head", class_names=names, origin=origin(data), progress=True
            ),
        )


class MeanOfTokens(nn.Module):
    """A text encoder with a head on the mean of its last layer over the tokens of a text."""

    def __init__(self, folder: str, classes: int) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(
            folder, trust_remote_code=False, dtype=torch.float32
        )
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)

    def forward(self, **tokens: Tensor) -> Tensor:
        """Logits (N, C) of a batch of token ids and its attention mask."""
        states = self.encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1)
        return self.head((states * mask).sum(1) / mask.sum(1))


FEATURES: dict[str, Callable[[Any], Iterator[tuple[str, Features]]]] = {
    "vision": image_features,
    "text": text_features,
}


if __name__ == "__main__":
    main(*chosen)
