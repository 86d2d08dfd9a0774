"""The long-tail metrics as a metric of Hugging Face's evaluate, and for their Trainer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from torch import Tensor

from ldam_plugins._call_stack import trainer_calls
from ldam_plugins._validation import invalid, quoted
from ldam_plugins.counts import ClassCounts
from ldam_plugins.losses.model_outputs import find_logits, one_label_a_row
from ldam_plugins.metrics import MetricAccumulator, long_tail_metrics

_DESCRIPTION = """
Accuracy under a long tail: per class, mean of the many/medium/few groups of training classes,
balanced, under the training prior and worst class, with precision, recall and F1, top-5, AUROC and
average precision of two classes, cross-entropy and calibration error; on request 95 % intervals.
"""
_INPUTS = """
Args:
    predictions: logits, one row of C floats for each sample.
    references: class indices 0..C-1; -100 for rows that count nowhere.
    groups: of `compute`, with `detailed`: what each sample belongs to.

Returns:
    The dictionary of `ldam_plugins.metrics.long_tail.long_tail_metrics`.
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
    """:func:`.long_tail_metrics` for evaluate and for ``Trainer``.

    As an ``evaluate.Metric`` it takes logits as ``predictions`` and class indices as
    ``references``, through ``add``, ``add_batch``, ``compute`` and ``evaluate.combine``, and
    returns the whole dictionary. Nothing is loaded from the hub. evaluate holds the logits in
    memory; for very many classes feed a :class:`~ldam_plugins.metrics.long_tail.MetricAccumulator`.

    As ``Trainer(compute_metrics=LongTailMetrics(counts))`` it returns floats only, which every
    tracker can log: ``top1_error``, ``balanced_error``, ``train_prior_error`` (%),
    ``balanced_accuracy``, ``worst_class_accuracy``, ``many``, ``medium``, ``few``, ``nll``,
    ``ece``, ``macro_`` and ``weighted_`` ``precision``, ``recall`` and ``f1``, with more than five
    classes ``top5_accuracy``, with two ``auroc`` and ``average_precision``. A group that no
    evaluated class belongs to is left out.
    ``batch_eval_metrics=True`` of the training arguments works and keeps no logits. The batches of
    an evaluation that broke off are not counted in the next one; in a loop of your own call
    :meth:`reset` before it.

    Args:
        class_counts: *Training* samples per class, (C).
        per_class: Also give ``Trainer`` an ``accuracy_<class>``, ``precision_<class>`` and
            ``f1_<class>`` for each class that has one, by name where ``class_counts`` has names,
            else by index.
        detailed: Also give intervals, the confusion matrix and the metrics of ``groups``, which
            ``compute`` then takes; ``Trainer`` gets the ends of each interval as ``<name>_low`` and
            ``<name>_high``. They take up to seconds each time.
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
        detailed: bool = False,
        keep_in_memory: bool = True,
        **options: Any,
    ) -> None:
        accumulator = MetricAccumulator(class_counts)
        self.class_counts = accumulator.class_counts
        self.per_class, self.detailed = per_class, detailed
        self._running: dict[int | None, MetricAccumulator] = {}
        if per_class:
            _check_distinct(self._class_keys("accuracy"))
        super().__init__(keep_in_memory=keep_in_memory, **options)

    def __call__(self, eval_pred: Any, compute_result: bool | None = None) -> dict[str, float]:
        """``Trainer``'s ``compute_metrics``.

        Args:
            eval_pred: ``EvalPrediction``, or a pair (predictions, labels). Of several model
                outputs the one of shape (N, C) is taken as the logits, as
                :func:`.find_logits` does for the loss; a list holds
                batches (``eval_do_concat_batches=False``). Labels are (N,) or (N, 1).
            compute_result: Under ``batch_eval_metrics=True`` False while batches are still to come
                (the answer is empty then), True with the last. Left out: ``eval_pred`` is, or
                completes, the whole evaluation.

        Raises:
            TypeError: ``logits`` are not floats or ``labels`` not integers.
            ValueError: no output, or several, of the logits' shape, or as
                :func:`.long_tail_metrics`.
        """
        loops = _evaluations()
        own, begins = loops[0] if loops else (None, False)
        accumulator = None if begins else self._running.get(own)
        if accumulator is None:
            accumulator = MetricAccumulator(self.class_counts)
        # Evaluations that are not on the stack any more broke off; this one must not fail.
        around = {None, *(loop for loop, _ in loops)} - {own}
        self._running = {loop: part for loop, part in self._running.items() if loop in around}
        for logits, labels in _batches(eval_pred[0], eval_pred[1], len(self.class_counts)):
            accumulator.update(logits, labels)
        if compute_result is False:
            self._running[own] = accumulator
            return {}
        return self._flat(accumulator.compute(detailed=self.detailed))

    def compute(self, **kwargs: Any) -> dict[str, Any] | None:
        """The metrics of all rows added, as ``evaluate.Metric.compute``; forgets them.

        Raises:
            ValueError: as :func:`.long_tail_metrics`, or rows that do not have
                the form of the metric. The rows are forgotten then, too.
        """
        try:
            return super().compute(**kwargs)
        except BaseException:
            self.reset()
            raise

    def reset(self) -> None:
        """Forget the rows of evaluations that are not complete."""
        self._running = {}
        self.writer = self.buf_writer = self.data = None

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

    def _compute(
        self,
        *,
        predictions: list[list[float]],
        references: list[int],
        groups: Sequence[Any] | None = None,
    ) -> dict[str, Any]:
        if groups is not None and not self.detailed:
            hint = "Make the metric with detailed=True."
            raise invalid("groups", "left out of a metric that is not detailed", groups, hint=hint)
        return long_tail_metrics(
            predictions, references, self.class_counts, groups=groups, detailed=self.detailed
        )

    def _flat(self, metrics: dict[str, Any]) -> dict[str, float]:
        flat = {name: value for name, value in metrics.items() if isinstance(value, float)}
        if self.per_class:
            for kind in ("accuracy", "precision", "f1"):
                flat |= zip(self._class_keys(kind), metrics[f"per_class_{kind}"], strict=True)
        for name in [name for name in flat if name in metrics.get("intervals", {})]:
            flat[f"{name}_low"], flat[f"{name}_high"] = metrics["intervals"][name]
        return {name: value for name, value in flat.items() if value is not None}

    def _class_keys(self, kind: str) -> list[str]:
        names = self.class_counts.class_names or range(len(self.class_counts))
        return [f"{kind}_{name}" for name in names]


def _batches(predictions: Any, labels: Any, classes: int) -> Iterator[tuple[Any, Any]]:
    parts = zip(predictions, labels, strict=True) if isinstance(predictions, list) else None
    for outputs, target in parts or [(predictions, labels)]:
        if isinstance(target, tuple):
            expected = "one array of class indices"
            hint = "Keep one name in `label_names` of the training arguments."
            raise invalid("labels", expected, f"{len(target)} of them", hint=hint)
        yield _logits(outputs, len(target), classes), one_label_a_row(target)


def _logits(outputs: Any, rows: int, classes: int) -> Any:
    hint = (
        "Of a model that returns no dict the Trainer drops the first item: let `forward` return "
        '{"logits": logits}. Of several outputs of one shape, choose with '
        "`Trainer(preprocess_logits_for_metrics=lambda outputs, labels: outputs[0])`."
    )
    logits = find_logits(outputs, rows, classes, hint)
    if tuple(logits.shape[:1]) != (rows,):
        expected = f"of shape ({rows}, {classes}), a row for each label"
        raise invalid("predictions", expected, tuple(logits.shape), hint=hint)
    return logits


def _evaluations() -> list[tuple[int, bool]]:
    """An id of each evaluation that Trainers are running, innermost first; and whether it begins.

    A Trainer does not tell a metric where an evaluation begins, and an error may end one anywhere.
    But each evaluation is a call of its own, and numbers its batches from 0.
    """
    found = []
    for trainer, frame in trainer_calls("evaluation_loop"):
        if "step" in frame.f_locals:
            first = frame.f_locals["step"] == 0 or not trainer.args.batch_eval_metrics
            found.append((id(frame), first))
    return found


def _check_distinct(keys: list[str]) -> None:
    twice = [key for key, times in Counter(keys).items() if times > 1]
    if twice:
        expected = "False where classes share a name"
        raise invalid("per_class", expected, f"True and twice {quoted(twice)}")
