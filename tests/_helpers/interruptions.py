"""Interrupt a run inside the process of a test."""

from contextlib import contextmanager
from unittest.mock import patch

import pytest


@contextmanager
def interrupted_at(owner, name, call=2):
    """Ctrl-C in the given call, counted from 1, of ``owner.name``; the block must end by it."""
    original, calls = getattr(owner, name), []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    with patch.object(owner, name, interrupted), pytest.raises(KeyboardInterrupt):
        yield
