"""The last step of a training of images: the classifier re-balanced and calibrated, then saved."""

import json

import numpy as np
import pytest
import timm
import torch
import vision_lt
from interruptions import interrupted_at
from safetensors.torch import load_file
from vision_runs import parsed, vision_run

from ldam_plugins.posthoc import last_step

TINY = ["--epochs", "1", "--ratio", "10", "--start", "0.5", "--loss", "ce", "--schedule", "none"]
TINY += ["--lr", "0.05", "--decay_milestones", "1", "--subset_seed", "1"]
WAYS = {
    "average": ["--ema_decay", "0.5"],
    "best epoch": ["--epochs", "2", "--select", "balanced_accuracy", "--val_split", "0.2"],
    "deferred weights": ["--schedule", "drw", "--loss", "ldam", "--head", "linear"],
}


@pytest.fixture
def run(tmp_path):
    def start(*flags, folder="run", report=False):
        out = tmp_path / folder
        return vision_run(out, *TINY, *flags, report=report), out

    return start


def saved_weights(out):
    return load_file(out / "model" / "model.safetensors")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:the model errs on:UserWarning")
def test_what_is_saved_is_the_trained_model_adjusted(run, way):
    plain, before = run(*WAYS[way], folder="plain")
    metrics, after = run(*WAYS[way], "--rebalance", "logit_adjustment:1")
    old, new = saved_weights(before), saved_weights(after)
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"fc.bias"}
    counts = np.array(metrics["class_counts"])
    shift = -np.log(counts / counts.sum()) - np.log(len(counts))
    np.testing.assert_allclose((new["fc.bias"] - old["fc.bias"]).numpy(), shift, atol=1e-6)
    held_out = "--val_split" in WAYS[way]
    done = metrics["rebalance"]
    assert (done["method"], done["strength"], done["asked"]) == (
        "logit_adjustment",
        1.0,
        "logit_adjustment:1",
    )
    assert done["chosen_on"] == ("validation" if held_out else "train")
    assert done["measured_on"] == "test"
    # Before is the run without the step, after is what is saved.
    assert metrics["before"]["per_class_accuracy"] == plain["test"]["per_class_accuracy"]
    gain = metrics["test"]["balanced_accuracy"] - plain["test"]["balanced_accuracy"]
    assert done["differences"]["balanced_accuracy"][0] == pytest.approx(gain, abs=1e-9)
    assert "calibration" in metrics["test"]
    assert not (after / ".features").exists()


def test_both_steps_and_the_report(run):
    flags = ["--val_split", "0.2", "--rebalance", "class_means", "--calibrate"]
    metrics, out = run(*flags, report=True)
    left = json.loads((out / "metrics.json").read_text())
    done = left["rebalance"]
    assert (done["method"], done["calibrate"]) == ("class_means", "temperature")
    assert done["temperature"] == metrics["rebalance"]["temperature"] != 1
    for part in ("before", "test"):
        calibration = left[part]["calibration"]
        assert {"nll", "ece", "classwise_ece"} == set(calibration["intervals"])
        assert sum(calibration["bins"]["share"]) == pytest.approx(1)
    # The classes of this test set are of one size: the target mix is its own.
    assert left["test"]["ece"] == pytest.approx(left["test"]["calibration"]["ece"], abs=1e-5)
    assert left["test"]["calibration"]["nll"] < left["before"]["calibration"]["nll"]
    page = (out / "report.html").read_text()
    for told in ("The last step: before and after", "class_means", "The logits were divided by"):
        assert told in page
    assert (out / "class_change.png").exists()
    assert (out / "reliability_change.png").exists()


def test_a_temperature_alone_keeps_the_predictions(run):
    flags = ["--val_split", "0.2"]
    plain, before = run(*flags, folder="plain")
    metrics, after = run(*flags, "--calibrate")
    temperature = metrics["rebalance"]["temperature"]
    old, new = saved_weights(before), saved_weights(after)
    for name in ("fc.weight", "fc.bias"):
        torch.testing.assert_close(new[name] * temperature, old[name])
    assert metrics["test"]["per_class_accuracy"] == plain["test"]["per_class_accuracy"]
    assert metrics["validation"]["nll"] < plain["validation"]["nll"]


def test_a_cosine_head_is_folded_and_no_test_set_is_read(run):
    flags = ["--loss", "ldam", "--schedule", "drw", "--val_split", "0.2", "--calibrate", "class"]
    metrics, out = run(*flags, "--rebalance", "tau_norm:0", "--evaluate", "validation")
    assert metrics["test"] is None
    assert metrics["rebalance"]["measured_on"] == "cross-fitting"
    assert len(metrics["rebalance"]["scales"]) == 10
    assert "calibration" in metrics["validation"]
    model = timm.create_model(f"local-dir:{out / 'model'}", pretrained=True)
    assert type(model.get_classifier()) is torch.nn.Linear


def test_a_run_that_was_stopped_in_the_step_goes_on(run):
    flags = ["--val_split", "0.2", "--rebalance", "auto", "--calibrate"]
    whole, left = run(*flags, folder="whole")
    with interrupted_at(last_step, "rebalance_head", call=1):
        run(*flags, folder="broken")
    assert not (left.parent / "broken" / "model").exists()
    resumed, right = run(*flags, "--resume", folder="broken")
    assert resumed["rebalance"] == whole["rebalance"]
    assert resumed["test"] == whole["test"]
    old, new = saved_weights(left), saved_weights(right)
    assert all(torch.equal(old[name], new[name]) for name in old)
    assert not (right / ".features").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--calibrate"], r"`calibrate` must be none without held-out samples.*--val_split 0.1"),
        (["--rebalance", "taunorm"], r"`rebalance` must be one of .*'taunorm'.*[Dd]id you mean"),
        (["--rebalance", "tau_norm:x"], r"`rebalance` must be METHOD or METHOD:STRENGTH"),
        (["--rebalance", "tau_norm:-1"], r"`strength` must be"),
        (["--rebalance", "cosine_means:1"], r"`strength` must be left out: the method has none"),
        (["--rebalance", "auto:1"], r"`strength` must be left out with 'auto'"),
    ],
)
def test_bad_options_end_before_the_training(flags, message):
    with pytest.raises(ValueError, match=message):
        parsed("--output_dir", "nowhere", *flags)


def test_a_sharded_training_is_refused(run, monkeypatch):
    monkeypatch.setattr(vision_lt, "fit", None)
    monkeypatch.setattr(last_step, "parse_flag_from_env", lambda name: name.endswith("FSDP"))
    with pytest.raises(ValueError, match=r"`rebalance, calibrate` must be left out.*FSDP"):
        run("--rebalance", "auto")
