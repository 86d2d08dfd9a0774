"""What part of a method's gain is whose: head, margin and deferred weights, in sums that add up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ldam_plugins.benchmark.records import Record, errors_of
from ldam_plugins.benchmark.settings import head_of, option_value, shown, varying_options
from ldam_plugins.benchmark.statistics import Interval, mean_interval
from ldam_plugins.choices import DEFAULT_MAX_MARGIN

_STEPS = (
    ("ce", "none", "linear"),
    ("ce", "none", "cosine"),
    ("ldam", "none", "cosine"),
    ("ldam", "drw", "cosine"),
)
_FROM_THE_START = ("ldam", "rw", "cosine")


class Decomposition(NamedTuple):
    """From cross-entropy on a linear head to LDAM-DRW, one thing at a time, in balanced error.

    ``first + head + margin + deferral = last``, in each seed and so in the means. Each difference
    depends on what was changed before it: the margin's is that on a cosine head without weights.

    Args:
        max_margin: Of LDAM.
        options: What else tells this one from others of the experiment, by name.
        first: Error of cross-entropy on a linear head, in %.
        head: What a cosine head changes, in points.
        margin: What LDAM changes on that head.
        deferral: What the deferred class weights change under LDAM.
        last: Error of LDAM-DRW.
        from_the_start: What the same weights change under LDAM if they are there from the start,
            in place of ``deferral``; None if that was not run on the same seeds.
    """

    max_margin: float
    options: Mapping[str, str]
    first: Interval
    head: Interval
    margin: Interval
    deferral: Interval
    last: Interval
    from_the_start: Interval | None


def decompositions(records: Sequence[Record]) -> list[Decomposition]:
    """Each LDAM-DRW of an experiment, taken apart over the seeds that all four steps have.

    Those of which a step is missing are left out. What else varies in the experiment is the same
    in all steps.
    """
    names = [name for name in varying_options(records)[2:] if name not in ("head", "max_margin")]
    runs: dict[tuple[Any, ...], dict[int, Record]] = defaultdict(dict)
    for record in records:
        runs[_key(record, names)][record["options"]["seed"]] = record
    found = []
    for (step, margin, others), last in runs.items():
        if step != _STEPS[-1]:
            continue
        keys = [(s, margin if s[0] == "ldam" else None, others) for s in _STEPS]
        steps = [runs.get(key, {}) for key in keys]
        errors = _errors(steps)
        if not errors:
            continue
        from_the_start = _errors([steps[2], runs.get((_FROM_THE_START, margin, others), {}), last])
        values = dict(zip(names, others, strict=True))
        found.append(
            Decomposition(
                DEFAULT_MAX_MARGIN if margin is None else margin,
                {name: shown(value) for name, value in values.items() if value},
                mean_interval(errors[0]),
                _difference(errors[0], errors[1]),
                _difference(errors[1], errors[2]),
                _difference(errors[2], errors[3]),
                mean_interval(errors[3]),
                _difference(*from_the_start[:2]) if from_the_start else None,
            )
        )
    return found


def _key(record: Record, names: Sequence[str]) -> tuple[Any, ...]:
    """Step, margin, and the values of all else that varies."""
    options = record["options"]
    step = (options["loss"], options["schedule"], head_of(record))
    others = tuple(option_value(record, name) for name in names)
    return step, option_value(record, "max_margin") if options["loss"] == "ldam" else None, others


def _errors(steps: Sequence[Mapping[int, Record]]) -> list[list[float]]:
    """The errors of each step over the seeds that all have; nothing where they share none."""
    seeds = sorted(set.intersection(*map(set, steps)))
    return [errors_of([runs[seed] for seed in seeds]) for runs in steps] if seeds else []


def _difference(first: Sequence[float], second: Sequence[float]) -> Interval:
    return mean_interval(np.subtract(second, first).tolist())
