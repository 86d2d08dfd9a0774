"""SIGTERM, which schedulers send before they kill a job: end after the state is saved."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from ldam_plugins.training.distributed import any_process

PREEMPTED = 128 + signal.SIGTERM
"""Exit code, 143, of a run that SIGTERM ended after its state was saved: ``--resume`` goes on."""

logger = logging.getLogger(__name__)


def until_preempted(epochs: Iterable[int]) -> Iterator[int]:
    """The epochs to train, up to the one in which any process gets SIGTERM.

    Save a checkpoint at the end of the loop's body: the process ends only after it.

    Raises:
        SystemExit: with the code :data:`PREEMPTED`, after the epoch in which SIGTERM came.
    """
    with defer_sigterm() as told:
        for epoch in epochs:
            yield epoch
            if any_process(told.is_set()):
                logger.warning(f"SIGTERM: ended after epoch {epoch}; --resume goes on from there.")
                raise SystemExit(PREEMPTED)


@contextmanager
def defer_sigterm(
    runs: Callable[[FrameType | None], bool] | None = None,
) -> Iterator[threading.Event]:
    """Record the first SIGTERM in the block instead of ending at once.

    Yields an event, which the first SIGTERM sets. A second one ends the process as usual, and so
    does the first one after the block: the handler from before is then back, unless other code has
    set another one in the meantime. The event is never set outside the main thread, which alone
    receives signals, nor if the handler from before is not Python's and could not be put back.

    Args:
        runs: For blocks that an error may keep from being left, as of callbacks: tells from the
            frame that the signal interrupts whether the training still runs. If not, the handler
            from before is called.
    """
    told, main = threading.Event(), threading.main_thread()
    if threading.current_thread() is not main:
        yield told
        return
    before = signal.getsignal(signal.SIGTERM)
    if before is None:
        logger.warning("SIGTERM has a handler that is not Python's: it is left as it is.")
        yield told
        return
    ended = False

    def give_back() -> None:
        if signal.getsignal(signal.SIGTERM) is note and threading.current_thread() is main:
            signal.signal(signal.SIGTERM, before)

    def note(number: int, frame: FrameType | None) -> None:
        give_back()
        if not ended and (runs is None or runs(frame)):
            told.set()
        elif callable(before):
            before(number, frame)
        elif before == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)

    signal.signal(signal.SIGTERM, note)
    try:
        yield told
    finally:
        ended = True
        give_back()
