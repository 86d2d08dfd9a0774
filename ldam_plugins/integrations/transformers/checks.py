"""The Trainers and models that a DRWCallback refuses, each with what to write instead."""

from __future__ import annotations

import functools
import inspect
from types import MethodType
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback

from ldam_plugins._call_stack import find_trainer
from ldam_plugins._validation import invalid
from ldam_plugins.heads import check_heads, cosine_heads
from ldam_plugins.training.distributed import refuse_deepspeed


def calling_trainer(callback: TrainerCallback) -> Trainer:
    """The Trainer that fires an event of ``callback``.

    Events hand over model, optimizer and data loader but not the Trainer (transformers 5.23).

    Raises:
        RuntimeError: no Trainer is running.
    """
    trainer = find_trainer()
    if trainer is None:
        name = type(callback).__name__
        raise RuntimeError(
            f"{name} works inside transformers.Trainer: write Trainer(..., callbacks=[{name}()])."
        )
    return trainer


def check_setup(trainer: Trainer, kind: type[TrainerCallback], *, resampling: bool) -> None:
    """Refuse the set-ups in which something else than asked for would be trained.

    Args:
        trainer: The Trainer, with its model.
        kind: Class of callback of which there must be one at most.
        resampling: Whether the schedule re-samples.

    Raises:
        ValueError: the message says which argument to change, and to what.
    """
    _check_arguments(trainer, resampling)
    _check_config(getattr(trainer.model, "config", None))
    if getattr(trainer, "loss_is_scaled_for_ga", None) is False:
        hint = "The loss is divided by the items of the whole batch already; remove the line."
        raise invalid("loss_is_scaled_for_ga", "None or True", False, hint=hint)
    same = [cb for cb in trainer.callback_handler.callbacks if isinstance(cb, kind)]
    if len(same) > 1:
        hint = "Each would set the loss and its weights: remove the others."
        raise invalid("callbacks", f"given one {kind.__name__}", len(same), hint=hint)


def check_sharding(trainer: Trainer, *, cosine_head: bool) -> None:
    """Refuse to partition a cosine head by DeepSpeed's ZeRO-3.

    ZeRO-3 saves by collecting the parameters one by one and calls no ``state_dict()``. So the
    unfolded weight of the head would be saved under the name of the folded one.

    Raises:
        ValueError: stage 3, and a cosine head is there or expected.
    """
    if cosine_head or cosine_heads(trainer.model):
        hint = "Shard a model with a cosine head by ZeRO-2 or FSDP2, or choose a loss without"
        hint += " margin, such as loss='logit_adjusted' or loss='ce', or head='linear'."
        refuse_deepspeed(trainer.args.deepspeed_plugin, stages=(3,), hint=hint)


def check_model_init(trainer: Trainer, scale: float) -> None:
    """Refuse a ``model_init`` whose models lack the cosine head, which would be lost with them.

    Raises:
        ValueError: there is a ``model_init``, and the model it made has no cosine head.
    """
    if trainer.model_init is not None and not cosine_heads(trainer.model):
        hint = f"Let it return `use_cosine_head(model, scale={scale:g})`."
        expected = "a function that puts the cosine head on, for it builds the model anew"
        raise invalid("model_init", expected, trainer.model_init, hint=hint)


def check_head(model: nn.Module, optimizer: Any, scale: float) -> None:
    """Check that the cosine head is there, has the loss's scale and will be trained.

    Raises:
        ValueError: one of these does not hold; the message says what to write.
    """
    before = f"Call use_cosine_head(model, scale={scale:g}) before the optimizer is made."
    if not cosine_heads(model):
        hint = (
            "Give the callback to Trainer(callbacks=[...]), or call its attach(trainer) before the"
        )
        hint += f" first train(). Or: {before}"
        raise invalid("model", "one with a cosine head", type(model).__name__, hint=hint)
    heads = check_heads(model, scale)
    trained = [head.weight for head in heads.values() if head.weight.requires_grad]
    if not trained:
        hint = "Write `head.requires_grad_(True)`; with PEFT name it in `modules_to_save`."
        raise invalid("model", "one whose head trains", list(heads), hint=hint)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    known = any(id(parameter) in held for parameter in model.parameters())  # not if sharded
    if known and not all(id(weight) in held for weight in trained):
        raise invalid("optimizer", "one that holds the head", list(heads), hint=before)


def check_forward(trainer: Trainer) -> None:
    """Check that the model can be called without labels, which the Trainer gives to the loss.

    A ``forward`` with a required argument ``labels`` is refused at once. One that uses labels that
    are None fails at its first call, before any optimizer step, and the error then says why.

    Raises:
        ValueError: it cannot; the message says what to write.
    """
    model: Any = trainer.model
    called = getattr(model, "_orig_mod", model)  # of torch.compile
    kinds = {parameter.kind for parameter in inspect.signature(called.forward).parameters.values()}
    if kinds <= {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}:
        called = called.get_base_model() if hasattr(called, "get_base_model") else called  # PEFT's
    labels = inspect.signature(called.forward).parameters.get("labels")
    if labels is not None and labels.default is labels.empty:
        raise _needs_labels(called)
    compiled = called is not model or getattr(model, "_compiled_call_impl", None) is not None
    of_a_host = type(model).__module__.startswith(("transformers.", "peft."))
    if not (compiled or trainer.args.torch_compile or of_a_host or "forward" in vars(model)):
        model.forward = MethodType(_explained(type(model).forward), model)


def _explained(forward: Any) -> Any:
    """``forward`` for its first call, with an error that explains missing labels."""

    @functools.wraps(forward)
    def first_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        del self.forward  # the class's own from now on
        try:
            return forward(self, *args, **kwargs)
        except (AttributeError, KeyError, TypeError) as error:
            if "labels" in str(error) or "NoneType" in str(error):
                raise ValueError(f"{_needs_labels(self)} ({error!r})") from error
            raise

    return first_forward


def _needs_labels(model: nn.Module) -> Exception:
    hint = (
        "Write `labels=None` there, and return no loss where they are None: the Trainer gives the "
        "labels to the loss of DRWCallback, not to the model."
    )
    return invalid(
        "model", "one whose `forward` works without labels", type(model).__name__, hint=hint
    )


def _check_arguments(trainer: Trainer, resampling: bool) -> None:
    args = trainer.args
    if args.label_smoothing_factor != 0:
        hint = "The Trainer ignores it where the loss is given: remove label_smoothing_factor."
        value = args.label_smoothing_factor
        raise invalid("label_smoothing_factor", "0 with DRWCallback", value, hint=hint)
    if args.label_names is not None and "labels" not in args.label_names:
        hint = 'Leave it out, and write `train_dataset.rename_column("...", "label")`.'
        raise invalid("label_names", "['labels'] or None", args.label_names, hint=hint)
    if args.world_size > 1 and not args.average_tokens_across_devices:
        hint = "Else the update depends on which process gets which example."
        expected = "True where several processes train"
        raise invalid("average_tokens_across_devices", expected, False, hint=hint)
    strategy = getattr(args, "train_sampling_strategy", "random")
    if resampling and strategy != "random":
        hint = "The schedule re-samples the examples itself."
        raise invalid("train_sampling_strategy", "'random'", strategy, hint=hint)


def _check_config(config: Any) -> None:
    """Refuse models of other tasks than one class of several, or that return tuples."""
    problem = getattr(config, "problem_type", None)
    if problem not in (None, "single_label_classification"):
        hint = "A margin per class needs one class an example; other tasks have no LDAM."
        expected = "None or 'single_label_classification'"
        raise invalid("config.problem_type", expected, problem, hint=hint)
    if getattr(config, "num_labels", 2) < 2:
        hint = "Create the model with num_labels=2 for two classes."
        raise invalid("config.num_labels", ">= 2", config.num_labels, hint=hint)
    if getattr(config, "return_dict", True) is False:
        hint = "The Trainer drops the first item of tuple outputs where the loss is given."
        raise invalid("config.return_dict", "True", False, hint=hint)
