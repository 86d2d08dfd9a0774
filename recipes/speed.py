"""Time the package against what one would use instead, side by side in one run.

    python recipes/speed.py                                     # all that takes minutes
    python recipes/speed.py --only vision --steps 90            # a whole epoch of CIFAR-10-LT
    python recipes/speed.py --only text --text_dataset stanfordnlp/imdb
    python recipes/speed.py --only loss head --json speed.json

One row a comparison: median seconds (memory: megabytes) of ours and of the peer, and their ratio
(below 1: ours takes less) as median with least and largest over the repeats. The contenders of a
row take turns, so what else the machine does meets them alike. Sections:

* loss: LDAM forward and backward against ``nn.CrossEntropyLoss`` on 256 rows of logits;
* head: chunked cosine head and LDAM against the plain one, gradients of weight and features;
* counts, sampler, metrics, import: small things, against NumPy, torch, scikit-learn, torch alone;
* start: ``--help`` of recipes, and the time to the first step of training;
* scaling: counts, sampler and image batches as they grow;
* augmentation: each policy and eraser on a batch, against a training step, and image by image;
* processes: a training of ``vision_lt.py`` by two processes against one, a thread each;
* vision: training steps of ``vision_lt.py`` against a DataLoader with two workers and PIL
  transforms in float32, and against timm's create_loader and ClassificationTask;
* fine_tuning: the same of a pretrained model on photographs, against the first of these;
* quality: whole trainings by the presets of CIFAR-10-LT, reckoned from three epochs, against the
  usual loop by the paper's protocol;
* growth: training steps as the classes and the side of the images grow;
* peak: the steps of vision, fine_tuning and text, eager, against products of large matrices with
  as many floating-point operations, and what they spend their time on;
* text: ``text_lt.py``, as it is and without dropout of attention, against a plain Trainer with
  padding to the full length in float32;
* memory: most memory of the trainings of vision, fine_tuning and text, with loader workers;
* auto: training steps in what ``--auto_tune`` chooses against float32, eager, of ResNet-32,
  EfficientNet-Lite0 at 96 pixels and MiniLM.
"""

from __future__ import annotations

from options import flags_alone
from study_options import SpeedOptions

if __name__ == "__main__":  # --help and a misspelt flag are answered before torch is imported
    chosen = flags_alone(SpeedOptions)


import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import speed_parts
import speed_training
import torch
from speed_timing import DEVICE, Row

from ldam_plugins import register
from ldam_plugins.benchmark.tables import markdown
from ldam_plugins.benchmark.timings import ratio_rows
from ldam_plugins.training import device_name, run_versions
from ldam_plugins.training.options import check_choice

SECTIONS: dict[str, Callable[[SpeedOptions], Iterator[Row]]] = {
    "loss": speed_parts.loss,
    "head": speed_parts.head,
    "counts": speed_parts.counts,
    "sampler": speed_parts.sampler,
    "metrics": speed_parts.metrics,
    "import": speed_parts.start_up,
    "start": speed_parts.recipe_starts,
    "scaling": speed_parts.scaling,
    "augmentation": speed_parts.augmentation,
    "processes": speed_training.processes,
    "vision": speed_training.vision,
    "fine_tuning": speed_training.fine_tuning,
    "quality": speed_training.quality,
    "growth": speed_training.growth,
    "peak": speed_training.peak,
    "text": speed_training.text,
    "memory": speed_training.memory,
    "auto": speed_training.auto,
}


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


if __name__ == "__main__":
    main(chosen)
