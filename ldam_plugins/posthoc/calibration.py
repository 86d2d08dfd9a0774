"""Whether probabilities mean what they say, and a temperature that makes them nearer to it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ldam_plugins._validation import check_choice, invalid
from ldam_plugins.choices import SCALINGS, TEMPERATURE
from ldam_plugins.counts import ClassCounts, check_label_range
from ldam_plugins.metrics import ECE_BINS
from ldam_plugins.metrics.intervals import REPLICATES, generator
from ldam_plugins.posthoc.choice import FEW, pool_classes
from ldam_plugins.posthoc.features import Features
from ldam_plugins.posthoc.linear_head import (
    ROWS_AT_ONCE,
    HeadState,
    LinearHead,
    fold_to_fit,
    warn_of_new_bias,
)
from ldam_plugins.posthoc.methods import all_right, best_temperature, class_weights

PRIORS = ("features", "uniform")
"""Class shares under which probabilities are calibrated."""
_TAILS = (0.025, 0.975)
_ELEMENTS = 20_000_000_000


class Scaling(NamedTuple):
    """``z_c -> scale_c z_c + offset_c``, which weight and bias of a last layer can hold.

    Attributes:
        scales: (C,) float64, each above 0; of a temperature T all 1 / T.
        offsets: (C,) float64; of a temperature 0.
    """

    scales: Tensor
    offsets: Tensor

    def apply(self, logits: Tensor) -> Tensor:
        """The scaled logits (N, C), in the dtype of the logits."""
        found = torch.empty_like(logits)
        for start in range(0, len(logits), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            found[rows] = logits[rows].double() * self.scales + self.offsets
        return found


@dataclass(frozen=True, eq=False)
class Calibrated:
    """A model with other scales of its logits, and what that did to its probabilities.

    Args:
        temperature: T; the logits are divided by it. None where classes have scales of their own.
        scaling: What was done to the logits.
        before: :func:`calibration_error` of the logits as they were.
        after: The same of the scaled ones.
    """

    temperature: float | None
    scaling: Scaling
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    _state: HeadState

    def undo(self) -> None:
        """Put the head back as it was."""
        self._state.restore()

    def to_dict(self) -> dict[str, Any]:
        """What there is to record of it, ready for JSON."""
        found = {
            "temperature": self.temperature,
            "before": dict(self.before),
            "after": dict(self.after),
        }
        if self.temperature is None:
            found |= {name: part.tolist() for name, part in self.scaling._asdict().items()}
        return found


def fit_temperature(
    model: nn.Module,
    features: Features,
    *,
    prior: str = "features",
    head: str | Sequence[str] | None = None,
) -> Calibrated:
    """Divide the logits by the T that makes the probabilities fit best, in the last layer.

    T minimises ``sum_i w_i NLL(softmax(z_i / T), y_i)`` between 1e-3 and 1e3, by scipy's L-BFGS-B;
    the predictions stay. Weight and bias of the head are divided by it, so that what
    is saved of the model needs nothing of this package. A cosine head is folded first, see
    :func:`.fold_cosine_head`.

    Args:
        model: A classifier, see :func:`.extract_features`. It is changed.
        features: Of samples that it was not trained on.
        prior: ``"features"``: every sample counts the same, so the probabilities fit the mix of
            classes in ``features``; ``"uniform"``: every class counts the same.
        head: Dotted names of the heads, where `find_head` does not find the right ones.

    Returns:
        T, and the calibration error before and after, on the same samples and under that prior.

    Raises:
        TypeError: the head does not hold its weights as floats.
        ValueError: features of another model or with labels it has no logit for; a head that is not
            found, sharded, or shares its weights. Nothing is changed then.

    Warns:
        UserWarning: all samples are right. There is no best temperature then; it stays 1.

    Source: Guo et al., ICML 2017, arXiv 1706.04599.

    Example:
        >>> from ldam_plugins.posthoc import extract_features
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> found = extract_features(model, [(torch.randn(30, 8), torch.arange(30) % 3)])
        >>> fit_temperature(model, found).temperature > 0
        True
    """
    return _calibrate(model, features, TEMPERATURE, None, prior, head)


def fit_vector_scaling(
    model: nn.Module,
    features: Features,
    class_counts: ClassCounts,
    *,
    per: str = "class",
    prior: str = "features",
    head: str | Sequence[str] | None = None,
) -> Calibrated:
    """Give each class, or each of many, medium and few, a scale and an offset of its logits.

    ``z_c -> a_c z_c + b_c`` with the least ``sum_i w_i NLL_i + (|a / a_0 - 1|^2 + |b|^2) / 2 N``,
    ``a_0`` being 1 / T of :func:`fit_temperature`: a convex problem, solved by L-BFGS. It goes into
    weight and bias of the last layer, as every scale that is a class's own does. Unlike a
    temperature it changes predictions.

    What a last layer cannot hold, and is not here: a scale that depends on the sample, as one of
    the *predicted* class or group does, a full matrix of C x C is possible but has too many
    numbers for a tail, and histogram binning, isotonic regression or splines of a probability.

    Args:
        model: A classifier, see :func:`.extract_features`. It is changed.
        features: Of samples that it was not trained on.
        class_counts: Training samples per class: they define the groups.
        per: ``"class"``: a class with fewer than 10 samples shares the numbers of those of its
            group; ``"group"``: many, medium and few have one scale and offset each, a group with
            fewer than 10 samples those of the next larger.
        prior: As for :func:`fit_temperature`.
        head: As there.

    Returns:
        The scales, and the calibration error before and after on the same samples: that of few
        samples is less than on others.

    Raises:
        TypeError: as for :func:`fit_temperature`.
        ValueError: as there, or another number of counts than of logits.

    Warns:
        UserWarning: a head without a bias gets one.

    Source: Guo et al., ICML 2017, section 4.2 (vector scaling).
    """
    check_choice("per", per, SCALINGS[1:])
    if len(class_counts) != features.logits.shape[1]:
        expected = f"one count for each of {features.logits.shape[1]} logits"
        raise invalid("class_counts", expected, len(class_counts))
    return _calibrate(model, features, per, class_counts, prior, head)


def _calibrate(
    model: nn.Module,
    features: Features,
    kind: str,
    counts: ClassCounts | None,
    prior: str,
    head: str | Sequence[str] | None,
) -> Calibrated:
    check_choice("prior", prior, PRIORS)
    labels = features.head_labels()
    state = HeadState(model, head)
    with state.restored_on_error():
        linear = LinearHead.of_model(model, fold_to_fit(model, features), head)
        logits = linear.logits(features.features)
        classes = logits.shape[1]
        even = torch.full((classes,), 1 / classes, dtype=torch.float64)
        shares = even if prior == "uniform" else None
        weights = class_weights(labels, even)
        if shares is None:
            weights = torch.full_like(weights, 1 / len(labels))
        scaling = best_scaling(kind, logits, labels, weights, counts)
        before = calibration_error(logits, labels, prior=shares)
        weight = linear.weight * scaling.scales[:, None]
        gave_bias = linear.write(weight, linear.bias * scaling.scales + scaling.offsets)
        after = calibration_error(linear.logits(features.features), labels, prior=shares)
    if gave_bias:
        warn_of_new_bias(linear.names[0], stacklevel=4)
    temperature = 1 / float(scaling.scales[0]) if kind == TEMPERATURE else None
    return Calibrated(temperature, scaling, before, after, state)


def best_scaling(
    kind: str, logits: Tensor, labels: Tensor, weights: Tensor, counts: ClassCounts | None
) -> Scaling:
    """The scaling of the logits that fits best, see :func:`fit_vector_scaling`.

    Args:
        kind: One of :data:`SCALINGS`.
        logits: z (N, C).
        labels: (N,).
        weights: Of the samples, (N,) float64, with sum 1.
        counts: Training samples per class; a temperature needs none.

    Warns:
        UserWarning: all samples are right, so that there is no best temperature, and it is 1.
    """
    classes = logits.shape[1]
    if all_right(logits, labels):
        warnings.warn(
            f"all {len(labels)} samples that the temperature is fitted to are classified right, "
            "which tells nothing of how often others are wrong: it stays 1. Give more samples.",
            stacklevel=2,
        )
    first = 1 / best_temperature(logits, labels, weights)
    start = Scaling(
        torch.full((classes,), first, dtype=torch.float64),
        torch.zeros(classes, dtype=torch.float64),
    )
    if kind == TEMPERATURE or counts is None:
        return start
    even = torch.full((classes,), 1 / classes, dtype=torch.float64)
    cell = (
        pool_classes(labels, counts, even).of_class if kind == "class" else _groups(labels, counts)
    )
    cells = int(cell.max()) + 1
    chosen = labels[:, None]

    def objective(vector: np.ndarray) -> tuple[float, np.ndarray]:
        part = torch.from_numpy(vector)
        scales, offsets = first * part[:cells][cell], part[cells:][cell]
        loss = 0.5 * ((part[:cells] - 1).square().sum() + part[cells:].square().sum())
        loss, slope = loss / len(labels), torch.stack([part[:cells] - 1, part[cells:]])
        slope /= len(labels)
        for at in range(0, len(labels), ROWS_AT_ONCE):
            rows = slice(at, at + ROWS_AT_ONCE)
            wide = logits[rows].double()
            rest = (wide * scales + offsets).log_softmax(dim=1)
            loss -= weights[rows] @ rest.gather(1, chosen[rows]).squeeze(1)
            rest = rest.exp_().scatter_add_(1, chosen[rows], torch.full_like(rest[:, :1], -1.0))
            rest *= weights[rows, None]
            slope[0].index_add_(0, cell, first * (rest * wide).sum(dim=0))
            slope[1].index_add_(0, cell, rest.sum(dim=0))
        return float(loss), slope.flatten().numpy()

    # Imported here, as it takes a third of a second that few who import this room need.
    from scipy.optimize import minimize

    found = minimize(
        objective,
        np.r_[np.ones(cells), np.zeros(cells)],
        jac=True,
        method="L-BFGS-B",
        bounds=[(1e-3, None)] * cells + [(None, None)] * cells,
        options={"gtol": 1e-7, "ftol": 0.0, "maxiter": 1000},
    )
    solved = torch.from_numpy(found.x)
    return Scaling(first * solved[:cells][cell], solved[cells:][cell])


def _groups(labels: Tensor, counts: ClassCounts) -> Tensor:
    """The group of each class (C,), those with few samples being one with the next larger."""
    sizes = torch.bincount(labels, minlength=len(counts))
    found, count, waiting = torch.zeros_like(sizes), 0, 0
    for ids in reversed(counts.groups().values()):
        found[ids] = count
        waiting += int(sizes[ids].sum())
        if waiting >= FEW:
            count, waiting = count + 1, 0
    # The largest classes, where they alone have too few samples, go with those before them.
    return found.clamp_max(max(count - 1, 0))


def calibration_error(
    logits: Tensor, labels: Tensor, *, prior: Tensor | None = None, intervals: bool = True
) -> dict[str, Any]:
    """How far confidence and accuracy are apart, of ``logits`` (N, C) and ``labels`` (N,).

    * ``nll``: mean cross-entropy, in nats.
    * ``ece``: ``sum_b |sum of confidence - correct in b| / N`` over 15 equal-width bins of the
      largest probability, as in :func:`.long_tail_metrics`.
    * ``classwise_ece``: the mean over the classes of ``sum_b |sum of p_c - (y = c) in b| / N``,
      over 15 bins of ``p_c``.
    * ``intervals``: of the three, 95 %, by name, from a bootstrap of the samples. Chance makes a
      sum of absolute values larger, never smaller: of a model that is well calibrated, all that is
      found may be chance. So the low end of a calibration error is what is found less all that the
      sums of the bins vary by, and the interval is rather too wide than too narrow.
    * ``bins``: of the largest probability: ``confidence`` and ``accuracy`` (means, None in an empty
      bin), ``share`` of all weights, and ``samples``, for a plot.

    Args:
        logits: Floating.
        labels: Class indices.
        prior: Class shares (C,) that the samples are weighted to; a class without a sample is left
            out. Probabilities are right under one mix of classes only. Default: every sample weighs
            the same.
        intervals: Whether to give intervals.

    Raises:
        ValueError: labels out of range, or another number of them.

    Source: Guo et al., ICML 2017 (ECE); Kull et al., NeurIPS 2019, arXiv 1910.12656 (class-wise).
    """
    if len(labels) != len(logits):
        raise invalid("labels", f"one for each of {len(logits)} rows of `logits`", len(labels))
    check_label_range(labels.numpy(), logits.shape[1])
    truth, classes = labels.numpy(), logits.shape[1]
    nll, top = np.empty(len(truth)), np.empty(len(truth))
    predicted = np.empty(len(truth), dtype=np.int64)
    for rows, log_p in _log_probabilities(logits):
        nll[rows] = -log_p.gather(1, labels[rows, None]).squeeze(1).numpy()
        best = log_p.max(dim=1)
        top[rows], predicted[rows] = best.values.exp().numpy(), best.indices.numpy()
    correct = (predicted == truth).astype(float)
    rest, bins = top - correct, _bin(top)
    each = np.full(len(truth), 1 / len(truth))
    if prior is not None:
        each = class_weights(labels, prior).numpy()
    weights = each[None]
    if intervals:
        groups = np.zeros_like(truth) if prior is None else truth
        weights = np.concatenate([weights, _drawn(groups, classes, nll) * each])
    means = weights @ nll
    sums = {
        "ece": _sums(weights, rest, bins)[:, None],
        "classwise_ece": _classwise_sums(weights, logits, truth),
    }
    found: dict[str, Any] = {"nll": float(means[0])}
    found.update({name: float(_error(each[0])) for name, each in sums.items()})
    if intervals:
        found["intervals"] = {"nll": np.quantile(means[1:], _TAILS).tolist()}
        found["intervals"].update({name: _interval(each) for name, each in sums.items()})
    shares = np.bincount(bins, weights=each, minlength=ECE_BINS)
    found["bins"] = {
        "confidence": _means(top * each, bins, shares),
        "accuracy": _means(correct * each, bins, shares),
        "share": shares.tolist(),
        "samples": np.bincount(bins, minlength=ECE_BINS).tolist(),
    }
    return found


def _bin(shares: np.ndarray) -> np.ndarray:
    """The bin ``(b / 15, (b + 1) / 15]`` of each share; 0 is in the first."""
    edges = np.arange(1, ECE_BINS) / ECE_BINS
    return np.searchsorted(edges, shares, side="left")


def _sums(weights: np.ndarray, rest: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """The sum of ``w_i rest_i`` in each bin, for each row of weights (B, N)."""
    apart = np.zeros((len(rest), ECE_BINS))
    apart[np.arange(len(rest)), bins] = rest
    return weights @ apart


def _error(sums: np.ndarray) -> np.ndarray:
    """The mean over the classes of absolute sums (..., classes, bins), summed over the bins."""
    return np.abs(sums).sum(axis=-1).mean(axis=-1)


def _log_probabilities(logits: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Some rows at a time, and their log probabilities in float64."""
    for start in range(0, len(logits), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        yield rows, logits[rows].double().log_softmax(dim=1)


def _classwise_sums(weights: np.ndarray, logits: Tensor, truth: np.ndarray) -> np.ndarray:
    """:func:`_sums` of ``p_c - (y = c)`` for each class (B, C, bins).

    Of many classes nearly all probabilities are in the first bin: all are summed as if they were,
    and the few others, which are sparse, are moved.
    """
    # Imported here, as it takes a third of a second that few who import this room need.
    from scipy.sparse import csr_matrix

    classes = logits.shape[1]
    sums = np.zeros((len(weights), classes, ECE_BINS))
    for rows, log_p in _log_probabilities(logits):
        p, y = log_p.exp_().numpy(), truth[rows]
        own = np.arange(len(y))
        sample, label = np.nonzero(p > 1 / ECE_BINS)
        share = p[sample, label]
        low = p[own, y] <= 1 / ECE_BINS
        at = np.r_[label * ECE_BINS + _bin(share), label * ECE_BINS, y[low] * ECE_BINS]
        value = np.r_[share - (y[sample] == label), -share, -np.ones(low.sum())]
        place = (np.r_[sample, sample, own[low]], at)
        moved = csr_matrix((value, place), shape=(len(y), classes * ECE_BINS))
        part = weights[:, rows]
        sums[:, :, 0] += part @ p
        sums += (moved.T @ part.T).T.reshape(sums.shape)
    return sums


def _drawn(groups: np.ndarray, classes: int, seed: np.ndarray) -> np.ndarray:
    """How often each sample is in bootstrap samples (B, N), drawn within each group.

    B is smaller where there is much.
    """
    samples = len(groups)
    size = int(np.clip(_ELEMENTS // (samples * classes), 20, REPLICATES[0]))
    rng = generator(seed)
    found = np.zeros((size, samples))
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        found[:, rows] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size)
    return found


def _interval(sums: np.ndarray) -> list[float]:
    """95 % of an error, from its sums and those of bootstrap samples below them.

    With the true sums t and those found s, |t| is at least |s| - |s - t|, whatever t is; and the
    mean over samples of |s| is at least |t|.
    """
    value, drawn, apart = _error(sums[0]), _error(sums[1:]), _error(sums[1:] - sums[0])
    low = value - np.quantile(apart, _TAILS[1])
    return [max(0.0, float(low)), float(value + np.quantile(drawn, _TAILS[1]) - drawn.mean())]


def _means(values: np.ndarray, bins: np.ndarray, sizes: np.ndarray) -> list[float | None]:
    sums = np.bincount(bins, weights=values, minlength=ECE_BINS)
    return [float(total / size) if size else None for total, size in zip(sums, sizes, strict=True)]
