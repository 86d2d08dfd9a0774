"""Options of the recipes that look at data, compare methods or measure, and their command line.

Without torch, so that ``--help`` and a misspelt flag are answered before it is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from options import (
    GROUPS,
    CoreOptions,
    TextOptions,
    VisionOptions,
    as_flags,
    described,
    parse_options,
    parse_with_first_word,
    read_file,
)

from ldam_plugins.choices import (
    DEFAULT_MAX_MARGIN,
    DEFAULT_SCALE,
    LOSSES,
    NEAR_DISTANCE,
    NEAR_SIMILARITY,
    SEARCHED,
)
from ldam_plugins.training.command_line import flag_names, parse_flags, parse_known_flags
from ldam_plugins.training.options import COUNT, SEED, Limits, check_limits, invalid, option

GRIDS = Path(__file__).parent / "grids"
RECIPES = {
    "vision": ("vision_lt", "VisionOptions", "digits_lt"),
    "text": ("text_lt", "TextOptions", "stdlib_lt"),
}
"""Module, options and the preset where neither one nor a data set is given."""
REGIMES = ("pretrained", "scratch", "frozen")
SHARED = (
    *("label_column", "train_split", "test_split", "split_file", "group_column"),
    *("encoding", "delimiter", "skip_empty", "subset_seed"),
)
LOADING = {
    "images": ("image_column", "train_list", "test_list", *SHARED),
    "texts": ("text_column", *SHARED),
}
"""The options that go to ``load_images`` and ``load_texts``, and into the command to paste."""
FROZEN_HEADS = ("linear", "cosine")
FROZEN_SCHEDULES = ("none", "rw", "drw")
FROZEN_LOSSES = ("ce", "logit_adjusted", "ldam", "focal", "vector_scaling")
DATA_OPTIONS = {*GROUPS["data"], "model", "image_size", "crop_pct", "crop_mode", "max_length"}
DATA_OPTIONS |= {"batch_size", "workers"}
DATA_OPTIONS -= {"val_split"}  # nothing is held out: there is nothing to choose
DATA_OPTIONS -= {"streaming", "class_counts", "shuffle_buffer"}  # features are in memory anyway
"""Options of the recipes that choose the data or the network."""
FROZEN: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "vision": (
        VisionOptions,
        {
            "model": "efficientnet_lite0_imagenet",
            "pretrained": True,
            "image_size": 128,
            "crop_mode": "squash",
            "crop_pct": 1.0,
            "augment": "crop_flip",
            "batch_size": 64,
            "workers": 0,
        },
    ),
    "text": (TextOptions, {"model": "minilm", "batch_size": 64}),
}
"""Options of the network whose features are taken, and what they are unless told."""
QUICK = ["loss", "head", "counts", "sampler", "metrics", "import", "scaling", "augmentation"]
"""Sections of ``speed.py`` that take minutes."""


@dataclass
class BenchmarkOptions:
    """What is compared, and where it runs."""

    recipe: str = option("vision", "recipe of all cells", choices=tuple(RECIPES))
    preset: str = option(
        "", "preset of the recipe that all cells begin with [the recipe's, if no dataset is set]"
    )
    methods: list[str] = option([], "method, loss/schedule, or either with :option=value")
    losses: list[str] = option([], "losses, each with each of --schedules, beside --methods")
    schedules: list[str] = option([], "schedules, each with each of --losses")
    profiles: list[str] = option([], "long-tail profiles [the preset's, else none]")
    ratios: list[float] = option([], "imbalance ratios [the preset's]")
    seeds: list[int] = option([0], "seeds of the training")
    tune: int = option(
        0,
        "trials that each method's own settings are chosen from, on held-out training samples",
    )
    tune_options: list[str] = option(
        [],
        f"what is tuned: lr, lr=1e-4:1e-2 or scale=10,20,30 [{', '.join(SEARCHED)}: around the "
        "values as given, where the method takes them]",
    )
    tune_split: float = option(0.2, "share of each class's training samples that scores the trials")
    tune_seed: int = option(0, "seed of the search and of the training of its trials")
    set: list[str] = option([], "option=value for all cells", action="extend")
    vary: list[str] = option([], "option=a,b,c: cells for each value", action="extend")
    output_dir: str = option("runs/benchmark", "folder of the grid")
    baseline: str = option("erm", "what others are compared with: erm, */none, ldam_drw:start=80")
    jobs: int = option(1, "cells at once")
    launcher: str = option("local", "where cells run", choices=("local", "slurm"))
    slurm: list[str] = option([], "of submitit: timeout_min=60 partition=gpu ...", action="extend")
    dry_run: bool = option(False, "print the command of each cell and stop")
    report_only: bool = option(False, "run nothing; report on the cells that are finished")
    traceback: bool = option(False, "show where in the code an error arose")


@dataclass
class InspectOptions:
    """What is looked at, and how."""

    LIMITS: ClassVar[dict[str, Limits]] = {
        "near_distance": {"low": 0, "high": 16},
        "near_similarity": {"low": 0.5, "high": 1},
        "max_length": COUNT,
        "subset_seed": SEED,
    }

    dataset: str = option(
        "",
        "folder, table, hub id, digits or stdlib_docstrings; may come first without a flag",
    )
    kind: str = option("auto", "what it holds", choices=("auto", "images", "texts"))
    image_column: str | None = option(
        None, "column of the images, or of their names [by its content]"
    )
    text_column: str | None = option(None, "column of the texts [by name or content]")
    label_column: str | None = option(None, "column of the labels [by name or content]")
    train_split: str = option("train", "split to train on")
    test_split: str | None = option(
        None,
        "split or folder to test on, or the share of each class that is held out to test on, as "
        "the recipes would [test, else validation]",
    )
    split_file: str | None = option(None, "split.csv of an earlier run, whose parts are looked at")
    group_column: str | None = option(
        None, "column of a table that tells what belongs together (patient, camera, author)"
    )
    encoding: str | None = option(None, "encoding of text files, such as cp1252 [utf-8]")
    delimiter: str | None = option(
        None, "what separates the fields of a CSV file [what gives even rows]"
    )
    subset_seed: int = option(0, "seed of the choice of samples by --test_split")
    train_list: str | None = option(None, "list, table or JSON file of the training images")
    test_list: str | None = option(None, "list, table or JSON file of the test images")
    skip_empty: bool = option(False, "leave out rows without a text, file or label, and count them")
    near_distance: int = option(
        NEAR_DISTANCE, "bits of 64 in which the hashes of nearly equal images differ at most"
    )
    near_similarity: float = option(
        NEAR_SIMILARITY, "share of their runs of 5 signs that nearly equal texts have in common"
    )
    regime: str = option("pretrained", "how you will train, for the advice", choices=REGIMES)
    model: str | None = option(
        None, "model to train, for the advice and for the tokenizer of texts [the advised one]"
    )
    max_length: int | None = option(
        None, "tokens a text is cut to [256; advised: the 95th percentile of the lengths]"
    )
    output_dir: str = option("runs/inspect", "folder of the page and the lists")
    traceback: bool = option(False, "show where in the code an error arose")

    def __post_init__(self) -> None:
        check_limits(self, self.LIMITS)
        if not self.dataset.strip():
            raise invalid("dataset", "a data set to look at", self.dataset, hint="Give it first.")

    def loading(self, kind: str) -> dict[str, Any]:
        """The options that were given of those that say what is loaded."""
        defaults = {each.name: each.default for each in fields(self)}
        given = {name: getattr(self, name) for name in LOADING[kind]}
        return {name: value for name, value in given.items() if value != defaults[name]}


@dataclass
class FrozenOptions:
    """What is compared. Further flags are those of the recipe that choose data and network."""

    recipe: str = option("vision", "recipe whose data it is", choices=("vision", "text"))
    losses: list[str] = option(list(FROZEN_LOSSES), f"of {', '.join(LOSSES)}")
    heads: list[str] = option(list(FROZEN_HEADS), "of linear, cosine")
    schedules: list[str] = option(list(FROZEN_SCHEDULES), "of none, rw, drw")
    max_margins: list[float] = option([0.1, 0.3, DEFAULT_MAX_MARGIN], "margins of the rarest class")
    scale: float = option(DEFAULT_SCALE, "scale of the cosine head")
    weight_decay: float = option(0.01, "of the linear head, on standardised features")
    beta: float = option(0.9999, "beta of the class-balanced weights")
    posthoc_tau: float = option(1.0, "strength of the adjustment afterwards")
    methods: list[str] = option(
        [], "what is done to the linear head of cross-entropy: all, METHOD or METHOD:STRENGTH"
    )
    by: str = option("log_loss", "what a strength is chosen by, a mean over classes")
    folds: int = option(5, "folds of that choice")
    seed: int = option(0, "seed of the first directions of a cosine head")
    features: str | None = option(
        None, "output_dir of an earlier run on the same data, whose features are used again"
    )
    output_dir: str = option("runs/frozen_features", "folder of the results")
    traceback: bool = option(False, "show where in the code an error arose")


@dataclass
class ProbeOptions:
    """What is probed."""

    runs: list[str] = option([], "folders of finished runs")
    recipe: str = option("vision", "recipe that made them", choices=("vision", "text"))
    epochs: list[int] = option([], "epochs of training to probe after [around the switch, last]")
    fit_on: str = option("all", "training samples of the probe", choices=("all", "long_tail"))
    output: str = option("runs/probe.csv", "CSV with a row a run and epoch")
    traceback: bool = option(False, "show where in the code an error arose")


@dataclass
class SpeedOptions:
    """What is timed, and how large it gets."""

    only: list[str] = option(
        QUICK,
        "sections to run: the default ones, or start, processes, vision, fine_tuning, quality, "
        "growth, peak, text, memory, auto",
    )
    repeats: int = option(7, "turns of each contender")
    seconds: float = option(0.1, "least seconds of a turn of the small things")
    max_classes: int = option(1_000_000, "classes the loss and the head grow to")
    max_logits: int = option(32_000_000, "entries of the largest (N, C) logits")
    max_rows: int = option(10_000_000, "rows that counts and sampler grow to")
    max_image: int = option(224, "pixels a side that images grow to")
    steps: int = option(30, "steps of a turn of the trainings that are not whole")
    epochs: int = option(100, "epochs of processes")
    dataset: str = option("uoft-cs/cifar10", "images of vision, cut to the long tail of the paper")
    compile: bool = option(True, "compile ours in vision, as --compile of vision_lt.py")
    photos: str = option("digits", "images of fine_tuning")
    photo_model: str = option("efficientnet_lite0_imagenet", "pretrained model of fine_tuning")
    photo_size: int = option(128, "pixels a side of fine_tuning")
    memory_of: list[str] = option(
        ["vision", "fine_tuning", "text"], "sections as large as which memory trains"
    )
    text_dataset: str = option("stanfordnlp/imdb", "texts of text")
    text_model: str = option("minilm", "model of text")
    max_length: int = option(256, "tokens a text is cut or padded to")
    batch_size: int = option(128, "images a step")
    text_batch_size: int = option(32, "texts a step")
    threads: int = option(0, "threads of torch; 0: as torch decides")
    json: str | None = option(None, "file for the rows, with versions and device")


@dataclass
class SpeedPosthocOptions:
    """What is measured."""

    samples: int = option(1_000_000, "samples")
    features: int = option(512, "length of a feature")
    classes: int = option(1000, "classes")
    methods: list[str] = option(
        ["logit_adjustment:1", "tau_norm:1", "class_means:0.3", "lws:0.0001"],
        "METHOD, METHOD:STRENGTH or auto",
    )
    max_samples: int | None = option(None, "as of rebalance_head [all]")
    folder: str | None = option(
        None, "folder for the files, which are removed [that of the system]"
    )
    output: str | None = option(None, "file for the rows, which are added to those in it")

    def __post_init__(self) -> None:
        check_limits(self, dict.fromkeys(("samples", "features", "classes"), COUNT))
        from ldam_plugins.posthoc import parse_method

        for method in self.methods:
            parse_method(method)


@dataclass
class TablesOptions:
    """What is done with the records that are kept."""

    add: list[str] = option(
        [], "NAME FILE: put the records of a file into an experiment", nargs=2, metavar="WORD"
    )
    write: bool = option(False, "write into the documents")


@dataclass
class SetsOptions:
    """Where the small sets are cut from, and written to."""

    data: str = option("", "folder of the sources")
    output_dir: str = option("runs/small_sets", "folder of the sets")

    def __post_init__(self) -> None:
        if not self.data:
            raise invalid("data", "the folder of the sources", self.data)


def parse_benchmark(arguments: list[str] | None = None) -> BenchmarkOptions:
    """Options from flags, or from a grid file followed by flags.

    Without a grid and a preset the methods are those of ``digits_quick``; its preset is of digits
    and says nothing to data that ``--set dataset=`` names, or to texts.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    about = described(BenchmarkOptions)
    entries: dict[str, Any] = {}
    if arguments and not arguments[0].startswith("-"):
        entries = read_file(BenchmarkOptions, arguments.pop(0), GRIDS)
    elif not any(argument.split("=")[0] == "--preset" for argument in arguments):
        entries = read_file(BenchmarkOptions, "digits_quick", GRIDS)
        given = parse_flags(BenchmarkOptions, arguments, **about)
        own_data = any(entry.startswith("dataset=") for entry in [*given.set, *given.vary])
        if own_data or given.recipe != "vision":
            entries = {"methods": entries["methods"]}
    return parse_flags(BenchmarkOptions, [*as_flags(entries), *arguments], **about)


def parse_inspect(arguments: Sequence[str] | None = None) -> InspectOptions:
    """Options from the command line, whose first word may be the data set."""
    return parse_with_first_word(InspectOptions, "--dataset", arguments)


def parse_frozen(arguments: list[str] | None = None) -> tuple[FrozenOptions, CoreOptions]:
    """The options of the comparison, and those of the recipe that choose data and network."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    preset = [arguments.pop(0)] if arguments and not arguments[0].startswith("-") else []
    options, rest = parse_known_flags(FrozenOptions, arguments, **described(FrozenOptions))
    if rest and not rest[0].startswith("-"):  # after `--recipe text`
        preset = [rest.pop(0)]
    for flag in rest:
        if flag_names([flag]) - DATA_OPTIONS:
            hint = "The network is not trained here, so options of its training have no effect."
            raise invalid("arguments", "options of the data or the network", flag, hint=hint)
    kind, defaults = FROZEN[options.recipe]
    if not preset and "dataset" not in flag_names(rest):
        raise invalid("dataset", "given, or a preset first", None)
    own = ["--output_dir", options.output_dir, "--loss", "ce", "--schedule", "none"]
    chosen = parse_options(kind, [*preset, *own, *rest], default="")
    if getattr(chosen, "is_of_transformers", False):  # its image processor says how it is cropped
        defaults = {k: v for k, v in defaults.items() if k not in ("crop_mode", "crop_pct")}
    data = parse_options(kind, [*preset, *as_flags(defaults), *own, *rest], default="")
    return options, data
