import pytest
import torch
from torch import nn

from ldam_plugins import DeferredSchedule
from ldam_plugins.training.selection import BestModel, SelectionRule, first_candidate


def scores(*values):
    return dict(enumerate(values))


def test_the_best_epoch_is_the_first_of_the_best_candidates():
    rule = SelectionRule("balanced_accuracy", first_epoch=1)
    assert rule.best({}) is None
    assert rule.best(scores(0.9)) is None
    assert rule.best(scores(0.9, 0.2, 0.5, 0.5)) == 2
    assert SelectionRule("nll").best(scores(0.9, 0.2, 0.5, 0.2)) == 1
    assert rule.best(scores(0.9, float("nan"), 0.1)) == 2


@pytest.mark.parametrize(
    ("metric", "values", "earlier"),
    [
        ("macro_f1", (0.6, 0.7, 0.5, 0.65), 1),
        ("macro_f1", (0.6, 0.65, 0.5, 0.65), None),
        ("nll", (0.6, 0.5, 0.7, 0.6), 1),
    ],
)
def test_a_better_epoch_before_the_switch_is_told_and_not_taken(metric, values, earlier):
    rule = SelectionRule(metric, first_epoch=2)
    assert rule.better_before(scores(*values)) == earlier
    told = rule.record(scores(*values))
    assert (told["metric"], told["epoch"], told["first_candidate"]) == (metric, 3, 2)
    assert told["score"] == values[3]
    assert told["better_before"] == (
        None if earlier is None else {"epoch": earlier, "score": values[earlier]}
    )


def test_patience_counts_from_the_best_candidate():
    rule = SelectionRule("nll", first_epoch=3, patience=2)
    losses = [0.1, 0.5, 0.6, 0.7, 0.8, 0.6, 0.9, 0.7]
    stops = [rule.stops(scores(*losses[: done + 1])) for done in range(len(losses))]
    assert stops == [False] * 7 + [True]
    assert not SelectionRule("nll", first_epoch=3).stops(scores(*losses))
    assert not rule.stops({})
    assert not SelectionRule("nll", patience=3).stops({4: 0.1})  # no score since, every 5 epochs
    assert SelectionRule("nll", patience=3).stops({4: 0.1, 9: 0.2})


@pytest.mark.parametrize(
    ("kind", "start", "first"),
    [
        ("drw", 3, 3),
        ("drs", 0.5, 5),
        ("drw", 0.55, 5),  # inside epoch 5, which ends re-weighted
        ("drw", 1.0, 0),  # never: the run has one stage
        ("none", 3, 0),
        ("rw", 3, 0),
        ("progressive", 3, 0),
    ],
)
def test_candidates_begin_with_the_last_stage(kind, start, first):
    assert first_candidate(DeferredSchedule(kind, start), epochs=10, steps_per_epoch=4) == first


def test_the_best_model_is_kept_and_goes_with_the_checkpoint():
    model = nn.Linear(1, 1)
    best = BestModel(model, SelectionRule("macro_f1", 1, patience=1), epochs=3)
    for epoch, score in enumerate((0.9, 0.4, 0.3)):
        nn.init.constant_(model.weight, epoch)
        assert best.update(model, epoch, score) == (epoch == 1)
    assert best.module.weight.item() == 1
    assert best.stops
    longer = BestModel(model, SelectionRule("macro_f1", 1, patience=1), epochs=5)
    assert not longer.stops
    longer.load_state_dict({name: tensor.clone() for name, tensor in best.state_dict().items()})
    assert longer.scores == {0: 0.9, 1: 0.4, 2: 0.3}
    assert torch.equal(longer.module.weight, best.module.weight)


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match=r"`metric` must be one of .*'macro_f1'.* got 'f1'"):
        SelectionRule("f1")
