"""Files of options: one ``option: value`` a line, as YAML or JSON."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import yaml

from ldam_plugins._validation import invalid

_SCALARS = (str, int, float, type(None))


def read_preset(
    path: str | os.PathLike[str], what: str = "preset", *, mappings: bool = False
) -> dict[str, Any]:
    """Read a YAML or JSON file of options; values are scalars or flat lists of them.

    Files are read as plain data: a tag that would make YAML build an object is an error.

    Args:
        path: The file.
        what: What errors call it.
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
