"""The mode of .ci/run that tests at the lower bounds of pyproject.toml."""

import importlib.util
import re
import subprocess
import tomllib
from importlib.metadata import version

import pytest
from packaging.version import Version
from paths import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def load_script():
    spec = importlib.util.spec_from_file_location("minima", ROOT / ".ci" / "minima.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SCRIPT = load_script()


def test_every_dependency_has_a_bound_and_every_bound_is_pinned():
    found = {name: str(bound) for name, bound in SCRIPT.minima(PROJECT).items()}
    extras = PROJECT["optional-dependencies"].values()
    for text in [*PROJECT["dependencies"], *(text for extra in extras for text in extra)]:
        bounded = re.fullmatch(r"([\w.-]+)>=([\d.]+)", text)
        if bounded:
            assert found.pop(bounded[1].lower(), bounded[2]) == bounded[2]
        else:
            assert text not in PROJECT["dependencies"]
    assert found == {}


def test_the_higher_of_two_bounds_counts_and_names_are_one():
    project = {
        "dependencies": ["Some_Thing>=1.9", "other>=2"],
        "optional-dependencies": {"a": ["some-thing>=1.10", "unbounded"], "b": ["other>=1.5"]},
    }
    assert SCRIPT.minima(project) == {"some-thing": Version("1.10"), "other": Version("2")}


@pytest.mark.parametrize("clause", ["<3", "==2.*", "~=2.1", ">2"])
def test_a_bound_that_names_no_least_version_is_refused(clause):
    project = {"dependencies": [f"thing{clause}"], "optional-dependencies": {}}
    with pytest.raises(ValueError, match=re.escape(f"must be >=, got thing{clause}")):
        SCRIPT.minima(project)


def test_these_tests_run_at_the_bounds_or_above():
    for name, bound in SCRIPT.minima(PROJECT).items():
        assert Version(version(name)) >= bound, name


def run_ci(folder, *arguments):
    """What ``.ci/run`` calls, with programs in place of pip and its like that note their names."""
    for name in ("python3", "python", "pip", "pytest", "ruff", "mypy"):
        (folder / "bin").mkdir(exist_ok=True)
        program = folder / "bin" / name
        program.write_text(f'#!/bin/sh\necho {name} "$@" >> {folder}/calls\n')
        program.chmod(0o755)
    (folder / ".ci").mkdir()
    (folder / ".ci" / "run").write_text((ROOT / ".ci" / "run").read_text())
    for environment in (".venv", ".venv-minima"):
        (folder / environment / "bin").mkdir(parents=True)
        (folder / environment / "bin" / "activate").write_text(f"PATH={folder}/bin:$PATH\n")
    command = ["bash", str(folder / ".ci" / "run"), *arguments]
    subprocess.run(command, check=True, timeout=60)
    return (folder / "calls").read_text().splitlines()


def test_the_minima_mode_installs_under_the_constraints_and_tests(tmp_path):
    *_, install, tests = run_ci(tmp_path, "minima")
    assert install == "pip install -q -c .venv-minima/constraints.txt -e .[test]"
    assert tests == "pytest -W default"
    assert (tmp_path / ".venv-minima" / "constraints.txt").exists()


def test_without_it_everything_runs_at_the_newest_versions(tmp_path):
    calls = run_ci(tmp_path)
    assert [call.split()[0] for call in calls] == ["pip", "pytest", "ruff", "ruff", "mypy"]
    assert not any("constraints" in call for call in calls)
