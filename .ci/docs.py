"""The API reference as static pages, from the docstrings.

    pip install -e ".[docs]" && python .ci/docs.py [FOLDER]

FOLDER is build/api unless told; open its index.html.
"""

from __future__ import annotations

import inspect
import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pdoc
import pdoc.docstrings
import pdoc.render

PUBLIC = (
    "ldam_plugins",
    *(f"ldam_plugins.{name}" for name in ("counts", "schedules", "losses", "heads", "metrics")),
    *(f"ldam_plugins.{name}" for name in ("data", "samplers", "training", "posthoc", "reports")),
    "ldam_plugins.reports.model_card",
    "ldam_plugins.kernels.batch_norm",
    "ldam_plugins.integrations.timm",
    "ldam_plugins.integrations.transformers",
    "ldam_plugins.integrations.hf_evaluate",
    "ldam_plugins.integrations.hub",
)
"""The modules that users import from."""
_convert = pdoc.docstrings.convert


def load(name: str) -> ModuleType:
    """Import a module with the names that it would import when they are first asked for."""
    module = import_module(name)
    for each in getattr(module, "__all__", ()):
        setattr(module, each, getattr(module, each))
    return module


def convert(text: str, *how: Any) -> str:
    """As pdoc converts docstrings, but names in roles are shown without ``.`` and ``~``."""
    return _convert(re.sub(r"(:\w+:`)[.~]", r"\1", text), *how)


def write_reference(folder: Path) -> Path:
    """Write the pages; returns that to begin with."""
    package, *modules = map(load, PUBLIC)
    firsts = {each.__name__: inspect.getdoc(each).partition("\n")[0] for each in modules}
    listed = "\n".join(f"* `{name}`: {first}" for name, first in firsts.items())
    package.__doc__ = f"{package.__doc__}\n\n{listed}\n"
    pdoc.docstrings.convert = convert
    version = import_module("ldam_plugins").__version__
    pdoc.render.configure(
        docformat="google", show_source=False, footer_text=f"ldam_plugins {version}"
    )
    pdoc.pdoc(*PUBLIC, output_directory=folder)
    return folder / "index.html"


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "build" / "api"
    print(write_reference(target))
