import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "recipes"))

import results_tables  # noqa: E402

EXPERIMENTS = [folder.name for folder in results_tables.RESULTS.iterdir()]


def test_readme_holds_the_committed_results():
    text = results_tables.README.read_text()
    assert results_tables.fill(text) == text
    shown = re.findall(r"<!-- results: (\w+) -->", text)
    assert sorted(shown) == sorted(EXPERIMENTS)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_results_are_whole_runs(experiment):
    for path in (results_tables.RESULTS / experiment).glob("*.json"):
        run = json.loads(path.read_text())
        assert {"options", "versions", "device", "train_seconds", "test"} <= set(run)
        accuracy = run["test"]["per_class_accuracy"]
        assert run["test"]["balanced_accuracy"] == pytest.approx(np.mean(accuracy))


def test_table_shows_mean_and_range():
    assert results_tables.spread([30.0, 32.04]) == "31.0 (30.0..32.0)"
    assert results_tables.spread([0.1234]) == "0.123"
