"""Options that both recipes share, and how a command line or a preset becomes them."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser

from ldam_plugins import ClassCounts, DeferredSchedule, create_loss, list_losses
from ldam_plugins._checks import check_choice, must_be
from ldam_plugins.long_tail import PROFILES
from ldam_plugins.losses import ClassificationLoss, loss_options
from ldam_plugins.runtime import PRECISIONS
from ldam_plugins.schedules import KINDS, UNITS

PRESETS = Path(__file__).parent / "presets"
LOSS_OPTIONS = ("max_margin", "scale", "gamma", "tau")

Options = TypeVar("Options", bound="CoreOptions")


def option(default: Any, description: str, **argparse: Any) -> Any:
    """A field of an options dataclass with its help text."""
    metadata = {"help": description, **argparse}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class CoreOptions:
    """What is trained on which long tail with which loss and schedule."""

    dataset: str = option("", "hub id, local folder, or embedded set")
    model: str = option("", "name of the model")
    profile: str = option("exp", "long-tail profile", choices=PROFILES)
    ratio: float = option(100.0, "imbalance ratio n_max / n_min of the kept training samples")
    subset_seed: int = option(0, "seed of the choice of the kept training samples")
    loss: str = option("ldam", f"one of {', '.join(list_losses())}")
    max_margin: float | None = option(None, "margin of the rarest class, in cosines [0.5]")
    scale: float | None = option(None, "scale of the cosine head and the margin [30]")
    gamma: float | None = option(None, "exponent of focal [2] and vector_scaling [0.15]")
    tau: float | None = option(None, "strength of logit_adjusted and vector_scaling [1]")
    schedule: str = option("drw", "what is re-weighted or re-sampled when", choices=KINDS)
    start: str = option("0.8", "start of drw/drs: 0.8 is a share of training, 160 an epoch")
    start_unit: str = option("auto", "unit of --start", choices=UNITS)
    beta: float = option(0.9999, "of the class-balanced weights; towards 1: inverse frequency")
    epochs: int = option(0, "epochs of training")
    batch_size: int = option(0, "samples a process and micro-batch")
    accumulation: int = option(1, "micro-batches an update")
    lr: float = option(0.0, "learning rate")
    seed: int = option(0, "seed of the training")
    mixed_precision: str = option(
        "auto", "auto: bf16 where the hardware has it", choices=PRECISIONS
    )
    output_dir: str = option("", "folder of the run")
    resume: bool = option(False, "go on with the run in --output_dir")
    report_to: str = option(
        "none", "experiment tracker", choices=("none", "tensorboard", "wandb", "trackio")
    )
    num_processes: int | None = option(None, "stop unless this many processes run")

    def make_schedule(self) -> DeferredSchedule:
        """The schedule the options describe."""
        if not re.fullmatch(r"\d+|\d*\.\d+|\d+\.\d*", self.start):
            wanted = "a share such as 0.8 or an epoch such as 160"
            raise ValueError(must_be("start", wanted, self.start))
        start = int(self.start) if self.start.isdigit() else float(self.start)
        return DeferredSchedule(self.schedule, start=start, unit=self.start_unit, beta=self.beta)

    def make_loss(self, class_counts: ClassCounts) -> ClassificationLoss:
        """The loss the options describe; an option it does not have is an error."""
        given = {name: getattr(self, name) for name in LOSS_OPTIONS}
        return create_loss(
            self.loss, class_counts, **{k: v for k, v in given.items() if v is not None}
        )


def parse_options(
    kind: type[Options], arguments: list[str] | None = None, *, default: str
) -> Options:
    """Options from flags, or from one preset followed by flags that override it.

    The preset is the name of a file in ``recipes/presets`` or the path of a YAML or JSON file. Its
    entries go the way of the flags, so they meet the same checks. ``default`` is the preset where
    neither a preset nor ``--dataset`` is given.

    Raises:
        ValueError: unknown preset, unknown option in it, or unknown flag.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    preset: dict[str, Any] = {}
    if arguments and not arguments[0].startswith("-"):
        preset = read_file(kind, arguments.pop(0))
    elif not any(argument.split("=")[0] == "--dataset" for argument in arguments):
        preset = read_file(kind, default)
    arguments = [*as_flags(preset), *arguments]
    (options,) = HfArgumentParser(kind, allow_abbrev=False).parse_args_into_dataclasses(arguments)
    for name in set(LOSS_OPTIONS) & set(preset) - set(loss_options(options.loss)):
        # A preset's setting of its own loss says nothing to another loss chosen over it.
        if getattr(options, name) == preset[name]:
            setattr(options, name, None)
    return options


def read_file(kind: type[Any], name: str, folder: Path = PRESETS) -> dict[str, Any]:
    """Entries of a YAML or JSON file that each set an option of the dataclass ``kind``.

    Args:
        kind: What the entries are options of.
        name: Path of the file, or the bare name of one in ``folder``.
        folder: ``presets`` or ``grids``.

    Raises:
        ValueError: no such file, or one that holds something else.
    """
    path, what = Path(name), folder.name.removesuffix("s")
    if path.suffix not in (".yaml", ".yml", ".json"):
        known = sorted(file.stem for file in folder.glob("*.yaml"))
        path = folder / f"{check_choice(what, name, known)}.yaml"
    if not path.is_file():
        raise ValueError(must_be(what, "a file that exists", name))
    entries = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    if not isinstance(entries, dict):
        raise ValueError(must_be(what, "a file of `option: value` lines", name))
    for key in entries:
        check_choice(f"option in {path.name}", key, [field.name for field in fields(kind)])
    return entries


def as_flags(entries: dict[str, Any]) -> list[str]:
    """The command line that says the same as ``entries``; a mapping becomes ``name=a,b`` words."""
    flags = []
    for key, value in entries.items():
        if isinstance(value, dict):
            flags += [f"--{key}", *(f"{name}={_comma_list(v)}" for name, v in value.items())]
        elif value is not None:
            flags += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    return flags


def _comma_list(value: Any) -> str:
    return ",".join(map(str, value if isinstance(value, list) else [value]))
