"""Docstrings of Python's standard library, labelled by module: texts that need no network."""

from __future__ import annotations

import ast
import gc
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ldam_plugins._validation import invalid
from ldam_plugins.data.readers.base import Reader, TextRequest, text_table

if TYPE_CHECKING:
    from datasets import Dataset

_NAME = "stdlib_docstrings"
MIN_TEXTS = 20
"""A module with fewer texts is left out."""
MIN_WORDS = 3
"""A docstring with fewer words is left out."""
TEST_SHARE = 0.2
_SEED = 0
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_NOT_LIBRARY = frozenset(("idlelib", "lib2to3", "pydoc_data", "test", "turtledemo"))
_NOT_OWN = frozenset(("test", "tests", "idle_test", "_bundled", "_vendor"))


def _read(request: TextRequest) -> tuple[Dataset, Dataset]:
    train, test, class_names = read_docstrings()
    return text_table(*train, class_names), text_table(*test, class_names)


STDLIB_DOCSTRINGS = Reader(
    name="embedded docstrings",
    layout=f"{_NAME!r}",
    options=("skip_empty",),  # no text is empty
    accepts=lambda request: request.dataset == _NAME,
    read=_read,
    is_name=True,
)


def read_docstrings(
    root: Path | None = None,
) -> tuple[tuple[list[str], np.ndarray], tuple[list[str], np.ndarray], tuple[str, ...]]:
    """Read the docstrings of modules, classes and functions from the sources; import nothing.

    A text is a docstring with its blanks collapsed, its label the top-level module. Texts that
    several modules share tell nothing about the module and are left out; of equal texts in one
    module one stays. The sources of one Python release give the same sets everywhere.

    Args:
        root: Folder of the standard library. Default: that of the running Python.

    Returns:
        Texts and int64 labels to train on, those to test on (a fifth of each module), and the
        modules in the order of their labels.

    Raises:
        ValueError: ``root`` holds no sources, as in stripped installations.
    """
    root = Path(sysconfig.get_path("stdlib")) if root is None else root
    with _no_collection():
        by_module = _distinct({name: list(_texts_of(root, name)) for name in _module_names()})
    kept = {name: texts for name, texts in by_module.items() if len(texts) >= MIN_TEXTS}
    if len(kept) < 2:
        expected = "a folder with the sources of Python's standard library"
        hint = "Install Python with its .py files, or give a hub id or a local folder."
        raise invalid("root", expected, str(root), hint=hint)
    parts: tuple[list[str], list[str]] = ([], [])
    labels: tuple[list[int], list[int]] = ([], [])
    random = np.random.RandomState(_SEED)
    for label, texts in enumerate(kept.values()):
        order = random.permutation(len(texts))
        tested = round(TEST_SHARE * len(texts))
        for index, rows in enumerate((order[tested:], order[:tested])):
            parts[index].extend(texts[row] for row in np.sort(rows))
            labels[index].extend([label] * len(rows))
    train, test = (np.array(values, dtype=np.int64) for values in labels)
    return (parts[0], train), (parts[1], test), tuple(kept)


@contextmanager
def _no_collection() -> Iterator[None]:
    """No search for cycles of garbage, which syntax trees have none of: half the time is its."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _module_names() -> list[str]:
    return sorted(sys.stdlib_module_names - _NOT_LIBRARY)


def _texts_of(root: Path, module: str) -> Iterator[str]:
    files = [root / f"{module}.py", *sorted((root / module).rglob("*.py"))]
    for path in files:
        if path.is_file() and _NOT_OWN.isdisjoint(path.relative_to(root).parts):
            for docstring in _docstrings(ast.parse(path.read_bytes())):
                text = " ".join(docstring.split())
                if text.count(" ") >= MIN_WORDS - 1:
                    yield text


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings in source order; expressions, which hold none, are not looked into."""
    if isinstance(node, _DOCUMENTED) and (docstring := ast.get_docstring(node, clean=False)):
        yield docstring
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.stmt, ast.excepthandler)):
            yield from _docstrings(child)


def _distinct(by_module: dict[str, list[str]]) -> dict[str, list[str]]:
    holders = Counter(text for texts in by_module.values() for text in set(texts))
    return {
        name: [text for text in dict.fromkeys(texts) if holders[text] == 1]
        for name, texts in by_module.items()
    }
