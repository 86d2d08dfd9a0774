"""What :mod:`ldam_plugins.data.audit` found, in words: for the terminal, as a page, as files."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from tabulate import tabulate

from ldam_plugins.data.audit import TABLES, Audit, group_of
from ldam_plugins.data.audit_tables import TEST, TRAIN
from ldam_plugins.reports.class_table import group_titles, printable
from ldam_plugins.reports.html import render
from ldam_plugins.training.files import to_json, write_atomic

AUDIT_FILE, AUDIT_PAGE = "audit.json", "report.html"
FIX, LOOK, NOTE = "fix", "look", "note"
"""How much a finding matters: put it right before training; look at it; good to know."""
_BAR = 30
_NAMED = 5
_MAX_TABLE_ROWS = 1000
_MAX_PAIRS = 12
_FEW_TESTED = 10
_WORDS = {"images": ("image", "images"), "texts": ("text", "texts")}

Preview = Callable[[str, int], bytes]
"""A small JPEG of an example: of its split and index."""


class Finding(NamedTuple):
    """One thing that was found: how much it matters, what it is, what it does and what to do."""

    level: str
    title: str
    advice: str


@dataclass(frozen=True)
class Advice:
    """What to run, and what speaks for it.

    Args:
        command: To paste into a shell.
        reasons: What is chosen, its values, and the evidence or that there is none.
    """

    command: str
    reasons: Sequence[tuple[str, str, str]]


def findings(audit: Audit) -> list[Finding]:
    """What a person should know of a data set, the gravest first."""
    found = [*_files(audit), *_pairs(audit), *_classes(audit), *_facts(audit)]
    return sorted(found, key=lambda finding: (FIX, LOOK, NOTE).index(finding.level))


def audit_text(
    audit: Audit, title: str, advice: Advice | None = None, *, max_rows: int = 30
) -> str:
    """The findings for a terminal, with the classes as a table and histogram from head to tail.

    Args:
        audit: What was found.
        title: The data set.
        advice: What to run, if anything is advised.
        max_rows: With more classes than that, the first and last ones only.
    """
    parts = [f"{title}: {_subtitle(audit)}", _class_table(audit, max_rows), _groups(audit)]
    parts += ["\n".join(f"{name}: {value}" for name, value in _content(audit))]
    for level, heading in (
        (FIX, "TO PUT RIGHT"),
        (LOOK, "TO LOOK AT"),
        (NOTE, "GOOD TO KNOW"),
    ):
        lines = [_wrapped(f) for f in findings(audit) if f.level == level]
        parts += ["\n".join([heading, *lines])] if lines else []
    if advice is not None:
        rows = [f"  {what}: {values}\n{_indented(why)}" for what, values, why in advice.reasons]
        parts += ["\n".join(["WHAT TO RUN", *rows]), advice.command]
    return "\n\n".join(parts)


def write_audit(
    audit: Audit,
    folder: str | os.PathLike[str],
    title: str,
    *,
    advice: Advice | None = None,
    preview: Preview | None = None,
) -> Path:
    """Write ``audit.json``, the lists as CSV that hold a row, and the page ``report.html``.

    A list of an earlier audit that would be empty now is removed. The page needs no network and no
    script, and follows the reader's light or dark setting.

    Args:
        audit: What was found.
        folder: Where to; it is made if it is not there.
        title: The data set.
        advice: What to run, if anything is advised.
        preview: Gives small pictures of examples for the page.

    Returns:
        The path of the page.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / AUDIT_FILE, to_json(audit.to_dict(), name="audit").encode())
    for name in TABLES:
        table: pd.DataFrame = getattr(audit, name)
        if len(table):
            content = table.to_csv(index=False, lineterminator="\n", float_format="%.6g")
            write_atomic(folder / f"{name}.csv", content.encode("utf-8", "replace"))
        else:
            (folder / f"{name}.csv").unlink(missing_ok=True)
    rows = _rows(audit)
    page = render(
        "audit.html.jinja",
        title=title,
        subtitle=_subtitle(audit),
        summary=_summary(audit),
        findings=findings(audit),
        advice=advice,
        galleries=list(_galleries(audit, preview)),
        rows=rows[:_MAX_TABLE_ROWS],
        left_out=max(len(rows) - _MAX_TABLE_ROWS, 0),
        most=max(row.train for row in rows),
        tested=TEST in audit.counts,
        groups=_groups(audit),
        content=_content(audit),
        criterion=audit.criterion,
        prior=audit.prior,
    )
    write_atomic(folder / AUDIT_PAGE, page)
    return folder / AUDIT_PAGE


# Findings


def _files(audit: Audit) -> list[Finding]:
    count = len(audit.unreadable)
    if not count:
        return []
    verb = "cannot be read"
    advice = "Training stops at the first of them. Repair or remove them (unreadable.csv has the "
    return [
        Finding(
            FIX,
            f"{_many(audit, count)} {verb}",
            f"{advice}reasons), or leave them out with --skip_corrupt. The first: "
            f"{audit.unreadable['example'].iloc[0]}.",
        )
    ]


def _pairs(audit: Audit) -> list[Finding]:
    found = []
    leaked, tests = len(audit.leaks), audit.sizes.get(TEST, 0)
    if leaked:
        same = int((audit.leaks["match"] == "equal").sum())
        found.append(
            Finding(
                FIX if same or leaked > 0.01 * tests else LOOK,
                f"{_many(audit, leaked)} of the {tests} to test on ({leaked / tests:.1%}) "
                f"{_plural(leaked, 'has a twin', 'have twins')} in the training set: {same} equal, "
                f"{leaked - same} nearly so",
                "The test error comes out too low by those that are one thing. leaks.csv has the "
                "pairs: leave one of each out.",
            )
        )
    elif tests:
        found.append(
            Finding(NOTE, "No test example was found in the training set", audit.criterion + ".")
        )
    conflicts = audit.conflicts
    if len(conflicts):
        same = int((conflicts["match"] == "equal").sum())
        things = _WORDS[audit.kind][1]
        example = " / ".join(printable(str(conflicts.iloc[0][c])) for c in ("label", "other_label"))
        found.append(
            Finding(
                FIX if same else LOOK,
                f"{len(conflicts)} {_plural(len(conflicts), 'pair', 'pairs')} of {things} with "
                f"different labels: {same} equal, {len(conflicts) - same} nearly so",
                "One label of a pair is wrong, or the two classes overlap. Decide each in "
                f"conflicts.csv. The first: {example}.",
            )
        )
    if len(audit.duplicates):
        found.append(_repeated(audit))
    if not audit.near_complete:
        found.append(
            Finding(
                LOOK,
                "Not all near duplicates were looked for",
                "There are so many that the search stopped; the lists hold some of them.",
            )
        )
    return found


def _repeated(audit: Audit) -> Finding:
    groups = audit.duplicates["group"].nunique()
    share = audit.equal / sum(audit.sizes.values())
    title = (
        f"{len(audit.duplicates)} {_WORDS[audit.kind][1]} have a duplicate, in {groups} "
        f"{_plural(groups, 'group', 'groups')}; {audit.equal} "
        f"{_plural(audit.equal, 'repeats', 'repeat')} another one exactly"
    )
    advice = (
        "They count more than once in training and in the class counts. duplicates.csv has the "
    )
    advice += "groups: keep one of each content, and look at the others of a group."
    return Finding(LOOK if share > 0.001 or groups > 10 else NOTE, title, advice)


def _classes(audit: Audit) -> list[Finding]:
    found = [
        Finding(
            FIX,
            f"Class names that look like one: {', '.join(repr(name) for name in names)}",
            "Each spelling is trained as a class of its own. Give them one name if they are one.",
        )
        for names in audit.look_alikes
    ]
    if len(audit.class_names) < 2:
        advice = "There is nothing to tell apart: is it the folder or the column that you mean?"
        found.append(Finding(FIX, f"All is of one class, {audit.class_names[0]!r}", advice))
    if absent := audit.absent(TRAIN):
        advice = "It cannot be learned: add examples, or leave the class out of the test set."
        found.append(Finding(FIX, f"Nothing to train on in {_named(absent)}", advice))
    if absent := audit.absent(TEST):
        advice = "How well it is told apart will not be measured; means over classes leave it out."
        found.append(Finding(LOOK, f"Nothing to test on in {_named(absent)}", advice))
    tested = np.array(audit.counts.get(TEST, []))
    if few := int(((tested > 0) & (tested < _FEW_TESTED)).sum()):
        advice = "The accuracy of such a class may be off by 30 points and more by chance alone."
        title = (
            f"{few} {_plural(few, 'class has', 'classes have')} fewer than {_FEW_TESTED} to test on"
        )
        found.append(Finding(LOOK, title, advice))
    if audit.prior is not None:
        found += _prior(audit)
    else:
        advice = "Hold out a part of each class for it with --test_split 0.2."
        found.append(Finding(LOOK, "There is no test set", advice))
    return found


def _prior(audit: Audit) -> list[Finding]:
    prior = audit.prior
    assert prior is not None
    even = audit.imbalance_ratio < 1.5
    if prior.shape == "same" and even:
        return [Finding(NOTE, "All classes are about as frequent, in training and test", "")]
    if prior.shape == "same":
        advice = "Its top-1 error is mostly that of the large classes: read the balanced accuracy."
        return [Finding(NOTE, "The test set has the class shares of the training set", advice)]
    if prior.shape == "balanced":
        advice = (
            "Top-1 error and balanced error are the same there. In use, are classes as frequent?"
        )
        return [Finding(NOTE, "The test set is balanced, the training set is not", advice)]
    shifts = "; ".join(
        f"{printable(name)} {train:.1%} in training, {test:.1%} in the test"
        for name, train, test in prior.shifted[:3]
    )
    title = f"The classes of the test set have other shares than in training ({shifts})"
    advice = "Which of the two will it be in use? Read the balanced accuracy until that is known."
    return [Finding(LOOK, title, advice)]


def _facts(audit: Audit) -> list[Finding]:
    found = []

    def add(level: str, count: int | None, what: str, advice: str) -> None:
        if count:
            found.append(Finding(level, f"{_many(audit, count)} {what}", advice))

    if audit.images is not None:
        facts = audit.images
        add(LOOK, facts.one_colour, "of a single colour", "Nothing can be learned from them.")
        add(
            NOTE,
            facts.rotated,
            "with an EXIF entry that turns them",
            "Read upright, as viewers show them; other code may read them lying on their side.",
        )
        add(
            LOOK,
            facts.elongated,
            "over three times as long as wide, or as wide as long",
            "Evaluation crops the middle: --crop_mode squash or border keeps the ends.",
        )
        add(NOTE, facts.animated, "with several frames", "The first frame is used.")
        others = sum(count for mode, count in facts.modes.items() if mode != "RGB")
        add(
            NOTE,
            others,
            "not stored as RGB",
            "Read as RGB; what is transparent becomes white.",
        )
    if audit.texts is not None:
        text = audit.texts
        add(LOOK, text.empty, "without a letter or digit", "Nothing can be learned from them.")
        if text.cut_texts:
            share = text.cut_texts / sum(audit.sizes.values())
            add(
                LOOK if share > 0.05 else NOTE,
                text.cut_texts,
                f"({share:.1%}) longer than {text.max_length} tokens: {text.cut_tokens:.1%} of all "
                "tokens are cut off",
                "A greater --max_length keeps them, at a cost that grows with it.",
            )
    return found


# Words


def _many(audit: Audit, count: int) -> str:
    return f"{count} {_plural(count, *_WORDS[audit.kind])}"


def _plural(count: int, one: str, several: str) -> str:
    return one if count == 1 else several


def _named(names: Sequence[str]) -> str:
    """Classes in words: how many, and the first of them by name."""
    shown = ", ".join(printable(name) for name in names[:_NAMED])
    more = ", ..." if len(names) > _NAMED else ""
    return f"{len(names)} {_plural(len(names), 'class', 'classes')} ({shown}{more})"


def _subtitle(audit: Audit) -> str:
    sizes = audit.sizes
    tests = f", {sizes[TEST]} to test on" if TEST in sizes else ""
    classes = f"{len(audit.class_names)} classes"
    return f"{audit.kind}, {sizes[TRAIN]} to train on{tests}, {classes}"


def _groups(audit: Audit) -> str:
    groups = audit.groups()
    named = [f"{words}: {len(groups[group])}" for group, words in group_titles().items()]
    named += [f"absent: {len(groups['absent'])}"] if groups["absent"] else []
    counts = [count for count in audit.counts[TRAIN] if count]
    ratio = f"imbalance ratio {audit.imbalance_ratio:.4g} ({max(counts)} to {min(counts)})"
    return f"{ratio}; classes by training examples: {', '.join(named)}"


def _summary(audit: Audit) -> list[tuple[str, str]]:
    sizes, groups = audit.sizes, audit.groups()
    tests = [("to test on", f"{sizes[TEST]}")] if TEST in sizes else []
    return [
        ("to train on", f"{sizes[TRAIN]}"),
        *tests,
        ("classes", f"{len(audit.class_names)}"),
        ("imbalance ratio", f"{audit.imbalance_ratio:.4g}"),
        *((words, f"{len(groups[group])}") for group, words in group_titles().items()),
    ]


def _content(audit: Audit) -> list[tuple[str, str]]:
    """Sizes of images or lengths of texts, in words."""
    if audit.images is not None:
        facts = audit.images
        pairs = [("width", _spread(facts.width)), ("height", _spread(facts.height))]
        pairs += [("sizes", _counted(facts.sizes)), ("modes", _counted(facts.modes))]
        return [*pairs, ("files", _counted(facts.formats))]
    assert audit.texts is not None
    text = audit.texts
    pairs = [("characters", _spread(text.characters)), ("words", _spread(text.words))]
    none = "not counted: --model names the tokenizer"
    return [*pairs, ("tokens", none if text.tokens is None else _spread(text.tokens))]


def _spread(values: Mapping[str, float]) -> str:
    if values["least"] == values["greatest"]:
        return f"{values['least']:g}"
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


def _counted(values: Mapping[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in values.items())


def _wrapped(finding: Finding) -> str:
    title = textwrap.fill(finding.title + ".", 98, initial_indent="  * ", subsequent_indent="    ")
    return f"{title}\n{_indented(finding.advice)}" if finding.advice else title


def _indented(text: str) -> str:
    return textwrap.fill(text, 98, initial_indent="    ", subsequent_indent="    ")


# Classes


class AuditedClass(NamedTuple):
    """One class of a data set."""

    name: str
    train: int
    share: float
    group: str
    test: int | None


def _rows(audit: Audit) -> list[AuditedClass]:
    """The classes from head to tail."""
    total = audit.sizes[TRAIN]
    tests = audit.counts.get(TEST, [None] * len(audit.class_names))
    rows = [
        AuditedClass(name, train, train / total, group_of(train), test)
        for name, train, test in zip(audit.class_names, audit.counts[TRAIN], tests, strict=True)
    ]
    return sorted(rows, key=lambda row: -row.train)


def _class_table(audit: Audit, max_rows: int) -> str:
    rows = _rows(audit)
    most = rows[0].train
    lines: list[tuple[str, ...]] = [
        (
            printable(row.name),
            f"{row.train}",
            f"{row.share:.1%}",
            row.group,
            "-" if row.test is None else f"{row.test}",
            "#" * max(round(_BAR * row.train / most), 1 if row.train else 0),
        )
        for row in rows
    ]
    if len(lines) > max_rows:
        head, tail = max_rows - max_rows // 2, max_rows // 2
        gap = (f"... {len(lines) - max_rows} more classes", *["..."] * 4, "")
        lines = [*lines[:head], gap, *lines[-tail:]]
    headers = ("class", "train", "share", "group", "test", "")
    align = ("left", "right", "right", "left", "right", "left")
    return tabulate(lines, headers, colalign=align, disable_numparse=True)


# Pages


class Side(NamedTuple):
    """One example of a pair on the page."""

    where: str
    label: str
    example: str
    picture: bytes | None


def _galleries(audit: Audit, preview: Preview | None) -> Any:
    """Title, file and first pairs of the leaks and the conflicts."""
    titles = {"leaks": "In the test and in the training set", "conflicts": "Different labels"}
    for name, title in titles.items():
        table: pd.DataFrame = getattr(audit, name)
        if len(table):
            chosen = table.iloc[
                np.linspace(0, len(table) - 1, min(len(table), _MAX_PAIRS)).astype(int)
            ]
            pairs = [
                (_side(row, "", preview), _side(row, "other_", preview), _worded(audit.kind, row))
                for row in chosen.to_dict("records")
            ]
            yield title, f"{name}.csv", len(table), pairs


def _worded(kind: str, row: Mapping[Any, Any]) -> str:
    """How far apart a pair is."""
    if row["match"] == "equal":
        return "equal"
    if kind == "images":
        return f"near: {row['difference']:.0f} bits of the hashes differ"
    return f"near: {row['difference']:.0%} of the runs of 5 signs are in one of them only"


def _side(row: Mapping[Any, Any], prefix: str, preview: Preview | None) -> Side:
    split, index, label, example = (
        row[f"{prefix}{name}"] for name in ("split", "index", "label", "example")
    )
    picture = None if preview is None else preview(split, index)
    return Side(f"{split} {index}", label, example, picture)
