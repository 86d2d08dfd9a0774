"""A ``transformers.Trainer`` with sharpness-aware optimizer steps."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn
from transformers import Trainer

from ldam_plugins.integrations.transformers.training_run import steps_per_epoch
from ldam_plugins.schedules import Progress
from ldam_plugins.training.distributed import refuse_deepspeed
from ldam_plugins.training.environment import note_random_state
from ldam_plugins.training.sam import SharpnessAware, check_gathers_norm, moved_uphill


class SharpnessAwareTrainer(Trainer):
    """A Trainer whose steps are sharpness-aware when :class:`.SharpnessAware` says so.

    The micro-batches of such a step are kept until its last one. When the gradient of all of them
    is there, on all processes, the weights are moved, the micro-batches go through the model again,
    and the gradients of this second time are what the Trainer clips and steps by. What it logs is
    the loss at the weights as they were.

    Args:
        *args: As of ``Trainer``.
        sam: Which steps, and how far they look.
        **kwargs: As of ``Trainer``.

    Raises:
        ValueError: DeepSpeed, which keeps the gradients to itself, or FSDP1; from ``train()``: a
            start past the end of the training.
    """

    def __init__(self, *args: Any, sam: SharpnessAware, **kwargs: Any) -> None:
        self.sam = sam
        self._parts: list[tuple[Any, Any]] = []
        self._rewind: Callable[[], None] | None = None
        super().__init__(*args, **kwargs)
        hint = "Use FSDP2, or leave sharpness-aware steps out."
        refuse_deepspeed(self.args.deepspeed_plugin, stages=range(4), hint=hint)
        check_gathers_norm(self.accelerator)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """As in the Trainer; at the last micro-batch of a step also the second time of all."""
        total = self.state.max_steps
        steps = steps_per_epoch(self.args, self.callback_handler.train_dataloader, total)
        rho = self.sam.rho_at(Progress(self.state.global_step, total, steps))
        if not rho:
            return super().training_step(model, inputs, num_items_in_batch)
        if not self._parts:
            self._rewind = note_random_state(self.args.device)
        self._parts.append((inputs, num_items_in_batch))
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:
            self._step_uphill(model, rho)
        return loss

    def _step_uphill(self, model: nn.Module, rho: float) -> None:
        """Replace the gradients by those of the kept micro-batches at the moved weights."""
        parts, self._parts = self._parts, []
        if self._rewind is not None:
            self._rewind()
        with moved_uphill(model, rho):
            for number, part in enumerate(parts, 1):
                last = number == len(parts)
                self.accelerator.sync_gradients = last
                with nullcontext() if last else self.accelerator.no_sync(model):
                    super().training_step(model, *part)
