"""Which head a model is trained with: a cosine one or the linear one that it came with.

The head is a choice of its own, beside the loss and the schedule. Recipes, plugins and the
benchmark take the same three words for it, ``HEADS``, and ask here what they mean.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ldam_plugins._validation import check_choice, check_real, invalid
from ldam_plugins.choices import DEFAULT_SCALE, HEAD_INITS, HEADS, LINEAR_SCALE
from ldam_plugins.heads.cosine import use_cosine_head
from ldam_plugins.heads.layers import cosine_heads
from ldam_plugins.losses.base import ClassificationLoss
from ldam_plugins.losses.registry import loss_options


def wants_cosine_head(loss: ClassificationLoss | type[ClassificationLoss], head: str) -> bool:
    """Whether a model is trained with a cosine head, given its loss and one of ``HEADS``.

    Raises:
        ValueError: another word.
    """
    check_choice("head", head, HEADS)
    return loss.needs_cosine_head if head == "auto" else head == "cosine"


def head_word(cosine_head: bool | None) -> str:
    """The word of ``HEADS`` for True (cosine), False (linear) or None (auto).

    Raises:
        TypeError: something else.
    """
    if cosine_head is None:
        return "auto"
    if not isinstance(cosine_head, bool):
        raise invalid("cosine_head", "True, False or None", cosine_head, error=TypeError)
    return "cosine" if cosine_head else "linear"


def options_for_head(loss: str, options: Mapping[str, Any], head: str) -> dict[str, Any]:
    """The options with which :func:`.create_loss` makes a loss for one of ``HEADS``.

    A loss with a margin gets the scale ``LINEAR_SCALE`` on a linear head, unless ``options`` say
    otherwise. A loss without one has no ``scale``: on a cosine head the option is the head's alone,
    see :func:`head_scale`, and is left out here.

    Args:
        loss: Name of the loss.
        options: Those that were given, ``scale`` among them.
        head: One of ``HEADS``.

    Raises:
        TypeError: a scale, and neither margins nor a cosine head for it.
        ValueError: no such loss or head.
    """
    check_choice("head", head, HEADS)
    if "scale" in loss_options(loss):
        return {"scale": LINEAR_SCALE, **options} if head == "linear" else dict(options)
    if "scale" in options and head != "cosine":
        hint = "It is that of a cosine head: ask for one (--head cosine, cosine_head=True)."
        expected = f"an option of {loss!r} with a linear head"
        raise invalid("options", expected, "scale", hint=hint, error=TypeError)
    return {name: value for name, value in options.items() if name != "scale"}


def head_scale(loss: ClassificationLoss, scale: float | None = None) -> float:
    """Scale of the cosine head: that of the loss's margins, else the one given, else 30.

    Raises:
        ValueError: ``scale`` is not that of the loss, or not a finite number above 0.
    """
    own: float | None = getattr(loss, "scale", None)
    if scale is None:
        return DEFAULT_SCALE if own is None else own
    if own not in (None, scale):
        raise invalid("scale", f"{own:g} or left out, as the loss's", scale)
    return check_real("scale", scale, low=0, low_open=True)


def put_head(
    model: nn.Module,
    loss: ClassificationLoss,
    head: str = "auto",
    *,
    scale: float | None = None,
    names: str | Sequence[str] | None = None,
    init: str = "random",
) -> nn.Module:
    """Put on ``model`` the head it is to be trained with; a cosine head that is there stays.

    Args:
        model: The model, see :func:`use_cosine_head`.
        loss: What it is trained with.
        head: One of ``HEADS``.
        scale: See :func:`head_scale`.
        names: Dotted names of the classifier's layers, where the search does not find them.
        init: What a new cosine head begins with, see :func:`use_cosine_head`; a linear head keeps
            its own rows either way.

    Returns:
        ``model``; if ``model`` itself is the layer, the new layer.

    Raises:
        ValueError: as :func:`use_cosine_head`; or ``head="linear"`` for a model with a cosine head.
    """
    check_choice("init", init, HEAD_INITS)
    if wants_cosine_head(loss, head):
        return use_cosine_head(model, head_scale(loss, scale), head=names, init=init)
    if head == "linear":
        check_linear_head(model)
    return model


def check_linear_head(model: nn.Module) -> None:
    """Check that ``model``, for which a linear head was asked, has no cosine head.

    Raises:
        ValueError: it has one.
    """
    heads = cosine_heads(model)
    if heads:
        hint = "Call fold_cosine_head(model) first, which makes it linear again, or ask for"
        hint += " head 'auto' or 'cosine', which keep it."
        raise invalid("model", "one with a linear head, as asked for", list(heads), hint=hint)


def warn_of_linear_head(loss: ClassificationLoss, cosine: bool, stacklevel: int = 2) -> None:
    """Warn, once a place, where a loss with a margin is trained on a linear head.

    Call it on one process of a training. Who means it filters the warning:
    ``warnings.filterwarnings("ignore", "loss .* on a linear head")``.

    Args:
        loss: What is trained.
        cosine: Whether it is trained with a cosine head.
        stacklevel: Of ``warnings.warn``; 2 is the caller.
    """
    if cosine or not loss.needs_cosine_head:
        return
    margin, scale = getattr(loss, "max_margin", 0.0), loss.scale
    warnings.warn(
        f"loss {type(loss).__name__} on a linear head: its margins, up to max_margin * scale = "
        f"{margin:g} * {scale:g} = {margin * scale:g}, are taken off the logits as they are. "
        "Logits of a linear head have no fixed size, so how much the margins do depends on how "
        "large the model makes them, and fades as they grow. The margins of the paper are cosines: "
        "the head 'auto' or 'cosine' gives them that unit.",
        UserWarning,
        stacklevel=stacklevel,
    )
