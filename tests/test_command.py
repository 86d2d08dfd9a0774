import re
import sys
import tomllib

import pytest
from paths import PACKAGE, RECIPES, ROOT

from ldam_plugins import command


def test_commands_are_listed_and_there(capsys):
    command.main([])
    listed = capsys.readouterr().out
    for name, (module, about) in command.RECIPES.items():
        assert re.search(rf"^  {name} +{re.escape(about)}$", listed, re.MULTILINE)
        assert (RECIPES / f"{module}.py").exists()


def test_a_command_runs_its_recipe_with_the_other_words(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["ldam", "compare", "--help"])
    monkeypatch.setattr("sys.path", sys.path.copy())
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: compare.py")


def test_an_unknown_command_is_named_with_the_nearest(capsys):
    with pytest.raises(SystemExit) as ended:
        command.main(["visoin"])
    assert ended.value.code == 2
    assert "no command 'visoin'. Did you mean vision?" in capsys.readouterr().err


def test_every_package_and_file_of_the_recipes_is_shipped():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in PACKAGE.rglob("__init__.py")}
    assert set(setup["packages"]) == found | {"ldam_plugins.recipes"}
    assert setup["package-dir"] == {"ldam_plugins.recipes": "recipes"}
    shipped = setup["package-data"]["ldam_plugins.recipes"]
    files = [*RECIPES.rglob("*.yaml"), *RECIPES.rglob("README.md")]
    assert {path.relative_to(RECIPES).as_posix() for path in files} == {
        p.relative_to(RECIPES).as_posix() for glob in shipped for p in RECIPES.glob(glob)
    }
