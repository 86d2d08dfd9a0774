"""Argument checks: the one place that words "must be ..., got ..."; those of tensors lie beside."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable
from numbers import Integral, Real
from typing import TypeVar

_Value = TypeVar("_Value")
_MAX_NAMED = 20

DIVERGED = "Has training diverged? A smaller learning rate or gradient clipping may help."
"""What to do about numbers of a training that are not finite."""


def invalid(
    name: str, expected: str, value: object, hint: str = "", *, error: type[Exception] = ValueError
) -> Exception:
    """The error of a bad argument, to be raised: ``'`beta` must be in [0, 1), got 1.0'``.

    Args:
        name: The argument.
        expected: What it must be.
        value: What it is.
        hint: A full sentence that tells the user what to write instead.
        error: Its type: ``ValueError`` for a value, ``TypeError`` for a type.
    """
    message = f"`{name}` must be {expected}, got {value!r}"
    return error(f"{message}. {hint}" if hint else message)


def check_real(
    name: str,
    value: float,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
    hint: str = "",
) -> float:
    """Return ``value`` as a finite float inside the interval, else raise.

    Raises:
        TypeError: ``value`` is not a real number (a bool is not one).
        ValueError: ``value`` is not finite or lies outside the interval.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        interval = _worded_interval(low, high, low_open, high_open)
        raise invalid(name, interval, value, hint=hint, error=TypeError)
    try:
        number = float(value)
    except OverflowError:  # an int beyond every float
        number = math.inf
    above = number > low if low_open else number >= low
    below = number < high if high_open else number <= high
    finite = -math.inf < number < math.inf  # not math.isfinite, where compilers stop
    if not (finite and above and below):
        interval = _worded_interval(low, high, low_open, high_open)
        raise invalid(name, interval, value, hint=hint)
    return number


def _worded_interval(low: float, high: float, low_open: bool, high_open: bool) -> str:
    if math.isfinite(low) and math.isfinite(high):
        return f"in {'(' if low_open else '['}{low:g}, {high:g}{')' if high_open else ']'}"
    if math.isfinite(low):
        return f"a finite number {'>' if low_open else '>='} {low:g}"
    if math.isfinite(high):
        return f"a finite number {'<' if high_open else '<='} {high:g}"
    return "a finite number"


def check_int(
    name: str,
    value: int,
    *,
    low: int | None = None,
    high: int | None = None,
    hint: str = "",
) -> int:
    """Return ``value`` as an int inside ``[low, high]``, else raise.

    Raises:
        TypeError: ``value`` is not an integer (a bool is not one).
        ValueError: ``value`` lies outside the interval.
    """
    expected = "an integer"
    if low is not None:
        expected += f" >= {low}"
    if high is not None:
        expected += f" {'and ' if low is not None else ''}<= {high}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise invalid(name, expected, value, hint=hint, error=TypeError)
    number = int(value)
    if (low is not None and number < low) or (high is not None and number > high):
        raise invalid(name, expected, value, hint=hint)
    return number


def check_choice(
    name: str, value: _Value, choices: Collection[_Value], *, hint: str = ""
) -> _Value:
    """Return ``value`` if it is one of ``choices``, else raise and name the nearest ones.

    Raises:
        ValueError: ``value`` is not among ``choices``.
    """
    if value in choices:
        return value
    listed = quoted(choices) if len(choices) <= _MAX_NAMED else f"{len(choices)} known names"
    advice = f"{did_you_mean(value, choices)} {hint}"
    raise invalid(name, f"one of {listed}", value, hint=advice.strip())


def did_you_mean(value: object, choices: Iterable[object], *, cutoff: float = 0.5) -> str:
    """The question after a misspelt word, with the nearest of the choices; empty if none is near.

    Example:
        >>> did_you_mean("minlm", ["bilstm", "minilm"], cutoff=0.8)
        "Did you mean 'minilm'?"
    """
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], cutoff=cutoff)
    return f"Did you mean {quoted(near)}?" if near else ""


def quoted(values: Iterable[object]) -> str:
    """List ``values`` for a message, shortened after the first twenty."""
    shown = [repr(value) for value in values]
    if len(shown) > _MAX_NAMED:
        shown = [*shown[:_MAX_NAMED], f"... ({len(shown) - _MAX_NAMED} more)"]
    return ", ".join(shown)
