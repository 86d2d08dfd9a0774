"""Look at a data set before training: what is in it, what is wrong with it, and what to run.

    python recipes/inspect_data.py path/to/photos
    python recipes/inspect_data.py path/to/reviews --model minilm --max_length 128
    python recipes/inspect_data.py uoft-cs/cifar10 --regime scratch

Prints the classes from head to tail, what was found, and a command to train with and what in this
repository speaks for it. ``--output_dir`` gets the same as ``report.html`` and ``audit.json``, and
lists of duplicates, test examples that are in the training set, conflicting labels and unreadable
files as CSV. Takes imagehash and datasketch (``pip install -e ".[inspect]"``). The advice is that
of ``recipes/advice.yaml``.
"""

from __future__ import annotations

from study_options import LOADING, InspectOptions
from study_options import parse_inspect as parse

from ldam_plugins.training.command_line import begin_study

if __name__ == "__main__":  # --help and a misspelt flag are answered before torch is imported
    chosen = begin_study(parse)

import io
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from transformers import AutoTokenizer

from ldam_plugins.data import Audit, audit_images, audit_texts, load_images, load_texts
from ldam_plugins.data.audit_tables import TRAIN
from ldam_plugins.data.notes import DataNotes
from ldam_plugins.data.readers.base import NoTestPart
from ldam_plugins.integrations.transformers.run_callbacks import pretrained_source
from ldam_plugins.integrations.transformers.tokenizer import train_tokenizer
from ldam_plugins.reports import audit_text, write_audit
from ldam_plugins.reports.audit_report import Advice
from ldam_plugins.training.options import invalid

ADVICE = Path(__file__).parent / "advice.yaml"
EVIDENCE = "recipes/results/README.md"
LOADERS: dict[str, Callable[..., tuple[Any, Any]]] = {"images": load_images, "texts": load_texts}
TEST_SHARE = "0.2"
KNOWN = {"digits": "images", "stdlib_docstrings": "texts"}
NO_LIMITS = (0, math.inf)
MOST_EPOCHS = 4
"""Times the epochs of the table, at most."""
PREVIEW = 128  # pixels of a side


def main(options: InspectOptions) -> Audit:
    """Look at the data set, print what was found, and write it to ``--output_dir``."""
    options, kind, (train, test) = load(options)
    Path(options.output_dir).mkdir(parents=True, exist_ok=True)  # before what takes minutes
    preview = None
    if kind == "images":
        audit = audit_images(train, test, near_distance=options.near_distance, progress=True)
        preview = partial(thumbnail, {"train": train, "test": test})
    else:
        audit = audit_texts(
            train,
            test,
            near_similarity=options.near_similarity,
            tokenizer=make_tokenizer(options.model, train),
            max_length=options.max_length or 256,
            progress=True,
        )
    advice = advise(options, audit)
    print(audit_text(audit, options.dataset, advice))
    page = write_audit(audit, options.output_dir, options.dataset, advice=advice, preview=preview)
    print(f"\nThe same as a page, with the lists beside it: {page}")
    return audit


def load(options: InspectOptions) -> tuple[InspectOptions, str, tuple[Any, Any]]:
    """The options, the kind of the data set, its training and its test set.

    Where there is no test set, and none is asked for, a share stands for one: the options say so.
    """
    kind = options.kind if options.kind != "auto" else KNOWN.get(options.dataset, "auto")
    kinds = [each for each in LOADERS if kind in (each, "auto") and takes(options, each)]
    refused: dict[str, Exception] = {}
    for each in kinds:
        try:
            return load_or_divide(each, options)
        except (ValueError, ConnectionError) as error:
            refused[each] = error
    if len({str(error) for error in refused.values()}) == 1:
        raise refused[kinds[0]]
    reasons = " ".join(f"As {each}: {str(error).rstrip('.')}." for each, error in refused.items())
    hint = f"{reasons} With --kind images or --kind texts only one is tried."
    raise invalid("dataset", "a data set of images or of texts", options.dataset, hint=hint)


def load_or_divide(
    kind: str, options: InspectOptions
) -> tuple[InspectOptions, str, tuple[Any, Any]]:
    """A data set of a kind as :func:`load` gives it, divided if it has no test set."""
    try:
        return options, kind, load_as(kind, options)
    except NoTestPart:
        if options.test_split is not None:
            raise
    options = replace(options, test_split=TEST_SHARE)
    parts = load_as(kind, options)
    print(f"There is no test set: what --test_split {TEST_SHARE} holds out stands for one.")
    return options, kind, parts


def load_as(kind: str, options: InspectOptions) -> tuple[Any, Any]:
    """The training and the test set of a data set of a kind; prints what there is to say of it."""
    given, notes = options.loading(kind), DataNotes()
    given["seed"] = given.pop("subset_seed", 0)
    found = LOADERS[kind](options.dataset, **given, notes=notes)
    notes.print()
    return found


def takes(options: InspectOptions, kind: str) -> bool:
    """Whether no option is given that only the other kind has."""
    (other,) = set(LOADING) - {kind}
    alone = set(options.loading(other)) - set(LOADING[kind])
    if alone and options.kind == kind:
        name = sorted(alone)[0]
        raise invalid(name, f"left out for {kind}", getattr(options, name))
    return not alone


def make_tokenizer(model: str | None, train: Any) -> Any:
    """The tokenizer of a model, which counts all tokens of a text; None without a model."""
    if model is None:
        return None
    if model == "bilstm":
        tokenizer = train_tokenizer(train["text"])
    else:
        tokenizer = AutoTokenizer.from_pretrained(pretrained_source(model), trust_remote_code=False)
    return partial(tokenizer, truncation=False, verbose=False)


def thumbnail(parts: Mapping[str, Any], split: str, index: int) -> bytes:
    """A small JPEG of an image for the page."""
    image = parts[split].image(index)
    image.thumbnail((PREVIEW, PREVIEW))
    content = io.BytesIO()
    image.save(content, "JPEG", quality=85)
    return content.getvalue()


def advise(options: InspectOptions, audit: Audit, table: Path = ADVICE) -> Advice:
    """What to run on such data, by the first entries of the table that fit."""
    entries = yaml.safe_load(table.read_bytes())
    method = first_fit(entries["methods"], options, audit)
    training = first_fit(entries["training"], options, audit)
    settings = {**training["options"], **method["options"]}
    if options.model is not None:
        settings["model"] = options.model
    changes: dict[str, int] = {}
    if "epochs" in settings:
        changes = fitted_lengths(settings, training.get("updates", NO_LIMITS), audit)
    settings |= changes
    if audit.texts is not None:
        settings["max_length"] = options.max_length or advised_length(audit)
    changed = [f"{name} {new}, not {training['options'][name]}" for name, new in changes.items()]
    unlike = f" To fit the size of this set: {', '.join(changed)}." if changed else ""
    reasons = [
        ("method", worded(settings, method["options"]), evidence(method)),
        ("training", worded(settings, training["options"]), evidence(training) + unlike),
    ]
    launch = "accelerate launch" if training["recipe"] == "vision_lt.py" else "python"
    flags = {"dataset": options.dataset, **options.loading(audit.kind), **settings}
    flags["output_dir"] = f"runs/{Path(options.dataset).stem}"
    if len(audit.unreadable):
        flags["skip_corrupt"] = True
    return Advice(f"{launch} recipes/{training['recipe']} {as_words(flags)}", reasons)


def first_fit(
    entries: Sequence[Mapping[str, Any]], options: InspectOptions, audit: Audit
) -> Mapping[str, Any]:
    """The first entry for such data."""
    found = {"max_ratio": audit.imbalance_ratio, "max_classes": len(audit.class_names)}
    if audit.images is not None:
        found["max_side"] = min(audit.images.width["median"], audit.images.height["median"])
    return next(
        entry
        for entry in entries
        if (entry["data"], entry["regime"]) == (audit.kind, options.regime)
        and all(found[name] <= entry[name] for name in found if name in entry)
    )


def fitted_lengths(
    settings: Mapping[str, Any], updates: Sequence[float], audit: Audit
) -> dict[str, int]:
    """Batch size and epochs, where others fit the set better than those of the table.

    There are to be eight batches an epoch, and in all as many optimizer steps as ``updates``, the
    least and the greatest number, allow; at least one epoch, and four times the table's at most.
    """
    samples, batch_size = audit.sizes[TRAIN], settings["batch_size"]
    while batch_size > 8 and batch_size * 8 > samples:
        batch_size //= 2
    steps = math.ceil(samples / batch_size)
    least, most = math.ceil(updates[0] / steps), max(updates[1] // steps, 1)
    least = min(least, MOST_EPOCHS * settings["epochs"])
    epochs = int(min(max(settings["epochs"], least), most))
    fitted = {"batch_size": batch_size, "epochs": epochs}
    return {name: value for name, value in fitted.items() if value != settings[name]}


def advised_length(audit: Audit) -> int:
    """Tokens that 95 % of the texts do not exceed; without a tokenizer three for two words."""
    assert audit.texts is not None
    tokens, words = audit.texts.tokens, audit.texts.words
    longest = tokens["95 %"] if tokens else 1.5 * words["95 %"] + 2
    return int(np.clip(16 * math.ceil(longest / 16), 16, 512))


def worded(settings: Mapping[str, Any], names: Mapping[str, Any]) -> str:
    """The settings of an entry, with the values that are advised."""
    return ", ".join(f"{name} {settings[name]}" for name in names) or "-"


def evidence(entry: Mapping[str, Any]) -> str:
    """What was measured, or that nothing was."""
    where = f'{EVIDENCE}, "{entry["evidence"]}".' if entry["evidence"] else "No evidence here."
    return f"{where} {entry['says']}"


def as_words(flags: Mapping[str, Any]) -> str:
    """Flags as they are typed into a shell."""
    words = []
    for name, value in flags.items():
        words += [f"--{name}"] if value is True else [f"--{name}", shlex.quote(f"{value}")]
    return " ".join(words)


if __name__ == "__main__":
    main(chosen)
