"""Classify images or texts with a trained model: a table of classes and probabilities.

    python recipes/predict.py runs/photos --dataset new_photos --output photos.csv
    python recipes/predict.py path/to/bert --dataset tickets.csv --output tickets.parquet

MODEL, the first word, is a run folder, a folder that transformers wrote, a folder or file
(``model_best.pth.tar``) of timm's ``train.py``, or a name of timm (``local-dir:...``,
``hf-hub:...``). ``--dataset`` is a folder of images, whose subfolders count, too, one image, or a
table (CSV, TSV, JSON Lines, parquet) that names image files; of texts such a table, a ``.txt`` file
with one a line, or a folder of them. Labels are not needed; ``recipes/evaluate.py`` uses them.

A row an example: its name, the likeliest class with its probability, the next likeliest
(``--top``), and ``error`` where an image cannot be read or a text is missing. Rows are written as
they come, so a command that was stopped goes on when it is given again.
"""

from __future__ import annotations

import csv
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from datasets import Dataset, disable_progress_bars
from tqdm import tqdm
from trained import Host, TrainedOptions, command_line, find_host, head_layer

from ldam_plugins.data.unlabelled import UNREAD, unlabelled_images, unlabelled_texts
from ldam_plugins.integrations.transformers.trained_model import TEXTS
from ldam_plugins.metrics import Predictions
from ldam_plugins.posthoc import extract_features
from ldam_plugins.training import default_device, keep_freed_memory, write_atomic
from ldam_plugins.training.options import COUNT, Limits, invalid, option

FORMATS = (".csv", ".parquet")


@dataclass
class PredictOptions(TrainedOptions):
    """Which model classifies what."""

    LIMITS: ClassVar[dict[str, Limits]] = TrainedOptions.LIMITS | {"top": COUNT, "rows": COUNT}

    dataset: str = option("", "folder or file of what is classified")
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
    rows: int = option(4096, "rows that are written at a time")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.dataset.strip():
            raise invalid("dataset", "what is to be classified", self.dataset)
        if Path(self.output).suffix.lower() not in FORMATS:
            raise invalid("output", f"a file that ends in {' or '.join(FORMATS)}", self.output)
        if Path(self.output).exists() and not self.overwrite:
            hint = "Choose another one, or --overwrite it."
            raise invalid("output", "a file that is not there", self.output, hint=hint)

    def makes(self) -> dict[str, Any]:
        """What the rows depend on."""
        without_effect = {"output", "output_dir", "overwrite", "quiet", "traceback", "workers"}
        return {k: v for k, v in asdict(self).items() if k not in {*without_effect, "rows"}}


def main(options: PredictOptions, flags: list[str] | None = None) -> Path:
    """Classify; returns the path of the table."""
    if flags:
        raise invalid("arguments", "options of this recipe", flags[0], hint="--help lists them.")
    disable_progress_bars()  # of datasets: there is one for all rows
    host, _ = find_host(options)
    examples, samples = find_samples(options, host)
    classes = class_names(host)
    partial, state = (Path(f"{options.output}.{end}") for end in ("partial", "partial.json"))
    done = rows_done(partial, state, options, examples)
    if done and not options.quiet:
        print(f"{partial}: going on after {done} of {len(examples)} rows.")
    device = default_device()
    columns = header(min(options.top, len(classes)))
    unread = 0
    with keep_freed_memory(device), partial.open("a", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if not file.tell():
            writer.writerow(columns)
        bar = tqdm(total=len(examples), initial=done, unit="row", disable=options.quiet)
        for start in range(done, len(examples), options.rows):
            chunk = range(start, min(start + options.rows, len(examples)))
            found = predict(host, samples, chunk, classes, options.top, device)
            for row, (error, values) in zip(chunk, found, strict=True):
                writer.writerow([examples[row], *values, error])
                unread += bool(error)
            file.flush()
            bar.update(len(chunk))
        bar.close()
    finish(partial, state, Path(options.output))
    if not options.quiet:
        without = f", {unread} of them without a prediction (column `error`)" if unread else ""
        print(f"{options.output}: {len(examples)} rows{without}.")
    return Path(options.output)


def find_samples(options: PredictOptions, host: Host) -> tuple[list[str], Any]:
    """The names of the examples, and the examples as the model's loader takes them."""
    given = {"encoding": options.encoding, "delimiter": options.delimiter}
    if host.kind == TEXTS:
        names, texts = unlabelled_texts(options.dataset, text_column=options.text_column, **given)
        return names, Dataset.from_dict({"text": texts, "label": [0] * len(texts)})
    images = unlabelled_images(options.dataset, image_column=options.image_column, **given)
    # A file name may hold bytes that are no text.
    return [n.encode("utf-8", "backslashreplace").decode() for n in images.names], images


def class_names(host: Host) -> list[str]:
    """The names of the classes in the order of the logits; their numbers where there are none."""
    if host.class_names is not None:
        return list(host.class_names)
    return [str(index) for index in range(head_layer(host.model).weight.shape[0])]


def header(top: int) -> list[str]:
    """The columns of the table."""
    ranks = ["", *(f"_{rank}" for rank in range(2, top + 1))]
    pairs = [f"{name}{rank}" for rank in ranks for name in ("predicted", "probability")]
    return ["example", *pairs, "error"]


def predict(
    host: Host, samples: Any, rows: range, classes: list[str], top: int, device: torch.device
) -> list[tuple[str, list[str]]]:
    """Of each row what is wrong with it, or classes and probabilities by turns."""
    predictions = Predictions(len(classes), top=top)
    names = header(predictions.top)[1:-1]
    if host.kind == TEXTS:
        texts = samples.select(rows)
        full = [row for row, text in enumerate(texts["text"][:]) if text.strip()]
        part, missing = texts.select(full), "no text"
    else:
        part, full, missing = samples.subset(rows), list(range(len(rows))), "cannot be read"
    lines = [(missing, [""] * len(names)) for _ in rows]
    if full:
        found = extract_features(host.model, host.make_loader(part), device=device)
        predictions.update(range(len(full)), found.logits)
        table = predictions.columns([""] * len(full))
        for at, (row, state) in enumerate(zip(full, found.labels.tolist(), strict=True)):
            values = [table[name][at] for name in names]
            words = [f"{v:.7g}" if isinstance(v, float) else classes[v] for v in values]
            lines[row] = ("", words) if state != UNREAD else lines[row]
    return lines


def rows_done(partial: Path, state: Path, options: PredictOptions, examples: list[str]) -> int:
    """How many rows a stopped command of the same kind has written; what it left half is cut off.

    Raises:
        ValueError: it was another command, or of other examples.
    """
    hint = f"Delete {partial} to begin anew, or give the same options and data again."
    made = json.dumps(options.makes())
    if not partial.exists() or options.overwrite:
        partial.unlink(missing_ok=True)
        write_atomic(state, made.encode())
        return 0
    if not state.exists() or state.read_text(encoding="utf-8") != made:
        raise ValueError(f"{partial} was begun with other options. {hint}")
    with partial.open("rb+") as file:
        whole = file.read()
        file.truncate(whole.rfind(b"\n") + 1)
    with partial.open(encoding="utf-8", newline="") as text:
        names = [row[0] for row in csv.reader(text)][1:]
    if names != examples[: len(names)]:
        raise ValueError(f"{partial} is of other examples. {hint}")
    return len(names)


def finish(partial: Path, state: Path, output: Path) -> None:
    """Put the whole table where it was asked for."""
    if output.suffix.lower() == ".parquet":
        table = pd.read_csv(partial, dtype=str, keep_default_na=False)
        for name in table.columns:
            if name.startswith("probability"):
                table[name] = pd.to_numeric(table[name], errors="coerce")
        write_atomic(output, table.to_parquet(index=False))
        partial.unlink()
    else:
        partial.replace(output)
    state.unlink()


if __name__ == "__main__":
    main(*command_line(PredictOptions))
