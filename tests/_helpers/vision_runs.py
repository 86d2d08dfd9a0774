"""Vision runs inside the process of a test, on small sets."""

from __future__ import annotations

from contextlib import nullcontext
from unittest.mock import patch

import numpy as np
import options as recipe_options
import vision_lt
from accelerate.state import AcceleratorState
from PIL import Image

from ldam_plugins.reports import run_report


def parsed(*flags):
    """Options as the recipe's command line makes them."""
    return recipe_options.parse_options(
        vision_lt.VisionOptions, list(map(str, flags)), default="digits_lt"
    )


def vision_run(out, *flags, report=False):
    """Run the vision recipe; returns its metrics. Its report takes longer than a small run."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with nullcontext() if report else patch.object(run_report, "write_report"):
        return vision_lt.main(parsed(*flags, "--output_dir", out))


def picture_folder(root, train=(9, 6, 4), test=5, size=(40, 56), names=("1", "10", "2")):
    """Class folders of noise whose colour tells the class; returns the root as text."""
    draw = np.random.default_rng(0)
    for split, counts in (("train", train), ("test", (test,) * len(train))):
        for label, (name, count) in enumerate(zip(names, counts, strict=True)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 120, (*size, 3), dtype=np.uint8)
                pixels[..., label % 3] += 60
                Image.fromarray(pixels).save(root / split / name / f"{i:02}.png")
    return str(root)
