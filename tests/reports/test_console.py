import io

import numpy as np
import pytest

from ldam_plugins import ClassCounts
from ldam_plugins.reports.console import RunBar, advice, worded_classes, worded_machine


def rows(*losses, stages=()):
    stages = stages or ["uniform"] * len(losses)
    return [{"stage": s, "train_loss": v} for s, v in zip(stages, losses, strict=True)]


@pytest.mark.parametrize(
    ("history", "told"),
    [
        (rows(2.0, 1.0, 0.7), "3 epochs are few: the training loss still fell by 30 %"),
        (rows(1.0, 0.89), "11 %"),
        (rows(1.0, 0.91), None),
        (rows(1.0, 1.5), None),
        (rows(1.0), None),
        ([], None),
        (rows(2.0, 1.0, stages=["uniform", "reweighted"]), None),  # another loss, not less of it
        (rows(0.0, 0.0), None),
        (rows(1.0, None), None),
    ],
)
def test_advice_if_the_training_was_cut_off(history, told):
    found = advice(history)
    assert (found is None) if told is None else (told in found)
    assert advice(history, stopped_early=True) is None


def test_of_many_classes_both_ends_are_named():
    counts = ClassCounts(np.arange(1000, 0, -1))
    assert worded_classes(counts) == (
        "1000, from head to tail: 0 1000, 1 999, 2 998, 3 997, ..., 996 4, 997 3, 998 2, 999 1; "
        "imbalance ratio 1000"
    )
    assert "x" * 17 + "... 3" in worded_classes(ClassCounts([3, 1], class_names=["x" * 50, "b"]))


def test_the_machine_is_worded():
    assert worded_machine("cpu", "no", 1) == "cpu, float32, 1 process"
    assert worded_machine("H200", "bf16", 2) == "H200, mixed precision bf16, 2 processes"
    assert worded_machine("cpu", "auto", 1) == "cpu, precision as chosen below, 1 process"


class Terminal(io.StringIO):
    """A screen that somebody watches."""

    def isatty(self):
        return True


def shown(monkeypatch, screen):
    """What a bar writes on a screen, of a run that has one of four epochs behind it."""
    monkeypatch.setattr("sys.stderr", screen)
    bar = RunBar(4, 10, done=1, show=True)
    for epoch in (1, 2):
        bar.begin_epoch(epoch)
        for _ in range(10):
            bar.step()
        bar.show(stage="uniform", loss=1.23456, val_error=12.5, test_error=None)
    bar.close()
    RunBar(4, 10, show=False).step()
    return screen.getvalue()


def test_one_bar_tells_epoch_stage_loss_and_time(monkeypatch):
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    written = shown(monkeypatch, Terminal())
    last = written.rstrip("\n").rpartition("\r")[2]
    assert last.startswith("epoch 3/4  75% |")
    assert last.rstrip().endswith("left, loss 1.235, stage uniform, val_error 12.5")
    assert written.endswith("\n")


@pytest.mark.parametrize(("columns", "start"), [(80, "epoch 3/4  75% |"), (40, "epoch 3/4  75% 0")])
def test_in_a_narrow_terminal_the_figures_come_before_the_bar(monkeypatch, columns, start):
    monkeypatch.setenv("COLUMNS", str(columns))
    last = shown(monkeypatch, Terminal()).rstrip("\n").rpartition("\r")[2].rstrip()
    assert last.startswith(start)
    assert len(last) < columns
    assert "left, loss 1.235" in last
    assert ("stage uniform, val_error 12.5" in last) == (columns == 80)


def test_a_log_gets_whole_lines_and_few(monkeypatch):
    monkeypatch.delenv("TQDM_MININTERVAL", raising=False)
    first, last, *rest = shown(monkeypatch, io.StringIO()).replace("\r", "").splitlines()
    assert first.startswith("epoch 2/4  25% |")
    assert last.startswith("epoch 3/4  75% |")
    assert last.endswith("left, loss 1.235, stage uniform, val_error 12.5")
    assert not any(rest)
