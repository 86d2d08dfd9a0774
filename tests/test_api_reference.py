"""The pages made from the docstrings have every public name."""

import re
import runpy
import warnings
from importlib import import_module

import pytest
from paths import ROOT

pytest.importorskip("pdoc")
SCRIPT = runpy.run_path(str(ROOT / ".ci" / "docs.py"))
PUBLIC = SCRIPT["PUBLIC"]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("api")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of annotations that pdoc cannot resolve
        assert SCRIPT["write_reference"](folder) == folder / "index.html"
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*.html")}


def test_every_public_name_has_its_place_and_its_docstring(pages):
    for name in PUBLIC:
        page = pages[f"{name.replace('.', '/')}.html"]
        module = import_module(name)
        for each in getattr(module, "__all__", ()):
            assert f'id="{each}"' in page, f"{name} lacks {each}"
            told = (getattr(module, each).__doc__ or "").strip().partition("\n")[0]
            plain = re.search(r"(?<![\w`.])[A-Za-z]{3,} [a-z]{1,9} [a-z]{2,9}(?![\w`.])", told)
            entry = re.sub("<[^>]*>", " ", page.split(f'id="{each}"')[1])
            assert not plain or plain[0] in " ".join(entry.split()), f"{name}.{each}: {told}"


def test_the_first_page_leads_to_all_modules(pages):
    assert "ldam_plugins.html" in pages["index.html"]
    for name in PUBLIC[1:]:
        path = name.replace(".", "/")
        assert f'href="{path}.html"' in pages["ldam_plugins.html"], name


def test_modules_that_readme_imports_from_are_public():
    text = "".join((ROOT / file).read_text() for file in ("README.md", "recipes/README.md"))
    imported = set(re.findall(r"^from (ldam_plugins\S*) import", text, re.MULTILINE))
    assert len(imported) > 3
    assert imported <= {*PUBLIC}


def test_no_markup_of_docstrings_is_left(pages):
    for name, page in pages.items():
        assert not re.search(r":(func|class|meth|mod|data|attr|exc):", page), name
        assert not re.search(r"<code>(~ldam_plugins|\.(long_tail|LDAM|Class))", page), name
