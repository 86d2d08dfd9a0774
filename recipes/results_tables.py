"""Write the tables and plots of the documents from the results under ``recipes/results``.

    python recipes/results_tables.py            # print the tables
    python recipes/results_tables.py --add NAME runs/GRID/results.jsonl   # take in a grid's runs
    python recipes/results_tables.py --write    # put tables into the documents, and draw the plots

Documents are README.md and the README.md of ``recipes/results``.
``recipes/results/NAME.jsonl`` is one experiment, a line of it the record of one run, as
``recipes/benchmark.py`` leaves it in the folder of a grid. ``--add`` puts the records of such a
file into an experiment, or begins one; records of the same name are replaced.

In a document what is between ``<!-- results: EXPERIMENT [KIND [BASELINE]] [OPTION=VALUE,...] -->``
and ``<!-- end -->`` is made anew, from the runs whose options have one of the values. Kinds are
``range`` (the default), ``intervals``, ``matrix`` (of the balanced error), ``matrices`` (of the
train-prior error as well), ``grid`` (one table, a row a head and loss), ``compare`` (with a
baseline as of the benchmark), ``parts`` (head, margin and deferral, of this experiment and of
others that are named after it) and ``regret`` (what the choice of options that is named after it
gives away to the best on each data set), and the plots
``errors``, ``curves`` and ``heat_map``, which are of all runs. After
``<!-- timings: FILE [SECTION ...] -->`` come sections of a file that ``recipes/speed.py`` left
under ``recipes/timings``, after ``<!-- probes: FILE [SCHEDULE ...] -->`` the means of a file
that ``recipes/linear_probe.py`` left under ``recipes/probes``.
"""

from __future__ import annotations

from options import flags_alone
from study_options import TablesOptions

if __name__ == "__main__":  # --help and a misspelt flag are answered before torch is imported
    chosen = flags_alone(TablesOptions)

import json
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pandas as pd

from ldam_plugins.benchmark.captions import Caption, row_caption
from ldam_plugins.benchmark.plots import PLOTS
from ldam_plugins.benchmark.records import Record, add_records, read_records
from ldam_plugins.benchmark.settings import shown
from ldam_plugins.benchmark.tables import (
    VIEWS,
    Row,
    comparison_caption,
    comparison_rows,
    decomposition_rows,
    error_matrices,
    grid_rows,
    interval_rows,
    markdown,
    matrix_captions,
    matrix_heads,
    matrix_rows,
    range_rows,
    regret_rows,
    spread,
)
from ldam_plugins.benchmark.timings import ratio_matrix, ratio_rows
from ldam_plugins.schedules import KINDS
from ldam_plugins.training.files import write_atomic
from ldam_plugins.training.options import check_choice, invalid

RESULTS = Path(__file__).parent / "results"
TIMINGS = Path(__file__).parent / "timings"
PROBES = Path(__file__).parent / "probes"
DOCUMENTS = (Path(__file__).parents[1] / "README.md", RESULTS / "README.md")
MARKED = r"(<!-- (results|timings|probes): (\w+)((?: \S+)*) -->)\n.*?(<!-- end -->)"

# Column of a table of probes: the moment, the column of the file, and what it is multiplied by.
PROBED = {
    "probe before the switch, error %": ("before", "top1_error", 1.0),
    "its few-shot accuracy %": ("before", "few", 100.0),
    "probe at the end, error %": ("last", "top1_error", 1.0),
    "few-shot accuracy at the end %": ("last", "few", 100.0),
    "error % of the run itself": ("last", "top1_error_of_run", 1.0),
}


def captioned(rows: Sequence[Row], caption: Caption) -> str:
    """A table, and below it what its caption must say."""
    return "\n\n".join(filter(None, [markdown(rows), caption.markdown()]))


def matrix_tables(records: list[Record], views: Sequence[str] = ("balanced_error",)) -> str:
    """A table of each error for each combination of the options beside loss and schedule."""
    parts: list[str] = []
    heads, captions = matrix_heads(records), matrix_captions(records)
    for view in views:
        for title, matrix in error_matrices(records, view).items():
            name = VIEWS[view] if len(views) > 1 else ""
            parts += filter(None, [", ".join(filter(None, [name, title]))])
            parts.append(captioned(matrix_rows(matrix, heads[title]), captions[title]))
    return "\n\n".join(parts)


TABLES: dict[str, Callable[[list[Record]], str]] = {
    "range": lambda records: captioned(range_rows(records), row_caption(records)),
    "intervals": lambda records: captioned(interval_rows(records), row_caption(records)),
    "grid": lambda records: captioned(grid_rows(records), row_caption(records)),
    "matrix": matrix_tables,
    "matrices": partial(matrix_tables, views=tuple(VIEWS)),
}


def content(experiment: str, words: Sequence[str] = (), folder: Path = RESULTS) -> str:
    """What belongs between the markers, of which the words are: a table, or the place of a plot.

    Args:
        experiment: Name of a file in ``RESULTS``.
        words: Kind, baseline and options.
        folder: Of the document, which a plot's place is relative to.
    """
    filters = [word for word in words if re.fullmatch(r"\w+=[^=]+", word)]
    kind, *baseline = [word for word in words if word not in filters] or ["range"]
    check_choice("kind", kind, [*TABLES, "compare", "parts", "regret", *PLOTS])
    if len(baseline) > (kind == "compare") and kind != "parts":
        raise invalid("words", f"those of {kind!r}", words)
    if kind in PLOTS:
        place = os.path.relpath(plot_path(experiment, kind), folder)
        return f"![{PLOTS[kind][0]}]({Path(place).as_posix()})"
    if kind == "parts":
        named = {name: chosen_records(name, filters) for name in [experiment, *baseline]}
        return markdown(decomposition_rows(named))
    if kind == "regret":
        choice = dict(word.split("=") for word in filters)
        return markdown(regret_rows(read_records(records_path(experiment)), choice))
    records = chosen_records(experiment, filters)
    if kind == "compare":
        rows = comparison_rows(records, *baseline)
        return captioned(rows, comparison_caption(records, *baseline))
    return TABLES[kind](records)


def chosen_records(experiment: str, filters: Sequence[str]) -> list[Record]:
    """The records of an experiment whose options have one of the values: ``option=value,...``."""
    records = read_records(records_path(experiment))
    for name, _, values in (word.partition("=") for word in filters):
        check_choice("option", name, records[0]["options"])
        records = [r for r in records if shown(r["options"][name]) in values.split(",")]
    if not records:
        raise invalid("words", "of options that some runs have", filters)
    return records


def timing_table(name: str, sections: Sequence[str] = ()) -> str:
    """The ratios of some sections of a file of timings; those of the losses as a matrix."""
    kept = json.loads((TIMINGS / f"{name}.json").read_text(encoding="utf-8"))
    if "section" not in kept["rows"][0]:  # of recipes/speed_posthoc.py, which has no peer
        return markdown([{key: f"{value}" for key, value in row.items()} for row in kept["rows"]])
    known = {row["section"] for row in kept["rows"]}
    for section in sections:
        check_choice("section", section, known)
    rows = [row for row in kept["rows"] if row["section"] in (sections or known)]
    return markdown(ratio_matrix(rows) if sections == ["loss"] else ratio_rows(rows))


def probe_table(name: str, schedules: Sequence[str] = KINDS) -> str:
    """Linear probes before the switch and at the end, and the runs themselves; mean and range."""
    probes = pd.read_csv(PROBES / f"{name}.csv")
    probes.loc[probes["epochs"] == probes["epochs"].max(), "when"] = "last"
    groups = {key: group for key, group in probes.groupby(["loss", "schedule"])}
    table = []
    for loss in sorted(probes["loss"].unique()):
        for schedule in schedules:
            if (loss, schedule) in groups:
                of_moment = groups[loss, schedule].set_index("when")
                means = {
                    title: spread((scale * of_moment.loc[[when], column]).tolist())
                    for title, (when, column, scale) in PROBED.items()
                }
                table.append({"loss": loss, "schedule": schedule, **means})
    return markdown(table)


def records_path(experiment: str) -> Path:
    """Where the records of an experiment are kept."""
    return RESULTS / f"{experiment}.jsonl"


def plot_path(experiment: str, kind: str) -> Path:
    """Where a plot of an experiment is kept."""
    return RESULTS / experiment / f"{kind}.png"


def fill(text: str, folder: Path = RESULTS) -> str:
    """The text of a document in ``folder`` with everything between its markers made anew."""
    makers: dict[str, Callable[..., str]] = {
        "results": partial(content, folder=folder),
        "timings": timing_table,
        "probes": probe_table,
    }

    def fresh(match: re.Match[str]) -> str:
        marker, kind, name, words, end = match.groups()
        made = makers[kind](name, words.split()) if words else makers[kind](name)
        return f"{marker}\n{made}\n{end}"

    return re.sub(MARKED, fresh, text, flags=re.DOTALL)


def plots_of(text: str) -> list[tuple[str, str]]:
    """Experiment and kind of each plot that the text shows."""
    found = re.finditer(MARKED, text, flags=re.DOTALL)
    return [(match[3], match[4].strip()) for match in found if match[4].strip() in PLOTS]


def main(options: TablesOptions) -> None:
    """Print the tables, add records, or write the tables and plots of the documents."""
    if options.add:
        name, file = options.add
        add_records(records_path(name), read_records(file))
    if options.write:
        write_documents()
    elif not options.add:
        for name in experiments():
            print(f"{name}\n\n{content(name, ['intervals'])}\n")


def experiments() -> list[str]:
    """Names of the experiments that are kept."""
    return sorted(path.stem for path in RESULTS.glob("*.jsonl"))


def write_documents() -> None:
    """Make the tables of the documents, and the plots they show, anew."""
    for document in DOCUMENTS:
        text = fill(document.read_text(encoding="utf-8"), document.parent)
        for experiment, kind in plots_of(text):
            _, draw = PLOTS[kind]
            path = plot_path(experiment, kind)
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, draw(read_records(records_path(experiment))))
        document.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(chosen)
