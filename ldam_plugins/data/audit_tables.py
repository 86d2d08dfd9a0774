"""The lists of an audit: which examples are duplicates, which are on both sides, which conflict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ldam_plugins.data.duplicates import NearPairs

TRAIN, TEST = "train", "test"
Describe = Callable[[str, np.ndarray], list[str]]
"""Names the examples of a split by their indices: paths, or the beginnings of texts."""


@dataclass(frozen=True)
class Contents:
    """Examples by content: that of each example, and the first example of each content."""

    of: np.ndarray
    first: np.ndarray


def find_contents(looked: pd.DataFrame) -> Contents:
    """Contents are numbered by their first example; training examples come before test ones."""
    of, _ = pd.factorize(looked["content"])
    _, first = np.unique(of, return_index=True)
    return Contents(of, first)


def duplicate_tables(
    looked: pd.DataFrame,
    contents: Contents,
    near: NearPairs,
    names: tuple[str, ...],
    example: Describe,
) -> dict[str, Any]:
    """The lists of an audit by name, and how many examples and contents are behind them.

    Args:
        looked: A row an example: ``split``, ``index`` in it, and ``label`` (class index).
        contents: Of these rows.
        near: Pairs of contents.
        names: Name of each class.
        example: Names examples.
    """
    looked = looked[["split", "index", "label"]].assign(content=contents.of)
    return {
        "duplicates": name_examples(_duplicates(looked, contents, near), names, example),
        "leaks": _paired(looked, _leaks(looked, contents, near), names, example),
        "conflicts": _paired(looked, _conflicts(looked, contents, near), names, example),
        "equal": len(looked) - len(contents.first),
        "near": len(near.first),
        "near_complete": near.complete,
    }


def _duplicates(looked: pd.DataFrame, contents: Contents, near: NearPairs) -> pd.DataFrame:
    """The examples of every content, or group of near contents, that has more than one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    size = len(contents.first)
    links = coo_array((np.ones(len(near.first)), (near.first, near.second)), shape=(size, size))
    _, group = connected_components(links, directed=False)
    looked = looked.assign(group=group[contents.of])
    several = looked.groupby("group")["group"].transform("size") > 1
    found = looked[several].sort_values(["group", "content"], kind="stable")
    numbered = {name: pd.factorize(found[name])[0] for name in ("group", "content")}
    return found.assign(**numbered)[["group", "content", "split", "index", "label"]]


def _leaks(looked: pd.DataFrame, contents: Contents, near: NearPairs) -> pd.DataFrame:
    """Row of each test example whose content is in the training set too, or near to one there."""
    trained = np.zeros(len(contents.first), dtype=bool)
    trained[contents.of[(looked["split"] == TRAIN).to_numpy()]] = True
    one = np.concatenate([np.flatnonzero(trained), near.first, near.second])
    other = np.concatenate([np.flatnonzero(trained), near.second, near.first])
    difference = np.concatenate([np.zeros(trained.sum()), near.difference, near.difference])
    sources = pd.DataFrame({"content": one, "source": other, "difference": difference})
    # The sort is stable, and equal contents stand first.
    sources = sources[trained[other]].sort_values("difference", kind="stable")
    nearest = sources.drop_duplicates("content").set_index("content")
    tested = (looked["split"] == TEST).to_numpy()
    rows = np.flatnonzero(tested & np.isin(contents.of, nearest.index))
    found = nearest.loc[contents.of[rows]]
    source = found["source"].to_numpy(dtype=int)
    columns = {"row": rows, "other": contents.first[source], "equal": source == found.index}
    return pd.DataFrame(columns | {"difference": found["difference"].to_numpy()})


def _conflicts(looked: pd.DataFrame, contents: Contents, near: NearPairs) -> pd.DataFrame:
    """Rows of equal examples, then of near ones, with different labels."""
    labels = looked["label"].to_numpy()
    first = contents.first[contents.of]
    equal = np.flatnonzero(labels != labels[first])
    one, other = contents.first[near.first], contents.first[near.second]
    odd = np.flatnonzero(labels[one] != labels[other])
    columns = {
        "row": np.concatenate([first[equal], one[odd]]),
        "other": np.concatenate([equal, other[odd]]),
        "equal": np.arange(len(equal) + len(odd)) < len(equal),
        "difference": np.concatenate([np.zeros(len(equal)), near.difference[odd]]),
    }
    return pd.DataFrame(columns)


def name_examples(
    rows: pd.DataFrame,
    names: tuple[str, ...],
    example: Describe,
) -> pd.DataFrame:
    """Rows with the names of their classes and examples in place of the labels' numbers."""
    kept = [name for name in ("group", "content", "split", "index", "label") if name in rows]
    kept = [name for name in kept if name != "content" or "group" in rows]
    rows = rows[kept].reset_index(drop=True)
    shown = pd.Series([""] * len(rows), dtype=object)
    for split in (TRAIN, TEST):
        places = np.flatnonzero(rows["split"] == split)
        if len(places):
            shown[places] = example(split, rows["index"].to_numpy()[places])
    labels = [names[label] for label in rows["label"]]
    return rows.assign(label=pd.Series(labels, dtype=object), example=shown)


def _paired(
    looked: pd.DataFrame,
    pairs: pd.DataFrame,
    names: tuple[str, ...],
    example: Describe,
) -> pd.DataFrame:
    columns = ["split", "index", "label"]
    one, other = (
        name_examples(looked[columns].iloc[pairs[side].to_numpy(dtype=int)], names, example)
        for side in ("row", "other")
    )
    match = np.where(pairs["equal"], "equal", "near")
    both = one.join(other.add_prefix("other_"))
    return both.assign(match=match, difference=pairs["difference"].to_numpy())
