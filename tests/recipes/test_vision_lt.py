import collections
import csv
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import options as recipe_options
import pandas as pd
import pytest
import timm
import torch
import vision_lt
from accelerate import Accelerator
from image_sets import saved_to_disk
from interruptions import interrupted_at
from paths import RECIPES
from PIL import Image
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from tuned_runs import bf16_wins
from untouchable import without_test_set
from vision_runs import parsed, picture_folder, vision_run

from ldam_plugins import register
from ldam_plugins.data import load_images, long_tail_indices
from ldam_plugins.data.in_memory import InMemoryImages
from ldam_plugins.heads import cosine_heads
from ldam_plugins.integrations.timm.images import image_loader
from ldam_plugins.kernels.batch_norm import FastBatchNorm2d
from ldam_plugins.training import micro_batches
from ldam_plugins.training.environment import choose_precision
from ldam_plugins.training.history import read_history

register()
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
    _, out = run("--eval_test_every", 2, "--many", 70, "--few", 13, report=True)
    left = json.loads((out / "metrics.json").read_text())
    assert left["options"]["loss"] == "ldam"
    assert left["class_counts"] == [120, 92, 71, 55, 43, 33, 25, 20, 15, 12]
    assert {"versions", "device", "train_seconds", "examples_per_second"} <= set(left)
    assert left["mixed_precision"] == choose_precision()
    test = left["test"]
    assert len(test["per_class_accuracy"]) == 10
    keys = {"top1_error", "balanced_accuracy", "worst_class_accuracy", "many", "medium", "few"}
    assert {*keys, "nll", "ece", "macro_f1", "top5_accuracy", "intervals"} <= set(test)
    assert left["group_limits"] == {"many_above": 70, "few_below": 13}
    assert test["few"] == test["per_class_accuracy"][9]
    assert (out / "confusion.csv").read_text().startswith("true,predicted,samples\n0,")
    predictions = pd.read_csv(out / "predictions.csv")
    right = (predictions["label"] == predictions["predicted"]).groupby(predictions["label"]).mean()
    assert right.tolist() == test["per_class_accuracy"]
    assert predictions["example"].tolist()[1] == "row 1 of split test of digits"
    rows = list(csv.DictReader((out / "history.csv").read_text().splitlines()))
    assert [row["stage"] for row in rows] == ["uniform", "reweighted"]
    assert [float(row["lr"]) for row in rows] == pytest.approx([0.1, 0.001])
    assert [bool(row["test_error"]) for row in rows] == [False, True]
    assert (out / "report.html").stat().st_size > 10_000
    assert list(out.glob("*.png"))
    assert "balanced error" in capsys.readouterr().out


def test_a_training_that_diverges_stops_with_that_epoch(run, tmp_path):
    with pytest.raises(ValueError, match=r"`lr` must be .*, got 1e\+30. It is nan in epoch 1"):
        run("--lr", 1e30)
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert read_history(tmp_path / "run") == []


def test_a_second_stage_that_never_begins_is_told(run, caplog):
    _, out = run("--epochs", 1, "--start", 0.8, "--schedule", "drs")
    assert "second stage of 'drs' never begins" in caplog.text
    assert read_history(out)[0]["stage"] == "uniform"


# Three steps an epoch: sharpness-aware from the second one on, mixed up to the last but one.
COMPOSED = ("--sam", 0.05, "--sam_start", 1, "--sam_every", 2, "--cutmix", 1, "--mixup", 1)
COMPOSED += ("--mixup_prior", "remix", "--mix_until", 0.8, "--ema_decay", 0.5)


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--ema_decay", 0.5, "--schedule", "drs", "--mixup", 0.2),
        COMPOSED,
        ("--aug", "randaugment", "--cutout", 8),
        ("--aug", "trivialaugment", "--erasing", 0.5, "--accumulation", 2),
        pytest.param(("--aug", "autoaugment"), marks=pytest.mark.exhaustive),
        ("--augment", "timm", "--aug", "randaugment", "--workers", 1),
        pytest.param(
            ("--augment", "timm", "--aug", "autoaugment", "--workers", 0),
            marks=pytest.mark.exhaustive,
        ),
    ],
    ids=lambda flags: " ".join(map(str, flags[:4])),
)
def test_resumed_run_equals_the_undisturbed_one(run, flags):
    flags = ("--epochs", 3, *flags)
    undisturbed, whole = run(*flags, folder="whole")
    with interrupted_at(vision_lt, "evaluate"):
        run(*flags, "--eval_test_every", 1, folder="broken")
    resumed, broken = run(*flags, "--eval_test_every", 1, "--resume", folder="broken")
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


@pytest.fixture
def races(monkeypatch, tmp_path):
    return bf16_wins(monkeypatch, tmp_path / "cache")


def test_a_run_is_trained_in_what_was_measured(run, races, capsys):
    flags = ("--epochs", 2, "--mixup", 0.2)
    _, given = run(*flags, "--mixed_precision", "bf16", folder="given")
    told = capsys.readouterr().out
    assert "speed: bf16, 1 thread; as given\n" in told
    metrics, out = run(*flags)
    assert "bf16, 1 thread; measured in" in capsys.readouterr().out
    assert metrics["mixed_precision"] == metrics["auto_tune"]["precision"] == "bf16"
    assert metrics["auto_tune"]["seconds"] == {"float32": 0.4, "bf16": 0.2}
    # Nothing is left of the measurement: weights, batch statistics, random numbers.
    left, right = weights(given), weights(out)
    assert all(torch.equal(left[name], right[name]) for name in left)
    kept, _ = run(*flags, "--auto_tune", "off", folder="off")
    assert kept["mixed_precision"] == choose_precision()
    assert kept["auto_tune"]["why"] == "--auto_tune off"


def test_a_resumed_run_keeps_what_was_measured_first(run, races):
    flags = ("--epochs", 3, "--eval_test_every", 1)
    _, whole = run(*flags, folder="whole")
    with interrupted_at(vision_lt, "evaluate"):
        run(*flags, folder="broken")
    races.clear()
    metrics, broken = run(*flags, "--resume", "--auto_tune", "off", folder="broken")
    assert (metrics["auto_tune"]["source"], races) == ("run", [])
    assert metrics["mixed_precision"] == "bf16"
    left, right = weights(whole), weights(broken)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_margins_on_a_linear_head_are_told(run):
    with pytest.warns(UserWarning, match="loss LDAMLoss on a linear head.*0.5 \\* 1 = 0.5"):
        metrics, out = run("--head", "linear", "--epochs", 1, "--start", "0.5")
    assert metrics["options"]["head"] == "linear"
    assert json.loads((out / "metrics.json").read_text())["options"]["head"] == "linear"
    assert "fc.cosine_weight" not in weights(out)
    assert "fc.bias" in weights(out)


@pytest.mark.parametrize("loss", ["ce", "logit_adjusted", "ldam"])
def test_scale_is_that_of_the_cosine_head_under_any_loss(loss):
    options = parsed("--loss", loss, "--head", "cosine", "--scale", 20)
    criterion = options.make_loss([5, 3, 1])
    (head,) = cosine_heads(vision_lt.make_model(options, criterion)).values()
    assert head.scale == 20
    assert getattr(criterion, "scale", 20) == 20
    for other in ("auto", "linear"):
        options = parsed("--loss", "ce", "--head", other, "--scale", 20)
        with pytest.raises(TypeError, match=r"option of 'ce' .*got 'scale'.*--head cosine"):
            options.make_loss([5, 3, 1])


def test_the_scale_of_a_preset_is_that_of_its_cosine_head(tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text("dataset: digits\nloss: ldam\nscale: 10\nmax_margin: 0.3\n")

    def chosen(*flags):
        options = parsed(path, *flags)
        return options.scale, getattr(options.make_loss([5, 3, 1]), "scale", None)

    assert chosen() == (10, 10)
    assert chosen("--loss", "ce") == (None, None)
    assert chosen("--loss", "ce", "--head", "cosine") == (10, None)
    assert chosen("--head", "cosine") == (10, 10)
    assert chosen("--head", "linear") == (None, 1)
    assert chosen("--head", "linear", "--scale", 10) == (10, 10)
    path.write_text("dataset: digits\nloss: ldam\nhead: linear\nscale: 4\n")
    assert chosen() == (4, 4)


def test_what_is_tied_to_the_length_of_the_training():
    steady = ("--sched", "constant", "--start", 60)
    assert parsed(*steady, "--sam", 0.1, "--sam_start", 3).may_grow() == {"epochs": None}
    for late in (("--sam", 0.1, "--sam_start", 0.5), ("--mixup", 1, "--mix_until", 0.5)):
        (why,) = parsed(*steady, *late).may_grow().values()
        assert why.startswith(f"{late[2]} 0.5 is a share of the training, so its epochs so far")


def test_presets_parse_and_can_be_overridden():
    for name, epochs in (("cifar10_lt", 200), ("tiny_imagenet_lt", 120), ("inat2018", 90)):
        parsed = recipe_options.parse_options(
            vision_lt.VisionOptions, [name, "--loss", "ce", "--decay-rate", "0.5"], default=""
        )
        assert (parsed.epochs, parsed.loss, parsed.decay_rate) == (epochs, "ce", 0.5)
        assert parsed.max_margin is None
    inat = recipe_options.parse_options(vision_lt.VisionOptions, ["inat2018"], default="")
    assert (inat.max_margin, inat.decay_milestones) == (0.3, [60, 80])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--loss ldam --gamma 2", r"`gamma` must be left out with --loss ldam, got 2\.0.*focal"),
        ("--loss ce --scale 30", r"`scale` must be left out with --loss ce.*--head cosine\."),
    ],
)
def test_an_option_of_another_loss_is_refused_before_data_are_read(flags, message):
    with pytest.raises(ValueError, match=message):
        parsed(*flags.split()).check_loss()
    parsed("--loss", "ce", "--head", "cosine", "--scale", 30).check_loss()
    parsed("--loss", "focal", "--gamma", 1).check_loss()


def test_paper_schedule_of_the_cifar_preset():
    parsed = recipe_options.parse_options(vision_lt.VisionOptions, ["cifar10_lt"], default="")
    optimizer, scheduler = vision_lt.make_optimizer(
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
    vision_lt.compiled(accelerator, model)
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
        (["--few", "102"], ValueError, r"`few` must be <= many \+ 1 = 101, got 102"),
        (["--num_processes", "2"], RuntimeError, "must be 2, as asked for, got 1"),
        (
            ["--dataset", "no/such-set", "--profile", "exp"],
            (ValueError, ConnectionError),
            "no/such-set",
        ),
        (["--mixed_precision", "fp8"], ValueError, "got 'fp8'"),
        (["--auto_tune", "maybe"], ValueError, "`auto_tune` must be on, off or a .json file"),
        (["--compile", "perhaps"], ValueError, "`compile` must be one of"),
        (["--schedule", "dwr"], ValueError, "Did you mean 'drw'"),
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
        recipe_options.parse_options(vision_lt.VisionOptions, [name], default="")

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
    with pytest.raises(ValueError, match=r"--output_dir, add --resume"):
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
    with pytest.raises(ValueError, match=r"(dog.2|cat.0)\.png.*--skip_corrupt"):
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


# What is made of the options, without a training


@pytest.fixture
def pictures(tmp_path):
    return picture_folder(tmp_path / "pictures")


def made(*flags):
    """Options, data and model of a command line."""
    options = parsed(*flags)
    train, test, counts = vision_lt.load_data(options, show=True)
    return options, train, test, vision_lt.make_model(options, options.make_loss(counts))


# Which samples are kept


@pytest.mark.parametrize(("flags", "told"), [([], 0), (["--workers", "1000"], 1)])
def test_torch_warns_of_workers_that_were_asked_for(flags, told):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        vision_lt.accept_default_workers(parsed(*flags))
        DataLoader([0], num_workers=1000)
    assert len(found) == told


def test_own_data_are_never_cut_unasked(pictures, capsys):
    _, train, _, _ = made("--dataset", pictures, "--model", "cifar_resnet20")
    assert np.bincount(train.labels).tolist() == [9, 4, 6]
    assert capsys.readouterr().out == ""


def test_what_a_profile_leaves_out_is_printed(capsys):
    made("--dataset", "digits", "--profile", "step", "--ratio", 10, "--model", "cifar_resnet20")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][-4:] == ["--profile", "step", "--ratio", "10:"]
    assert [line[1:] for line in lines[3:13]] == [["120", "0"]] * 5 + [["12", "108"]] * 5
    assert " ".join(lines[14]) == "660 of 1200 training samples are kept, 540 are left out."


PROFILES = {
    "cifar10_lt": ("exp", 100),
    "cifar10_lt_fast": ("exp", 100),
    "cifar10_lt_strong": ("exp", 100),
    "cifar100_lt": ("exp", 100),
    "cifar100_lt_strong": ("exp", 100),
    "digits_lt": ("exp", 100),
    "tiny_imagenet_lt": ("exp", 100),
    "inat2018": ("none", 1),
}


@pytest.mark.parametrize("preset", PROFILES)
def test_presets_of_research_sets_say_their_profile(preset):
    entries = recipe_options.read_file(vision_lt.VisionOptions, preset)
    assert (entries["profile"], entries["ratio"]) == PROFILES[preset]
    assert entries["augment"] == ("timm" if preset == "inat2018" else "crop_flip")


def test_the_preset_keeps_the_samples_it_did():
    train, _, _ = vision_lt.load_data(parsed(), show=False)
    whole, _ = load_images("digits")
    assert train.rows.tolist() == whole.rows[long_tail_indices(whole.labels, 100, "exp")].tolist()


def test_a_ratio_without_a_profile_is_refused_or_told(tmp_path, caplog):
    with pytest.raises(ValueError, match=r"`ratio` must be left out .* got 50.0\. Add --profile"):
        parsed("--dataset", "digits", "--ratio", 50)
    (tmp_path / "own.yaml").write_text("dataset: digits\nratio: 50")
    with pytest.raises(ValueError, match=r"`ratio` must be left out without a profile"):
        parsed(tmp_path / "own.yaml")
    assert parsed("digits_lt", "--profile", "none").profile == "none"
    assert not caplog.records
    parsed("--dataset", "digits", "--profile", "none", "--ratio", 50)
    assert "--ratio 50 has no effect" in caplog.text


def test_images_that_cannot_be_read_are_counted(pictures, tmp_path, capsys):
    (tmp_path / "pictures" / "train" / "10" / "03.png").write_bytes(b"no image")
    parts = ["--dataset", pictures, "--model", "cifar_resnet20", "--skip_corrupt"]
    _, train, _, _ = made(*parts)
    assert np.bincount(train.labels).tolist() == [9, 4, 5]
    out = capsys.readouterr().out
    assert out.startswith("Left out: 1 training images that cannot be read (")
    assert out.strip().endswith("03.png).")


# Optimizer steps


@pytest.mark.parametrize("mixup", [0, 0.2])
@pytest.mark.parametrize(("size", "accumulation"), [(500, 1), (500, 3), (400, 2), (1200, 1)])
def test_sampler_and_loop_count_the_same_steps(mixup, size, accumulation):
    flags = ["--dataset", "digits", "--batch_size", size, "--mixup", mixup, "--schedule", "drs"]
    options = parsed(*flags, "--accumulation", accumulation, "--start", 3, "--start_unit", "step")
    accelerator = Accelerator(cpu=True)
    images = InMemoryImages(torch.zeros(1200, 3, 2, 2, dtype=torch.uint8), torch.arange(1200) % 10)
    schedule = options.make_schedule()
    sampler = vision_lt.make_sampler(accelerator, options, schedule, images, 10)
    order = {"sampler": sampler, "drop_last": options.mixes}
    loader = image_loader(images, batch_size=size, **order)
    steps = len(list(micro_batches(accelerator.prepare(loader), accumulation)))
    assert sampler.steps_per_epoch == steps
    assert vision_lt.steps_per_epoch(accelerator, options, 1200) == steps


def test_steps_are_of_the_kinds_that_options_say(run, monkeypatch):
    noted, make = [], vision_lt.make_train_step

    def noting(*arguments):
        step, criterion = make(*arguments), arguments[3]

        def train_step(parts, *, rho):
            soft = {target.is_floating_point() for _, target in parts}
            noted.append((soft, rho, bool((criterion.weight != 1).any())))
            return step(parts, rho=rho)

        return train_step

    monkeypatch.setattr(vision_lt, "make_train_step", noting)
    run(*COMPOSED, "--epochs", 3, "--start", 2, "--batch_size", 64, "--accumulation", 2)
    mixed = [({True}, 0.0, False)] * 4 + [({True}, 0.05, False), ({True}, 0.0, False)] * 2
    # Weighted from step 8 on, of which mixing ends at 0.8 * 12 = 9.6.
    late = [({True}, 0.05, True), ({True}, 0.0, True), ({False}, 0.05, True), ({False}, 0.0, True)]
    assert noted == mixed + late


def test_an_epoch_without_a_whole_batch_is_refused():
    options = parsed("--dataset", "digits", "--batch_size", 1300, "--mixup", 0.2)
    with pytest.raises(ValueError, match=r"smaller --batch_size; there are 1200 training images"):
        vision_lt.steps_per_epoch(Accelerator(cpu=True), options, 1200)


# A held-out part of the training samples


def test_without_a_split_nothing_is_held_out(run):
    metrics, out = run("--epochs", 1, "--start", 0, "--eval_test_every", 0)
    assert not {"validation", "held_out", "selection"} & set(metrics)
    first = (out / "history.csv").read_text().splitlines()[0]
    assert first == "epoch,lr,stage,train_loss,val_error,seconds"


def test_a_split_is_evaluated_in_place_of_the_test_set(run, monkeypatch, capsys):
    evaluate, sizes = vision_lt.evaluate, []

    def noted(accelerator, net, loader, counts, **options):
        sizes.append(sum(len(labels) for _, labels in loader))
        return evaluate(accelerator, net, loader, counts, **options)

    monkeypatch.setattr(vision_lt, "evaluate", noted)
    metrics, out = run("--val_split", 0.2, report=True)
    assert sizes == [97, 97, 97, 540]  # two epochs, then the saved model
    assert list(metrics["class_counts"]) == [96, 74, 57, 44, 34, 26, 20, 16, 12, 10]
    left = json.loads((out / "metrics.json").read_text())
    assert left["held_out"] == {
        "samples": 97,
        "class_counts": [24, 18, 14, 11, 9, 7, 5, 4, 3, 2],
        "classes_without": [],
    }
    assert set(left["validation"]) == set(left["test"])
    rows = list(csv.DictReader((out / "history.csv").read_text().splitlines()))
    assert list(rows[0]) == ["epoch", "lr", "stage", "train_loss", "val_error", "seconds"]
    assert [bool(row["val_error"]) for row in rows] == [True, True]
    assert "97 of 486 training samples are held out for validation (--val_split 0.2)." in (
        capsys.readouterr().out
    )


def test_the_split_follows_the_subset_seed_alone():
    def rows(*flags):
        options = parsed(*flags, "--val_split", 0.1)
        train, _, counts = vision_lt.load_data(options, show=False)
        kept, validation, left = vision_lt.hold_out(options, train, counts, show=False)
        assert sorted([*kept.rows, *validation.rows]) == sorted(train.rows)
        assert left.counts.tolist() == np.bincount(kept.labels).tolist()
        return validation.rows.tolist()

    assert rows("--seed", 1, "--loss", "ce") == rows("--seed", 2)
    assert rows("--subset_seed", 1) != rows()


def test_a_class_with_a_single_image_is_trained_on_and_told(tmp_path, capsys):
    folder = picture_folder(tmp_path / "rare", train=(9, 1, 4))
    options = parsed("--dataset", folder, "--model", "cifar_resnet20", "--val_split", 0.5)
    train, _, counts = vision_lt.load_data(options, show=True)
    train, validation, counts = vision_lt.hold_out(options, train, counts, show=True)
    assert counts.counts.tolist() == [4, 2, 1]
    record = recipe_options.held_out_record(validation.labels, counts)
    assert record["class_counts"].tolist() == [5, 2, 0]
    assert (record["samples"], record["classes_without"]) == (7, ["10"])
    assert "Classes of which the only sample is trained on: 1 (10)." in capsys.readouterr().out


def test_corrupt_test_images_stop_a_run_with_a_split_before_training(run, tmp_path):
    folder = small_folder(tmp_path / "images", [("test", "cat", 3)])
    flags = ["--dataset", folder, "--model", "cifar_resnet20", "--image_size", "8"]
    flags += ["--epochs", "1", "--schedule", "none", "--batch_size", "4", "--val_split", 0.3]
    with pytest.raises(ValueError, match=r"cat.3\.png.*--skip_corrupt"):
        run(*flags, preset=[])
    assert not (tmp_path / "run").exists()
    metrics, _ = run(*flags, "--skip_corrupt", preset=[])
    assert list(metrics["class_counts"]) == [4, 4]


def test_a_run_with_a_split_can_be_resumed(run):
    flags = ("--epochs", 3, "--val_split", 0.2)
    undisturbed, whole = run(*flags, folder="whole")
    with interrupted_at(vision_lt, "evaluate"):
        run(*flags, folder="broken")
    with pytest.raises(ValueError, match=r"val_split: 0\.2 there, None now"):
        run("--epochs", 3, "--eval_test_every", 0, "--resume", folder="broken")
    resumed, broken = run(*flags, "--resume", folder="broken")
    assert resumed["test"] == undisturbed["test"]
    assert resumed["validation"] == undisturbed["validation"]
    errors = [[row["val_error"] for row in read_history(out)] for out in (whole, broken)]
    assert errors[0] == errors[1]
    assert len(errors[0]) == 3


SELECTED = ("--epochs", 6, "--start", 3, "--decay_milestones", 3, "--val_split", 0.2)


def test_a_selected_epoch_is_that_of_the_rule_and_what_is_left(run, monkeypatch):
    evaluate = vision_lt.evaluate

    def scored(accelerator, model, *arguments, **options):  # by how far training is
        found = evaluate(accelerator, model, *arguments, **options)
        updates = next(b for n, b in model.named_buffers() if n.endswith("num_batches_tracked"))
        scores = [0.5, 0.9, 0.4, 0.8, 0.7]
        return {**found, "balanced_accuracy": scores[min(int(updates) // 13, 5) - 1]}

    monkeypatch.setattr(vision_lt, "evaluate", scored)
    flags = (*SELECTED, "--select", "balanced_accuracy", "--patience", 1, "--ema_decay", 0.5)
    undisturbed, whole = run(*flags, folder="whole")
    selection, rows = undisturbed["selection"], read_history(whole)
    assert (selection["epoch"], selection["better_before"]["epoch"]) == (3, 1)
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[3]["val_error"] == pytest.approx(undisturbed["validation"]["top1_error"])
    assert rows[3]["val_error"] != rows[4]["val_error"]
    again, _ = run(*flags, "--resume", folder="whole")
    assert (again["selection"], again["test"]) == (selection, undisturbed["test"])
    assert read_history(whole) == rows
    with interrupted_at(vision_lt, "save_checkpoint", call=5):  # epoch 4 has been scored
        run(*flags, folder="broken")
    resumed, _ = run(*flags, "--resume", folder="broken")
    assert (resumed["selection"], resumed["test"]) == (selection, undisturbed["test"])


def test_the_test_set_selects_nothing(run, monkeypatch):
    """Where the test set is turned round, the same epoch is the best."""
    flags = (*SELECTED, "--select", "nll", "--eval_test_every", 1)
    first, _ = run(*flags, folder="first")
    load = vision_lt.load_images

    def turned(*arguments, **options):
        train, test = load(*arguments, **options)
        test.labels = test.labels[::-1].copy()
        return train, test

    monkeypatch.setattr(vision_lt, "load_images", turned)
    second, _ = run(*flags, folder="second")
    assert first["test"] != second["test"]
    assert first["selection"] == second["selection"]
    assert first["validation"] == second["validation"]


def test_own_folders_are_split_in_three_and_the_split_is_kept(run, tmp_path, capsys):
    """Folders of classes alone, to a report; its parts are those of a resumed and a later run."""
    folder = picture_folder(tmp_path / "pictures", train=(12, 6, 3), size=(8, 8)) + "/train"
    flags = ["--dataset", folder, "--model", "cifar_resnet20", "--image_size", "8"]
    flags += ["--epochs", "1", "--schedule", "none", "--batch_size", "4"]
    divided = ["--test_split", "0.25", "--val_split", "0.2"]
    metrics, out = run(*flags, *divided, preset=[])
    assert list(metrics["class_counts"]) == [7, 1, 3]
    assert metrics["held_out"]["class_counts"].tolist() == [2, 1, 1]
    rows = list(csv.DictReader((out / "split.csv").read_text().splitlines()))
    assert collections.Counter((row["class"], row["part"]) for row in rows) == {
        ("1", "train"): 7,
        ("1", "validation"): 2,
        ("1", "test"): 3,
        ("2", "train"): 1,
        ("2", "validation"): 1,
        ("2", "test"): 1,
        ("10", "train"): 3,
        ("10", "validation"): 1,
        ("10", "test"): 2,
    }
    assert "Held out to test on: 6 of 21 examples, 0.25 of each class." in capsys.readouterr().out
    again, later = run(*flags, "--split_file", out / "split.csv", folder="later", preset=[])
    assert (later / "split.csv").read_bytes() == (out / "split.csv").read_bytes()
    assert again["test"] == metrics["test"]
    assert again["validation"] == metrics["validation"]
    Path(folder, "1", "00.png").unlink()
    with pytest.raises(ValueError, match=r"examples are not those of .*split.csv: 1 are gone"):
        run(*flags, *divided, "--resume", preset=[])


def test_the_split_to_evaluate_can_be_named(pictures, tmp_path):
    os.rename(f"{pictures}/test", f"{pictures}/val")
    picture_folder(tmp_path / "more", size=(8, 8))
    os.rename(tmp_path / "more" / "test", f"{pictures}/test")
    options = parsed("--dataset", pictures, "--val_split", "val")
    notes = vision_lt.DataNotes()
    train, test, counts = vision_lt.load_data(options, False, notes)
    kept, validation, left = vision_lt.hold_out(options, train, counts, False, notes)
    assert (kept, left, options.holds_out) == (train, counts, True)
    assert ("/val/" in validation.describe(0), "/test/" in test.describe(0)) == (True, True)
    options = parsed("--dataset", pictures, "--test_split", "val", "--val_split", "val")
    train, _, counts = vision_lt.load_data(options, False, notes)
    with pytest.raises(ValueError, match="`val_split` must be another split than is tested on"):
        vision_lt.hold_out(options, train, counts, False, notes)


def test_classes_without_a_training_image_are_no_classes(tmp_path, capsys):
    """A set that names more classes than it has in the part that is trained on."""
    given = saved_to_disk(tmp_path / "set", labels=[0, 0, 0, 2, 2, 2])
    options = parsed("--dataset", given["dataset"], "--test_split", "valid")
    train, test, counts = vision_lt.load_data(options, True)
    assert counts.class_names == train.class_names == test.class_names == ("ant", "cat")
    assert (train.labels.tolist(), test.labels.tolist()) == ([0] * 3 + [1] * 3, [0, 1, 1])
    said = capsys.readouterr().out
    assert "Classes without an example to train on are no classes here: 'bee'." in said
    assert "Left out: 1 samples to test on whose class training has not." in said
    given = saved_to_disk(tmp_path / "one", labels=[1] * 6)
    options = parsed("--dataset", given["dataset"], "--test_split", "valid")
    with pytest.raises(ValueError, match="`train_split` must be a part with two classes or more"):
        vision_lt.load_data(options, False)


@pytest.mark.parametrize("more", [[], ["--skip_corrupt"]], ids=" ".join)
def test_a_run_evaluated_on_the_split_leaves_the_test_set_alone(run, monkeypatch, capsys, more):
    monkeypatch.setattr(vision_lt, "load_images", without_test_set(vision_lt.load_images))
    flags = ["--epochs", 1, "--start", 0, "--val_split", 0.2, *more]
    metrics, out = run(*flags, "--evaluate", "validation", report=True)
    assert metrics["test"] is None
    left = json.loads((out / "metrics.json").read_text())
    assert (left["test"], left["held_out"]["samples"]) == (None, 97)
    assert 0 <= left["validation"]["balanced_accuracy"] <= 1
    assert "The test set is left alone. On the samples held out" in capsys.readouterr().out
    assert "the test set was left alone" in (out / "report.html").read_text()
    with pytest.raises(AssertionError, match="the test set was asked"):
        run(*flags, folder="other")


def test_what_is_evaluated_needs_to_be_held_out():
    with pytest.raises(ValueError, match=r"`evaluate` must be left out.*--val_split 0\.2"):
        parsed("--evaluate", "validation")
    flags = ["--evaluate", "validation", "--val_split", "0.2", "--eval_test_every", "1"]
    with pytest.raises(ValueError, match="`eval_test_every` must be 0 beside --evaluate validati"):
        parsed(*flags)
