"""Write the tables and plots of README.md from the results under ``recipes/results``.

    python recipes/results_tables.py            # print the tables
    python recipes/results_tables.py --write    # put them into README.md, and draw its plots

A folder of results is one experiment; each file in it is the record of one run, as
``recipes/benchmark.py`` leaves it: ``cp -r runs/NAME/results recipes/results/NAME``. In README.md,
what is between ``<!-- results: EXPERIMENT [KIND [BASELINE]] [OPTION=VALUE,...] -->`` and
``<!-- end -->`` is made anew, from the runs whose options have one of the values. Kinds are
``range`` (the default), ``intervals``, ``matrix`` and ``compare`` (with a baseline as of the
benchmark), and the plots ``errors``, ``curves`` and ``heat_map``, which are of all runs. After
``<!-- timings: FILE SECTION ... -->`` come sections of a file that ``recipes/speed.py`` left
under ``recipes/timings``.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from ldam_plugins._checks import check_choice, must_be
from ldam_plugins.experiment_plots import PLOTS
from ldam_plugins.experiment_tables import (
    comparison_rows,
    interval_rows,
    markdown,
    matrix_rows,
    range_rows,
    ratio_matrix,
    ratio_rows,
)
from ldam_plugins.experiments import Record, error_matrices, read_records, shown
from ldam_plugins.run_files import write_atomic

RESULTS = Path(__file__).parent / "results"
TIMINGS = Path(__file__).parent / "timings"
README = Path(__file__).parents[1] / "README.md"
MARKED = r"(<!-- results: (\w+)((?: \S+)*) -->)\n.*?(<!-- end -->)"
TIMED = r"(<!-- timings: (\w+)((?: \w+)+) -->)\n.*?(<!-- end -->)"


def matrices(records: list[Record]) -> str:
    """A table a combination of the options beside loss and schedule."""
    parts = []
    for title, cells in error_matrices(records).items():
        parts += [title] if title else []
        parts.append(markdown(matrix_rows(cells)))
    return "\n\n".join(parts)


TABLES: dict[str, Callable[[list[Record]], str]] = {
    "range": lambda records: markdown(range_rows(records)),
    "intervals": lambda records: markdown(interval_rows(records)),
    "matrix": matrices,
}


def content(experiment: str, words: Sequence[str] = ()) -> str:
    """What belongs between the markers, of which the words are: a table, or the place of a plot."""
    filters = [word for word in words if re.fullmatch(r"\w+=[^=]+", word)]
    kind, *baseline = [word for word in words if word not in filters] or ["range"]
    check_choice("kind", kind, [*TABLES, "compare", *PLOTS])
    if len(baseline) > (kind == "compare"):
        raise ValueError(must_be("words", f"those of {kind!r}", words))
    if kind in PLOTS:
        return f"![{PLOTS[kind][0]}]({plot_path(experiment, kind).relative_to(README.parent)})"
    records = read_records(RESULTS / experiment)
    for name, _, values in (word.partition("=") for word in filters):
        check_choice("option", name, records[0]["options"])
        records = [r for r in records if shown(r["options"][name]) in values.split(",")]
    if not records:
        raise ValueError(must_be("words", "of options that some runs have", words))
    if kind == "compare":
        return markdown(comparison_rows(records, *baseline))
    return TABLES[kind](records)


def timings(name: str, sections: list[str]) -> str:
    """The ratios of some sections of a file of timings; those of the losses as a matrix."""
    kept = json.loads((TIMINGS / f"{name}.json").read_text(encoding="utf-8"))
    known = {row["section"] for row in kept["rows"]}
    for section in sections:
        check_choice("section", section, known)
    rows = [row for row in kept["rows"] if row["section"] in sections]
    return markdown(ratio_matrix(rows) if sections == ["loss"] else ratio_rows(rows))


def plot_path(experiment: str, kind: str) -> Path:
    """Where the plot of an experiment is kept."""
    return RESULTS / experiment / f"{kind}.png"


def fill(text: str) -> str:
    """The text with everything between its markers made anew."""

    def fresh(match: re.Match[str]) -> str:
        return f"{match[1]}\n{content(match[2], match[3].split())}\n{match[4]}"

    def timed(match: re.Match[str]) -> str:
        return f"{match[1]}\n{timings(match[2], match[3].split())}\n{match[4]}"

    text = re.sub(MARKED, fresh, text, flags=re.DOTALL)
    return re.sub(TIMED, timed, text, flags=re.DOTALL)


def plots_of(text: str) -> list[tuple[str, str]]:
    """Experiment and kind of each plot that the text shows."""
    found = re.finditer(MARKED, text, flags=re.DOTALL)
    return [(match[2], match[3].strip()) for match in found if match[3].strip() in PLOTS]


def main() -> None:
    """Print the tables, or write them and the plots of the README."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="write into README.md")
    if parser.parse_args().write:
        text = fill(README.read_text(encoding="utf-8"))
        for experiment, kind in plots_of(text):
            _, draw = PLOTS[kind]
            write_atomic(plot_path(experiment, kind), draw(read_records(RESULTS / experiment)))
        README.write_text(text, encoding="utf-8")
    else:
        for folder in sorted(RESULTS.iterdir()):
            print(f"{folder.name}\n\n{content(folder.name, ['intervals'])}\n")


if __name__ == "__main__":
    main()
