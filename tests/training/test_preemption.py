import signal
import threading

import pytest

from ldam_plugins.training.preemption import defer_sigterm, until_preempted


class _Left(Exception):
    """How a block or loop is left early."""


@pytest.fixture
def sigterm():
    """Asks for SIGTERM's handler, which is put back in the end."""
    before = signal.getsignal(signal.SIGTERM)
    yield lambda: signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)


def _epochs(then):
    for epoch in until_preempted(range(3)):
        if epoch == 1:
            then()


def _raise():
    raise _Left


@pytest.mark.parametrize("kind", [signal.SIG_DFL, signal.SIG_IGN, lambda *_: None])
def test_sigterm_has_its_handler_back(kind, sigterm):
    signal.signal(signal.SIGTERM, kind)
    with defer_sigterm() as told:
        assert sigterm() is not kind
    with pytest.raises(_Left), defer_sigterm():
        raise _Left
    assert sigterm() is kind
    with defer_sigterm() as told:
        signal.raise_signal(signal.SIGTERM)
        assert told.is_set()
    assert sigterm() is kind
    for _ in until_preempted(range(3)):
        break
    assert sigterm() is kind
    with pytest.raises(_Left):
        _epochs(_raise)
    assert sigterm() is kind
    with pytest.raises(SystemExit) as ended:
        _epochs(lambda: signal.raise_signal(signal.SIGTERM))
    assert ended.value.code == 143
    assert sigterm() is kind


def test_a_handler_that_others_set_since_is_theirs(sigterm):
    theirs = lambda *_: None  # noqa: E731
    with defer_sigterm():
        signal.signal(signal.SIGTERM, theirs)
    assert sigterm() is theirs


def test_blocks_within_each_other(sigterm):
    before = sigterm()
    with defer_sigterm() as outer:
        note = sigterm()
        with defer_sigterm() as inner:
            signal.raise_signal(signal.SIGTERM)
        assert inner.is_set()
        assert not outer.is_set()
        assert sigterm() is note
    assert sigterm() is before


def test_sigterm_after_what_it_is_noted_for_is_the_old_handlers(sigterm):
    got, runs = [], [True]
    signal.signal(signal.SIGTERM, lambda *_: got.append(1))
    block = defer_sigterm(lambda frame: runs[0])
    told = block.__enter__()  # and is never left
    runs[0] = False
    signal.raise_signal(signal.SIGTERM)
    assert not told.is_set()
    assert got == [1]
    block.__exit__(None, None, None)


def test_other_threads_are_not_told_and_do_no_harm(sigterm):
    before, found = sigterm(), []

    def run():
        with defer_sigterm() as told:
            found.append((sigterm(), told.is_set()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(before, False)]


def test_a_handler_that_is_not_pythons_is_left_as_it_is(sigterm, monkeypatch, caplog):
    before = sigterm()
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    with defer_sigterm() as told:
        pass
    monkeypatch.undo()
    assert sigterm() is before
    assert not told.is_set()
    assert "not Python's" in caplog.text
