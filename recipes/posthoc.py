"""What each post-hoc method makes of trained models: the table "checkpoint -> each method".

    python recipes/posthoc.py runs/cifar10/seed0 runs/cifar10/seed1 runs/cifar10/seed2
    python recipes/posthoc.py runs/imdb/* --methods none logit_adjustment:1 auto
    python recipes/posthoc.py runs/ldam_drw/seed* --methods none --output_dir runs/posthoc_ldam

The words are finished run folders of ``vision_lt.py`` and ``text_lt.py``, such as those of the
seeds of one setting. The features of each are taken once; every method (``METHOD``, its strength
chosen by cross-fitting, or ``METHOD:STRENGTH``) then changes the head in seconds, is measured on
the test set of the run, and is undone. What is chosen is chosen on the held-out part of the run
(``--val_split``), where it has one, while methods that learn a head learn from its training
samples as well; else on its training samples, which a network that knows them
by heart says little of: give the strengths then. Nothing is chosen on the test set.

A record is that of the run with the method as its option ``rebalance``. Left in ``--output_dir``:
``report.html``, ``results.md``, ``results.csv`` and ``results.jsonl``, as ``benchmark.py`` leaves
them; ``results_tables.py --add NAME results.jsonl`` puts the records into the documents. The run
folders are left as they are.
"""

from __future__ import annotations

from trained_options import PosthocOptions, RebalanceOptions
from trained_options import parse_posthoc as parse

from ldam_plugins.training.command_line import begin_study

if __name__ == "__main__":  # --help and a misspelt flag are answered before torch is imported
    chosen = begin_study(parse)

import json
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rebalance import choose_parts
from torch import nn
from tqdm import tqdm
from trained import load

from ldam_plugins import ClassCounts
from ldam_plugins.benchmark.records import UNKNOWN, new_record
from ldam_plugins.benchmark.report import write_experiment
from ldam_plugins.benchmark.tables import interval_rows, markdown
from ldam_plugins.posthoc import (
    Features,
    Rebalanced,
    extract_features,
    parse_method,
    rebalance_head,
)
from ldam_plugins.training import default_device, keep_freed_memory, read_metrics, run_metrics
from ldam_plugins.training.files import to_json
from ldam_plugins.training.run_dir import OPTIONS_FILE


class Made(NamedTuple):
    """What a method made of a head, and how long it took."""

    method: str
    done: Rebalanced
    seconds: float


def main(options: PosthocOptions) -> list[dict[str, Any]]:
    """Apply every method to every run; returns a record of each pair."""
    records: list[dict[str, Any]] = []
    for run in options.runs:
        records += records_of_run(options, run)
    page = write_experiment(options.output_dir, records, baseline="*/*:rebalance=none")
    if not options.quiet:
        print(f"{markdown(interval_rows(records))}\n\n{page}")
    return records


def records_of_run(options: PosthocOptions, run: str) -> Iterator[dict[str, Any]]:
    """The records of a run, one a method."""
    trained = RebalanceOptions(
        model=run,
        choose_on=options.choose_on,
        batch_size=options.batch_size,
        workers=options.workers,
        output_dir=options.output_dir,
        quiet=options.quiet,
    )
    host, data = load(trained, [])
    chosen_on, chosen, test = choose_parts(trained, data)
    learned = data.parts["train"].samples if chosen_on == "validation" else None
    device = default_device()

    def extract(samples: Any) -> Features:
        return extract_features(
            host.model,
            host.make_loader(samples),
            device=device,
            class_names=data.counts.class_names,
            cache_dir=Path(options.output_dir, "features"),  # the next command finds them again
            progress=not options.quiet,
        )

    with keep_freed_memory(device):
        features, tested = extract(chosen), extract(test)
        learn_from = None if learned is None else extract(learned)
    host.model.cpu()
    own = json.loads(Path(run, OPTIONS_FILE).read_text(encoding="utf-8"))
    precision = read_metrics(run).get("mixed_precision", UNKNOWN)
    for made in apply_methods(
        host.model, features, data.counts, tested, options, learn_from=learn_from
    ):
        yield record(
            {**own, "rebalance": made.method},
            made,
            data.counts,
            name=f"{Path(run).name}_{made.method.replace(':', '-')}",
            chosen_on=chosen_on,
            samples=len(features),
            precision=precision,
        )


def apply_methods(
    model: nn.Module,
    features: Features,
    counts: ClassCounts,
    test: Features,
    options: Any,
    **given: Any,
) -> Iterator[Made]:
    """What each method of ``options.methods`` makes of a model, which is left as it was.

    Args:
        model: A classifier.
        features: What they learn from and are chosen on.
        counts: Training samples per class.
        test: What they are measured on.
        options: With ``methods``, ``by``, ``folds`` and ``quiet``.
        **given: For :func:`~ldam_plugins.posthoc.rebalance_head`.
    """
    for method in tqdm(options.methods, unit="method", disable=getattr(options, "quiet", False)):
        name, strength = parse_method(method)
        began = time.perf_counter()
        with warnings.catch_warnings():
            # That the head got a bias is of no use here: it is undone.
            warnings.filterwarnings("ignore", message="the head .* had no bias")
            done = rebalance_head(
                model,
                features,
                counts,
                name,
                strength=strength,
                by=options.by,
                folds=options.folds,
                test=test,
                **given,
            )
        seconds = time.perf_counter() - began
        done.undo()
        yield Made(method, done, seconds)


def record(
    made_of: Mapping[str, Any],
    made: Made,
    counts: ClassCounts,
    *,
    name: str,
    chosen_on: str,
    samples: int,
    precision: str = "no",
) -> dict[str, Any]:
    """The record of a model that a method was applied to.

    Args:
        made_of: The options.
        made: The method and what it made.
        counts: Training samples per class.
        name: Of the record.
        chosen_on: Where the choice was made.
        samples: How many these were.
        precision: That the model was trained in.
    """
    metrics = run_metrics(
        options=made_of,
        mixed_precision=precision,
        class_counts=counts,
        device="cpu",
        rebalance={"chosen_on": chosen_on, **chosen_of(made.done)},
        threads=torch.get_num_threads(),
        train_seconds=made.seconds,
        examples_per_second=samples / made.seconds,
        test=made.done.after,
    )
    command = f"python {' '.join(sys.argv)}"
    found = new_record(name, command, metrics)
    return json.loads(to_json(found, name="record"))  # numbers as any reader gets them


def chosen_of(done: Rebalanced) -> dict[str, Any]:
    """What a record says of the choice: without the candidates, which would be most of it."""
    found = done.to_dict()
    if found["choice"] is not None:
        del found["choice"]["candidates"]
    for name in ("target_prior", "source_prior"):
        del found[name]
    return found


if __name__ == "__main__":
    main(chosen)
