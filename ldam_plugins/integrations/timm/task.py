"""LDAM-DRW as a training task of timm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from timm.task import ClassificationTask
from timm.utils import unwrap_model
from torch import Tensor, nn

from ldam_plugins._validation import invalid
from ldam_plugins.counts import ClassCounts
from ldam_plugins.heads import (
    check_heads,
    cosine_heads,
    find_head,
    folded_state_dict,
)
from ldam_plugins.heads.choice import (
    head_scale,
    head_word,
    options_for_head,
    put_head,
    wants_cosine_head,
    warn_of_linear_head,
)
from ldam_plugins.heads.layers import submodule_or_none
from ldam_plugins.kernels.chunked_cosines import ChunkedCosines
from ldam_plugins.losses.base import ClassificationLoss
from ldam_plugins.losses.registry import create_loss
from ldam_plugins.losses.reweighting import apply_stage, warn_of_combination
from ldam_plugins.schedules import DeferredSchedule, Progress
from ldam_plugins.training.distributed import is_first_process


class LongTailTask(ClassificationTask):
    """timm's classification task with a long-tail loss, its cosine head and a schedule.

    ``task(input, target)`` returns ``{"loss": ..., "output": ...}`` as every timm task does; call
    :meth:`set_progress` before an update (or once an epoch) and the class weights follow the
    schedule, in place.

    timm's ``CheckpointSaver(task=task)`` writes the stock model with the cosine head folded:
    ``timm.create_model(..., checkpoint_path=...)`` loads it without this package. The checkpoint
    also has the exact head in ``task_state`` (and ``task_state_ema``), from which
    ``resume_task_checkpoint`` and ``load_task_ema_checkpoint`` restore it to the bit.

    Args:
        model: A timm model, or any module whose classifier :func:`use_cosine_head` finds. A lone
            ``nn.Linear`` is replaced: the task trains ``task.get_trainable_module()``.
        class_counts: :class:`ClassCounts` of the training set, or the bare counts.
        loss: One of :func:`list_losses`, or a :class:`ClassificationLoss` made already.
        schedule: When classes are re-weighted. Re-sampling (``rs``, ``drs``) is done by the data
            loader (:class:`ldam_plugins.samplers.DeferredSampler`).
        head: Dotted names of the classifier's layers, where the search does not find them.
        cosine_head: True puts a cosine head on the model, whatever the loss. False trains the
            model's own linear head: margins are then taken off its logits as they are, times
            ``scale``, which is 1 unless given, with a warning. Default: a cosine head for losses
            with a margin; for others the model keeps the head it has.
        device: Device of the loss buffers. Default: that of the model.
        dtype: As in timm's task.
        verbose: As in timm's task.
        **loss_options: Options of :func:`create_loss`, such as ``max_margin`` and ``scale``.
            ``scale`` is that of the cosine head too, also beside ``cosine_head=True`` for a loss
            without margins. Make the optimizer after the task, which may replace the head.

    Raises:
        TypeError: ``loss_options`` beside a ready loss, or an option the loss does not have.
        ValueError: unknown loss, bad counts or other counts than a ready loss has, or a
            classifier that cannot be found.

    Example:
        >>> import timm
        >>> task = LongTailTask(timm.create_model("cifar_resnet20"), range(50, 0, -5))
        >>> task.set_progress(Progress(step=8, total_steps=10, steps_per_epoch=1))
        'reweighted'
        >>> sorted(task(torch.zeros(2, 3, 32, 32), torch.tensor([0, 9])))
        ['loss', 'output']
    """

    criterion: ClassificationLoss

    def __init__(
        self,
        model: nn.Module,
        class_counts: ClassCounts | Sequence[int],
        *,
        loss: str | ClassificationLoss = "ldam",
        schedule: DeferredSchedule | None = None,
        head: str | Sequence[str] | None = None,
        cosine_head: bool | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        verbose: bool = True,
        **loss_options: Any,
    ) -> None:
        kind, scale = head_word(cosine_head), loss_options.get("scale")
        if isinstance(loss, str):
            loss = create_loss(loss, class_counts, **options_for_head(loss, loss_options, kind))
        elif loss_options:
            raise invalid(
                "loss_options", "empty beside a ready loss", loss_options, error=TypeError
            )
        else:
            _check_same_counts(class_counts, loss)
        cosine = wants_cosine_head(loss, kind)
        model = put_head(model, loss, kind, scale=scale, names=head)
        if head is not None and not cosine:
            find_head(model, head)
        device = _device_of(model) if device is None else device
        super().__init__(model, loss, device=device, dtype=dtype, verbose=verbose)
        self.schedule = schedule or DeferredSchedule()
        self._head_names = head
        self._heads = cosine_heads(unwrap_model(model)) if cosine else {}
        self._head_scale = head_scale(loss, scale)
        if is_first_process():
            warn_of_combination(self.criterion, self.schedule, stacklevel=3)
            warn_of_linear_head(self.criterion, cosine, stacklevel=3)

    def set_progress(self, progress: Progress) -> str:
        """Set the class weights of ``progress`` and return the name of its stage.

        Weights are written only when the stage changes, so it may be called before every update.
        """
        return apply_stage(self.criterion, self.schedule, progress)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Loss and logits of one batch.

        Args:
            input: What the model takes, images (N, in_chans, H, W).
            target: Class indices (N,) int64, or soft targets (N, C) floating.

        Raises:
            TypeError: the model does not return one tensor.
            ValueError: the cosine head that the loss needs is no longer there.
        """
        self._check_heads()
        output = self.trainable_module(input)
        if not isinstance(output, (Tensor, ChunkedCosines)):
            raise _one_output(output)
        return {"loss": self.criterion(output, target), "output": output}

    def prepare_distributed(
        self, device_ids: list[int] | None = None, **ddp_options: Any
    ) -> LongTailTask:
        """As in timm's task: wrap the model in ``DistributedDataParallel``.

        Raises:
            ValueError: the cosine head that the loss needs is no longer there.
        """
        self._check_heads()
        return super().prepare_distributed(device_ids, **ddp_options)

    def get_clip_parameters(self, exclude_head: bool = False) -> list[nn.Parameter]:
        """Parameters whose gradients are clipped: all, or all but those of the classifier.

        Adaptive clipping (timm's ``clip_mode="agc"``) leaves out the classifier. timm's own tasks
        leave out the last two parameters; here the layers of the classifier are found.

        Raises:
            ValueError: ``exclude_head``, and the classifier is not found (see ``head``).
        """
        model = self.get_trainable_module()
        if not exclude_head:
            return list(model.parameters())
        inner = unwrap_model(model)
        names = tuple(cosine_heads(inner)) or find_head(inner, self._head_names)
        head = {id(p) for name in names for p in inner.get_submodule(name).parameters()}
        return [p for p in model.parameters() if id(p) not in head]

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Exact weight and moments of each cosine head: the model's state has it folded."""
        model = unwrap_model(self.get_eval_model(module, ema=ema))
        exact: dict[str, Tensor] = {}
        for name, head in cosine_heads(model).items():
            prefix = f"{name}." if name else ""
            exact[f"{prefix}cosine_weight"] = head.weight.detach()
            exact[f"{prefix}cosine_moments"] = head.cosine_moments
        return {"cosine_heads": exact} if exact else {}

    def get_checkpoint_state(
        self, ema: bool = False, unwrap_fn: Callable[[nn.Module], nn.Module] = unwrap_model
    ) -> dict[str, Any]:
        """As in timm's task, with the cosine heads of the model's state folded."""
        state = super().get_checkpoint_state(ema, unwrap_fn)
        exact = state.get("task_state_ema" if ema else "task_state", {})
        if exact:
            key = "state_dict_ema" if ema else "state_dict"
            folded = folded_state_dict(unwrap_fn(self.get_eval_model(ema=ema)), state[key])
            state[key] = {k: v for k, v in folded.items() if k not in exact["cosine_heads"]}
        return state

    def load_checkpoint_state(
        self,
        state_dict: dict[str, Any],
        task_state: dict[str, Any] | None = None,
        ema: bool = False,
        strict: bool = True,
    ) -> None:
        """As in timm's task; cosine heads get their exact tensors from ``task_state``.

        Without it they get the class directions of the folded weight.
        """
        model = self.get_eval_model(ema=ema)
        heads = cosine_heads(unwrap_model(model)) if model is not None else {}
        for name, tensor in ((task_state or {}).get("cosine_heads") or {}).items():
            if name.rpartition(".")[0] in heads:  # a task without cosine heads loads the fold
                state_dict = {**state_dict, name: tensor}
        super().load_checkpoint_state(state_dict, task_state, ema=ema, strict=strict)

    def _check_heads(self) -> None:
        """Check that the cosine heads are the same as before, or others that suit the loss."""
        model = unwrap_model(self.trainable_module)
        if not all(submodule_or_none(model, name) is head for name, head in self._heads.items()):
            self._heads = check_heads(model, self._head_scale)


def _check_same_counts(class_counts: Any, loss: ClassificationLoss) -> None:
    given = class_counts if isinstance(class_counts, ClassCounts) else ClassCounts(class_counts)
    if given != loss.class_counts:
        expected = f"those of the ready loss, {loss.class_counts!r}"
        raise invalid("class_counts", expected, given)


def _device_of(model: nn.Module) -> torch.device | None:
    """The device of the first parameter; None on the meta device or without parameters."""
    device = next((p.device for p in model.parameters()), None)
    return None if device is None or device.type == "meta" else device


def _one_output(output: Any) -> Exception:
    hint = "Auxiliary outputs would need a loss of their own: build the model without them"
    hint += " (`aux_logits=False`), switch them off (`model.set_distilled_training(False)`), or"
    hint += " wrap the model in a module that returns the logits alone."
    shown = type(output).__name__
    return invalid("logits", "one tensor (N, C)", shown, hint=hint, error=TypeError)
