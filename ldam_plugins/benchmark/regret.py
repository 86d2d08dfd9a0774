"""What one choice of options gives away, set by set, to the best of those that were tried."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ldam_plugins._validation import invalid
from ldam_plugins.benchmark.records import Record, errors_of
from ldam_plugins.benchmark.settings import by_setting, option_value, shown, varying_options
from ldam_plugins.benchmark.statistics import mean_interval


class Regret(NamedTuple):
    """One data set: the choice beside the best of all that was tried on it.

    The best is the least mean error on the test set, so part of what the choice gives away is the
    luck of the best of many.

    Args:
        dataset: Name of the data set: the last part of its path.
        samples: Training samples.
        classes: Their classes.
        error: Balanced error of the choice, mean over its seeds, in %.
        best: Options of the best, by name.
        best_error: Its balanced error.
        tried: How many were tried, the choice among them.
    """

    dataset: str
    samples: int
    classes: int
    error: float
    best: Mapping[str, str]
    best_error: float
    tried: int

    @property
    def points(self) -> float:
        """By how much the choice errs more than the best, in points; 0 where it is the best."""
        return self.error - self.best_error


def regrets(records: Sequence[Record], choice: Mapping[str, str]) -> list[Regret]:
    """What a choice of options gives away on each data set of an experiment.

    Args:
        records: Runs that differ in the data set and in the options of the choice.
        choice: Value of each of these options, as tables show it.

    Raises:
        ValueError: an option that does not vary in the experiment, or a data set on which the
            choice was not run.
    """
    varying = [name for name in varying_options(records) if name != "dataset"]
    for name in choice:
        if name not in varying:
            raise invalid("choice", f"of options that vary: {', '.join(varying)}", name)
    of_sets: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        of_sets[record["options"]["dataset"]].append(record)
    found = []
    for dataset, runs in of_sets.items():
        tried = [
            (mean_interval(errors_of(seeds)).mean, _shown(seeds[0], varying))
            for seeds in by_setting(runs, varying).values()
        ]
        chosen = [error for error, options in tried if choice.items() <= options.items()]
        if len(chosen) != 1:
            some = ", ".join(f"{name} {value}" for name, value in choice.items())
            expected = f"run once on {dataset}, of {len(tried)} that were tried there"
            raise invalid("choice", expected, f"{some}: {len(chosen)} times")
        best_error, best = min(tried, key=lambda each: each[0])
        best = {name: value for name, value in best.items() if name in choice}
        counts = runs[0]["class_counts"]
        name, samples = Path(dataset).name, sum(counts)
        found.append(Regret(name, samples, len(counts), chosen[0], best, best_error, len(tried)))
    return found


def _shown(record: Record, names: Sequence[str]) -> dict[str, str]:
    return {name: shown(option_value(record, name)) for name in names}
