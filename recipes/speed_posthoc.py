"""Seconds and memory of the post-hoc methods on many samples and classes.

    OMP_NUM_THREADS=1 python recipes/speed_posthoc.py --samples 1000000 --classes 1000
    OMP_NUM_THREADS=1 python recipes/speed_posthoc.py --samples 100000 --classes 8142 --methods auto

The features are Gaussians about class means, of a long tail of ratio 100, and the head is that of
Bayes' rule. They lie in files that are mapped into memory, as ``extract_features(memmap_dir=...)``
leaves them, and so do the logits. A row a method: seconds on the clock and of the CPU, and the most
memory that the process held beside those files. Printed, and written to ``--output`` if given.
"""

from __future__ import annotations

from options import flags_alone
from study_options import SpeedPosthocOptions

if __name__ == "__main__":  # --help and a misspelt flag are answered before torch is imported
    chosen = flags_alone(SpeedPosthocOptions)


import json
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn
from torch.nn import functional as F

from ldam_plugins import ClassCounts
from ldam_plugins.benchmark.tables import markdown
from ldam_plugins.posthoc import Features, extract_features, parse_method, rebalance_head
from ldam_plugins.training import device_name, run_versions
from ldam_plugins.training.files import to_json

RATIO, DISTANCE, ROWS = 100.0, 4.0, 8192


def main(options: SpeedPosthocOptions) -> list[dict[str, Any]]:
    """Measure each method."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        model, features, counts = simulate(options, Path(scratch))
        for method in options.methods:
            name, strength = parse_method(method)
            clock, cpu = time.perf_counter(), time.process_time()
            with peak_memory() as peak, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                done = rebalance_head(
                    model,
                    features,
                    counts,
                    name,
                    strength=strength,
                    max_samples=options.max_samples,
                )
            done.undo()
            rows.append(
                {
                    "method": method,
                    "samples": len(features),
                    "features": options.features,
                    "classes": options.classes,
                    "of them used": min(len(features), options.max_samples or len(features)),
                    "seconds": round(time.perf_counter() - clock, 1),
                    "CPU seconds": round(time.process_time() - cpu, 1),
                    "memory, GB": round(max(peak) / 1e9, 2),
                    "threads": torch.get_num_threads(),
                }
            )
            print(markdown(rows[-1:]), flush=True)
            if options.output:
                keep(Path(options.output), rows[-1])
    return rows


def simulate(options: SpeedPosthocOptions, folder: Path) -> tuple[nn.Module, Features, ClassCounts]:
    """A head, and features in files."""
    generator = torch.Generator().manual_seed(0)
    shares = RATIO ** (-np.arange(options.classes) / max(1, options.classes - 1))
    sizes = np.maximum(2, (options.samples * shares / shares.sum()).astype(int))
    labels = torch.repeat_interleave(torch.arange(options.classes), torch.from_numpy(sizes))
    means = torch.randn(options.classes, options.features, generator=generator)
    means = DISTANCE * F.normalize(means, dim=1)
    head = nn.Linear(options.features, options.classes)
    model = nn.Sequential(nn.Identity(), head)
    with torch.no_grad():
        head.weight.copy_(means)
        prior = torch.from_numpy(sizes / sizes.sum()).log()
        head.bias.copy_(prior - means.square().sum(1) / 2)

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for part in labels.split(ROWS):
            noise = torch.randn(len(part), options.features, generator=generator)
            yield means[part] + noise, part

    features = extract_features(model, batches(), memmap_dir=folder / "features")
    return model, features, ClassCounts(sizes)


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Bytes of the process beside mapped files, looked at twenty times a second."""
    process, seen, ends = psutil.Process(), [0], threading.Event()

    def watch() -> None:
        while not ends.wait(0.05):
            memory = process.memory_info()
            seen.append(memory.rss - getattr(memory, "shared", 0))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        ends.set()
        thread.join()


def keep(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a file of them; that of the same measurement is replaced."""
    known = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    same = ("method", "samples", "features", "classes", "of them used", "threads")
    rows = [each for each in known if any(each[name] != row[name] for name in same)]
    kept = {"device": device_name("cpu"), "versions": run_versions(), "rows": [*rows, row]}
    path.write_text(to_json(kept, name="timings"), encoding="utf-8")


if __name__ == "__main__":
    main(chosen)
