"""A ``transformers.Trainer`` that evaluates and saves the moving average of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ldam_plugins._validation import check_real, invalid
from ldam_plugins.training.distributed import is_sharded

AVERAGE_FILE = "weight_average.safetensors"
"""File of the averages in a checkpoint, beside the weights that are trained."""


class WeightAverage:
    r"""Moving averages of the trained parameters and the saved buffers of a model.

    With the weights w after update t and the decay d

    .. math:: a_t = d \, a_{t-1} + (1 - d) \, w_t, \qquad a_0 = w_0

    as by timm's ``ModelEmaV3`` with its defaults: buffers are averaged too, those of integers are
    the newest. Averages are kept in float32 at least, since half precision would round such small
    steps away.

    Args:
        model: As it is when the training begins.
        decay: d.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._step_towards = get_ema_multi_avg_fn(decay)
        saved = model.state_dict().keys()  # other buffers are caches of the model
        chosen: dict[str, Tensor] = {}
        chosen |= {name: p for name, p in model.named_parameters() if p.requires_grad}
        chosen |= {name: buffer for name, buffer in model.named_buffers() if name in saved}
        self._averages = {name: _wide(tensor).clone() for name, tensor in chosen.items()}

    def update(self, model: nn.Module) -> None:
        """Take in the weights after an optimizer step."""
        old, new = [], []
        for name, tensor in self._of(model).items():
            if tensor.is_floating_point():
                old.append(self._averages[name])
                new.append(_wide(tensor))
            else:
                self._averages[name].copy_(tensor)
        self._step_towards(old, new, None)

    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the weights by the averages."""
        self._fill(model, self._averages)

    @contextmanager
    def inside(self, model: nn.Module) -> Iterator[None]:
        """In the block the model has the averages, after it the weights that it had before."""
        before = {name: tensor.detach().clone() for name, tensor in self._of(model).items()}
        self.copy_to(model)
        try:
            yield
        finally:
            self._fill(model, before)

    def save(self, checkpoint: str | Path) -> None:
        """Write the averages into the folder of a checkpoint."""
        tensors = {name: average.contiguous() for name, average in self._averages.items()}
        save_file(tensors, Path(checkpoint, AVERAGE_FILE))

    def load(self, checkpoint: str | Path) -> None:
        """Read the averages of a checkpoint.

        Raises:
            ValueError: it has none, or those of other parameters.
        """
        check_has_average(checkpoint)
        found = load_file(Path(checkpoint, AVERAGE_FILE))
        if found.keys() != self._averages.keys():
            unlike = sorted(found.keys() ^ self._averages.keys())
            hint = f"Not in both: {', '.join(unlike[:3])}{', ...' if len(unlike) > 3 else ''}."
            expected = "one with averages of the parameters that are trained"
            raise invalid("checkpoint", expected, str(checkpoint), hint=hint)
        for name, average in self._averages.items():
            average.copy_(found[name])

    @torch.no_grad()
    def _fill(self, model: nn.Module, values: dict[str, Tensor]) -> None:
        for name, tensor in self._of(model).items():
            tensor.copy_(values[name])

    def _of(self, model: nn.Module) -> dict[str, Tensor]:
        """The tensors of the model that are averaged; looked up anew, as loading replaces some."""
        tensors: dict[str, Tensor] = {
            **dict(model.named_parameters()),
            **dict(model.named_buffers()),
        }
        return {name: tensors[name] for name in self._averages}


def check_has_average(checkpoint: str | Path) -> None:
    """Refuse a checkpoint without averages, from which they cannot go on.

    Raises:
        ValueError: it has none.
    """
    if not Path(checkpoint, AVERAGE_FILE).is_file():
        hint = "It is of a training without ema_decay: go on without it, or begin anew."
        raise invalid("checkpoint", f"one with {AVERAGE_FILE}", str(checkpoint), hint=hint)


def _wide(tensor: Tensor) -> Tensor:
    """The tensor without its graph, of floats in float32 at least."""
    tensor = tensor.detach()
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.to(wide) if tensor.is_floating_point() else tensor


class WeightAverageTrainer(Trainer):
    """A Trainer whose model is the moving average of its weights, see :class:`WeightAverage`.

    It trains the weights as they are. ``evaluate()``, ``predict()`` and ``save_model()`` are of the
    averages, also in the midst of the training, and when that ends the model holds them; with
    ``load_best_model_at_end`` those of the best checkpoint. A checkpoint holds both, and a run that
    is resumed goes on with both.

    An optimizer step that is skipped, as its gradients overflow in float16, does not count.

    Args:
        ema_decay: Decay of the averages, in [0, 1): about the last 1 / (1 - decay) updates count.
        callbacks: As of ``Trainer``.
        **trainer: As of ``Trainer``.

    Raises:
        ValueError: a decay out of range; FSDP or DeepSpeed, under which no process holds the
            weights; from ``train()``: a checkpoint without averages.
    """

    def __init__(
        self, *, ema_decay: float, callbacks: list[Any] | None = None, **trainer: Any
    ) -> None:
        decay = check_real("ema_decay", ema_decay, low=0, high=1, high_open=True)
        self._averaging = _Averaging(decay)
        # The first of them, so that the others find the averages in the model at the end.
        super().__init__(callbacks=[self._averaging, *(callbacks or [])], **trainer)
        if is_sharded(self.accelerator):
            hint = "Train by DDP, or leave ema_decay out."
            kind = str(self.accelerator.distributed_type)
            raise invalid("distributed_type", "one without shards for ema_decay", kind, hint=hint)

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in the Trainer; what is resumed must have averages."""
        checkpoint = resume_from_checkpoint or None
        if checkpoint is True:
            checkpoint = get_last_checkpoint(self.args.output_dir)
        if checkpoint is not None:
            check_has_average(checkpoint)
        self._averaging.checkpoint = checkpoint
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """As in the Trainer, of the averages."""
        with self._averages():
            return super().evaluation_loop(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in the Trainer, of the averages; into a checkpoint both."""
        average = self._averaging.average
        if average is None or not _internal_call or output_dir is None:
            with self._averages():
                return super().save_model(output_dir, _internal_call)
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            average.save(output_dir)
        return None

    def _averages(self) -> AbstractContextManager[None]:
        """In the block the model has the averages, which it has anyway when nothing is trained."""
        average = self._averaging.average
        return nullcontext() if average is None else average.inside(self.model)


class _Averaging(TrainerCallback):
    """The average of a training, from its beginning to its end."""

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.average: WeightAverage | None = None
        self.checkpoint: str | bool | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        self.average = WeightAverage(model, self.decay)
        if self.checkpoint is not None:
            self.average.load(str(self.checkpoint))

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Any,
        **kwargs: Any,
    ) -> None:
        if self.average is not None and not optimizer.step_was_skipped:
            self.average.update(model)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **kwargs: Any,
    ) -> None:
        if self.average is not None:
            if args.load_best_model_at_end and state.best_model_checkpoint is not None:
                self.average.load(state.best_model_checkpoint)
            self.average.copy_to(model)
        self.average = None
