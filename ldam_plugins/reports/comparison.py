"""Classifiers side by side on the same test samples: what each gains and loses, and the page."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from ldam_plugins._validation import check_choice, invalid, quoted
from ldam_plugins.counts import ClassCounts
from ldam_plugins.metrics.intervals import FEW_EXAMPLES
from ldam_plugins.metrics.paired import (
    PairedDifference,
    class_differences,
    holm,
    paired_difference,
)
from ldam_plugins.reports.class_table import group_titles
from ldam_plugins.reports.html import render
from ldam_plugins.training.files import write_atomic
from ldam_plugins.training.history import read_metrics
from ldam_plugins.training.run_dir import METRICS_FILE, PREDICTION_FILES

PAGE_FILE, PARTS_FILE = "report.html", "comparison.csv"
CLASSES_FILE, CHANGED_FILE, BASELINE_FILE = "classes.csv", "changed.csv", "baseline.csv"
BALANCED, ALL_SAMPLES = "all classes, each once", "all samples, each once"
_MAX_CLASSES = 1000
_EXAMPLE, _LABEL, _PREDICTED = "example", "label", "predicted"


class Classifier(NamedTuple):
    """What a classifier predicts for the test samples, and what is known of its training data.

    Args:
        name: In tables.
        table: Columns ``example`` (all different), ``predicted`` and, if it has labels, ``label``.
        counts: Training samples per class, with their names; None if they are not known.
    """

    name: str
    table: pd.DataFrame
    counts: ClassCounts | None


def read_classifier(path: str | os.PathLike[str], part: str = "test") -> Classifier:
    """Read the folder of a run, or a CSV of predictions.

    Args:
        path: A folder with ``predictions.csv`` and ``metrics.json``, or a file with columns
            ``example``, ``predicted`` and perhaps ``label``; others are left out.
        part: Of a run: ``"test"``, or ``"validation"`` for its held-out training samples.

    Raises:
        FileNotFoundError: there is no such folder or file, or the run left no predictions.
        ValueError: a column is missing, a field empty, or an example there twice.
    """
    place, counts = Path(path), None
    if place.is_dir():
        metrics = place / METRICS_FILE
        file = place / PREDICTION_FILES[check_choice("part", part, PREDICTION_FILES)]
        if metrics.exists():
            kept = read_metrics(place)
            limits = kept.get("group_limits", {})
            counts = ClassCounts(kept["class_counts"], kept.get("class_names"), **limits)
    else:
        file = place
    if not file.exists():
        hint = "Runs of earlier versions left none: train again, or evaluate the model."
        raise FileNotFoundError(f"There are no predictions in {file}. {hint}")
    # As text: a class called "1" or "NA" is no number and not missing.
    table = pd.read_csv(file, dtype=str, keep_default_na=False)
    for column in (_EXAMPLE, _PREDICTED):
        if column not in table:
            raise invalid(str(file), f"a table with a column {column!r}", list(table))
    table = table[[name for name in (_EXAMPLE, _LABEL, _PREDICTED) if name in table]]
    again = table[_EXAMPLE][table[_EXAMPLE].duplicated()].tolist()
    if again:
        raise invalid(str(file), "a row an example", f"{quoted(again[:3])} more than once")
    empty = table[_EXAMPLE][(table[_PREDICTED] == "")].tolist()
    if empty:
        raise invalid(str(file), "a prediction for each example", f"none for {quoted(empty[:3])}")
    return Classifier(str(path), table, counts)


class Comparison(NamedTuple):
    """A classifier against the first one.

    Args:
        name: The classifier's; of a baseline the first one's.
        parts: The difference in each part of the classes: :data:`BALANCED`, :data:`ALL_SAMPLES`,
            and many, medium and few where the training samples are known.
        classes: The difference in each class, by name, most training samples first.
    """

    name: str
    parts: dict[str, PairedDifference]
    classes: dict[str, PairedDifference]

    @property
    def verdict(self) -> str:
        """In a sentence, whether it is better than the first one; to 5 %, without correction."""
        found = self.parts[BALANCED]
        points = f"{100 * found.difference:+.1f} points"
        ends = f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"
        tells = f"{points} of balanced accuracy ({ends}, p {_relation(found.p_value)})"
        if found.p_value >= 0.05:
            return f"Not told from noise: {tells}."
        return f"{'Better' if found.difference > 0 else 'Worse'}: {tells}."


def compare(classifiers: Sequence[Classifier]) -> tuple[pd.DataFrame, list[Comparison]]:
    """Compare classifiers with the first of them.

    Returns:
        A table of the examples with ``label`` and a column of predictions a classifier, named by
        it, and the comparisons.

    Raises:
        ValueError: fewer than two; none has labels; or they differ in examples, labels or classes.
    """
    if len(classifiers) < 2:
        raise invalid("classifiers", "at least two", [each.name for each in classifiers])
    names = [each.name for each in classifiers]
    if len(set(names)) < len(names):
        raise invalid("classifiers", "different ones", names)
    table = _joined(classifiers)
    counts = next((each.counts for each in classifiers if each.counts is not None), None)
    class_names = _class_names(classifiers, table, counts)
    index_of = {name: index for index, name in enumerate(class_names)}
    codes = {name: table[name].map(index_of).to_numpy() for name in (_LABEL, *names)}
    found = []
    for name in names[1:]:
        pair = (codes[_LABEL], codes[names[0]], codes[name])
        parts = {
            BALANCED: paired_difference(*pair),
            ALL_SAMPLES: paired_difference(*pair, balanced=False),
        }
        order = list(range(len(class_names)))
        if counts is not None:
            titles = group_titles(counts)
            for group, ids in counts.groups().items():
                if np.isin(codes[_LABEL], ids).any():
                    parts[titles[group]] = paired_difference(*pair, classes=ids)
            order = np.argsort(-counts.counts, kind="stable").tolist()
        by_class = class_differences(*pair)
        classes = {class_names[index]: by_class[index] for index in order if index in by_class}
        found.append(Comparison(name, parts, classes))
    return table, found


def _joined(classifiers: Sequence[Classifier]) -> pd.DataFrame:
    """The examples with their labels, and the predictions of each classifier."""
    first = classifiers[0]
    labelled = [each for each in classifiers if _LABEL in each.table]
    if not labelled:
        hint = f"Give one a column {_LABEL!r}."
        raise invalid("classifiers", "with labels in one of them", "none", hint=hint)
    examples = first.table[_EXAMPLE]
    table = pd.DataFrame({_EXAMPLE: examples})
    for each in classifiers:
        own = each.table.set_index(_EXAMPLE)
        for there, here, other in (
            (first.name, each.name, set(examples) - set(own.index)),
            (each.name, first.name, set(own.index) - set(examples)),
        ):
            if other:
                some = quoted(sorted(other)[:3])
                raise ValueError(
                    f"{len(other)} examples of {there} are not in {here}: {some}. "
                    "Classifiers are compared on the same examples."
                )
        table[each.name] = own.loc[examples, _PREDICTED].to_numpy()
        if _LABEL in own:
            labels = own.loc[examples, _LABEL].to_numpy()
            if _LABEL not in table:
                table[_LABEL] = labels
            unlike = np.flatnonzero(table[_LABEL].to_numpy() != labels)
            if len(unlike):
                row = unlike[0]
                raise ValueError(
                    f"{len(unlike)} examples of {each.name} have another label than in "
                    f"{labelled[0].name}: {examples[row]!r} is {labels[row]!r} and "
                    f"{table[_LABEL][row]!r} there."
                )
    return table


def _class_names(
    classifiers: Sequence[Classifier], table: pd.DataFrame, counts: ClassCounts | None
) -> list[str]:
    """The names of all classes: those of a run, or those that occur."""
    occur = pd.unique(table.drop(columns=_EXAMPLE).to_numpy().ravel()).tolist()
    if counts is None:
        return sorted(occur)
    names = list(counts.class_names or map(str, range(len(counts))))
    for each in classifiers:
        unknown = sorted(set(table[each.name]) - set(names))
        if unknown:
            hint = "Classifiers are compared on the same classes."
            expected = f"classes of the run ({quoted(names[:3])}, ...)"
            raise invalid(f"predictions of {each.name}", expected, unknown[:3], hint=hint)
    return names


def part_rows(comparisons: Sequence[Comparison]) -> list[dict[str, object]]:
    """A row a classifier and part of the classes, numbers as they are."""
    return [
        {"classifier": found.name, "part": part, **difference._asdict()}
        for found in comparisons
        for part, difference in found.parts.items()
    ]


def class_table(comparisons: Sequence[Comparison]) -> list[dict[str, object]]:
    """A row a classifier and class; ``p_holm`` is corrected for the classes of a classifier."""
    rows = []
    for found in comparisons:
        corrected = holm([difference.p_value for difference in found.classes.values()])
        for (name, difference), p_value in zip(found.classes.items(), corrected, strict=True):
            row = {"classifier": found.name, "class": name, **difference._asdict()}
            rows.append({**row, "p_holm": p_value})
    return rows


def changed_examples(table: pd.DataFrame, comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """The examples that the first classifier gets right and another wrong, or the reverse."""
    first = table.columns[1] if table.columns[1] != _LABEL else table.columns[2]
    parts = []
    for found in comparisons:
        right = table[[first, found.name]].eq(table[_LABEL], axis=0)
        changed = table[right[first] != right[found.name]]
        parts.append(
            pd.DataFrame(
                {
                    "classifier": found.name,
                    _EXAMPLE: changed[_EXAMPLE],
                    _LABEL: changed[_LABEL],
                    "predicted_by_first": changed[first],
                    _PREDICTED: changed[found.name],
                    "change": np.where(right[found.name][changed.index], "gained", "lost"),
                }
            )
        )
    return pd.concat(parts)


def write_comparison(
    output_dir: str | os.PathLike[str],
    first: Classifier,
    table: pd.DataFrame,
    comparisons: Sequence[Comparison],
) -> Path:
    """Write the tables as CSV and the page.

    Args:
        output_dir: Folder of the files.
        first: What the others are compared with.
        table: As :func:`compare` gives it.
        comparisons: Likewise.

    Returns:
        The path of the page.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    rows = class_table(comparisons)
    for file, content in (
        (PARTS_FILE, pd.DataFrame(part_rows(comparisons))),
        (CLASSES_FILE, pd.DataFrame(rows)),
        (CHANGED_FILE, changed_examples(table, comparisons)),
    ):
        write_atomic(folder / file, content.to_csv(index=False, lineterminator="\n").encode())
    page = render(
        "comparison.html.jinja",
        title=f"{len(table)} test samples, {len(comparisons) + 1} classifiers",
        subtitle=f"Compared with {first.name}",
        comparisons=[(found, worded_parts(found)) for found in comparisons],
        classes={
            found.name: [worded_class(row) for row in rows if row["classifier"] == found.name]
            for found in comparisons
        },
        most=_MAX_CLASSES,
        few=FEW_EXAMPLES,
    )
    write_atomic(folder / PAGE_FILE, page)
    return folder / PAGE_FILE


def write_baseline(
    output_dir: str | os.PathLike[str],
    baseline: str | os.PathLike[str],
    part: str = "test",
) -> Comparison:
    """Compare a run with another one on the same samples, for its report: ``baseline.csv``.

    Args:
        output_dir: Folder of the run.
        baseline: The other, as for :func:`read_classifier`.
        part: Likewise.

    Raises:
        FileNotFoundError: one of them has no predictions.
        ValueError: they differ in examples, labels or classes.
    """
    first = read_classifier(baseline, part)
    _, (found,) = compare([first, read_classifier(output_dir, part)])
    found = found._replace(name=first.name)
    table = pd.DataFrame(part_rows([found]))
    content = table.to_csv(index=False, lineterminator="\n").encode()
    write_atomic(Path(output_dir) / BASELINE_FILE, content)
    return found


def read_baseline(output_dir: str | os.PathLike[str]) -> Comparison | None:
    """What :func:`write_baseline` found, by the name of the baseline; None if there is none."""
    file = Path(output_dir) / BASELINE_FILE
    if not file.exists():
        return None
    rows = pd.read_csv(file, dtype={"classifier": str}).to_dict("records")
    fields = PairedDifference._fields
    parts = {row["part"]: PairedDifference(*(row[name] for name in fields)) for row in rows}
    return Comparison(str(rows[0]["classifier"]), parts, {})


def worded_parts(found: Comparison) -> list[dict[str, str]]:
    """The parts of a comparison as text, for a table."""
    return [{"part": part, **_worded(each)} for part, each in found.parts.items()]


def worded_class(row: Mapping[str, object]) -> dict[str, str]:
    """A row of :func:`class_table` as text."""
    fields = {name: row[name] for name in PairedDifference._fields}
    p_value = row["p_holm"]
    corrected = "-" if p_value is None else worded_p(float(p_value))  # type: ignore[arg-type]
    words = _worded(PairedDifference(**fields))  # type: ignore[arg-type]
    return {"class": str(row["class"]), **words, "p (Holm)": corrected}


def _worded(found: PairedDifference) -> dict[str, str]:
    return {
        "test samples": str(found.samples),
        "gained": str(found.gained),
        "lost": str(found.lost),
        "accuracy, points": f"{100 * found.difference:+.1f}",
        "95 %": f"{100 * found.low:+.1f}..{100 * found.high:+.1f}",
        "p": worded_p(found.p_value),
    }


def _relation(p_value: float) -> str:
    text = worded_p(p_value)
    return text if text.startswith("<") else f"= {text}"


def worded_p(value: float) -> str:
    """A p-value for people."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
