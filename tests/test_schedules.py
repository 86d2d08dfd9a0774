import pytest
import torch

from ldam_plugins import ClassCounts, DeferredSchedule
from ldam_plugins.schedules import KINDS, Progress

COUNTS = ClassCounts([90, 9, 1])


def stages(schedule, epochs=10, steps=3):
    """Stage of every epoch's first update."""
    return [schedule.stage(Progress(e * steps, epochs * steps, steps)) for e in range(epochs)]


@pytest.mark.parametrize(
    ("start", "unit", "step"),
    [
        (0.8, "auto", 24),
        (8, "auto", 24),
        (0, "auto", 0),
        (1, "auto", 3),
        (1.0, "auto", 30),
        (0.0, "auto", 0),
        (0.7, "auto", 21),  # 0.7 * 30 is 20.999999999999996 or 21.000000000000004 in floats
        (0.35, "fraction", 11),
        (25, "step", 25),
        (1, "fraction", 30),
    ],
)
def test_start_step(start, unit, step):
    assert DeferredSchedule("drw", start, unit=unit).start_step(30, 3) == step


@pytest.mark.parametrize(
    ("start", "unit", "step"),
    [(0.8, "auto", 24), (0.35, "auto", 12), (25, "step", 27), (0, "auto", 0)],
)
def test_resampling_starts_with_an_epoch(start, unit, step):
    schedule = DeferredSchedule("drs", start, unit=unit)
    assert schedule.start_step(30, 3) == step
    for done in range(30):
        of_epoch = Progress(done - done % 3, 30, 3)  # which an epoch is sampled by
        assert schedule.stage(Progress(done, 30, 3)) == schedule.stage(of_epoch)


@pytest.mark.parametrize(
    ("kind", "start", "epochs", "told"),
    [
        ("drw", 0.8, 2, None),
        ("drs", 0.8, 4, "stage of 'drs' never begins: start=0.8 of 12 updates, 3 an epoch"),
        ("drs", 0.8, 5, None),
        ("drw", 0.9, 1, "Train longer, start earlier, or use schedule 'rw' or 'none'."),
        ("drw", 1.0, 9, "never begins"),
        ("none", 1.0, 9, None),
        ("progressive", 1.0, 9, None),
    ],
)
def test_a_second_stage_that_never_begins_is_told(kind, start, epochs, told):
    advice = DeferredSchedule(kind, start).advice(3 * epochs, 3)
    assert advice is None if told is None else told in advice


def test_fraction_of_every_length_is_exact():
    for epochs in range(1, 400):
        expected = -(-epochs * 8 // 10)
        assert DeferredSchedule("drw", 0.8).start_step(epochs, 1) == expected


@pytest.mark.parametrize(("kind", "on"), [("drw", "reweighted"), ("drs", "resampled")])
def test_deferred_kinds_switch_exactly_at_the_start(kind, on):
    schedule = DeferredSchedule(kind, start=4)
    for step, stage in ((11, "uniform"), (12, on), (13, on), (29, on)):
        assert schedule.stage(Progress(step, 30, 3)) == stage


@pytest.mark.parametrize(
    ("kind", "stage"),
    [("none", "uniform"), ("rw", "reweighted"), ("rs", "resampled"), ("progressive", "resampled")],
)
def test_other_kinds_have_one_stage(kind, stage):
    assert stages(DeferredSchedule(kind)) == [stage] * 10


def test_start_zero_is_from_the_beginning():
    assert stages(DeferredSchedule("drw", start=0)) == stages(DeferredSchedule("rw"))


def test_class_weights_are_exactly_ones_before_and_balanced_after():
    schedule = DeferredSchedule("drw", start=4, beta=0.99)
    before = schedule.class_weights(COUNTS, Progress(11, 30, 3))
    after = schedule.class_weights(COUNTS, Progress(12, 30, 3))
    assert torch.equal(before, torch.ones(3))
    assert torch.equal(after, COUNTS.weights(0.99))


@pytest.mark.parametrize("kind", KINDS)
def test_resampling_and_reweighting_exclude_each_other(kind):
    schedule = DeferredSchedule(kind, start=4)
    for step in (0, 12, 29):
        progress = Progress(step, 30, 3)
        assert not (schedule.reweights(progress) and schedule.resamples(progress))
        assert schedule.class_probabilities(COUNTS, progress).sum().item() == pytest.approx(1)


def test_class_probabilities():
    balanced = DeferredSchedule("rs", beta=1 - 1e-12)
    start = Progress(0, 30, 3)
    assert balanced.class_probabilities(COUNTS, start).tolist() == pytest.approx([1 / 3] * 3)
    plain = DeferredSchedule("rs", beta=0)
    assert plain.class_probabilities(COUNTS, start).tolist() == pytest.approx([0.9, 0.09, 0.01])
    moving = DeferredSchedule("progressive")
    assert moving.class_probabilities(COUNTS, start).tolist() == pytest.approx([0.9, 0.09, 0.01])
    halfway = moving.class_probabilities(COUNTS, Progress(15, 30, 3))
    assert halfway.tolist() == pytest.approx([(p + 1 / 3) / 2 for p in (0.9, 0.09, 0.01)])


@pytest.mark.parametrize(
    ("kind", "answers"),
    [
        ("none", set()),
        ("rw", {"is_reweighting", "uses_beta"}),
        ("drw", {"is_reweighting", "uses_beta", "is_deferred"}),
        ("rs", {"is_resampling", "uses_beta"}),
        ("drs", {"is_resampling", "uses_beta", "is_deferred"}),
        ("progressive", {"is_resampling"}),
    ],
)
def test_what_a_kind_does_is_asked(kind, answers):
    questions = ["is_reweighting", "is_resampling", "is_deferred", "uses_beta"]
    assert {q for q in questions if getattr(DeferredSchedule(kind), q)} == answers


@pytest.mark.parametrize("kind", KINDS)
def test_the_answers_agree_with_what_the_kind_does(kind):
    schedule = DeferredSchedule(kind, start=4)
    progresses = [Progress(step, 30, 3) for step in range(30)]
    assert schedule.is_reweighting == any(map(schedule.reweights, progresses))
    assert schedule.is_resampling == any(map(schedule.resamples, progresses))
    assert schedule.is_deferred == (len(set(map(schedule.stage, progresses))) > 1)
    other = DeferredSchedule(kind, start=4, beta=0.5)
    differs = any(
        not torch.equal(one(COUNTS, p), another(COUNTS, p))
        for p in progresses
        for one, another in [
            (schedule.class_weights, other.class_weights),
            (schedule.class_probabilities, other.class_probabilities),
        ]
    )
    assert schedule.uses_beta == differs


@pytest.mark.parametrize(
    ("kind", "start", "unit", "expected"),
    [
        ("drw", 4, "auto", True),
        ("drs", 4, "epoch", True),
        ("drw", 4, "step", False),
        ("drw", 0.5, "auto", False),
        ("drw", 1, "fraction", False),
        ("rw", 4, "auto", False),
    ],
)
def test_starts_at_epoch(kind, start, unit, expected):
    assert DeferredSchedule(kind, start, unit).starts_at_epoch == expected


@pytest.mark.parametrize(
    ("start", "epoch"), [(160, 160), (0.8, 160), (0.801, 160), (0.8049, 160), (0.805, 161), (0, 0)]
)
def test_start_epoch(start, epoch):
    assert DeferredSchedule("drs", start).start_epoch(200) == epoch
    assert DeferredSchedule("rs", start).start_epoch(200) == 0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: DeferredSchedule("dwr"), ValueError, r"'dwr'\. Did you mean .*'drw'"),
        (lambda: DeferredSchedule(start=1.5), ValueError, r"`start` must be in \[0, 1\], got 1\.5"),
        (lambda: DeferredSchedule(start=-1), ValueError, r"`start` must be an integer >= 0"),
        (lambda: DeferredSchedule(start="late"), TypeError, r"`start`.*'late'"),
        (lambda: DeferredSchedule(start=True), TypeError, r"`start`.*True"),
        (lambda: DeferredSchedule(start=0.5, unit="step"), TypeError, r"`start`.*0\.5"),
        (lambda: DeferredSchedule(unit="steps"), ValueError, r"`unit`.*Did you mean 'step'"),
        (lambda: DeferredSchedule(beta=1), ValueError, r"`beta`"),
        (lambda: DeferredSchedule(start=10).start_step(30, 3), ValueError, r"epoch 10, got 10"),
        (lambda: DeferredSchedule(start=10).start_epoch(10), ValueError, r"epoch 10, got 10"),
        (
            lambda: DeferredSchedule(start=3, unit="step").start_epoch(10),
            ValueError,
            r"`unit` must be 'epoch' or 'fraction', got 'step'",
        ),
        (lambda: Progress(-1, 3, 1), ValueError, r"`step`"),
        (lambda: Progress(0, 0, 1), ValueError, r"`total_steps`"),
    ],
)
def test_bad_schedules_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_start_past_the_end_matters_only_where_there_is_a_start():
    assert DeferredSchedule("rw", start=99).start_step(30, 3) == 0
