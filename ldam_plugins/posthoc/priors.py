"""A trained classifier under another class prior: its logits are shifted, nothing is trained.

A classifier that was trained on data with the class shares ``source`` estimates ``p(c | x)`` under
them. Under the shares ``target``, with the same ``p(x | c)``, Bayes' rule gives probabilities in
proportion to ``p(c | x) * target_c / source_c``: a constant a class, added to the logits.

Source: Saerens et al., Neural Computation 14 (2002), equation 2.4 (known priors); Menon et al.,
ICLR 2021, arXiv 2007.07314, section 4.1 (uniform target, strength tau).
"""

from __future__ import annotations

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
from ldam_plugins.posthoc.linear_head import (
    check_writable,
    give_bias,
    refuse_cosine_heads,
    warn_of_new_bias,
)

Prior = ClassCounts | Sequence[float] | np.ndarray | Tensor | str
"""Class shares: counts, probabilities (C,), or ``"uniform"``."""

_Logits = TypeVar("_Logits", Tensor, np.ndarray)
_SUM_TOLERANCE = 1e-4


def adjusted_logits(
    logits: _Logits, source_prior: Prior, target_prior: Prior = "uniform", tau: float = 1.0
) -> _Logits:
    """``z_c + tau (log target_c - log source_c)``: the logits under another class prior.

    Args:
        logits: z (N, C), floating.
        source_prior: Class shares that the model has learned: those of its training set, as
            :class:`.ClassCounts` or as probabilities (C,), each above 0.
        target_prior: Those to predict under, likewise; ``"uniform"`` is for balanced accuracy.
        tau: Strength, at least 0. 1 is Bayes' rule.

    Returns:
        The adjusted logits, of the type, dtype and device of ``logits``.

    Raises:
        TypeError: ``logits`` are not floats.
        ValueError: a prior of another length, with a share that is not above 0 or a sum that is
            not 1; ``tau`` is negative.

    Example:
        >>> adjusted_logits(torch.zeros(1, 2), ClassCounts([900, 100])).softmax(dim=1)
        tensor([[0.1000, 0.9000]])
    """
    if isinstance(logits, Tensor):
        scores = logits
    else:
        scores = torch.from_numpy(np.require(logits, requirements=["C", "W"]))
    check_logits(scores)
    shift = _shift(scores.shape[1], source_prior, target_prior, tau)
    wide = torch.promote_types(scores.dtype, torch.float32)
    adjusted = (scores.to(wide) + shift.to(scores.device, wide)).to(scores.dtype)
    return adjusted if isinstance(logits, Tensor) else adjusted.numpy()


def adjust_to_prior(
    model: nn.Module,
    source_prior: Prior,
    target_prior: Prior = "uniform",
    tau: float = 1.0,
    *,
    head: str | Sequence[str] | None = None,
) -> nn.Module:
    """Add ``tau (log target_c - log source_c)`` to the bias of the last layer, in place.

    The model then gives :func:`adjusted_logits` by itself, and what is saved of it needs nothing of
    this package. Several heads whose logits are averaged get it each. A second call adds to the
    first. In 16-bit weights the new bias is rounded once.

    It suits a model that was trained without correcting the prior: one of a logit-adjusted or
    re-weighted loss has learned another one than that of its training set.

    Args:
        model: A classifier of timm or transformers, or any whose last layer is linear.
        source_prior: Class shares that it has learned, see :func:`adjusted_logits`.
        target_prior: Class shares to predict under.
        tau: Strength, at least 0.
        head: Dotted names of the layers, where `find_head` does not find the right ones.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module, or its bias does not hold floats.
        ValueError: a cosine head, which has no bias; a head that is not found or inside an adapter
            (see `find_head`), that has another number of classes, that is sharded or wrapped for
            parallel training, or whose bias another module shares; priors and ``tau`` as in
            :func:`adjusted_logits`. Nothing is changed then.

    Warns:
        UserWarning: a head without a bias gets one. A host that builds the architecture without
            it would leave the saved bias out, so a model that is loaded must be built with one.

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


def _shift(classes: int, source: Prior, target: Prior, tau: float) -> Tensor:
    """``tau (log target_c - log source_c)``, (C,) in float64 on the CPU."""
    check_real("tau", tau, low=0)
    old = _shares("source_prior", source, classes)
    new = _shares("target_prior", target, classes)
    return tau * (new.log() - old.log())


def _shares(name: str, prior: Prior, classes: int) -> Tensor:
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
