"""Docstrings of Python's standard library."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from ldam_plugins.data.readers import stdlib_docstrings as docstrings
from ldam_plugins.data.readers.stdlib_docstrings import read_docstrings
from ldam_plugins.data.texts import load_texts


def expect(message, folder, **options):
    with pytest.raises(ValueError, match=message):
        load_texts(folder, **options)


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A small standard library of two modules with enough texts, and others."""
    monkeypatch.setattr(docstrings, "MIN_TEXTS", 5)
    source = "\n".join(f'def f{i}():\n    """Text {i} of {{0}}."""' for i in range(5))
    (tmp_path / "ast.py").write_text(
        f'"""About  trees\n    and nodes."""\nimport antigravity_\n{source.format("ast")}\n'
        'class C:\n    """Shared by two modules."""\n    def m(self):\n        "Text 4 of ast."\n'
    )
    (tmp_path / "json" / "tests").mkdir(parents=True)
    (tmp_path / "json" / "__init__.py").write_text('"""Shared by two modules."""\n')
    (tmp_path / "json" / "a.py").write_text(
        f'if True:\n    def g():\n        """Deep in the module."""\n{source.format("json")}\n'
        'def h():\n    """Two words."""\n'
    )
    (tmp_path / "json" / "tests" / "b.py").write_text('"""Not a text of the library."""\n')
    (tmp_path / "os.py").write_text('"""Too few texts here."""\n')
    (tmp_path / "foreign.py").write_text(source.format("foreign"))
    return tmp_path


def test_docstrings_of_a_library(library):
    train, test, names = read_docstrings(library)
    assert names == ("ast", "json")
    texts = [*train[0], *test[0]]
    labels = np.concatenate([train[1], test[1]])
    found = {
        name: {t for t, y in zip(texts, labels, strict=True) if y == c}
        for c, name in enumerate(names)
    }
    assert found["ast"] == {"About trees and nodes.", *(f"Text {i} of ast." for i in range(5))}
    assert found["json"] == {"Deep in the module.", *(f"Text {i} of json." for i in range(5))}
    assert len(texts) == 12
    assert np.bincount(test[1]).tolist() == [1, 1]
    assert read_docstrings(library)[0][0] == train[0]


def test_docstrings_need_sources(tmp_path):
    with pytest.raises(ValueError, match="sources of Python's standard library"):
        read_docstrings(tmp_path)


def test_embedded_docstrings_import_nothing():
    before = set(sys.modules)
    train, test = load_texts("stdlib_docstrings")
    for name in ("antigravity", "this", "tkinter", "turtle"):
        assert name in before or name not in sys.modules
    assert 4000 < len(train) + len(test) < 9000
    counts = np.bincount(np.array(train["label"]))
    names = train.features["label"].names
    assert len(names) == len(counts) == len(set(test["label"]))
    assert counts.min() >= 16
    assert counts.max() / counts.min() > 10
    assert not set(train["text"]) & set(test["text"])
    assert {"asyncio", "email", "logging"} <= set(names)


@pytest.mark.parametrize(
    "option", [{"text_column": "text"}, {"label_column": "label"}, {"test_split": "test"}]
)
def test_embedded_docstrings_have_no_columns_to_choose(option):
    expect(f"`{next(iter(option))}` must be left out", "stdlib_docstrings", **option)
