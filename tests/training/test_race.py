"""The fastest contender, told from noise, on a clock that the contenders move."""

import pytest

from ldam_plugins.training.race import LEAST_ROUNDS, MARGIN, MOST_ROUNDS, race


class Clock:
    def __init__(self):
        self.now = 0.0
        self.calls = []

    def __call__(self):
        return self.now

    def takes(self, name, *seconds):
        """A contender that takes so long in one call after the other, then as long as the last."""
        left = list(seconds)

        def call():
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


@pytest.fixture
def clock():
    return Clock()


@pytest.mark.parametrize(
    ("other", "winner"), [(0.96, "other"), (0.98, "first"), (1.0, "first"), (1.04, "first")]
)
def test_another_way_must_be_faster_by_the_margin(clock, other, winner):
    found = race({"first": clock.takes("f", 1.0), "other": clock.takes("o", other)}, 100, clock)
    assert found.winner == winner
    assert found.noise == MARGIN
    assert found.seconds == pytest.approx({"first": 1.0, "other": other})
    assert found.ratios["other"] == pytest.approx(other)


def test_blocks_take_turns(clock):
    race({"a": clock.takes("a", 1.0), "b": clock.takes("b", 0.5)}, 100, clock)
    warm, turns = "aba", "ab" * LEAST_ROUNDS
    assert "".join(clock.calls) == warm + turns


def test_two_runs_of_the_same_that_differ_raise_the_bar(clock):
    # One call to warm up, one for the length of a block, then blocks of 1 s and of 1.3 s.
    first = clock.takes("f", 1.0, 1.0, *[1.0, 1.3] * MOST_ROUNDS)
    found = race({"first": first, "other": clock.takes("o", 0.9)}, 1000, clock)
    assert found.noise == pytest.approx(0.3, rel=0.1)
    assert found.winner == "first"
    assert found.seconds["other"] < found.seconds["first"]


def test_one_bad_block_of_the_faster_one_does_not_count(clock):
    other = clock.takes("o", 0.6, 0.6, 9.0, 0.6)
    found = race({"first": clock.takes("f", 1.0), "other": other}, 100, clock)
    assert found.winner == "other"


def test_a_hopeless_one_runs_one_block(clock):
    race({"first": clock.takes("f", 1.0), "slow": clock.takes("s", 2.0)}, 100, clock)
    assert clock.calls.count("s") == 2


def test_a_close_race_goes_on_until_the_seconds_are_over(clock):
    contenders = {"a": clock.takes("a", 1.0), "b": clock.takes("b", 0.97)}
    race(contenders, 100, clock)
    assert clock.calls.count("b") == 1 + MOST_ROUNDS
    clock.calls.clear()
    found = race(contenders, 0.1, clock)
    assert clock.calls.count("b") == 1 + LEAST_ROUNDS
    assert found.spent == pytest.approx(2 + LEAST_ROUNDS + 0.97 * (1 + LEAST_ROUNDS))


def test_short_calls_are_repeated(clock):
    found = race({"a": clock.takes("a", 0.001), "b": clock.takes("b", 0.0005)}, 10, clock)
    assert clock.calls.count("a") >= 2 + 30 * LEAST_ROUNDS
    assert found.seconds == pytest.approx({"a": 0.001, "b": 0.0005})


def test_of_equals_the_first_wins(clock):
    contenders = {name: clock.takes(name, 0.5) for name in "bc"}
    assert race({"a": clock.takes("a", 1.0), **contenders}, 100, clock).winner == "b"
