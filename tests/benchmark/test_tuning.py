import json
import shutil
import sys
from dataclasses import asdict, dataclass
from typing import ClassVar

import pytest

from ldam_plugins import ClassCounts
from ldam_plugins.benchmark import tuning
from ldam_plugins.benchmark.local import CellTask, Outcome
from ldam_plugins.benchmark.tuning import (
    Choice,
    Search,
    Span,
    check_searched,
    check_split,
    propose,
    read_tune_options,
    search_space,
    trial_folder,
)
from ldam_plugins.training.options import COUNT, NOT_NEGATIVE, POSITIVE, SEED, SHARE_BELOW_1


@dataclass
class Options:
    LIMITS: ClassVar = {
        "lr": POSITIVE,
        "scale": POSITIVE,
        "max_margin": NOT_NEGATIVE,
        "tau": NOT_NEGATIVE,
        "gamma": NOT_NEGATIVE,
        "beta": SHARE_BELOW_1,
        "weight_decay": NOT_NEGATIVE,
        "epochs": COUNT,
        "seed": SEED,
    }

    loss: str = "ce"
    head: str = "auto"
    schedule: str = "none"
    lr: float = 0.1
    scale: float | None = None
    max_margin: float | None = None
    tau: float | None = None
    gamma: float | None = None
    beta: float = 0.9999
    weight_decay: float = 0.0
    epochs: int = 10
    seed: int = 0
    subset_seed: int = 7
    val_split: float = 0.2


def space(*words, own=(), **options):
    return search_space(read_tune_options(words, Options), asdict(Options(**options)), own)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["lr"]),
        ({"head": "cosine"}, ["lr", "scale"]),
        ({"schedule": "drw"}, ["lr", "beta"]),
        ({"schedule": "progressive"}, ["lr"]),
        ({"loss": "ldam", "schedule": "rw"}, ["lr", "scale", "max_margin", "beta"]),
        ({"loss": "ldam", "head": "linear"}, ["lr", "max_margin"]),
        ({"loss": "focal"}, ["lr", "gamma"]),
        ({"loss": "vector_scaling"}, ["lr", "tau", "gamma"]),
        ({"loss": "logit_adjusted", "head": "cosine"}, ["lr", "scale", "tau"]),
    ],
    ids=str,
)
def test_a_method_is_searched_for_what_it_takes(options, names):
    assert list(space(**options)) == names


def test_ranges_are_around_the_values_as_given_or_the_defaults_of_the_loss():
    found = space(loss="ldam", schedule="drw", lr=2e-4, beta=0.95)
    assert found == {
        "lr": Span(2e-5, 2e-3),
        "scale": Span(10, 90),
        "max_margin": Span(0.1, 1),
        "beta": Choice([0.9, 0.95, 0.99, 0.999, 0.9999]),
    }
    assert space(loss="ldam", scale=15)["scale"] == Span(5, 45)
    assert space(loss="focal")["gamma"] == Span(0.5, 4)
    with pytest.raises(ValueError, match=r"`gamma` must be above 0.*--tune_options gamma=LOW:HIGH"):
        space(loss="focal", gamma=0)
    assert space("lr", loss="focal", gamma=0) == {"lr": Span(0.01, 1)}


def test_what_makes_a_method_what_it_is_is_not_searched():
    assert list(space(loss="ldam", max_margin=0.1, own={"max_margin", "lr"})) == ["scale"]


def test_values_may_be_named():
    found = space("lr=1e-4:1e-2", "scale=10,20", "weight_decay=0:0.1", "epochs=4,8", head="cosine")
    assert found == {
        "lr": Span(1e-4, 1e-2),
        "scale": Choice([10, 20]),
        "weight_decay": Span(0, 0.1),
        "epochs": Choice([4, 8]),
    }
    assert all(isinstance(value, int) for value in found["epochs"])
    # What a search says it searched makes the same search again.
    again = space(*(f"{name}={part}" for name, part in found.items()), head="cosine")
    assert again == found


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["lrr"], ValueError, r"`tune_options`.*Did you mean 'lr'.*--tune_options lr, lr=1e-4"),
        (["seed=1,2"], ValueError, r"`tune_options` must be one of"),
        (["lr=0:1"], ValueError, r"`lr of tune_options` must be a finite number > 0, got 0"),
        (["beta=0.9,1"], ValueError, r"`beta of tune_options` must be in \[0, 1\), got 1"),
        (["lr=0.1,nan"], ValueError, r"`lr of tune_options` must be a finite number"),
        (["epochs=1,2.5"], TypeError, r"`epochs of tune_options` must be an integer"),
        (["epochs=0,2"], ValueError, r"`epochs of tune_options` must be an integer >= 1"),
        (["epochs=2:4"], ValueError, r"whole numbers.*'epochs=2:4'\. Name its values: epochs=A"),
        (["beta=0.9:0.99"], ValueError, r"distance to 1.*'beta=0.9:0.99'\. Name its values: beta"),
        (["lr=1:0.1"], ValueError, r"LOW:HIGH, got 'lr=1:0.1'"),
        (["lr=0.1:1:2"], ValueError, r"LOW:HIGH, got 'lr=0.1:1:2'"),
        (["lr=0.1"], ValueError, r"two or more values, all different, got 'lr=0.1'"),
        (["lr=0.1,0.10"], ValueError, r"two or more values, all different"),
        (["lr=small"], ValueError, r"option=numbers, got 'lr=small'"),
        (["lr="], ValueError, r"option=numbers, got 'lr='"),
        (["lr", "lr=1,2"], ValueError, r"named twice, got 'lr'"),
        (["weight_decay"], ValueError, r"Name its values: weight_decay=LOW:HIGH"),
    ],
)
def test_bad_words_are_named_with_a_way_out(words, error, message):
    with pytest.raises(error, match=message):
        space(*words)


def test_options_that_no_method_takes_are_refused():
    spaces = [space(), space(schedule="drw")]
    check_searched(["lr", "beta"], spaces)
    with pytest.raises(ValueError, match=r"that a method of the grid takes, got \"'tau'\""):
        check_searched(["lr", "tau"], spaces)


def test_too_few_classes_with_samples_to_hold_out_are_refused():
    check_split(ClassCounts([9, 4, 1, 1]), ClassCounts([7, 3, 1, 1]))
    for before, after in (([9, 4, 1, 1, 1], [7, 3, 1, 1, 1]), ([9, 1], [7, 1])):
        with pytest.raises(ValueError, match=r"`tune`.*[12] of [25] classes.*A class needs two"):
            check_split(ClassCounts(before), ClassCounts(after))


SPACE = {"lr": Span(0.01, 1.0), "scale": Choice([10.0, 20.0, 30.0])}


def test_proposals_follow_from_what_was_tried_and_the_seed():
    tried = [({"lr": 0.1, "scale": 20.0}, 30.0), ({"lr": 5.0, "scale": 20.0}, 1.0)]
    found = [propose(SPACE, tried, number, seed=0) for number in range(1, 9)]
    assert found == [propose(SPACE, tried, number, seed=0) for number in range(1, 9)]
    assert found != [propose(SPACE, tried, number, seed=1) for number in range(1, 9)]
    assert all(0.01 <= values["lr"] <= 1 and values["scale"] in SPACE["scale"] for values in found)
    assert len({values["lr"] for values in found}) == 8
    assert all(float(f"{values['lr']:.3g}") == values["lr"] for values in found)


def test_proposals_seek_the_neighbourhood_of_the_least_error():
    values = (0.01, 0.03, 0.1, 0.3, 0.9)
    tried = [({"lr": lr, "scale": 20.0}, 10.0 if lr == 0.3 else 80.0) for lr in values]
    found = [propose(SPACE, tried, number, seed=0)["lr"] for number in range(8)]
    assert sum(0.15 < lr < 0.6 for lr in found) > 5  # of a range of two decades; 2.4 at random


class Made:
    """A search whose trials take no time: the balanced accuracy is a function of their values."""

    def __init__(self, folder, accuracy, *, lr=0.1, trials=4, words=("lr", "scale=10,20,30")):
        self.folder, self.accuracy, self.lr = folder, accuracy, lr
        self.ran = []
        given = {"loss": "ldam", "lr": lr}
        self.search = Search(self.task, space(*words, **given), trials)

    def task(self, number, values):
        options = asdict(Options(loss="ldam", lr=self.lr)) | values
        return CellTask(
            name=f"own, trial {number}",
            recipe=self.folder / "small.py",
            arguments=(),
            folder=trial_folder(self.folder / "own", number),
            options=options,
            defaults=asdict(Options()),
        )

    def step(self):
        """Run the next trial; an accuracy that is no number stands for how it failed."""
        task = self.search.next_task()
        self.ran.append(task.name)
        found = self.accuracy(task.options)
        if isinstance(found, Outcome):
            return self.search.tell(task, found)
        (task.folder / "model").mkdir(parents=True, exist_ok=True)
        metrics = {"validation": {"balanced_accuracy": found}}
        metrics["held_out"] = {"samples": 12, "class_counts": [9, 3, 0], "classes_without": ["c"]}
        (task.folder / "metrics.json").write_text(json.dumps(metrics))
        return self.search.tell(task, Outcome(task.name, "finished"))

    def run(self, steps=99):
        while not self.search.is_over and steps:
            assert self.step() == ""
            steps -= 1
        return self

    def opened(self):
        self.search.open()
        return self


def peak(options):
    """Most accurate at a rate of 0.3."""
    return 1 - abs(options["lr"] - 0.3) / 10


def failing(options, where, outcome):
    return outcome if where(options) else peak(options)


def test_the_first_trial_has_the_settings_as_given_and_the_best_is_chosen(tmp_path):
    made = Made(tmp_path, peak, trials=8).opened().run()
    found = made.search.found
    assert found[0]["values"] == {"lr": 0.1, "scale": 30}
    assert made.search.make_task(0, {}).options["scale"] is None
    assert [trial["balanced_error"] for trial in found] == pytest.approx(
        [10 * abs(trial["values"]["lr"] - 0.3) for trial in found]
    )
    record = made.search.record()
    assert record["values"] == made.search.values
    assert abs(record["values"]["lr"] - 0.3) == min(abs(t["values"]["lr"] - 0.3) for t in found)
    assert record["given"] == {"lr": 0.1, "scale": None}
    assert record["searched"] == ["lr=0.01:1", "scale=10,20,30"]
    split = {"share": 0.2, "seed": 7, "samples": 12, "classes_without": ["c"]}
    assert (record["trials"], record["found"], record["split"]) == (8, found, split)
    assert not list(tmp_path.rglob("model"))


def test_settings_as_given_stay_where_nothing_is_better(tmp_path):
    made = Made(tmp_path, lambda options: 0.5).opened().run()
    assert (made.search.best, made.search.values) == (0, {})
    assert made.search.record()["values"] == {"lr": 0.1, "scale": 30}
    # Also where they are outside of what is searched.
    made = Made(tmp_path / "b", lambda o: 1 / (1 + o["lr"]), words=["lr=1:2"]).opened().run()
    assert made.search.values == {}


@pytest.mark.parametrize("stop", range(6))
def test_a_search_goes_on_where_it_stopped(tmp_path, stop):
    whole = Made(tmp_path / "whole", peak, trials=6).opened().run()
    first = Made(tmp_path / "cut", peak, trials=6).opened().run(stop)
    first.search.next_task()  # killed in the middle of this one
    again = Made(tmp_path / "cut", peak, trials=6).opened().run()
    assert again.ran == whole.ran[stop:]
    assert again.search.record() == whole.search.record()
    # More trials go on from these; none is run twice.
    more = Made(tmp_path / "cut", peak, trials=7).opened().run()
    assert more.ran == ["own, trial 6"]
    assert more.search.found[:6] == whole.search.found


def test_bad_trials_are_none_to_choose_and_are_not_tried_again(tmp_path):
    diverged = Outcome("", "failed", "exit code 1, see log\nValueError: NaN", 1)
    made = Made(tmp_path, lambda o: failing(o, lambda o: o["lr"] > 0.2, diverged), trials=8)
    made.opened().run()
    found = made.search.found
    assert {trial.get("failed") for trial in found} == {None, "ValueError: NaN"}
    assert all(("failed" in trial) == (trial["values"]["lr"] > 0.2) for trial in found)
    assert (
        max(t["values"]["lr"] for t in found if "failed" not in t)
        == (made.search.record()["values"]["lr"])
    )
    assert Made(tmp_path, peak, trials=8).opened().run().ran == []


def test_a_method_of_which_all_trials_fail_has_failed_and_is_tried_again(tmp_path):
    failed = Outcome("", "failed", "see log\nFileNotFoundError: no data", 1)
    made = Made(tmp_path, lambda options: failed, trials=2).opened()
    assert made.search.failure == ""
    made.run()
    assert "all 2 trials failed, the last one with FileNotFoundError" in made.search.failure
    again = Made(tmp_path, peak, trials=2).opened().run()
    assert len(again.ran) == 2
    assert again.search.failure == ""


@pytest.mark.parametrize("code", [None, -9, 143], ids=["not started", "killed", "terminated"])
def test_a_trial_that_was_stopped_says_nothing_of_its_values(tmp_path, code):
    stopped = Outcome("", "failed", "another process is running it", code)
    made = Made(tmp_path, lambda o: failing(o, lambda o: o["lr"] != 0.1, stopped)).opened()
    assert made.step() == ""
    assert made.step() == "own, trial 1: another process is running it"
    again = Made(tmp_path, peak).opened().run()
    assert again.ran[0] == "own, trial 1"
    assert again.search.found[1]["values"] == made.search.found[1]["values"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lr": 0.2}, r"lr: 0\.1 there, 0\.2 now.*remove that folder"),
        ({"words": ["lr", "scale=10,20"]}, r"searched: .*scale=10,20,30.*there, .*scale=10,20'"),
    ],
)
def test_a_folder_of_another_search_is_refused(tmp_path, changed, message):
    Made(tmp_path, peak).opened().run(1)
    with pytest.raises(ValueError, match=message):
        Made(tmp_path, peak, **changed).search.load()
    shutil.rmtree(tmp_path / "own")
    Made(tmp_path, peak, **changed).search.load()


def test_an_option_that_the_recipe_has_got_since_is_at_its_default(tmp_path):
    made = Made(tmp_path, peak).opened().run(1)
    path = made.search.folder / tuning.SEARCH_FILE
    kept = json.loads(path.read_text())
    del kept["given"]["epochs"]
    path.write_text(json.dumps(kept))
    assert Made(tmp_path, peak).opened().run().ran[0] == "own, trial 1"


def test_optuna_that_is_missing_is_named_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ModuleNotFoundError, match=r"ldam-plugins\[tune\]"):
        tuning.import_optuna()
