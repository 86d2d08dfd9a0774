"""How a model runs fastest on the machine at hand: measured on the very model and batch.

The precision of a training on a CPU, and whether it is compiled, is chosen by timing a few passes
of each way on a copy of the model (:func:`auto_tune`); so is the precision of a model that is only
used. The choice is kept with the run (:func:`settle`), as another one would change its numbers,
and in a cache, so that the same model, batch and machine are timed once. On other devices precision
goes by the hardware, see :func:`.choose_precision`.

Not chosen by timing: the number of threads, which goes by the cores that are free
(:mod:`ldam_plugins.training.cores`); that of loader processes, from which the random numbers of an
augmentation follow, so that results would differ from machine to machine; and the memory format,
which is channels last for images. (Contiguous, a pass in float32 takes 1.1 times as long for a
ResNet-32, 1.2 for a ResNet-18 and 1.6 for an EfficientNet-Lite0 on a Zen 4 core, and with few rows
one looks better than the other that is worse with many.)
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from huggingface_hub import cached_assets_path
from torch import Tensor, nn

from ldam_plugins._validation import check_choice, invalid
from ldam_plugins.losses.base import ClassificationLoss
from ldam_plugins.losses.model_outputs import find_logits
from ldam_plugins.training.distributed import from_first_process
from ldam_plugins.training.environment import (
    choose_precision,
    cpu_name,
    note_random_state,
    run_versions,
)
from ldam_plugins.training.files import to_json, write_atomic
from ldam_plugins.training.race import LEAST_ROUNDS, race
from ldam_plugins.training.run_dir import AUTO_TUNE_FILE, has_checkpoint

BUDGET = 3.0
"""Seconds that the measurement is laid out for."""
WORTH = 20
"""Times the seconds of the measurement that a training must be estimated to take to be worth it."""
LEAST_PASSES = 50
"""Forward and backward passes that it must have to be worth an estimate."""
LEAST_COMPILED_RUN = 1200.0
"""Seconds that a training must be estimated to take for a compilation to be tried."""
COMPILATIONS_SAVED = 2.0
"""Times the seconds of its compilation that a compiled training must save."""
MOST_CACHED_NOISE = 0.1
"""Noise above which a choice is not kept in the cache: the machine was busy with something else."""
_MORE = 1.3  # times as many rows are worth two further passes
RULE, GIVEN, MEASURED, CACHED, OF_RUN, OF_FILE = "rule", "given", "measured", "cache", "run", "file"

Batch = tuple[Any, Tensor]
"""Inputs of a model, a tensor or a mapping of its arguments, and their labels (N,)."""


def title(precision: str) -> str:
    """Name of a way to run among those that are timed."""
    return "float32" if precision == "no" else precision


@dataclass(frozen=True)
class Tuned:
    """How a training is run, and by what that was chosen.

    Attributes:
        precision: ``"no"``, ``"bf16"`` or ``"fp16"``, as Accelerate takes it.
        compile: Whether the model is compiled.
        threads: Of torch, in a process.
        source: ``"given"``, ``"rule"``, ``"measured"``, ``"cache"``, ``"run"`` (of the run that is
            resumed) or ``"file"`` (of other runs, such as those of a grid).
        why: A few words on it.
        seconds: Median seconds of a forward and backward pass of each way that was timed.
        rows: Rows of the batch that was timed: fewer than those of the training if it is slow.
        noise: Share by which a way had to be faster to be taken.
        compilation: Seconds of the compilation, if one was tried.
        spent: Seconds that the choice took.
    """

    precision: str
    compile: bool = False
    threads: int = 1
    source: str = RULE
    why: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)
    rows: int = 0
    noise: float | None = None
    compilation: float | None = None
    spent: float = 0.0

    def line(self) -> str:
        """The choice and its timings in a line.

        Example:
            >>> timed = {"float32": 0.4, "bf16": 0.25}
            >>> Tuned("bf16", why="measured in 3 s", seconds=timed, rows=128).line()
            'bf16, 1 thread; measured in 3 s: 128 rows take 0.4 s by float32, 0.25 s by bf16'
        """
        way = title(self.precision) + (", compiled" if self.compile else "")
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        timed = ", ".join(f"{took:.2g} s by {name}" for name, took in self.seconds.items())
        timed = f": {self.rows} rows take {timed}" if timed else ""
        return f"{way}, {threads}; {self.why}{timed}"

    def seconds_of_pass(self, batches: Sequence[Batch]) -> float:
        """About the seconds of a pass over whole batches, run as was timed first."""
        rows = max(len(labels) for _, labels in batches)
        return next(iter(self.seconds.values()), 0.0) * rows / max(1, self.rows)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, whole or not at all."""
        write_atomic(path, to_json(asdict(self), name="auto_tune").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Tuned:
        """Read what :meth:`save` wrote.

        Raises:
            OSError: there is no such file, or it cannot be read.
            ValueError: it holds something else.
        """
        try:
            found = json.loads(Path(path).read_text(encoding="utf-8"))
            tuned = cls(**{each.name: found[each.name] for each in fields(cls)})
            check_choice("precision", tuned.precision, ("no", "bf16", "fp16"))
        except (KeyError, TypeError, ValueError) as error:
            hint = f"Remove it, or give --auto_tune off ({error!r})."
            raise invalid("auto_tune", "what an earlier run chose", str(path), hint=hint) from error
        return tuned


def by_rule(precision: str, compile: bool | str = False, *, why: str = "by rule") -> Tuned:
    """What is done where nothing is measured: see :func:`.choose_precision`."""
    given = precision != "auto" and compile != "auto"
    return Tuned(
        choose_precision(precision),
        compile=compile is True,
        threads=torch.get_num_threads(),
        source=GIVEN if given else RULE,
        why="as given" if given else why,
    )


def kept_choice(output_dir: str | os.PathLike[str]) -> Tuned | None:
    """The choice of the run in a folder, if it has a checkpoint to go on from and has kept one."""
    file = Path(output_dir, AUTO_TUNE_FILE)
    if not (has_checkpoint(output_dir) and file.is_file()):
        return None
    return replace(Tuned.load(file), source=OF_RUN, why="as the run began")


def settle(
    output_dir: str | os.PathLike[str],
    measure: Callable[[], Tuned],
    rule: Tuned,
    *,
    resume: bool,
    shared: str | os.PathLike[str] | None = None,
) -> Tuned:
    """The choice for a run: that of the run which is resumed, that of a file, or a new one.

    The first of the processes that train together decides, and tells the others. Write the choice
    into the folder once the run has claimed it: ``tuned.save(output_dir / AUTO_TUNE_FILE)``.

    Args:
        output_dir: Folder of the run.
        measure: Makes a new choice.
        rule: The choice of a run of an earlier version, which kept none.
        resume: Whether a run in the folder that has a checkpoint is resumed.
        shared: File of a choice that several runs share. The first of them that gets there makes
            and writes it, while the others wait.

    Raises:
        ValueError: a file that holds no choice.
    """
    return from_first_process(partial(_decide, Path(output_dir), measure, rule, resume, shared))


def _decide(
    folder: Path,
    measure: Callable[[], Tuned],
    rule: Tuned,
    resume: bool,
    shared: str | os.PathLike[str] | None,
) -> Tuned:
    if resume and has_checkpoint(folder):
        return kept_choice(folder) or rule
    if shared is None:
        return measure()
    Path(shared).absolute().parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{shared}.lock"):
        if Path(shared).is_file():
            tuned = Tuned.load(shared)
            threads = torch.get_num_threads()
            return replace(tuned, threads=threads, source=OF_FILE, why=f"as in {shared}")
        tuned = measure()
        tuned.save(shared)
        return tuned


def auto_tune(
    model: nn.Module,
    criterion: ClassificationLoss | None,
    make_batches: Callable[[], Sequence[Batch]],
    *,
    device: torch.device,
    passes: int,
    precision: str = "auto",
    compile: bool | str = False,
    compiled: Callable[[nn.Module], Any] = torch.compile,
    cache: str | os.PathLike[str] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Tuned:
    """Choose how to run a training, by timing forward and backward passes of a copy of the model.

    Float32, run eagerly, is what is trained in unless another way is faster by more than the noise,
    see :func:`.race`. Only what is ``"auto"`` is chosen. Nothing is timed on other devices than a
    CPU, nor for a training of fewer than :data:`LEAST_PASSES` passes, nor one that takes less than
    :data:`WORTH` times the measurement: there :func:`by_rule` holds. Weights, gradients, batch
    statistics and the random numbers of Python, NumPy and torch are left as found.

    A compilation is tried with ``compile="auto"`` for a training of :data:`LEAST_COMPILED_RUN`
    seconds, and taken if it saves its seconds :data:`COMPILATIONS_SAVED` times.

    Args:
        model: What is to be trained, on any device.
        criterion: Its loss, on ``device``; None: the model is only used, so forward passes in
            evaluation mode are what is timed.
        make_batches: Makes the batches that are timed, such as a short, a usual and a long one.
        device: Of the training.
        passes: Passes of the whole training, or of all data, each over a batch.
        precision: ``"auto"``, ``"no"``, ``"bf16"`` or ``"fp16"``.
        compile: True, False or ``"auto"``.
        compiled: Compiles a model as the training does.
        cache: Folder of earlier choices. Default: that of ``huggingface_hub`` for assets.
        clock: Seconds, as of ``time.perf_counter``.
    """
    rule = by_rule(precision, compile)
    if rule.source == GIVEN:
        return rule
    if device.type != "cpu":
        return replace(rule, why=f"by the rule for {device.type}")
    if passes < LEAST_PASSES:
        return replace(rule, why="a short run, not measured")
    began = clock()
    with ExitStack() as afterwards:
        afterwards.callback(note_random_state("cpu"))
        batches = make_batches()
        # Whether a compilation pays goes by the length of the run, which others do not share.
        facts = None if compile == "auto" else _facts(model, criterion, batches, compile)
        file = None if facts is None else _cache_file(cache, facts)
        if file is not None and file.is_file():
            with suppress(ValueError):
                known = Tuned.load(file)
                run = known.seconds_of_pass(batches) * passes
                if run < WORTH * BUDGET:
                    return replace(rule, why=_too_short(run))
                why = "as measured here before"
                return replace(known, threads=rule.threads, source=CACHED, why=why)
        try:
            trial = Trial(model, criterion, batches, device)
            tuned = _measured(trial, rule, passes, precision, compile, compiled, clock)
        except RuntimeError as error:  # the training itself may go well: a copy needs more memory
            reason = str(error).partition("\n")[0]
            tuned = replace(rule, why=f"not measured, as a copy of the model failed: {reason}")
    spent = clock() - began
    if tuned.source != MEASURED:
        return replace(tuned, spent=spent)
    tuned = replace(tuned, spent=spent, why=f"measured in {spent:.1f} s")
    if file is not None and (tuned.noise or 0) <= MOST_CACHED_NOISE:
        with suppress(OSError):
            tuned.save(file)
    return tuned


def _measured(
    trial: Trial,
    rule: Tuned,
    passes: int,
    precision: str,
    compile: bool | str,
    compiled: Callable[[nn.Module], Any],
    clock: Callable[[], float],
) -> Tuned:
    """The choice by measurement, or ``rule`` with the reason why there is none."""
    ways = ("no", "bf16") if precision == "auto" else (precision,)
    count = len(trial.batches)
    rows, whole, cost = trial.fitting_rows(ways, passes / count, clock)
    run = whole * passes / count
    if run < WORTH * cost:
        return replace(rule, why=_too_short(run))
    calls = {title(way): trial.call(way, rows) for way in ways if trial.can(way)}
    found = race(calls, BUDGET, clock)
    chosen = next(way for way in ways if title(way) == found.winner)
    tuned = replace(
        rule,
        precision=chosen,
        source=MEASURED,
        seconds={name: took / count for name, took in found.seconds.items()},
        rows=rows,
        noise=found.noise,
    )
    run *= found.ratios[found.winner]
    if compile != "auto" or run < LEAST_COMPILED_RUN:
        return tuned
    return _compiled_or_not(trial, tuned, run, compiled, clock)


def _compiled_or_not(
    trial: Trial,
    tuned: Tuned,
    run: float,
    compiled: Callable[[nn.Module], Any],
    clock: Callable[[], float],
) -> Tuned:
    """Whether a training of so many seconds is compiled, found by a compilation."""
    way = title(tuned.precision)
    name = f"{way} compiled"
    began = clock()
    call = trial.call(tuned.precision, trial.rows, compiled)
    call()
    took = clock() - began
    against = race({way: trial.call(tuned.precision, trial.rows), name: call}, BUDGET, clock)
    saved = (1 - against.ratios[name]) * run
    seconds = {**tuned.seconds, name: against.ratios[name] * tuned.seconds[way]}
    return replace(
        tuned,
        compile=against.winner == name and saved > COMPILATIONS_SAVED * took,
        seconds=seconds,
        compilation=took,
    )


def _too_short(run: float) -> str:
    return f"a run of about {run:.0f} s, not measured"


class Trial:
    """Passes of copies of a model, whose original is left alone.

    Args:
        model: The model.
        criterion: Its loss; None: the model is only used.
        batches: What a pass runs over.
        device: Where.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: ClassificationLoss | None,
        batches: Sequence[Batch],
        device: torch.device,
    ) -> None:
        self.model, self.criterion, self.device = model, criterion, device
        self.batches = [(_moved(inputs, device), y.to(device)) for inputs, y in batches]
        self.rows = max(len(labels) for _, labels in self.batches)
        self._net = self._copy()

    def _copy(self) -> nn.Module:
        net = copy.deepcopy(self.model).to(self.device).train(self.criterion is not None)
        net.zero_grad(set_to_none=True)
        return net

    def can(self, way: str) -> bool:
        """Whether the model can go a way: without an error, and to what is finite."""
        if way == "no":
            return True
        try:
            values = [self._pass(self._net, *batch, way) for batch in self._first(2)]
        except (RuntimeError, TypeError):  # no kernel for bfloat16; NumPy does not know it
            return False
        finally:
            self._net.zero_grad(set_to_none=True)
        return all(math.isfinite(value) for value in values)

    def fitting_rows(
        self, ways: Sequence[str], passes: float, clock: Callable[[], float]
    ) -> tuple[int, float, float]:
        """Rows of each batch to be raced in :data:`BUDGET` seconds.

        They grow from two on as long as there is room for many more, and the training may be long
        enough.

        Returns:
            The rows, the seconds of a pass over all batches as a whole, and those of the race.
        """
        rows = min(2, self.rows)
        while True:
            call = self.call(ways[0], rows)
            call()
            began = clock()
            call()
            took = max(clock() - began, 1e-9)
            whole, cost = took * self.rows / rows, took * len(ways) * (LEAST_ROUNDS + 2)
            room = BUDGET / cost
            if rows == self.rows or room < _MORE or whole * passes < WORTH * BUDGET:
                return rows, whole, max(cost, BUDGET)
            rows = min(self.rows, max(rows + 1, int(rows * room)))

    def call(
        self, way: str, rows: int, wrap: Callable[[nn.Module], Any] | None = None
    ) -> Callable[[], None]:
        """Passes over the first rows of each batch.

        Args:
            way: Its precision.
            rows: How many.
            wrap: Gives what is run in place of a copy of the model.
        """
        net = self._net if wrap is None else wrap(self._copy())
        batches = self._first(rows)

        def run() -> None:
            for inputs, labels in batches:
                self._pass(net, inputs, labels, way)
            net.zero_grad(set_to_none=True)

        return run

    def _first(self, rows: int) -> list[Batch]:
        """The first rows of each batch."""
        return [(_first_rows(inputs, rows), labels[:rows]) for inputs, labels in self.batches]

    def _pass(self, net: nn.Module, inputs: Any, labels: Tensor, precision: str) -> Tensor:
        """What a step of the training does, or of the use; returns the loss, or a logit.

        The loss is outside of autocast, as with Accelerate.
        """
        kind = torch.float16 if precision == "fp16" else torch.bfloat16
        lower = torch.autocast(self.device.type, kind, enabled=precision != "no")
        with torch.set_grad_enabled(self.criterion is not None), lower:
            outputs = net(**inputs) if isinstance(inputs, Mapping) else net(inputs)
        if self.criterion is None:
            logits: Any = getattr(outputs, "logits", outputs)
            return logits.flatten()[0] if isinstance(logits, Tensor) else torch.zeros(())
        if isinstance(inputs, Mapping):
            classes = len(self.criterion.class_counts)
            outputs = find_logits(outputs, len(labels), classes)
        logits = outputs.float() if isinstance(outputs, Tensor) else outputs
        loss = self.criterion(logits, labels)
        loss.backward()
        return loss.detach()


def _moved(inputs: Any, device: torch.device) -> Any:
    if isinstance(inputs, Mapping):
        return {name: value.to(device) for name, value in inputs.items()}
    return inputs.to(device)


def _first_rows(inputs: Any, rows: int) -> Any:
    if isinstance(inputs, Mapping):
        return {name: value[:rows] for name, value in inputs.items()}
    return inputs[:rows]


def _facts(
    model: nn.Module,
    criterion: ClassificationLoss | None,
    batches: Sequence[Batch],
    compile: bool | str,
) -> dict[str, Any]:
    """All that the times depend on: model, batch, versions and machine."""
    shapes = [
        (name, tuple(tensor.shape), str(tensor.dtype), tensor.requires_grad)
        for name, tensor in model.named_parameters()
    ]
    return {
        "model": f"{model}\n{shapes}",
        "criterion": type(criterion).__name__,
        "batches": [_shapes(inputs) for inputs, _ in batches],
        "compile": compile,
        "versions": run_versions(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "processes": os.environ.get("LOCAL_WORLD_SIZE", "1"),
    }


def _shapes(inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return {name: list(value.shape) for name, value in inputs.items()}
    return list(inputs.shape)


def _cache_file(cache: str | os.PathLike[str] | None, facts: Mapping[str, Any]) -> Path | None:
    """The file of the choice for these facts; None where there is no place for it."""
    name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
    try:
        folder = cached_assets_path("ldam_plugins", "auto_tune") if cache is None else Path(cache)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder / f"{name}.json"
