"""An experiment: the results of many runs, as records, by setting and as tidy rows."""

from __future__ import annotations

import csv
import io
import json
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ldam_plugins._validation import invalid, quoted
from ldam_plugins.benchmark.grid import METHODS
from ldam_plugins.benchmark.statistics import Interval, mean_interval
from ldam_plugins.losses.registry import create_loss, loss_options
from ldam_plugins.schedules import KINDS
from ldam_plugins.training.files import write_atomic
from ldam_plugins.training.history import METRICS_KEYS, read_metrics
from ldam_plugins.training.run_dir import COMMAND_FILE, MAY_CHANGE, METRICS_FILE

Record = dict[str, Any]
"""``metrics.json`` of one run, with its ``name`` and the ``command`` that made it."""

Setting = tuple[Any, ...]
"""Values of the options that vary between the runs of an experiment."""

METRICS = (
    "top1_error",
    "balanced_accuracy",
    "worst_class_accuracy",
    "many",
    "medium",
    "few",
    "nll",
    "ece",
)
ABSENT = "-"
UNKNOWN = "unknown"
"""The precision of a run that was made before runs recorded it."""


def read_records(folder: str | os.PathLike[str]) -> list[Record]:
    """Records of an experiment, a JSON file each, by name.

    Raises:
        ValueError: no file there, or one that is not a whole record.
    """
    paths = sorted(Path(folder).glob("*.json"))
    if not paths:
        raise invalid("experiment", "a folder with results as JSON", str(folder))
    return [_read_record(path) for path in paths]


def _read_record(path: Path) -> Record:
    record = json.loads(path.read_text(encoding="utf-8"))
    missing = [key for key in METRICS_KEYS if key not in record]
    if missing:
        expected = f"a whole record, with {quoted(missing)}"
        raise invalid(str(path), expected, list(record))
    return {"name": path.stem, "command": None, **record}


def collect_records(
    folder: str | os.PathLike[str], leave_out: Collection[str] = ()
) -> list[Record]:
    """Records of the finished runs of a grid, from the folders of its cells.

    Args:
        folder: What holds a folder a cell.
        leave_out: Names of cells whose files are not what the grid asked for.
    """
    cells = [path.parent for path in sorted(Path(folder).glob(f"*/{METRICS_FILE}"))]
    return [
        {
            "name": cell.name,
            "command": _command(cell),
            "mixed_precision": UNKNOWN,
            **read_metrics(cell),
        }
        for cell in cells
        if cell.name not in leave_out
    ]


def _command(cell: Path) -> str | None:
    path = cell / COMMAND_FILE
    return path.read_text(encoding="utf-8").strip() if path.exists() else None


def write_record(folder: str | os.PathLike[str], record: Mapping[str, Any]) -> Path:
    """Write a record as ``{name}.json``, small and in lines that compare well: one a key."""
    lines = [f"  {json.dumps(k)}: {json.dumps(v, ensure_ascii=False)}" for k, v in record.items()]
    path = Path(folder) / f"{record['name']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
    return path


def varying_options(records: Sequence[Record]) -> list[str]:
    """Loss, schedule and whatever else the runs have otherwise; the seed and the folder are not.

    An option that only some of the records know, being made by different versions, is not
    compared.
    """
    shared = set.intersection(*(set(record["options"]) for record in records))
    left_out = {"seed", "loss", "schedule", *MAY_CHANGE}
    names = [name for name in records[0]["options"] if name in shared - left_out]
    varying = [n for n in names if len({option_value(record, n) for record in records}) > 1]
    return ["loss", "schedule", *varying]


def option_value(record: Record, name: str) -> Any:
    """An option of a run; None where it is an option of the loss and at its default."""
    options = record["options"]
    default = _loss_defaults(options["loss"]).get(name)
    value = options[name]
    return None if default is not None and value == default else _hashable(value)


def head_of(record: Record) -> str:
    """The classifier that a run was trained with: ``"cosine"`` or ``"linear"``."""
    options = record["options"]
    cosine = options.get("head") == "cosine" or _needs_cosine_head(options["loss"])
    return "cosine" if cosine else "linear"


def heads_of_losses(records: Iterable[Record]) -> dict[str, str]:
    """The head that each loss was trained with, both where runs have either."""
    found: dict[str, set[str]] = defaultdict(set)
    for record in records:
        found[record["options"]["loss"]].add(head_of(record))
    return {loss: ", ".join(sorted(heads)) for loss, heads in found.items()}


@cache
def _needs_cosine_head(loss: str) -> bool:
    return create_loss(loss, [1]).needs_cosine_head


@cache
def _loss_defaults(loss: str) -> dict[str, Any]:
    module = create_loss(loss, [1])
    return {name: getattr(module, name) for name in loss_options(loss)}


def by_setting(records: Sequence[Record]) -> dict[Setting, list[Record]]:
    """Runs by the values of :func:`varying_options`, sorted by them and then by the seed.

    Schedules come in the order of :data:`~ldam_plugins.schedules.KINDS`, other text by letters.

    Raises:
        ValueError: two runs with the same options and seed.
    """
    names = varying_options(records)
    found: dict[Setting, list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda record: record["options"]["seed"]):
        setting = tuple(option_value(record, name) for name in names)
        seeds = [other["options"]["seed"] for other in found[setting]]
        if record["options"]["seed"] in seeds:
            same = [record["name"], found[setting][-1]["name"]]
            raise invalid("results", "of different runs", same, hint="Remove one of them.")
        found[setting].append(record)
    return dict(sorted(found.items(), key=lambda item: _order(item[0])))


def _order(setting: Setting) -> list[tuple[bool, bool, float, str]]:
    loss, schedule, *others = setting
    return [_sort_key(value) for value in (loss, KINDS.index(schedule), *others)]


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


def tidy_rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """One row a run: what varies, seed, metrics, seconds, machine, versions and the command."""
    names = varying_options(records)
    return [
        {
            "name": record["name"],
            **{name: _scalar(option_value(record, name)) for name in names},
            "seed": record["options"]["seed"],
            **{metric: record["test"][metric] for metric in METRICS},
            "train_seconds": record["train_seconds"],
            "device": record["device"],
            "mixed_precision": record.get("mixed_precision", UNKNOWN),
            **{f"version_{name}": version for name, version in record["versions"].items()},
            "command": record["command"],
        }
        for runs in by_setting(records).values()
        for record in runs
    ]


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV with a line of names; the columns are those of all rows together."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def to_parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Rows as Parquet, with the columns of :func:`to_csv`; null where a row has no value."""
    from pyarrow import BufferOutputStream, parquet, table

    columns = dict.fromkeys(name for row in rows for name in row)
    content = BufferOutputStream()
    parquet.write_table(table({n: [row.get(n) for row in rows] for n in columns}), content)
    return content.getvalue().to_pybytes()


def errors_of(runs: Iterable[Record]) -> list[float]:
    """Balanced error in % of each run: 100 less the mean accuracy of the classes.

    On a test set whose classes are of one size that is the top-1 error.
    """
    return [100 * (1 - run["test"]["balanced_accuracy"]) for run in runs]


def error_matrices(records: Sequence[Record]) -> dict[str, dict[tuple[str, str], Interval]]:
    """Balanced error in % by (loss, schedule), for each combination of the other options.

    Combinations in which nothing can be compared along both ways are left out: they have one loss,
    or no loss with two schedules.
    """
    names = varying_options(records)[2:]
    matrices: dict[str, dict[tuple[str, str], Interval]] = defaultdict(dict)
    for (loss, schedule, *others), runs in by_setting(records).items():
        values = zip(names, others, strict=True)
        title = ", ".join(f"{name} {shown(value)}" for name, value in values)
        matrices[title][loss, schedule] = mean_interval(errors_of(runs))
    return {title: cells for title, cells in matrices.items() if _is_matrix(cells)}


def _is_matrix(cells: Collection[tuple[str, str]]) -> bool:
    losses = [loss for loss, _ in cells]
    return 1 < len(set(losses)) < len(losses)


def shown(value: Any) -> str:
    """The value of an option for people."""
    if value is None:
        return ABSENT
    if isinstance(value, (list, tuple)):
        return " ".join(map(shown, value))
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _scalar(value: Any) -> Any:
    return shown(value) if isinstance(value, tuple) else value


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list) else value


def _sort_key(value: Any) -> tuple[bool, bool, float, str]:
    """Numbers by size, also those an option holds as text; then text; None first."""
    try:
        return value is not None, False, float(value), ""
    except (TypeError, ValueError):
        return value is not None, True, 0.0, str(value)
