import collections
import pickle

import numpy as np
import pytest
import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import BatchSampler, DataLoader

from ldam_plugins import DeferredSchedule
from ldam_plugins.samplers import DeferredSampler

LABELS = [0] * 900 + [1] * 90 + [2] * 10


def share(order):
    counts = np.bincount(np.array(LABELS)[list(order)], minlength=3)
    return counts / counts.sum()


def test_uniform_epochs_are_shuffles_of_everything():
    sampler = DeferredSampler(LABELS, DeferredSchedule("none"), epochs=2)
    first = list(sampler)
    assert sorted(first) == list(range(1000))
    assert first != list(range(1000))
    sampler.set_epoch(1)
    assert list(sampler) != first


def test_deferred_sampler_switches_at_its_epoch():
    schedule = DeferredSchedule("drs", start=3, beta=1 - 1e-9)
    sampler = DeferredSampler(LABELS, schedule, epochs=5)
    for epoch in range(5):
        sampler.set_epoch(epoch)
        drawn = share(sampler)
        if epoch < 3:
            assert drawn.tolist() == [0.9, 0.09, 0.01]
        else:
            assert np.abs(drawn - 1 / 3).max() < 0.05


def test_draws_are_uniform_within_a_class():
    sampler = DeferredSampler(LABELS, DeferredSchedule("rs", beta=1 - 1e-9), epochs=200)
    seen = collections.Counter()
    for epoch in range(200):
        sampler.set_epoch(epoch)
        seen.update(i for i in sampler if i >= 990)
    counts = np.array([seen[i] for i in range(990, 1000)])
    expected = counts.sum() / 10
    assert ((counts - expected) ** 2 / expected).sum() < 27.9  # chi-square, 9 degrees, p = 0.001


def test_authors_resampling_weights():
    schedule = DeferredSchedule("rs", beta=0.99)
    sampler = DeferredSampler(LABELS, schedule, epochs=100)
    effective = 1 - 0.99 ** np.array([900, 90, 10])
    expected = np.array([900, 90, 10]) / effective
    total = np.zeros(3)
    for epoch in range(100):
        sampler.set_epoch(epoch)
        total += share(sampler)
    assert np.abs(total / 100 - expected / expected.sum()).max() < 0.01


def test_progressive_sampling_moves():
    sampler = DeferredSampler(LABELS, DeferredSchedule("progressive"), epochs=10)
    tails = []
    for epoch in (0, 5, 9):
        sampler.set_epoch(epoch)
        tails.append(share(sampler)[2])
    assert tails[0] < 0.03 < tails[1] < 0.22 < tails[2]


def test_order_depends_on_seed_and_epoch_alone():
    make = lambda seed: DeferredSampler(LABELS, DeferredSchedule("rs"), epochs=9, seed=seed)  # noqa: E731
    one, other, stranger = make(3), make(3), make(4)
    list(one)
    torch.manual_seed(123)
    for sampler in (one, other, stranger):
        sampler.set_epoch(7)
    assert list(one) == list(other) == list(pickle.loads(pickle.dumps(one)))
    assert list(one) != list(stranger)


@pytest.mark.parametrize("kind", ["none", "rs"])
@pytest.mark.parametrize("replicas", [2, 3])
def test_replicas_share_one_order(kind, replicas):
    options = {"epochs": 1, "seed": 5}
    whole = list(DeferredSampler(LABELS, DeferredSchedule(kind), **options))
    parts = [
        DeferredSampler(LABELS, DeferredSchedule(kind), num_replicas=replicas, rank=r, **options)
        for r in range(replicas)
    ]
    assert len({len(list(part)) for part in parts}) == 1
    assert all(len(list(part)) == len(part) for part in parts)
    woven = [i for group in zip(*parts, strict=True) for i in group]
    assert woven[:1000] == whole
    assert woven[1000:] == whole[: len(woven) - 1000]


def test_length_never_changes():
    sampler = DeferredSampler(LABELS, DeferredSchedule("drs", start=1), epochs=2)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        assert len(sampler) == len(list(sampler)) == 1000


def test_step_start_needs_the_steps_of_an_epoch():
    schedule = DeferredSchedule("drs", start=7, unit="step")
    with pytest.raises(ValueError, match="`steps_per_epoch` must be given"):
        DeferredSampler(LABELS, schedule, epochs=3)
    sampler = DeferredSampler(LABELS, schedule, epochs=3, steps_per_epoch=5)
    switched = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        switched.append(share(sampler)[2] > 0.01)
    assert switched == [False, False, True]  # step 7 lies inside epoch 1
    one_update = DeferredSampler(LABELS, schedule, epochs=9, steps_per_epoch=1)
    one_update.set_epoch(7)
    assert share(one_update)[2] > 0.01


def test_goes_through_accelerate():
    sampler = DeferredSampler(LABELS, DeferredSchedule("rs"), epochs=3, seed=1)
    loader = Accelerator(cpu=True).prepare(
        DataLoader(torch.arange(1000), batch_size=64, sampler=sampler)
    )
    loader.set_epoch(2)
    got = torch.cat(list(loader)).tolist()
    expected = DeferredSampler(LABELS, DeferredSchedule("rs"), epochs=3, seed=1)
    expected.set_epoch(2)
    assert got == list(expected)


def deferred():
    """Balanced from epoch 3 of 6 on."""
    return DeferredSampler(LABELS, DeferredSchedule("drs", start=3), epochs=6, seed=1)


def order_of(epoch):
    sampler = deferred()
    sampler.set_epoch(epoch)
    return list(sampler)


def read(loaders):
    """Rows in the order of the epoch, of the loaders of all processes."""
    shares = [list(loader) for loader in loaders]
    return [i for turn in zip(*shares, strict=True) for batch in turn for i in batch.tolist()]


def prepared(processes, workers=0):
    """What each of several processes has: a sampler, and a loader that Accelerate prepared."""
    samplers = [deferred() for _ in range(processes)]
    options = {"batch_size": 50, "num_workers": workers, "persistent_workers": bool(workers)}
    loaders = [
        prepare_data_loader(
            DataLoader(torch.arange(1000), sampler=sampler, **options),
            num_processes=processes,
            process_index=process,
        )
        for process, sampler in enumerate(samplers)
    ]
    return samplers, loaders


@pytest.mark.parametrize("processes", [1, 2])
class TestResumedAccelerateLoop:
    """The loader counts from 0 in a resumed run; the loop knows better."""

    @pytest.mark.parametrize("told", ["sampler", "loader", "both"])
    def test_at_an_epoch(self, told, processes):
        samplers, loaders = prepared(processes)
        for epoch in (3, 4, 5):
            for one in (samplers if told != "loader" else []) + (
                loaders if told != "sampler" else []
            ):
                one.set_epoch(epoch)
            assert read(loaders) == order_of(epoch)

    def test_told_once(self, processes):
        samplers, loaders = prepared(processes)
        for sampler in samplers:
            sampler.set_epoch(3)
        assert [read(loaders) for _ in range(3)] == [order_of(epoch) for epoch in (3, 4, 5)]

    @pytest.mark.parametrize("told", ["sampler", "loader", "skipping loader"])
    def test_inside_an_epoch(self, told, processes):
        samplers, loaders = prepared(processes)
        for epoch in (3, 4):
            ahead = loaders if told == "loader" else samplers if told == "sampler" else []
            for one in ahead:
                one.set_epoch(epoch)
            now = loaders
            if epoch == 3:
                now = [skip_first_batches(loader, 2) for loader in loaders]
            for loader in now if told == "skipping loader" else []:
                loader.set_epoch(epoch)
            done = 2 * 50 * processes if epoch == 3 else 0
            assert read(now) == order_of(epoch)[done:]

    @pytest.mark.parametrize("epoch", [0, 3])
    def test_inside_an_epoch_told_once_is_refused_in_the_next(self, epoch, processes):
        samplers, loaders = prepared(processes)
        for sampler in samplers:
            sampler.set_epoch(epoch)
        skipping = [skip_first_batches(loader, 2) for loader in loaders]
        assert read(skipping) == order_of(epoch)[100 * processes :]
        with pytest.raises(RuntimeError, match=r"Call `sampler.set_epoch\(epoch\)`"):
            read(loaders)

    def test_a_loop_that_says_nothing_goes_on_with_the_loaders_count(self, processes):
        _, loaders = prepared(processes)
        assert [read(loaders) for _ in range(4)] == [order_of(epoch) for epoch in range(4)]


def test_workers_of_a_resumed_loop_get_its_epoch():
    (sampler,), loaders = prepared(1, workers=2)
    for epoch in (3, 4):
        sampler.set_epoch(epoch)
        assert read(loaders) == order_of(epoch)


def test_the_last_epoch_said_is_drawn():
    sampler = deferred()
    for epoch in (1, 4, 2):
        sampler.set_epoch(epoch)
    assert list(sampler) == order_of(2)


def test_batch_samplers_may_hand_the_epoch_on():
    class Batches(BatchSampler):
        def set_epoch(self, epoch):
            self.sampler.set_epoch(epoch)

    sampler = deferred()
    batches = Batches(sampler, 50, drop_last=False)
    loader = Accelerator(cpu=True).prepare(DataLoader(torch.arange(1000), batch_sampler=batches))
    for epoch in (3, 4):
        sampler.set_epoch(epoch)
        assert read([loader]) == order_of(epoch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "`epochs`"),
        ({"epochs": 2, "rank": 1}, r"`rank` must be an integer >= 0 and <= 0, got 1"),
        ({"epochs": 2, "num_replicas": 0}, "`num_replicas`"),
        ({"epochs": 2, "seed": -1}, "`seed`"),
        ({"epochs": 2, "num_classes": 4}, "no training sample in class 3"),
        ({"epochs": 1}, "`start` must be before the end of the training"),
    ],
)
def test_bad_samplers_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DeferredSampler(LABELS, DeferredSchedule("drs", start=1), **options)
