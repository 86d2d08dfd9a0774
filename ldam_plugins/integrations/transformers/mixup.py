"""Mixup for models of transformers: of the features that the classifier gets."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import Trainer

from ldam_plugins._call_stack import find_trainer
from ldam_plugins._validation import invalid
from ldam_plugins.heads import cosine_heads, find_head


class FeatureMixup:
    """Mixup of the features that the classification head gets, as texts have no mean of tokens.

    Each training batch of a process gets one ``lam ~ Beta(alpha, alpha)`` and one permutation p of
    its N rows. With features x (N, H) and targets t (N, C) the head gets
    ``lam x_i + (1 - lam) x_p(i)``, and the loss ``lam t_i + (1 - lam) t_p(i)``. Mixed are only the
    calls of the model that a ``Trainer`` computes its training loss from.

    Source: Zhang et al., ICLR 2018, arXiv 1710.09412; of features, "senMixup": Guo, Mao and Zhang,
    2019, arXiv 1905.08941.

    Args:
        trainer: Its model gets the hooks. Those that an interrupted training left do nothing.
        alpha: Above 0; near 0 hardly anything is mixed, 1 draws ``lam`` uniformly.

    Raises:
        ValueError: the head of the model is not found, or one process trains on several GPUs.
    """

    def __init__(self, trainer: Trainer, alpha: float) -> None:
        if trainer.args.n_gpu > 1:
            hint = "Start one process a GPU with `accelerate launch` or `torchrun`."
            expected = "0 where one process trains on several GPUs"
            raise invalid("mixup", expected, alpha, hint=hint)
        self.alpha = alpha
        self._lam: float | None = None
        self._partner: Tensor | None = None
        model: Any = trainer.model
        model.register_forward_pre_hook(self._begin)
        for name in cosine_heads(model) or find_head(model):
            model.get_submodule(name).register_forward_pre_hook(self._mix)
        torch.compiler.reset()  # code compiled before would pass the hooks by

    def mixed_targets(self, labels: Tensor, num_classes: int) -> Tensor:
        """Soft targets (N, C) of the features mixed last, from indices (N,) or targets (N, C).

        Raises:
            RuntimeError: no features were mixed: the model does not call its head.
            ValueError: a label outside 0..C-1, such as -100, which cannot be mixed.
        """
        lam, partner = self._lam, self._partner
        self._lam = self._partner = None
        if lam is None or partner is None:
            raise RuntimeError("mixup: the model computed logits without its head; use mixup=0.")
        if labels.ndim == 1:
            if bool(((labels < 0) | (labels >= num_classes)).any()):
                hint = "Leave such examples out of the training set, or use mixup=0."
                expected = f"in 0..{num_classes - 1} for Mixup"
                raise invalid("labels", expected, labels.tolist(), hint=hint)
            labels = functional.one_hot(labels, num_classes).to(torch.get_default_dtype())
        return labels.lerp(labels[partner.to(labels.device)], 1 - lam)

    @torch.compiler.disable
    def _begin(self, model: nn.Module, args: Any) -> None:
        mixing = model.training and torch.is_grad_enabled() and self._is_called_for()
        self._lam = float(np.random.beta(self.alpha, self.alpha)) if mixing else None
        self._partner = None

    @torch.compiler.disable
    def _mix(self, head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._lam is None:
            return None
        features, *others = args
        if features.ndim != 2:
            hint = "Features of single tokens belong to no one place of another text."
            expected = f"0 for a head that gets features of shape {tuple(features.shape)}"
            raise invalid("mixup", expected, self.alpha, hint=hint)
        if self._partner is None:
            self._partner = torch.randperm(len(features))
        partner = features[self._partner.to(features.device)]
        return features.lerp(partner, 1 - self._lam), *others

    def _is_called_for(self) -> bool:
        """Whether the caller is a Trainer whose loss then asks this object for the soft targets."""
        loss = getattr(find_trainer("compute_loss"), "compute_loss_func", None)
        return getattr(getattr(loss, "__self__", None), "mixup", None) is self


def remove_mixup(model: nn.Module) -> None:
    """Take the hooks of every :class:`FeatureMixup` off ``model``."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if isinstance(getattr(hook, "__self__", None), FeatureMixup):
                del module._forward_pre_hooks[key]
