"""Heads whose weight a wrapper has partitioned, as DeepSpeed's ZeRO-3 does; without DeepSpeed."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from hf_samples import make_model, make_trainer
from torch import nn
from vision_runs import parsed, vision_lt

from ldam_plugins import DRWCallback, fold_cosine_head, use_cosine_head
from ldam_plugins.heads import folded_state_dict
from ldam_plugins.heads.finder import class_count
from ldam_plugins.heads.folding import fold_when_saved
from ldam_plugins.training.distributed import refuse_deepspeed

import text_lt  # isort: skip

ZERO_3 = SimpleNamespace(zero_stage=3, enable_msamp=False)
ZERO_2 = SimpleNamespace(zero_stage=2, enable_msamp=False)


def partition(model):
    """What ZeRO-3 leaves of every parameter between two uses: an empty tensor with its shape."""
    for index, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.ds_shape = index, parameter.shape
        parameter.data = torch.empty(0)
    return model


def plain(kind="linear"):
    last = nn.Linear(4, 3) if kind == "linear" else nn.Conv2d(4, 3, 1)
    first = nn.Linear(8, 4) if kind == "linear" else nn.Conv2d(8, 4, 1)
    return nn.Sequential(first, nn.ReLU(), last)


@pytest.mark.parametrize("init", ["random", "keep"])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_no_cosine_head_takes_the_place_of_a_part(kind, init):
    model = partition(plain(kind))
    last = model[2]
    with pytest.raises(ValueError, match=r"head '2' has its whole weight, \(3, 4.*ZeRO-2 or FSDP2"):
        use_cosine_head(model, head="2", init=init)
    assert model[2] is last


@pytest.mark.parametrize("part", [(0,), (6,), (1, 4), (3, 2)], ids=str)
def test_no_part_is_folded(part):
    model = use_cosine_head(plain())
    model[2].weight.data = torch.ones(part)
    with pytest.raises(ValueError, match="ZeRO-2 or FSDP2"):
        fold_cosine_head(model)
    with pytest.raises(ValueError, match=r"folded_state_dict\(model, accelerator.get_state_dict"):
        folded_state_dict(model)
    fold_when_saved(model)
    with pytest.raises(ValueError, match="ZeRO-2 or FSDP2"):
        model.state_dict()


def test_gathered_tensors_of_a_partitioned_model_are_folded():
    model = use_cosine_head(plain())
    model.train()(torch.randn(16, 8))
    gathered = copy.deepcopy(model.state_dict())
    expected = folded_state_dict(model)
    found = folded_state_dict(partition(model), gathered)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    # k w / |w|, k = s E|x| / E|x|^2
    first, second = gathered["2.cosine_moments"].double()
    rows = gathered["2.weight"].double()
    by_hand = 30 * first / second * rows / rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(found["2.weight"].double(), by_hand, rtol=1e-6, atol=0)


def test_a_chunked_head_keeps_no_partitioned_weight_for_the_loss():
    model = use_cosine_head(plain(), chunked=True)
    model[2].weight.ds_id = 0
    with pytest.raises(ValueError, match="`chunked` must be False under DeepSpeed's ZeRO-3"):
        model.train()(torch.randn(2, 8))


def test_the_classes_of_a_part_are_those_of_the_whole():
    model = use_cosine_head(make_model())
    assert class_count(partition(model)) == 3


@pytest.mark.parametrize("callback", [DRWCallback(), DRWCallback(loss="ce", cosine_head=True)])
def test_the_trainer_partitions_no_cosine_head(callback, tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[callback])
    trainer.args.deepspeed_plugin = ZERO_3
    with pytest.raises(ValueError, match=r"zero_stage` must be one of \[0, 1, 2\], got 3.*FSDP2"):
        trainer.train()


def test_nor_one_that_was_there_before(tmp_path):
    trainer = make_trainer(tmp_path, use_cosine_head(make_model()))
    trainer.args.deepspeed_plugin = ZERO_3
    trainer.add_callback(DRWCallback(loss="ce"))
    with pytest.raises(ValueError, match=r"zero_stage` must be one of \[0, 1, 2\], got 3"):
        trainer.train()


@pytest.mark.parametrize(("loss", "plugin"), [("ce", ZERO_3), ("ldam", ZERO_2), ("ldam", None)])
def test_the_trainer_shards_what_can_be(loss, plugin, tmp_path):
    trainer = make_trainer(tmp_path, callbacks=[DRWCallback(loss=loss)], max_steps=1)
    trainer.args.deepspeed_plugin = plugin
    trainer.train()
    assert trainer.state.global_step == 1


def test_refused_stages_are_named():
    refuse_deepspeed(None, stages=range(4), hint="")
    refuse_deepspeed(ZERO_2, stages=(3,), hint="")
    with pytest.raises(ValueError, match=r"one of \[0, 1, 2\], got 3. Use ZeRO-2."):
        refuse_deepspeed(ZERO_3, stages=(3,), hint="Use ZeRO-2.")


def test_the_text_recipe_stops_before_it_reads_data(tmp_path, monkeypatch):
    make = text_lt.make_arguments

    def under_zero_3(options):
        arguments = make(options)
        arguments.deepspeed_plugin = ZERO_3
        return arguments

    monkeypatch.setattr(text_lt, "make_arguments", under_zero_3)
    monkeypatch.setattr(text_lt, "load_data", lambda *args, **kwargs: pytest.fail("data are read"))
    with pytest.raises(ValueError, match=r"zero_stage.*got 3. Use ZeRO-2 or FSDP2"):
        text_lt.main(text_lt.TextOptions(output_dir=str(tmp_path / "run")))


@pytest.mark.parametrize("plugin", [ZERO_2, ZERO_3], ids=["2", "3"])
def test_the_vision_recipe_takes_no_deepspeed(plugin, tmp_path, monkeypatch):
    monkeypatch.setattr(AcceleratorState, "deepspeed_plugin", plugin)
    with pytest.raises(ValueError, match=r"zero_stage.*ddp.yaml"):
        vision_lt.make_accelerator(parsed("--output_dir", str(tmp_path / "run")))
