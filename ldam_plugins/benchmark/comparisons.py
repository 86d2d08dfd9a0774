"""Which differences between methods are more than noise: paired tests against a baseline."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ldam_plugins._validation import check_choice
from ldam_plugins.benchmark.captions import unlike_pairs
from ldam_plugins.benchmark.grid import METHODS
from ldam_plugins.benchmark.records import Record, errors_of
from ldam_plugins.benchmark.settings import (
    Setting,
    by_setting,
    head_of,
    method_title,
    option_value,
    shown,
    varying_options,
)
from ldam_plugins.benchmark.statistics import (
    CONFIDENCE,
    Interval,
    PairedComparison,
    holm,
    mean_interval,
    paired_comparison,
)
from ldam_plugins.losses.registry import list_losses
from ldam_plugins.schedules import KINDS

_TAIL_OPTIONS = (
    *("dataset", "profile", "ratio", "subset_seed", "val_split"),
    *("test_split", "split_file", "group_column"),
)
"""Options that say which samples a run was trained on."""


class Comparison(NamedTuple):
    """A method against a baseline: titles, the paired test, and its p-value after Holm.

    ``heads`` is the method's head, and the baseline's where that is another one. ``prior`` is the
    difference in the error under the training prior, which is not tested. ``unlike`` is in what
    else the two differ, see :func:`.unlike_pairs`.
    """

    baseline: str
    method: str
    paired: PairedComparison
    corrected: float | None
    heads: str
    prior: Interval
    unlike: Mapping[str, tuple[str, str]]

    @property
    def verdict(self) -> str:
        """Whether the difference is more than noise, at 5 % after the correction."""
        if self.corrected is None:
            return "no test: one pair" if self.paired.difference.n == 1 else "no test: no spread"
        if self.corrected >= 1 - CONFIDENCE:
            return "not told from noise"
        return "less error" if self.paired.difference.mean < 0 else "more error"


def comparisons(records: Sequence[Record], baseline: str = "erm") -> list[Comparison]:
    """Every method against a baseline on the same seeds and long tail, in balanced error.

    Negative differences are less error than the baseline's. P-values and detectable differences are
    corrected for the number of tests in the answer.

    A method is compared with the baseline under its own head where that was run: LDAM with
    cross-entropy on a cosine head.

    Args:
        records: Of one experiment.
        baseline: A name of ``METHODS`` or ``loss/schedule``, in which ``*`` is the method's own:
            ``"*/none"`` compares each schedule with none under the same loss. Of several settings
            of the baseline the one with the method's other options is taken, if there is one,
            else each; options after colons choose among them, a dash standing for the loss's
            default: ``"ldam_drw:max_margin=-:start=80"``, ``"erm:head=linear"``.

    Raises:
        ValueError: an unknown baseline.
    """
    names, settings = varying_options(records), by_setting(records)
    expected, options = read_baseline(baseline, records[0]["options"])
    others = {setting: _others(names, setting, runs[0]) for setting, runs in settings.items()}
    chosen = [s for s, runs in settings.items() if _has(runs[0], options)]
    found = []
    for setting, runs in settings.items():
        for base in _bases(chosen, setting, expected, others):
            pairs = _pairs(settings[base], runs)
            if pairs:
                found.append(((method_title(names, base), method_title(names, setting)), pairs))
    errors = [_errors(pairs) for _, pairs in found]
    p_values = [paired_comparison(first, second).p_value for first, second in errors]
    tests = sum(p is not None for p in p_values) or 1
    return [
        Comparison(
            *titles,
            paired_comparison(first, second, tests),
            corrected,
            " against ".join(dict.fromkeys(head_of(record) for record in reversed(pairs[0]))),
            mean_interval(np.subtract(*_errors(pairs, "train_prior_error")[::-1]).tolist()),
            unlike_pairs(pairs, names),
        )
        for (titles, pairs), (first, second), corrected in zip(
            found, errors, holm(p_values), strict=True
        )
    ]


def _errors(
    pairs: Sequence[tuple[Record, Record]], view: str = "balanced_error"
) -> tuple[list[float], list[float]]:
    """An error of the first runs, and of the second."""
    first, second = zip(*pairs, strict=True)
    return errors_of(first, view), errors_of(second, view)


def read_baseline(baseline: str, known: Collection[str]) -> tuple[tuple[str, str], dict[str, str]]:
    """What a baseline, as of :func:`comparisons`, says: loss and schedule, and other options.

    Args:
        baseline: To be read.
        known: Names of the options it may choose by.

    Raises:
        ValueError: it names no method, loss, schedule or option.
    """
    name, *entries = baseline.split(":")
    if "/" in name:
        loss, _, schedule = name.partition("/")
        check_choice("loss in baseline", loss, [*list_losses(), "*"])
        check_choice("schedule in baseline", schedule, [*KINDS, "*"])
    else:
        _, loss, schedule = METHODS[check_choice("baseline", name, METHODS)]
    pairs = [entry.partition("=") for entry in entries]
    options = {check_choice("option in baseline", name, known): value for name, _, value in pairs}
    return (loss, schedule), options


def _has(record: Record, options: Mapping[str, str]) -> bool:
    """Whether a run has what a baseline says after its colons."""
    found = {name: {shown(option_value(record, name))} for name in options}
    if "head" in found:
        found["head"].add(head_of(record))
    return all(value in found[name] for name, value in options.items())


def _others(names: Sequence[str], setting: Setting, record: Record) -> Setting:
    """The options of a setting beside loss and schedule, the head by its own name."""
    values = zip(names[2:], setting[2:], strict=True)
    return tuple(head_of(record) if name == "head" else value for name, value in values)


def _bases(
    settings: Collection[Setting],
    setting: Setting,
    expected: tuple[str, str],
    others: Mapping[Setting, Setting],
) -> list[Setting]:
    pattern = [own if want == "*" else want for want, own in zip(expected, setting, strict=False)]
    bases = [base for base in settings if list(base[:2]) == pattern]
    if setting in bases:
        return []  # the baseline itself, or another setting of it
    return [base for base in bases if others[base] == others[setting]] or bases


def _pairs(first: Sequence[Record], second: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Runs of the two that saw the same training samples and the same seed."""

    def same(record: Record) -> tuple[Any, ...]:
        options = (record["options"].get(name) for name in (*_TAIL_OPTIONS, "seed"))
        return (*options, *record["class_counts"])

    others = {same(record): record for record in second}
    return [(record, others[same(record)]) for record in first if same(record) in others]
