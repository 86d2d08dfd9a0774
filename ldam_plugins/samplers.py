"""Samplers that follow a schedule, whatever number of processes and however resumed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from ldam_plugins._call_stack import loader_that_iterates, loader_that_sets_epoch
from ldam_plugins._validation import check_int, check_real, invalid
from ldam_plugins.counts import ClassCounts, label_array
from ldam_plugins.schedules import DeferredSchedule, Progress

_CHUNK = 2**16  # Python ints of an epoch of 10 million rows need not exist all at once


class DeferredSampler(Sampler[int]):
    """Order of the samples under a :class:`DeferredSchedule`, N indices an epoch.

    While the schedule is uniform the epoch is a shuffle of all samples. While it re-samples, each
    index is drawn with replacement: a class by ``schedule.class_probabilities``, then one of its
    samples uniformly. The order is a function of the seed and the epoch alone, so every process
    computes the same one (Accelerate and the Trainer then give each its batches) and a resumed
    training gets the order it would have had. ``len()`` never changes.

    A loop says at the beginning of each epoch which one it is, by ``sampler.set_epoch(epoch)`` or,
    of a loader that Accelerate has prepared, ``loader.set_epoch(epoch)``. Such a loader also counts
    its own iterations, from 0 in a resumed run; that count never undoes what the loop said, it goes
    on from there.

    Args:
        labels: Class index of each sample (N,); see :meth:`ClassCounts.from_labels`.
        schedule: What to sample when. Stages begin with an epoch: a start inside one takes
            effect at the next.
        epochs: Epochs of the whole training, a fraction where it stops inside one.
        steps_per_epoch: Optimizer updates of one epoch; needed only where ``start`` counts steps.
        num_classes: C. Default: the largest label + 1.
        seed: Seed of the order.
        num_replicas: Processes to split the order over, for loops without Accelerate.
        rank: This process, 0-based. Each gets ``ceil(N / num_replicas)`` indices; the first
            ones of the order fill up the last ranks.

    Raises:
        ValueError: bad labels, ``rank`` not below ``num_replicas``, or ``start`` past the end.
        RuntimeError: from iterating, where two loaders count and the loop did not say which epoch
            it is, as after ``skip_first_batches``, whose epoch the loader itself does not count.

    Example:
        >>> sampler = DeferredSampler([0, 0, 0, 1], DeferredSchedule("drs", start=1), epochs=2)
        >>> sorted(sampler)
        [0, 1, 2, 3]
    """

    def __init__(
        self,
        labels: Any,
        schedule: DeferredSchedule,
        *,
        epochs: float,
        steps_per_epoch: int | None = None,
        num_classes: int | None = None,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        if steps_per_epoch is None:
            if schedule.unit == "step":
                expected = "given where the schedule's start counts steps"
                raise invalid("steps_per_epoch", expected, steps_per_epoch)
            steps_per_epoch = 1
        array = label_array(labels)
        self.schedule = schedule
        self.class_counts = ClassCounts.from_labels(array, num_classes)
        self.steps_per_epoch = check_int("steps_per_epoch", steps_per_epoch, low=1)
        check_real("epochs", epochs, low=0, low_open=True)
        self.total_steps = max(round(epochs * steps_per_epoch), 1)
        schedule.start_step(self.total_steps, steps_per_epoch)
        self.seed = check_int("seed", seed, low=0)
        self.num_replicas = check_int("num_replicas", num_replicas, low=1)
        self.rank = check_int("rank", rank, low=0, high=num_replicas - 1)
        self.epoch = 0
        self._ahead = 0  # of the count of the loader
        self._told: str | None = None  # the epoch, since the last iteration, by "loop" or "loader"
        self._counting: int | None = None  # id of the loader whose count was taken last
        self._size = len(array)
        # Indices grouped by class: members of class c are _members[_first[c] : _first[c + 1]].
        index_type = np.int32 if len(array) <= np.iinfo(np.int32).max else np.int64
        # NumPy sorts integers of 16 bits in linear time.
        label_type = np.uint16 if len(self.class_counts) <= 2**16 else np.int32
        order = np.argsort(array.astype(label_type), kind="stable")
        self._members = order.astype(index_type)
        self._first = np.concatenate([[0], np.cumsum(self.class_counts.counts)])

    def set_epoch(self, epoch: int) -> None:
        """Choose the 0-based epoch whose order is drawn next."""
        epoch = check_int("epoch", epoch, low=0)
        loader, counts = loader_that_sets_epoch()
        if counts:
            self._take_count(epoch, loader)
            return
        self.epoch, self._told = epoch, "loop"
        if loader is not None:  # told by the loop, it counts on from there
            self._ahead, self._counting = 0, id(loader)

    def _take_count(self, count: int, loader: object) -> None:
        """Go on with what a loader of Accelerate counts, unless the loop said which epoch it is."""
        if self._told == "loop":
            self._ahead = self.epoch - count
        elif self._counting not in (None, id(loader)):
            raise RuntimeError(
                "two data loaders count the epochs of one DeferredSampler, each for itself (one "
                "may be that of skip_first_batches). Call `sampler.set_epoch(epoch)` at the "
                "beginning of each epoch."
            )
        self.epoch, self._told, self._counting = count + self._ahead, "loader", id(loader)

    @property
    def progress(self) -> Progress:
        """Progress at the beginning of the chosen epoch."""
        return Progress(self.epoch * self.steps_per_epoch, self.total_steps, self.steps_per_epoch)

    def order(self) -> np.ndarray:
        """Indices of the chosen epoch for all processes together, shape (N,)."""
        rng = np.random.default_rng([self.seed, self.epoch])
        if not self.schedule.resamples(self.progress):
            return rng.permutation(self._size)
        shares = self.schedule.class_probabilities(self.class_counts, self.progress).numpy()
        bounds = np.cumsum(shares)
        drawn = np.searchsorted(bounds / bounds[-1], rng.random(self._size), side="right")
        place = (rng.random(self._size) * self.class_counts.counts[drawn]).astype(np.int64)
        return self._members[self._first[drawn] + place]

    def __iter__(self) -> Iterator[int]:
        loader = None if self._told == "loader" else loader_that_iterates()
        if loader is not None:  # its own call does not reach this sampler through all wrappers
            self._take_count(loader.iteration, loader)
        self._told = None
        order = self.order()
        if self.num_replicas > 1:
            order = np.resize(order, len(self) * self.num_replicas)[self.rank :: self.num_replicas]
        for chunk in np.array_split(order, max(len(order) // _CHUNK, 1)):
            yield from chunk.tolist()

    def __len__(self) -> int:
        return math.ceil(self._size / self.num_replicas)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_counting": None}  # no loader of another process has this id
