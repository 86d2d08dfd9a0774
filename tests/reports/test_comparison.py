import json

import pandas as pd
import pytest

from ldam_plugins.reports.comparison import (
    ALL_SAMPLES,
    BALANCED,
    compare,
    read_classifier,
    write_comparison,
)
from ldam_plugins.training.run_dir import METRICS_FILE, PREDICTION_FILES

LABELS = ["cat"] * 30 + ["NA"] * 10
EXAMPLES = [f"{index}.jpg" for index in range(40)]


def predictions(wrong):
    """All right but the rows in ``wrong``."""
    other = {"cat": "NA", "NA": "cat"}
    return [other[label] if row in wrong else label for row, label in enumerate(LABELS)]


def write_table(path, wrong, *, order=1, **columns):
    table = {"example": EXAMPLES, "label": LABELS, "predicted": predictions(wrong), **columns}
    table = pd.DataFrame({name: values for name, values in table.items() if values is not None})
    table.iloc[::order].to_csv(path, index=False)
    return path


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    metrics = {"class_counts": [5, 300], "class_names": ["NA", "cat"]}
    (folder / METRICS_FILE).write_text(json.dumps(metrics))
    write_table(folder / PREDICTION_FILES["test"], range(30, 40))
    return folder


def test_a_run_and_a_file_without_labels_in_another_order(run, tmp_path):
    mine = write_table(tmp_path / "mine.csv", [0, 1], order=-1, label=None, more=list(range(40)))
    table, (found,) = compare([read_classifier(run), read_classifier(mine)])
    assert found.parts[BALANCED].difference == pytest.approx((1 - 2 / 30) / 2)
    assert found.parts[ALL_SAMPLES].difference == pytest.approx(8 / 40)
    parts = {name: (each.gained, each.lost) for name, each in found.parts.items()}
    assert parts["many (> 100)"] == (0, 2)
    assert parts["few (< 20)"] == (10, 0)
    assert list(found.classes) == ["cat", "NA"]  # from head to tail
    assert found.verdict.startswith("Better: +46.7 points of balanced accuracy")
    page = write_comparison(tmp_path / "out", read_classifier(run), table, [found])
    assert "Better: +46.7" in page.read_text()
    changed = pd.read_csv(tmp_path / "out" / "changed.csv", keep_default_na=False)
    assert changed["change"].value_counts().to_dict() == {"gained": 10, "lost": 2}
    assert changed["example"].tolist()[:3] == ["0.jpg", "1.jpg", "30.jpg"]
    classes = pd.read_csv(tmp_path / "out" / "classes.csv", keep_default_na=False)
    assert classes["class"].tolist() == ["cat", "NA"]


def test_what_cannot_be_told_is_said(run, tmp_path):
    mine = write_table(tmp_path / "mine.csv", range(31, 40))
    _, (found,) = compare([read_classifier(run), read_classifier(mine)])
    assert found.verdict.startswith("Not told from noise: +5.0 points")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"predicted": None}, "a table with a column 'predicted'"),
        ({"example": [*EXAMPLES[:39], "0.jpg"]}, "'0.jpg' more than once"),
        ({"predicted": [""] * 40}, "none for '0.jpg'"),
        ({"example": [f"a/{name}" for name in EXAMPLES]}, "40 examples of .* are not in"),
        ({"label": ["cat"] * 40}, "10 examples of .* have another label .* '30.jpg' is 'cat'"),
        ({"predicted": ["dog"] * 40}, "classes of the run"),
    ],
)
def test_tables_that_do_not_fit_are_refused(run, tmp_path, columns, message):
    mine = write_table(tmp_path / "mine.csv", [], **columns)
    with pytest.raises(ValueError, match=message):
        compare([read_classifier(run), read_classifier(mine)])


def test_what_is_compared_must_be_there(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="no predictions in"):
        read_classifier(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="at least two"):
        compare([read_classifier(run)])
    with pytest.raises(ValueError, match="different ones"):
        compare([read_classifier(run)] * 2)
    mine, other = (write_table(tmp_path / name, [], label=None) for name in ("a.csv", "b.csv"))
    with pytest.raises(ValueError, match="with labels in one of them"):
        compare([read_classifier(mine), read_classifier(other)])
