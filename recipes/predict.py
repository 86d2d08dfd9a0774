"""Classify images or texts with a trained model: a table of classes and probabilities.

    python recipes/predict.py runs/photos --dataset new_photos --output photos.csv
    python recipes/predict.py path/to/bert --dataset tickets.csv --output tickets.parquet
    torchrun --nproc_per_node 4 recipes/predict.py path/to/bert --dataset tickets.csv

MODEL, the first word, is a run folder, a folder that transformers wrote, a folder or file
(``model_best.pth.tar``) of timm's ``train.py``, or a name of timm (``local-dir:...``,
``hf-hub:...``). ``--dataset`` is a folder of images, whose subfolders count, too, one image, or a
table (CSV, TSV, JSON Lines, parquet) that names image files; of texts such a table, a ``.txt`` file
with one a line, or a folder of them; or a hub id or a folder of parquet, of whose splits
``--split`` names one. Labels are not needed; ``recipes/evaluate.py`` uses them.

A row an example: its name, the likeliest class with its probability, the next likeliest
(``--top``), and ``error`` where an image cannot be read or a text is missing. Rows are written as
they come, so a command that was stopped goes on when it is given again, also on more or fewer
processes, and memory does not grow with their number. Several processes write the same table, row
by row, as one; of a probability the last of its seven digits may differ, as float32 rounds.

Thresholds that ``recipes/thresholds.py`` left beside the model are used, and said in a line: of two
classes the one above its threshold comes first, and where the model abstains ``predicted`` is empty
and ``abstained`` is yes (in parquet true). ``--thresholds none`` leaves them out.
"""

from __future__ import annotations

from trained_options import PredictOptions, command_line

if __name__ == "__main__":  # --help and a misspelt flag are answered before torch is imported
    chosen = command_line(PredictOptions)

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, disable_progress_bars
from tqdm import tqdm
from trained import (
    AUTOCAST,
    Host,
    find_host,
    find_precision,
    head_layer,
    join_processes,
    model_files,
)

from ldam_plugins.data.unlabelled import UNREAD, unlabelled_images, unlabelled_texts
from ldam_plugins.integrations.transformers.trained_model import TEXTS
from ldam_plugins.metrics import Predictions
from ldam_plugins.metrics.predictions import probabilities
from ldam_plugins.posthoc import Features, extract_features
from ldam_plugins.posthoc.thresholds import Thresholds, weights_digest
from ldam_plugins.training import keep_freed_memory
from ldam_plugins.training.options import invalid
from ldam_plugins.training.part_files import PartFiles
from ldam_plugins.training.run_dir import AUTO_TUNE_FILE

SHOWN = 5


def main(options: PredictOptions, flags: list[str] | None = None) -> Path:
    """Classify; returns the path of the table."""
    if flags:
        raise invalid("arguments", "options of this recipe", flags[0], hint="--help lists them.")
    processes = join_processes(options)
    disable_progress_bars()  # of datasets: there is one for all rows
    host, _ = find_host(options)
    classes = class_names(host)
    thresholds = find_thresholds(options, classes)
    columns = header(min(options.top, len(classes)), thresholds)
    types = dict.fromkeys((n for n in columns if n.startswith("probability")), "double")
    types |= {"abstained": "bool"} if "abstained" in columns else {}
    table, sizes = PartFiles(options.output, columns, types), []
    if processes.is_main_process:  # reads all once, so that nothing is found too late
        every = (names for names, _ in find_samples(options, host))
        sizes = table.begin(options.makes(), every, anew=options.overwrite)
    processes.wait_for_everyone()
    done = sum(sizes[index] for index in table.done()) if sizes else 0
    quiet = options.quiet or not processes.is_main_process
    if thresholds is not None and not quiet:
        print(f"{thresholds.worded()} --thresholds none leaves them out.")
    if done and not quiet:
        print(f"{table.folder}: going on after {done} of {sum(sizes)} rows.")
    options.quiet |= quiet
    tuned = find_precision(
        options,
        host,
        lambda: readable(host, next(find_samples(options, host))[1])[1],
        lambda: (sum(sizes) - done) // processes.num_processes,
        processes.device,
        kept=table.folder / AUTO_TUNE_FILE,
    )
    run = partial(
        extract_features, host.model, device=processes.device, autocast=AUTOCAST[tuned.precision]
    )
    bar = tqdm(total=sum(sizes), initial=done, unit="row", disable=quiet)
    with keep_freed_memory(processes.device), bar:
        for index, (names, samples) in enumerate(find_samples(options, host)):
            if index % processes.num_processes != processes.process_index or table.is_done(index):
                continue
            found = predict(host, samples, classes, options.top, run, thresholds)
            table.write(
                index,
                ((n, *values, error) for n, (error, values) in zip(names, found, strict=True)),
            )
            if sizes:  # the first process counts what all have done
                bar.update(sum(sizes[each] for each in table.done()) - bar.n)
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
        "split": options.split,
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


def find_thresholds(options: PredictOptions, classes: list[str]) -> Thresholds | None:
    """The thresholds, if there are some, after a check that they are those of this model."""
    file = options.thresholds_file()
    if file is None:
        return None
    found, files = Thresholds.load(file), model_files(options)
    hint = "Choose them anew by recipes/thresholds.py, or leave them out by --thresholds none."
    if list(found.class_names) != classes:
        raise invalid("thresholds", "those of the classes of the model", str(file), hint=hint)
    if found.weights is not None and files is not None and weights_digest(files) != found.weights:
        raise invalid("thresholds", "chosen for these weights", str(file), hint=hint)
    return found


def header(top: int, thresholds: Thresholds | None = None) -> list[str]:
    """The columns of the table."""
    ranks = ["", *(f"_{rank}" for rank in range(2, top + 1))]
    pairs = [f"{name}{rank}" for rank in ranks for name in ("predicted", "probability")]
    abstains = thresholds is not None and thresholds.abstain_below is not None
    return ["example", *pairs, *(["abstained"] if abstains else []), "error"]


def predict(
    host: Host,
    samples: Any,
    classes: list[str],
    top: int,
    run: Callable[[Any], Features],
    thresholds: Thresholds | None = None,
) -> list[tuple[str, list[str]]]:
    """Of each row what is wrong with it, or the columns between its name and that."""
    names = header(min(top, len(classes)), thresholds)[1:-1]
    if host.kind == TEXTS:
        states = ["cannot be read" if text is None else "no text" for text in samples.texts()]
    else:
        states = ["cannot be read"] * len(samples.names)
    lines = [(state, [""] * len(names)) for state in states]
    full, part = readable(host, samples)
    if full:
        found = run(host.make_loader(part))
        words = answers(found.logits, classes, top, thresholds)
        for row, state, values in zip(full, found.labels.tolist(), words, strict=True):
            lines[row] = ("", values) if state != UNREAD else lines[row]
    return lines


def readable(host: Host, samples: Any) -> tuple[list[int], Any]:
    """The rows that can be classified, as far as that is known yet, and their samples."""
    if host.kind != TEXTS:
        return list(range(len(samples.names))), samples
    texts = samples.texts()
    full = [row for row, text in enumerate(texts) if text and not text.isspace()]
    full.sort(key=lambda row: len(texts[row]))  # texts of like length need little padding
    kept = [texts[row] for row in full]
    labels = np.zeros(len(full), dtype=np.int64)
    return full, Dataset.from_dict({"text": kept, "label": labels})


def answers(
    logits: Any, classes: list[str], top: int, thresholds: Thresholds | None
) -> list[list[str]]:
    """Classes and probabilities of each row by turns, the answer first, and whether there is none.

    A row that is not answered keeps the probability of what is likeliest, but not its class.
    """
    predictions = Predictions(len(classes), top=top)
    predictions.update(range(len(logits)), logits)
    table = predictions.columns([""] * len(logits))
    columns = [table[name] for name in header(predictions.top)[1:-1]]
    rows = [
        [f"{v:.7g}" if isinstance(v, float) else classes[v] for v in values]
        for values in zip(*columns, strict=True)
    ]
    if thresholds is None:
        return rows
    shares = probabilities(logits).numpy()
    decided, _, abstained = thresholds.decide(shares)
    for row, answer, share, is_empty in zip(rows, decided, shares, abstained, strict=True):
        if row[0] != classes[answer]:  # of two classes the less likely one, by its threshold
            other = [*row[:2]]
            row[:2] = [classes[answer], f"{share[answer]:.7g}"]
            row[2:4] = other if len(row) > 2 else []
        if thresholds.abstain_below is not None:
            row[0] = "" if is_empty else row[0]
            row.append("yes" if is_empty else "no")
    return rows


if __name__ == "__main__":
    main(*chosen)
