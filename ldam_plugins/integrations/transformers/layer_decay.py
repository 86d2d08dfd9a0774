"""Layer-wise learning rates: the nearer a layer of transformers is to the input, the lower."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from ldam_plugins._validation import check_real, invalid


def layer_depths(model: nn.Module) -> dict[str, int]:
    """Depth of each parameter: 0 for embeddings, 1 to L for layers, L + 1 for what follows.

    The layers are the entries of the model's list of layers or stages (its outermost
    ``ModuleList``). What is registered before it is an embedding, and so is every ``nn.Embedding``;
    what is registered after it, such as a last normalisation or a pooler, is as deep as the head.

    Args:
        model: A model of transformers, or one that contains one.

    Returns:
        Depths by the names of ``model.named_parameters()``, in its order.

    Raises:
        ValueError: it has no list of layers, or several, as one with encoder and decoder.
    """
    lists: list[str] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not inside:
            lists.append(name)
    if len(lists) != 1:
        expected = "left out for a model without a single list of layers"
        hint = f"{type(model).__name__} has {len(lists)}: {lists}."
        raise invalid("layer_decay", expected, type(model).__name__, hint=hint)
    prefix = f"{lists[0]}." if lists[0] else ""
    last = len(model.get_submodule(lists[0])) + 1  # type: ignore[arg-type]
    depths, depth = {}, 0
    for name, _ in model.named_parameters():
        if name.startswith(prefix):
            depth = int(name.removeprefix(prefix).partition(".")[0]) + 1
        elif depth:
            depth = last
        owner = model.get_submodule(name.rpartition(".")[0])
        depths[name] = 0 if isinstance(owner, nn.Embedding) else depth
    return depths


class LayerDecayTrainer(Trainer):
    """A Trainer whose optimizer has a learning rate for each depth of the model.

    A parameter at depth d (see :func:`layer_depths`) is trained at ``layer_decay ** (L + 1 - d)``
    times the learning rate of the schedule. The rate that is logged is that of the head.

    Args:
        layer_decay: Factor from each layer to the one before it, in (0, 1].
        **trainer: As of ``Trainer``.

    Source: Clark et al., ELECTRA, ICLR 2020, arXiv 2003.10555.
    """

    def __init__(self, *, layer_decay: float, **trainer: Any) -> None:
        self.layer_decay = check_real("layer_decay", layer_decay, low=0, high=1, low_open=True)
        super().__init__(**trainer)
        layer_depths(self.model)  # before anything is trained

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the Trainer, its groups divided by depth, the deepest first."""
        if self.optimizer is None:
            trained = self.model if model is None else model
            depths = layer_depths(trained)
            last = max(depths.values())
            by_depth = {id(p): depths[name] for name, p in trained.named_parameters()}
            optimizer = super().create_optimizer(model)
            optimizer.param_groups = [
                {**group, "params": parameters, "lr": group["lr"] * self.layer_decay ** (last - d)}
                for d in range(last, -1, -1)
                for group in optimizer.param_groups
                if (parameters := [p for p in group["params"] if by_depth[id(p)] == d])
            ]
        return self.optimizer
