"""Compare losses and schedules on your imbalance: a grid of recipe runs, a process each.

    python recipes/benchmark.py                                  # four methods on digits
    python recipes/benchmark.py digits --seeds 0 1 2 --jobs 2
    python recipes/benchmark.py cifar10_paper --set dataset=path/to/cifar10
    python recipes/benchmark.py --recipe text --preset banking77_lt --methods erm ldam_drw
    python recipes/benchmark.py --set dataset=path/to/own model=resnet18   # own data, all of it
    python recipes/benchmark.py digits --jobs 20 --launcher slurm --slurm partition=gpu mem_gb=8

A grid of ``recipes/grids`` (or a YAML or JSON file) may come first, flags after it override it;
``--set`` and ``--vary`` add to it. Methods are names (``ldam_drw``) or ``loss/schedule``, with
settings of their own after colons: ``ldam_drw:max_margin=0.3``. Every cell is a folder of
``--output_dir``: finished cells are skipped, so the same command goes on with a grid that was
stopped, and adds what is new. Failed cells are listed and the exit code is 1.

``--slurm`` takes the parameters of submitit (``pip install "ldam-plugins[slurm]"``), such as
``timeout_min=60``; a grid file has them as ``slurm: {timeout_min: 60}``.

Left in ``--output_dir``: ``report.html``, ``results.md``, ``results.csv`` and ``.parquet``, plots
as PNG, and ``results.jsonl`` with the record of each run a line, which
``recipes/results_tables.py --add`` puts into the results that the documents show.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from options import CoreOptions, as_flags, option, parse_options, read_file
from tqdm import tqdm
from transformers import HfArgumentParser

from ldam_plugins import ClassCounts
from ldam_plugins.benchmark.captions import row_caption
from ldam_plugins.benchmark.comparisons import read_baseline
from ldam_plugins.benchmark.grid import Cell, Grid, expand, in_cell
from ldam_plugins.benchmark.local import CellTask, Outcome, run_locally
from ldam_plugins.benchmark.records import collect_records
from ldam_plugins.benchmark.report import write_experiment
from ldam_plugins.benchmark.settings import by_setting
from ldam_plugins.benchmark.slurm import run_on_slurm, slurm_parameters
from ldam_plugins.benchmark.tables import interval_rows, markdown
from ldam_plugins.training.options import check_int

BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} runs in {elapsed}"
GRIDS = Path(__file__).parent / "grids"
RECIPES = {
    "vision": ("vision_lt", "VisionOptions", "digits_lt"),
    "text": ("text_lt", "TextOptions", "stdlib_lt"),
}
"""Module, options and the preset where neither one nor a data set is given."""


@dataclass
class BenchmarkOptions:
    """What is compared, and where it runs."""

    recipe: str = option("vision", "recipe of all cells", choices=tuple(RECIPES))
    preset: str = option(
        "", "preset of the recipe that all cells begin with [the recipe's, if no dataset is set]"
    )
    methods: list[str] = option([], "method, loss/schedule, or either with :option=value")
    losses: list[str] = option([], "losses, each with each of --schedules, beside --methods")
    schedules: list[str] = option([], "schedules, each with each of --losses")
    profiles: list[str] = option([], "long-tail profiles [the preset's, else none]")
    ratios: list[float] = option([], "imbalance ratios [the preset's]")
    seeds: list[int] = option([0], "seeds of the training")
    set: list[str] = option([], "option=value for all cells", action="extend")
    vary: list[str] = option([], "option=a,b,c: cells for each value", action="extend")
    output_dir: str = option("runs/benchmark", "folder of the grid")
    baseline: str = option("erm", "what others are compared with: erm, */none, ldam_drw:start=80")
    jobs: int = option(1, "cells at once")
    launcher: str = option("local", "where cells run", choices=("local", "slurm"))
    slurm: list[str] = option([], "of submitit: timeout_min=60 partition=gpu ...", action="extend")
    dry_run: bool = option(False, "print the command of each cell and stop")
    report_only: bool = option(False, "run nothing; report on the cells that are finished")


def parse(arguments: list[str] | None = None) -> BenchmarkOptions:
    """Options from flags, or from a grid file followed by flags.

    Without a grid and a preset the methods are those of ``digits_quick``; its preset is of digits
    and says nothing to data that ``--set dataset=`` names, or to texts.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = HfArgumentParser(BenchmarkOptions, allow_abbrev=False)
    entries: dict[str, Any] = {}
    if arguments and not arguments[0].startswith("-"):
        entries = read_file(BenchmarkOptions, arguments.pop(0), GRIDS)
    elif not any(argument.split("=")[0] == "--preset" for argument in arguments):
        entries = read_file(BenchmarkOptions, "digits_quick", GRIDS)
        (given,) = parser.parse_args_into_dataclasses(arguments)
        own_data = any(entry.startswith("dataset=") for entry in [*given.set, *given.vary])
        if own_data or given.recipe != "vision":
            entries = {"methods": entries["methods"]}
    (options,) = parser.parse_args_into_dataclasses([*as_flags(entries), *arguments])
    return options


def main(options: BenchmarkOptions) -> list[Outcome]:
    """Run the grid and report on it; returns how each cell ended."""
    check_int("jobs", options.jobs, low=1)
    tasks = make_tasks(options)
    if options.dry_run:
        print(*(shlex.join(task.command()) for task in tasks), sep="\n")
        return []
    outcomes = [] if options.report_only else list(progress(options, tasks))
    failed = {outcome.name: outcome.message for outcome in outcomes if outcome.status == "failed"}
    records = collect_records(cells_folder(options), leave_out=failed)
    for name, message in failed.items():
        print(f"failed: {name}\n{message}\n", file=sys.stderr)
    if records:
        page = write_experiment(
            options.output_dir, records, failed=failed, baseline=options.baseline
        )
        caption = row_caption(records).markdown()
        print(*filter(None, [markdown(interval_rows(records)), caption, page]), sep="\n\n")
    return outcomes


def make_tasks(options: BenchmarkOptions) -> list[CellTask]:
    """A task for each cell, after a check that the recipe takes its arguments."""
    module, name, _ = RECIPES[options.recipe]
    kind: type[CoreOptions] = getattr(import_module(module), name)
    known = [field.name for field in fields(kind)]
    read_baseline(options.baseline, known)
    grid = Grid(
        preset=options.preset,
        methods=options.methods,
        losses=options.losses,
        schedules=options.schedules,
        profiles=options.profiles,
        ratios=options.ratios,
        seeds=options.seeds,
        settings=options.set,
        vary=options.vary,
    )
    tasks = [make_task(options, kind, cell) for cell in expand(grid, known)]
    # Refuses one run under two names, such as erm and erm:head=linear, before it is made twice.
    by_setting([{"name": task.name, "options": task.options} for task in tasks])
    return tasks


def make_task(options: BenchmarkOptions, kind: type[CoreOptions], cell: Cell) -> CellTask:
    """The task of a cell, whose options are checked as far as they can be without the data."""
    module, _, default = RECIPES[options.recipe]
    folder = cells_folder(options) / cell.name
    with in_cell(cell.name):
        parsed = parse_options(
            kind, [*cell.arguments, "--output_dir", str(folder)], default=default
        )
        parsed.make_schedule().start_step(parsed.epochs * 10**6, 10**6)
        parsed.make_loss(ClassCounts([2, 1]))
    return CellTask(
        name=cell.name,
        recipe=Path(__file__).with_name(f"{module}.py"),
        arguments=cell.arguments,
        folder=folder,
        options=asdict(parsed),
        defaults=asdict(kind()),
    )


def cells_folder(options: BenchmarkOptions) -> Path:
    """Where the folders of the cells are."""
    return Path(options.output_dir, "cells")


def progress(options: BenchmarkOptions, tasks: list[CellTask]) -> Iterator[Outcome]:
    """Outcomes as they come, under a bar that tells the time left for cells not finished before."""
    todo = len(tasks)
    interval = 1 if sys.stderr.isatty() else 60
    style = BAR if options.launcher == "local" else None  # a cluster's queue has its own time
    bar = tqdm(total=todo, unit="run", bar_format=style, miniters=0, mininterval=interval)

    def show(seconds: float | None) -> None:
        left = "?" if seconds is None else bar.format_interval(seconds)
        bar.set_description(f"{left} left", refresh=False)
        bar.update(0)

    with bar, closing(launch(options, tasks, show)) as outcomes:
        for outcome in outcomes:
            if outcome.status == "skipped":
                todo -= 1
                bar.total = todo
            else:
                bar.update()
            bar.write(f"{outcome.status}: {outcome.name}", file=sys.stderr)
            bar.refresh()
            yield outcome


def launch(
    options: BenchmarkOptions, tasks: list[CellTask], show: Callable[[float | None], None]
) -> Generator[Outcome, None, None]:
    """The cells on this machine or on a cluster."""
    if options.launcher == "local":
        return run_locally(tasks, options.jobs, show)
    parameters = slurm_parameters(options.slurm)
    return run_on_slurm(tasks, options.jobs, Path(options.output_dir, "slurm"), parameters)


if __name__ == "__main__":
    sys.exit(any(outcome.status == "failed" for outcome in main(parse())))
