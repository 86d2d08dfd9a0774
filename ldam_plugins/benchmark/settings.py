"""Settings: what tells the runs of an experiment apart but for the seed, and its name in tables."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import pandas as pd

from ldam_plugins._validation import invalid
from ldam_plugins.benchmark.grid import METHODS
from ldam_plugins.benchmark.records import UNKNOWN, Record
from ldam_plugins.choices import DEFAULT_SCALE
from ldam_plugins.heads.choice import LINEAR_SCALE, wants_cosine_head
from ldam_plugins.losses.registry import create_loss, loss_class, loss_options
from ldam_plugins.schedules import KINDS
from ldam_plugins.training.run_dir import MAY_CHANGE

WITHOUT_EFFECT = {*MAY_CHANGE, "workers", "memory_limit", "eval_every", "num_processes"}
WITHOUT_EFFECT |= {"many", "few"}
"""Options that say where output goes, how data are fetched or what is many, and train the same."""

Setting = tuple[Any, ...]
"""Values of the options that vary between the runs of an experiment: loss, schedule, others."""

ABSENT = "-"
TUNED = "tuned"
"""Stands beside the options that vary where some runs were tuned, or longer than others."""


def varying_options(records: Sequence[Record]) -> list[str]:
    """Loss, schedule and all other options that the runs do not share.

    The seed is left out, and what is :data:`WITHOUT_EFFECT`.

    An option that only some of the records know, being made by different versions, is not
    compared, nor one that was tuned. :data:`TUNED` is among them where some runs were tuned and
    others not, or with another number of trials.
    """
    shared = set.intersection(*(set(record["options"]) for record in records))
    left_out = {"seed", "loss", "schedule", *WITHOUT_EFFECT}
    if len({record["options"].get("mixed_precision") for record in records}) == 1:
        left_out.add("mixed_precision")  # where all say "auto" it is the machines that differ
    names = [name for name in records[0]["options"] if name in shared - left_out]
    varying = [n for n in names if len({option_value(record, n) for record in records}) > 1]
    budgets = {tuning_budget(record) for record in records}
    return ["loss", "schedule", *varying, *([TUNED] if len(budgets) > 1 else [])]


def option_value(record: Record, name: str) -> Any:
    """An option of a run; None where it is the head or an option of the loss at its default.

    Where it was tuned it is the value as given, so that runs of a method are one setting whatever
    was chosen, and like those of methods to which the option says nothing.
    """
    options = record["options"]
    if name == TUNED:
        return tuning_budget(record)
    value = options[name]
    if name in tuned_values(record):
        value = record["tuned"].get("given", {}).get(name)
    if name == "mixed_precision" and record.get(name, UNKNOWN) != UNKNOWN:
        return record[name]  # what "auto" stood for
    if name == "head":
        return None if head_of(record) == _default_head(options["loss"]) else value
    default = _default(name, options["loss"], head_of(record))
    return None if default is not None and value == default else _hashable(value)


def tuned_values(record: Record) -> dict[str, Any]:
    """The options that a search chose for a run, by name; empty where there was none."""
    return record.get("tuned", {}).get("values", {})


def tuning_budget(record: Record) -> str | None:
    """How long the options of a run were searched for: ``"6 trials"``; None if they were not."""
    return f"{record['tuned']['trials']} trials" if "tuned" in record else None


def _default(name: str, loss: str, head: str) -> Any:
    """What an option of the loss, or the scale of its head, is where it is not given."""
    if name != "scale":
        return _loss_defaults(loss).get(name)
    if head == "cosine":
        return DEFAULT_SCALE
    return LINEAR_SCALE if name in _loss_defaults(loss) else None


def _default_head(loss: str) -> str:
    return "cosine" if wants_cosine_head(loss_class(loss), "auto") else "linear"


@cache
def _loss_defaults(loss: str) -> dict[str, Any]:
    module = create_loss(loss, [1])
    return {name: getattr(module, name) for name in loss_options(loss)}


def by_setting(
    records: Sequence[Record], names: Sequence[str] | None = None
) -> dict[Setting, list[Record]]:
    """Runs by the values of options, sorted by them and then by the seed.

    The options are ``names``, loss and schedule first: :func:`varying_options` of these records
    unless told.

    Losses come by letters, schedules in the order of :data:`~ldam_plugins.schedules.KINDS`, the
    values of other options by size or by letters.

    Raises:
        ValueError: two runs with the same options and seed.
    """
    names = varying_options(records) if names is None else names
    runs = pd.DataFrame({"record": records})
    runs["setting"] = [tuple(option_value(record, name) for name in names) for record in records]
    runs["seed"] = [record["options"]["seed"] for record in records]
    same = runs["record"][runs.duplicated(["setting", "seed"], keep=False)]
    if len(same):
        pair = [record["name"] for record in same]
        raise invalid("results", "of different runs", pair, hint="Remove one of them.")
    groups = runs.sort_values("seed").groupby("setting", sort=False)["record"]
    return dict(sorted(((s, list(group)) for s, group in groups), key=lambda item: _order(item[0])))


def _order(setting: Setting) -> list[tuple[bool, bool, float, str]]:
    loss, schedule, *others = setting
    return [_sort_key(value) for value in (loss, KINDS.index(schedule), *others)]


def _sort_key(value: Any) -> tuple[bool, bool, float, str]:
    """Numbers by size, also those an option holds as text; then text; None first."""
    try:
        return value is not None, False, float(value), ""
    except (TypeError, ValueError):
        return value is not None, True, 0.0, str(value)


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def shown(value: Any) -> str:
    """The value of an option for people."""
    if value is None or value in ([], ()):
        return ABSENT
    if isinstance(value, (list, tuple)):
        return " ".join(map(shown, value))
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def method_title(names: Sequence[str], setting: Setting) -> str:
    """Name of a setting in tables: that of the method, and the other options that vary."""
    loss, schedule, *others = setting
    titles = {(method.loss, method.schedule): method.title for method in METHODS.values()}
    title = titles.get((loss, schedule), f"{loss} / {schedule}")
    given = [
        f"{name} {shown(value)}"
        for name, value in zip(names[2:], others, strict=True)
        if value is not None
    ]
    return ", ".join([title, *given])


def head_of(record: Record) -> str:
    """The classifier that a run was trained with: ``"cosine"`` or ``"linear"``."""
    options = record["options"]
    cosine = wants_cosine_head(loss_class(options["loss"]), options.get("head", "auto"))
    return "cosine" if cosine else "linear"


def heads_of_losses(records: Iterable[Record]) -> dict[str, str]:
    """The head that each loss was trained with, both where runs have either."""
    found: dict[str, set[str]] = defaultdict(set)
    for record in records:
        found[record["options"]["loss"]].add(head_of(record))
    return {loss: ", ".join(sorted(heads)) for loss, heads in found.items()}
