"""What a person is told of a data set: what was chosen, noticed and left out."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

logger = logging.getLogger(__name__)


@dataclass
class DataNotes:
    """What the reading of a data set decided, noticed and left out.

    Attributes:
        said: Sentences for a person.
        columns: The columns that are read, by the argument that chooses each.
        parts: The names of the splits that are read, by the argument that chooses each.
        left_out: How many examples are left out, by part and reason.
        divided: The parts of a data set that was divided here, ``train``, ``test`` and
            ``validation``, for :func:`~ldam_plugins.data.splits.save_split`; empty if it was not.
    """

    said: list[str] = field(default_factory=list)
    columns: dict[str, str] = field(default_factory=dict)
    parts: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    divided: dict[str, Any] = field(default_factory=dict)
    _printed: int = 0

    def say(self, sentence: str) -> None:
        """Add a sentence, once."""
        if sentence not in self.said:
            self.said.append(sentence)

    def leave_out(self, reason: str, count: int, details: str = "") -> None:
        """Count examples that are left out, and say so."""
        self.left_out[reason] = self.left_out.get(reason, 0) + count
        self.say(f"Left out: {count} {reason}{f' ({details})' if details else ''}.")

    def record(self) -> dict[str, Any]:
        """What ``metrics.json`` says of it; empty if there is nothing to say."""
        found = {"columns": self.columns, "left_out": self.left_out, "said": self.said}
        data = {name: value for name, value in found.items() if value}
        return {"data": data} if data else {}

    def log(self) -> None:
        """Hand every sentence to ``logging``, for callers that did not ask for the notes."""
        for sentence in self.said:
            logger.warning(sentence)

    def print(self) -> None:
        """Print the sentences that were not printed yet, each on a line of its own."""
        for sentence in self.said[self._printed :]:
            print(sentence)
        self._printed = len(self.said)
