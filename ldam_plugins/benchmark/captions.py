"""What the caption of a table must say: in what its rows differ beyond what the table is about.

A table compares methods: a loss under a schedule on a head, with parameters of its own. Whatever
else is not the same for all of them may be what a difference comes from.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

from ldam_plugins.benchmark.records import UNKNOWN, Record
from ldam_plugins.benchmark.settings import (
    TUNED,
    WITHOUT_EFFECT,
    by_setting,
    head_of,
    method_title,
    option_value,
    shown,
    tuning_budget,
    varying_options,
)
from ldam_plugins.choices import FEW_BELOW, MANY_ABOVE
from ldam_plugins.losses.registry import list_losses, loss_options

METHOD_OPTIONS = {"loss", "schedule", "head", "scale", "start", "start_unit", "beta"}
METHOD_OPTIONS |= {name for loss in list_losses() for name in loss_options(loss)}
"""Options that make a method; the others are how and on what it was trained."""

_VERSIONS = ("ldam_plugins", "torch", "timm", "transformers")
_NOT_SET = (None, False, 0, "", "none", "auto", ())
_UNSET = "not set"
_OF = {"sam_start": "sam", "sam_every": "sam", "lora_alpha": "lora_rank"}
"""Options that say nothing where another is not set; records of earlier versions lack both."""
_NAMED = 4

Facts = dict[str, str]
"""What a run was trained with, by name, worded for people."""


class Caption(NamedTuple):
    """What stands with a table: a note, and a warning; either may be empty."""

    note: str
    warning: str

    def markdown(self) -> str:
        """As a paragraph of Markdown."""
        warning = f"**Warning:** {self.warning}" if self.warning else ""
        return " ".join(filter(None, [self.note, warning]))


def row_caption(records: Sequence[Record], names: Sequence[str] | None = None) -> Caption:
    """Of a table whose rows are the settings of the records, all compared with each other.

    It warns of options, precision, device and versions that are not those of every row, unless
    they are a label of the rows and each two methods have a value of it in common: then there are
    rows to compare like with like.

    Args:
        records: Those of the table.
        names: The options that are labels of its rows, as of :func:`.varying_options` of the
            experiment.
    """
    names = varying_options(records) if names is None else names
    rows = {method_title(names, s): runs for s, runs in by_setting(records, names).items()}
    unlike = _unlike_labels(records, names)
    for name, values in _facts_of_rows(rows, names).items():
        if len(set(values.values())) > 1:
            unlike[name] = values
    parts = [f"{name} {_by_value(values)}" for name, values in unlike.items()]
    return Caption(_tuning_note(records), _warning("Rows", parts))


def pair_caption(
    records: Sequence[Record], unlike: Mapping[str, Mapping[str, tuple[str, str]]]
) -> Caption:
    """Of a table of comparisons.

    Args:
        records: Those of the table.
        unlike: What :func:`unlike_pairs` found of each comparison, by its title.
    """
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for title, differences in unlike.items():
        for name, (first, second) in differences.items():
            found[name][title] = f"{second} against {first}"
    parts = [f"{name} {_by_value(values)}" for name, values in found.items()]
    return Caption(_tuning_note(records), _warning("Method and baseline", parts))


def unlike_pairs(
    pairs: Sequence[tuple[Record, Record]], names: Sequence[str]
) -> dict[str, tuple[str, str]]:
    """In what two methods that are compared differ, beside what makes them methods.

    Where both are one method, the labels they differ in are what is compared and no such thing.

    Args:
        pairs: A run of the one and one of the other, for each seed.
        names: Options that are labels in the table.

    Returns:
        By name, the value of the first and of the second.
    """
    same_method = all(_method(first) == _method(second) for first, second in pairs)
    left_out = set(names) if same_method else set(names) & METHOD_OPTIONS
    found: dict[str, tuple[str, str]] = {}
    for facts in ([_facts(record, left_out) for record in pair] for pair in pairs):
        for name in {**facts[0], **facts[1]}:
            first, second = (each.get(name, _UNSET) for each in facts)
            if first != second:
                found.setdefault(name, (first, second))
    return found


def _warning(rows: str, parts: Sequence[str]) -> str:
    if not parts:
        return ""
    return f"{rows} differ in more than loss, schedule and head: {'; '.join(parts)}."


def _tuning_note(records: Sequence[Record]) -> str:
    budgets = {tuning_budget(record) for record in records}
    return (
        f"Each method tuned: {budgets.pop()}." if len(budgets) == 1 and None not in budgets else ""
    )


def _method(record: Record) -> tuple[Any, ...]:
    """What makes the method of a run: its head, and the other options in ``METHOD_OPTIONS``."""
    names = sorted(METHOD_OPTIONS & set(record["options"]) - {"head"})
    values = [(name, option_value(record, name)) for name in names]
    return head_of(record), *(pair for pair in values if pair[1] is not None)


def _unlike_labels(records: Sequence[Record], names: Sequence[str]) -> dict[str, dict[str, str]]:
    """Labels of the rows in which some two methods have no value in common, by method."""
    labels = [name for name in names if name not in METHOD_OPTIONS]
    own = [name for name in names if name in METHOD_OPTIONS]
    methods: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for record in (record for runs in by_setting(records, names).values() for record in runs):
        title = method_title(own, tuple(option_value(record, name) for name in own))
        methods[title].add(tuple(shown(option_value(record, name)) for name in labels))
    unlike: dict[str, dict[str, str]] = defaultdict(dict)
    for pair in combinations(methods, 2):
        if methods[pair[0]] & methods[pair[1]]:
            continue
        values = {title: list(zip(*methods[title], strict=True)) for title in pair}
        apart = [
            place
            for place in range(len(labels))
            if not set(values[pair[0]][place]) & set(values[pair[1]][place])
        ]
        for place in apart or range(len(labels)):
            for title in pair:
                unlike[labels[place]][title] = _joined(values[title][place])
    return dict(unlike)


def _facts_of_rows(
    rows: Mapping[str, Sequence[Record]], names: Sequence[str]
) -> dict[str, dict[str, str]]:
    """By name of what is not a label, its values in each row."""
    facts = {title: [_facts(record, set(names)) for record in runs] for title, runs in rows.items()}
    known = dict.fromkeys(name for runs in facts.values() for run in runs for name in run)
    return {
        name: {
            title: _joined(run.get(name, _UNSET) for run in runs) for title, runs in facts.items()
        }
        for name in known
    }


def _facts(record: Record, left_out: set[str]) -> Facts:
    """What a run was trained with, apart from some options; what is not set is not there."""
    skipped = {*left_out, *WITHOUT_EFFECT, "seed", "loss", "schedule", "head"}
    off = {*left_out, *(of for of in _OF.values() if record["options"].get(of) in _NOT_SET)}
    skipped |= {name for name, of in _OF.items() if of in off}
    options = [name for name in record["options"] if name not in skipped]
    values = {name: option_value(record, name) for name in options}
    facts = {name: shown(value) for name, value in values.items() if value not in _NOT_SET}
    precision = record.get("mixed_precision", UNKNOWN)
    facts["precision"] = "float32" if precision == "no" else precision
    facts["device"] = re.sub(r", threads: \d+", "", record["device"])
    facts["processes"] = str(record.get("processes", 1))
    limits = record.get("group_limits", {"many_above": MANY_ABOVE, "few_below": FEW_BELOW})
    facts["limits of many and few"] = f"> {limits['many_above']}, < {limits['few_below']}"
    versions = {name: record["versions"].get(name) for name in _VERSIONS}
    facts |= {name: version for name, version in versions.items() if version}
    if TUNED not in left_out:
        facts[TUNED] = tuning_budget(record) or "no"
    return facts


def _by_value(values: Mapping[str, str]) -> str:
    """``0.1 (ERM), 0.01 (LDAM, LDAM-DRW)``."""
    titles: dict[str, list[str]] = defaultdict(list)
    for title, value in values.items():
        titles[value].append(title)
    return ", ".join(f"{value} ({_listed(found)})" for value, found in titles.items())


def _listed(titles: Sequence[str]) -> str:
    more = len(titles) - _NAMED
    return "; ".join([*titles[:_NAMED], *([f"and {more} more"] if more > 0 else [])])


def _joined(values: Iterable[str]) -> str:
    return " and ".join(sorted(set(values)))
