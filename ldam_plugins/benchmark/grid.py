"""A grid of runs: methods, long tails and seeds, and the command line of each of its cells."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from ldam_plugins._validation import check_choice, check_int, check_real, invalid
from ldam_plugins.data.long_tail import PROFILES
from ldam_plugins.losses.registry import list_losses
from ldam_plugins.schedules import KINDS, DeferredSchedule

OWN_OPTIONS = {
    "loss": "Write --methods {value}/none, or --losses {value} with --schedules.",
    "schedule": "Write --methods ce/{value}, or --schedules {value} with --losses.",
    "profile": "Write --profiles {value}.",
    "ratio": "Write --ratios {value}.",
    "seed": "Write --seeds {value}.",
    "output_dir": "Write --output_dir {value}.",
    "resume": "Begun cells go on by themselves.",
}
"""Options of a recipe that have their own place in a grid, or are the grid's matter: where."""

_DEFERRED = [kind for kind in KINDS if DeferredSchedule(kind).is_deferred]
SCHEDULES_OF = {
    "start": _DEFERRED,
    "start_unit": _DEFERRED,
    "beta": [kind for kind in KINDS if DeferredSchedule(kind).uses_beta],
}
"""Schedules that an option says something to; to the others it would make the same run twice."""

Settings = dict[str, str]


class Method(NamedTuple):
    """A loss under a schedule, with the name it has in tables."""

    title: str
    loss: str
    schedule: str


METHODS = {
    # The ten of table 2 of Cao et al., NeurIPS 2019 ("HG" is the hinge loss, "M" one margin).
    "erm": Method("ERM", "ce", "none"),
    "focal": Method("Focal", "focal", "none"),
    "ldam": Method("LDAM", "ldam", "none"),
    "cb_rs": Method("CB RS", "ce", "rs"),
    "cb_rw": Method("CB RW", "ce", "rw"),
    "cb_focal": Method("CB Focal", "focal", "rw"),
    "hg_drs": Method("HG-DRS", "hinge", "drs"),
    "ldam_hg_drs": Method("LDAM-HG-DRS", "ldam_hinge", "drs"),
    "m_drw": Method("M-DRW", "uniform_margin", "drw"),
    "ldam_drw": Method("LDAM-DRW", "ldam", "drw"),
    # Others with a name of their own.
    "ce_drw": Method("CE-DRW", "ce", "drw"),
    "ce_drs": Method("CE-DRS", "ce", "drs"),
    "ldam_drs": Method("LDAM-DRS", "ldam", "drs"),
    "logit_adjusted": Method("Logit adjustment", "logit_adjusted", "none"),
    "vector_scaling": Method("Vector scaling", "vector_scaling", "none"),
}


@dataclass(frozen=True)
class Grid:
    """What a grid is made of; its cells are all combinations.

    A setting is written ``option=value``, with commas between the values of an option that is a
    list: ``decay_milestones=32,36``.

    Args:
        preset: Preset of the recipe that every cell begins with; empty: none.
        methods: Each a name of ``METHODS`` or ``loss/schedule``, with settings of its own after
            colons: ``"ldam_drw"``, ``"ce/drs"``, ``"ldam_drw:max_margin=0.3:beta=0.999"``.
        losses: Losses, each combined with each of ``schedules``, beside ``methods``.
        schedules: See ``losses``.
        profiles: Long-tail profiles; empty: the preset's, or the recipe's default.
        ratios: Imbalance ratios; empty: likewise.
        seeds: Seeds of the training.
        settings: Settings of every cell.
        vary: Settings of which each value makes cells of its own: ``mixup=0,0.2``.
    """

    preset: str
    methods: Sequence[str] = ()
    losses: Sequence[str] = ()
    schedules: Sequence[str] = ()
    profiles: Sequence[str] = ()
    ratios: Sequence[float] = ()
    seeds: Sequence[int] = (0,)
    settings: Sequence[str] = ()
    vary: Sequence[str] = ()


@dataclass(frozen=True)
class Cell:
    """One run of a grid: its name and the recipe's options, those for its folder left out.

    Args:
        name: Name of the cell, in which ``setting`` stands before the seed.
        setting: What the cells share that differ in the seed alone.
        own: Names of the options that the method or ``vary`` sets, and that make the setting.
        preset: Preset that the run begins with; empty: none.
        options: What is set beyond it.
    """

    name: str
    setting: str
    own: frozenset[str] = field(repr=False)
    preset: str = field(repr=False)
    options: Settings = field(repr=False)

    @property
    def arguments(self) -> tuple[str, ...]:
        """Arguments of the recipe."""
        flags = [
            word
            for name, value in self.options.items()
            for word in (f"--{name}", *value.split(","))
        ]
        return (*([self.preset] if self.preset else []), *flags)

    def with_options(self, values: Mapping[str, Any]) -> Cell:
        """The same with other values of some options."""
        words = {n: f"{v:.12g}" if isinstance(v, float) else str(v) for n, v in values.items()}
        return replace(self, options={**self.options, **words})


def expand(grid: Grid, known: Collection[str]) -> list[Cell]:
    """The cells of a grid, seed by seed, so that a grid that is cut short has whole comparisons.

    A cell is named ``{loss}_{schedule}[_{option}-{value}...][_{profile}][_r{ratio}]_s{seed}``.
    Combinations that come up twice are one cell.

    Args:
        grid: What to combine.
        known: Names of the recipe's options.

    Raises:
        ValueError: an entry that names no method, loss, schedule, profile or option, that says
            nothing to its schedule, or that sets what has its own place; or a grid without a cell.
    """
    common = _settings(grid.settings, "set", known)
    axes = [
        [(name, value) for value in values.split(",")]
        for name, values in _settings(grid.vary, "vary", known).items()
    ]
    named = {*common, *(name for axis in axes for name, _ in axis)}
    if grid.ratios and not (grid.profiles or grid.preset) and "dataset" in named:
        hint = "Add --profiles exp or --profiles step, or leave it out to train on all samples."
        raise invalid("ratios", "left out without a profile", grid.ratios, hint=hint)
    methods = [_method(entry, known) for entry in grid.methods] + _product(grid)
    tails = list(itertools.product(_profiles(grid), _ratios(grid)))
    seeds = [check_int("seeds", seed, low=0) for seed in grid.seeds]
    cells: dict[str, Cell] = {}
    combinations = itertools.product(seeds, tails, itertools.product(*axes), methods)
    for seed, tail, varied, (loss, schedule, own) in combinations:
        special = {**dict(varied), **own}
        _check_effect(special, schedule)
        cell = _cell(grid.preset, loss, schedule, common, special, tail, seed)
        cells[cell.name] = cell
    if not cells:
        hint = "Name methods, or losses and schedules, and at least one seed."
        raise invalid("grid", "one with a cell", grid, hint=hint)
    return list(cells.values())


@contextmanager
def in_cell(name: str) -> Iterator[None]:
    """Name the cell in the errors of what is done for it."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise ValueError(f"cell {name!r}: {error}") from error


def _cell(
    preset: str,
    loss: str,
    schedule: str,
    common: Settings,
    special: Settings,
    tail: tuple[str | None, float | None],
    seed: int,
) -> Cell:
    profile, ratio = tail
    options = {"loss": loss, "schedule": schedule, **common, **special}
    options |= {} if profile is None else {"profile": profile}
    options |= {} if ratio is None else {"ratio": f"{ratio:.12g}"}
    parts = [loss, schedule, *(f"{name}-{value}" for name, value in special.items())]
    parts += [] if profile is None else [profile]
    parts += [] if ratio is None else [f"r{ratio:.12g}"]
    setting = re.sub(r"[^\w.+-]", "-", "_".join(parts))
    options |= {"seed": str(seed)}
    return Cell(f"{setting}_s{seed}", setting, frozenset(special), preset, options)


def _product(grid: Grid) -> list[tuple[str, str, Settings]]:
    if bool(grid.losses) != bool(grid.schedules):
        missing, given = ("schedules", "losses") if grid.losses else ("losses", "schedules")
        raise invalid(missing, f"given where `{given}` are", [])
    losses = [check_choice("losses", loss, list_losses()) for loss in grid.losses]
    schedules = [check_choice("schedules", kind, KINDS) for kind in grid.schedules]
    return [(loss, schedule, {}) for loss, schedule in itertools.product(losses, schedules)]


def _profiles(grid: Grid) -> list[str | None]:
    """Profiles of the grid; None alone stands for the preset's."""
    return [check_choice("profiles", name, PROFILES) for name in grid.profiles] or [None]


def _ratios(grid: Grid) -> list[float | None]:
    return [check_real("ratios", ratio, low=1) for ratio in grid.ratios] or [None]


def _method(entry: str, known: Collection[str]) -> tuple[str, str, Settings]:
    name, *settings = entry.split(":")
    own = _settings(settings, f"method {entry}", known)
    if "/" not in name:
        method = METHODS[check_choice("methods", name, METHODS)]
        return method.loss, method.schedule, own
    loss, _, schedule = name.partition("/")
    check_choice(f"loss of method {entry}", loss, list_losses())
    check_choice(f"schedule of method {entry}", schedule, KINDS)
    return loss, schedule, own


def _settings(entries: Iterable[str], place: str, known: Collection[str]) -> Settings:
    settings = {}
    for entry in entries:
        name, equals, value = entry.partition("=")
        if not equals or not value:
            hint = "Commas go between the values of a list."
            raise invalid(place, "made of option=value", entry, hint=hint)
        if name in OWN_OPTIONS:
            hint = OWN_OPTIONS[name].format(value=value.replace(",", " "))
            raise invalid(f"option in {place}", "one the grid leaves free", name, hint=hint)
        settings[check_choice(f"option in {place}", name, known)] = value
    return settings


def _check_effect(special: Mapping[str, str], schedule: str) -> None:
    """Refuse a setting that would only repeat a run under another name."""
    for name in special:
        schedules = SCHEDULES_OF.get(name, (schedule,))
        if schedule not in schedules:
            hint = f"Give it to those methods alone: ldam_drw:{name}={special[name]}"
            expected = f"set for a method with schedule {' or '.join(schedules)}"
            raise invalid(name, expected, schedule, hint=hint)
