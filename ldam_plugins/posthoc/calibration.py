"""Whether probabilities mean what they say, and a temperature that makes them nearer to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ldam_plugins._validation import check_choice, invalid
from ldam_plugins.counts import check_label_range
from ldam_plugins.metrics import ECE_BINS
from ldam_plugins.metrics.intervals import REPLICATES, generator
from ldam_plugins.posthoc.features import Features
from ldam_plugins.posthoc.linear_head import HeadState, LinearHead, fold_to_fit
from ldam_plugins.posthoc.methods import best_temperature, class_weights

PRIORS = ("features", "uniform")
"""Class shares under which probabilities are calibrated."""
_TAILS = (0.025, 0.975)
_ELEMENTS = 2_000_000_000


@dataclass(frozen=True, eq=False)
class Calibrated:
    """A model with another temperature, and what that did to its probabilities.

    Args:
        temperature: T; the logits are divided by it.
        before: :func:`calibration_error` of the logits as they were.
        after: The same, divided by T.
    """

    temperature: float
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    _state: HeadState

    def undo(self) -> None:
        """Put the head back as it was."""
        self._state.restore()

    def to_dict(self) -> dict[str, Any]:
        """What there is to record of it, ready for JSON."""
        return {
            "temperature": self.temperature,
            "before": dict(self.before),
            "after": dict(self.after),
        }


def fit_temperature(
    model: nn.Module,
    features: Features,
    *,
    prior: str = "features",
    head: str | Sequence[str] | None = None,
) -> Calibrated:
    """Divide the logits by the T that makes the probabilities fit best, in the last layer.

    T minimises ``sum_i w_i NLL(softmax(z_i / T), y_i)``, by scipy's bounded scalar search between
    1e-3 and 1e3; the predictions stay. Weight and bias of the head are divided by it, so that what
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

    Source: Guo et al., ICML 2017, arXiv 1706.04599.

    Example:
        >>> from ldam_plugins.posthoc import extract_features
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> found = extract_features(model, [(torch.randn(30, 8), torch.arange(30) % 3)])
        >>> fit_temperature(model, found).temperature > 0
        True
    """
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
        temperature = best_temperature(logits, labels, weights)
        before = calibration_error(logits, labels, prior=shares)
        linear.write(linear.weight / temperature, linear.bias / temperature)
        after = calibration_error(linear.logits(features.features), labels, prior=shares)
    return Calibrated(temperature, before, after, state)


def calibration_error(
    logits: Tensor, labels: Tensor, *, prior: Tensor | None = None, intervals: bool = True
) -> dict[str, Any]:
    """How far confidence and accuracy are apart, of ``logits`` (N, C) and ``labels`` (N,).

    * ``nll``: mean cross-entropy, in nats.
    * ``ece``: ``sum_b |sum of confidence - correct in b| / N`` over 15 equal-width bins of the
      largest probability, as in :func:`.long_tail_metrics`.
    * ``classwise_ece``: the mean over the classes of ``sum_b |sum of p_c - (y = c) in b| / N``,
      over 15 bins of ``p_c``.
    * ``intervals``: of the three, 95 %, by name, from a bootstrap of the samples, moved by its
      bias: a calibration error is a sum of absolute values, so other samples would make it larger.
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
    log_p = logits.double().log_softmax(dim=1)
    probabilities = log_p.exp().numpy()
    truth = labels.numpy()
    nll = -log_p.gather(1, labels[:, None]).squeeze(1).numpy()
    predicted = logits.argmax(dim=1).numpy()
    top = probabilities[np.arange(len(truth)), predicted]
    correct = (predicted == truth).astype(float)
    rest, bins = top - correct, _bin(top)
    classes = logits.shape[1]
    each = np.full(len(truth), 1 / len(truth))
    if prior is not None:
        each = class_weights(labels, prior).numpy()
    weights = each[None]
    if intervals:
        groups = np.zeros_like(truth) if prior is None else truth
        weights = np.concatenate([weights, _drawn(groups, classes, nll) * each])
    measures = {"nll": weights @ nll, "ece": _gap(weights, rest, bins)}
    measures["classwise_ece"] = sum(
        _gap(weights, share - (truth == index), _bin(share)) / classes
        for index, share in enumerate(probabilities.T)
    )
    found: dict[str, Any] = {name: float(values[0]) for name, values in measures.items()}
    if intervals:
        found["intervals"] = {
            name: _interval(values[1:], found[name]) for name, values in measures.items()
        }
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


def _gap(weights: np.ndarray, rest: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """``sum_b |sum of w_i rest_i in b|`` for each row of weights (B, N)."""
    apart = np.zeros((len(rest), ECE_BINS))
    apart[np.arange(len(rest)), bins] = rest
    return np.abs(weights @ apart).sum(axis=1)


def _drawn(groups: np.ndarray, classes: int, seed: np.ndarray) -> np.ndarray:
    """How often each sample is in bootstrap samples (B, N), drawn within each group.

    B is smaller where there is much.
    """
    samples = len(groups)
    size = int(np.clip(_ELEMENTS // (samples * classes * ECE_BINS), 20, REPLICATES[0]))
    rng = generator(seed)
    found = np.zeros((size, samples))
    for group in np.unique(groups):
        rows = np.flatnonzero(groups == group)
        found[:, rows] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size)
    return found


def _interval(drawn: np.ndarray, value: float) -> list[float]:
    ends = np.quantile(drawn, _TAILS) - (drawn.mean() - value)
    return [max(0.0, float(end)) for end in ends]


def _means(values: np.ndarray, bins: np.ndarray, sizes: np.ndarray) -> list[float | None]:
    sums = np.bincount(bins, weights=values, minlength=ECE_BINS)
    return [float(total / size) if size else None for total, size in zip(sums, sizes, strict=True)]
