"""A trained classifier under another class prior: its logits are shifted, nothing is trained.

A classifier that was trained on data with the class shares ``source`` estimates ``p(c | x)`` under
them. Under the shares ``target``, with the same ``p(x | c)``, Bayes' rule gives probabilities in
proportion to ``p(c | x) * target_c / source_c``: a constant a class, added to the logits.

Source: Saerens et al., Neural Computation 14 (2002), equation 2.4 (known priors); Menon et al.,
ICLR 2021, arXiv 2007.07314, section 4.1 (uniform target, strength tau).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ldam_plugins._tensor_checks import check_logits
from ldam_plugins._validation import check_choice, check_real, invalid
from ldam_plugins.counts import ClassCounts
from ldam_plugins.heads import find_head
from ldam_plugins.heads.layers import layer_sizes
from ldam_plugins.posthoc.features import Features
from ldam_plugins.posthoc.linear_head import (
    check_writable,
    give_bias,
    refuse_cosine_heads,
    warn_of_new_bias,
)
from ldam_plugins.posthoc.prior_estimates import estimate_prior

Prior = ClassCounts | Sequence[float] | np.ndarray | Tensor | str
"""Class shares: counts, probabilities (C,), or ``"uniform"``."""
TargetPrior = Prior | Features
"""As well ``"train"``, the shares of the training set, and unlabelled samples: their features, or
their logits (M, C), of which the shares are estimated."""

_Logits = TypeVar("_Logits", Tensor, np.ndarray)
_SUM_TOLERANCE = 1e-4
_LEAST_SHARE = 1e-6
"""An estimated share of 0 would forbid a class for good."""


def adjusted_logits(
    logits: _Logits, source_prior: Prior, target_prior: TargetPrior = "uniform", tau: float = 1.0
) -> _Logits:
    """``z_c + tau (log target_c - log source_c)``: the logits under another class prior.

    Args:
        logits: z (N, C), floating.
        source_prior: Class shares that the model has learned: those of its training set, as
            :class:`.ClassCounts` or as probabilities (C,), each above 0.
        target_prior: Those to predict under, likewise; ``"uniform"`` is for balanced accuracy,
            ``"train"`` for the shares of ``source_prior`` where that are counts. Features or
            logits (M, C) of unlabelled samples stand for their shares, see :func:`.estimate_prior`.
        tau: Strength, at least 0. 1 is Bayes' rule.

    Returns:
        The adjusted logits, of the type, dtype and device of ``logits``.

    Raises:
        TypeError: ``logits`` are not floats.
        ValueError: a prior of another length, with a share that is not above 0 or a sum that is
            not 1; ``tau`` is negative.

    Warns:
        UserWarning: shares that were estimated cannot be trusted, and why.

    Example:
        >>> adjusted_logits(torch.zeros(1, 2), ClassCounts([900, 100])).softmax(dim=1)
        tensor([[0.1000, 0.9000]])
    """
    if isinstance(logits, Tensor):
        scores = logits
    else:
        scores = torch.from_numpy(np.require(logits, requirements=["C", "W"]))
    check_logits(scores)
    target_prior = resolve_target(target_prior, source_prior, scores.shape[1])
    shift = _shift(scores.shape[1], source_prior, target_prior, tau)
    wide = torch.promote_types(scores.dtype, torch.float32)
    adjusted = (scores.to(wide) + shift.to(scores.device, wide)).to(scores.dtype)
    return adjusted if isinstance(logits, Tensor) else adjusted.numpy()


def adjust_to_prior(
    model: nn.Module,
    source_prior: Prior,
    target_prior: TargetPrior = "uniform",
    tau: float = 1.0,
    *,
    head: str | Sequence[str] | None = None,
    held_out: Features | None = None,
) -> nn.Module:
    """Add ``tau (log target_c - log source_c)`` to the bias of the last layer, in place.

    The model then gives :func:`adjusted_logits` by itself, and what is saved of it needs nothing of
    this package. Several heads whose logits are averaged get it each. A second call adds to the
    first. In 16-bit weights the new bias is rounded once.

    It suits a model that was trained without correcting the prior: one of a logit-adjusted or
    re-weighted loss, or with margins, has learned another one than that of its training set.
    :func:`.implied_prior` fits that on held-out logits.

    Args:
        model: A classifier of timm or transformers, or any whose last layer is linear.
        source_prior: Class shares that it has learned, see :func:`adjusted_logits`.
        target_prior: Class shares to predict under, or unlabelled samples that have them, see
            :func:`adjusted_logits`.
        tau: Strength, at least 0.
        head: Dotted names of the layers, where `find_head` does not find the right ones.
        held_out: Labelled samples that the model was not trained on, for a check of shares that are
            estimated.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module, or its bias does not hold floats.
        ValueError: a cosine head, which has no bias; a head that is not found or inside an adapter
            (see `find_head`), that has another number of classes, that is sharded or wrapped for
            parallel training, or whose bias another module shares; priors and ``tau`` as in
            :func:`adjusted_logits`. Nothing is changed then.

    Warns:
        UserWarning: shares that were estimated cannot be trusted, and why. Or a head without a bias
            gets one: a host that builds the architecture without it would leave the saved bias out,
            so a model that is loaded must be built with one.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> before = model[2].bias.detach().clone()
        >>> _ = adjust_to_prior(model, ClassCounts([900, 100]))
        >>> model[2].bias.detach() - before
        tensor([-0.5878,  1.6094])
    """
    refuse_cosine_heads(model)
    # Two names of one layer, or two layers of one bias, are adjusted once.
    layers = {name: model.get_submodule(name) for name in find_head(model, head)}
    shifts: list[tuple[nn.Linear | nn.Conv2d, Tensor]] = []
    known: set[int] = set()
    classes = layer_sizes(next(iter(layers.values())))[1]  # type: ignore[arg-type]
    checked = None if held_out is None else (held_out.logits, held_out.head_labels())
    target_prior = resolve_target(target_prior, source_prior, classes, held_out=checked)
    for name, layer in layers.items():
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        shift = _shift(layer_sizes(layer)[1], source_prior, target_prior, tau)
        check_writable(model, name, layer, [*layers.values()], parts=("bias",))
        key = id(layer if layer.bias is None else layer.bias)
        if key not in known:
            shifts.append((layer, shift))
            known.add(key)
    without = [name for name, layer in layers.items() if layer.bias is None]
    for layer, shift in shifts:
        _add_to_bias(layer, shift)
    if without:
        warn_of_new_bias(without[0], stacklevel=3)
    return model


def resolve_target(
    target: TargetPrior,
    source: Prior,
    classes: int,
    *,
    held_out: tuple[Tensor, Tensor] | None = None,
    stacklevel: int = 3,
) -> Prior:
    """The target prior as class shares, where it was given as ``"train"`` or by samples.

    Args:
        target: As given.
        source: Class shares that the model has learned.
        classes: C.
        held_out: Logits and labels of samples that are labelled, for a check of an estimate.
        stacklevel: Of the warning of an estimate that cannot be trusted.

    Raises:
        ValueError: ``"train"`` beside a source prior that does not say what that is; logits of
            other classes.
    """
    if isinstance(target, str):
        check_choice("target_prior", target, ["uniform", "train"])
    if isinstance(target, str) and target == "train":
        if not isinstance(source, ClassCounts):
            hint = "Give the shares of the training set themselves, as ClassCounts or (C,)."
            expected = "other than 'train' where `source_prior` is not that of the training set"
            raise invalid("target_prior", expected, target, hint=hint)
        return source
    logits = target.logits if isinstance(target, Features) else target
    if isinstance(logits, Tensor | np.ndarray) and logits.ndim == 2:
        shares = shares_of("source_prior", source, classes)
        found = estimate_prior(logits, shares, held_out=held_out)
        if not found.is_trusted:
            warnings.warn(
                f"the estimated class shares cannot be trusted: {'; '.join(found.reasons)}.",
                stacklevel=stacklevel,
            )
        prior = found.prior.clamp_min(_LEAST_SHARE)
        return prior / prior.sum()
    return logits


def _shift(classes: int, source: Prior, target: Prior, tau: float) -> Tensor:
    """``tau (log target_c - log source_c)``, (C,) in float64 on the CPU."""
    check_real("tau", tau, low=0)
    old = shares_of("source_prior", source, classes)
    new = shares_of("target_prior", target, classes)
    return tau * (new.log() - old.log())


def shares_of(name: str, prior: Prior, classes: int) -> Tensor:
    """The probabilities of a prior, (C,) in float64 on the CPU."""
    if isinstance(prior, str):
        check_choice(name, prior, ["uniform"])
        return torch.full((classes,), 1.0 / classes, dtype=torch.float64, device="cpu")
    if isinstance(prior, ClassCounts):
        shares = prior.prior(dtype=torch.float64)
    elif isinstance(prior, Tensor):
        shares = prior.detach().cpu().double()
    else:
        shares = torch.from_numpy(np.array(prior, dtype=np.float64))
    if shares.shape != (classes,):
        expected = f"of shape ({classes},), one share for each class of the head"
        raise invalid(name, expected, tuple(shares.shape))
    if not bool((shares.isfinite() & (shares > 0)).all()):
        at = int((~(shares.isfinite() & (shares > 0))).nonzero()[0])
        hint = "A class that hardly occurs has a small share, not 0."
        raise invalid(name, "above 0 for every class", f"{shares[at]:g} in {at}", hint=hint)
    total = float(shares.sum())
    if abs(total - 1) > _SUM_TOLERANCE:
        hint = "Samples per class go in as ClassCounts(counts)."
        raise invalid(name, "probabilities that sum to 1", f"a sum of {total:g}", hint=hint)
    return shares


@torch.no_grad()
def _add_to_bias(layer: nn.Linear | nn.Conv2d, shift: Tensor) -> None:
    if layer.bias is None:
        give_bias(layer)
    bias = layer.bias
    assert bias is not None
    # float64 on the CPU, as Apple's MPS has none
    bias.copy_((bias.cpu().double() + shift).to(bias.dtype))
