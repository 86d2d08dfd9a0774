"""Measure a trained image or text classifier, by anyone: metrics, predictions and report.

    python recipes/evaluate.py runs/photos --dataset new_photos     # a run of this package
    python recipes/evaluate.py path/to/bert --dataset tickets.csv --test_split 0.2
    python recipes/evaluate.py output/train/resnet18 --dataset photos   # of timm's train.py

MODEL, the first word, is a run folder, a folder that transformers wrote, a folder or file
(``model_best.pth.tar``) of timm's ``train.py``, or a name of timm (``local-dir:...``,
``hf-hub:...``). The options of the data are those of ``vision_lt.py`` and ``text_lt.py``; of a run
they are known, and without ``--dataset`` it is measured again on its own test set. Classes are
matched by name, whatever their order. ``--baseline runs/erm`` compares it in the
report with another run on the same samples, as ``recipes/compare.py`` does.

Left in ``--output_dir``: ``metrics.json``, ``predictions.csv``, ``confusion.csv``, ``mistakes/``
and ``report.html``, as a training leaves them, for ``recipes/compare.py`` too.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from trained import (
    TrainedOptions,
    command_line,
    data_settings,
    load,
)

from ldam_plugins.data import LabelledImages
from ldam_plugins.data.texts import text_examples
from ldam_plugins.metrics import Predictions, long_tail_metrics
from ldam_plugins.posthoc import extract_features
from ldam_plugins.reports import per_class_table, write_mistakes, write_report
from ldam_plugins.reports.console import header, worded_classes
from ldam_plugins.training import (
    claim_output_dir,
    default_device,
    keep_freed_memory,
    run_metrics,
    write_metrics,
)
from ldam_plugins.training.options import check_choice, option
from ldam_plugins.training.run_dir import check_no_run


@dataclass
class EvaluateOptions(TrainedOptions):
    """Which model is measured. Further flags are those of the recipes that choose the data."""

    FOLDER: ClassVar[str] = "evaluated"

    part: str = option(
        "test", "samples that it is measured on", choices=("test", "validation", "train")
    )
    baseline: str | None = option(
        None, "a run, or a CSV of predictions of the same samples, that it is compared with"
    )


def main(options: EvaluateOptions, flags: list[str] | None = None) -> dict[str, Any]:
    """Measure a model; returns what the files of results hold.

    Args:
        options: Which model is measured.
        flags: Options of the data.
    """
    output_dir = Path(str(options.output_dir))
    if not options.overwrite:
        check_no_run(output_dir)
    host, data = load(options, flags or [])
    check_choice("part", options.part, data.parts)
    part, names = data.parts[options.part], data.counts.class_names
    if not options.quiet:
        facts = {
            "model": f"{options.model}, {type(host.model).__name__}",
            "data": f"{data.options.dataset}, {host.kind}: {len(part.labels)} {options.part}",
            "classes": worded_classes(data.counts),
        }
        print(header(facts), flush=True)
    device = default_device()
    began = time.perf_counter()
    with keep_freed_memory(device):
        found = extract_features(
            host.model,
            host.make_loader(part.samples),
            device=device,
            class_names=names,
            progress=not options.quiet,
        )
    seconds = time.perf_counter() - began
    is_images = isinstance(part.samples, LabelledImages)
    examples = part.samples.examples() if is_images else text_examples(part.samples)
    predictions = Predictions(len(data.counts))
    predictions.update(range(len(found)), found.logits, found.labels)
    result = long_tail_metrics(
        found.logits, found.labels, data.counts, groups=examples.groups, detailed=True
    )
    result["predictions"] = predictions.columns(examples.names)
    settings = {**data_settings(data.options), **asdict(options)}
    claim_output_dir(output_dir, settings, resume=False, overwrite=options.overwrite)
    metrics = run_metrics(
        options=settings,
        class_counts=data.counts,
        device=device,
        evaluated=options.model,
        train_seconds=seconds,
        examples_per_second=len(found) / seconds,
        test=result,
    )
    write_metrics(output_dir, metrics)
    write_mistakes(
        output_dir, part.samples.image if is_images else lambda row: part.samples[row]["text"]
    )
    write_report(output_dir, baseline=options.baseline)
    if not options.quiet:
        print(per_class_table(result, data.counts))
        print(f"\nreport: {output_dir / 'report.html'}, figures: {output_dir / 'metrics.json'}")
    return metrics


if __name__ == "__main__":
    main(*command_line(EvaluateOptions))
