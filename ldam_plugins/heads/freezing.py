"""Training the classifier alone: the layers before it keep their weights and their statistics."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from ldam_plugins._validation import invalid
from ldam_plugins.heads.finder import find_head
from ldam_plugins.heads.layers import cosine_heads


def freeze_backbone(model: nn.Module, *, new: Collection[str] = ()) -> nn.Module:
    """Freeze all of ``model`` but its classifier, which is all that an optimizer then trains.

    What is frozen also stays in evaluation mode, see :func:`evaluate_frozen`. Call it after the
    pretrained weights are loaded and a cosine head is put on, before the model is wrapped for
    parallel training.

    Args:
        model: A classifier whose head `find_head` finds, or one with a cosine head.
        new: Names of further parameters to train: those that were not pretrained, such as the layer
            that transformers puts between RoBERTa and its logits. Names of none are passed over.

    Returns:
        ``model``.

    Raises:
        ValueError: the head is not found (see :func:`.find_head`), or there is nothing before it.
    """
    heads = tuple(cosine_heads(model)) or find_head(model)
    trained = {id(p) for name in heads for p in model.get_submodule(name).parameters()}
    trained |= {id(p) for name, p in model.named_parameters() if name in new}
    parameters = list(model.parameters())
    if all(id(parameter) in trained for parameter in parameters):
        expected = "one with pretrained layers before its classifier"
        raise invalid("model", expected, type(model).__name__)
    for parameter in parameters:
        parameter.requires_grad_(id(parameter) in trained)
    return evaluate_frozen(model)


def evaluate_frozen(model: nn.Module) -> nn.Module:
    """Keep the frozen parts of ``model`` in evaluation mode, whatever ``model.train()`` says.

    A part is frozen if it has parameters or buffers, and none of its parameters are trained. In
    training mode its batch normalisation would go on to move the statistics that its weights were
    trained with, and its dropout would make features differ from those of the saved model. What is
    frozen is asked anew at each call of ``model.train()``.

    Returns:
        ``model``.
    """
    if not isinstance(vars(model).get("train"), _TrainUnfrozen):
        setattr(model, "train", _TrainUnfrozen(model))  # noqa: B010 (mypy minds a method)
    return model.train(model.training)


class _TrainUnfrozen:
    """The method ``train`` of ``module``, after which its frozen parts evaluate."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module  # copied along with the module, unlike what a closure holds

    def __call__(self, mode: bool = True) -> Any:
        type(self.module).train(self.module, mode)
        if mode:
            _evaluate_frozen(self.module)
        return self.module


def _evaluate_frozen(module: nn.Module) -> None:
    for part in module.children():
        parameters = list(part.parameters())
        if any(parameter.requires_grad for parameter in parameters):
            _evaluate_frozen(part)
        elif parameters or next(part.buffers(), None) is not None:
            part.eval()
