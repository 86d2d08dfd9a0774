"""Class priors that nobody knows: of unlabelled samples, and the one that a model has learned."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldam_plugins._tensor_checks import check_logits
from ldam_plugins._validation import check_int, check_real, invalid, quoted
from ldam_plugins.counts import check_label_range, label_array

_Z = 1.96
_MATTERS, _VAGUE = 0.02, 0.05
"""A share that is off by less does little, and one that is known up to that is known."""
_SURE = 4.0  # standard errors beyond which a difference is no chance, of many classes as well
_NEVER = 1e-12


@dataclass(frozen=True, eq=False)
class PriorEstimate:
    """Class shares of unlabelled samples.

    Args:
        prior: (C,) float64, with sum 1. A class that hardly occurs has a share of nearly 0.
        standard_error: Of each share (C,), by the curvature of the likelihood at the estimate.
        iterations: Of EM.
        reasons: Why the estimate cannot be trusted; empty if nothing speaks against it.
    """

    prior: Tensor
    standard_error: Tensor
    iterations: int
    reasons: tuple[str, ...]

    @property
    def is_trusted(self) -> bool:
        """Whether nothing speaks against the estimate."""
        return not self.reasons


def estimate_prior(
    logits: Tensor | np.ndarray,
    source_prior: Tensor,
    *,
    held_out: tuple[Tensor, Any] | None = None,
    tolerance: float = 1e-9,
    max_iterations: int = 10_000,
) -> PriorEstimate:
    """Estimate the class shares of unlabelled samples from what a classifier says of them.

    The shares ``pi`` with the greatest likelihood ``sum_i log sum_c pi_c p_i(c) / source_c``, which
    has one maximum, by EM::

        q_i(c) = pi_c p_i(c) / source_c, normalised over c;    pi_c = mean_i q_i(c)

    It holds where the classes look the same as in training and only their shares differ, and where
    the probabilities are calibrated on data with the shares ``source``. What can be checked is:

    * whether the samples tell the shares: a share with a standard error that leaves it unknown by
      half and by more than 0.05 is a reason for doubt, as is an EM that did not converge;
    * with ``held_out``, labelled samples that the model was not trained on: whether the same
      estimate gives back their shares, which are known, and whether a mix of their classes explains
      how often each class is predicted for the unlabelled samples.

    Args:
        logits: Of the unlabelled samples, (M, C), floating.
        source_prior: Class shares that the model has learned, (C,), each above 0.
        held_out: Logits (N, C) and labels (N,) of labelled samples.
        tolerance: Largest change of a share in the last iteration.
        max_iterations: Of EM.

    Raises:
        TypeError: ``logits`` are not floats, or the labels no integers.
        ValueError: shapes that do not fit, logits that are not finite, no sample.

    Source: Saerens, Latinne and Decaestecker, Neural Computation 14 (2002); the check of the
    predictions, Lipton et al., ICML 2018, arXiv 1802.03916.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0]] * 30 + [[0.0, 2.0]] * 70)
        >>> estimate_prior(logits, torch.tensor([0.5, 0.5])).prior.round(decimals=3)
        tensor([0.2370, 0.7630], dtype=torch.float64)
    """
    check_real("tolerance", tolerance, low=0, low_open=True)
    check_int("max_iterations", max_iterations, low=1)
    scores = _checked_logits(logits, len(source_prior))
    source = source_prior.double()
    prior, iterations, converged = _em(scores, source, tolerance, max_iterations)
    error = _standard_error(scores, source, prior)
    reasons = [] if converged else [f"EM did not converge in {max_iterations} iterations"]
    half = _Z * error
    vague = (half > prior / 2) & (half > _VAGUE)
    if bool(vague.any()):
        at = int(torch.where(vague, half, 0.0).argmax())
        reasons.append(
            f"the share of {int(vague.sum())} of {len(prior)} classes is not known, of class {at}"
            f" it is {float(prior[at]):.3f} +- {float(half[at]):.3f}: too few samples, or classes"
            " that are not told apart"
        )
    if held_out is not None:
        given = _checked_logits(held_out[0], len(source))
        labels = label_array(held_out[1])
        if len(labels) != len(given):
            expected = f"one label for each of {len(given)} rows of logits"
            raise invalid("held_out", expected, len(labels))
        check_label_range(labels, len(source))
        known = torch.from_numpy(labels.copy())
        reasons += _not_given_back(given, known, source, tolerance, max_iterations)
        reasons += _not_explained(scores, prior, given, known)
    return PriorEstimate(prior, error, iterations, tuple(reasons))


@dataclass(frozen=True, eq=False)
class ImpliedPrior:
    """The class prior that the logits of a model are worth.

    Args:
        prior: (C,) float64, with sum 1.
        temperature: Of its logits, T. ``adjust_to_prior(model, prior, target, tau=temperature)``
            takes both into account.
    """

    prior: Tensor
    temperature: float


def implied_prior(logits: Tensor | np.ndarray, labels: Any) -> ImpliedPrior:
    """Fit the class prior that a model has learned, where it is not that of its training set.

    Class weights, margins, re-sampling and logit adjustment all teach a model another prior than
    the shares of its training samples. If ``q`` is the prior in its logits, T their temperature and
    h the class shares of some held-out samples, then ``softmax(z / T + log h - log q)`` are the
    probabilities of these samples. So ``b = log h - log q`` and T are those of the greatest
    likelihood, a convex problem in ``(1 / T, b)``.

    Args:
        logits: z (N, C) of samples that the model was not trained on.
        labels: (N,) class indices; each class must occur.

    Raises:
        TypeError: ``logits`` are not floats, or ``labels`` no integers.
        ValueError: shapes that do not fit, logits that are not finite, a class without a sample.
    """
    check_logits(torch.as_tensor(logits))
    scores = _checked_logits(logits, np.shape(logits)[1])
    target = label_array(labels)
    if len(target) != len(scores):
        raise invalid("labels", f"one for each of {len(scores)} rows of `logits`", len(target))
    check_label_range(target, scores.shape[1])
    counts = np.bincount(target, minlength=scores.shape[1])
    refuse_absent("labels", counts)
    y = torch.from_numpy(target.copy())[:, None]

    def objective(vector: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = torch.from_numpy(vector)
        log_p = (scores * parameters[0] + parameters[1:]).log_softmax(dim=1)
        rest = log_p.exp().scatter_add_(1, y, torch.full_like(log_p[:, :1], -1.0))
        slope = torch.cat([(rest * scores).sum()[None], rest.sum(dim=0)])
        loss = -log_p.gather(1, y).sum()
        return float(loss) / len(scores), (slope / len(scores)).numpy()

    # Imported here, as it takes a third of a second that few who import this room need.
    from scipy.optimize import minimize

    start = np.r_[1.0, np.zeros(scores.shape[1])]
    options = {"gtol": 1e-9, "ftol": 0.0, "maxiter": 5000, "maxfun": 20_000}
    bounds = [(1e-3, 1e3), *[(None, None)] * scores.shape[1]]
    found = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    log_prior = np.log(counts / counts.sum()) - found.x[1:]
    return ImpliedPrior(torch.from_numpy(log_prior).softmax(dim=0), 1 / float(found.x[0]))


def refuse_absent(name: str, counts: np.ndarray, names: Sequence[str] | None = None) -> None:
    """Refuse samples that lack a class.

    Raises:
        ValueError: a class has none.
    """
    absent = np.flatnonzero(np.asarray(counts) == 0)
    if len(absent):
        shown = quoted(int(c) if names is None else names[int(c)] for c in absent)
        hint = "What is learned or chosen by these samples needs one of each class: take more, or"
        hint += " the training samples, or give a method that needs none and its strength, such as"
        hint += " method='logit_adjustment', strength=1.0."
        raise invalid(name, "those of every class", f"none of class {shown}", hint=hint)


def _checked_logits(logits: Any, classes: int) -> Tensor:
    scores = logits if isinstance(logits, Tensor) else torch.from_numpy(np.array(logits))
    check_logits(scores)
    if scores.shape[1] != classes or not len(scores):
        expected = f"of shape (N, {classes}), with at least one row"
        raise invalid("logits", expected, tuple(scores.shape))
    scores = scores.detach().cpu().double()
    if not bool(scores.isfinite().all()):
        bad = int((~scores.isfinite().all(dim=1)).nonzero()[0])
        raise invalid("logits", "finite", f"NaN or infinity in row {bad}")
    return scores


def _ratios(scores: Tensor, source: Tensor) -> Tensor:
    """``p_i(c) / source_c`` (M, C), each row divided by its largest, which changes nothing."""
    ratios = scores.log_softmax(dim=1) - source.log()
    return (ratios - ratios.amax(dim=1, keepdim=True)).exp()


def _em(
    scores: Tensor, source: Tensor, tolerance: float, max_iterations: int
) -> tuple[Tensor, int, bool]:
    ratios, prior = _ratios(scores, source), source / source.sum()
    for iteration in range(1, max_iterations + 1):
        # mean_i pi_c r_ic / sum_k pi_k r_ik
        new = prior * (ratios.T @ (1 / (ratios @ prior))) / len(ratios)
        change = float((new - prior).abs().max())
        prior = new / new.sum()
        if change <= tolerance:
            return prior, iteration, True
    return prior, max_iterations, False


def _standard_error(scores: Tensor, source: Tensor, prior: Tensor) -> Tensor:
    """Of each share: of the inverse information on the shares that sum to 1."""
    ratios = _ratios(scores, source)
    ratios = ratios / (ratios @ prior)[:, None]
    information = ratios.T @ ratios
    basis = torch.linalg.svd(torch.ones(1, len(prior), dtype=torch.float64)).Vh[1:].T
    inner = basis.T @ information @ basis
    covariance = basis @ torch.linalg.pinv(inner, hermitian=True, rtol=_NEVER) @ basis.T
    return covariance.diagonal().clamp_min(0).sqrt()


def _not_given_back(
    scores: Tensor, labels: Tensor, source: Tensor, tolerance: float, max_iterations: int
) -> list[str]:
    """The reason for doubt that the shares of labelled samples are not estimated right."""
    shares = torch.bincount(labels, minlength=len(source)).double() / len(labels)
    found, _, _ = _em(scores, source, tolerance, max_iterations)
    # The samples are the same, so that their own chance is no part of the difference.
    error = _standard_error(scores, source, found)
    off = (found - shares).abs()
    if bool(((off > _SURE * error) & (off > _MATTERS)).any()):
        at = int(off.argmax())
        return [
            "of labelled samples, whose shares are known, the same estimate is off by"
            f" {float(off[at]):.3f} in class {at}: the probabilities are not calibrated, or the"
            " source prior is not what the model has learned (implied_prior fits it)"
        ]
    return []


def _not_explained(scores: Tensor, prior: Tensor, given: Tensor, labels: Tensor) -> list[str]:
    """The reason for doubt that no mix of the classes gives the predictions that there are."""
    classes = len(prior)
    predicted = torch.bincount(scores.argmax(dim=1), minlength=classes).double() / len(scores)
    pairs = torch.bincount(labels * classes + given.argmax(dim=1), minlength=classes**2)
    table = pairs.view(classes, classes).double()
    sizes = table.sum(dim=1, keepdim=True)
    shares = (table + 1 / classes) / (sizes + 1)
    expected = prior @ shares
    variance = expected * (1 - expected) / len(scores)
    variance += prior.square() @ (shares * (1 - shares) / (sizes + 1))
    off = (predicted - expected).abs()
    if bool(((off > _SURE * variance.sqrt()) & (off > _MATTERS)).any()):
        at = int(off.argmax())
        return [
            f"class {at} is predicted for {float(predicted[at]):.3f} of the samples, and a mix of"
            f" the classes with the estimated shares would give {float(expected[at]):.3f}: more"
            " than the shares has changed"
        ]
    return []
