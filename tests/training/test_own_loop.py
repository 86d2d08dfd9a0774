"""The loop in the docstring of ``ldam_plugins.training`` does what it says."""

import signal
import textwrap

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import ldam_plugins.training as training


@pytest.fixture
def own_loop():
    """The function of the docstring, and what it is given but for the folder."""
    code = training.__doc__.split(".. code-block:: python\n")[1]
    names = {}
    exec(textwrap.dedent(code), names)
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 40 + [1] * 10 + [2] * 5)
    centres = 3 * torch.eye(3)
    noise = torch.randn(len(labels), 3, generator=generator)
    train_set = TensorDataset(centres[labels] + noise, labels)
    test_labels = torch.arange(30) % 3
    test_set = TensorDataset(centres[test_labels], test_labels)

    def run(folder, epochs=4):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
        given = {"epochs": epochs, "batch_size": 16}
        return names["train"](model, train_set, labels.tolist(), test_set, folder, **given)

    return run


def test_it_leaves_the_files_of_a_run(own_loop, tmp_path):
    test = own_loop(tmp_path)
    metrics = training.read_metrics(tmp_path)
    assert metrics["test"]["top1_error"] == test["top1_error"] < 50
    assert metrics["class_counts"] == [40, 10, 5]
    rows = training.read_history(tmp_path)
    assert [row["stage"] for row in rows] == ["uniform"] * 3 + ["reweighted"]
    assert (tmp_path / "report.html").exists()
    assert own_loop(tmp_path) == test  # done already


def test_it_ends_after_sigterm_and_goes_on_as_if_nothing_had_been(own_loop, tmp_path, monkeypatch):
    whole = own_loop(tmp_path / "whole")
    append, calls = training.HistoryWriter.append, []

    def strike(self, **row):
        calls.append(row)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        append(self, **row)

    with monkeypatch.context() as patch:
        patch.setattr(training.HistoryWriter, "append", strike)
        with pytest.raises(SystemExit) as ended:
            own_loop(tmp_path / "broken")
    assert ended.value.code == training.PREEMPTED
    assert training.newest_checkpoint(tmp_path / "broken")[1] == 2
    assert own_loop(tmp_path / "broken") == whole
    losses = [
        [row["train_loss"] for row in training.read_history(tmp_path / name)]
        for name in ("whole", "broken")
    ]
    assert losses[0] == losses[1]


def test_every_public_name_is_there():
    for name in training.__all__:
        assert getattr(training, name) is not None
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = training.no_such_name
