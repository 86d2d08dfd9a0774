"""A classifier on frozen features, solved for rather than trained: no learning rate, no epochs.

With the features of a network fixed, what is left is a small problem that L-BFGS solves to its
optimum in seconds. So methods are compared without the question whether one of them was trained
long enough, and a run has no randomness but the first directions of a cosine head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldam_plugins._validation import check_int, check_real, invalid, quoted
from ldam_plugins.counts import check_label_range, label_array
from ldam_plugins.heads.choice import head_scale, wants_cosine_head
from ldam_plugins.heads.layers import CosineLinear
from ldam_plugins.losses.base import ClassificationLoss
from ldam_plugins.losses.reweighting import apply_stage
from ldam_plugins.posthoc.linear_head import ROWS_AT_ONCE
from ldam_plugins.schedules import DeferredSchedule, Progress

_ELEMENTS = 8_000_000
_MEMORY = 20
"""Past steps from which L-BFGS estimates the curvature."""
_KINDS = ("none", "rw", "drw")


@dataclass(frozen=True, eq=False)
class FittedHead:
    """A head that was solved for.

    Args:
        layer: ``nn.Linear`` or :class:`.CosineLinear`, float32, that takes the features as they
            are: the standardisation is folded into a linear one.
        objective: What was minimised, at the solution.
        gradient: Largest absolute entry of its gradient there.
        iterations: Of L-BFGS, over all stages.
        converged: Whether the tolerance was reached.
    """

    layer: nn.Linear
    objective: float
    gradient: float
    iterations: int
    converged: bool


def fit_head(
    features: Tensor,
    labels: Tensor,
    criterion: ClassificationLoss,
    *,
    head: str = "auto",
    scale: float | None = None,
    schedule: DeferredSchedule | None = None,
    weight_decay: float = 0.01,
    seed: int = 0,
    tolerance: float = 1e-5,
    max_iterations: int = 1000,
) -> FittedHead:
    """Solve for the last layer of a classifier, its features (N, D) being given.

    Minimises the mean loss, over all samples at once, with class weights where the schedule has
    them, by L-BFGS:

    * linear head: ``mean(loss(W x + b)) + weight_decay / 2 * sum(W ** 2)``, x standardised to mean
      0 and variance 1. For ``ce``, ``ldam``, ``logit_adjusted`` it is convex: one optimum.
    * cosine head: ``mean(loss(scale * cos(w, x)))``. The lengths of w have no effect and are not
      decayed; the problem is not convex, so the solution depends on where it begins.

    Under ``drw`` the weighted problem is solved from the solution of the unweighted one, which is
    where deferral can matter to a cosine head. A linear one ends in the optimum of ``rw``.

    Args:
        features: (N, D), floating, as :func:`.extract_features` gives them.
        labels: (N,) class indices.
        criterion: The loss, made with the class counts of ``labels``; its weights are written.
        head: ``"linear"``, ``"cosine"`` or ``"auto"``: cosine for losses with a margin.
        scale: Of the cosine head; default: the loss's, else 30.
        schedule: ``none`` (default), ``rw`` or ``drw``.
        weight_decay: Of the linear head.
        seed: Of the first directions of a cosine head. A linear head begins at 0.
        tolerance: On the largest absolute entry of the gradient.
        max_iterations: For each stage.

    Returns:
        The layer, and how it was found.

    Raises:
        TypeError: features that are not floats, or labels that are not integers.
        ValueError: shapes that do not fit, features that are not finite, labels out of range; a
            schedule that samples; a scale without a cosine head, or another than the loss's; a
            criterion that is not reduced by the mean.

    Example:
        >>> from ldam_plugins import create_loss
        >>> x, y = torch.randn(60, 8), torch.arange(60) % 3
        >>> fitted = fit_head(x, y, create_loss("ce", [20, 20, 20]))
        >>> fitted.converged, fitted.layer(x).shape
        (True, torch.Size([60, 3]))
    """
    schedule = DeferredSchedule("none") if schedule is None else schedule
    _check_schedule(schedule)
    check_real("weight_decay", weight_decay, low=0)
    check_real("tolerance", tolerance, low=0, low_open=True)
    check_int("max_iterations", max_iterations, low=1)
    target = _checked(features, labels, len(criterion.class_counts))
    if criterion.reduction != "mean":
        raise invalid("reduction", "'mean', for the criterion", criterion.reduction)
    cosine = wants_cosine_head(criterion, head)
    if scale is not None and not cosine:
        raise invalid("scale", "left out with a linear head", scale)
    problem: _Problem
    if cosine:
        problem = _CosineProblem(features, target, criterion, head_scale(criterion, scale), seed)
    else:
        problem = _LinearProblem(features, target, criterion, weight_decay)
    found, iterations = problem.start(), 0
    for step in range(2 if schedule.kind == "drw" else 1):
        stage = DeferredSchedule(schedule.kind, start=1, unit="step", beta=schedule.beta)
        apply_stage(problem.criterion, stage, Progress(step, 2, 2))
        result = _minimise(problem, found, tolerance, max_iterations)
        found, iterations = result.x, iterations + int(result.nit)
    gradient = float(np.abs(result.jac).max())
    return FittedHead(
        problem.layer(found), float(result.fun), gradient, iterations, gradient <= tolerance
    )


class _Problem:
    """What is minimised over a flat vector, in float64, as float32 stops short of the optimum."""

    def __init__(self, inputs: Tensor, target: Tensor, criterion: ClassificationLoss) -> None:
        self.inputs, self.target = inputs, target
        self.criterion = criterion
        self.shape = (len(criterion.class_counts), inputs.shape[1])

    def start(self) -> np.ndarray:
        raise NotImplementedError

    def logits(self, parameters: Tensor, inputs: Tensor) -> Tensor:
        raise NotImplementedError

    def penalty(self, parameters: Tensor) -> Tensor | float:
        raise NotImplementedError

    def layer(self, found: np.ndarray) -> nn.Linear:
        raise NotImplementedError

    def value_and_gradient(self, vector: np.ndarray) -> tuple[float, np.ndarray]:
        parameters = torch.from_numpy(vector).requires_grad_()
        value, denominator = 0.0, self.criterion.denominator(self.target)
        size = max(64, min(ROWS_AT_ONCE, _ELEMENTS // self.shape[0]))
        for start in range(0, len(self.target), size):  # memory holds the logits of some rows
            rows = slice(start, start + size)
            logits = self.logits(parameters, self.inputs[rows].double())
            loss = self.criterion(logits, self.target[rows], denominator)
            loss.backward()
            value += loss.item()
        penalty = self.penalty(parameters)
        if isinstance(penalty, Tensor):
            penalty.backward()
            value += penalty.item()
        assert parameters.grad is not None
        return value, parameters.grad.numpy()


class _LinearProblem(_Problem):
    """The weight (C, D) on standardised features, then the bias (C,)."""

    def __init__(
        self, features: Tensor, target: Tensor, criterion: ClassificationLoss, weight_decay: float
    ) -> None:
        self.mean, deviation = _moments(features)
        # A feature that never changes tells nothing; it is left where it is.
        self.deviation = deviation.where(deviation > 0, 1.0)
        super().__init__(features, target, criterion)
        self.weight_decay = weight_decay

    def start(self) -> np.ndarray:
        classes, size = self.shape
        return np.zeros(classes * (size + 1))

    def logits(self, parameters: Tensor, inputs: Tensor) -> Tensor:
        weight, bias = self._parts(parameters)
        return F.linear((inputs - self.mean) / self.deviation, weight, bias)

    def penalty(self, parameters: Tensor) -> Tensor:
        return self.weight_decay / 2 * self._parts(parameters)[0].square().sum()

    def layer(self, found: np.ndarray) -> nn.Linear:
        classes, size = self.shape
        weight, bias = self._parts(torch.from_numpy(found))
        layer = nn.Linear(size, classes)
        with torch.no_grad():
            layer.weight.copy_(weight / self.deviation)
            layer.bias.copy_(bias - (weight / self.deviation) @ self.mean)
        return layer

    def _parts(self, parameters: Tensor) -> tuple[Tensor, Tensor]:
        classes, size = self.shape
        return parameters[: classes * size].view(self.shape), parameters[classes * size :]


class _CosineProblem(_Problem):
    """The directions (C, D) of the classes, on features of unit length."""

    def __init__(
        self,
        features: Tensor,
        target: Tensor,
        criterion: ClassificationLoss,
        scale: float,
        seed: int,
    ) -> None:
        super().__init__(features, target, criterion)
        self.scale, self.seed = scale, seed

    def start(self) -> np.ndarray:
        rows = np.random.default_rng(self.seed).standard_normal(self.shape)
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).ravel()

    def logits(self, parameters: Tensor, inputs: Tensor) -> Tensor:
        directions = F.normalize(parameters.view(self.shape), dim=1)
        return self.scale * F.linear(F.normalize(inputs, dim=1), directions)

    def penalty(self, parameters: Tensor) -> float:
        return 0.0

    def layer(self, found: np.ndarray) -> nn.Linear:
        classes, size = self.shape
        layer = CosineLinear(size, classes, scale=self.scale)
        with torch.no_grad():
            layer.weight.copy_(F.normalize(torch.from_numpy(found).view(self.shape), dim=1))
        return layer


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature, float64."""
    parts = features.split(ROWS_AT_ONCE)
    mean = torch.stack([part.double().sum(dim=0) for part in parts]).sum(dim=0) / len(features)
    squares = torch.stack([(part.double() - mean).square().sum(dim=0) for part in parts])
    return mean, (squares.sum(dim=0) / len(features)).sqrt()


def _minimise(problem: _Problem, start: np.ndarray, tolerance: float, iterations: int) -> Any:
    # Imported here, as it takes a third of a second that few who import this room need.
    from scipy.optimize import minimize

    options: dict[str, float] = {"maxiter": iterations, "maxfun": 4 * iterations}
    options |= {"maxcor": _MEMORY, "gtol": tolerance, "ftol": 0.0}  # the gradient alone decides
    with torch.enable_grad():
        return minimize(
            problem.value_and_gradient, start, jac=True, method="L-BFGS-B", options=options
        )


def _check_schedule(schedule: DeferredSchedule) -> None:
    if schedule.kind not in _KINDS:
        hint = (
            "Sampling classes has the expectation of weighting them: use 'rw' for 'rs', 'drw' for"
        )
        hint += " 'drs'."
        raise invalid("schedule", f"of kind {quoted(_KINDS)}", schedule.kind, hint=hint)


def _checked(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The labels as int64, after a check that they are those of the features."""
    if not isinstance(features, Tensor) or not features.is_floating_point():
        shown = getattr(features, "dtype", type(features).__name__)
        raise invalid("features", "a floating-point tensor", shown, error=TypeError)
    target = label_array(labels)
    if features.ndim != 2 or len(features) != len(target) or not len(target):
        expected = f"of shape ({len(target)}, D), one row for each label, and not empty"
        raise invalid("features", expected, tuple(features.shape))
    if not all(bool(part.isfinite().all()) for part in features.split(ROWS_AT_ONCE)):
        raise invalid("features", "finite", "NaN or infinity")
    check_label_range(target, classes)
    return torch.from_numpy(target.astype(np.int64))
