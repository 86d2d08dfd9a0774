"""The Trainer behind a call. What relies on it is tested with real hosts elsewhere."""

import gc
import subprocess
import sys
import weakref

import pytest
from transformers import Trainer

from ldam_plugins._call_stack import find_trainer, trainer_calls


class Runs(Trainer):
    """A Trainer that runs what it is given, in methods of its own."""

    def __init__(self):
        pass

    def train(self, function):
        return function()

    def evaluate(self, function):
        return function()


def test_there_is_none_outside_a_trainer():
    assert find_trainer() is None
    assert list(trainer_calls()) == []


def test_the_innermost_is_found_first():
    outer, inner = Runs(), Runs()
    assert outer.train(lambda: inner.evaluate(find_trainer)) is inner
    calls = outer.train(lambda: inner.evaluate(lambda: list(trainer_calls())))
    assert [call.trainer for call in calls] == [inner, outer]
    assert [call.frame.f_code.co_name for call in calls] == ["evaluate", "train"]


def test_by_the_method_that_runs():
    outer, inner = Runs(), Runs()
    assert outer.train(lambda: inner.evaluate(lambda: find_trainer("train"))) is outer
    assert outer.train(lambda: inner.evaluate(lambda: find_trainer("predict"))) is None


def test_from_another_frame_than_the_callers():
    trainer = Runs()
    frame = trainer.train(lambda: sys._getframe(0))
    assert next(trainer_calls("train", frame)).trainer is trainer
    assert find_trainer() is None


def test_objects_that_pretend_are_not_asked():
    class Pretends:
        @property
        def __class__(self):
            raise AssertionError("asked")

        def train(self):
            return find_trainer()

    assert Pretends().train() is None


@pytest.mark.parametrize("look", [find_trainer, lambda: next(trainer_calls()).trainer])
def test_nothing_is_kept_alive(look):
    class Local:
        pass

    def caller():
        local = Local()
        trainer.train(look)
        return weakref.ref(local)

    trainer = Runs()
    gc.disable()
    try:
        assert caller()() is None
    finally:
        gc.enable()


def test_without_transformers_there_is_no_trainer():
    code = "import sys; from ldam_plugins._call_stack import find_trainer; "
    code += "assert find_trainer() is None; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
