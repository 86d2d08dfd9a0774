"""A sampler that follows a schedule: the same order in every process and in a resumed run."""

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
    samples uniformly. The order depends on the seed and the epoch alone. So every process computes
    the same one, of which Accelerate and the Trainer give each process its batches, and a resumed
    training gets the order it would have had. ``len()`` never changes.

    The training loop says which epoch begins, by ``sampler.set_epoch(epoch)`` or, with a loader
    that Accelerate has prepared, ``loader.set_epoch(epoch)``. Such a loader also counts its own
    iterations, from 0 in a resumed run. What the loop said has priority, and the count goes on
    from there.

    Args:
        labels: Class index of each sample (N,); see :meth:`ClassCounts.from_labels`.
        schedule: What to sample when. Stages begin with an epoch: a start inside one takes
            effect at the next.
        epochs: Epochs of the whole training, a fraction where it stops inside one.
        steps_per_epoch: Optimizer steps of one epoch; needed only where ``start`` counts steps.
        num_classes: C. Default: the largest label + 1.
        seed: Seed of the order.
        num_replicas: Processes to split the order over, for loops without Accelerate.
        rank: This process, 0-based. Each gets ``ceil(N / num_replicas)`` indices; the first
            ones of the order fill up the last ranks.

    Raises:
        ValueError: bad labels, ``rank`` not below ``num_replicas``, or ``start`` past the end.
        RuntimeError: when iterated by two loaders in turn that each count for themselves, and the
            loop did not say the epoch. (``skip_first_batches`` makes a second loader.)

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
        self._chosen_by: str | None = None  # "loop" or "loader", since the last iteration
        self._offset = 0  # epoch minus the count of iterations that the loader keeps
        self._counting_loader: int | None = None  # id of the loader whose count was used last
        self._size = len(array)
        # Indices grouped by class: members of class c are _members[_first[c] : _first[c + 1]].
        index_type = np.int32 if len(array) <= np.iinfo(np.int32).max else np.int64
        # NumPy sorts integers of 16 bits in linear time.
        label_type = np.uint16 if len(self.class_counts) <= 2**16 else np.int32
        order = np.argsort(array.astype(label_type), kind="stable")
        self._members = order.astype(index_type)
        self._first = np.concatenate([[0], np.cumsum(self.class_counts.counts)])

    def set_epoch(self, epoch: int) -> None:
        """Choose the 0-based epoch whose order is drawn next.

        Raises:
            TypeError: ``epoch`` is not an integer.
            ValueError: ``epoch`` is negative.
            RuntimeError: two data loaders of Accelerate count the epochs, see the class.
        """
        epoch = check_int("epoch", epoch, low=0)
        loader, counts = loader_that_sets_epoch()
        if counts:
            self._take_count(epoch, loader)
            return
        self.epoch, self._chosen_by = epoch, "loop"
        if loader is not None:  # it handed on what the loop said, and counts on from there
            self._offset, self._counting_loader = 0, id(loader)

    def _take_count(self, count: int, loader: object) -> None:
        """Follow the count that a loader of Accelerate keeps of its iterations.

        If the loop chose the epoch since the last iteration, that epoch stays, and the loader
        counts on from there.
        """
        if self._chosen_by == "loop":
            self._offset = self.epoch - count
        elif self._counting_loader not in (None, id(loader)):
            raise RuntimeError(
                "two data loaders count the epochs of one DeferredSampler, each for itself (one "
                "may be that of skip_first_batches). Call `sampler.set_epoch(epoch)` at the "
                "beginning of each epoch."
            )
        self.epoch, self._chosen_by = count + self._offset, "loader"
        self._counting_loader = id(loader)

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
        loader = None if self._chosen_by == "loader" else loader_that_iterates()
        if loader is not None:  # not all wrappers hand its call of set_epoch on
            self._take_count(loader.iteration, loader)
        self._chosen_by = None
        order = self.order()
        if self.num_replicas > 1:
            order = np.resize(order, len(self) * self.num_replicas)[self.rank :: self.num_replicas]
        for chunk in np.array_split(order, max(len(order) // _CHUNK, 1)):
            yield from chunk.tolist()

    def __len__(self) -> int:
        return math.ceil(self._size / self.num_replicas)

    def __getstate__(self) -> dict[str, Any]:
        # No loader of another process has this id.
        return {**self.__dict__, "_counting_loader": None}
