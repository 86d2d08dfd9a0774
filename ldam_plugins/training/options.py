"""Options of a run: dataclass fields with help and limits, and presets as YAML or JSON files."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import field, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from ldam_plugins._validation import check_choice, check_int, check_real, did_you_mean, invalid

__all__ = [
    "COUNT",
    "COUNT_OR_0",
    "NOT_NEGATIVE",
    "POSITIVE",
    "SEED",
    "SHARE",
    "SHARE_BELOW_1",
    "Limits",
    "as_flags",
    "check_choice",
    "check_int",
    "check_limits",
    "check_real",
    "did_you_mean",
    "holds_integers",
    "invalid",
    "option",
    "read_preset",
]

Limits = Mapping[str, Any]
"""Keyword arguments of :func:`check_real` or :func:`check_int` that bound a number."""
POSITIVE: Limits = {"low": 0, "low_open": True}
NOT_NEGATIVE: Limits = {"low": 0}
SHARE: Limits = {"low": 0, "high": 1}
SHARE_BELOW_1: Limits = {"low": 0, "high": 1, "high_open": True}
COUNT: Limits = {"low": 1, "high": 2**31 - 1}
COUNT_OR_0: Limits = {"low": 0, "high": 2**31 - 1}
SEED: Limits = {"low": 0, "high": 2**32 - 1}

_SCALARS = (str, int, float, type(None))


def option(default: Any, description: str, **argparse: Any) -> Any:
    """A field of an options dataclass, for :func:`.parse_flags` and ``HfArgumentParser``.

    Args:
        default: Its value where none is given; a list is copied for every instance.
        description: What ``--help`` says.
        **argparse: Further arguments of ``ArgumentParser.add_argument``, such as ``choices``.
    """
    metadata = {"help": description, **argparse}
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def check_limits(options: Any, limits: Mapping[str, Limits]) -> None:
    """Check the numbers among the fields of a dataclass, and those in its lists; None passes.

    Args:
        options: An instance of the dataclass.
        limits: Bounds by the name of the field. What may be an integer must be one.

    Raises:
        TypeError: a value is not a number, or not an integer where it must be one.
        ValueError: a value is out of bounds.
    """
    hints = get_type_hints(type(options))
    for name in (each.name for each in fields(options) if each.name in limits):
        check = check_int if _takes_integers(hints[name]) else check_real
        value = getattr(options, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None:
                hint = f"Give another --{name} or leave it out."
                check(name, number, **limits[name], hint=hint)


def holds_integers(kind: type[Any], name: str) -> bool:
    """Whether a number in a field of a dataclass must be an integer."""
    return _takes_integers(get_type_hints(kind)[name])


def _takes_integers(hint: Any) -> bool:
    return int in (hint, *get_args(hint))


def as_flags(entries: Mapping[str, Any]) -> list[str]:
    """The command line that sets the same options as the entries of a preset.

    ``ArgumentParser.set_defaults`` would not do: types and choices are checked of flags only, not
    of defaults. A mapping becomes ``name=a,b`` words; an entry that is None is left out.

    Example:
        >>> as_flags({"lr": 0.1, "compile": True, "milestones": [80, 90], "scale": None})
        ['--lr', '0.1', '--compile', 'yes', '--milestones', '80', '90']
    """
    flags = []
    for key, value in entries.items():
        if isinstance(value, dict):
            flags += [f"--{key}", *(f"{name}={','.join(_words(v))}" for name, v in value.items())]
        elif value is not None:
            flags += [f"--{key}", *_words(value)]
    return flags


def _words(value: Any) -> list[str]:
    flat = value if isinstance(value, list) else [value]
    return [("yes" if v else "no") if isinstance(v, bool) else str(v) for v in flat]


def read_preset(
    path: str | os.PathLike[str], what: str = "preset", *, mappings: bool = False
) -> dict[str, Any]:
    """Read a YAML or JSON file of options; values are scalars or flat lists of them.

    Files are read as plain data: a tag that would make YAML build an object is an error.

    Args:
        path: The file.
        what: Its name in errors.
        mappings: Whether a value may also map words to scalars and lists.

    Raises:
        ValueError: there is no such file, it cannot be read, or it holds anything else.
    """
    expected = "a file of `option: value` lines"
    if not Path(path).is_file():
        raise invalid(what, "a file that exists", str(path))
    try:
        entries = yaml.safe_load(Path(path).read_bytes())  # JSON is YAML
    except (OSError, ValueError, RecursionError, TypeError, yaml.YAMLError) as error:
        hint = f"It cannot be read: {error}"
        raise invalid(what, expected, str(path), hint=hint) from error
    if not isinstance(entries, dict):
        raise invalid(what, expected, str(path))
    for key, value in entries.items():
        nested = value if mappings and isinstance(value, dict) else {key: value}
        if not isinstance(key, str) or not all(map(_is_plain, nested, nested.values())):
            # Only the type is shown: YAML aliases can nest lists into lists without end.
            expected = "one word and its value a number, a word or a list of such"
            shown = f"{type(key).__name__} and {type(value).__name__}"
            raise invalid(f"{key!s:.40} in {path}", expected, shown)
    return entries


def _is_plain(key: Any, value: Any) -> bool:
    flat = value if isinstance(value, list) else [value]
    return isinstance(key, str) and all(isinstance(item, _SCALARS) for item in flat)
