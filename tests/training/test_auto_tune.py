"""The choice of precision and compilation, on a clock that a model moves by what it is run in."""

import copy
import json
import random

import numpy as np
import pytest
import torch
from torch import nn

from ldam_plugins import LDAMLoss
from ldam_plugins.training import auto_tune as module
from ldam_plugins.training.auto_tune import Tuned, auto_tune, by_rule, settle
from ldam_plugins.training.run_dir import AUTO_TUNE_FILE

CRITERION = LDAMLoss([5, 3, 2])


class Net(nn.Module):
    """Moves the clock in its forward pass: by ``no`` or ``bf16`` seconds, a row."""

    def __init__(self, clock, no=0.01, bf16=0.005):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3)
        )
        self.clock, self.no, self.bf16 = clock, no, bf16

    def forward(self, images):
        assert len(self.clock.seen) < 2000, "it goes on for ever"
        lower = torch.is_autocast_enabled("cpu")
        if lower and self.bf16 is None:
            raise RuntimeError("no kernel for BFloat16")
        self.clock.now += len(images) * (self.bf16 if lower else self.no)
        self.clock.seen.append((len(images), lower))
        random.random(), np.random.random()
        return self.layers(images)


class Clock:
    def __init__(self):
        self.now, self.seen = 0.0, []

    def __call__(self):
        return self.now

    def __deepcopy__(self, memo):
        return self


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def tune(clock, tmp_path):
    """Choose for a model and 10,000 passes of 16 images."""

    def batches():
        return [(torch.randn(16, 3, 6, 6), torch.arange(16) % 3)]

    def start(model=None, passes=10_000, criterion=CRITERION, **more):
        return auto_tune(
            model or Net(clock),
            criterion,
            batches,
            device=torch.device("cpu"),
            passes=passes,
            cache=tmp_path / "cache",
            clock=clock,
            **more,
        )

    return start


@pytest.mark.parametrize(
    ("seconds", "precision"), [(0.005, "bf16"), (0.0099, "no"), (0.02, "no"), (None, "no")]
)
def test_the_faster_precision_is_taken(tune, clock, seconds, precision):
    found = tune(Net(clock, bf16=seconds))
    assert (found.precision, found.source, found.compile) == (precision, "measured", False)
    assert found.seconds["float32"] == pytest.approx(0.16)
    assert found.rows == 16
    assert set(found.seconds) == {"float32", *(["bf16"] if seconds else [])}


def test_everything_is_left_as_found(tune, clock):
    model = Net(clock)
    model(torch.randn(2, 3, 6, 6)).sum().backward()
    model.eval()
    before = copy.deepcopy(model.state_dict())
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.random(), torch.rand(())
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    assert tune(model).source == "measured"
    assert (random.random(), np.random.random(), torch.rand(())) == expected
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert not any(part.training for part in model.modules())


@pytest.mark.parametrize("given", ["no", "bf16", "fp16"])
def test_a_given_precision_is_kept_and_nothing_timed(tune, clock, given):
    found = tune(precision=given)
    assert (found.precision, found.source) == (given, "given")
    assert clock.seen == []


def test_short_runs_are_not_measured(tune, clock):
    assert tune(passes=49).source == "rule"
    assert clock.seen == []
    found = tune(passes=300)  # of 0.16 s
    assert (found.source, found.precision) == ("rule", by_rule("auto").precision)
    assert found.why == "a run of about 48 s, not measured"
    assert {rows for rows, _ in clock.seen} == {2}
    assert tune(passes=600).source == "measured"


def test_the_rule_holds_on_other_devices(tune, monkeypatch):
    monkeypatch.setattr(module, "choose_precision", lambda precision: "fp16")
    found = auto_tune(None, None, None, device=torch.device("cuda"), passes=10**6)
    assert (found.precision, found.source) == ("fp16", "rule")


def test_slow_models_are_timed_on_fewer_rows(tune, clock):
    found = tune(Net(clock, no=0.1, bf16=0.05))
    assert 2 < found.rows < 16
    assert found.precision == "bf16"
    assert found.spent < 2 * module.BUDGET


@pytest.mark.parametrize("factor", [1.0, 1.1, 1.2, 1.5, 2.0, 10.0])
def test_rows_grow_to_an_end(tune, clock, factor):
    assert tune(Net(clock, no=0.1 * factor, bf16=0.05)).source == "measured"


class Fails(Net):
    """As fast in bfloat16 as others, but with an error there or without a number."""

    def forward(self, images):
        logits = super().forward(images)
        if not torch.is_autocast_enabled("cpu"):
            return logits
        return logits.detach().numpy() if self.error else logits * float("nan")


@pytest.mark.parametrize("error", [True, False])
def test_a_precision_in_which_the_model_fails_is_not_taken(tune, clock, error):
    model = Fails(clock)
    model.error = error
    found = tune(model)
    assert (found.precision, [*found.seconds]) == ("no", ["float32"])


def test_a_model_that_cannot_be_copied_is_trained_by_the_rule(tune, clock):
    model = Net(clock)
    model.made = model.layers[0].weight * 2  # torch copies no tensor in the middle of a graph
    found = tune(model)
    assert (found.source, found.precision) == ("rule", by_rule("auto").precision)
    assert found.why.startswith("not measured, as a copy of the model failed: Only Tensors created")


def test_what_was_measured_before_is_used(tune, clock, tmp_path):
    first, first_rule = tune(), by_rule("auto").precision
    (file,) = (tmp_path / "cache").iterdir()
    clock.seen.clear()
    again = tune()
    assert clock.seen == []
    assert again.source == "cache"
    assert (again.precision, again.seconds) == (first.precision, first.seconds)
    # A run that would not have been measured does not depend on what others left.
    assert (tune(passes=300).source, tune(passes=300).precision) == ("rule", first_rule)
    file.write_text("{")
    assert tune().source == "measured"
    assert json.loads(file.read_text())["precision"] == "bf16"


@pytest.mark.parametrize("other", ["model", "batch", "machine", "frozen"])
def test_another_model_batch_or_machine_is_measured_anew(tune, clock, monkeypatch, other):
    tune()
    model = Net(clock)
    if other == "model":
        model.layers[0] = nn.Conv2d(3, 4, 3, bias=False)
    if other == "frozen":
        model.layers[0].requires_grad_(False)
    if other == "machine":
        monkeypatch.setattr(module, "cpu_name", lambda: "another")
    if other == "batch":
        monkeypatch.setattr(module, "_shapes", lambda inputs: [1])
    assert tune(model).source == "measured"


def test_a_noisy_choice_is_not_kept(tune, clock, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "MOST_CACHED_NOISE", 0.01)
    assert tune().source == "measured"
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_none(tune, tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert tune().source == "measured"


@pytest.mark.parametrize(
    ("takes", "passes", "pays"),
    [(100, 10_000, True), (500, 10_000, False), (100, 5_000, None)],
    ids=["pays", "takes too long", "short run"],
)
def test_a_compilation_must_be_earned_back(tune, clock, takes, passes, pays):
    """A step takes 0.16 s, or compiled 0.08: 10,000 of them save 800 s."""

    def compiled(net):
        clock.now += takes
        net.no = 0.005
        return net

    found = tune(precision="no", compile="auto", compiled=compiled, passes=passes)
    assert found.compile is bool(pays)
    assert found.compilation == (None if pays is None else pytest.approx(takes, abs=1))
    assert ("float32 compiled" in found.seconds) is (pays is not None)
    again = tune(precision="no", compile="auto", compiled=compiled, passes=passes)
    assert again.source == "measured"  # as another run may be shorter


def test_a_resumed_run_keeps_its_choice(tmp_path):
    rule, kept = by_rule("auto"), Tuned("bf16", compile=True, threads=3)
    kept.save(tmp_path / AUTO_TUNE_FILE)
    anew = Tuned("fp16")
    assert settle(tmp_path, lambda: anew, rule, resume=True) is anew  # nothing to go on from
    (tmp_path / "checkpoints" / "epoch_00001").mkdir(parents=True)
    found = settle(tmp_path, lambda: anew, rule, resume=True)
    assert (found.precision, found.compile, found.threads) == ("bf16", True, 3)
    assert found.source == "run"
    assert settle(tmp_path, lambda: anew, rule, resume=False) is anew
    (tmp_path / AUTO_TUNE_FILE).unlink()  # a run of an earlier version
    assert settle(tmp_path, lambda: anew, rule, resume=True) is rule


def test_runs_that_share_a_file_share_a_choice(tmp_path):
    file, made = tmp_path / "grid" / "auto_tune.json", []

    def measure():
        made.append(Tuned("bf16", source="measured"))
        return made[-1]

    def run(name):
        return settle(tmp_path / name, measure, by_rule("auto"), resume=False, shared=file)

    assert run("a").source == "measured"
    assert (run("b").precision, run("b").source) == ("bf16", "file")
    assert len(made) == 1


def test_a_file_that_holds_no_choice_is_refused(tmp_path):
    file = tmp_path / "choice.json"
    for text in ("[]", "{}", '{"precision": "int8"}', "no"):
        file.write_text(text)
        with pytest.raises(ValueError, match="`auto_tune` must be what an earlier run chose"):
            settle(tmp_path, lambda: Tuned("no"), by_rule("auto"), resume=False, shared=file)


def test_models_that_take_arguments_by_name(clock, tmp_path):
    class Text(Net):
        def forward(self, input_ids, attention_mask):
            return {"logits": super().forward(input_ids), "more": attention_mask}

    def batches():
        given = {"input_ids": torch.randn(8, 3, 6, 6), "attention_mask": torch.ones(8)}
        return [(given, torch.arange(8) % 3)] * 2

    found = auto_tune(
        Text(clock),
        LDAMLoss([5, 3, 2]),
        batches,
        device=torch.device("cpu"),
        passes=10_000,
        cache=tmp_path,
        clock=clock,
    )
    assert found.precision == "bf16"
    assert found.seconds["float32"] == pytest.approx(0.08)  # of one of the two batches


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_model_that_is_only_used_is_timed_as_it_is_used(tune, clock, precision):
    class Used(Net):
        def forward(self, images):
            assert not self.training
            assert not torch.is_grad_enabled()
            return super().forward(images)

    model = Used(clock, **{"no": 0.01, "bf16": 0.01, precision: 0.004}).train()
    before = copy.deepcopy(model.state_dict())
    found = tune(model, criterion=None)
    assert (found.precision, found.source) == (precision, "measured")
    assert model.training
    assert torch.is_grad_enabled()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_training_and_a_use_of_a_model_are_measured_apart(tune, clock):
    assert tune(Net(clock)).source == "measured"
    assert tune(Net(clock), criterion=None).source == "measured"
    assert tune(Net(clock), criterion=None).source == "cache"
