"""What the classes of a data set say of it: names that look like one, and the test set's shares."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

SAME_PRIOR = 0.03
"""Total variation distance up to which two class priors always pass for the same."""


@dataclass(frozen=True)
class Prior:
    """The classes of the test set against those of the training set.

    Args:
        distance: Total variation distance, half the sum of ``|p_c - q_c|``, in 0..1.
        shape: ``"same"`` as the training set, ``"balanced"``, or ``"different"``: what it is
            nearer to, if that is within 0.03 or within chance (chi-squared test at 1 %). With a
            class that training has not it is different.
        shifted: The classes whose shares differ most: name, share in training, share in the test.
    """

    distance: float
    shape: str
    shifted: Sequence[tuple[str, float, float]]


def look_alikes(names: Sequence[str]) -> list[list[str]]:
    """Names that are one in other spellings: capitals, blanks, ``_`` and ``-``, accents, zeros.

    Example:
        >>> look_alikes(["Cat", "dog", "cat ", "1", "01", "lap-top", "Lap top", "C", "C++"])
        [['Cat', 'cat '], ['1', '01'], ['lap-top', 'Lap top']]
    """
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(_spelling(name), []).append(name)
    return [spellings for spellings in found.values() if len(spellings) > 1]


def _spelling(name: str) -> str:
    if re.fullmatch(r"\s*[+-]?\d{1,15}(\.\d*)?\s*", name):
        return f"{float(name):g}"
    plain = unicodedata.normalize("NFKD", name).casefold()
    plain = "".join(c for c in plain if not ("\u0300" <= c <= "\u036f" or _is_invisible(c)))
    return re.sub(r"[\s_.,:;'\"-]+", " ", plain).strip() or name


def _is_invisible(sign: str) -> bool:
    return unicodedata.category(sign) == "Cf"


def compare_priors(train: np.ndarray, test: np.ndarray, names: Sequence[str]) -> Prior:
    """Compare the classes of the test set with those of the training set.

    Args:
        train: Examples of each class (C,).
        test: The same of the test set.
        names: Name of each class.

    Example:
        >>> compare_priors(np.array([900, 100]), np.array([500, 500]), ["a", "b"]).shape
        'balanced'
    """
    p, q = train / train.sum(), test / test.sum()
    distances = {
        "same": float(np.abs(p - q).sum() / 2),
        "balanced": float(np.abs(q - 1 / len(q)).sum() / 2),
    }
    shape = min(distances, key=lambda name: distances[name])
    expected = p if shape == "same" else np.full(len(q), 1 / len(q))
    alike = distances[shape] <= SAME_PRIOR or _by_chance(test, expected)
    if not alike or test[train == 0].any():
        shape = "different"
    most = np.argsort(-np.abs(p - q), kind="stable")[:5]
    shifted = [(names[c], float(p[c]), float(q[c])) for c in most if p[c] != q[c]]
    return Prior(distances["same"], shape, shifted)


def _by_chance(counts: np.ndarray, prior: np.ndarray) -> bool:
    """Whether a chi-squared test would let the counts pass for a sample of the prior (1 %)."""
    from scipy.stats import chisquare

    if counts[prior == 0].any():
        return False
    seen = prior > 0
    return bool(chisquare(counts[seen], prior[seen] * counts.sum()).pvalue > 0.01)
