"""A trained classifier made fair to rare classes: its head changed in place, nothing trained.

The method and its strength are given, or chosen on labelled features; what the change does is
measured on a test set, or by cross-fitting on those features.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor, nn

from ldam_plugins._validation import check_choice, check_int, invalid, quoted
from ldam_plugins.choices import NONE, SCALINGS, TEMPERATURE
from ldam_plugins.counts import ClassCounts
from ldam_plugins.metrics import MetricAccumulator
from ldam_plugins.posthoc.calibration import (
    Scaling,
    best_scaling,
    calibration_error,
)
from ldam_plugins.posthoc.choice import (
    CRITERIA,
    Cells,
    Choice,
    Difference,
    choose,
    chosen_rows,
    cross_fitted,
    problem_folds,
    variance_of,
)
from ldam_plugins.posthoc.features import Features
from ldam_plugins.posthoc.linear_head import (
    ROWS_AT_ONCE,
    HeadState,
    LinearHead,
    check_features,
    fold_to_fit,
    warn_of_new_bias,
)
from ldam_plugins.posthoc.methods import (
    AUTO,
    METHODS,
    Affine,
    Problem,
    class_weights,
    find_method,
)
from ldam_plugins.posthoc.prior_estimates import implied_prior, refuse_absent
from ldam_plugins.posthoc.priors import Prior, TargetPrior, resolve_target, shares_of

TEST, CROSS_FITTED = "test", "cross-fitting"
_SAME = 0.5
"""Share of the test samples that may occur in both parts, as short texts do."""
_MEMORISED = 0.995


@dataclass(frozen=True, eq=False)
class Rebalanced:
    """A model whose head was changed, and what that did.

    Args:
        method: That was applied; ``"none"``: nothing was changed but a cosine head folded.
        strength: Its strength, None for one without.
        target_prior: Class shares that it now predicts under, (C,).
        source_prior: Those that it was taken to have learned, (C,).
        temperature: By which the logits were divided as well; 1 where ``calibrate`` was not asked,
            None where classes got scales of their own.
        scaling: What ``calibrate`` did to the logits, if it was asked.
        choice: How method or strength were chosen; None where both were given.
        measured_on: ``"test"`` or ``"cross-fitting"``.
        before: Metrics as of :func:`.long_tail_metrics` with their intervals, and ``calibration``
            as of :func:`.calibration_error` under the target prior. Of a cosine head: once folded.
        after: The same of the changed model.
        differences: By name of a metric (``balanced_accuracy``, ``accuracy``, ``many``, ``medium``,
            ``few``) by how much it rose, with its 95 % interval, in 0..1; the samples are paired.
    """

    method: str
    strength: float | None
    target_prior: Tensor
    source_prior: Tensor
    temperature: float | None
    scaling: Scaling | None
    choice: Choice | None
    measured_on: str
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    differences: Mapping[str, Difference]
    _state: HeadState

    def undo(self) -> None:
        """Put the head back as it was, a cosine head as such."""
        self._state.restore()

    def to_dict(self) -> dict[str, Any]:
        """What there is to record of the change beside ``before`` and ``after``; for JSON."""
        return {
            "method": self.method,
            "strength": self.strength,
            "target_prior": self.target_prior.tolist(),
            "source_prior": self.source_prior.tolist(),
            "temperature": self.temperature,
            **self._scales(),
            "measured_on": self.measured_on,
            "differences": {name: list(each) for name, each in self.differences.items()},
            "choice": None if self.choice is None else self.choice.to_dict(),
        }

    def _scales(self) -> dict[str, Any]:
        if self.scaling is None or self.temperature is not None:
            return {}
        return {name: part.tolist() for name, part in self.scaling._asdict().items()}

    def __str__(self) -> str:
        strength = "" if self.strength is None else f", strength {self.strength:.4g}"
        lines = [f"method {self.method}{strength}, measured on {self.measured_on}"]
        for name, each in self.differences.items():
            ends = f"{100 * each.low:+.1f} to {100 * each.high:+.1f}"
            lines.append(f"{name.replace('_', ' ')}: {100 * each.value:+.1f} points ({ends})")
        if self.choice is not None:
            lines.append(self.choice.verdict())
        return "\n".join(lines)


def rebalance_head(
    model: nn.Module,
    features: Features,
    class_counts: ClassCounts | Sequence[int] | np.ndarray | Tensor,
    method: str = "auto",
    *,
    strength: float | None = None,
    target_prior: TargetPrior = "uniform",
    source_prior: Prior = "train",
    methods: Sequence[str] = AUTO,
    by: str = "log_loss",
    folds: int = 5,
    seed: int = 0,
    calibrate: bool | str = False,
    test: Features | None = None,
    learn_from: Features | None = None,
    refit: Callable[[Tensor, Tensor], nn.Linear] | None = None,
    allow_same: bool = False,
    max_samples: int | None = None,
    head: str | Sequence[str] | None = None,
) -> Rebalanced:
    """Make the head of a trained classifier fair to rare classes, in place.

    With W (C, D), b (C,) the head, pi the source prior and t the target prior; below, "balanced"
    means that each class weighs the same:

    * ``logit_adjustment``: ``b_c - strength * log(pi_c / t_c)`` (Menon et al., ICLR 2021).
    * ``tau_norm``: ``w_c / |w_c| ** strength``, no bias (Kang et al., ICLR 2020).
    * ``lws``: ``f_c (w_c x + b_c)`` with the f of the least
      ``strength * balanced loss + |f - 1|^2 / 2`` (Kang et al.; there without the second term).
    * ``crt``: a new linear head, the optimum of scikit-learn's ``LogisticRegression(C=strength,
      class_weight="balanced")`` on standardised features (Kang et al.).
    * ``class_means``: ``-|x - mean_c|^2 / 2`` in the metric of the covariance within the classes,
      of which ``strength`` is shrunk to a multiple of the identity; 1 is the nearest class mean.
    * ``cosine_means``: the class mean with the smallest angle to x.
    * ``ce``, ``ldam`` and all other losses: a new head, see :func:`.fit_head`, with the class
      shares of the features taken out of its logits unless the loss does so itself. ``strength`` is
      scikit-learn's C of ``ce``, else the margin, gamma or tau of the loss.
    * ``none``: the head as it is.
    * ``auto``: one of ``methods``, or ``none``, by cross-fitting; see :class:`.Choice`.

    The heads of even classes are moved to another target prior by ``log(C t_c)`` in the bias; of
    ``tau_norm`` and ``cosine_means``, whose logits have no unit, after a division by the
    temperature that fits best. Everything ends as weight and bias of the layer that is there, so
    that the host loads the model alone. A cosine head is folded first (:func:`.fold_cosine_head`,
    fitted to the features), and "before" is of the folded model.

    Args:
        model: A classifier, see :func:`.extract_features`. It is changed.
        features: Of labelled samples to learn from and to choose on: best those that the model was
            not trained on, else the training samples. Never the test set.
        class_counts: Samples per class that the *model* was trained on.
        method: One of the above.
        strength: As above; None: chosen by cross-fitting.
        target_prior: Class shares to predict under: ``"uniform"``, for balanced accuracy,
            ``"train"``, probabilities (C,), or features or logits of unlabelled samples of which
            they are estimated, see :func:`.estimate_prior`.
        source_prior: Class shares that the model has learned: ``"train"``, those of
            ``class_counts``; probabilities (C,); or ``"implied"``, fitted on the features, for a
            model trained with weights, margins or resampling, see :func:`.implied_prior`.
        methods: What ``auto`` chooses among.
        by: What is chosen by, under the target prior: ``"log_loss"``, or ``"accuracy"``, which
            needs several times the samples to tell a gain from noise.
        folds: Of the cross-fitting.
        seed: Of the division into folds.
        calibrate: Whether to divide the logits, last, by the temperature that fits the features
            best under the target prior, by cross-fitting. ``"class"`` or ``"group"``: scales and
            offsets of their own, see :func:`.fit_vector_scaling`.
        test: Features of test samples, on which before and after are measured. Without them they
            are measured on ``features`` by cross-fitting.
        learn_from: Further labelled samples that methods learn from, beside ``features``, such as
            those that the model was trained on; nothing is chosen or measured on them.
        refit: ``refit(features, labels)`` gives such a head as the model has, fitted on these
            samples: where the given one was itself fitted on ``features``, which are frozen, so
            that it too is judged on samples that it has not learned from.
        allow_same: Whether more than half of ``test`` may occur in the other samples as well, as
            short texts do that are known to be of other rows.
        max_samples: Learn from, choose and measure on at most about so many of ``features``, and as
            many of ``learn_from``: of each class the same number, or all that it has, so that only
            large classes lose some. A warning says how many. Default: all.
        head: Dotted names of the heads, where `find_head` does not find the right ones.

    Returns:
        What was done, before and after with intervals, and ``undo()``.

    Raises:
        TypeError: the head does not hold its weights as floats.
        ValueError: an unknown method, or a strength that it does not take; counts or priors of
            another length, or a prior whose sum is not 1; features of another model; a class
            without a sample in ``features`` where the method learns from them; test samples that
            are in ``features``; a head that is not found, sharded or shares its weights. The model
            is then as it was.

    Warns:
        UserWarning: samples are left out by ``max_samples``; a head without a bias gets one;
            estimated class shares cannot be trusted; ``features`` lack a class, so ``auto`` tries
            no method that learns from them; or the choice was made on samples that the model knows
            by heart, which show nothing.

    Example:
        >>> from ldam_plugins.posthoc import extract_features
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> found = extract_features(model, [(torch.randn(30, 8), torch.arange(30) % 2)])
        >>> done = rebalance_head(model, found, [900, 100], "logit_adjustment", strength=1.0)
        >>> done.method, done.strength
        ('logit_adjustment', 1.0)
        >>> done.undo()
    """
    counts = class_counts if isinstance(class_counts, ClassCounts) else ClassCounts(class_counts)
    kind = TEMPERATURE if calibrate is True else calibrate
    if kind is not False:
        check_choice("calibrate", kind, SCALINGS)
    _check_samples(model, features, counts, test, learn_from, head)
    features = _at_most(features, max_samples, seed)
    learn_from = _at_most(learn_from, max_samples, seed)
    labels = features.labels
    if learn_from is not None:
        labels = torch.cat([labels, learn_from.labels])
    if not allow_same:
        _refuse_same({"features": features, "learn_from": learn_from}, test)
    _check_method(method, strength, methods, by)
    state = HeadState(model, head)
    with state.restored_on_error():
        fitted = fold_to_fit(model, features)
        linear = LinearHead.of_model(model, fitted, head)
        problem = _problem(linear, fitted, counts, source_prior, target_prior)
        problem = _with_others(problem, learn_from)
        problem = _with_fold_heads(problem, refit, folds, seed)
        choice, tried = None, _to_try(method, strength, methods, linear, labels, counts)
        if tried:
            keep_best = method != "auto"
            choice = choose(
                problem, counts, tried, by=by, folds=folds, seed=seed, keep_best=keep_best
            )
        if choice is not None:
            _warn_if_memorised(choice, problem, counts)
            method, strength = choice.chosen.method, choice.chosen.strength
        new = find_method(method).apply(problem, strength)
        logits, judged = _unseen(problem, method, strength, choice, folds, seed)
        truth, after = problem.labels[judged], chosen_rows(logits, judged)
        scaling = None
        if kind is not False:
            weights = class_weights(truth, problem.target)
            scaling = best_scaling(kind, after, truth, weights, counts)
            after = scaling.apply(after)
            scales = scaling.scales
            new = Affine(new.weight * scales[:, None], new.bias * scales + scaling.offsets)
        gave_bias = False
        if method != NONE or scaling is not None:
            gave_bias = linear.write(*new)
        if test is None:
            on = CROSS_FITTED
            before, _ = _unseen(problem, NONE, None, None, folds, seed)
            old = _measured(chosen_rows(before, judged), truth, counts, problem.target)
            del before
            now = _measured(after, truth, counts, problem.target)
        else:
            on, truth = TEST, test.labels
            old = _measured(problem.head.logits(test.features), truth, counts, problem.target)
            now = _measured(linear.logits(test.features), truth, counts, problem.target)
    if gave_bias:
        warn_of_new_bias(linear.names[0], stacklevel=3)
    return Rebalanced(
        method,
        strength,
        problem.target,
        problem.source,
        _temperature(kind, scaling),
        scaling,
        choice,
        on,
        old.metrics,
        now.metrics,
        _differences(now.correct - old.correct, truth, counts),
        state,
    )


def _check_samples(
    model: nn.Module,
    features: Features,
    counts: ClassCounts,
    test: Features | None,
    learn_from: Features | None,
    head: str | Sequence[str] | None,
) -> None:
    """Check that all belong together."""
    given = {"features": features, "test": test, "learn_from": learn_from}
    for name, each in given.items():
        if each is None:
            continue
        if not isinstance(each, Features):
            expected = "Features, as extract_features gives them"
            raise invalid(name, expected, type(each).__name__, error=TypeError)
        check_features(model, each, head)
        if each.logits.shape[1] != len(counts):
            expected = f"one count for each of the {each.logits.shape[1]} classes of the model"
            raise invalid("class_counts", expected, len(counts))
        each.head_labels()


@overload
def _at_most(features: Features, most: int | None, seed: int) -> Features: ...
@overload
def _at_most(features: None, most: int | None, seed: int) -> None: ...
def _at_most(features: Features | None, most: int | None, seed: int) -> Features | None:
    """The features, of large classes only some: of each as many as make about ``most`` in all."""
    if features is None or most is None:
        return features
    check_int("max_samples", most, low=1)
    if len(features) <= most:
        return features
    labels = features.labels.numpy()
    sizes = np.bincount(labels)
    low, cap = 1, int(sizes.max())
    while low < cap:  # the largest size of a class with which no more are left
        middle = (low + cap + 1) // 2
        low, cap = (middle, cap) if np.minimum(sizes, middle).sum() <= most else (low, middle - 1)
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    place = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    kept = np.sort(by_class[place < cap])
    warnings.warn(
        f"max_samples: {len(kept)} of {len(labels)} samples are used, at most {cap} of a class.",
        stacklevel=3,
    )
    rows = torch.from_numpy(kept)
    return replace(
        features,
        features=features.features[rows],
        logits=features.logits[rows],
        labels=features.labels[rows],
    )


def _refuse_same(others: Mapping[str, Features | None], test: Features | None) -> None:
    """Refuse test samples of which most are among those that the choice is made on."""
    if test is None:
        return
    for name, features in others.items():
        if features is None:
            continue
        known = {hash(row.tobytes()) for row in features.features.numpy()}
        same = sum(hash(row.tobytes()) in known for row in test.features.numpy())
        if same > _SAME * len(test):
            hint = "What is chosen on the test set is not measured by it: give the features of"
            hint += " held-out or training samples, and those of the test set as `test`."
            shown = f"{same} of {len(test)} that are among them"
            raise invalid("test", f"of other samples than `{name}`", shown, hint=hint)


def _check_method(method: str, strength: float | None, methods: Sequence[str], by: str) -> None:
    check_choice("method", method, ["auto", *METHODS])
    check_choice("by", by, CRITERIA)
    for name in methods:
        check_choice("methods", name, METHODS)
    if strength is None:
        return
    if method == "auto":
        hint = "Name the method whose strength it is."
        raise invalid("strength", "left out with method 'auto'", strength, hint=hint)
    find_method(method).check_strength(strength)


def _to_try(
    method: str,
    strength: float | None,
    methods: Sequence[str],
    linear: LinearHead,
    labels: Tensor,
    counts: ClassCounts,
) -> list[tuple[str, float | None]]:
    """What is to be chosen among; empty if nothing is to be chosen."""
    if method != "auto":
        found = find_method(method)
        chosen = strength is None and len(found.strengths(len(labels))) > 1
        if found.learns:
            refuse_absent("features", _sizes(labels, counts), counts.class_names)
        return [(method, None)] if chosen else []
    tried = [name for name in methods if linear.has_bias or not METHODS[name].has_bias]
    absent = np.flatnonzero(_sizes(labels, counts) == 0)
    learned = [name for name in tried if METHODS[name].learns]
    if len(absent) and learned:
        names = counts.class_names or range(len(counts))
        warnings.warn(
            f"`features` has no sample of {len(absent)} of {len(counts)} classes"
            f" ({quoted(names[index] for index in absent)}): methods that learn from samples are"
            f" left out ({', '.join(learned)}), the others are judged by the other classes.",
            stacklevel=3,
        )
        tried = [name for name in tried if name not in learned]
    return [(name, None) for name in (NONE, *tried)]


def _problem(
    linear: LinearHead,
    features: Features,
    counts: ClassCounts,
    source_prior: Prior,
    target_prior: TargetPrior,
) -> Problem:
    classes, temperature = len(counts), 1.0
    if isinstance(source_prior, str) and source_prior == "implied":
        refuse_absent("features", _sizes(features.labels, counts), counts.class_names)
        implied = implied_prior(features.logits, features.labels)
        source, temperature = implied.prior, implied.temperature
    elif isinstance(source_prior, str):
        check_choice("source_prior", source_prior, ["train", "implied"])
        source = counts.prior(dtype=torch.float64)
    else:
        source = shares_of("source_prior", source_prior, classes)
    if isinstance(target_prior, str) and target_prior == "train":
        target = counts.prior(dtype=torch.float64)
    else:
        held_out = (features.logits / temperature, features.labels)
        given = resolve_target(target_prior, source, classes, held_out=held_out, stacklevel=5)
        target = shares_of("target_prior", given, classes)
    return Problem(
        Affine(linear.weight, linear.bias),
        features.features,
        features.labels,
        source,
        target / target.sum(),
        temperature=temperature,
    )


def _with_others(problem: Problem, learn_from: Features | None) -> Problem:
    """The problem with further samples that are learned from alone."""
    if learn_from is None:
        return problem
    return replace(
        problem,
        features=torch.cat([problem.features, learn_from.features]),
        labels=torch.cat([problem.labels, learn_from.labels]),
        others=len(learn_from),
    )


def _with_fold_heads(
    problem: Problem, refit: Callable[[Tensor, Tensor], nn.Linear] | None, folds: int, seed: int
) -> Problem:
    """The problem with the given head as it would be without each fold."""
    if refit is None:
        return problem
    fold = problem_folds(problem, folds, seed)
    found = []
    for index in range(int(fold.max()) + 1):
        kept = fold != index
        layer = refit(problem.features[kept], problem.labels[kept])
        if layer.weight.shape != problem.head.weight.shape:
            expected = f"a function that gives heads of shape {tuple(problem.head.weight.shape)}"
            raise invalid("refit", expected, tuple(layer.weight.shape))
        weight = layer.weight.detach().cpu().double()
        bias = torch.zeros(len(weight), dtype=torch.float64)
        bias = bias if layer.bias is None else layer.bias.detach().cpu().double()
        found.append(Affine(weight, bias))
    return replace(problem, fold_heads=tuple(found))


def _temperature(kind: bool | str, scaling: Scaling | None) -> float | None:
    if scaling is None:
        return 1.0
    return 1 / float(scaling.scales[0]) if kind == TEMPERATURE else None


def _sizes(labels: Tensor, counts: ClassCounts) -> np.ndarray:
    return torch.bincount(labels, minlength=len(counts)).numpy()


def _warn_if_memorised(choice: Choice, problem: Problem, counts: ClassCounts) -> None:
    _, own = problem.judges()
    trained_on = np.array_equal(_sizes(own, counts), counts.counts) and not problem.fold_heads
    if trained_on and choice.candidates[0].accuracy > _MEMORISED:
        warnings.warn(
            f"the model errs on {1 - choice.candidates[0].accuracy:.1%} of the samples in"
            " `features`, which seem to be those that it was trained on: what it knows by heart"
            " does not show what would help with others. Give the features of held-out samples,"
            " or a method and its strength, such as method='logit_adjustment', strength=1.0.",
            stacklevel=3,
        )


def _unseen(
    problem: Problem,
    method: str,
    strength: float | None,
    choice: Choice | None,
    folds: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Logits of the new head for each sample that it did not learn from, and which these are."""
    if choice is not None:
        return choice.logits, choice.judged
    fold = problem_folds(problem, folds, seed)
    judged = fold >= 0
    if not (find_method(method).learns or problem.fold_heads):
        judged[:] = True  # of classes with a single sample as well
        judged[len(judged) - problem.others :] = False
    kept = torch.where(judged & (fold < 0), 0, fold)
    return cross_fitted(problem, method, strength, kept), judged


class _Measured(NamedTuple):
    metrics: dict[str, Any]
    correct: Tensor


def _measured(logits: Tensor, labels: Tensor, counts: ClassCounts, target: Tensor) -> _Measured:
    """Metrics of some logits, and whether each row is right, as 0 or 1."""
    found = MetricAccumulator(counts)
    correct = torch.empty(len(labels), dtype=torch.float64)
    for start in range(0, len(labels), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        found.update(logits[rows], labels[rows])
        correct[rows] = (logits[rows].argmax(dim=1) == labels[rows]).double()
    metrics = found.compute(detailed=True)
    metrics["calibration"] = calibration_error(logits, labels, prior=target)
    return _Measured(metrics, correct)


def _differences(gain: Tensor, labels: Tensor, counts: ClassCounts) -> dict[str, Difference]:
    """By how much the accuracy of the sets of classes rose, from the gain of each row."""
    sets: dict[str, Sequence[int]] = {"balanced_accuracy": range(len(counts)), **counts.groups()}
    differences = {}
    for name, ids in sets.items():
        chosen = torch.isin(labels, torch.tensor(list(ids), dtype=torch.int64))
        if bool(chosen.any()):
            present, cell = labels[chosen].unique(return_inverse=True)
            share = torch.full((len(present),), 1 / len(present), dtype=torch.float64)
            cells = Cells(cell, share, {}, present)
            differences[name] = cells.mean(gain[chosen], variance_of(gain))
    one = torch.ones(1, dtype=torch.float64)
    everything = Cells(torch.zeros_like(labels), one, {}, torch.zeros(len(counts)).long())
    differences["accuracy"] = everything.mean(gain)
    return differences
