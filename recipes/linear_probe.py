"""Are the features good before the switch? Linear probes of a run's checkpoints, by class group.

    python recipes/vision_lt.py digits_lt --keep_checkpoints 21
    python recipes/linear_probe.py --runs runs/digits_lt
    python recipes/linear_probe.py --recipe text --runs runs/benchmark_stdlib/cells/*

If deferral works by giving the network time to learn features first, those just before the switch
serve a linear classifier as well as those after it. For each run: the last epoch before the switch
to the second stage, the first after it, and the last of the training, from the checkpoints that
``--keep_checkpoints`` kept; for schedules without a switch the same epochs, by their ``--start``.
The probe is fitted on all training samples of the dataset, before the cut to a long tail, or only
on those of the run (``--fit_on long_tail``), and evaluated on the test set.
"""

from __future__ import annotations

from functools import partial

from options import CoreOptions, flags_alone
from study_options import ProbeOptions

from ldam_plugins.training.command_line import begin_study

if __name__ == "__main__":  # --help and a misspelt flag are answered before torch is imported
    chosen = begin_study(partial(flags_alone, ProbeOptions))

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import text_lt
import vision_lt
from safetensors.torch import load_file
from tabulate import tabulate
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import DataCollatorWithPadding

from ldam_plugins import ClassCounts, DeferredSchedule, register
from ldam_plugins.integrations.timm.images import image_loader
from ldam_plugins.integrations.transformers.run_callbacks import trainer_checkpoints
from ldam_plugins.metrics import head_inputs, linear_probe
from ldam_plugins.training import default_device, read_metrics, write_atomic
from ldam_plugins.training.checkpoints import checkpoints
from ldam_plugins.training.options import invalid

COLUMNS = ("top1_error", "balanced_accuracy", "many", "medium", "few")


@dataclass
class Subject:
    """A run to probe: its model, its checkpoints, and the features of its train and test set."""

    model: nn.Module
    counts: ClassCounts
    checkpoints: dict[int, Path]
    features: Callable[[str], tuple[np.ndarray, np.ndarray]]


def main(options: ProbeOptions) -> list[dict[str, Any]]:
    """Probe the runs; returns a row a run and epoch, as the CSV has them."""
    register()
    if not options.runs:
        raise invalid("runs", "at least one folder of a finished run", options.runs)
    rows = [row for run in tqdm(options.runs, unit="run") for row in probe_run(options, Path(run))]
    Path(options.output).parent.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(rows, dtype=object)
    write_atomic(options.output, table.to_csv(index=False, lineterminator="\n").encode())
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".3f"))
    return rows


def probe_run(options: ProbeOptions, run: Path) -> Iterator[dict[str, Any]]:
    """The rows of one run."""
    metrics = read_metrics(run)
    if metrics["test"] is None:
        hint = "Train without --evaluate."
        raise invalid("runs", "of models measured on the test set", str(run), hint=hint)
    kind, open_run = RECIPES[options.recipe]
    trained = kind(**{**metrics["options"], "output_dir": str(run)})
    subject = open_run(trained, options.fit_on)
    switch = last_epoch_before_switch(trained)
    for epochs in options.epochs or sorted({switch, switch + 1, trained.epochs} - {0}):
        load_checkpoint(subject, epochs, run)
        (x, y), (test_x, test_y) = (subject.features(part) for part in ("train", "test"))
        result = linear_probe(x, y, test_x, test_y, subject.counts)
        yield {
            "run": str(run),
            **{name: asdict(trained)[name] for name in ("loss", "schedule", "seed")},
            "epochs": epochs,
            "when": "before" if epochs <= switch else "after",
            "fit_on": options.fit_on,
            **{column: result[column] for column in COLUMNS},
            "top1_error_of_run": metrics["test"]["top1_error"],
        }


def last_epoch_before_switch(trained: CoreOptions) -> int:
    """Epochs that are done, as a whole, when the second stage begins."""
    schedule = replace(trained.make_schedule(), kind="drw")
    return switch_epoch(schedule, trained.epochs)


def switch_epoch(schedule: DeferredSchedule, epochs: int) -> int:
    """The epoch in which the second stage begins."""
    if schedule.unit == "step":
        hint = "Name the --epochs to probe."
        raise invalid("start_unit", "'epoch' or 'fraction'", "step", hint=hint)
    return schedule.start_epoch(epochs)


def load_checkpoint(subject: Subject, epochs: int, run: Path) -> None:
    """Give the model the weights it had after so many epochs."""
    if epochs not in subject.checkpoints:
        expected = f"one of those {str(run)!r} has a checkpoint of ({sorted(subject.checkpoints)})"
        raise invalid("epochs", expected, epochs, hint="Train with more --keep_checkpoints.")
    weights = load_file(subject.checkpoints[epochs] / "model.safetensors")
    compiled = "_orig_mod."
    subject.model.load_state_dict({k.removeprefix(compiled): v for k, v in weights.items()})


def open_vision(options: vision_lt.VisionOptions, fit_on: str) -> Subject:
    """A run of the vision recipe."""
    train, test, counts = vision_lt.load_data(options, show=False)
    train, _, counts = vision_lt.hold_out(options, train, counts, show=False)
    if fit_on == "all":
        train, _, _ = vision_lt.load_data(replace(options, profile="none"), show=False)
    model = vision_lt.make_model(options, options.make_loss(counts)).to(default_device())
    pipeline = vision_lt.make_pipeline(options, model)
    to_input = pipeline.make_input(default_device())
    # Of each pair the second one is not augmented.
    sets = {
        part: pipeline.datasets(images, images, memory_limit=options.memory_limit)[1]
        for part, images in (("train", train), ("test", test))
    }
    labels = {"train": np.asarray(train.labels), "test": np.asarray(test.labels)}

    def features(part: str) -> tuple[np.ndarray, np.ndarray]:
        loader = image_loader(
            sets[part], workers=options.workers, batch_size=4 * options.batch_size
        )
        images = (to_input(batch[0].to(default_device())) for batch in loader)
        return head_inputs(model, images, lambda net, batch: net(batch)), labels[part]

    return Subject(model, counts, checkpoints(options.output_dir), features)


def open_text(options: text_lt.TextOptions, fit_on: str) -> Subject:
    """A run of the text recipe."""
    train, test, counts = text_lt.load_data(options)
    train, _, counts = text_lt.hold_out(options, train, counts, show=False)
    tokenizer, model = text_lt.make_model(options, train, options.make_loss(counts))
    model.to(default_device())
    if fit_on == "all":
        train, _, _ = text_lt.load_data(replace(options, profile="none", rare_classes=[]))
    sets = {"train": train, "test": test}
    tokens = {k: text_lt.tokenize(options, tokenizer, texts) for k, texts in sets.items()}
    collate = DataCollatorWithPadding(tokenizer)

    def features(part: str) -> tuple[np.ndarray, np.ndarray]:
        loader: Iterable[Any] = DataLoader(tokens[part], 4 * options.batch_size, collate_fn=collate)
        batches = (batch.to(default_device()) for batch in loader)
        found = head_inputs(model, batches, lambda net, batch: net(**batch))
        return found, np.asarray(tokens[part]["label"])

    folder = Path(options.output_dir, "checkpoints")
    return Subject(model, counts, trainer_checkpoints(folder), features)


RECIPES: dict[str, tuple[type[Any], Callable[[Any, str], Subject]]] = {
    "vision": (vision_lt.VisionOptions, open_vision),
    "text": (text_lt.TextOptions, open_text),
}


if __name__ == "__main__":
    main(chosen)
