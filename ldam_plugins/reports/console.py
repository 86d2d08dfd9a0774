"""What a run says in the terminal: a header, one progress bar, advice at the end."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ldam_plugins.counts import ClassCounts
from ldam_plugins.reports.class_table import printable
from ldam_plugins.training.command_line import LOG_SECONDS

STILL_FALLING = 0.1
"""Share by which the training loss must have fallen in the last epoch to be worth a word."""
_NAMED = 4
_FIRST = {"loss": 0, "stage": 1}
_BAR_COLUMNS, _NARROW = 100, 60
"""The most columns of a terminal that a bar takes, and those below which it tells figures alone."""


def header(facts: Mapping[str, str]) -> str:
    """Names and facts as two columns.

    Example:
        >>> print(header({"data": "digits", "device": "cpu"}))
        data    digits
        device  cpu
    """
    width = max(map(len, facts)) + 2
    return "\n".join(f"{name:<{width}}{fact}" for name, fact in facts.items())


def worded_classes(counts: ClassCounts) -> str:
    """Number of classes, and the samples of those at both ends, from head to tail.

    Example:
        >>> worded_classes(ClassCounts([500, 5, 50], class_names=["cat", "lynx", "fox"]))
        '3, from head to tail: cat 500, fox 50, lynx 5; imbalance ratio 100'
    """
    names = counts.class_names or [str(index) for index in range(len(counts))]
    pairs = sorted(zip(names, counts.counts.tolist(), strict=True), key=lambda pair: -pair[1])
    shown = [f"{printable(name, width=20)} {samples}" for name, samples in pairs]
    if len(shown) > 2 * _NAMED:
        shown = [*shown[:_NAMED], "...", *shown[-_NAMED:]]
    ratio = f"imbalance ratio {counts.imbalance_ratio:.4g}"
    return f"{len(counts)}, from head to tail: {', '.join(shown)}; {ratio}"


def worded_machine(device: str, precision: str, processes: int) -> str:
    """Device, precision as asked for, and number of processes."""
    kinds = {"no": "float32", "bf16": "mixed precision bf16", "fp16": "mixed precision fp16"}
    kinds["auto"] = "precision as chosen below"
    count = "1 process" if processes == 1 else f"{processes} processes"
    return f"{device}, {kinds.get(precision, precision)}, {count}"


class _Lines(tqdm):
    """A bar of a log: each state of it is a line, where a terminal writes over the last one."""

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """What writes a state of the bar."""

        def write(state: str) -> None:
            if state:
                file.write(f"{state}\n")
                file.flush()

        return write

    def close(self) -> None:
        """End the bar, with its last state if that is to be left."""
        if not self.disable and self.leave:
            self.refresh()
        self.leave = False
        super().close()


class RunBar:
    """The progress bar of a training: epoch, stage, loss, error, and the time that is left.

    Where nobody watches, as in a log, it writes a line every half minute.

    Args:
        epochs: Epochs of the whole training.
        steps_per_epoch: Optimizer steps of one.
        done: Epochs that were done before.
        show: Whether there is a bar at all.
    """

    def __init__(self, epochs: int, steps_per_epoch: int, done: float = 0, *, show: bool) -> None:
        self.epochs = epochs
        self._is_watched = sys.stderr.isatty()
        kind: Any = tqdm if self._is_watched else _Lines
        # What is cut at the edge of the terminal is the bar first, then what is shown last.
        columns = shutil.get_terminal_size().columns - 1
        bar = "" if self._is_watched and columns < _NARROW else " |{bar}|"
        interval = float(
            os.environ.get("TQDM_MININTERVAL", 0.2 if self._is_watched else LOG_SECONDS)
        )
        self._bar: tqdm[Any] = kind(
            desc=self._named(int(done)),
            total=epochs * steps_per_epoch,
            initial=round(done * steps_per_epoch),
            bar_format=f"{{desc}} {{percentage:3.0f}}%{bar} {{remaining}} left{{postfix}}",
            ncols=min(columns, _BAR_COLUMNS) if self._is_watched else None,
            mininterval=interval,
            maxinterval=max(10, interval),
            leave=False,  # of a run that is cut short nothing is left beside what is said of it
            disable=not show,
        )
        self._shown: dict[str, str] = {}

    def begin_epoch(self, epoch: int) -> None:
        """Name the epoch (0-based) that begins; people count them from 1."""
        self._bar.set_description_str(self._named(epoch), refresh=False)

    def _named(self, epoch: int) -> str:
        return f"epoch {min(epoch + 1, self.epochs)}/{self.epochs}"

    def step(self) -> None:
        """Go on by an optimizer step."""
        self._bar.update()

    def show(self, **values: float | str | None) -> None:
        """Show values until others of the name are shown; None is left out."""
        for name, value in values.items():
            if value is not None:
                self._shown[name] = value if isinstance(value, str) else f"{value:.4g}"
        named = sorted(self._shown.items(), key=lambda pair: _FIRST.get(pair[0], len(_FIRST)))
        shown = ", ".join(f"{name} {value}" for name, value in named)
        self._bar.set_postfix_str(shown, refresh=self._is_watched)

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.leave = True
        self._bar.close()


def advice(history: Sequence[Mapping[str, Any]], *, stopped_early: bool = False) -> str | None:
    """A word at the end if the training was cut off while it still learned much, else None.

    The rule: in the last epoch the training loss was at least a tenth below that of the epoch
    before, under the same weights (the same stage).

    Args:
        history: Rows as of :func:`~ldam_plugins.training.history.read_history`.
        stopped_early: Whether the training ended by itself.

    Example:
        >>> rows = [{"stage": "uniform", "train_loss": loss} for loss in (2.0, 1.4)]
        >>> advice(rows)
        '2 epochs are few: the training loss still fell by 30 % in the last. Try --epochs 4.'
    """
    if stopped_early or len(history) < 2:
        return None
    before, last = history[-2:]
    if before["stage"] != last["stage"] or not before["train_loss"] or last["train_loss"] is None:
        return None
    fall = 1 - last["train_loss"] / before["train_loss"]
    if fall < STILL_FALLING:
        return None
    told = f"{len(history)} epochs are few: the training loss still fell by {100 * fall:.0f} % in"
    return f"{told} the last. Try --epochs {2 * len(history)}."


def files_left(output_dir: str | os.PathLike[str]) -> str:
    """Where to look after a run.

    Example:
        >>> files_left("runs/a")
        'report: runs/a/report.html, model: runs/a/model, figures: runs/a/metrics.json'
    """
    folder = Path(output_dir)
    report, model, metrics = (folder / name for name in ("report.html", "model", "metrics.json"))
    return f"report: {report}, model: {model}, figures: {metrics}"
