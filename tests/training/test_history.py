import os

import numpy as np
import pandas as pd
import pytest
import torch

from ldam_plugins import ClassCounts
from ldam_plugins.training.history import (
    HistoryWriter,
    read_confusion,
    read_history,
    read_metrics,
    run_metrics,
    training_times,
    write_metrics,
)

OPTIONS = {"model": "resnet", "lr": 0.1, "seed": 0, "milestones": [1, 2], "list": None}
METRICS = {
    "options": OPTIONS,
    "versions": {},
    "class_counts": [5, 3],
    "device": "cpu",
    "train_seconds": 1.5,
    "examples_per_second": 2.0,
    "test": {"few": None, "per_class_accuracy": [1.0, None]},
}


def row(epoch, **changed):
    return {
        "epoch": epoch,
        "lr": 0.1,
        "stage": "uniform",
        "train_loss": 1 / 3,
        "val_error": 50.0,
        "test_error": None,
        "seconds": 2.0,
        **changed,
    }


def names(folder):
    return sorted(os.listdir(folder))


def test_history_is_on_disk_after_each_row_and_reads_back(tmp_path):
    history = HistoryWriter(tmp_path)
    rows = [row(0), row(1, stage="a, b", val_error=None), row(2, train_loss=float("inf"))]
    for count, values in enumerate(rows):
        history.append(**values)
        assert read_history(tmp_path) == rows[: count + 1]
    first = (tmp_path / "history.csv").read_text().splitlines()[0]
    assert first == "epoch,lr,stage,train_loss,val_error,seconds"


@pytest.mark.parametrize(("start_epoch", "kept"), [(0, 0), (1, 1), (2, 2), (3, 3), (9, 3)])
def test_resumed_history_drops_the_epochs_to_come(tmp_path, start_epoch, kept):
    history = HistoryWriter(tmp_path)
    for epoch in range(3):
        history.append(**row(epoch))
    resumed = HistoryWriter(tmp_path, start_epoch)
    assert read_history(tmp_path) == [row(epoch) for epoch in range(kept)]
    resumed.append(**row(max(start_epoch, kept), seconds=9.0))
    assert read_history(tmp_path)[-1]["seconds"] == 9.0


def test_resume_without_a_history_begins_one(tmp_path):
    HistoryWriter(tmp_path, 4).append(**row(4))
    assert [values["epoch"] for values in read_history(tmp_path)] == [4]


def test_history_survives_a_torn_last_line(tmp_path):
    history = HistoryWriter(tmp_path)
    history.append(**row(0))
    history.append(**row(1))
    path = tmp_path / "history.csv"
    path.write_bytes(path.read_bytes()[:-3])
    assert read_history(tmp_path) == [row(0)]
    HistoryWriter(tmp_path, 1).append(**row(1))
    assert read_history(tmp_path) == [row(0), row(1)]


def test_history_refuses_an_epoch_twice(tmp_path):
    history = HistoryWriter(tmp_path)
    history.append(**row(1))
    with pytest.raises(ValueError, match="`epoch` must be an integer >= 2, got 1"):
        history.append(**row(1))
    assert len(read_history(tmp_path)) == 1


def test_history_of_another_program_is_refused(tmp_path):
    (tmp_path / "history.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"history.csv` must be the columns of a run"):
        read_history(tmp_path)


def test_metrics_read_back_and_hold_arrays_and_tensors_as_lists(tmp_path):
    counts = {"class_counts": np.array([5, 3]), "class_names": ("ä", "<b>")}
    path = write_metrics(tmp_path, {**METRICS, **counts, "extra": torch.tensor([1.5])})
    assert path == tmp_path / "metrics.json"
    assert read_metrics(tmp_path) == {**METRICS, "class_names": ["ä", "<b>"], "extra": [1.5]}


def test_confusion_goes_into_files_of_its_own_by_name(tmp_path):
    counts = ClassCounts([5, 3, 2], class_names=['a, "b"', "c\nd", "猫"])
    confusion = {"true": [0, 0, 2], "predicted": [0, 2, 1], "samples": [3, 1, 7]}
    other = {"true": [1], "predicted": [1], "samples": [4]}
    metrics = {**METRICS, "class_names": counts.class_names}
    metrics["test"] = {**METRICS["test"], "confusion": confusion}
    metrics["validation"] = {"nll": 1.0, "confusion": other}
    write_metrics(tmp_path, metrics)
    assert metrics["test"]["confusion"] == confusion
    stored = read_metrics(tmp_path)
    assert (stored["test"], stored["validation"]) == (METRICS["test"], {"nll": 1.0})
    assert read_confusion(tmp_path, counts) == confusion
    assert read_confusion(tmp_path, counts, "validation") == other
    table = pd.read_csv(tmp_path / "confusion.csv").pivot(
        index="true", columns="predicted", values="samples"
    )
    assert table.loc['a, "b"', "猫"] == 1
    unnamed = ClassCounts([5, 3, 2])
    write_metrics(tmp_path, {**metrics, "class_names": None})
    assert read_confusion(tmp_path, unnamed) == confusion
    with pytest.raises(
        ValueError, match=r"confusion.csv` must be the confusion matrix of the run's"
    ):
        read_confusion(tmp_path, counts)
    (tmp_path / "confusion.csv").unlink()
    assert read_confusion(tmp_path, unnamed) is None


@pytest.mark.parametrize("missing", METRICS)
def test_metrics_must_be_complete(tmp_path, missing):
    partial = {key: value for key, value in METRICS.items() if key != missing}
    with pytest.raises(ValueError, match=f"`metrics` must be complete, with '{missing}'"):
        write_metrics(tmp_path, partial)
    assert names(tmp_path) == []


@pytest.mark.parametrize("number", [float("nan"), float("inf"), np.float64("-inf")])
def test_metrics_are_strict_json_and_a_bad_number_is_named(tmp_path, number):
    write_metrics(tmp_path, METRICS)
    bad = {**METRICS, "test": {"nll": [1.0, number]}}
    with pytest.raises(ValueError, match=r"`metrics\['test'\]\['nll'\]\[1\]` must be a finite"):
        write_metrics(tmp_path, bad)
    assert read_metrics(tmp_path) == METRICS


def test_metrics_of_a_run_with_the_times_of_its_history(tmp_path):
    history = HistoryWriter(tmp_path)
    for epoch in range(3):
        history.append(**row(epoch))
    counts = ClassCounts([5, 3], class_names=["a", "b"])
    metrics = run_metrics(options=OPTIONS, class_counts=counts, device="cpu", test={}, processes=2)
    times = training_times(tmp_path, counts.total)
    assert times == {"train_seconds": 6.0, "examples_per_second": 8 * 3 / 6}
    write_metrics(tmp_path, metrics | times)
    kept = read_metrics(tmp_path)
    assert (kept["class_counts"], kept["class_names"]) == ([5, 3], ["a", "b"])
    assert kept["processes"] == 2
    assert kept["device"].startswith("cpu (")


def test_a_history_with_the_test_error(tmp_path):
    history = HistoryWriter(tmp_path, test_error=True)
    rows = [row(0, val_error=None, test_error=40.0), row(1)]
    for values in rows:
        history.append(**values)
    first = (tmp_path / "history.csv").read_text().splitlines()[0]
    assert first == "epoch,lr,stage,train_loss,val_error,test_error,seconds"
    assert read_history(tmp_path) == rows
    with pytest.raises(
        ValueError, match=r"`test_error` must be as in .*history.csv, which has the"
    ):
        HistoryWriter(tmp_path, 1)
    HistoryWriter(tmp_path, 1, test_error=True).append(**row(1, test_error=1.0))
    assert read_history(tmp_path) == [rows[0], row(1, test_error=1.0)]


def test_a_history_without_a_test_error_takes_none(tmp_path):
    history = HistoryWriter(tmp_path)
    with pytest.raises(ValueError, match=r"`test_error` must be None .*test_error=True"):
        history.append(**row(0, test_error=5.0))
    assert read_history(tmp_path) == []


def test_a_history_of_an_earlier_version_is_read(tmp_path):
    lines = "epoch,lr,stage,train_loss,test_error,seconds\n0,0.1,uniform,1.5,40.0,2.0\n"
    (tmp_path / "history.csv").write_text(lines)
    (only,) = read_history(tmp_path)
    assert (only["val_error"], only["test_error"]) == (None, 40.0)
