"""Tuning: each method with the best of some settings, by its error on held-out training samples.

A search has a space (:func:`search_space`), draws settings from it (:func:`propose`, by Optuna) and
keeps what it found in a file of its own folder (:class:`Search`), from which it goes on.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ldam_plugins._validation import check_choice, invalid, quoted
from ldam_plugins.benchmark.grid import SCHEDULES_OF
from ldam_plugins.benchmark.local import CellTask, Outcome
from ldam_plugins.benchmark.settings import head_of
from ldam_plugins.choices import DEFAULT_SCALE, SEARCHED
from ldam_plugins.counts import ClassCounts
from ldam_plugins.losses.registry import list_losses, loss_options, losses_with
from ldam_plugins.training.files import write_atomic
from ldam_plugins.training.history import read_metrics
from ldam_plugins.training.options import check_int, check_real, holds_integers
from ldam_plugins.training.run_dir import differing_options, hold_folder

if TYPE_CHECKING:
    from collections.abc import Iterator

    from optuna.distributions import BaseDistribution

SEARCH_FILE = "search.json"
AROUND = {
    "lr": (10.0, 10.0),
    "scale": (3.0, 3.0),
    "max_margin": (5.0, 2.0),
    "tau": (4.0, 2.0),
    "gamma": (4.0, 2.0),
}
"""Options that are searched unless told otherwise, from the value as given divided by the first
factor to the value times the second."""
BETAS = (0.9, 0.99, 0.999, 0.9999)
"""Values of beta that are tried (the grid of Cui et al., CVPR 2019, arXiv 1901.05555)."""
_OF_LOSSES = {name for loss in list_losses() for name in loss_options(loss)} - {"scale"}
_NOT_SEARCHED = (
    "ratio",
    "rare_fraction",
    "subset_seed",
    "val_split",
    "seed",
    "keep_checkpoints",
    "num_processes",
    "memory_limit",
    "workers",
    "eval_every",
    "decay_milestones",
)
"""Numbers that say what is trained on and how it is kept, and lists of them."""
_STARTUP_TRIALS = 3
"""Trials before the sampler looks at the errors found, that with the settings as given among them.
Optuna's ten would make a random search of most budgets that a training allows."""
_ERROR_CODES = range(1, 128)
"""Exit codes of processes that ended with an error, not with a signal."""
_HINT = "Write --tune_options lr, lr=1e-4:1e-2 or scale=10,20,30."

Values = dict[str, Any]


class Span(NamedTuple):
    """Values from ``low`` to ``high``, alike on a log scale, or evenly where ``low`` is 0."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:.12g}:{self.high:.12g}"

    def __contains__(self, value: object) -> bool:
        return isinstance(value, (int, float)) and self.low <= value <= self.high

    def distribution(self) -> BaseDistribution:
        """As Optuna has it."""
        return import_optuna().distributions.FloatDistribution(
            self.low, self.high, log=self.low > 0
        )

    def rounded(self, value: float) -> float:
        """A value of three digits, for a command that can be read."""
        return min(max(float(f"{value:.3g}"), self.low), self.high)


class Choice(tuple[float, ...]):
    """One of some values."""

    __slots__ = ()

    def __str__(self) -> str:
        return ",".join(f"{value:.12g}" for value in self)

    def distribution(self) -> BaseDistribution:
        """As Optuna has it."""
        return import_optuna().distributions.CategoricalDistribution(tuple(self))

    def rounded(self, value: float) -> float:
        """The value."""
        return value


Space = dict[str, Span | Choice]
"""What is searched, by option."""


def read_tune_options(entries: Iterable[str], kind: type[Any]) -> dict[str, Span | Choice | None]:
    """What is to be searched, from words such as ``lr``, ``lr=1e-4:1e-2`` or ``scale=10,20,30``.

    Args:
        entries: The words; none stand for all of ``SEARCHED``.
        kind: Options of the recipe, with their ``LIMITS``.

    Returns:
        By option what is tried; None for an option that is searched around its value as given.

    Raises:
        ValueError: no such option or one that is not searched, values that cannot be read or that
            are outside the option's limits.
    """
    allowed = [name for name in kind.LIMITS if name not in _NOT_SEARCHED]
    found: dict[str, Span | Choice | None] = {}
    for entry in entries or SEARCHED:
        name, equals, values = entry.partition("=")
        check_choice("tune_options", name, allowed, hint=_HINT)
        if name in found:
            raise invalid("tune_options", "without an option named twice", name)
        if not equals and name not in SEARCHED:
            hint = f"Name its values: {name}=LOW:HIGH or {name}=A,B,C."
            raise invalid("tune_options", f"with a range or values of {name!r}", entry, hint=hint)
        found[name] = _read_values(entry, name, values, kind) if equals else None
    return found


def _read_values(entry: str, name: str, words: str, kind: type[Any]) -> Span | Choice:
    integers = holds_integers(kind, name)
    is_span = ":" in words
    try:
        values = [float(word) for word in words.split(":" if is_span else ",")]
    except ValueError as error:
        raise invalid("tune_options", "made of option=numbers", entry, hint=_HINT) from error
    if is_span and (integers or name == "beta"):
        why = "whole numbers are" if integers else "beta, which counts by its distance to 1, is"
        hint = f"Name its values: {name}=A,B,C."
        raise invalid("tune_options", f"lists where {why} searched", entry, hint=hint)
    if is_span and not (len(values) == 2 and values[0] < values[1]):
        raise invalid("tune_options", "with ranges of the form LOW:HIGH", entry, hint=_HINT)
    if not is_span and len(set(values)) != max(len(values), 2):
        raise invalid("tune_options", "with two or more values, all different", entry, hint=_HINT)
    for value in values:
        place = f"{name} of tune_options"
        if integers:
            whole = int(value) if math.isfinite(value) and value == int(value) else value
            check_int(place, whole, **kind.LIMITS[name])  # type: ignore[arg-type]
        else:
            check_real(place, value, **kind.LIMITS[name])
    if is_span:
        return Span(*values)
    return Choice(map(int, values) if integers else values)


def search_space(
    asked: Mapping[str, Span | Choice | None],
    options: Mapping[str, Any],
    own: Collection[str] = (),
) -> Space:
    """What is searched for one method: what is asked for, and its loss, head and schedule take.

    Args:
        asked: As of :func:`read_tune_options`.
        options: All options of the method's run.
        own: Options that the method itself sets; they make it what it is, and are not searched.

    Raises:
        ValueError: a value as given with nothing around it, being 0.
    """
    return {
        name: _around(name, given_value(name, options)) if values is None else values
        for name, values in asked.items()
        if name not in own and _takes(options, name)
    }


def check_searched(asked: Iterable[str], spaces: Iterable[Space]) -> None:
    """Refuse options that are asked for and that no method of a grid takes.

    Raises:
        ValueError: there are some.
    """
    taken = {name for space in spaces for name in space}
    unused = [name for name in asked if name not in taken]
    if unused:
        hint = "Those that a method sets itself, or --vary, make it what it is and stay."
        expected = "options that a method of the grid takes"
        raise invalid("tune_options", expected, quoted(unused), hint=hint)


def given_value(name: str, options: Mapping[str, Any]) -> Any:
    """An option of a run, or its default where it is left out."""
    value = options[name]
    if value is None and name == "scale":
        return DEFAULT_SCALE
    return losses_with(name).get(options["loss"]) if value is None else value


def _takes(options: Mapping[str, Any], name: str) -> bool:
    if name == "scale":
        return head_of({"options": options}) == "cosine"
    if name in _OF_LOSSES:
        return name in loss_options(options["loss"])
    return options["schedule"] in SCHEDULES_OF.get(name, (options["schedule"],))


def _around(name: str, given: float) -> Span | Choice:
    if name == "beta":
        return Choice(sorted({*BETAS, given}))
    if given == 0:
        hint = f"Name its values: --tune_options {name}=LOW:HIGH."
        raise invalid(name, "above 0 to be searched around", given, hint=hint)
    below, above = AROUND[name]
    return Span(float(f"{given / below:.3g}"), float(f"{given * above:.3g}"))


def check_split(before: ClassCounts, after: ClassCounts) -> None:
    """Refuse to tune where the held-out part says nothing of most classes.

    Args:
        before: Training samples per class.
        after: Those that are left when some are held out.

    Raises:
        ValueError: samples are held out of fewer than two classes, or of fewer than half of them.
    """
    scored = int((before.counts > after.counts).sum())
    if scored < max(2, len(before) / 2):
        expected = "left out: too few classes have a training sample that can be held out"
        hint = "A class needs two. Add samples, or train with the settings as given."
        raise invalid("tune", expected, f"{scored} of {len(before)} classes", hint=hint)


def propose(
    space: Space, tried: Sequence[tuple[Mapping[str, Any], float]], number: int, seed: int
) -> Values:
    """The settings of the next trial, where Optuna's Gaussian process expects to improve most.

    With the four to ten trials that a training allows it is nearer to the optimum than Optuna's
    default, a tree-structured Parzen estimator, which was little better there than chance
    (quadratic errors in one to four options, with noise).

    A function of its arguments alone, so a search that was stopped goes on as if it had not been.

    Args:
        space: What is searched.
        tried: Values and balanced error of the trials so far; those outside the space, as the
            settings as given may be, are not looked at.
        number: Of the trial.
        seed: Seed of the search.

    Source: Snoek, Larochelle, Adams, Practical Bayesian Optimization of Machine Learning
    Algorithms, NeurIPS 2012.
    """
    optuna = import_optuna()
    own_seed = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    sampler = optuna.samplers.GPSampler(seed=own_seed, n_startup_trials=_STARTUP_TRIALS)
    distributions = {name: part.distribution() for name, part in space.items()}
    with _quiet(optuna):
        study = optuna.create_study(sampler=sampler, direction="minimize")
        for values, error in tried:
            if all(values[name] in part for name, part in space.items()):
                study.add_trial(
                    optuna.trial.create_trial(
                        params={name: values[name] for name in space},
                        distributions=distributions,
                        value=error,
                    )
                )
        drawn = study.ask(distributions).params
    return {name: part.rounded(drawn[name]) for name, part in space.items()}


@dataclass
class Search:
    """The search of one method, whose trials are kept in ``search.json`` of its folder.

    Its trials come one after the other: :meth:`next_task`, :meth:`tell`, until it :attr:`is_over`.

    Args:
        make_task: The run of a trial, from its number and values; without values it has the
            settings as given. Its folder is one of that of the search, which has the search's name.
        space: What is searched, not empty.
        trials: How many there are.
        seed: Seed of the search.

    Attributes:
        found: ``values`` of each trial, and ``balanced_error`` in %, or how it ``failed``.
    """

    make_task: Callable[[int, Values], CellTask] = field(repr=False)
    space: Space
    trials: int
    seed: int = 0
    found: list[dict[str, Any]] = field(default_factory=list, init=False)
    _lock: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        first = self.make_task(0, {})
        self.folder, self.given = first.folder.parent, first.options
        self._defaults = first.defaults

    @property
    def name(self) -> str:
        """The name of the setting that is searched for."""
        return self.folder.name

    @property
    def searched(self) -> list[str]:
        """The space in words that ``--tune_options`` takes."""
        return [f"{name}={part}" for name, part in self.space.items()]

    def open(self) -> None:
        """Keep other processes out of the folder, and go on with what was found before.

        Raises:
            ValueError: another process is at work there, or it holds another search.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = hold_folder(self.folder)
        self.load()

    def load(self) -> None:
        """Read what was found before; failed trials are tried again until there is a choice.

        Raises:
            ValueError: the folder holds another search.
        """
        path = self.folder / SEARCH_FILE
        if not path.exists():
            return
        kept = json.loads(path.read_text(encoding="utf-8"))
        kept["given"] = {**self._defaults, **kept["given"]}
        self._check_same(kept, json.loads(json.dumps(self._described())))
        self.found = kept["trials"]
        if not (self.is_over and self._errors()):
            for trial in self.found:
                trial.pop("failed", None)

    def _check_same(self, kept: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        differing = differing_options(kept["given"], now["given"])
        for name in ("searched", "seed"):
            differing += differing_options({name: kept[name]}, {name: now[name]})
        if differing:
            expected = f"that of the trials in {str(self.folder)!r}"
            hint = "Choose another --output_dir for the grid, or remove that folder."
            raise ValueError(f"`search` must be {expected}; {'; '.join(differing)}. {hint}")

    def _described(self) -> dict[str, Any]:
        return {"given": dict(self.given), "searched": self.searched, "seed": self.seed}

    @property
    def is_over(self) -> bool:
        """Whether all trials have ended."""
        return self._next == self.trials

    @property
    def _next(self) -> int:
        """Number of the first trial that has not ended."""
        open_ones = (number for number, trial in enumerate(self.found) if len(trial) == 1)
        return min(next(open_ones, len(self.found)), self.trials)

    def next_task(self) -> CellTask:
        """The run of the next trial; where it was begun before, the same one."""
        number = self._next
        if number == len(self.found):
            worst = max(self._errors().values(), default=100.0)  # for those that failed
            tried = [(t["values"], t.get("balanced_error", worst)) for t in self.found]
            values = {name: given_value(name, self.given) for name in self.space}
            if number > 0:
                values = propose(self.space, tried, number, self.seed)
            self.found.append({"values": values})
            self._write()
        return self.make_task(number, self.found[number]["values"] if number else {})

    def tell(self, task: CellTask, outcome: Outcome) -> str:
        """Take in how the run of the next trial ended.

        Of a finished one the model and the checkpoints are removed. One whose process ended with
        an error, as it does where the training diverges, is a bad trial.

        Returns:
            Why the search cannot go on for now, as where the run was killed; else nothing.
        """
        trial = self.found[self._next]
        if outcome.status != "failed":
            figures = read_metrics(task.folder)["validation"]
            trial["balanced_error"] = 100 * (1 - figures["balanced_accuracy"])
            for name in ("checkpoints", "model"):
                shutil.rmtree(task.folder / name, ignore_errors=True)
        elif outcome.exit_code in _ERROR_CODES:
            trial["failed"] = outcome.message.splitlines()[-1]
        else:
            return f"{task.name}: {outcome.message}"
        self._write()
        return ""

    def _write(self) -> None:
        content = {**self._described(), "trials": self.found}
        write_atomic(self.folder / SEARCH_FILE, f"{json.dumps(content, indent=1)}\n".encode())

    def _errors(self) -> dict[int, float]:
        trials = enumerate(self.found[: self.trials])
        return {n: trial["balanced_error"] for n, trial in trials if "balanced_error" in trial}

    @property
    def failure(self) -> str:
        """Why there is nothing to choose from, if all trials failed."""
        if not self.is_over or self._errors():
            return ""
        last = self.found[self.trials - 1]["failed"]
        logs = f"See the logs in {self.folder}; the same command tries again."
        return f"all {self.trials} trials failed, the last one with {last}\n{logs}"

    @property
    def best(self) -> int:
        """Number of the trial with the least error, the first of several."""
        errors = self._errors()
        return min(errors, key=lambda number: (errors[number], number))

    @property
    def values(self) -> Values:
        """The values that are chosen, to be set in the runs; none where those as given are best."""
        return self.found[self.best]["values"] if self.best else {}

    def record(self) -> dict[str, Any]:
        """What the records of the runs say of it, under ``tuned``.

        ``trials`` that were made; ``values`` that were chosen, and ``given`` ones (None: the
        default); ``searched``, in words that ``--tune_options`` takes; ``split``: share held out,
        seed of that choice, samples, and names of the classes without one, which the errors leave
        out; ``found``: values and balanced error in % of each trial; ``seed`` and ``sampler``.
        """
        held_out = read_metrics(trial_folder(self.folder, self.best))["held_out"]
        return {
            "trials": self.trials,
            "values": self.found[self.best]["values"],
            "given": {name: self.given[name] for name in self.space},
            "searched": self.searched,
            "split": {
                "share": self.given["val_split"],
                "seed": self.given["subset_seed"],
                "samples": held_out["samples"],
                "classes_without": held_out["classes_without"],
            },
            "found": self.found[: self.trials],
            "seed": self.seed,
            "sampler": f"Optuna {import_optuna().__version__}, GPSampler",
        }


def trial_folder(folder: str | os.PathLike[str], number: int) -> Path:
    """The folder of a trial in that of its search."""
    return Path(folder, f"trial-{number:02d}")


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """Without Optuna's line for every study and trial."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


def import_optuna() -> Any:
    """Optuna.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        hint = 'Run `pip install "ldam-plugins[tune]"`, or leave out --tune.'
        expected = "left out where Optuna is not installed"
        raise invalid("tune", expected, "given", hint=hint, error=ModuleNotFoundError) from error
    return optuna
