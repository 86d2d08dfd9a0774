"""Two real processes (gloo) do what one does."""

import pytest
import torch
from forked import run_forked
from hf_split_run import BOUNDS, cases, matrix, runs
from paths import HELPERS


def launched(out, processes, extent):
    """Results of all processes."""
    done = run_forked(
        HELPERS / "hf_split_run.py",
        [out, processes, extent],
        out.parent / "log",
        environment={"ACCELERATE_USE_CPU": "true"},
        processes=processes,
        timeout=3600,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    with torch.serialization.safe_globals([torch.dtype]):
        return [torch.load(f"{out}.{rank}", weights_only=True) for rank in range(processes)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return runs(folder, 1) | {"matrix": matrix(folder, 1, (1, 4), False)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    both = launched(tmp_path_factory.mktemp("both") / "found", 2, "slice")
    assert all(rank["ldam", "whole"]["processes"] == 2 for rank in both)
    return both


def test_labels_are_read_once_for_all_processes(alone, ranks):
    for found in (alone, *ranks):
        assert found["labels"]["counts"] == [9, 4, 2]
        assert "OSError in row 13: no such file" in found["labels"]["error"]
        assert found["labels"]["error"] == alone["labels"]["error"]
    assert [found["labels"]["loaded"] for found in (alone, *ranks)] == [15, 15, 0]


CUTS = [("ce", "whole"), ("ce", "parts"), ("ldam", "whole"), ("ldam", "parts"), ("ldam", "chunked")]
CUTS += [("ldam", "uphill"), ("ldam", "uphill, parts")]
CUTS += [("ldam", "average"), ("ldam", "average, parts")]


@pytest.mark.parametrize(("loss", "cut"), CUTS)
def test_the_update_does_not_depend_on_the_split(loss, cut, alone, ranks):
    one = alone[loss, next((kind for kind in ("uphill", "average") if kind in cut), "whole")]
    for found in (alone[loss, cut], ranks[0][loss, cut], ranks[1][loss, cut]):
        assert len(found["losses"]) == 2  # before and after the switch
        assert found["losses"] == pytest.approx(one["losses"], rel=1e-6)
        difference = (found["parameters"] - one["parameters"]).norm()
        assert difference <= 1e-6 * one["parameters"].norm()


def test_evaluation_is_the_same(alone, ranks):
    for rank in ranks:
        assert rank["ldam", "whole"]["eval_loss"] == pytest.approx(
            alone["ldam", "whole"]["eval_loss"], rel=1e-5
        )


def test_both_processes_share_one_resampled_order(alone, ranks):
    for name in [("drs", "straight"), ("drs", 3), ("drs", 6)]:
        one = alone[name]["seen"]
        both = [rank[name]["seen"] for rank in ranks]
        assert len(both[0]) == len(both[1]) == len(one) // 2
        batches = [part for pair in zip(*map(_eights, both), strict=True) for part in pair]
        assert [label for batch in batches for label in batch] == one


def test_resuming_goes_on_to_the_bit(alone, ranks):
    for found in (alone, *ranks):
        straight = found["drs", "straight"]
        for step in (3, 6):
            resumed = found["drs", step]
            assert torch.equal(resumed["parameters"], straight["parameters"])
            assert resumed["seen"] == straight["seen"][-len(resumed["seen"]) :]


def test_a_stream_is_shared_and_resumed_like_any_data(alone, ranks):
    one = alone["stream", None]
    epochs = [one["seen"][start : start + 37] for start in (0, 37, 74)]
    assert all(sorted(epoch) == list(range(3, 40)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    both = [rank["stream", None] for rank in ranks]
    for number, epoch in enumerate(epochs):
        turns = [found["seen"][24 * number : 24 * (number + 1)] for found in both]
        in_turn = [*turns[0][:12], *turns[1][:12], *turns[0][12:], *turns[1][12:]]
        assert in_turn[:37] == epoch  # the last 11 fill up the batches
    for found in (one, *both):
        apart = (found["parameters"] - one["parameters"]).norm()
        assert apart <= 1e-6 * one["parameters"].norm()
        assert found["error"] == one["error"]
    for rank in (alone, *ranks):
        straight, resumed = rank["stream", None], rank["stream", 3]
        assert resumed["seen"] == straight["seen"][-len(resumed["seen"]) :]
        assert len(resumed["seen"]) <= len(straight["seen"]) / 2
        assert torch.equal(resumed["parameters"], straight["parameters"])


def test_a_loss_used_otherwise_than_several_processes_need_is_refused(alone, ranks):
    assert alone["refused"] == ["", "", ""]
    for rank in ranks:
        dropped, bare, part = rank["refused"]
        assert "1 micro-batches on 2 processes" in dropped
        assert (
            "CallsBare calls compute_loss_func itself and does not multiply the loss by 2" in bare
        )
        assert "`num_items_in_batch` must be 16, the labels of the first update, got 8" in part


def difference(found, reference):
    """The largest relative difference of the parameters after any update."""
    assert found.shape == reference.shape
    return ((found - reference).norm(dim=1) / reference.norm(dim=1)).max().item()


@pytest.mark.parametrize("case", list(cases(whole=False)), ids=str)
def test_a_short_last_batch_counts_once(case, alone, ranks):
    one = alone["matrix"]["cases"][case, 1]
    assert len(one) == 4  # updates of 24 and 13 samples, before the switch and after it
    for found in (alone, *ranks):
        for parts in (1, 4):
            assert difference(found["matrix"]["cases"][case, parts], one) <= BOUNDS[case[2]]


def test_metrics_are_the_same_to_the_bit(alone, ranks):
    assert len(alone["matrix"]["metrics"]) >= 5
    assert all(rank["matrix"]["metrics"] == alone["matrix"]["metrics"] for rank in ranks)


@pytest.mark.exhaustive
def test_whole_matrix(tmp_path, capsys):
    """1 to 3 processes, accumulation 1, 2 and 4, every loss, both stages and kinds of targets."""
    alone = matrix(tmp_path / "alone", 1, (1, 2, 4), True)
    worst = dict.fromkeys(BOUNDS, 0.0)
    compared = 0
    for processes in (1, 2, 3):
        if processes == 1:
            every = [alone]
        else:
            every = launched(tmp_path / f"found{processes}", processes, "whole")
        for found in every:
            assert found["metrics"] == alone["metrics"]
            for (case, parts), parameters in found["cases"].items():
                apart = difference(parameters, alone["cases"][case, 1])
                assert apart <= BOUNDS[case[2]], (processes, case, parts)
                worst[case[2]] = max(worst[case[2]], apart)
                compared += 1
    # Processes of all three launches, accumulations, targets and counts; losses and precisions.
    assert compared == (1 + 2 + 3) * 3 * (2 * 2 * (8 + 2) + 1)  # and one uphill
    with capsys.disabled():
        print(f"\n{compared} runs of 4 updates, largest difference {worst}")


def _eights(labels):
    return [labels[i : i + 8] for i in range(0, len(labels), 8)]
