"""Counts of pairs of integers of which few occur, such as a confusion matrix of many classes."""

from __future__ import annotations

import numpy as np

_BUFFERED = 1 << 20


class SparseCounts:
    """How often each of some integers was added; memory is O(of those that occur)."""

    def __init__(self) -> None:
        self._codes = np.zeros(0, dtype=np.int64)
        self._counts = np.zeros(0, dtype=np.int64)
        self._buffer: list[np.ndarray] = []

    def add(self, codes: np.ndarray) -> None:
        """Count each of ``codes`` (N,) once."""
        self._buffer.append(codes)
        if sum(map(len, self._buffer)) > _BUFFERED:
            self._consolidate()

    def merge(self, codes: np.ndarray, counts: np.ndarray) -> None:
        """Count each of ``codes`` (M,) as often as ``counts`` (M,) says."""
        self._consolidate()
        self._codes, self._counts = _summed(
            np.concatenate([self._codes, codes]), np.concatenate([self._counts, counts])
        )

    def items(self) -> tuple[np.ndarray, np.ndarray]:
        """The integers that occur, ascending, and how often."""
        self._consolidate()
        return self._codes, self._counts

    def _consolidate(self) -> None:
        if self._buffer:
            new, counts = np.unique(np.concatenate(self._buffer), return_counts=True)
            self._buffer = []
            self.merge(new, counts)


def _summed(codes: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    unique, place = np.unique(codes, return_inverse=True)
    return unique, np.bincount(place, counts, minlength=len(unique)).astype(np.int64)
