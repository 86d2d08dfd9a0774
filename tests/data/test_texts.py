"""Texts to train on, and which of them are kept."""

from __future__ import annotations

import numpy as np
import pytest
from paths import DATA

from ldam_plugins.data.texts import load_texts, subsample_classes


def test_subsample_classes_keeps_a_share_of_the_rare_ones():
    labels = np.array([0, 1] * 50)
    kept = subsample_classes(labels, ["neg", "pos"], ["neg"], 0.1)
    assert np.bincount(labels[kept]).tolist() == [5, 50]
    assert (np.diff(kept) > 0).all()
    order = np.flatnonzero(labels == 0)
    np.random.RandomState(0).shuffle(order)
    assert set(kept[labels[kept] == 0]) == set(order[:5])
    other = subsample_classes(labels, ["neg", "pos"], ["neg"], 0.1, seed=1)
    assert set(other) != set(kept)


def test_subsample_classes_without_rare_classes_keeps_all():
    assert subsample_classes([1, 0, 1], ["a", "b"], [], 0.1).tolist() == [0, 1, 2]
    assert subsample_classes([1, 0, 1], ["a", "b"], ["a", "b"], 1).tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("rare", "fraction", "message"),
    [
        (["negative"], 0.1, "`rare_classes` must be one of 'neg', 'pos', got 'negative'"),
        (["neg"], 0.0, r"`rare_fraction` must be in \(0, 1\], got 0.0"),
        (["neg"], 0.3, "large enough that 'neg' keeps one of 3 samples, got 0.3"),
    ],
)
def test_subsample_classes_refuses(rare, fraction, message):
    with pytest.raises(ValueError, match=message):
        subsample_classes([0, 0, 0, 1], ["neg", "pos"], rare, fraction)


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the shared data beside the checkout")
@pytest.mark.parametrize(("name", "rows", "classes"), [("banking77", (10003, 3080), 77)])
def test_real_data(name, rows, classes):
    train, test = load_texts(DATA / name)
    assert (len(train), len(test)) == rows
    assert len(train.features["label"].names) == classes
