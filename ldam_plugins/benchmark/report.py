"""What an experiment leaves behind: records, one tidy CSV and Parquet, tables, plots and a page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ldam_plugins.benchmark.captions import Caption, row_caption
from ldam_plugins.benchmark.plots import PLOTS
from ldam_plugins.benchmark.records import UNKNOWN, Record, write_records
from ldam_plugins.benchmark.settings import head_of, shown, varying_options
from ldam_plugins.benchmark.tables import (
    VIEWS,
    Row,
    comparison_caption,
    comparison_rows,
    equal_test_classes,
    error_matrices,
    interval_rows,
    markdown,
    matrix_captions,
    matrix_heads,
    matrix_rows,
    tidy_table,
)
from ldam_plugins.reports.html import Plot, render
from ldam_plugins.training.files import write_atomic
from ldam_plugins.training.run_dir import MAY_CHANGE

RECORDS_FILE, TABLES_FILE, PAGE_FILE = "results.jsonl", "results.md", "report.html"
CSV_FILE, PARQUET_FILE = "results.csv", "results.parquet"


class _Section(NamedTuple):
    """A table of the page."""

    title: str
    note: str
    caption: Caption
    rows: list[Row]


_NOTE_ON_INTERVALS = (
    "Mean and 95 % interval (Student's t) over the seeds; one seed has none. A dash: the default, "
    "or no class. "
)
_NOTE_ON_MATRIX = "Mean and 95 % interval (Student's t) over n seeds. A dash: not run. "
_NOTE_ON_HEADS = "Of rows with different heads the difference is that of head and method together. "
_NOTE_ON_ERRORS = (
    "Balanced error: 100 less the mean accuracy of the classes, each counting once. Train-prior "
    "error: each counting as often as it is in the training samples. "
)
_NOTE_ON_EQUAL_CLASSES = (
    "The classes of the test set are of one size, so the balanced error is the top-1 error. "
)
_NOTE_ON_PAIRS = (
    "Paired t-tests on the same seeds and samples; negative is less error than the baseline's. The "
    "interval and p are of the row alone. "
    "p (Holm) is corrected for the number of tests, and at 0.05 decides what the row says. "
    "Detectable is the difference that a row, so corrected, would tell from noise in 80 % of such "
    "experiments, were the spread the one seen (sd of differences): smaller ones may be there and "
    "are not told. The difference in train-prior error stands beside it with its interval and is "
    "not tested. "
)


def write_experiment(
    output_dir: str | os.PathLike[str],
    records: Sequence[Record],
    *,
    failed: Mapping[str, str] | None = None,
    baseline: str = "erm",
) -> Path:
    """Write what the records say.

    ``results.jsonl`` with the record of each run, to be kept; ``results.csv`` and the same as
    ``results.parquet``, one row a run; ``results.md``; ``report.html`` with its plots inside, and
    the plots as PNG.

    Args:
        output_dir: Folder of the experiment.
        records: At least one.
        failed: Name and message of each run that failed; they are listed.
        baseline: What each method is compared with, as for
            :func:`~ldam_plugins.benchmark.tables.comparisons`.

    Returns:
        The path of the page.
    """
    folder, failed = Path(output_dir), failed or {}
    folder.mkdir(parents=True, exist_ok=True)
    write_records(folder / RECORDS_FILE, records)
    table = tidy_table(records)
    write_atomic(folder / CSV_FILE, table.to_csv(index=False, lineterminator="\n").encode())
    write_atomic(folder / PARQUET_FILE, table.to_parquet(index=False))
    sections = _sections(records, baseline)
    write_atomic(folder / TABLES_FILE, _markdown_page(sections, failed).encode())
    plots = [
        Plot(f"{name}.png", title, draw(records), draw(records, dark=True))
        for name, (title, draw) in PLOTS.items()
        if name != "heat_map" or error_matrices(records)
    ]
    for plot in plots:
        write_atomic(folder / plot.file, plot.light)
    page = render(
        "experiment.html.jinja",
        title=f"Benchmark on {_values(records, 'dataset')}",
        subtitle=_subtitle(records, failed),
        plots=plots,
        sections=sections,
        failed=failed,
        common=_common(records),
        versions=_versions(records),
    )
    write_atomic(folder / PAGE_FILE, page)
    return folder / PAGE_FILE


def _sections(records: Sequence[Record], baseline: str) -> list[_Section]:
    """Each table, with its note and caption."""
    errors = _NOTE_ON_ERRORS + (_NOTE_ON_EQUAL_CLASSES if equal_test_classes(records) else "")
    heads = _NOTE_ON_HEADS if len({head_of(record) for record in records}) > 1 else ""
    note = _NOTE_ON_INTERVALS + errors + heads
    sections = [_Section("Methods", note, row_caption(records), interval_rows(records))]
    captions, heads_of = matrix_captions(records), matrix_heads(records)
    for view, name in VIEWS.items():
        for title, matrix in error_matrices(records, view).items():
            heading = ", ".join(filter(None, [f"{name}, %, by loss and schedule", title]))
            rows = matrix_rows(matrix, heads_of[title])
            sections.append(_Section(heading, _NOTE_ON_MATRIX + heads, captions[title], rows))
    pairs = comparison_rows(records, baseline)
    if pairs:
        heading = f"More than noise? Against {baseline}"
        caption = comparison_caption(records, baseline)
        sections.append(_Section(heading, _NOTE_ON_PAIRS + heads, caption, pairs))
    return sections


def _markdown_page(sections: Sequence[_Section], failed: Mapping[str, str]) -> str:
    parts = [
        f"## {title}\n\n{note}{caption.markdown()}".rstrip() + f"\n\n{markdown(rows)}\n"
        for title, note, caption, rows in sections
    ]
    if failed:
        entries = (f"`{name}`:\n\n```\n{message}\n```\n" for name, message in failed.items())
        parts.append("\n".join(["## Failed\n", *entries]))
    return "\n".join(parts)


def _subtitle(records: Sequence[Record], failed: Mapping[str, str]) -> str:
    minutes = sum(record["train_seconds"] for record in records) / 60
    time = f"{minutes / 60:.1f} hours" if minutes >= 60 else f"{minutes:.1f} minutes"
    parts = [f"{len(records)} runs", f"{time} of training"]
    parts += [f"{len(failed)} failed"] if failed else []
    return ", ".join([*parts, f"model {_values(records, 'model')}"])


def _values(records: Sequence[Record], option: str) -> str:
    return ", ".join(dict.fromkeys(str(record["options"].get(option, "-")) for record in records))


def _common(records: Sequence[Record]) -> dict[str, str]:
    """Options that all runs share."""
    left_out = {*varying_options(records), "seed", *MAY_CHANGE}
    left_out |= {name for record in records for name in record.get("tuned", {"given": ()})["given"]}
    options = records[0]["options"]
    return {name: shown(value) for name, value in options.items() if name not in left_out}


def _versions(records: Sequence[Record]) -> dict[str, str]:
    """Devices, precisions, and every version that was used."""
    found: dict[str, dict[str, None]] = {}
    for record in records:
        used = {"device": record["device"]}
        used |= {"mixed precision": record.get("mixed_precision", UNKNOWN), **record["versions"]}
        for name, value in used.items():
            found.setdefault(name, {})[value or "not installed"] = None
    return {name: ", ".join(values) for name, values in found.items()}
