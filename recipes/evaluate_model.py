"""Measure a trained image or text classifier, by anyone: metrics, predictions and report.

    python recipes/evaluate.py runs/photos --dataset new_photos     # a run of this package
    python recipes/evaluate.py path/to/bert --dataset tickets.csv --test_split 0.2
    python recipes/evaluate.py output/train/resnet18 --dataset photos   # of timm's train.py

MODEL, the first word, is a run folder, a folder that transformers wrote, a folder or file
(``model_best.pth.tar``) of timm's ``train.py``, or a name of timm (``local-dir:...``,
``hf-hub:...``). The options of the data are those of ``vision_lt.py`` and ``text_lt.py``; of a run
they are known, and without ``--dataset`` it is measured again on its own test set. Classes are
matched by name, whatever their order. Data that have no parts (one folder of class folders, one
table) are all measured; data measured with a run may lack some of its classes, and many, medium and
few are told by the samples that it was trained on. Several processes (``torchrun``, ``accelerate
launch``) share the samples. ``--baseline runs/erm`` compares it in the report
with another run on the same samples, as ``recipes/compare.py`` does.

Left in ``--output_dir``: ``metrics.json``, ``predictions.csv``, ``confusion.csv``, ``mistakes/``
and ``report.html``, as a training leaves them, for ``recipes/compare.py`` too.
"""

from __future__ import annotations

from trained_options import EvaluateOptions, command_line

if __name__ == "__main__":  # --help and a misspelt flag are answered before torch is imported
    chosen = command_line(EvaluateOptions)

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from tqdm import tqdm
from trained import (
    AUTOCAST,
    Host,
    Part,
    data_settings,
    find_precision,
    join_processes,
    load,
    rows_of,
)

from ldam_plugins import ClassCounts
from ldam_plugins.data import LabelledImages
from ldam_plugins.data.texts import text_examples
from ldam_plugins.metrics import MetricAccumulator, Predictions
from ldam_plugins.posthoc import extract_features
from ldam_plugins.reports import per_class_table, write_mistakes, write_report
from ldam_plugins.reports.console import header, worded_classes
from ldam_plugins.training import (
    claim_output_dir,
    keep_freed_memory,
    run_metrics,
    write_metrics,
)
from ldam_plugins.training.options import check_choice
from ldam_plugins.training.run_dir import check_is_folder, check_no_run

BATCHES = 16
"""Batches that a process takes at a time."""


def main(options: EvaluateOptions, flags: list[str] | None = None) -> dict[str, Any]:
    """Measure a model; returns what the files of results hold.

    Args:
        options: Which model is measured.
        flags: Options of the data.
    """
    processes, output_dir = join_processes(options), Path(str(options.output_dir))
    options.quiet |= not processes.is_main_process
    if processes.is_main_process:
        check_is_folder(output_dir)
        if not options.overwrite:
            check_no_run(output_dir, resumes=False)
    host, data = load(options, flags or [], measures=True)
    check_choice("part", options.part, data.parts)
    part = data.parts[options.part]
    if not options.quiet:
        facts = {
            "model": f"{options.model}, {type(host.model).__name__}",
            "data": f"{data.options.dataset}, {host.kind}: {len(part.labels)} {options.part}",
            "classes": worded_classes(data.counts),
        }
        print(header(facts), flush=True)
    tuned = find_precision(
        options,
        host,
        lambda: rows_of(part.samples, np.arange(min(options.batch_size, len(part.labels)))),
        lambda: len(part.labels) // processes.num_processes,
        processes.device,
    )
    began = time.perf_counter()
    result = measure(options, processes, host, part, data.counts, AUTOCAST[tuned.precision])
    seconds = time.perf_counter() - began
    settings = {**data_settings(data.options), **asdict(options)}
    metrics = run_metrics(
        options=settings,
        class_counts=data.counts,
        device=processes.device,
        processes=processes.num_processes,
        mixed_precision=tuned.precision,
        evaluated=options.model,
        train_seconds=seconds,
        examples_per_second=len(part.labels) / seconds,
        test=result,
    )
    if processes.is_main_process:
        claim_output_dir(output_dir, settings, resume=False, overwrite=options.overwrite)
        save_outputs(options, metrics, part, data.counts)
    processes.wait_for_everyone()
    return metrics


def measure(
    options: EvaluateOptions,
    processes: PartialState,
    host: Host,
    part: Part,
    counts: ClassCounts,
    autocast: torch.dtype | None = None,
) -> dict[str, Any]:
    """Metrics and predictions of some samples, which the processes share.

    Each takes some batches in turn, the same ones however many they are.
    """
    is_images = isinstance(part.samples, LabelledImages)
    examples = part.samples.examples() if is_images else text_examples(part.samples)
    metrics, predictions = MetricAccumulator(counts), Predictions(len(counts))
    starts = range(0, len(part.labels), BATCHES * options.batch_size)
    own = starts[processes.process_index :: processes.num_processes]
    with keep_freed_memory(processes.device):
        for start in tqdm(own, unit=f"{starts.step} samples", disable=options.quiet):
            rows = np.arange(start, min(start + starts.step, len(part.labels)))
            some = rows_of(part.samples, rows)
            found = extract_features(
                host.model, host.make_loader(some), device=processes.device, autocast=autocast
            )
            groups = None if examples.groups is None else examples.groups[rows]
            metrics.update(found.logits, found.labels, groups)
            predictions.update(rows, found.logits, found.labels)
    (metrics, predictions), *others = gather_object([(metrics, predictions)])
    for more_metrics, more_predictions in others:
        metrics.merge(more_metrics)
        predictions.merge(more_predictions)
    result = metrics.compute(detailed=True)
    result["predictions"] = predictions.columns(examples.names)
    return result


def save_outputs(
    options: EvaluateOptions, metrics: dict[str, Any], part: Part, counts: ClassCounts
) -> None:
    """Write the metrics and the report, and print the accuracy of each class."""
    output_dir = Path(str(options.output_dir))
    is_images = isinstance(part.samples, LabelledImages)
    write_metrics(output_dir, metrics)
    write_mistakes(
        output_dir, part.samples.image if is_images else lambda row: part.samples[row]["text"]
    )
    write_report(output_dir, baseline=options.baseline)
    if not options.quiet:
        print(per_class_table(metrics["test"], counts))
        print(f"\nreport: {output_dir / 'report.html'}, figures: {output_dir / 'metrics.json'}")


if __name__ == "__main__":
    main(*chosen)
