import json
import math
import subprocess
from contextlib import contextmanager
from multiprocessing import Pipe
from threading import Thread
from types import SimpleNamespace

import pytest
import speed
import speed_training
import study_options
import vision_lt
from forked import run_forked
from paths import RECIPES

TINY = {
    "repeats": 1,
    "seconds": 0.0,
    "max_classes": 1000,
    "max_logits": 300_000,
    "max_rows": 10_000,
    "max_image": 32,
    "batch_size": 8,
    "text_batch_size": 2,
    "steps": 2,
    "epochs": 1,
}


def whole(row):
    numbers = [row[key] for key in ("ours_seconds", "peer_seconds", "ratio_median")]
    assert all(math.isfinite(number) and number > 0 for number in numbers)
    assert row["ratio_min"] <= row["ratio_median"] <= row["ratio_max"]
    assert len(row["seconds"]) == 1
    assert row["what"]
    assert row["peer"]


def test_small_sections(tmp_path, capsys):
    file = tmp_path / "speed.json"
    rows = speed.main(study_options.SpeedOptions(**TINY, json=str(file)))
    for row in rows:
        whole(row)
    assert [*dict.fromkeys(row["section"] for row in rows)] == study_options.QUICK
    kept = json.loads(file.read_text())
    assert kept["rows"] == json.loads(json.dumps(rows))
    assert kept["options"]["repeats"] == 1
    assert {"torch", "python"} <= set(kept["versions"])
    printed = capsys.readouterr().out
    assert printed.count("\n") == len(rows) + 2
    assert "LDAM soft, 256 x 1000, bfloat16" in printed


def run_two_forked(log):
    """A ``subprocess.run`` that forks the two processes of a torchrun; other commands it starts."""
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]

    def run(command, *, env, **more):
        if command[1:5] != torchrun:
            return subprocess.run(command, env=env, **more)
        words = command[command.index(str(RECIPES / "vision_lt.py")) :]
        return run_forked(words[0], words[1:], log, environment=env, processes=2)

    return SimpleNamespace(run=run)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_training(tmp_path, monkeypatch):
    monkeypatch.setattr(speed_training, "subprocess", run_two_forked(tmp_path / "log"))
    more = {"compile": False, "dataset": "digits", "text_dataset": "stdlib_docstrings"}
    only = {"only": ["processes", "vision", "text"], "text_model": "bilstm", "max_length": 16}
    rows = speed.main(study_options.SpeedOptions(**TINY, **more, **only))
    for row in rows:
        whole(row)
    assert [row["section"] for row in rows] == ["processes", "vision", "vision", "text"]


@contextmanager
def built_here(build, *given):
    yield build(*given)


def test_what_is_chosen_against_float32(monkeypatch):
    small = {
        "a small one": (
            vision_lt.VisionOptions,
            ["--model", "cifar_resnet20", "--auto_tune", "off", "--mixed_precision", "no"],
        )
    }
    monkeypatch.setattr(speed_training, "AUTO", small)
    monkeypatch.setattr(speed_training, "in_process", built_here)
    options = study_options.SpeedOptions(**TINY, dataset="digits", only=["auto"])
    (row,) = speed.main(options)
    whole(row)
    assert (row["what"], row["note"]) == ("2 steps of a small one", "no")


def test_a_contender_in_a_process_of_its_own():
    here, there = Pipe()
    thread = Thread(target=speed_training.serve, args=(there, constant, 3.5))
    thread.start()
    answers = [here.recv()]
    for _ in range(2):
        here.send(True)
        answers.append(here.recv())
    here.close()
    thread.join(timeout=60)
    assert answers == ["made", 3.5, 3.5]
    assert not thread.is_alive()


def constant(seconds):
    return lambda: seconds, "made"


def test_unknown_section():
    with pytest.raises(ValueError, match=r"`only` must be one of .*Did you mean 'vision'"):
        speed.main(study_options.SpeedOptions(only=["vison"]))
