"""Trained classifiers, by anyone, and the data they are used on: what several recipes share.

A model is a run folder of this package, a folder that transformers wrote, a folder or file
(``model_best.pth.tar``) of timm's ``train.py``, or a name of timm (``local-dir:...``,
``hf-hub:...``). The options of the data are those of ``vision_lt.py`` and ``text_lt.py``; of a run
they are known.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import text_lt
import torch
import vision_lt
from accelerate import PartialState
from options import GROUPS, CoreOptions, parse_options
from timm.data import create_transform
from torch.utils.data import DataLoader
from trained_options import MeasuredOptions, SharedOptions, TrainedOptions
from transformers import DataCollatorWithPadding
from transformers.utils.logging import disable_progress_bar

from ldam_plugins import ClassCounts, register
from ldam_plugins.data import LabelledImages, SingleSampleWarning, stratified_split
from ldam_plugins.data.notes import DataNotes
from ldam_plugins.data.readers import read_images, read_texts
from ldam_plugins.data.readers.base import (
    FileSource,
    ImageRequest,
    NoTestPart,
    TextRequest,
    text_table,
)
from ldam_plugins.data.texts import texts_of_classes
from ldam_plugins.heads import cosine_heads, find_head
from ldam_plugins.integrations.timm import saved_model, trained_model
from ldam_plugins.integrations.timm.images import image_loader, transformed
from ldam_plugins.integrations.transformers import trained_model as hf_trained_model
from ldam_plugins.training import check_processes, read_metrics
from ldam_plugins.training.auto_tune import Tuned, auto_tune, by_rule, settle
from ldam_plugins.training.command_line import flag_names
from ldam_plugins.training.cores import fit_threads
from ldam_plugins.training.options import (
    as_flags,
    invalid,
)
from ldam_plugins.training.run_dir import OPTIONS_FILE

DATA_OPTIONS = {*GROUPS["data"], "many", "few"}
"""Options of the recipes that say what the data are."""
PATHS = ("dataset", "train_list", "test_list")
TRAINED_ON = 0.1  # share of test samples known from training that is too much
LONGEST = 512  # tokens of a text, of a tokenizer that knows no limit
AUTOCAST = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What ``torch.autocast`` takes for a word of ``--mixed_precision``."""


def join_processes(options: SharedOptions) -> PartialState:
    """The processes that the launcher started, if they are as many as asked for.

    A process waits for the others as long as it takes.
    """
    forever = timedelta(days=365)
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=forever)
    check_processes(state.num_processes, options.num_processes)
    return state


def find_precision(
    options: MeasuredOptions,
    host: Host,
    load_some: Callable[[], Any],
    count: Callable[[], int],
    device: torch.device,
    *,
    kept: Path | None = None,
) -> Tuned:
    """The precision of ``--mixed_precision``, printed if it was for this to find.

    All processes call it; the first one decides.

    Args:
        options: Options of the recipe.
        host: The model.
        load_some: Gives some samples as ``host.make_loader`` takes them, called where they are
            needed.
        count: Gives the number of all samples, likewise.
        device: Where the model is run.
        kept: File of the choice, for a command that is given again after it was stopped.
    """
    if options.mixed_precision != "auto":
        return by_rule(options.mixed_precision)

    def measure() -> Tuned:
        batch = next(iter(host.make_loader(load_some())), None)
        if batch is None:
            return by_rule("auto", why="by rule, as there was nothing to time")
        if isinstance(batch, Mapping):
            inputs = {**batch}
            labels = inputs.pop("labels" if "labels" in inputs else "label")  # without a collator
            batch = (inputs, labels)
        passes = -(-count() // options.batch_size)
        return auto_tune(host.model, None, lambda: [batch], device=device, passes=passes)

    tuned = settle(str(options.output_dir), measure, by_rule("auto"), resume=False, shared=kept)
    if not options.quiet:
        print(f"speed: {tuned.line()}", flush=True)
    return tuned


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
        preparation: How images become its input, for people and other programs.
    """

    def __init__(
        self,
        model: Any,
        class_names: tuple[str, ...] | None,
        kind: str,
        make_loader: Callable[[Any], Any],
        save: Callable[[Path, tuple[str, ...], str], None],
        load: Callable[[Path], Any],
        preparation: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.class_names, self.kind = model, class_names, kind
        self.make_loader, self.save, self.load = make_loader, save, load
        self.preparation = preparation


def load(options: TrainedOptions, flags: list[str], *, measures: bool = False) -> tuple[Host, Data]:
    """The model and its data.

    Args:
        options: Which model it is.
        flags: Options of the data; those of a run of this package are known without.
        measures: Whether samples are only measured: data without parts are test data then, data of
            a run need not have all of its classes, and the class counts are those of its training.
    """
    host, run = find_host(options)
    known = trained_counts(run, host) if measures else None
    data = load_data(options, host, [*known_data(run, flags), *flags], whole=measures, known=known)
    if measures and run and "dataset" in flag_names(flags):
        check_not_trained_on(options, host, run, data)
    return host, data


def check_not_trained_on(
    options: TrainedOptions, host: Host, run: Mapping[str, Any], data: Data
) -> None:
    """Refuse test samples of which a tenth are training samples of the run; note fewer.

    Images are the same if they are the same file or row, texts if they read the same.
    """
    try:
        quiet = replace(options, quiet=True)
        own = load_data(quiet, host, known_data(run, []))
    except (ConnectionError, OSError, ValueError):  # the data of the run are not there any more
        return
    trained = set(identities(own.parts["train"].samples, own.options.dataset))
    tested = identities(data.parts["test"].samples, data.options.dataset)
    both = sum(each in trained for each in tested)
    if both >= TRAINED_ON * len(tested):
        hint = "Without --dataset its own test set is used."
        shown = f"{both} of {len(tested)} that it was trained on"
        raise invalid("dataset", "samples that the run was not trained on", shown, hint=hint)
    if both and not options.quiet:
        print(f"{both} of the {len(tested)} samples are among those that the run was trained on.")


def identities(samples: Any, dataset: str) -> list[Any]:
    """What tells samples apart, also from those of other data sets."""
    if not isinstance(samples, LabelledImages):
        return [hash(text) for text in samples["text"][:]]
    if isinstance(samples.source, FileSource):
        return [os.path.realpath(samples.describe(row)) for row in range(len(samples))]
    place = os.path.realpath(dataset) if os.path.exists(dataset) else dataset
    return [(place, samples.describe(row)) for row in range(len(samples))]


def find_host(options: TrainedOptions) -> tuple[Host, Mapping[str, Any]]:
    """The model, and the options of the run of this package that it is of, if it is of one."""
    fit_threads()
    register()  # models of this package are found by name
    disable_progress_bar()  # of transformers: reading and writing weights takes moments
    source, path = options.model, Path(options.model.removeprefix("local-dir:"))
    run: dict[str, Any] = {}
    if (path / OPTIONS_FILE).is_file() and not is_run(path):
        hint = "It has no model/. A training that was stopped goes on by its command with --resume "
        hint += "auto; what evaluate.py leaves is no model."
        raise invalid("model", "a run that came to its end", source, hint=hint)
    if is_run(path):
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


def is_run(path: Path) -> bool:
    """Whether it is the folder of a run of this package that has left its model."""
    return (path / OPTIONS_FILE).is_file() and (path / "model" / "config.json").is_file()


def model_files(options: TrainedOptions) -> Path | None:
    """The folder of the weights of the model, or their file; None of one that lies elsewhere."""
    path = Path(options.model.removeprefix("local-dir:"))
    path = path / "model" if is_run(path) else path
    return (trained_model.checkpoint_in(path) or path) if path.exists() else None


def beside_model(options: TrainedOptions, name: str) -> Path | None:
    """The place of a file beside the weights of the model; None of a model that lies elsewhere."""
    files = model_files(options)
    return None if files is None else (files if files.is_dir() else files.parent) / name


def timm_host(options: TrainedOptions, source: str) -> Host:
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
        found.data_config,
    )


def transformers_host(options: TrainedOptions, source: str) -> Host:
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
        None if is_text else found.processor.to_dict(),
    )


def known_data(run: Mapping[str, Any], flags: list[str]) -> list[str]:
    """What the options of a run say of its data, as flags; nothing if a data set is given."""
    if not run or "dataset" in flag_names(flags):
        return []
    known = {name: value for name, value in run.items() if name in DATA_OPTIONS}
    for name in PATHS:
        known[name] = found_from(Path(run["folder"]), known.get(name))
    split = Path(run["folder"], "split.csv")
    if split.is_file():
        known = {k: v for k, v in known.items() if k not in ("val_split", "test_split")}
        known["split_file"] = str(split)
    known = {name: value for name, value in known.items() if value not in (None, [], False)}
    if known.get("profile", "none") == "none":
        known.pop("ratio", None)
    return as_flags(known)


def trained_counts(run: Mapping[str, Any], host: Host) -> ClassCounts | None:
    """Training samples of each class of a run, in the order of the model's logits, if known."""
    try:
        metrics = read_metrics(run["folder"])
        names, counts = metrics["class_names"], metrics["class_counts"]
    except (KeyError, OSError, ValueError):
        return None
    return ClassCounts(counts, names) if tuple(names) == host.class_names else None


def found_from(folder: Path, name: str | None) -> str | None:
    """A relative path of a run, as seen from where it was started: here, or above its folder."""
    if not name or os.path.isabs(name) or os.path.exists(name):
        return name
    above = (place / name for place in folder.resolve().parents)
    return next((str(path) for path in above if path.exists()), name)


def load_data(
    options: TrainedOptions,
    host: Host,
    flags: list[str],
    *,
    whole: bool = False,
    known: ClassCounts | None = None,
) -> Data:
    """The parts of the data, their classes in the order of the model's logits.

    Args:
        options: Which model it is.
        host: The model.
        flags: Options of the data.
        whole: Whether data without parts are all to test on.
        known: Training samples of each class, in the order of the logits. Default: of the data.
    """
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
    try:
        train, test, counts = recipe.load_data(data, show, notes)
        train, validation, counts = recipe.hold_out(data, train, counts, show, notes)
        parts = {"train": train, "validation": validation, "test": test}
    except NoTestPart:
        if not whole:
            raise
        parts = {"test": all_samples(data, show)}
        labels = labels_of(parts["test"])
        counts = ClassCounts.from_labels(labels, class_names=names_of(parts["test"]))
    of_classes = texts_of_classes if recipe is text_lt else LabelledImages.of_classes
    if known is not None:
        known_names = tuple(known.class_names or ())
        parts = {name: part and in_classes(part, known_names) for name, part in parts.items()}
        counts = known
    elif (classes := model_classes(host, counts)) is not None:
        parts = {name: part and of_classes(part, classes) for name, part in parts.items()}
        names = [counts.class_names[index] for index in classes]
        counts = ClassCounts(counts.counts[classes], names)
    counts = counts.with_limits(many_above=data.many, few_below=data.few)
    found = {name: Part(part, labels_of(part)) for name, part in parts.items() if part is not None}
    return Data(found, counts, data)


def all_samples(data: Any, show: bool) -> Any:
    """All images or texts of data that have no parts."""
    notes = DataNotes()
    is_text = isinstance(data, text_lt.TextOptions)
    names = ("dataset", "label_column", "group_column", "encoding", "delimiter", "skip_empty")
    given = {name: getattr(data, name) for name in names}
    # A share is what makes one part enough for a reader.
    given |= {"test_share": 0.5, "notes": notes}
    if is_text:
        request = TextRequest(**given, train_split=data.train_split, text_column=data.text_column)
        found, _ = read_texts(request)
    else:
        rows, _ = read_images(ImageRequest(**given, image_column=data.image_column))
        found = LabelledImages(
            rows.source, rows.labels, rows.class_names, rows=rows.rows, groups=rows.groups
        )
        if data.skip_corrupt:
            found = vision_lt.without_corrupt(found, "test", show, notes)
    if show:
        notes.print()
    return found


def names_of(samples: Any) -> tuple[str, ...]:
    """The names of the classes of images or texts."""
    is_images = isinstance(samples, LabelledImages)
    return tuple(samples.class_names if is_images else samples.features["label"].names)


def in_classes(samples: Any, names: Sequence[str]) -> Any:
    """Samples in the classes of a model, of which the data may lack some but have no others."""
    own, labels = names_of(samples), labels_of(samples)
    if own == tuple(names):
        return samples
    if unknown := sorted({own[label] for label in np.unique(labels)} - set(names)):
        expected = f"data of the model's {len(names)} classes"
        raise invalid("dataset", expected, f"data of {len(unknown)} other(s): {unknown[:5]}")
    place = {name: index for index, name in enumerate(names)}
    labels = np.array([place.get(name, -1) for name in own])[labels]
    if isinstance(samples, LabelledImages):
        rows, groups = samples.rows, samples.groups
        return LabelledImages(samples.source, labels, names, rows=rows, groups=groups)
    groups = samples["group"][:] if "group" in samples.column_names else None
    return text_table(samples["text"][:], labels, names, groups)


def rows_of(samples: Any, rows: np.ndarray) -> Any:
    """Some of the images or texts, in the order of ``rows``."""
    return samples.subset(rows) if isinstance(samples, LabelledImages) else samples.select(rows)


def divide_test(test: Part, share: float, seed: int) -> tuple[Any, Any]:
    """That share of the test samples, stratified, and the others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SingleSampleWarning)
        kept, held_out = stratified_split(test.labels, share, seed=seed)
    return rows_of(test.samples, held_out), rows_of(test.samples, kept)


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


def data_settings(data: CoreOptions) -> dict[str, Any]:
    """The options of the data that were used, for a file."""
    names = (field.name for field in fields(data))
    return {name: getattr(data, name) for name in names if name in DATA_OPTIONS}
