"""One update is one update, however its batch is cut."""

import pytest
import split_run
import torch
from forked import run_forked


@pytest.fixture(scope="module")
def alone():
    return split_run.everything([1, 4])


def launched(path, processes, micros, extent="slice"):
    """Results of real processes over gloo."""
    words = [path, ",".join(map(str, micros)), extent]
    log = path.parent / "log"
    done = run_forked(split_run.__file__, words, log, processes=processes, timeout=3600)
    assert done.returncode == 0, done.stdout[-3000:]
    with torch.serialization.safe_globals([torch.dtype]):
        results = torch.load(path, weights_only=True)
    assert results["processes"] == processes
    return results


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    return launched(tmp_path_factory.mktemp("split") / "results.pt", 2, [1, 4])


BOUNDS = {torch.float32: 1e-6, torch.float64: 1e-12}


@pytest.mark.parametrize("case", list(split_run.cases()), ids=str)
def test_update_does_not_depend_on_the_cut(alone, together, case):
    for dtype in split_run.precisions(case):
        reference = alone[(*case, 1, dtype)]
        for results, micro in ((alone, 4), (together, 1), (together, 4)):
            difference = results[(*case, micro, dtype)] - reference
            assert (difference.norm() / reference.norm()).item() <= BOUNDS[dtype]


def test_the_updates_moved_the_parameters(alone):
    assert not torch.equal(
        alone[("ldam", False, False, 0.0, 1, torch.float64)],
        alone[("ldam", True, False, 0.0, 1, torch.float64)],
    )
    assert not torch.equal(
        alone[("ldam", True, False, 0.0, 1, torch.float64)],
        alone[("ldam", True, False, 0.3, 1, torch.float64)],
    )


def test_metrics_of_two_processes_equal_those_of_one(alone, together):
    for name in ("test", "two"):
        assert together[name] == alone[name]
    groups = alone["test"]["by_group"]
    assert [group["samples"] for group in groups.values()] == [3, 3, 3, 3, 1, *[3] * 8]
    assert alone["two"]["auroc"] != 0.5


def test_the_first_process_chooses_how_all_train(alone, together):
    assert alone["tuned"] == ["bf16"]
    assert together["tuned"] == ["bf16", "bf16"]


@pytest.mark.parametrize("case", list(split_run.epochs(whole=False)), ids=str)
def test_a_short_last_batch_counts_once(alone, together, case):
    reference = alone[("epoch", *case, 1)]
    for results, micro in ((alone, 4), (together, 1), (together, 4)):
        difference = results[("epoch", *case, micro)] - reference
        assert (difference.norm() / reference.norm()).item() <= BOUNDS[torch.float64]


@pytest.mark.exhaustive
@pytest.mark.parametrize("processes", [2, 3])
def test_whole_matrix(processes, tmp_path, capsys):
    """Every loss, before and after the switch, both kinds of targets, accumulation 1, 2 and 4."""
    micros = [1, 2, 4]
    alone = split_run.everything(micros, whole=True)
    together = launched(tmp_path / "results.pt", processes, micros, "whole")
    assert (together["test"], together["two"]) == (alone["test"], alone["two"])
    worst = dict.fromkeys(BOUNDS, 0.0)
    compared = 0
    for key, found in [*alone.items(), *together.items()]:
        if isinstance(key, tuple):
            epoch = key[0] == "epoch"
            reference = alone[(*key[:-1], 1) if epoch else (*key[:4], 1, key[5])]
            dtype = torch.float64 if epoch else key[5]
            difference = ((found - reference).norm() / reference.norm()).item()
            assert difference <= BOUNDS[dtype], key
            worst[dtype] = max(worst[dtype], difference)
            compared += 1
    # Accumulations times losses, stages and targets; of 2 losses with sharpness-aware steps too,
    # and of whole batches in float32 as well.
    assert compared == 2 * 3 * (6 * 4 + 2 * 5 * 2 + (8 * 4 + 2) * 2)
    with capsys.disabled():
        print(f"\n{processes} processes, {compared} runs, largest difference {worst}")
