"""The distributions: what an index shows of them, and the wheel in an environment of its own."""

import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile

import pytest
from paths import ROOT

for needed in ("build", "twine"):
    pytest.importorskip(needed)
index_page = pytest.importorskip("ldam_plugins._index_page").index_page

README = (ROOT / "README.md").read_text(encoding="utf-8")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)]*)\)|(?:src|href|srcset)=\"([^\"]*)\"")


def run(*command, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def targets(markdown):
    return [first or second for first, second in LINK.findall(markdown)]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """The sdist of a copy of the repository, and the wheel of that sdist, without a network."""
    copy = tmp_path_factory.mktemp("copy")
    for part in ("ldam_plugins", "recipes"):
        shutil.copytree(ROOT / part, copy / part, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    run(sys.executable, "-m", "build", "--no-isolation", copy, cwd=copy)
    (wheel,), (sdist,) = copy.glob("dist/*.whl"), copy.glob("dist/*.tar.gz")
    return wheel, sdist


def test_links_and_pictures_of_the_page_work_on_an_index(distributions):
    wheel, sdist = distributions
    assert "PASSED" in run(sys.executable, "-m", "twine", "check", "--strict", wheel, sdist)
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [each for each in archive.namelist() if each.endswith(".dist-info/METADATA")]
        metadata = email.message_from_bytes(archive.read(name))
    page = metadata.get_payload(decode=True).decode()
    assert page.strip() == index_page(README).strip()
    assert targets(page)
    assert all(target.startswith("https://") for target in targets(page))
    assert all(url.split(", ")[1].startswith("https://") for url in metadata.get_all("Project-URL"))


def test_links_of_the_documents_are_there():
    for document in ("README.md", "recipes/README.md", "recipes/results/README.md"):
        path = ROOT / document
        for target in targets(path.read_text(encoding="utf-8")):
            if not target.startswith(("https://", "#")):
                assert (path.parent / target.partition("#")[0]).exists(), f"{document}: {target}"


def test_what_needs_the_repository_becomes_text():
    text = (
        "![p](.github/p.png)\n\n[a](https://x.org) [`b.md`](b.md) [c `d`](e/f.md#g)\n"
        "```\nx[0](y)\n```\n"
    )
    assert index_page(text) == ("[a](https://x.org) `b.md` c `d` (`e/f.md`)\n```\nx[0](y)\n```\n")


def test_the_wheel_works_in_an_environment_of_its_own(distributions, tmp_path):
    """Whose only other packages are those of this one, so that nothing is fetched."""
    wheel, sdist = distributions
    with tarfile.open(sdist) as archive:
        assert any(name.endswith("/recipes/presets/digits_lt.yaml") for name in archive.getnames())
    venv.create(tmp_path / "env", with_pip=False, symlinks=True)
    (site,) = tmp_path.glob("env/lib/python*/site-packages")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel)
    (site / "others.pth").write_text("\n".join(p for p in sys.path if "site-packages" in p))
    python = tmp_path / "env" / "bin" / "python"
    known = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    code = "import ldam_plugins as p, ldam_plugins.recipes as r; print(p.__file__, r.__path__)"
    found = run(python, "-c", code, cwd=tmp_path, env=known)
    assert found.count(str(site)) == 2
    for name in ("a", "b"):
        rows = [f"{i}.jpg,{i % 2},{i % 2 if name == 'b' or i else 1}" for i in range(20)]
        table = "\n".join(["example,label,predicted", *rows])
        (tmp_path / f"{name}.csv").write_text(table)
    command = [python, site / "bin" / "ldam", "compare", "a.csv", "b.csv"]
    assert "Not told from noise: +5.0 points" in run(*command, cwd=tmp_path, env=known)
    assert (tmp_path / "runs" / "comparison" / "report.html").is_file()
