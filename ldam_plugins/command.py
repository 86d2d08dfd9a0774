"""``ldam``: the recipes as one installed command.

    ldam vision cifar10_lt --dataset path/to/cifar10
    ldam text --dataset tickets.csv --test_split 0.2
    ldam compare runs/erm runs/ldam_drw

On several processes: ``accelerate launch -m ldam_plugins.recipes.vision_lt ...``.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

RECIPES = {
    "vision": ("vision_lt", "train a timm model on images"),
    "text": ("text_lt", "train a classifier of texts"),
    "inspect": ("inspect_data", "look at a data set, and be told what to run"),
    "frozen": ("frozen_features", "compare methods on features of a pretrained network"),
    "evaluate": ("evaluate_model", "measure a trained model on a data set"),
    "predict": ("predict", "classify images or texts with a trained model"),
    "thresholds": ("thresholds", "choose from where on a trained model answers, or abstains"),
    "export": ("export", "write a trained model as ONNX"),
    "rebalance": ("rebalance", "make a trained model fair to rare classes, without training"),
    "posthoc": ("posthoc", "what every way to rebalance brings to trained runs, side by side"),
    "compare": ("compare", "two or more models on the same test samples"),
    "benchmark": ("benchmark", "many runs side by side"),
    "probe": ("linear_probe", "how good the features are, epoch by epoch"),
}
"""The recipe of each command, and what it is for."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe that the first word names, with the other words."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(help_text())
        return
    if words[0] not in RECIPES:
        near = get_close_matches(words[0], RECIPES, n=1)
        hint = f"Did you mean {near[0]}?" if near else "`ldam --help` lists them."
        print(f"ldam: error: there is no command {words[0]!r}. {hint}", file=sys.stderr)
        raise SystemExit(2)
    script = recipes_folder() / f"{RECIPES[words[0]][0]}.py"
    sys.argv = [str(script), *words[1:]]
    sys.path.insert(0, str(script.parent))  # as python does for a script
    runpy.run_path(str(script), run_name="__main__")


def recipes_folder() -> Path:
    """Where the recipes are: inside the package once it is installed, beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "recipes"
    return inside if inside.is_dir() else package.parent / "recipes"


def help_text() -> str:
    """The commands with what they are for."""
    width = max(map(len, RECIPES))
    lines = [f"  {name:<{width}}  {about}" for name, (_, about) in RECIPES.items()]
    return "\n".join(["usage: ldam COMMAND [options]", "", *lines, "", "ldam COMMAND --help"])
