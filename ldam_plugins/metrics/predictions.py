"""What a classifier says of each example, for a table that people and other programs read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldam_plugins._validation import invalid
from ldam_plugins.metrics.rows import TOP_K, check_scores


def probabilities(logits: Tensor) -> Tensor:
    """Softmax of logits (N, C) in float64."""
    return logits.double().log_softmax(dim=1).exp()


class Predictions:
    """The likeliest classes of each example with their probabilities, fed in batches.

    Probabilities are the softmax of the logits in float64. Of classes as likely as one another the
    first counts as the likelier one, as in the other metrics.

    Args:
        num_classes: Columns of the logits.
        top: How many of the likeliest classes are kept, fewer if there are not so many.

    Example:
        >>> found = Predictions(2)
        >>> found.update([0], torch.tensor([[0.0, 2.0]]), [0])
        >>> columns = found.columns(["photo.jpg"])
        >>> columns["predicted"], round(columns["probability"][0], 3)
        ([1], 0.881)
    """

    def __init__(self, num_classes: int, *, top: int = TOP_K) -> None:
        self.num_classes = num_classes
        self.top = min(top, num_classes)
        self._batches: list[tuple[np.ndarray, ...]] = []

    @torch.no_grad()
    def update(
        self, rows: Sequence[int] | np.ndarray, logits: Tensor, labels: Any | None = None
    ) -> None:
        """Add a batch.

        Args:
            rows: Place of each example among all (N,), from 0.
            logits: (N, C).
            labels: Class index of each example (N,), if they are known.
        """
        scores = check_scores(logits, self.num_classes).detach().cpu().double()
        shares = probabilities(scores)
        order = torch.argsort(scores, dim=1, descending=True, stable=True)[:, : self.top]
        target = np.full(len(scores), -1) if labels is None else np.asarray(labels)
        known = torch.from_numpy(np.maximum(target, 0).astype(np.int64))
        of_label = shares.gather(1, known[:, None])[:, 0].numpy()
        self._batches.append(
            (
                np.asarray(rows, dtype=np.int64),
                target.astype(np.int64),
                of_label,
                order.numpy(),
                shares.gather(1, order).numpy(),
            )
        )

    def merge(self, other: Predictions) -> None:
        """Add what another one has seen, on another process for instance."""
        self._batches += other._batches

    def columns(self, examples: Sequence[str]) -> dict[str, list[Any]]:
        """The columns of the table, a row an example, in their order.

        Args:
            examples: Name of each example.

        Returns:
            ``example``, ``label`` (class index, -1 where it is not known), ``predicted``,
            ``probability``, ``label_probability`` (None where the label is not known), and
            ``predicted_2``, ``probability_2`` and so on for the classes that come next.

        Raises:
            ValueError: an example is missing or there twice, or there is none.
        """
        if not self._batches:
            raise invalid("examples", "at least one", list(examples))
        rows, label, of_label, order, probability = (
            np.concatenate(parts) for parts in zip(*self._batches, strict=True)
        )
        place = np.argsort(rows, kind="stable")
        if not np.array_equal(rows[place], np.arange(len(examples))):
            raise invalid("rows", f"each of {len(examples)} examples once", f"{len(rows)} rows")
        order, probability = order[place].T, probability[place].T
        known = (label[place] >= 0).tolist()
        found = {
            "example": list(examples),
            "label": label[place].tolist(),
            "predicted": order[0].tolist(),
            "probability": probability[0].tolist(),
            "label_probability": [
                share if is_known else None
                for share, is_known in zip(of_label[place].tolist(), known, strict=True)
            ],
        }
        for rank in range(1, self.top):
            found[f"predicted_{rank + 1}"] = order[rank].tolist()
            found[f"probability_{rank + 1}"] = probability[rank].tolist()
        return found
