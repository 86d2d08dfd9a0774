"""The last step of a training: the head re-balanced and calibrated before the model is saved.

One process decides and the others take its head over, bit for bit, so that what they save and go
on with is one model whatever machine each runs on.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from torch import nn

from ldam_plugins._validation import check_choice, invalid
from ldam_plugins.choices import AUTOMATIC, NONE, SCALINGS, TEMPERATURE
from ldam_plugins.counts import ClassCounts
from ldam_plugins.heads import cosine_heads, find_head, fold_cosine_head
from ldam_plugins.posthoc.features import Features
from ldam_plugins.posthoc.linear_head import HeadState, give_bias
from ldam_plugins.posthoc.methods import AUTO, METHODS, parse_method
from ldam_plugins.posthoc.rebalance import rebalance_head

_SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP")


@dataclass(frozen=True)
class LastStep:
    """What is done to the head of a model at the end of its training.

    Args:
        rebalance: ``"none"``, ``"auto"``, a method of :func:`.rebalance_head`, or one with its
            strength: ``"logit_adjustment:1"``. The target are even classes.
        calibrate: ``"none"``, ``"temperature"``, ``"group"`` or ``"class"``; it comes last, and
            fits the probabilities to even classes where they were re-balanced, else to the class
            shares of the training.
        by: What is chosen by.
        seed: Of the division into folds.

    Raises:
        ValueError: an unknown word, or a strength that the method does not take.
    """

    rebalance: str = NONE
    calibrate: str = NONE
    by: str = "log_loss"
    seed: int = 0

    def __post_init__(self) -> None:
        parse_method(self.rebalance, "rebalance")
        check_choice("calibrate", self.calibrate, [NONE, *SCALINGS])

    @property
    def is_needed(self) -> bool:
        """Whether anything is done at all."""
        return (self.rebalance, self.calibrate) != (NONE, NONE)

    @property
    def learns(self) -> bool:
        """Whether a method may learn a head from labelled samples."""
        name, _ = parse_method(self.rebalance)
        return any(METHODS[each].learns for each in (AUTO if name == AUTOMATIC else (name,)))

    def check_model(self, model: nn.Module) -> None:
        """Refuse what would give a bias to a head whose host builds it without one.

        Call it before the training.

        Raises:
            ValueError: it would, or no head is found.
        """
        cosine = cosine_heads(model)
        heads: list[Any] = [model.get_submodule(name) for name in cosine or find_head(model)]
        has_bias = any(head.folded_bias if cosine else head.bias is not None for head in heads)
        name, _ = parse_method(self.rebalance)
        without = sorted(each for each, method in METHODS.items() if not method.has_bias)
        if has_bias:
            return
        if name not in (NONE, AUTOMATIC, *without):
            hint = f"The head of this model has none, and its host would leave it out: {without}."
            raise invalid("rebalance", "one that needs no bias", self.rebalance, hint=hint)
        if self.calibrate not in (NONE, TEMPERATURE):
            hint = "The head of this model has no bias, and its host would leave one out."
            raise invalid("calibrate", TEMPERATURE, self.calibrate, hint=hint)

    def run(
        self,
        model: nn.Module,
        class_counts: ClassCounts,
        parts: Mapping[str, Callable[[], Features]],
    ) -> Finished:
        """Change the head of ``model`` in place; call it on every process.

        Args:
            model: A classifier, not wrapped for parallel training.
            class_counts: Training samples per class.
            parts: What extracts the features of the parts of the data, on every process:
                ``train``; ``validation``, if a part is held out, on which is then chosen, while
                methods learn from both; ``test``, where before and after are measured, else by
                cross-fitting. Those that are not needed are not extracted.

        Raises:
            ValueError: as :func:`.rebalance_head`, on every process. The model is then as it was.
        """
        state = HeadState(model)
        chosen_on = "validation" if "validation" in parts else "train"
        given: dict[str, Any] = {"features": parts[chosen_on]()}
        if chosen_on != "train" and self.learns:
            given["learn_from"] = parts["train"]()
        if "test" in parts:
            given["test"] = parts["test"]()
        record = decided_by_first(model, lambda: self._decide(model, class_counts, given))
        record["rebalance"]["chosen_on"] = chosen_on
        return Finished(record, state)

    def _decide(
        self, model: nn.Module, counts: ClassCounts, given: dict[str, Any]
    ) -> dict[str, Any]:
        name, strength = parse_method(self.rebalance)
        with warnings.catch_warnings():
            # Whether that matters is asked beforehand, see `check_model`.
            warnings.filterwarnings("ignore", message="the head .* had no bias")
            done = rebalance_head(
                model,
                class_counts=counts,
                method=name,
                strength=strength,
                target_prior="train" if name == NONE else "uniform",
                by=self.by,
                seed=self.seed,
                calibrate=False if self.calibrate == NONE else self.calibrate,
                allow_same=True,  # the parts are apart: a training must not end by this error
                **given,
            )
        before = {**done.before}
        before.pop("confusion", None)
        record = {**done.to_dict(), "asked": self.rebalance, "calibrate": self.calibrate}
        return {"rebalance": record, "before": before, "after": dict(done.after)}


@dataclass(frozen=True, eq=False)
class Finished:
    """A model whose head was changed at the end of its training.

    Args:
        record: For ``metrics.json``: ``rebalance`` (what was done, and why), ``before`` and
            ``after`` (metrics with intervals, ``calibration`` among them).
    """

    record: dict[str, Any]
    _state: HeadState

    def undo(self) -> None:
        """Put the head back as it was, a cosine head as such; call it on every process."""
        self._state.restore()


def refuse_sharded(distributed_type: Any = None) -> None:
    """Refuse a training whose head is not whole on each process.

    Args:
        distributed_type: Accelerate's; None: what ``accelerate launch`` was asked for.

    Raises:
        ValueError: FSDP, DeepSpeed, Megatron or tensor parallelism.
    """
    asked = [kind for kind in _SHARDED if parse_flag_from_env(f"ACCELERATE_USE_{kind}")]
    kind = str(getattr(distributed_type, "value", distributed_type))
    if asked or kind in _SHARDED:
        hint = "Re-balance the model that it saves: python recipes/rebalance.py RUN, or"
        hint += " rebalance_head of the loaded model."
        expected = "left out where the model is sharded or wrapped by its engine"
        raise invalid("rebalance, calibrate", expected, [*asked, kind][0], hint=hint)


@contextmanager
def scratch_folder(output_dir: str | os.PathLike[str]) -> Iterator[Path]:
    """A folder for features that exceed the memory, in that of a run; on every process.

    It is removed at the end, and what an earlier process left of it at the beginning.
    """
    folder, state = Path(output_dir, ".features"), PartialState()
    if state.is_main_process:
        shutil.rmtree(folder, ignore_errors=True)
    state.wait_for_everyone()
    try:
        yield folder
    finally:
        if state.is_main_process:
            shutil.rmtree(folder, ignore_errors=True)


def decided_by_first(model: nn.Module, decide: Callable[[], Any]) -> Any:
    """Let the first process change the head of ``model``, and the others take it over.

    Args:
        model: The same on all processes.
        decide: Changes the head; called on the first process alone.

    Returns:
        What ``decide`` returned, on every process.

    Raises:
        Exception: what ``decide`` raised, on every process, so that none waits for another.
    """
    if PartialState().num_processes == 1:
        return decide()
    told: list[Any] = [None, None, None]
    if PartialState().is_main_process:
        try:
            answer = decide()
            values = {name: _values(layer) for name, layer in HeadState(model).layers.items()}
            told = [answer, values, None]
        except Exception as error:
            told = [None, None, error]
    answer, values, failure = broadcast_object_list(told)
    if failure is not None:
        raise failure
    if not PartialState().is_main_process:
        _take_over(model, values)
    return answer


def _values(layer: nn.Module) -> dict[str, Any]:
    return {
        name: value.detach().cpu() for name, value in layer._parameters.items() if value is not None
    }


@torch.no_grad()
def _take_over(model: nn.Module, heads: dict[str, dict[str, Any]]) -> None:
    """Make the heads of a model those of the first process."""
    if cosine_heads(model):
        fold_cosine_head(model)
    for name, values in heads.items():
        layer: Any = model.get_submodule(name)
        if "bias" in values and layer.bias is None:
            give_bias(layer)
        for key, value in values.items():
            layer._parameters[key].copy_(value)
