"""The digits of scikit-learn."""

from __future__ import annotations

import numpy as np
import sklearn.datasets

from ldam_plugins.data import load_images


def test_digits_are_balanced_disjoint_and_the_same_every_time():
    digits = sklearn.datasets.load_digits()
    known = {image.tobytes(): label for image, label in zip(digits.images, digits.target)}  # noqa: B905
    train, test = load_images("digits")
    assert np.bincount(train.labels).tolist() == [120] * 10
    assert np.bincount(test.labels).tolist() == [54] * 10
    seen = set()
    for images in (train, test):
        for row in range(len(images)):
            image, label = images[row]
            grey = np.asarray(image)[:, :, 0] * (16 / 255)
            assert known[grey.round().tobytes()] == label
            seen.add(grey.round().tobytes())
    assert len(seen) == len(train) + len(test)
    assert train.labels[:12].tolist() == load_images("digits")[0].labels[:12].tolist()
    assert train.labels[:6].tolist() == [0, 2, 3, 5, 6, 7]  # the same on every machine
