"""Labelled texts of any known layout, as tables of ``datasets``."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ldam_plugins._validation import check_choice, check_int, check_real, invalid
from ldam_plugins.counts import check_label_range, label_array
from ldam_plugins.data.notes import DataNotes
from ldam_plugins.data.readers import read_texts
from ldam_plugins.data.readers.base import GROUP, LABEL, TEXT, TextRequest, text_table
from ldam_plugins.data.splits import (
    TEST_PART,
    TRAIN_PART,
    Examples,
    as_part,
    hold_out,
    note_shared_groups,
    part_of,
)

if TYPE_CHECKING:
    from datasets import Dataset

_SHOWN = 40
"""Characters of a text by which a person knows it."""


def load_texts(
    dataset: str | os.PathLike[str],
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    train_split: str = "train",
    test_split: float | str | None = None,
    group_column: str | None = None,
    encoding: str | None = None,
    delimiter: str | None = None,
    skip_empty: bool = False,
    split_file: str | os.PathLike[str] | None = None,
    seed: int = 0,
    min_kept: int = 1,
    notes: DataNotes | None = None,
) -> tuple[Dataset, Dataset]:
    """Load the texts to train on and those to test on, in the same order on every machine.

    What ``dataset`` may be: a hub id; a local folder of files as the hub serves them, or one that
    ``save_to_disk`` wrote; a CSV, TSV or JSON Lines file, or a folder with ``train.csv`` and
    ``test.csv``, or with one such file and a share for ``test_split``; a folder
    ``train/<class>/*.txt`` and ``test/<class>/*.txt``, or ``<class>/*.txt`` alone with a share for
    ``test_split``; or ``"stdlib_docstrings"``, docstrings of Python's own standard library labelled
    by module (see :func:`~ldam_plugins.data.readers.stdlib_docstrings.read_docstrings`). Data that
    exceed the disk are for :func:`~ldam_plugins.data.stream_texts`.

    Args:
        dataset: One of the above.
        text_column: Column of the texts. Default: ``text``, else the only one of strings.
        label_column: Column of the labels: class labels, integers or strings, which become
            classes in sorted order. Default: the only one of class labels, else ``label``,
            ``labels`` or the like.
        train_split: The split to train on, or a slice of one as in ``datasets``:
            ``"train[:10%]"``, ``"train[500:]"``.
        test_split: The one to test on, likewise, or the share in (0, 1) of the training split's
            examples that is held out to test on, see :func:`~ldam_plugins.data.stratified_split`.
            Default: the first there is of test, validation, valid and val.
        group_column: Column that tells what belongs together, such as an author: no group is
            divided by a share that is held out. The parts have it as ``group``.
        encoding: Of files that are not UTF-8, such as ``"cp1252"`` or ``"utf-16"``.
        delimiter: What separates the fields of a CSV file. Default: a comma, semicolon, tab or
            bar, whichever gives even rows.
        skip_empty: Leave out rows without a text or label, and files without a text, instead of
            stopping.
        split_file: A ``split.csv`` that a run left: what it tests on is tested on, in place of a
            share.
        seed: Of the choice of a share, in 0..2**32 - 1.
        min_kept: Examples that a class keeps for training, if it has more; 2 where a share of them
            is to be held out, too.
        notes: Gets what was decided, noticed and left out; without it ``logging`` does.

    Returns:
        Training and test set with the columns ``text`` (str) and ``label`` (a ``ClassLabel``
        with the names of the classes), and no others.

    Raises:
        ConnectionError: the hub cannot be reached.
        ValueError: no such dataset, split or column, with what there is; labels that are not one
            class a text; rows without text or label; an option that means nothing here.

    Example:
        >>> train, test = load_texts("stdlib_docstrings")
        >>> train.column_names, train.features["label"].names[:2]
        (['text', 'label'], ['_collections_abc', '_pydecimal'])
    """
    request = TextRequest(
        dataset=os.fspath(dataset),
        text_column=text_column,
        label_column=label_column,
        train_split=train_split,
        **as_part("test_split", test_split, split_file),
        group_column=group_column,
        encoding=encoding,
        delimiter=delimiter,
        skip_empty=skip_empty,
        notes=DataNotes() if notes is None else notes,
    )
    train, test = read_texts(request)
    if test is None:
        whole = text_examples(train)
        kept, held_out = hold_out(
            whole,
            request.test_share or 0,
            seed=seed,
            min_kept=min_kept,
            notes=request.notes,
            split_file=None if split_file is None else os.fspath(split_file),
        )
        train, test = train.select(kept), train.select(held_out)
        request.notes.divided = {
            TRAIN_PART: part_of(whole, kept),
            TEST_PART: part_of(whole, held_out),
        }
    elif group_column is not None:
        split = request.notes.parts.get("test_split", "test")
        note_shared_groups(text_examples(train), text_examples(test), split, request.notes)
    if notes is None:
        request.notes.log()
    return train, test


def text_examples(texts: Dataset) -> Examples:
    """The name, class and group of each text; it is called by its content and its first words.

    Of equal texts the second is called ``... 2`` and so on, in their order.
    """
    found: Counter[str] = Counter()
    names = []
    for text in texts[TEXT][:]:
        digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:12]
        found[digest] += 1
        again = f" {found[digest]}" if found[digest] > 1 else ""
        names.append(f"{digest}{again} {' '.join(text.split())[:_SHOWN]}")
    groups = np.array(texts[GROUP][:], dtype=object) if GROUP in texts.column_names else None
    feature = texts.features[LABEL]
    return Examples(names, np.asarray(texts[LABEL][:]), tuple(feature.names), groups)


def texts_of_classes(texts: Dataset, classes: np.ndarray) -> Dataset:
    """The texts of some of the classes, which are numbered anew in the order given."""
    names = texts.features[LABEL].names
    place = np.full(len(names), -1)
    place[classes] = np.arange(len(classes))
    labels = place[np.asarray(texts[LABEL][:])]
    kept = texts.select(np.flatnonzero(labels >= 0))
    groups = kept[GROUP][:] if GROUP in kept.column_names else None
    return text_table(kept[TEXT][:], labels[labels >= 0], [names[c] for c in classes], groups)


def subsample_classes(
    labels: Any,
    class_names: Sequence[str],
    rare_classes: Sequence[str],
    rare_fraction: float,
    seed: int = 0,
) -> np.ndarray:
    """Indices that are left if ``rare_classes`` keep ``rare_fraction`` of their samples, in order.

    The way the paper makes IMDB imbalanced: 90 % of the negative reviews are removed (Cao et al.,
    NeurIPS 2019, arXiv 1906.07413). Class c keeps ``int(rare_fraction * n_c)`` samples, the
    first of one shuffle a class in class order by NumPy's legacy generator, as in
    :func:`~ldam_plugins.long_tail_indices`.

    Args:
        labels: Class indices (N,).
        class_names: Name of each class.
        rare_classes: Names of the classes that lose samples.
        rare_fraction: Share that they keep, in (0, 1].
        seed: Seed of the choice, in 0..2**32 - 1.

    Raises:
        ValueError: an unknown class, a fraction out of range, or a class that would keep nothing.

    Example:
        >>> subsample_classes([0, 0, 0, 0, 1, 1], ["neg", "pos"], ["neg"], 0.5)
        array([2, 3, 4, 5])
    """
    array = label_array(labels)
    check_label_range(array, len(class_names))
    check_real("rare_fraction", rare_fraction, low=0, high=1, low_open=True)
    random = np.random.RandomState(check_int("seed", seed, low=0, high=2**32 - 1))
    rare = sorted(
        {class_names.index(check_choice("rare_classes", n, class_names)) for n in rare_classes}
    )
    removed = np.zeros(len(array), dtype=bool)
    for label in rare:
        members = np.flatnonzero(array == label)
        kept = int(rare_fraction * len(members))
        if kept == 0:
            expected = (
                f"large enough that {class_names[label]!r} keeps one of {len(members)} samples"
            )
            raise invalid("rare_fraction", expected, rare_fraction)
        random.shuffle(members)
        removed[members[kept:]] = True
    return np.flatnonzero(~removed)
