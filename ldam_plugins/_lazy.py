"""Names of a package that are imported when they are first asked for (PEP 562)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The ``__getattr__`` and ``__dir__`` of a package whose other names need heavy libraries.

    Args:
        package: ``__name__`` of the package.
        homes: Each lazy name and the module that defines it, or that it is.

    Example: ``__getattr__, __dir__ = lazy_names(__name__, {"load_images": "package.images"})``.
    """

    def get(name: str) -> Any:
        if name in homes:
            module = import_module(homes[name])
            return module if homes[name] == f"{package}.{name}" else getattr(module, name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return get, names
