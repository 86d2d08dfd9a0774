import csv
import json
import os
import subprocess
import sys

import options as recipe_options
import pytest
import timm
import torch
import vision_lt
import vision_setup
from accelerate import Accelerator
from paths import RECIPES
from PIL import Image
from safetensors.torch import load_file
from vision_runs import vision_run

from ldam_plugins.kernels.batch_norm import FastBatchNorm2d
from ldam_plugins.training.environment import choose_precision

TINY = ["--epochs", "2", "--start", "1", "--ratio", "10", "--decay_milestones", "1"]


@pytest.fixture
def run(tmp_path, capsys):
    """Run the vision recipe in this process; returns its metrics and its folder."""

    def start(*flags, folder="run", preset=TINY, report=False):
        out = tmp_path / folder
        return vision_run(out, *preset, *flags, report=report), out

    return start


def weights(out):
    (newest,) = (out / "checkpoints").iterdir()
    return load_file(newest / "model.safetensors")


def test_leaves_what_is_promised(run, capsys):
    _, out = run("--eval_every", 2, report=True)
    left = json.loads((out / "metrics.json").read_text())
    assert left["options"]["loss"] == "ldam"
    assert left["class_counts"] == [120, 92, 71, 55, 43, 33, 25, 20, 15, 12]
    assert {"versions", "device", "train_seconds", "examples_per_second"} <= set(left)
    assert left["mixed_precision"] == choose_precision()
    test = left["test"]
    assert len(test["per_class_accuracy"]) == 10
    keys = {"top1_error", "balanced_accuracy", "worst_class_accuracy", "many", "medium", "few"}
    assert {*keys, "nll", "ece"} <= set(test)
    rows = list(csv.DictReader((out / "history.csv").read_text().splitlines()))
    assert [row["stage"] for row in rows] == ["uniform", "reweighted"]
    assert [float(row["lr"]) for row in rows] == pytest.approx([0.1, 0.001])
    assert [bool(row["test_error"]) for row in rows] == [False, True]
    assert (out / "report.html").stat().st_size > 10_000
    assert list(out.glob("*.png"))
    assert "balanced accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [(), ("--ema_decay", 0.5, "--schedule", "drs", "--mixup", 0.2)])
def test_resumed_run_equals_the_undisturbed_one(run, monkeypatch, flags):
    flags = ("--epochs", 3, *flags)
    undisturbed, whole = run(*flags, folder="whole")
    evaluate, calls = vision_lt.evaluate, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(vision_lt, "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            run(*flags, "--eval_every", 1, folder="broken")
    resumed, broken = run(*flags, "--eval_every", 1, "--resume", folder="broken")
    assert resumed["test"] == undisturbed["test"]
    left, right = weights(whole), weights(broken)
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert len((broken / "history.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    "flags",
    [
        ("--loss", "focal", "--schedule", "rw", "--gamma", 1),
        ("--loss", "logit_adjusted", "--schedule", "none", "--smoothing", 0.1),
        ("--loss", "ldam_hinge", "--schedule", "rs", "--cutmix", 1),
        ("--loss", "vector_scaling", "--schedule", "drs", "--accumulation", 3),
        ("--loss", "ce", "--head", "cosine", "--clip_grad", 1, "--mixed_precision", "bf16"),
        ("--profile", "step", "--report_to", "tensorboard", "--opt", "adamw", "--lr", 1e-3),
        ("--memory_limit", 0, "--workers", 1, "--model", "test_vit", "--image_size", 32),
    ],
    ids=lambda flags: flags[1],
)
def test_every_way_of_training_runs(run, flags):
    metrics, out = run(*flags, "--epochs", 1, "--start", "0.5", "--ratio", 20)
    assert 0 <= metrics["test"]["top1_error"] <= 100
    assert (out / "model" / "model.safetensors").exists()


def test_presets_parse_and_can_be_overridden():
    for name, epochs in (("cifar10_lt", 200), ("tiny_imagenet_lt", 120), ("inat2018", 90)):
        parsed = recipe_options.parse_options(
            vision_setup.VisionOptions, [name, "--loss", "ce", "--decay-rate", "0.5"], default=""
        )
        assert (parsed.epochs, parsed.loss, parsed.decay_rate) == (epochs, "ce", 0.5)
        assert parsed.max_margin is None
    inat = recipe_options.parse_options(vision_setup.VisionOptions, ["inat2018"], default="")
    assert (inat.max_margin, inat.decay_milestones) == (0.3, [60, 80])


def test_paper_schedule_of_the_cifar_preset():
    parsed = recipe_options.parse_options(vision_setup.VisionOptions, ["cifar10_lt"], default="")
    optimizer, scheduler = vision_setup.make_optimizer(
        parsed, torch.nn.Linear(2, 2), torch.device("cpu")
    )
    assert not optimizer.defaults["nesterov"]
    rates = []
    for epoch in range(200):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[:6] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1])
    assert [rates[e] for e in (159, 160, 179, 180)] == pytest.approx([0.1, 1e-3, 1e-3, 1e-5])
    assert parsed.make_schedule().start_step(200, 1) == 160


def test_batch_norm_is_compiled_fast_on_a_cpu():
    accelerator, model = Accelerator(), timm.create_model("cifar_resnet20")
    vision_setup.compiled(accelerator, model)
    fast = [isinstance(layer, FastBatchNorm2d) for layer in model.modules()]
    assert sum(fast) == (19 if accelerator.device.type == "cpu" else 0)


def small_folder(root, corrupt=()):
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(6):
                path = root / split / name / f"{i}.png"
                Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(path)
                if (split, name, i) in corrupt:
                    path.write_bytes(b"no image")
    return str(root)


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (["--loss", "ladm"], ValueError, "Did you mean 'ldam'"),
        (["--model", "cifar_resnet23"], ValueError, r"Did you mean .*'cifar_resnet20'"),
        (["--loss", "ce", "--tau", "1"], TypeError, "got 'tau'"),
        (["--ratio", "0.5"], ValueError, "`ratio`"),
        (["--ratio", "5000"], ValueError, "at most 120"),
        (["--start", "7"], ValueError, "`start` must be before the end of the training"),
        (["--start", "soon"], ValueError, "`start` must be a share .*got 'soon'"),
        (["--num_processes", "2"], RuntimeError, "must be 2, as asked for, got 1"),
        (
            ["--dataset", "no/such-set", "--profile", "exp"],
            (ValueError, ConnectionError),
            "no/such-set",
        ),
        (["--mixed_precision", "fp8"], SystemExit, None),
        (["--schedule", "dwr"], SystemExit, None),
        (["--no_such_flag", "1"], ValueError, "no_such_flag"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_leaves_nothing_behind(run, tmp_path, flags, error, message):
    with pytest.raises(error, match=message):
        run(*flags)
    assert not (tmp_path / "run").exists()


def test_bad_presets_are_refused(tmp_path):
    def parse(name):
        recipe_options.parse_options(vision_setup.VisionOptions, [name], default="")

    with pytest.raises(ValueError, match="Did you mean 'cifar10_lt'"):
        parse("cifar_lt")
    with pytest.raises(ValueError, match="a file that exists"):
        parse(str(tmp_path / "none.yaml"))
    (tmp_path / "typo.yaml").write_text("epoch: 3")
    with pytest.raises(ValueError, match=r"'epoch'\. Did you mean 'epochs'"):
        parse(str(tmp_path / "typo.yaml"))
    (tmp_path / "list.json").write_text("[1]")
    with pytest.raises(ValueError, match="option: value"):
        parse(str(tmp_path / "list.json"))


def test_second_run_in_one_folder_is_refused(run):
    run()
    with pytest.raises(ValueError, match=r"--output_dir, or add --resume"):
        run()
    with pytest.raises(ValueError, match=r"model: 'cifar_resnet20' there, 'cifar_resnet32' now"):
        run("--resume", "--model", "cifar_resnet32")


def test_classes_of_a_resumed_run_must_be_the_same(run, tmp_path):
    folder = small_folder(tmp_path / "images")
    flags = ["--dataset", folder, "--model", "cifar_resnet20", "--image_size", "8"]
    flags += ["--epochs", "1", "--schedule", "none", "--batch_size", "4"]
    run(*flags, preset=[])
    for split in ("train", "test"):
        os.rename(f"{folder}/{split}/cat", f"{folder}/{split}/elk")
    with pytest.raises(ValueError, match=r"class_names: \['cat', 'dog'\] there, \['dog', 'elk'\]"):
        run(*flags, "--resume", preset=[])


def test_corrupt_image_is_named_or_skipped(run, tmp_path):
    corrupt = [("train", "dog", 2), ("test", "cat", 0)]
    folder = small_folder(tmp_path / "images", corrupt)
    flags = ["--dataset", folder, "--model", "cifar_resnet20", "--image_size", "8"]
    flags += ["--epochs", "1", "--profile", "none", "--schedule", "none", "--batch_size", "4"]
    with pytest.raises(ValueError, match=r"dog.2\.png.*--skip_corrupt"):
        run(*flags, preset=[])
    assert not (tmp_path / "run").exists()
    metrics, _ = run(*flags, "--skip_corrupt", preset=[])
    assert list(metrics["class_counts"]) == [6, 5]


def test_two_processes_train_together(tmp_path):
    out = tmp_path / "two"
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", "2", "--main_process_port", "0"]
    command += [str(RECIPES / "vision_lt.py"), *TINY, "--num_processes", "2"]
    done = subprocess.run(
        [*command, "--output_dir", str(out)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["processes"] == 2
    assert (out / "model" / "model.safetensors").exists()
