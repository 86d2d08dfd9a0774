"""Models sharded by FSDP2 train, save and load as whole ones do."""

import pytest
import sharded_run
import torch
from accelerate import Accelerator
from forked import run_forked
from torch import nn


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """State dicts of two processes (gloo), gathered."""
    path = tmp_path_factory.mktemp("sharded") / "found.pt"
    done = run_forked(sharded_run.__file__, [path], path.parent / "log", processes=2)
    assert done.returncode == 0, done.stdout[-3000:]
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def whole():
    accelerator = Accelerator(cpu=True)
    return {name: sharded_run.train(accelerator, name, 1, shard=False) for name in sharded_run.RUNS}


@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("name", sharded_run.RUNS)
def test_updates_are_those_of_one_process(name, micro, found, whole):
    expected, got = whole[name].state_dict(), found[name, micro]
    assert got.keys() == expected.keys()
    for key in ("0.weight", "0.bias", "2.cosine_weight"):
        assert (got[key] - expected[key]).norm() <= 1e-6 * expected[key].norm()


def test_the_gathered_model_is_a_folded_one(found, whole):
    """Every shard is scaled by the same factor, though each process met its own batches."""
    state = found["ldam", 1]
    plain = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, len(sharded_run.COUNTS)))
    plain.load_state_dict({k: v for k, v in state.items() if "cosine" not in k})
    lengths = plain[2].weight.norm(dim=1)
    torch.testing.assert_close(lengths, lengths[:1].expand_as(lengths))
    inputs = torch.randn(500, 6)
    same = plain(inputs).argmax(1) == whole["ldam"].eval()(inputs).argmax(1)
    assert same.all()


def test_a_sharded_model_takes_a_gathered_one_in(found):
    state, loaded = found["ldam", 4], found["loaded"]
    assert loaded.keys() == state.keys()
    for key in ("0.weight", "0.bias", "2.weight"):
        torch.testing.assert_close(loaded[key], state[key])
    rows = nn.functional.normalize(state["2.cosine_weight"], dim=1)
    torch.testing.assert_close(nn.functional.normalize(loaded["2.cosine_weight"], dim=1), rows)


def test_a_sharded_head_is_not_folded_in_place(found):
    assert "`model` must be whole on every process" in found["refusal"]
    assert "folded_state_dict" in found["refusal"]


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_a_chunked_head_gets_the_gradients_of_the_plain_one(wrapper, found):
    plain, chunked = (found["wrapped"][wrapper, kind] for kind in (False, True))
    for expected, got in zip(plain, chunked, strict=True):
        assert (got - expected).norm() <= 1e-6 * expected.norm()


def test_a_chunked_head_whose_weight_is_freed_too_early_is_refused(found):
    assert "`chunked` must be False under FSDP" in found["wrapped"]["resharded"]
    assert "reshard_after_forward=False" in found["wrapped"]["resharded"]


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "inside"])
def test_a_head_that_comes_after_the_wrapper_is_refused(wrapper, found):
    message = found["wrapped"]["late", wrapper]
    assert "`model` must be one not yet wrapped or sharded" in message
    assert "Call use_cosine_head(model) first" in message
