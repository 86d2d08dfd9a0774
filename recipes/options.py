"""Options that both recipes share, and their command line with presets."""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
from transformers import HfArgumentParser

from ldam_plugins import ClassCounts, DeferredSchedule, create_loss, list_losses
from ldam_plugins.counts import DEFAULT_MAX_MARGIN, FEW_BELOW, MANY_ABOVE
from ldam_plugins.data import SingleSampleWarning, stratified_split
from ldam_plugins.data.long_tail import CLASS_ORDERS, PROFILES
from ldam_plugins.heads.choice import HEADS, LINEAR_SCALE, options_for_head
from ldam_plugins.losses import loss_options, losses_with
from ldam_plugins.losses.base import DEFAULT_SCALE, ClassificationLoss
from ldam_plugins.reports.class_table import kept_table
from ldam_plugins.schedules import KINDS, UNITS
from ldam_plugins.training.environment import PRECISIONS
from ldam_plugins.training.options import (
    COUNT,
    COUNT_OR_0,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE_BELOW_1,
    Limits,
    as_flags,
    check_choice,
    check_limits,
    invalid,
    option,
    read_preset,
)

PRESETS = Path(__file__).parent / "presets"
LOSS_OPTIONS = {name for loss in list_losses() for name in loss_options(loss)}
"""Options that a loss takes; those of a recipe that it does not take must be left out."""
RESUME: dict[str, bool | str] = {"no": False, "yes": True, "auto": "auto"}
"""``--resume`` as the argument of :func:`~ldam_plugins.training.claim_output_dir`."""

logger = logging.getLogger(__name__)
Options = TypeVar("Options", bound="CoreOptions")


def of_losses(name: str) -> str:
    """The losses that take an option, with its defaults, for a help text."""
    return " and ".join(f"{loss} [{default:g}]" for loss, default in losses_with(name).items())


@dataclass
class CoreOptions:
    """What is trained on which long tail with which loss and schedule.

    Raises:
        TypeError: an option that must be an integer is not one.
        ValueError: an option outside its ``LIMITS``, no folder, or no such schedule.
    """

    LIMITS: ClassVar[dict[str, Limits]] = {
        "ratio": {"low": 1},
        "subset_seed": SEED,
        "val_split": {"low": 0, "high": 1, "low_open": True, "high_open": True},
        "max_margin": NOT_NEGATIVE,
        "scale": POSITIVE,
        "gamma": NOT_NEGATIVE,
        "tau": NOT_NEGATIVE,
        "beta": SHARE_BELOW_1,
        "epochs": COUNT,
        "batch_size": COUNT,
        "accumulation": COUNT,
        "lr": POSITIVE,
        "many": COUNT_OR_0,
        "few": COUNT_OR_0,
        "seed": SEED,
        "keep_checkpoints": COUNT,
        "num_processes": COUNT,
    }

    dataset: str = option("", "hub id, local folder, or embedded set")
    model: str = option("", "name of the model")
    profile: str = option(
        "none", "cut the training samples to a long tail; none keeps them all", choices=PROFILES
    )
    ratio: float = option(100.0, "imbalance ratio n_max / n_min that exp and step cut to")
    subset_seed: int = option(
        0, "seed of the choice of the training samples, by the cut and by --val_split"
    )
    class_order: str = option(
        "size", "head of the long tail: the largest class, or class 0", choices=CLASS_ORDERS
    )
    val_split: float | None = option(
        None,
        "share of each class's training samples, after the cut, that is held out and evaluated "
        "during training instead of the test set; counts, margins and weights are those of the "
        "others [none]",
    )
    loss: str = option("ldam", f"one of {', '.join(list_losses())}")
    head: str = option(
        "auto",
        "auto: cosine for losses with a margin, else linear. A margin on a linear head is taken "
        "off the logits as they are",
        choices=HEADS,
    )
    max_margin: float | None = option(
        None, f"margin of the rarest class, in cosines [{DEFAULT_MAX_MARGIN:g}]"
    )
    scale: float | None = option(
        None,
        f"scale of the cosine head and the margin [{DEFAULT_SCALE:g}; margin on a linear head: "
        f"{LINEAR_SCALE:g}]",
    )
    gamma: float | None = option(None, f"exponent of {of_losses('gamma')}")
    tau: float | None = option(None, f"strength of {of_losses('tau')}")
    schedule: str = option("drw", "when classes are re-weighted or re-sampled", choices=KINDS)
    start: str = option("0.8", "start of drw/drs: 0.8 is a share of training, 160 an epoch")
    start_unit: str = option("auto", "unit of --start", choices=UNITS)
    beta: float = option(0.9999, "beta of the class-balanced weights; towards 1: inverse frequency")
    epochs: int = option(0, "epochs of training")
    batch_size: int = option(0, "samples a process and micro-batch")
    accumulation: int = option(1, "micro-batches an optimizer step")
    lr: float = option(0.0, "learning rate")
    many: int = option(MANY_ABOVE, "classes with more training samples are the many of the results")
    few: int = option(FEW_BELOW, "classes with fewer training samples are the few of the results")
    seed: int = option(0, "seed of the training")
    mixed_precision: str = option(
        "auto", "auto: bf16 where the hardware has it", choices=PRECISIONS
    )
    output_dir: str = option("", "folder of the run")
    keep_checkpoints: int = option(1, "newest checkpoints that are kept")
    resume: str = option(
        "no",
        "continue the run in --output_dir from its newest checkpoint; auto: start it if there is "
        "none",
        nargs="?",
        const="yes",
        choices=RESUME,
    )
    report_to: str = option(
        "none", "experiment tracker", choices=("none", "tensorboard", "wandb", "trackio")
    )
    num_processes: int | None = option(None, "stop unless this many processes run")

    def __post_init__(self) -> None:
        check_limits(self, self.LIMITS)
        if not self.output_dir.strip():
            expected = "the folder of the run"
            raise invalid("output_dir", expected, self.output_dir, hint="Give --output_dir.")
        self.make_schedule()
        if self.few > self.many + 1:
            hint = "A class is not both many and few."
            raise invalid("few", f"<= many + 1 = {self.many + 1}", self.few, hint=hint)

    @property
    def error_column(self) -> str:
        """The column of ``history.csv`` for the error on what is evaluated during training."""
        return "test_error" if self.val_split is None else "val_error"

    def make_schedule(self) -> DeferredSchedule:
        """The schedule the options describe."""
        if not re.fullmatch(r"\d{1,18}|(\d+\.\d*|\.\d+|\d+(?=e))(e-?\d+)?", self.start, re.ASCII):
            expected = "a share such as 0.8 or an epoch such as 160"
            raise invalid("start", expected, self.start)
        start = int(self.start) if self.start.isdigit() else float(self.start)
        return DeferredSchedule(self.schedule, start=start, unit=self.start_unit, beta=self.beta)

    def make_loss(self, class_counts: ClassCounts) -> ClassificationLoss:
        """The loss the options describe; an option it does not have is an error."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name in LOSS_OPTIONS}
        given = {name: value for name, value in given.items() if value is not None}
        return create_loss(self.loss, class_counts, **options_for_head(self.loss, given, self.head))


def parse_options(
    kind: type[Options], arguments: list[str] | None = None, *, default: str
) -> Options:
    """Options from flags, or from one preset followed by flags that override it.

    The preset is the name of a file in ``recipes/presets`` or the path of a YAML or JSON file. Its
    entries are turned into flags, so they are checked like flags. ``default`` is the preset if
    neither a preset nor ``--dataset`` is given.

    Raises:
        ValueError: unknown preset, unknown option in it, unknown flag, or a ``--ratio`` to which
            no profile is given.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    preset: dict[str, Any] = {}
    if arguments and not arguments[0].startswith("-"):
        preset = read_file(kind, arguments.pop(0))
    elif not any(argument.split("=")[0] == "--dataset" for argument in arguments):
        preset = read_file(kind, default)
    flags, arguments = arguments, [*as_flags(preset), *arguments]
    (options,) = HfArgumentParser(kind, allow_abbrev=False).parse_args_into_dataclasses(arguments)
    for name in LOSS_OPTIONS & set(preset) - _options_in_use(options, preset, flags):
        # A preset's option of its own loss is dropped if a flag chooses a loss without that option.
        if getattr(options, name) == preset[name]:
            setattr(options, name, None)
    _check_ratio(options, preset, flags)
    return options


def _options_in_use(options: CoreOptions, preset: Mapping[str, Any], flags: list[str]) -> set[str]:
    """The options of a preset's loss that are kept for the loss and head of the flags.

    A scale is that of the cosine head, under any loss. It is not kept for a margin on a linear
    head, unless the preset chose that head or the scale is a flag as well.
    """
    names = set(loss_options(options.loss))
    flagged = any(flag.split("=")[0] == "--scale" for flag in flags)
    if options.head == "cosine":
        names.add("scale")
    elif options.head == "linear" and preset.get("head") != "linear" and not flagged:
        names.discard("scale")
    return names


def _check_ratio(options: CoreOptions, preset: Mapping[str, Any], flags: list[str]) -> None:
    """Refuse a ratio without a profile, or warn of it if the profile was set to none by a flag."""
    flagged = {flag.split("=")[0] for flag in flags}
    own = "ratio" in preset and preset.get("profile", "none") == "none"
    if options.profile != "none" or options.ratio == 1 or not (own or "--ratio" in flagged):
        return
    if "--profile" not in flagged and "profile" not in preset:
        hint = "Add --profile exp or --profile step to cut the training samples, or leave it out"
        hint += " to train on all of them."
        raise invalid("ratio", "left out without a profile", options.ratio, hint=hint)
    if int(os.environ.get("RANK", 0)) == 0:
        logger.warning(f"--ratio {options.ratio:g} has no effect: --profile is none.")


def print_kept(options: CoreOptions, before: ClassCounts, after: ClassCounts) -> None:
    """Print how many samples of each class are kept and left out, if a cut was asked for."""
    under = ""
    if options.profile != "none":
        under = f" under --profile {options.profile} --ratio {options.ratio:g}"
    if under or after.total < before.total:
        print(f"Training samples{under}:\n{kept_table(before, after)}\n")


def split_samples(
    labels: Any, counts: ClassCounts, share: float, *, seed: int, show: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the samples to train on, and of those that --val_split holds out.

    With ``show`` it prints how many are held out, and of which classes none can be.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SingleSampleWarning)  # printed by name instead
        kept, held_out = stratified_split(labels, share, seed=seed)
    if show:
        sizes = f"{len(held_out)} of {counts.total} training samples are held out for validation"
        print(f"{sizes} (--val_split {share:g}).")
        if single := class_names(counts, counts.counts == 1):
            some = ", ".join([*single[:3], *(["..."] if len(single) > 3 else [])])
            print(f"Classes of which the only sample is trained on: {len(single)} ({some}).")
    return kept, held_out


def held_out_record(labels: Any, counts: ClassCounts) -> dict[str, Any]:
    """What ``metrics.json`` says of the held-out samples.

    Args:
        labels: Their classes.
        counts: Samples per class that are left to train on.
    """
    held_out = np.bincount(labels, minlength=len(counts))
    return {
        "samples": len(labels),
        "class_counts": held_out,
        "classes_without": class_names(counts, held_out == 0),
    }


def class_names(counts: ClassCounts, chosen: np.ndarray) -> list[str]:
    """The names of the classes where ``chosen`` (C,) is true."""
    names = counts.class_names or [str(index) for index in range(len(counts))]
    return [names[index] for index in np.flatnonzero(chosen)]


def read_file(kind: type[Any], name: str, folder: Path = PRESETS) -> dict[str, Any]:
    """Entries of a YAML or JSON file, each an option of the dataclass ``kind``.

    Args:
        kind: Dataclass of the options.
        name: Path of the file, or the bare name of one in ``folder``.
        folder: ``presets`` or ``grids``.

    Raises:
        ValueError: no such file, or one that holds something else.
    """
    path, what = Path(name), folder.name.removesuffix("s")
    if path.suffix not in (".yaml", ".yml", ".json"):
        known = sorted(file.stem for file in folder.glob("*.yaml"))
        path = folder / f"{check_choice(what, name, known)}.yaml"
    entries = read_preset(path, what, mappings=folder != PRESETS)
    for key in entries:
        check_choice(f"option in {path.name}", key, [field.name for field in fields(kind)])
    return entries
