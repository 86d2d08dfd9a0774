"""Ways to make a trained head fair to rare classes: each gives another ``z = W x + b``.

They leave the features alone. Those that only change the given head (``tau_norm``,
``logit_adjustment``) need no data; the others solve a small problem on features with labels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldam_plugins._validation import check_choice, check_real, invalid
from ldam_plugins.choices import AUTOMATIC, NONE
from ldam_plugins.counts import ClassCounts
from ldam_plugins.heads.choice import options_for_head
from ldam_plugins.heads.folding import matching_scale
from ldam_plugins.heads.layers import CosineLinear
from ldam_plugins.losses import create_loss
from ldam_plugins.posthoc.head_fitting import fit_head
from ldam_plugins.posthoc.linear_head import ROWS_AT_ONCE, affine
from ldam_plugins.schedules import DeferredSchedule

_ALL_BETA = math.nextafter(1.0, 0.0)
"""Class-balanced weights of this beta are inverse frequencies."""
_SMALLEST = 1e-12


class Affine(NamedTuple):
    """``z = W x + b``: W (C, D) and b (C,), float64."""

    weight: Tensor
    bias: Tensor

    def logits(self, features: Tensor) -> Tensor:
        """Of features (N, D), float32 (N, C)."""
        return affine(features, *self)


@dataclass(frozen=True, eq=False)
class Problem:
    """What a method works on.

    Args:
        head: The given head.
        features: x (N, D), and ``labels`` (N,) int64: what a method may learn from.
        labels: Class indices.
        source: Class shares that the given head has learned, (C,) float64.
        target: Those that it is to predict under, likewise.
        tolerance: On the gradient, of what is solved for.
        temperature: Of the given head, in which its logits are log probabilities.
        others: How many of the samples, the last ones, are learned from alone: what a method reads
            off the given head's logits, such as their temperature, is not read off them.
        fold_heads: The given head for each fold of the cross-fitting, where it was itself fitted on
            the samples; empty: it is the same for all.
    """

    head: Affine
    features: Tensor
    labels: Tensor
    source: Tensor
    target: Tensor
    tolerance: float = 1e-5
    temperature: float = 1.0
    others: int = 0
    fold_heads: tuple[Affine, ...] = ()

    def counts(self) -> ClassCounts:
        """Samples per class; every class must have one."""
        return ClassCounts.from_labels(self.labels, num_classes=len(self.source))

    def rows(self, chosen: Tensor) -> Problem:
        """The same with some of the samples, bool (N,)."""
        others = int(chosen[len(chosen) - self.others :].sum())
        features, labels = self.features[chosen], self.labels[chosen]
        return replace(self, features=features, labels=labels, others=others)

    def judges(self) -> tuple[Tensor, Tensor]:
        """Features and labels without the last ``others``."""
        own = len(self.labels) - self.others
        return self.features[:own], self.labels[:own]


@dataclass(frozen=True)
class Method:
    """A way to make a head fair.

    Args:
        solve: The new head, from a problem and a strength.
        strengths: What the strength is chosen among, for N samples; ``(None,)`` where there is
            none to choose.
        low: Least strength.
        low_open: Whether it must be above that.
        high: Greatest strength.
        learns: Whether it learns from the labels of the features.
        has_unit: Whether its logits are log probabilities up to a constant of the sample.
        has_bias: Whether its head has a bias when the classes are to count alike.
    """

    solve: Callable[[Problem, Any], Affine]
    strengths: Callable[[int], tuple[float | None, ...]]
    low: float = 0.0
    low_open: bool = False
    high: float = math.inf
    learns: bool = True
    has_unit: bool = True
    has_bias: bool = True

    def check_strength(self, strength: float) -> float:
        """The strength, checked.

        Raises:
            TypeError: it is no number.
            ValueError: it is out of bounds, or the method has none.
        """
        if self.strengths(1) == (None,):
            raise invalid("strength", "left out: the method has none", strength)
        bounds = {"low": self.low, "low_open": self.low_open, "high": self.high}
        return check_real("strength", strength, **bounds)  # type: ignore[arg-type]

    def apply(self, problem: Problem, strength: float | None) -> Affine:
        """The new head. Where classes are not to count alike, it is moved to the target prior.

        A head whose logits have no unit is scaled first, to the temperature that fits the samples
        best where classes count alike.
        """
        found = self.solve(problem, strength)
        if self.has_unit or uniform(problem.target):
            return found
        features, labels = problem.judges()
        scale = 1 / best_temperature(found.logits(features), labels, even_weights(labels))
        weight, bias = found.weight * scale, found.bias * scale
        return Affine(weight, bias + toward(problem.target))


def rescaling(old: Affine, new: Affine) -> tuple[Tensor, Tensor] | None:
    """Scale and offset (C,) that turn the logits of a head into those of another, if any do.

    So the logits of heads that differ in the length of their rows and in the bias alone need no
    product with the features.
    """
    square = old.weight.square().sum(dim=1)
    scale = (old.weight * new.weight).sum(dim=1) / square.clamp_min(_SMALLEST)
    rest = (new.weight - scale[:, None] * old.weight).norm(dim=1)
    if bool((rest > 1e-12 * new.weight.norm(dim=1)).any()):
        return None
    return scale, new.bias - scale * old.bias


def uniform(prior: Tensor) -> bool:
    """Whether all classes have one share."""
    return bool(torch.allclose(prior, torch.full_like(prior, 1 / len(prior)), rtol=1e-6, atol=0))


def toward(target: Tensor) -> Tensor:
    """What is added to logits of even classes for the shares ``target``, (C,)."""
    return target.log() - math.log(1 / len(target))


def class_weights(labels: Tensor, prior: Tensor) -> Tensor:
    """A weight a sample, float64 (N,): those of class c weigh ``prior_c`` together, the sum is 1.

    Classes without a sample are left out.
    """
    sizes = torch.bincount(labels, minlength=len(prior)).double()
    weights = (prior.double() / sizes.clamp_min(1))[labels]
    return weights / weights.sum()


def even_weights(labels: Tensor) -> Tensor:
    """A weight a sample, float64 (N,): each class that is there weighs the same, the sum is 1."""
    classes = int(labels.max()) + 1
    return class_weights(labels, torch.full((classes,), 1 / classes, dtype=torch.float64))


def all_right(logits: Tensor, labels: Tensor) -> bool:
    """Whether each sample's own logit is above its others.

    Args:
        logits: z (N, C).
        labels: y (N,).
    """
    own = logits.gather(1, labels[:, None])
    return bool(((logits >= own).sum(dim=1) == 1).all())


def best_temperature(
    logits: Tensor, labels: Tensor, weights: Tensor, *, precision: float = 1e-6
) -> float:
    """The T with the smallest ``sum_i w_i NLL(softmax(z_i / T), y_i)``.

    The sum is convex in 1 / T. scipy's L-BFGS-B finds it in ``log T``, between 1e-3 and 1e3. Where
    all samples are right there is no smallest one, the lower T the better: they tell nothing of how
    often others are wrong, and T is 1.

    Args:
        logits: z (N, C).
        labels: y (N,).
        weights: w (N,), float64.
        precision: Of ``log T``.
    """
    # Imported here, as it takes a third of a second that few who import this room need.
    from scipy.optimize import minimize

    if all_right(logits, labels):
        return 1.0
    total = float(weights.sum())

    def loss(log_t: np.ndarray) -> tuple[float, np.ndarray]:
        factor = math.exp(-float(log_t[0]))
        value = slope = 0.0
        for start in range(0, len(logits), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            wide, own = logits[rows].double(), weights[rows]
            chosen = wide.gather(1, labels[rows, None]).squeeze(1)
            log_p = (wide * factor).log_softmax(dim=1)
            value -= float(own @ log_p.gather(1, labels[rows, None]).squeeze(1))
            slope += float(own @ ((log_p.exp_() * wide).sum(dim=1) - chosen))
        return value / total, np.array([-factor * slope / total])

    found = minimize(
        loss,
        np.zeros(1),
        jac=True,
        method="L-BFGS-B",
        bounds=[(-math.log(1e3), math.log(1e3))],
        options={"gtol": 1e-2 * precision, "ftol": 0.0, "maxiter": 100},
    )
    return math.exp(float(found.x[0]))


# The given head, changed


def _keep(problem: Problem, strength: float | None) -> Affine:
    return problem.head


def _logit_adjustment(problem: Problem, strength: float) -> Affine:
    """``b_c - tau log(source_c / target_c)``."""
    weight, bias = problem.head
    tau = strength * problem.temperature
    return Affine(weight, bias - tau * (problem.source.log() - problem.target.log()))


def _tau_norm(problem: Problem, strength: float) -> Affine:
    """``w_c / |w_c| ** tau``, no bias."""
    weight = problem.head.weight
    lengths = weight.norm(dim=1, keepdim=True).clamp_min(_SMALLEST)
    return Affine(weight / lengths**strength, torch.zeros_like(problem.head.bias))


def _lws(problem: Problem, strength: float) -> Affine:
    """``f_c (w_c x + b_c)``, the scales solved for under weights that balance the classes."""
    logits = problem.head.logits(problem.features)
    weights = even_weights(problem.labels) * len(problem.labels)
    chosen = problem.labels[:, None]

    def objective(vector: np.ndarray) -> tuple[float, np.ndarray]:
        scales = torch.from_numpy(vector)
        value = float((scales - 1).square().sum()) / 2
        slope = scales - 1
        for start in range(0, len(logits), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            wide = logits[rows].double()
            rest = (wide * scales).log_softmax(dim=1)
            value -= strength * float(weights[rows] @ rest.gather(1, chosen[rows]).squeeze(1))
            rest = rest.exp_()
            rest.scatter_add_(1, chosen[rows], torch.full_like(rest[:, :1], -1.0))
            slope = slope + strength * (weights[rows] @ rest.mul_(wide))
        per = strength * len(logits)
        return value / per, (slope / per).numpy()

    from scipy.optimize import minimize

    found = minimize(
        objective,
        np.ones(len(problem.source)),
        jac=True,
        method="L-BFGS-B",
        options={"gtol": problem.tolerance * 1e-2, "ftol": 0.0, "maxiter": 1000},
    )
    scales = torch.from_numpy(found.x)
    return _toward(problem, problem.head.weight * scales[:, None], problem.head.bias * scales)


# A new head


def _crt(problem: Problem, strength: float) -> Affine:
    """Logistic regression under weights that balance the classes."""
    schedule = DeferredSchedule("rw", beta=_ALL_BETA)
    return _toward(problem, *_regression(problem, "ce", strength, schedule))


def _ce(problem: Problem, strength: float) -> Affine:
    """Logistic regression, and the prior of the samples taken out of its logits."""
    weight, bias = _regression(problem, "ce", strength, None)
    return Affine(weight, bias - _log_shares(problem) + problem.target.log())


def _regression(
    problem: Problem, loss: str, strength: float, schedule: DeferredSchedule | None
) -> Affine:
    # The mean loss plus wd / 2 |W|^2 is scikit-learn's C times the sum plus |W|^2 / 2, over C N.
    fitted = fit_head(
        problem.features,
        problem.labels,
        create_loss(loss, problem.counts()),
        head="linear",
        schedule=schedule,
        weight_decay=1 / (strength * len(problem.labels)),
        tolerance=problem.tolerance,
    )
    return _of_layer(fitted.layer)


def _class_means(problem: Problem, strength: float) -> Affine:
    """The nearest class mean, in the metric of the shrunk covariance within classes."""
    means, size = _means(problem), problem.features.shape[1]
    covariance = torch.zeros(size, size, dtype=torch.float64)
    for start in range(0, len(problem.labels), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        inner = problem.features[rows].double() - means[problem.labels[rows]]
        covariance.addmm_(inner.T, inner)
    covariance /= max(1, len(problem.labels) - len(means))
    variance = covariance.diagonal().mean().clamp_min(_SMALLEST)
    shrunk = (1 - strength) * covariance
    shrunk.diagonal().add_(strength * variance)
    weight = torch.cholesky_solve(means.T, torch.linalg.cholesky(shrunk)).T
    return _toward(problem, weight, -(weight * means).sum(dim=1) / 2)


def _cosine_means(problem: Problem, strength: None) -> Affine:
    """The class mean of the smallest angle."""
    weight = F.normalize(_means(problem), dim=1)
    return Affine(weight, torch.zeros(len(weight), dtype=torch.float64))


def _means(problem: Problem) -> Tensor:
    counts = torch.bincount(problem.labels, minlength=len(problem.source))
    sums = torch.zeros(len(counts), problem.features.shape[1], dtype=torch.float64)
    for start in range(0, len(problem.labels), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        sums.index_add_(0, problem.labels[rows], problem.features[rows].double())
    return sums / counts[:, None]


def _with_loss(name: str, option: str | None) -> Callable[[Problem, Any], Affine]:
    def solve(problem: Problem, strength: float | None) -> Affine:
        given = {} if option is None or strength is None else {option: strength}
        criterion = create_loss(name, problem.counts(), **options_for_head(name, given, "auto"))
        fitted = fit_head(problem.features, problem.labels, criterion, tolerance=problem.tolerance)
        weight, bias = _of_layer(fitted.layer)
        if isinstance(fitted.layer, CosineLinear):
            with torch.no_grad():
                cosine = fitted.layer(problem.features)
            weight = F.normalize(weight, dim=1)
            folded = affine(problem.features, weight, bias)
            weight = weight * matching_scale(cosine, folded)
        if criterion.corrects_prior:
            return _toward(problem, weight, bias)
        return Affine(weight, bias - _log_shares(problem) + problem.target.log())

    return solve


def _of_layer(layer: nn.Linear) -> Affine:
    weight = layer.weight.detach().double()
    bias = torch.zeros(len(weight), dtype=torch.float64)
    return Affine(weight, bias if layer.bias is None else layer.bias.detach().double())


def _log_shares(problem: Problem) -> Tensor:
    return problem.counts().prior(dtype=torch.float64).log()


def _toward(problem: Problem, weight: Tensor, bias: Tensor) -> Affine:
    """The head of even classes under the target prior."""
    if uniform(problem.target):
        return Affine(weight, bias)
    return Affine(weight, bias + toward(problem.target))


def _inverse(*decays: float) -> Callable[[int], tuple[float | None, ...]]:
    """Scikit-learn's C for N samples: ``1 / (decay * N)``."""
    return lambda samples: tuple(1 / (decay * samples) for decay in decays)


def _grid(*strengths: float | None) -> Callable[[int], tuple[float | None, ...]]:
    return lambda samples: strengths


_OPTIONS = {
    "ldam": ("max_margin", (0.1, 0.3, 0.5)),
    "ldam_hinge": ("max_margin", (0.1, 0.3, 0.5)),
    "uniform_margin": ("max_margin", (0.1, 0.3, 0.5)),
    "hinge": ("max_margin", (0.1, 0.3, 0.5)),
    "focal": ("gamma", (1.0, 2.0)),
    "logit_adjusted": ("tau", (0.5, 1.0, 1.5)),
    "vector_scaling": ("gamma", (0.05, 0.15, 0.3)),
}
METHODS: dict[str, Method] = {
    NONE: Method(_keep, _grid(None), learns=False),
    "logit_adjustment": Method(
        _logit_adjustment, _grid(*(k / 4 for k in range(1, 9))), learns=False
    ),
    "tau_norm": Method(
        _tau_norm,
        _grid(*(k / 4 for k in range(9))),
        learns=False,
        has_unit=False,
        has_bias=False,
    ),
    "lws": Method(_lws, _inverse(1.0, 0.1, 0.01), low_open=True, has_bias=False),
    "crt": Method(_crt, _inverse(1.0, 0.1, 0.01), low_open=True),
    "class_means": Method(_class_means, _grid(0.1, 0.3, 1.0), low_open=True, high=1.0),
    "cosine_means": Method(_cosine_means, _grid(None), has_unit=False, has_bias=False),
    "ce": Method(_ce, _inverse(0.1, 0.01, 0.001), low_open=True),
    **{
        name: Method(_with_loss(name, option), _grid(*grid))
        for name, (option, grid) in _OPTIONS.items()
    },
}
"""The methods by name."""
AUTO = (NONE, "logit_adjustment", "tau_norm", "lws", "class_means", "cosine_means", "crt")
"""What ``auto`` chooses among unless told, from what changes least to what is made anew."""


def find_method(name: str) -> Method:
    """The method of a name.

    Raises:
        ValueError: there is none (the nearest are named).
    """
    return METHODS[check_choice("method", name, METHODS)]


def parse_method(word: str, argument: str = "method") -> tuple[str, float | None]:
    """Method and strength of ``"METHOD"`` or ``"METHOD:STRENGTH"``; ``auto`` is a method as well.

    Args:
        word: To be read.
        argument: What errors call it.

    Raises:
        ValueError: there is no such method, or it does not take that strength.

    Example:
        >>> parse_method("logit_adjustment:1"), parse_method("auto")
        (('logit_adjustment', 1.0), ('auto', None))
    """
    name, mark, given = word.partition(":")
    check_choice(argument, name, [AUTOMATIC, *METHODS])
    if not mark:
        return name, None
    try:
        strength = float(given)
    except ValueError:
        expected = "METHOD or METHOD:STRENGTH, such as logit_adjustment:1"
        raise invalid(argument, expected, word) from None
    if name == AUTOMATIC:
        hint = "It is chosen; name the method whose strength it is."
        raise invalid("strength", f"left out with {AUTOMATIC!r}", word, hint=hint)
    return name, find_method(name).check_strength(strength)
