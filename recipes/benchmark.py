"""Compare losses and schedules on your imbalance: a grid of recipe runs, a process each.

    python recipes/benchmark.py                                  # four methods on digits
    python recipes/benchmark.py digits --seeds 0 1 2 --jobs 2
    python recipes/benchmark.py cifar10_paper --set dataset=path/to/cifar10
    python recipes/benchmark.py --recipe text --preset banking77_lt --methods erm ldam_drw
    python recipes/benchmark.py --set dataset=path/to/own model=resnet18   # own data, all of it
    python recipes/benchmark.py digits --jobs 20 --launcher slurm --slurm partition=gpu mem_gb=8
    python recipes/benchmark.py banking77 --seeds 0 1 2 --tune 6   # each method at its own best
    python recipes/benchmark.py digits --tune 8 --tune_options lr=0.01:1 scale=10,20,30

A grid of ``recipes/grids`` (or a YAML or JSON file) may come first, flags after it override it;
``--set`` and ``--vary`` add to it. Methods are names (``ldam_drw``) or ``loss/schedule``, with
settings of their own after colons: ``ldam_drw:max_margin=0.3``. Every cell is a folder of
``--output_dir``: finished cells are skipped, so the same command goes on with a grid that was
stopped, and adds what is new. Failed cells are listed and the exit code is 1.

``--slurm`` takes the parameters of submitit (``pip install "ldam-plugins[slurm]"``), such as
``timeout_min=60``; a grid file has them as ``slurm: {timeout_min: 60}``.

``--tune N`` (``pip install "ldam-plugins[tune]"``) compares each method at the best of N settings.
They are tried on the training set less a stratified part, ``--tune_split`` of each class, that
scores them by its balanced error: the mean over the classes with a sample there. No trial reads
the test set. The first trial of every method is the settings as given, the others come from a
Gaussian process of Optuna, with one seed for all methods. Then the runs of the grid train on the
whole training set.

Searched are, as far as loss, head and schedule of a method take them: ``lr`` from a tenth of the
value as given to ten times it, ``scale`` of a cosine head from a third to thrice, ``max_margin``
from a fifth to twice, ``tau`` and ``gamma`` from a quarter to twice, all on a log scale, and
``beta`` of 0.9, 0.99, 0.999, 0.9999. ``--tune_options`` names others in their place, or their
values: ``lr``, ``lr=1e-4:1e-2`` (log scale; even from 0) or ``epochs=4,8``; a grid file may have
``tune_options: ["lr=1e-4:1e-2", "scale=10,20,30"]``. What a method sets itself after a colon, or
``--vary``, makes it what it is and stays. Trials are folders of ``tuning/`` in ``--output_dir`` and
are not run twice; one that fails or diverges is a bad one. The record of each run holds under
``tuned`` what was chosen, all trials and the split; rows without it have the settings as given.

Left in ``--output_dir``: ``report.html``, ``results.md``, ``results.csv`` and ``.parquet``, plots
as PNG, and ``results.jsonl`` with the record of each run a line, which
``recipes/results_tables.py --add`` puts into the results that the documents show.
"""

from __future__ import annotations

from study_options import RECIPES, BenchmarkOptions
from study_options import parse_benchmark as parse

from ldam_plugins.training.command_line import begin_study

if __name__ == "__main__":  # --help and a misspelt flag are answered before torch is imported
    chosen = begin_study(parse)

import shlex
import sys
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, fields
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from options import CoreOptions, parse_options
from tqdm import tqdm

from ldam_plugins import ClassCounts
from ldam_plugins.benchmark.captions import row_caption
from ldam_plugins.benchmark.comparisons import read_baseline
from ldam_plugins.benchmark.grid import Cell, Grid, expand, in_cell
from ldam_plugins.benchmark.local import CellTask, Outcome, run_locally, share_choice
from ldam_plugins.benchmark.records import collect_records, write_tuned
from ldam_plugins.benchmark.report import write_experiment
from ldam_plugins.benchmark.settings import by_setting
from ldam_plugins.benchmark.slurm import run_on_slurm, slurm_parameters
from ldam_plugins.benchmark.tables import interval_rows, markdown
from ldam_plugins.benchmark.tuning import (
    SEARCHED,
    Search,
    check_searched,
    check_split,
    import_optuna,
    read_tune_options,
    search_space,
    trial_folder,
)
from ldam_plugins.training.options import SEED, check_int, check_real, invalid
from ldam_plugins.training.run_dir import AUTO_TUNE_FILE

BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} runs in {elapsed}"
OF_METHODS = {"loss", "head", "schedule", "start", "start_unit", "output_dir", *SEARCHED}
"""Options that do not say which samples a run is trained on."""


def main(options: BenchmarkOptions) -> list[Outcome]:
    """Run the grid and report on it; returns how each cell ended."""
    check_int("jobs", options.jobs, low=1)
    tasks = make_tasks(options)
    searches = make_searches(options)
    if options.dry_run:
        for search in searches:
            print(f"# {search.name}: {options.tune} trials of {' '.join(search.searched)}, first:")
            print(shlex.join(search.make_task(0, {}).command()))
        print(*(shlex.join(task.command()) for task in tasks), sep="\n")
        return []
    outcomes = [] if options.report_only else run(options, tasks, searches)
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


def run(options: BenchmarkOptions, tasks: list[CellTask], searches: list[Search]) -> list[Outcome]:
    """Run all cells, those of a method that is tuned with what its trials chose."""
    share_choice(tasks)
    if not searches:
        return list(progress(options, tasks))
    stopped = tune(options, searches)
    chosen = {search.name: search for search in searches if search.name not in stopped}
    setting_of = {cell.name: cell.setting for cell in make_cells(options)}
    outcomes = [
        Outcome(task.name, "failed", stopped[setting_of[task.name]])
        for task in tasks
        if setting_of[task.name] in stopped
    ]
    values = {name: search.values for name, search in chosen.items()}
    tasks = [t for t in make_tasks(options, values) if setting_of[t.name] not in stopped]
    for outcome in progress(options, tasks):
        outcomes.append(outcome)
        if outcome.status != "failed" and setting_of[outcome.name] in chosen:
            record = chosen[setting_of[outcome.name]].record()
            write_tuned(cells_folder(options) / outcome.name, record)
    return outcomes


def tune(options: BenchmarkOptions, searches: list[Search]) -> dict[str, str]:
    """Run the trials, at once those of different methods; returns why methods have no choice."""
    check_held_out(options, searches)
    for search in searches:
        search.open()
    stopped: dict[str, str] = {}
    while due := [each for each in searches if each.name not in stopped and not each.is_over]:
        trials = {}
        for search in due:
            task = search.next_task()
            trials[task.name] = search, task
        tasks = [task for _, task in trials.values()]
        for outcome in progress(options, tasks, "tuning, "):
            search, task = trials[outcome.name]
            if reason := search.tell(task, outcome):
                stopped[search.name] = reason
            elif outcome.status == "failed":
                told = f"a bad trial: {outcome.name}\n{outcome.message}\n"
                tqdm.write(told, file=sys.stderr)
    return stopped | {each.name: each.failure for each in searches if each.failure}


def check_held_out(options: BenchmarkOptions, searches: list[Search]) -> None:
    """Check, before anything is written, that enough can be held out for the trials to come."""
    recipe, kind = import_module(RECIPES[options.recipe][0]), options_kind(options)
    checked = set()
    for search in searches:
        search.load()
        data = frozenset((n, str(v)) for n, v in search.given.items() if n not in OF_METHODS)
        if search.is_over or data in checked:
            continue
        with in_cell(search.name):
            given = kind(**search.given)
            train, _, before = recipe.load_data(given, show=False)
            *_, after = recipe.hold_out(given, train, before, show=False)
            check_split(before, after)
        checked.add(data)


def make_searches(options: BenchmarkOptions) -> list[Search]:
    """The search of each method for which there is something to be tuned."""
    if not options.tune:
        if options.tune_options:
            warnings.warn("--tune_options has no effect without --tune N", stacklevel=2)
        return []
    check_int("tune", options.tune, low=2, hint="The first trial is the settings as given.")
    check_int("tune_seed", options.tune_seed, **SEED)
    check_real("tune_split", options.tune_split, low=0, high=1, low_open=True, high_open=True)
    import_optuna()
    kind, spaces = options_kind(options), {}
    asked = read_tune_options(options.tune_options, kind)
    cells = {cell.setting: cell for cell in reversed(make_cells(options))}
    searches = []
    for cell in reversed(cells.values()):
        make = partial(make_trial, options, cell)
        with in_cell(cell.setting):
            space = search_space(asked, make(0, {}).options, cell.own)
        spaces[cell.setting] = space
        for name, values in space.items():
            for value in values:  # those of a range are its ends
                make(1, {name: value})
        if space:
            searches.append(Search(make, space, options.tune, options.tune_seed))
    if options.tune_options:
        check_searched(asked, spaces.values())
    return searches


def make_trial(
    options: BenchmarkOptions, cell: Cell, number: int, values: dict[str, Any]
) -> CellTask:
    """The run of a trial, which leaves the test set alone."""
    folder = trial_folder(Path(options.output_dir, "tuning", cell.setting), number)
    trial = {"seed": options.tune_seed, "val_split": options.tune_split, "evaluate": "validation"}
    name = f"{cell.setting}, trial {number}"
    return make_task(options, name, cell.with_options({**values, **trial}), folder)


def options_kind(options: BenchmarkOptions) -> type[CoreOptions]:
    """The options of the recipe."""
    module, name, _ = RECIPES[options.recipe]
    kind: type[CoreOptions] = getattr(import_module(module), name)
    return kind


def make_cells(options: BenchmarkOptions) -> list[Cell]:
    """The cells of the grid."""
    known = [field.name for field in fields(options_kind(options))]
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
    return expand(grid, known)


def make_tasks(
    options: BenchmarkOptions, tuned: Mapping[str, dict[str, Any]] | None = None
) -> list[CellTask]:
    """A task for each cell, after a check that the recipe takes its arguments.

    ``tuned`` has values that were chosen for settings.
    """
    folder, tasks = cells_folder(options), []
    for cell in make_cells(options):
        values = {} if tuned is None else tuned.get(cell.setting, {})
        tasks.append(make_task(options, cell.name, cell.with_options(values), folder / cell.name))
        check_cell(options, tasks[-1])
    if tuned is None:
        # Refuses one run under two names, such as erm and erm:head=linear, before it is made twice.
        by_setting([{"name": task.name, "options": task.options} for task in tasks])
    return tasks


def check_cell(options: BenchmarkOptions, task: CellTask) -> None:
    """Refuse what the runs of a grid decide on themselves."""
    if task.options["evaluate"] is not None:
        hint = "Leave it out; the trials of --tune leave the test set alone by themselves."
        expected = "left out in a grid, whose tables are of the test set"
        raise invalid("evaluate", expected, task.options["evaluate"], hint=hint)
    if options.tune and task.options["val_split"] is not None:
        hint = "Leave it out; --tune_split holds out samples for the trials alone."
        expected = "left out with --tune, after which runs train on all samples"
        raise invalid("val_split", expected, task.options["val_split"], hint=hint)


def make_task(options: BenchmarkOptions, name: str, cell: Cell, folder: Path) -> CellTask:
    """A run, whose options are checked as far as they can be without the data."""
    module, _, default = RECIPES[options.recipe]
    kind = options_kind(options)
    with in_cell(name):
        parsed = parse_options(
            kind, [*cell.arguments, "--output_dir", str(folder)], default=default
        )
        parsed.make_schedule().start_step(parsed.epochs * 10**6, 10**6)
        parsed.make_loss(ClassCounts([2, 1]))
    return CellTask(
        name=name,
        recipe=Path(__file__).with_name(f"{module}.py"),
        arguments=cell.arguments,
        folder=folder,
        options=asdict(parsed),
        defaults=asdict(kind()),
        auto_tune=Path(options.output_dir, AUTO_TUNE_FILE) if parsed.auto_tune == "on" else None,
    )


def cells_folder(options: BenchmarkOptions) -> Path:
    """Where the folders of the cells are."""
    return Path(options.output_dir, "cells")


def progress(
    options: BenchmarkOptions, tasks: list[CellTask], title: str = ""
) -> Iterator[Outcome]:
    """Outcomes as they come, under a bar that tells the time left for cells not finished before."""
    todo = len(tasks)
    interval = 1 if sys.stderr.isatty() else 60
    style = BAR if options.launcher == "local" else None  # a cluster's queue has its own time
    bar = tqdm(total=todo, unit="run", bar_format=style, miniters=0, mininterval=interval)

    def show(seconds: float | None) -> None:
        left = "?" if seconds is None else bar.format_interval(seconds)
        bar.set_description(f"{title}{left} left", refresh=False)
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
    sys.exit(any(outcome.status == "failed" for outcome in main(chosen)))
