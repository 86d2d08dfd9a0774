import json
import math
import subprocess
import sys
from contextlib import contextmanager
from multiprocessing import Pipe
from threading import Thread
from types import SimpleNamespace

import pytest
import speed
import speed_parts
import speed_timing
import speed_training
import study_options
import vision_lt
from forked import run_forked
from options import parse_options
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


def whole(row, unit="seconds"):
    numbers = [row[key] for key in (f"ours_{unit}", f"peer_{unit}", "ratio_median")]
    assert all(math.isfinite(number) and number > 0 for number in numbers)
    assert row["ratio_min"] <= row["ratio_median"] <= row["ratio_max"]
    assert len(row[unit]) == 1
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


@contextmanager
def built_here(build, *given):
    yield build(*given)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_training(tmp_path, monkeypatch):
    monkeypatch.setattr(speed_training, "subprocess", run_two_forked(tmp_path / "log"))
    monkeypatch.setattr(speed_training, "in_process", built_here)
    more = {"compile": False, "dataset": "digits", "text_dataset": "stdlib_docstrings"}
    only = {"only": ["processes", "vision", "text"], "text_model": "bilstm", "max_length": 16}
    rows = speed.main(study_options.SpeedOptions(**TINY, **more, **only))
    for row in rows:
        whole(row)
    assert [row["section"] for row in rows] == ["processes", "vision", "vision", "text"]


def test_fine_tuning():
    more = {"photo_model": "resnet10t", "photo_size": 16, "compile": False}
    (row,) = speed.main(study_options.SpeedOptions(**TINY, **more, only=["fine_tuning"]))
    whole(row)
    assert row["what"] == "2 steps of resnet10t, batch 32"


def test_a_recipe_ends_after_its_first_step(tmp_path):
    script, out = tmp_path / "first.py", tmp_path / "run"
    script.write_text(speed_parts.FIRST_STEP)
    words = [*speed_parts.STEP_OF["vision_lt"], str(RECIPES / "vision_lt.py")]
    done = run_forked(script, [*words, "--quiet", "--output_dir", str(out)], tmp_path / "log")
    assert (done.returncode, done.stdout) == (0, "")
    assert len((out / "history.csv").read_text().splitlines()) == 1  # its columns


def test_quality(monkeypatch):
    def three_epochs(flags):
        preset = parse_options(vision_lt.VisionOptions, flags, default="")
        assert (preset.epochs, preset.schedule, preset.compile) == (3, "none", True)
        return {"class_counts": [6, 2]}, [9.0, 1.0, 2.0]

    monkeypatch.setattr(speed_training, "trained", three_epochs)
    monkeypatch.setattr(speed_training, "usual_steps", lambda *_: lambda: None)
    monkeypatch.setattr(speed_training, "clock", lambda *_: 0.5)
    paper, fast = speed.main(study_options.SpeedOptions(**TINY, only=["quality"]))
    theirs = 0.25 * 8 / 8 * 200  # seconds of a step, steps of an epoch, epochs
    assert paper["seconds"] == [(9 + 1.5 * 199, theirs)]
    assert fast["seconds"] == [(9 + 1.5 * 39, theirs)]
    assert (fast["what"], fast["peer"]) == ("cifar10_lt_fast, 40 epochs", "usual loop, 200 epochs")


def test_growth(monkeypatch):
    monkeypatch.setattr(speed_training, "CLASSES", (2, 5, 100_000))
    monkeypatch.setattr(speed_training, "SIDES", (8, 16, 512))
    rows = speed.main(study_options.SpeedOptions(**TINY, only=["growth"]))
    for row in rows:
        whole(row)
    assert [row["what"] for row in rows] == [
        "2 steps of cifar_resnet32, 5 classes",
        "2 steps of cifar_resnet32, 16 pixels",
    ]


def test_peak(monkeypatch):
    monkeypatch.setattr(speed_training, "SIDE", 64)
    more = {"dataset": "digits", "photo_model": "resnet10t", "photo_size": 16}
    more |= {"text_dataset": "stdlib_docstrings", "text_model": "bilstm", "max_length": 16}
    rows = speed.main(study_options.SpeedOptions(**TINY, **more, only=["peak"]))
    for row in rows:
        whole(row)
        found = dict(part.rsplit(" ", 1) for part in row["note"].split(", "))
        assert list(found) == [*speed_training.KINDS, "rest"]
        assert sum(int(share.rstrip("%")) for share in found.values()) == pytest.approx(100, abs=3)
    conv, fine, text = rows
    assert "convolution 0%" not in conv["note"] + fine["note"]
    assert "convolution 0%" in text["note"]


def test_memory(monkeypatch, capsys):
    asked = []

    def megabytes(options, contender):
        asked.append(contender)
        return 300.0 if contender.startswith("ours") else 200.0

    monkeypatch.setattr(speed_training, "megabytes_of", megabytes)
    rows = speed.main(study_options.SpeedOptions(**TINY, only=["memory"]))
    for row in rows:
        whole(row, "megabytes")
        assert row["ratio_median"] == 1.5
    assert len(asked) == len(set(asked)) == 6
    assert all(callable(getattr(speed_training, name)) for name in asked)
    assert "300 MB" in capsys.readouterr().out


@pytest.mark.parametrize("contender", ["ours_text", "padded_text"])
def test_trainings_whose_memory_is_measured(contender):
    more = {"text_dataset": "stdlib_docstrings", "text_model": "bilstm", "max_length": 16}
    getattr(speed_training, contender)(study_options.SpeedOptions(**TINY, **more))


def test_memory_of_a_process_counts_its_children():
    hold = "block = bytearray(b'x') * (100 << 20)"
    child = f"import time; {hold}; time.sleep(0.5)"
    parent = f"import subprocess; {hold}; subprocess.run([{sys.executable!r}, '-c', {child!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], text=True) as process:
        found = speed_timing.peak_of_tree(process)
    assert 205 < found < 260


def test_memory_of_a_process_that_fails(monkeypatch):
    monkeypatch.setattr(speed_training, "__file__", "/speed_training.py")  # not to be found there
    with pytest.raises(RuntimeError, match=r"ours_text failed: (?s:.)*speed_training"):
        speed_training.megabytes_of(study_options.SpeedOptions(), "ours_text")


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
