"""Print the lower bounds that pyproject.toml declares as exact versions: constraints for pip.

    python .ci/minima.py > constraints.txt

A requirement without a lower bound is left to pip. Of two bounds of one package the higher counts.
"""

import tomllib  # Python 3.11 or newer
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def minima(project: dict) -> dict[str, Version]:
    """The lower bound of every package in the dependencies and extras of a project table.

    Raises:
        ValueError: a requirement has another clause than ``>=``: its least version is not certain.
    """
    extras = project["optional-dependencies"].values()
    texts = [*project["dependencies"], *(text for extra in extras for text in extra)]
    found: dict[str, Version] = {}
    for requirement in map(Requirement, texts):
        name = canonicalize_name(requirement.name)
        for clause in requirement.specifier:
            if clause.operator != ">=":
                raise ValueError(f"the bound of a requirement must be >=, got {requirement}")
            found[name] = max(found.get(name, Version("0")), Version(clause.version))
    return found


if __name__ == "__main__":
    bounds = minima(tomllib.loads(PYPROJECT.read_text())["project"])
    print("\n".join(f"{name}=={bound}" for name, bound in sorted(bounds.items())))
