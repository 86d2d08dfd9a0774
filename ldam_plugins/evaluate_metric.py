"""The long-tail metrics as a metric of Hugging Face's evaluate, and for their Trainer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from torch import Tensor

from ldam_plugins._checks import must_be, quoted
from ldam_plugins.counts import ClassCounts
from ldam_plugins.metrics import MetricAccumulator, long_tail_metrics

_DESCRIPTION = """
Accuracy under a long tail: per class, mean of the many/medium/few groups of training classes,
balanced and worst class, with cross-entropy and calibration error.
"""
_INPUTS = """
Args:
    predictions: logits, one row of C floats for each sample.
    references: class indices 0..C-1; -100 for rows that count nowhere.

Returns:
    The dictionary of `ldam_plugins.metrics.long_tail_metrics`.
"""
_CITATION = """
@inproceedings{cao2019ldam,
  title = {Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss},
  author = {Cao, Kaidi and Wei, Colin and Gaidon, Adrien and Arechiga, Nikos and Ma, Tengyu},
  booktitle = {Advances in Neural Information Processing Systems},
  year = {2019}
}
"""


class LongTailMetrics(evaluate.Metric):
    """:func:`~ldam_plugins.metrics.long_tail_metrics` for evaluate and for ``Trainer``.

    As an ``evaluate.Metric`` it takes logits as ``predictions`` and class indices as
    ``references``, through ``add``, ``add_batch``, ``compute`` and ``evaluate.combine``, and
    returns the whole dictionary. Nothing is loaded from the hub. evaluate holds the logits in
    memory; for very many classes feed a :class:`~ldam_plugins.metrics.MetricAccumulator`.

    As ``Trainer(compute_metrics=LongTailMetrics(counts))`` it returns floats only, which every
    tracker can log: ``top1_error`` (%), ``balanced_accuracy``, ``worst_class_accuracy``, ``many``,
    ``medium``, ``few``, ``nll``, ``ece``. A group that no evaluated class belongs to is left out.
    ``batch_eval_metrics=True`` of the training arguments works and keeps no logits.

    Args:
        class_counts: *Training* samples per class, (C).
        per_class: Also give ``Trainer`` an ``accuracy_<class>`` for each evaluated class, by name
            where ``class_counts`` has names, else by index.
        keep_in_memory: As in evaluate; here True unless told, so that no lock file is waited for.
            evaluate's own gathering (``num_process > 1``) needs False; ``Trainer`` and
            ``Accelerator.gather_for_metrics`` have gathered already.
        **options: Further arguments of ``evaluate.Metric``.

    Raises:
        ValueError: ``per_class`` with two classes of one name.

    Example:
        >>> metric = LongTailMetrics(ClassCounts([500, 5], class_names=["cat", "lynx"]))
        >>> metric.add_batch(predictions=[[2.0, 0.0], [0.0, 2.0]], references=[0, 1])
        >>> metric.compute(predictions=[[2.0, 0.0]], references=[1])["per_class_accuracy"]
        [1.0, 0.5]
    """

    def __init__(
        self,
        class_counts: ClassCounts | Sequence[int] | np.ndarray | Tensor,
        *,
        per_class: bool = False,
        keep_in_memory: bool = True,
        **options: Any,
    ) -> None:
        self._accumulator = MetricAccumulator(class_counts)
        self.class_counts = self._accumulator.class_counts
        self.per_class = per_class
        if per_class:
            _check_distinct(self._class_keys())
        super().__init__(keep_in_memory=keep_in_memory, **options)

    def __call__(self, eval_pred: Any, compute_result: bool = True) -> dict[str, float]:
        """``Trainer``'s ``compute_metrics``.

        Args:
            eval_pred: ``EvalPrediction``, or a pair (predictions, labels). Of a tuple of model
                outputs the first is taken as the logits; a list holds batches
                (``eval_do_concat_batches=False``).
            compute_result: False while batches are still to come (``batch_eval_metrics=True``);
                the answer is empty then.

        Raises:
            TypeError: ``logits`` are not floats or ``labels`` not integers.
            ValueError: as :func:`~ldam_plugins.metrics.long_tail_metrics`.
        """
        done = False
        try:
            for logits, labels in _batches(eval_pred[0], eval_pred[1]):
                self._accumulator.update(logits, labels)
            result = self._flat(self._accumulator.compute()) if compute_result else {}
            done = not compute_result
        finally:
            if not done:
                self._accumulator.reset()
        return result

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.Sequence(datasets.Value("float64")),
            "references": datasets.Value("int64"),
        }
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, *, predictions: list[list[float]], references: list[int]) -> dict[str, Any]:
        return long_tail_metrics(predictions, references, self.class_counts)

    def _flat(self, metrics: dict[str, Any]) -> dict[str, float]:
        by_class = metrics.pop("per_class_accuracy")
        if self.per_class:
            metrics.update(zip(self._class_keys(), by_class, strict=True))
        return {name: value for name, value in metrics.items() if value is not None}

    def _class_keys(self) -> list[str]:
        names = self.class_counts.class_names or range(len(self.class_counts))
        return [f"accuracy_{name}" for name in names]


def _batches(predictions: Any, labels: Any) -> Iterator[tuple[Any, Any]]:
    parts = zip(predictions, labels, strict=True) if isinstance(predictions, list) else None
    for outputs, target in parts or [(predictions, labels)]:
        if isinstance(target, tuple):
            wanted = "one array of class indices"
            way_out = "Keep one name in `label_names` of the training arguments."
            raise ValueError(must_be("labels", wanted, f"{len(target)} of them", way_out))
        yield (outputs[0] if isinstance(outputs, tuple) else outputs), target


def _check_distinct(keys: list[str]) -> None:
    twice = [key for key, times in Counter(keys).items() if times > 1]
    if twice:
        wanted = "False where classes share a name"
        raise ValueError(must_be("per_class", wanted, f"True and twice {quoted(twice)}"))
