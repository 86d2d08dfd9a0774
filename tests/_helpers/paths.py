"""Where things are, for tests in whatever folder."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "ldam_plugins"
RECIPES = ROOT / "recipes"
TESTS = ROOT / "tests"
HELPERS = TESTS / "_helpers"
DATA = ROOT.parent / "shared" / "data"
"""Real data, where they are at hand."""
