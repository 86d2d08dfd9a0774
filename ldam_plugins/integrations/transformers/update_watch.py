"""Checks that a Trainer trains on the loss it was given, divided as it should be."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import Trainer

from ldam_plugins._call_stack import trainer_calls
from ldam_plugins._validation import invalid
from ldam_plugins.losses.trainer_checks import HOST_IGNORES


class UpdateWatch:
    """Checks each optimizer step of a Trainer, by hooks on the gradient of the loss.

    Subclasses of the Trainer may compute something else. At every step the gradients must have come
    through the loss. At the first one, the number that the loss was divided by
    (``num_items_in_batch``) must be that of its labels, and a subclass that calls the loss itself
    must multiply it by the number of processes, over which gradients are averaged. These two wait
    for the device and the other processes, once.
    """

    def __init__(self) -> None:
        self._in_backward = False
        self._first = True
        self._calls = 0
        self._labelled: Tensor | int = 0
        self._items: Tensor | int | None = None
        self._bare_gradient: Tensor | None = None

    def note_call(self, labels: Tensor, items: Tensor | int | None) -> None:
        """Note what the loss is called with: labels of a micro-batch, and the Trainer's count."""
        if self._first:
            self._calls += 1
            self._labelled = self._labelled + labels.ne(HOST_IGNORES).sum()
            self._items = items

    def watch(self, loss: Tensor) -> None:
        """Notice when gradients flow through ``loss``; called by ``compute_loss_func``."""
        loss.register_hook(self._note_backward)
        if self._first and not _is_called_by_stock_trainer():
            loss.register_hook(self._note_gradient)

    def check(self, trainer: Trainer, loss: str) -> None:
        """Stop before an optimizer step that is not the one asked for; all processes call it.

        Raises:
            RuntimeError: no gradient came through the loss since the last step, or the subclass
                does not multiply the loss by the number of processes.
            ValueError: the loss was divided by another number than that of its labels.
        """
        kind = type(trainer).__name__
        if self._first:
            self._check_count(trainer, kind)
        if not self._in_backward:
            raise RuntimeError(
                f"the gradients are not those of {loss}: {kind} computes a loss of its own. Let "
                "its compute_loss() return what super().compute_loss(...) returns, or remove it."
            )
        if self._first:
            self._check_factor(trainer, kind)
        self._in_backward = self._first = False
        self._labelled, self._items, self._bare_gradient = 0, None, None

    def _check_count(self, trainer: Trainer, kind: str) -> None:
        if self._items is None or getattr(trainer.accelerator, "parallelism_config", None):
            return
        counted = round(float(torch.as_tensor(self._items).flatten()[0]))
        parts = trainer.current_gradient_accumulation_steps
        # Some call the loss twice for each part (R-drop), some leave out a part.
        labelled, odd = divmod(int(self._labelled) * parts, self._calls)
        found = torch.tensor([labelled, odd + self._calls % parts], device=trainer.args.device)
        if trainer.args.world_size > 1:
            found = trainer.accelerator.reduce(found, "sum")
        labelled, odd = found.tolist()
        if not odd and labelled != counted:
            hint = (
                f"The loss of {kind} is divided by it. Let compute_loss() hand on the count that "
                "training_step() gets, and get_batch_samples() return what super()'s returns."
            )
            expected = f"{labelled}, the labels of the first update"
            raise invalid("num_items_in_batch", expected, counted, hint=hint)

    def _check_factor(self, trainer: Trainer, kind: str) -> None:
        replicas = trainer.args.n_gpu if trainer.args.n_gpu > 1 else trainer.args.world_size
        if self._bare_gradient is None or replicas == 1:
            return
        scaler = trainer.accelerator.scaler
        if float(self._bare_gradient) == (1.0 if scaler is None else scaler.get_scale()):
            raise RuntimeError(
                f"{kind} calls compute_loss_func itself and does not multiply the loss by "
                f"{replicas}, by which the mean over processes or devices divides it. Let it call "
                "super().compute_loss(...), which does."
            )

    def _note_backward(self, gradient: Tensor) -> None:
        self._in_backward = True

    def _note_gradient(self, gradient: Tensor) -> None:
        self._bare_gradient = gradient.detach()


def _is_called_by_stock_trainer() -> bool:
    """Whether the loss is called in ``Trainer.compute_loss`` itself, not in that of a subclass."""
    call = next(trainer_calls("compute_loss"), None)
    return call is not None and call.frame.f_code is Trainer.compute_loss.__code__
