"""Make a trained image or text classifier fair to rare classes in minutes, without training.

    python recipes/rebalance.py runs/photos                              # a run of this package
    python recipes/rebalance.py path/to/bert --dataset tickets.csv --test_split 0.2
    python recipes/rebalance.py output/train/resnet18 --dataset photos   # of timm's train.py
    python recipes/rebalance.py local-dir:path/to/model --dataset photos --method logit_adjustment

MODEL, the first word, is a run folder, a folder that transformers wrote, a folder or file
(``model_best.pth.tar``) of timm's ``train.py``, or a name of timm (``local-dir:...``,
``hf-hub:...``). Its features are taken once, and the head on top is changed by a method of
``ldam_plugins.posthoc``: by ``auto`` by the one that cross-fitting finds best, if that is more than
noise, else by none. What is chosen is chosen on held-out samples (``--val_split``, or those of the
run), else on training samples; with ``--choose_on 0.5`` on that share of the test set, which is
then no test set any more. The rest of the test set is measured before and after.

The options of the data are those of ``vision_lt.py`` and ``text_lt.py``; of a run they are known.
Left in ``--output_dir``: ``model/`` in the form of its host, which loads it alone, ``metrics.json``
and ``report.html``.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import text_lt
import torch
import vision_lt
from options import GROUPS, CoreOptions, parse_options
from timm.data import create_transform
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, HfArgumentParser
from transformers.utils.logging import disable_progress_bar

from ldam_plugins import ClassCounts, register
from ldam_plugins.data import LabelledImages, SingleSampleWarning, stratified_split
from ldam_plugins.data.notes import DataNotes
from ldam_plugins.data.texts import texts_of_classes
from ldam_plugins.heads import cosine_heads, find_head
from ldam_plugins.integrations.timm import saved_model, trained_model
from ldam_plugins.integrations.timm.images import image_loader, transformed
from ldam_plugins.integrations.transformers import trained_model as hf_trained_model
from ldam_plugins.posthoc import METHODS, extract_features, rebalance_head
from ldam_plugins.posthoc.choice import CRITERIA
from ldam_plugins.posthoc.methods import NONE
from ldam_plugins.reports import write_rebalance_report
from ldam_plugins.reports.console import files_left, header, worded_classes
from ldam_plugins.reports.rebalance_report import metric_rows, verdict
from ldam_plugins.training import (
    claim_output_dir,
    keep_freed_memory,
    run_metrics,
    write_metrics,
)
from ldam_plugins.training.command_line import USAGE_ERROR, flag_names, say_errors_briefly
from ldam_plugins.training.options import (
    COUNT,
    COUNT_OR_0,
    SEED,
    Limits,
    as_flags,
    check_limits,
    invalid,
    option,
)
from ldam_plugins.training.run_dir import OPTIONS_FILE, check_no_run

DATA_OPTIONS = {*GROUPS["data"], "many", "few"}
"""Options of the recipes that say what the data are."""
LONGEST = 512  # tokens of a text, of a tokenizer that knows no limit
COMPARED = 64  # test samples by which the saved model is compared with what was measured


@dataclass
class RebalanceOptions:
    """What is done to which model. Further flags are those of the recipes that choose the data."""

    LIMITS: ClassVar[dict[str, Limits]] = {
        "folds": {"low": 2},
        "batch_size": COUNT,
        "workers": COUNT_OR_0,
        "max_length": COUNT,
        "seed": SEED,
    }

    model: str = option("", "the trained model; may come first without a flag")
    method: str = option("auto", "what is done to the head", choices=("auto", *METHODS))
    strength: float | None = option(None, "of the method [chosen by cross-fitting]")
    target_prior: str = option(
        "uniform",
        "class shares that it is to predict under: uniform, train, or shares such as 0.7,0.2,0.1 "
        "in the order of the classes",
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
    batch_size: int = option(64, "samples of a forward pass")
    workers: int = option(0, "loader processes for images")
    max_length: int | None = option(None, "tokens a text is cut to [the tokenizer's own]")
    seed: int = option(0, "seed of the folds and of a share of the test set")
    output_dir: str | None = option(None, "folder of the result [runs/rebalanced/NAME]")
    overwrite: bool = option(False, "delete the run in --output_dir first")
    quiet: bool = option(False, "print warnings and errors only")
    traceback: bool = option(False, "show where in the code an error arose")

    def __post_init__(self) -> None:
        check_limits(self, self.LIMITS)
        if not self.model.strip():
            raise invalid("model", "the trained model", self.model, hint="Give it first.")
        if self.output_dir is None:
            name = self.model.removeprefix("local-dir:").rstrip("/").rpartition("/")[2]
            self.output_dir = str(Path("runs", "rebalanced", name.split(":")[-1]))
        self.target()
        if self.choose_on not in ("auto", "train", "validation"):
            self.test_share()

    def target(self) -> str | list[float]:
        """The target prior as a word or as shares."""
        if self.target_prior in ("uniform", "train"):
            return self.target_prior
        try:
            return [float(share) for share in self.target_prior.split(",")]
        except ValueError as error:
            expected = "uniform, train, or shares such as 0.7,0.2,0.1"
            raise invalid("target_prior", expected, self.target_prior) from error

    def test_share(self) -> float:
        """The share of the test set that the choice is made on."""
        try:
            share = float(self.choose_on)
        except ValueError:
            share = 0.0
        if not 0 < share < 1:
            expected = "auto, train, validation, or a share of the test set in (0, 1)"
            raise invalid("choose_on", expected, self.choose_on)
        return share


class Part(NamedTuple):
    """Samples of one part of the data, and how a loader is made of them."""

    samples: Any
    labels: np.ndarray


class Data(NamedTuple):
    """The parts of the data, in the classes of the model."""

    parts: dict[str, Part]
    counts: ClassCounts
    options: CoreOptions


class Host:
    """A trained model and what its host does with it.

    Args:
        model: The classifier.
        class_names: In the order of its logits, if anything says it.
        kind: ``"images"`` or ``"texts"``.
        make_loader: Batches of the model's input of a part of the data.
        save: Writes the model into a folder, in the form of the host, with the names of its classes
            and a title.
        load: Loads it from there as anyone would.
    """

    def __init__(
        self,
        model: Any,
        class_names: tuple[str, ...] | None,
        kind: str,
        make_loader: Callable[[Any], Any],
        save: Callable[[Path, tuple[str, ...], str], None],
        load: Callable[[Path], Any],
    ) -> None:
        self.model, self.class_names, self.kind = model, class_names, kind
        self.make_loader, self.save, self.load = make_loader, save, load


def main(options: RebalanceOptions, flags: list[str] | None = None) -> dict[str, Any]:
    """Re-balance a model; returns what ``metrics.json`` holds.

    Args:
        options: What is done to which model.
        flags: Options of the data.
    """
    register()
    disable_progress_bar()  # of transformers: reading and writing weights takes moments
    output_dir = Path(str(options.output_dir))
    if not options.overwrite:
        check_no_run(output_dir)
    began = time.perf_counter()
    host, run = find_host(options)
    data = load_data(options, host, [*known_data(run, flags or []), *(flags or [])])
    if not options.quiet:
        print_header(options, host, data)
    chosen_on, chosen, test = choose_parts(options, data)
    check_head(options, host.model)
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    names = data.counts.class_names
    extract = partial(
        extract_features, host.model, device=device, class_names=names, progress=not options.quiet
    )
    with keep_freed_memory(device):
        features = extract(host.make_loader(chosen))
        tested = extract(host.make_loader(test))
    done = rebalance_head(
        host.model,
        features,
        data.counts,
        options.method,
        strength=options.strength,
        target_prior=options.target(),
        source_prior=options.source_prior,
        by=options.by,
        folds=options.folds,
        seed=options.seed,
        calibrate=options.calibrate and chosen_on != "train",
        test=tested,
    )
    host.model.cpu()
    settings = {**data_settings(data.options), **asdict(options), "choose_on": chosen_on}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch, "model")
        host.save(folder, tuple(names or ()), output_dir.name)
        check_saved(host, folder, test)
        # Only now, so that an error leaves nothing behind.
        claim_output_dir(output_dir, settings, resume=False, overwrite=options.overwrite)
        shutil.copytree(folder, output_dir / "model")
    before, after = ({**each} for each in (done.before, done.after))
    before.pop("confusion")
    seconds = time.perf_counter() - began
    metrics = run_metrics(
        options=settings,
        class_counts=data.counts,
        device=device,
        rebalance=done.to_dict(),
        before=before,
        train_seconds=seconds,
        examples_per_second=(len(features) + len(tested)) / seconds,
        test=after,
    )
    write_metrics(output_dir, metrics)
    write_rebalance_report(output_dir)
    if not options.quiet:
        print_outcome(options, metrics, data.counts)
    return metrics


def find_host(options: RebalanceOptions) -> tuple[Host, Mapping[str, Any]]:
    """The model, and the options of the run of this package that it is of, if it is of one."""
    source, path = options.model, Path(options.model.removeprefix("local-dir:"))
    run: dict[str, Any] = {}
    if (path / OPTIONS_FILE).is_file() and (path / "model" / "config.json").is_file():
        run = {**json.loads((path / OPTIONS_FILE).read_text(encoding="utf-8")), "folder": path}
        path = path / "model"
        source = str(path)
    if (path / "config.json").is_file():
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if "architecture" in config and "model_type" not in config:
            return timm_host(options, f"local-dir:{path}"), run
        return transformers_host(options, str(path)), run
    if path.is_dir() and (checkpoint := trained_model.checkpoint_in(path)):
        return timm_host(options, str(checkpoint)), run
    if path.is_dir() or ("/" in source and ":" not in source and not path.is_file()):
        return transformers_host(options, source), run
    return timm_host(options, source), run


def timm_host(options: RebalanceOptions, source: str) -> Host:
    """A model of timm, which reads its images as its config says."""
    found = trained_model.load_trained(source)
    transform = create_transform(**found.data_config)

    def make_loader(images: LabelledImages) -> DataLoader:
        return image_loader(
            transformed(images, transform), workers=options.workers, batch_size=options.batch_size
        )

    def save(folder: Path, class_names: tuple[str, ...], title: str) -> None:
        saved_model.save_model(
            found.model,
            folder,
            class_names=class_names,
            data_config=found.data_config,
            title=title,
            pretrained=options.model,
        )

    return Host(
        found.model,
        found.class_names,
        "images",
        make_loader,
        save,
        lambda folder: saved_model.load_model(folder)[0],
    )


def transformers_host(options: RebalanceOptions, source: str) -> Host:
    """A text or image classifier of transformers, with its tokenizer or image processor."""
    found = hf_trained_model.load_trained(source)

    def image_batches(images: LabelledImages) -> DataLoader:
        return DataLoader(
            transformed(images, None),
            options.batch_size,
            num_workers=options.workers,
            collate_fn=found.collate_images,
        )

    def text_batches(texts: Any) -> DataLoader:
        tokenizer = found.processor
        limit = options.max_length or min(tokenizer.model_max_length, LONGEST)
        tokens = texts.map(
            lambda batch: tokenizer(batch["text"], truncation=True, max_length=limit),
            batched=True,
            remove_columns=[name for name in texts.column_names if name != "label"],
            desc="tokenize",
        )
        if tokenizer.pad_token is None:  # so that nothing needs to be padded
            return DataLoader(tokens.with_format("torch"), 1)
        return DataLoader(tokens, options.batch_size, collate_fn=DataCollatorWithPadding(tokenizer))

    def save(folder: Path, class_names: tuple[str, ...], title: str) -> None:
        found.save(folder, title=title, source=options.model)

    is_text = found.kind == hf_trained_model.TEXTS
    return Host(
        found.model,
        found.class_names,
        found.kind,
        text_batches if is_text else image_batches,
        save,
        lambda folder: hf_trained_model.load_trained(folder).model,
    )


def known_data(run: Mapping[str, Any], flags: list[str]) -> list[str]:
    """What the options of a run say of its data, as flags; nothing if a data set is given."""
    if not run or "dataset" in flag_names(flags):
        return []
    known = {name: value for name, value in run.items() if name in DATA_OPTIONS}
    split = Path(run["folder"], "split.csv")
    if split.is_file():
        known = {k: v for k, v in known.items() if k not in ("val_split", "test_split")}
        known["split_file"] = str(split)
    known = {name: value for name, value in known.items() if value not in (None, [], False)}
    if known.get("profile", "none") == "none":
        known.pop("ratio", None)
    return as_flags(known)


def load_data(options: RebalanceOptions, host: Host, flags: list[str]) -> Data:
    """The parts of the data, their classes in the order of the model's logits."""
    for flag in flags:
        if flag_names([flag]) - DATA_OPTIONS:
            hint = "Of vision_lt.py and text_lt.py it takes the options of the data alone."
            raise invalid("arguments", "options of this recipe or of the data", flag, hint=hint)
    if "dataset" not in flag_names(flags):
        raise invalid("dataset", "given for a model that is no run of this package", None)
    own = ["--output_dir", str(options.output_dir), "--loss", "ce", "--schedule", "none"]
    recipe: Any = text_lt if host.kind == hf_trained_model.TEXTS else vision_lt
    kind = text_lt.TextOptions if recipe is text_lt else vision_lt.VisionOptions
    data: Any = parse_options(kind, [*own, *flags], default="")
    notes, show = DataNotes(), not options.quiet
    train, test, counts = recipe.load_data(data, show, notes)
    train, validation, counts = recipe.hold_out(data, train, counts, show, notes)
    parts = {"train": train, "validation": validation, "test": test}
    classes = model_classes(host, counts)
    if classes is not None:
        of_classes = texts_of_classes if recipe is text_lt else LabelledImages.of_classes
        parts = {name: part and of_classes(part, classes) for name, part in parts.items()}
        names = [counts.class_names[index] for index in classes]
        counts = ClassCounts(counts.counts[classes], names)
    counts = counts.with_limits(many_above=data.many, few_below=data.few)
    found = {name: Part(part, labels_of(part)) for name, part in parts.items() if part is not None}
    return Data(found, counts, data)


def labels_of(samples: Any) -> np.ndarray:
    """The classes of images or texts."""
    labels = samples.labels if isinstance(samples, LabelledImages) else samples["label"][:]
    return np.asarray(labels)


def model_classes(host: Host, counts: ClassCounts) -> np.ndarray | None:
    """The class of the data that each logit is of; None if they are in the same order."""
    data = [str(name) for name in counts.class_names or ()]
    outputs = head_layer(host.model).weight.shape[0]
    if host.class_names is None:
        if outputs != len(data):
            expected = f"data of the model's {outputs} classes"
            hint = "Classes without a training sample do not count."
            raise invalid("dataset", expected, f"data of {len(data)} classes", hint=hint)
        return None
    if sorted(host.class_names) != sorted(data):
        lacking = sorted(set(host.class_names) - set(data))[:5]
        unknown = sorted(set(data) - set(host.class_names))[:5]
        hint = f"Of the model alone: {lacking or 'none'}; of the data alone: {unknown or 'none'}."
        hint += " Classes without a training sample do not count."
        shown = f"data of {len(data)} classes"
        raise invalid("dataset", f"data of the model's {outputs} classes", shown, hint=hint)
    order = np.array([data.index(name) for name in host.class_names])
    return None if (order == np.arange(len(order))).all() else order


def head_layer(model: Any) -> Any:
    """The first layer of the head."""
    names = [*cosine_heads(model)] or find_head(model)
    return model.get_submodule(names[0])


def check_head(options: RebalanceOptions, model: Any) -> None:
    """Refuse what would give a bias to a head that is built without one, and so is lost."""
    layer = head_layer(model)
    if cosine_heads(model) or layer.bias is not None:
        return
    without = sorted(name for name, method in METHODS.items() if not method.has_bias)
    if options.method not in ("auto", NONE, *without) or options.target_prior != "uniform":
        expected = "one that needs no bias, with --target_prior uniform"
        hint = f"The head of this model has none, and its host would leave it out: {without}."
        raise invalid("method", expected, options.method, hint=hint)


def choose_parts(options: RebalanceOptions, data: Data) -> tuple[str, Any, Any]:
    """Where the choice is made, the samples of it, and those that are measured."""
    parts, test = data.parts, data.parts["test"]
    word = options.choose_on
    if word == "auto":
        word = "validation" if "validation" in parts else "train"
    if word == "validation" and "validation" not in parts:
        hint = "Name a split or give a share by --val_split, or choose on a share of the test set."
        raise invalid("choose_on", "another part: nothing is held out", word, hint=hint)
    if word in parts:
        return word, parts[word].samples, test.samples
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SingleSampleWarning)
        kept, held_out = stratified_split(test.labels, options.test_share(), seed=options.seed)
    pick = "subset" if isinstance(test.samples, LabelledImages) else "select"
    chosen, measured = (getattr(test.samples, pick)(rows) for rows in (held_out, kept))
    return f"{word} of test", chosen, measured


def check_saved(host: Host, folder: Path, test: Any) -> None:
    """Check that what lies in the folder gives the logits that were measured."""
    pick = "subset" if isinstance(test, LabelledImages) else "select"
    some = getattr(test, pick)(np.arange(min(COMPARED, len(labels_of(test)))))
    own, loaded = (
        extract_features(model.cpu(), host.make_loader(some)).logits
        for model in (host.model, host.load(folder))
    )
    if not torch.allclose(own, loaded, rtol=1e-4, atol=1e-4 * float(own.abs().max())):
        difference = float((own - loaded).abs().max())
        expected = "a model that its host saves and loads as it is"
        raise invalid("model", expected, f"one whose logits differ by {difference:.3g}")


def data_settings(data: CoreOptions) -> dict[str, Any]:
    """The options of the data that were used, for a file."""
    names = (field.name for field in fields(data))
    return {name: getattr(data, name) for name in names if name in DATA_OPTIONS}


def print_header(options: RebalanceOptions, host: Host, data: Data) -> None:
    """Print what is changed and on what data, before anything is computed."""
    sizes = ", ".join(f"{len(part.labels)} {name}" for name, part in data.parts.items())
    order = "by its config" if host.class_names else "in the order of the data, as it names none"
    facts = {
        "model": f"{options.model}, {type(host.model).__name__}",
        "data": f"{data.options.dataset}, {host.kind}: {sizes}",
        "classes": worded_classes(data.counts),
        "their order": order,
        "method": options.method,
    }
    print(header(facts), flush=True)


def print_outcome(
    options: RebalanceOptions, metrics: Mapping[str, Any], counts: ClassCounts
) -> None:
    """Print before and after, what was chosen and where the files are."""
    from tabulate import tabulate

    names = ("", "before", "after", "difference")
    print(f"\n{tabulate(metric_rows(metrics, counts), names, disable_numparse=True)}\n")
    print("\n".join(verdict(metrics)))
    print(f"\n{files_left(str(options.output_dir))}")


def parse(arguments: list[str] | None = None) -> tuple[RebalanceOptions, list[str]]:
    """The options, and flags of the data, from a command line whose first word is the model."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words and not words[0].startswith("-"):
        words.insert(0, "--model")
    words = [
        f"--{w[2:].replace('-', '_')}" if w.startswith("--") and "=" not in w else w for w in words
    ]
    parser = HfArgumentParser(RebalanceOptions, allow_abbrev=False)
    options, rest = parser.parse_args_into_dataclasses(words, return_remaining_strings=True)
    return options, rest


def command_line() -> tuple[RebalanceOptions, list[str]]:
    """As :func:`parse`, but what is refused ends the process with a line."""
    try:
        options, rest = parse()
    except (TypeError, ValueError) as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        raise SystemExit(USAGE_ERROR) from None
    if not options.traceback:
        say_errors_briefly(options.output_dir)
    return options, rest


if __name__ == "__main__":
    main(*command_line())
