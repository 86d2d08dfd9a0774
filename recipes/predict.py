"""Classify images or texts with a trained model: a table of classes and probabilities.

    python recipes/predict.py runs/photos --dataset new_photos --output photos.csv
    python recipes/predict.py path/to/bert --dataset tickets.csv --output tickets.parquet
    torchrun --nproc_per_node 4 recipes/predict.py path/to/bert --dataset tickets.csv

MODEL, the first word, is a run folder, a folder that transformers wrote, a folder or file
(``model_best.pth.tar``) of timm's ``train.py``, or a name of timm (``local-dir:...``,
``hf-hub:...``). ``--dataset`` is a folder of images, whose subfolders count, too, one image, or a
table (CSV, TSV, JSON Lines, parquet) that names image files; of texts such a table, a ``.txt`` file
with one a line, or a folder of them. Labels are not needed; ``recipes/evaluate.py`` uses them.

A row an example: its name, the likeliest class with its probability, the next likeliest
(``--top``), and ``error`` where an image cannot be read or a text is missing. Rows are written as
they come, so a command that was stopped goes on when it is given again, also on more or fewer
processes, and memory does not grow with their number. Several processes write the same table, row
by row, as one; of a probability the last of its seven digits may differ, as float32 rounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from tqdm import tqdm
from trained import Host, SharedOptions, command_line, find_host, head_layer, join_processes

from ldam_plugins.data.unlabelled import UNREAD, unlabelled_images, unlabelled_texts
from ldam_plugins.integrations.transformers.trained_model import TEXTS
from ldam_plugins.metrics import Predictions
from ldam_plugins.posthoc import extract_features
from ldam_plugins.training import keep_freed_memory
from ldam_plugins.training.options import COUNT, Limits, invalid, option
from ldam_plugins.training.part_files import TABLE_FORMATS, PartFiles, file_stamps

MODEL_FILES = (".safetensors", ".bin", ".json", ".pth", ".tar")
SHOWN = 5


@dataclass
class PredictOptions(SharedOptions):
    """Which model classifies what."""

    LIMITS: ClassVar[dict[str, Limits]] = SharedOptions.LIMITS | {"top": COUNT, "rows": COUNT}

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

    def makes(self) -> dict[str, Any]:
        """What the rows depend on."""
        without_effect = {"output", "output_dir", "overwrite", "quiet", "traceback", "workers"}
        without_effect |= {"num_processes"}
        folder = Path(self.model.removeprefix("local-dir:"))
        return {
            **{k: v for k, v in asdict(self).items() if k not in without_effect},
            "content of model": file_stamps(folder, folder / "model", suffixes=MODEL_FILES),
            "content of dataset": [] if Path(self.dataset).is_dir() else file_stamps(self.dataset),
        }


def main(options: PredictOptions, flags: list[str] | None = None) -> Path:
    """Classify; returns the path of the table."""
    if flags:
        raise invalid("arguments", "options of this recipe", flags[0], hint="--help lists them.")
    processes = join_processes(options)
    disable_progress_bars()  # of datasets: there is one for all rows
    host, _ = find_host(options)
    classes = class_names(host)
    columns = header(min(options.top, len(classes)))
    doubles = dict.fromkeys((n for n in columns if n.startswith("probability")), "double")
    table, sizes = PartFiles(options.output, columns, doubles), []
    if processes.is_main_process:  # reads all once, so that nothing is found too late
        every = (names for names, _ in find_samples(options, host))
        sizes = table.begin(options.makes(), every, anew=options.overwrite)
    processes.wait_for_everyone()
    done = sum(size for index, size in enumerate(sizes) if table.is_done(index))
    quiet = options.quiet or not processes.is_main_process
    if done and not quiet:
        print(f"{table.folder}: going on after {done} of {sum(sizes)} rows.")
    bar = tqdm(total=sum(sizes), initial=done, unit="row", disable=quiet)
    with keep_freed_memory(processes.device), bar:
        for index, (names, samples) in enumerate(find_samples(options, host)):
            if index % processes.num_processes != processes.process_index or table.is_done(index):
                continue
            found = predict(host, samples, classes, options.top, processes.device)
            table.write(
                index,
                ((n, *values, error) for n, (error, values) in zip(names, found, strict=True)),
            )
            bar.update(sum(s for i, s in enumerate(sizes) if table.is_done(i)) - bar.n)
    processes.wait_for_everyone()
    if processes.is_main_process:
        unread = [row[0] for row in table.rows(len(sizes)) if row[-1]]
        table.finish(len(sizes))
        if not options.quiet:
            print(f"{options.output}: {sum(sizes)} rows{worded_unread(unread)}.")
    processes.wait_for_everyone()
    return Path(options.output)


def worded_unread(names: list[str]) -> str:
    """How many rows have no prediction, and the first of them."""
    if not names:
        return ""
    more = ", ..." if len(names) > SHOWN else ""
    first = ", ".join(names[:SHOWN])
    return f", {len(names)} of them without a prediction (column `error`): {first}{more}"


def find_samples(options: PredictOptions, host: Host) -> Iterator[tuple[list[str], Any]]:
    """The names of some examples, and the examples, until there are no more."""
    given: Any = {
        "encoding": options.encoding,
        "delimiter": options.delimiter,
        "rows": options.rows,
    }
    if host.kind == TEXTS:
        for part in unlabelled_texts(options.dataset, text_column=options.text_column, **given):
            yield part.names, part
        return
    for images in unlabelled_images(options.dataset, image_column=options.image_column, **given):
        # A file name may hold bytes that are no text.
        yield [n.encode("utf-8", "backslashreplace").decode() for n in images.names], images


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
    host: Host, samples: Any, classes: list[str], top: int, device: torch.device
) -> list[tuple[str, list[str]]]:
    """Of each row what is wrong with it, or classes and probabilities by turns."""
    predictions = Predictions(len(classes), top=top)
    names = header(predictions.top)[1:-1]
    if host.kind == TEXTS:
        texts = samples.texts()
        lines = [("cannot be read" if t is None else "no text", [""] * len(names)) for t in texts]
        full = [row for row, text in enumerate(texts) if text and not text.isspace()]
        full.sort(key=lambda row: len(texts[row]))  # texts of like length need little padding
        kept = [texts[row] for row in full]
        part = Dataset.from_dict({"text": kept, "label": np.zeros(len(full), dtype=np.int64)})
    else:
        lines = [("cannot be read", [""] * len(names)) for _ in samples.names]
        full, part = list(range(len(lines))), samples
    if full:
        found = extract_features(host.model, host.make_loader(part), device=device)
        predictions.update(range(len(full)), found.logits)
        table = predictions.columns([""] * len(full))
        for at, (row, state) in enumerate(zip(full, found.labels.tolist(), strict=True)):
            values = [table[name][at] for name in names]
            words = [f"{v:.7g}" if isinstance(v, float) else classes[v] for v in values]
            lines[row] = ("", words) if state != UNREAD else lines[row]
    return lines


if __name__ == "__main__":
    main(*command_line(PredictOptions))
