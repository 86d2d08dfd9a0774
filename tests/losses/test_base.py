"""Margins, priors and class weights are exact wherever a loss is made, moved, saved and loaded."""

import copy
import pickle
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertModel, BertPreTrainedModel

from ldam_plugins import ClassCounts, DeferredSchedule, LDAMLoss, create_loss, list_losses
from ldam_plugins.losses import apply_stage
from ldam_plugins.schedules import Progress

COUNTS = [999_999_937, 70_001, 257, 13]
CLASSES = len(COUNTS)
CONSTANTS = ("margins", "prior", "multiplicative", "additive")
SHARES = np.array(COUNTS) / sum(COUNTS)


def exact(name, constant):
    """Of NumPy alone, in float64."""
    margins = 0.5 * (np.array(COUNTS) / min(COUNTS)) ** -0.25
    even = np.full(CLASSES, 0.5)
    return {
        "margins": even if name in ("hinge", "uniform_margin") else margins,
        "prior": SHARES,
        "multiplicative": (np.array(COUNTS) / max(COUNTS)) ** 0.15,
        "additive": np.log(SHARES),
    }[constant]


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


PLACES = {
    "plainly": nullcontext,
    "bfloat16 by default": lambda: default_dtype(torch.bfloat16),
    "float16 by default": lambda: default_dtype(torch.float16),
    "float64 by default": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
    "meta by default": lambda: default_device("meta"),
    "inference mode": torch.inference_mode,
}
WAYS = {
    "as it is": lambda loss: loss,
    "half": lambda loss: loss.half(),
    "bfloat16": lambda loss: loss.to(torch.bfloat16),
    "double and back": lambda loss: loss.double().float(),
    "to_empty": lambda loss: loss.to_empty(device="cpu"),
    "over meta": lambda loss: loss.to("meta").to_empty(device="cpu"),
    "in a parent": lambda loss: nn.ModuleList([loss]).half().to_empty(device="cpu")[0],
    "half twice": lambda loss: loss.half().bfloat16().half(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda loss: pickle.loads(pickle.dumps(loss)),
    "shared": lambda loss: loss.share_memory(),
}


def whole(loss, name):
    """All constants are right, and of a precision of 32 bits at least."""
    for constant in CONSTANTS:
        values = getattr(loss, constant, None)
        if values is not None:
            assert values.dtype.itemsize >= 4
            assert not values.is_meta
            np.testing.assert_allclose(values.double(), exact(name, constant), rtol=2e-7)
    assert loss.weight.dtype.itemsize >= 4


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", PLACES)
def test_constants_are_exact_wherever_the_loss_is_made_and_moved(place, way):
    logits = torch.randn(6, CLASSES, dtype=torch.float64)
    target = torch.arange(6) % CLASSES
    for name in list_losses():
        with PLACES[place]():
            loss = create_loss(name, COUNTS)
        if loss.weight.is_meta and way in ("as it is", "deepcopy", "pickle", "shared"):
            loss.to_empty(device="cpu")
        loss = WAYS[way](loss)
        if loss.weight.is_meta:
            loss.to_empty(device="cpu")
        whole(loss, name)
        assert torch.equal(loss.weight, torch.ones(CLASSES, dtype=loss.weight.dtype))
        loss.weight.copy_(loss.weight)
        with torch.no_grad():
            assert loss.mean_weight().item() == pytest.approx(1)
            expected = create_loss(name, COUNTS)(logits, target)
            torch.testing.assert_close(loss(logits, target), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("place", PLACES)
def test_counts_give_exact_values_on_the_cpu(place):
    with PLACES[place]():
        counts = ClassCounts(torch.tensor(COUNTS, device="cpu"))
        made = counts.margins(), counts.weights(0.999), counts.prior()
        probabilities = DeferredSchedule("rs").class_probabilities(counts, Progress(0, 10, 1))
    raw = 1 / (1 - 0.999 ** np.array(COUNTS, dtype=np.float64))
    expected = exact("ldam", "margins"), raw * CLASSES / raw.sum(), SHARES
    for values, right in zip(made, expected, strict=True):
        assert values.dtype.itemsize >= 4
        np.testing.assert_allclose(values.double(), right, rtol=2e-7)
    assert probabilities.device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_items_are_counted_whole_under_a_16_bit_default(dtype):
    rows = 257
    target = torch.zeros(rows, dtype=torch.int64)
    logits = torch.randn(rows, CLASSES)
    target_probs = F.one_hot(target, CLASSES).float()
    with default_dtype(dtype):
        for name in list_losses():
            loss = create_loss(name, COUNTS)
            assert loss.denominator(target).item() == rows
            assert loss.denominator(target_probs).item() == rows
            sums = create_loss(name, COUNTS, reduction="sum")(logits, target).item()
            for items in (None, rows, torch.tensor(rows)):
                got = loss.compute_loss_func((logits,), target, items).item()
                assert got == pytest.approx(sums / rows, rel=1e-5)
            got = loss.compute_loss_func(
                (logits,), target_probs, torch.tensor(rows * CLASSES)
            ).item()
            assert got == pytest.approx(sums / rows, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("start", "assign"), [("cpu", False), ("cpu", True), ("meta", True)])
def test_loaded_weights_are_wide_and_the_next_stage_is_exact(assign, dtype, start):
    weights = ClassCounts(COUNTS).weights(0.999)
    with torch.device(start):
        loss = LDAMLoss(COUNTS)
    loss.load_state_dict({"weight": weights.to(dtype)}, assign=assign)
    whole(loss, "ldam")
    assert loss.weight.dtype == torch.float32
    assert torch.equal(loss.weight, weights.to(dtype).float())
    apply_stage(loss, DeferredSchedule("rw", beta=0.999), Progress(0, 10, 1))
    assert torch.equal(loss.weight, weights)


class Classifier(BertPreTrainedModel):
    """A model of transformers that holds its loss."""

    def __init__(self, config, name="ldam"):
        super().__init__(config)
        self.bert = BertModel(config)
        self.classifier = nn.Linear(config.hidden_size, CLASSES)
        self.criterion = create_loss(name, COUNTS)
        self.post_init()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("saved", ["backbone", "whole"])
def test_from_pretrained_gives_a_loss_as_it_was_made_or_saved(tmp_path, saved, dtype):
    config = BertConfig(
        vocab_size=9,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        dtype=dtype,
    )
    weight = torch.ones(CLASSES)
    if saved == "whole":
        model = Classifier(config)
        weight = ClassCounts(COUNTS).weights(0.999)
        model.criterion.weight.copy_(weight)
    else:
        model = BertModel(config)
    model.save_pretrained(tmp_path)
    for name in list_losses():
        loss = Classifier.from_pretrained(tmp_path, dtype=dtype, name=name).criterion
        whole(loss, name)
        assert torch.equal(loss.weight, weight)
        z, y = torch.randn(3, CLASSES, dtype=torch.float64), torch.tensor([0, 2, 3])
        expected = create_loss(name, COUNTS)
        expected.weight.copy_(weight)
        torch.testing.assert_close(loss(z, y), expected(z, y), rtol=1e-12, atol=0)


def test_initialising_a_model_leaves_the_weights_of_its_loss():
    config = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = Classifier(config)
    model.criterion = LDAMLoss(COUNTS)  # which transformers has not seen
    model.criterion.weight.copy_(torch.arange(CLASSES))
    model.init_weights()
    assert model.criterion.weight.tolist() == [0, 1, 2, 3]


class TestFilledWeights:
    """``apply_stage`` computes and copies at a change only."""

    SCHEDULE = DeferredSchedule("drw", start=0.5, beta=0.999)
    EARLY, LATE = Progress(0, 10, 1), Progress(9, 10, 1)
    WEIGHTS = ClassCounts(COUNTS).weights(0.999)

    def entered(self, loss, progress, monkeypatch, schedule=SCHEDULE):
        """How many times the weights were computed."""
        calls = []
        of = ClassCounts.weights
        with monkeypatch.context() as patch:
            patch.setattr(ClassCounts, "weights", lambda *a, **k: calls.append(a) or of(*a, **k))
            apply_stage(loss, schedule, progress)
        return len(calls)

    def test_at_a_change_of_stage(self, monkeypatch):
        loss = LDAMLoss(COUNTS)
        asked = [self.EARLY, self.EARLY, self.LATE, self.LATE, self.LATE, self.EARLY]
        counted = [self.entered(loss, progress, monkeypatch) for progress in asked]
        assert counted == [1, 0, 1, 0, 0, 1]
        apply_stage(loss, self.SCHEDULE, self.LATE)
        assert torch.equal(loss.weight, self.WEIGHTS)

    @pytest.mark.parametrize(
        "change",
        [
            lambda loss: loss.weight.fill_(3),
            lambda loss: loss.weight.data.fill_(3),
            lambda loss: loss.weight.numpy().fill(3),
            lambda loss: setattr(loss, "weight", torch.full((CLASSES,), 3.0)),
            lambda loss: loss.load_state_dict({"weight": torch.full((CLASSES,), 3.0)}),
            lambda loss: loss.double(),
            lambda loss: loss.to("meta").to_empty(device="cpu"),
        ],
        ids=["in place", "data", "numpy", "set", "loaded", "cast", "emptied"],
    )
    def test_after_a_change_by_others(self, change, monkeypatch):
        loss = LDAMLoss(COUNTS)
        apply_stage(loss, self.SCHEDULE, self.LATE)
        change(loss)
        assert self.entered(loss, self.LATE, monkeypatch) == 1
        torch.testing.assert_close(loss.weight.float(), self.WEIGHTS, rtol=1e-7, atol=0)

    def test_in_copies(self, monkeypatch):
        loss = LDAMLoss(COUNTS)
        apply_stage(loss, self.SCHEDULE, self.LATE)
        for twin in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            twin.weight.fill_(2)
            assert self.entered(twin, self.LATE, monkeypatch) == 1
        assert self.entered(loss, self.LATE, monkeypatch) == 0

    def test_another_schedule_and_one_that_moves_its_weights(self, monkeypatch):
        loss = LDAMLoss(COUNTS)
        apply_stage(loss, self.SCHEDULE, self.LATE)
        other = DeferredSchedule("drw", start=0.5, beta=0.9)
        assert self.entered(loss, self.LATE, monkeypatch, other) == 1

        class Moving(DeferredSchedule):
            def class_weights(self, class_counts, progress):
                return torch.full((len(class_counts),), progress.share)

        for step in (2, 4):
            apply_stage(loss, Moving("rw"), Progress(step, 10, 1))
            assert loss.weight.tolist() == pytest.approx([step / 10] * CLASSES)

    def test_what_the_caller_keeps(self):
        loss = LDAMLoss(COUNTS)
        stage = apply_stage(loss, self.SCHEDULE, self.LATE)
        loss.weight.fill_(3)
        apply_stage(loss, self.SCHEDULE, self.LATE, stage)
        assert loss.weight.tolist() == [3] * CLASSES
