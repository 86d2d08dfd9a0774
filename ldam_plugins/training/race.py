"""Which of several ways to do the same is fastest, told from noise."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

MARGIN = 0.03
"""Share of the time that another way must save to be taken, where the noise is less."""
LEAST_ROUNDS, MOST_ROUNDS = 3, 7
"""Blocks of each contender: at least, and at most where the seconds allow."""
_LEAST_BLOCK = 0.03  # seconds of a block, below which the clock and the system count too much
_HOPELESS = 1.25  # share of the time of the first from which on a contender runs no further block


@dataclass(frozen=True)
class Race:
    """What :func:`race` measured.

    Attributes:
        seconds: Median seconds of a call, by contender.
        ratios: Seconds of each over those of the first one: the ratio of their medians, or the
            median over the rounds of their ratios, whichever is larger.
        noise: Share by which a contender must be faster than another: the difference of two runs of
            the first contender (the medians of its odd and even blocks), at least :data:`MARGIN`.
        winner: The fastest by more than the noise; among equals the first.
        spent: Seconds of the whole race.
    """

    seconds: dict[str, float]
    ratios: dict[str, float]
    noise: float
    winner: str
    spent: float


def race(
    contenders: Mapping[str, Callable[[], object]],
    budget: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Race:
    """Time contenders in blocks that take turns, so that what else the machine does meets all.

    The first contender is what the others are held against. Each is called once before, untimed.
    One that is a quarter slower in its first block runs no further one. After
    :data:`LEAST_ROUNDS` the race ends as soon as nothing is open: every other contender is beyond
    twice the noise, or the seconds are over.

    Args:
        contenders: What to call, by name.
        budget: Seconds after which no further round begins, the least number of them apart.
        clock: Seconds, as of ``time.perf_counter``.
    """
    began, first = clock(), next(iter(contenders))
    for call in contenders.values():
        call()
    calls = max(1, math.ceil(_LEAST_BLOCK / max(_block(contenders[first], 1, clock), 1e-9)))
    blocks: dict[str, list[float]] = {name: [] for name in contenders}
    alive = list(contenders)
    for turn in range(1, MOST_ROUNDS + 1):
        for name in alive:
            blocks[name].append(_block(contenders[name], calls, clock))
        ratios, noise = _ratios(blocks, first), _noise(blocks[first])
        if turn == 1:
            alive = [name for name in alive if ratios[name] < _HOPELESS]
        settled = all(abs(ratios[n] - 1) > 2 * noise for n in alive if n != first)
        spent = clock() - began
        over = spent + spent / (turn + 1) > budget
        if len(alive) == 1 or (turn >= LEAST_ROUNDS and (settled or over)):
            break
    winner = first
    for name in alive:
        if ratios[name] < ratios[winner] * (1 - noise):
            winner = name
    seconds = {name: statistics.median(taken) for name, taken in blocks.items()}
    return Race(seconds, ratios, noise, winner, clock() - began)


def _block(call: Callable[[], object], calls: int, clock: Callable[[], float]) -> float:
    """Mean seconds of so many calls."""
    began = clock()
    for _ in range(calls):
        call()
    return (clock() - began) / calls


def _ratios(blocks: Mapping[str, list[float]], first: str) -> dict[str, float]:
    """Of each contender the larger of the two ratios of :class:`Race`."""
    ratios = {}
    for name, taken in blocks.items():
        theirs = blocks[first][: len(taken)]
        of_rounds = [mine / other for mine, other in zip(taken, theirs, strict=True)]
        of_medians = statistics.median(taken) / statistics.median(theirs)
        ratios[name] = max(of_medians, statistics.median(of_rounds))
    return ratios


def _noise(blocks: list[float]) -> float:
    """How far two runs of the same lie apart, as a share of their time; at least the margin."""
    if len(blocks) < 2:
        return MARGIN
    odd, even = statistics.median(blocks[::2]), statistics.median(blocks[1::2])
    return max(MARGIN, abs(odd - even) / statistics.median(blocks))
