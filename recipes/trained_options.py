"""Options of the recipes that use a trained model, and their command line.

Without torch, so that ``--help`` and a misspelt flag are answered before it is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from options import described, parse_with_first_word

from ldam_plugins.choices import CRITERIA, POSTHOC_METHODS, PRECISIONS, THRESHOLDS_FILE
from ldam_plugins.training.command_line import (
    log_bars_rarely,
    or_refused,
    parse_known_flags,
    say_errors_briefly,
)
from ldam_plugins.training.cores import watch_cores
from ldam_plugins.training.options import (
    COUNT,
    COUNT_OR_0,
    SEED,
    Limits,
    check_limits,
    invalid,
    option,
)
from ldam_plugins.training.part_files import TABLE_FORMATS, file_stamps
from ldam_plugins.training.run_dir import OPTIONS_FILE

_Options = TypeVar("_Options", bound="TrainedOptions")
ESTIMATE = "estimate"
MODEL_FILES = (".safetensors", ".bin", ".json", ".pth", ".tar")
AIMS = "f1, precision=0.9, recall=0.8 or cost=1:20 (a false positive : a false negative)"
APPLIED = (
    *("none", "logit_adjustment:1", "logit_adjustment", "tau_norm:1", "tau_norm"),
    *("lws", "class_means", "cosine_means", "crt", "auto"),
)
"""Post-hoc methods that ``posthoc.py`` applies unless told."""


@dataclass
class TrainedOptions:
    """Which model is used, and how. Further flags are those of the recipes that choose the data."""

    LIMITS: ClassVar[dict[str, Limits]] = {
        "batch_size": COUNT,
        "workers": COUNT_OR_0,
        "max_length": COUNT,
    }
    FOLDER: ClassVar[str] = "used"

    model: str = option("", "the trained model; may come first without a flag")
    batch_size: int = option(64, "samples of a forward pass")
    workers: int = option(0, "loader processes for images")
    max_length: int | None = option(None, "tokens a text is cut to [the tokenizer's own]")
    output_dir: str | None = option(None, "folder of the result [runs/..., by the model's name]")
    overwrite: bool = option(False, "delete the run in --output_dir first")
    quiet: bool = option(False, "print warnings and errors only")
    traceback: bool = option(False, "show where in the code an error arose")

    def __post_init__(self) -> None:
        check_limits(self, self.LIMITS)
        if not self.model.strip():
            raise invalid("model", "the trained model", self.model, hint="Give it first.")
        if self.output_dir is None:
            name = self.model.removeprefix("local-dir:").rstrip("/").rpartition("/")[2]
            self.output_dir = str(Path("runs", self.FOLDER, name.split(":")[-1]))


@dataclass
class MeasuredOptions(TrainedOptions):
    """Those of a recipe that runs a model over many samples."""

    mixed_precision: str = option(
        "no",
        "of the passes: no is float32, auto on a CPU what a few timed seconds of this model say, "
        "where it is to run longer than a minute, else bf16 where the hardware multiplies "
        "matrices in it",
        choices=PRECISIONS,
    )


@dataclass
class SharedOptions(MeasuredOptions):
    """Those of a recipe whose samples several processes share."""

    LIMITS: ClassVar[dict[str, Limits]] = MeasuredOptions.LIMITS | {"num_processes": COUNT}

    num_processes: int | None = option(None, "stop unless this many processes run")


@dataclass
class EvaluateOptions(SharedOptions):
    """Which model is measured. Further flags are those of the recipes that choose the data."""

    FOLDER: ClassVar[str] = "evaluated"

    part: str = option(
        "test", "samples that it is measured on", choices=("test", "validation", "train")
    )
    baseline: str | None = option(
        None, "a run, or a CSV of predictions of the same samples, that it is compared with"
    )


@dataclass
class PredictOptions(SharedOptions):
    """Which model classifies what."""

    LIMITS: ClassVar[dict[str, Limits]] = SharedOptions.LIMITS | {"top": COUNT, "rows": COUNT}

    dataset: str = option("", "folder, file or hub id of what is classified")
    split: str | None = option(None, "split of a hub id or of a folder of parquet [the only one]")
    output: str = option("predictions.csv", "table that is written, .csv or .parquet")
    top: int = option(5, "likeliest classes that are written, fewer if there are not so many")
    image_column: str | None = option(
        None, "column of a table that names the images [by its content]"
    )
    text_column: str | None = option(None, "column of the texts [by name or content]")
    encoding: str | None = option(None, "encoding of text files, such as cp1252 [utf-8]")
    delimiter: str | None = option(
        None, "what separates the fields of a CSV file [what gives even rows]"
    )
    thresholds: str = option(
        "auto",
        f"{THRESHOLDS_FILE} of recipes/thresholds.py: auto (the one beside the model, if there "
        "is one), none, or a file",
    )
    rows: int = option(4096, "rows that are read, classified and written at a time")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.dataset.strip():
            raise invalid("dataset", "what is to be classified", self.dataset)
        if Path(self.output).suffix.lower() not in TABLE_FORMATS:
            raise invalid(
                "output", f"a file that ends in {' or '.join(TABLE_FORMATS)}", self.output
            )
        if Path(self.output).exists() and not self.overwrite:
            hint = "Choose another one, or --overwrite it."
            raise invalid("output", "a file that is not there", self.output, hint=hint)

    def thresholds_file(self) -> Path | None:
        """The thresholds that are used."""
        if self.thresholds == "auto":
            from trained import beside_model

            found = beside_model(self, THRESHOLDS_FILE)
            return found if found is not None and found.exists() else None
        return None if self.thresholds == "none" else Path(self.thresholds)

    def makes(self) -> dict[str, Any]:
        """What the rows depend on."""
        without_effect = {"output", "output_dir", "overwrite", "quiet", "traceback", "workers"}
        without_effect |= {"num_processes"}
        folder = Path(self.model.removeprefix("local-dir:"))
        thresholds = self.thresholds_file()
        return {
            **{k: v for k, v in asdict(self).items() if k not in without_effect},
            "content of thresholds": file_stamps(*([thresholds] if thresholds else [])),
            "content of model": file_stamps(folder, folder / "model", suffixes=MODEL_FILES),
            "content of dataset": [] if Path(self.dataset).is_dir() else file_stamps(self.dataset),
        }


@dataclass
class RebalanceOptions(MeasuredOptions):
    """What is done to which model. Further flags are those of the recipes that choose the data."""

    LIMITS: ClassVar[dict[str, Limits]] = MeasuredOptions.LIMITS | {
        "folds": {"low": 2},
        "seed": SEED,
    }
    FOLDER: ClassVar[str] = "rebalanced"

    method: str = option("auto", "what is done to the head", choices=("auto", *POSTHOC_METHODS))
    strength: float | None = option(None, "of the method [chosen by cross-fitting]")
    target_prior: str = option(
        "uniform",
        "class shares that it is to predict under: uniform, train, shares such as 0.7,0.2,0.1 "
        "in the order of the classes, or estimate: those of --target_data",
    )
    target_data: str | None = option(
        None,
        "with --target_prior estimate: data whose class shares are estimated, from what the model "
        "says of them; their labels, if there are any, are not read. A folder of images (or of "
        "folders), a table of texts, or what --dataset takes",
    )
    source_prior: str = option(
        "train",
        "class shares that the model has learned: those of training, or implied by its logits, as "
        "after training with class weights or margins",
        choices=("train", "implied"),
    )
    choose_on: str = option(
        "auto",
        "what the choice is made on: validation, train, or a share of the test set, such as 0.5, "
        "which is then not measured [validation, if there is one, else train]",
    )
    by: str = option("log_loss", "what is chosen by, as a mean over classes", choices=CRITERIA)
    folds: int = option(5, "folds of the cross-fitting")
    calibrate: bool = option(
        True, "divide the logits by the temperature that fits the held-out samples"
    )
    seed: int = option(0, "seed of the folds and of a share of the test set")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.target()
        if (self.target_prior == ESTIMATE) != (self.target_data is not None):
            expected = f"given with --target_prior {ESTIMATE}, and left out without"
            raise invalid("target_data", expected, self.target_data)
        if self.choose_on not in ("auto", "train", "validation"):
            self.test_share()

    def target(self) -> str | list[float]:
        """The target prior as a word or as shares."""
        if self.target_prior in ("uniform", "train", ESTIMATE):
            return self.target_prior
        try:
            return [float(share) for share in self.target_prior.split(",")]
        except ValueError as error:
            expected = f"uniform, train, {ESTIMATE}, or shares such as 0.7,0.2,0.1"
            raise invalid("target_prior", expected, self.target_prior) from error

    def test_share(self) -> float:
        """The share of the test set that the choice is made on."""
        return share_of_test(self.choose_on, "auto", "train", "validation")


@dataclass
class ThresholdOptions(TrainedOptions):
    """What is chosen for which model. Further flags are those that choose the data."""

    LIMITS: ClassVar[dict[str, Limits]] = TrainedOptions.LIMITS | {
        "confidence": {"low": 0, "high": 1, "low_open": True, "high_open": True},
    }

    threshold_for: str | None = option(None, f"of two classes: {AIMS}")
    positive: str | None = option(None, "class that --threshold_for is about [the rarer one]")
    risk: float | None = option(
        None, "share of wrong answers that is allowed; surer samples are answered, others not"
    )
    confidence: float = option(0.95, "how sure it is that --risk holds for samples to come")
    choose_on: str = option(
        "auto",
        "validation, or a share of the test set, such as 0.5, which is then not measured "
        "[validation; data without parts: all]",
    )
    seed: int = option(0, "of the choice of a share")
    output: str | None = option(None, f"file that is written [{THRESHOLDS_FILE} beside the model]")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.aim()
        if self.threshold_for is None and self.risk is None:
            hint = "Or give --risk 0.05, or both."
            raise invalid("threshold_for", AIMS, None, hint=hint)
        if self.risk is not None and not 0 < self.risk < 1:
            raise invalid("risk", "in (0, 1)", self.risk)
        if self.choose_on not in ("auto", "validation"):
            self.share()

    def aim(self) -> dict[str, Any]:
        """What the threshold of two classes is chosen for, as ``choose_threshold`` takes it."""
        if self.threshold_for is None:
            return {}
        name, _, value = self.threshold_for.partition("=")
        try:
            if name == "f1" and not value:
                return {"aim": name}
            if name in ("precision", "recall") and 0 < float(value) <= 1:
                return {"aim": name, "at_least": float(value)}
            if name == "cost":
                false_positive, false_negative = map(float, value.split(":"))
                if min(false_positive, false_negative) >= 0 < max(false_positive, false_negative):
                    return {"aim": name, "costs": (false_positive, false_negative)}
        except ValueError:
            pass
        raise invalid("threshold_for", AIMS, self.threshold_for)

    def share(self) -> float:
        """The share of the test set that the choice is made on."""
        return share_of_test(self.choose_on, "auto", "validation")


@dataclass
class ExportOptions(TrainedOptions):
    """Which model goes where. Further flags are those of the recipes that choose the data."""

    LIMITS: ClassVar[dict[str, Limits]] = TrainedOptions.LIMITS | {"compared": COUNT}

    output: str | None = option(
        None, "file that is written [model.onnx, unless it is sent to a hub]"
    )
    compared: int = option(64, "test samples by which it is compared with torch")
    push_to_hub: bool = option(False, "send the saved model with its card to a hub")
    hub_model_id: str | None = option(
        None, "owner/name there, or name alone [the name of the run's folder]"
    )
    hub_private_repo: bool = option(False, "make it private, if it is new there")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("hub_model_id", "hub_private_repo"):
            if getattr(self, name) and not self.push_to_hub:
                raise invalid(name, "given with --push_to_hub", getattr(self, name))
        if self.output is None and self.push_to_hub:
            return
        self.output = self.output or "model.onnx"
        if Path(self.output).suffix.lower() != ".onnx":
            raise invalid("output", "a file that ends in .onnx", self.output)
        if Path(self.output).exists() and not self.overwrite:
            hint = "Choose another one, or --overwrite it."
            raise invalid("output", "a file that is not there", self.output, hint=hint)


@dataclass
class PosthocOptions:
    """What is done to which runs."""

    runs: list[str] = option([], "finished run folders; may come first without a flag")
    methods: list[str] = option(list(APPLIED), "method, or method:strength")
    choose_on: str = option(
        "auto", "validation or train [validation, if the run held samples out, else train]"
    )
    by: str = option("log_loss", "what is chosen by, as a mean over classes", choices=CRITERIA)
    folds: int = option(5, "folds of the cross-fitting")
    batch_size: int = option(64, "samples of a forward pass")
    workers: int = option(0, "loader processes for images")
    output_dir: str = option("runs/posthoc", "folder of the results")
    quiet: bool = option(False, "print warnings and errors only")
    traceback: bool = option(False, "show where in the code an error arose")

    def __post_init__(self) -> None:
        limits = {"folds": {"low": 2}, "batch_size": COUNT, "workers": COUNT_OR_0}
        check_limits(self, limits)
        if self.choose_on not in ("auto", "train", "validation"):
            expected = "auto, train or validation"
            raise invalid("choose_on", expected, self.choose_on)
        if not self.runs:
            hint = "Give them first: python recipes/posthoc.py runs/a runs/b."
            raise invalid("runs", "at least one finished run folder", "none", hint=hint)
        from ldam_plugins.posthoc import parse_method

        for method in self.methods:
            parse_method(method, "methods")
        for run in self.runs:
            if not Path(run, OPTIONS_FILE).is_file() or not Path(run, "model").is_dir():
                expected = "the folder of a finished run of vision_lt.py or text_lt.py"
                raise invalid("runs", expected, run)


@dataclass
class CompareOptions:
    """What is compared with what."""

    classifiers: list[str] = option(
        [], "folders of runs, or CSV files; may come first without a flag"
    )
    part: str = option("test", "of runs: test, or validation")
    output_dir: str = option("runs/comparison", "folder of the page and the tables")
    traceback: bool = option(False, "show where in the code an error arose")

    def __post_init__(self) -> None:
        if not self.classifiers:
            hint = "Give them first: python recipes/compare.py runs/a runs/b."
            raise invalid("classifiers", "runs, or files of predictions", "none", hint=hint)


def share_of_test(choose_on: str, *words: str) -> float:
    """The share of the test set that a choice is made on.

    Args:
        choose_on: As given.
        *words: What else may be given.
    """
    try:
        share = float(choose_on)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        expected = f"{', '.join(words)}, or a share of the test set in (0, 1)"
        raise invalid("choose_on", expected, choose_on)
    return share


def parse(
    kind: type[_Options], arguments: Sequence[str] | None = None
) -> tuple[_Options, list[str]]:
    """The options, and flags of the data, from a command line whose first word is the model."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and not words[0].startswith("-"):
        words.insert(0, "--model")
    return parse_known_flags(kind, words, **described(kind))


def command_line(kind: type[_Options]) -> tuple[_Options, list[str]]:
    """As :func:`parse`, but what is refused ends the process with a line."""
    options, rest = or_refused(lambda: parse(kind))
    watch_cores()
    if not options.traceback:
        say_errors_briefly(options.output_dir)
    log_bars_rarely()
    return options, rest


def parse_posthoc(arguments: Sequence[str] | None = None) -> PosthocOptions:
    """The options, the runs first."""
    return parse_with_first_word(PosthocOptions, "--runs", arguments)


def parse_compare(arguments: Sequence[str] | None = None) -> CompareOptions:
    """The options, the classifiers first."""
    return parse_with_first_word(CompareOptions, "--classifiers", arguments)
