"""Features of a model: what its head gets and gives, whatever gives the batches."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from feature_run import samples
from head_models import Net
from paths import HELPERS
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from ldam_plugins import ClassCounts, use_cosine_head
from ldam_plugins.integrations.timm import CifarResNet
from ldam_plugins.metrics import head_inputs, linear_probe
from ldam_plugins.posthoc import Features, extract_features

LABELS = torch.tensor([0, 3, 1, 2, 0, 1])


def images():
    return torch.randn(6, 3, 8, 8)


@pytest.mark.parametrize("cosine", [False, True])
def test_they_are_what_the_head_gets_and_gives(cosine):
    model = CifarResNet(1, num_classes=4).train()
    model = use_cosine_head(model) if cosine else model
    model.layer1.eval()
    x = images()
    found = extract_features(model, DataLoader(TensorDataset(x, LABELS), 4))
    assert model.training
    assert not model.layer1.training
    assert not model.fc._forward_hooks
    model.eval()
    with torch.no_grad():
        features = model.forward_head(model.forward_features(x), pre_logits=True)
        logits = model(x)
    torch.testing.assert_close(found.features, features, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.logits, logits, rtol=0, atol=1e-5)
    assert torch.equal(found.labels, LABELS)
    assert len(found) == 6
    same = head_inputs(model, x.split(4), lambda net, batch: net(batch))
    assert np.array_equal(same, found.features.numpy())


def test_a_convolution_gets_maps_of_one_pixel():
    model = timm.create_model("ghostnet_050", num_classes=4)
    conv = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.Flatten())
    for net, width in ((model, model.head_hidden_size), (conv, 3)):
        found = extract_features(net, [(torch.randn(2, 3, 32, 32), torch.tensor([3, 0]))])
        assert (found.features.shape, found.logits.shape) == ((2, width), (2, 4))


@pytest.mark.parametrize("key", ["labels", "label"])
def test_batches_of_transformers_are_mappings(key):
    config = BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=4,
    )
    model = BertForSequenceClassification(config)
    tokens = {"input_ids": torch.randint(20, (6, 5)), "attention_mask": torch.ones(6, 5).long()}
    found = extract_features(model, [{**tokens, key: LABELS[:, None]}])
    with torch.no_grad():
        pooled, logits = model.eval().bert(**tokens).pooler_output, model(**tokens).logits
    torch.testing.assert_close(found.features, pooled)
    torch.testing.assert_close(found.logits, logits)
    assert torch.equal(found.labels, LABELS)
    pair = extract_features(model, [(tokens, LABELS)])
    assert torch.equal(pair.features, found.features)


def test_no_gradient_and_no_dropout():
    model = Net(dropout=0.5)
    x = torch.randn(3, 6)
    found = extract_features(model, [(x, [0, 1, 4])], origin={"data set": "noise", "size": 3})
    assert not found.features.requires_grad
    assert not found.features.is_inference()
    expected = model.body(x)
    torch.testing.assert_close(found.features, expected.detach())
    assert found.labels.dtype == torch.int64
    recorded = {"model": "Net", "head": "heads.0", "data set": "noise", "size": "3"}
    assert found.origin == {**recorded, "torch": torch.__version__}


def test_a_compiled_model_runs_uncompiled():
    model = Net().eval()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(4, 6)
    with torch.inference_mode():
        compiled(x)  # from now on there is a graph that knows no hooks
    found = extract_features(compiled, [(x, torch.tensor([0, 1, 2, 3]))])
    torch.testing.assert_close(found.features, model.body(x).detach())


def test_16_bits_become_32():
    model = Net().bfloat16()
    found = extract_features(model, [(torch.randn(2, 6).bfloat16(), torch.tensor([0, 1]))])
    assert found.features.dtype == found.logits.dtype == torch.float32


@pytest.mark.gpu
def test_they_come_back_from_the_device():
    x, labels = torch.randn(4, 6), torch.tensor([0, 1, 2, 3])
    model = Net()
    on_cpu = extract_features(model, [(x, labels)])
    found = extract_features(model, [(x, labels)], device="cuda")
    assert next(model.parameters()).is_cuda
    assert found.features.device.type == "cpu"
    torch.testing.assert_close(found.features, on_cpu.features, rtol=1e-3, atol=1e-3)


def test_a_device_is_where_the_model_goes():
    model = Net().double()
    found = extract_features(model, [(torch.randn(2, 6).double(), LABELS[:2])], device="cpu")
    assert found.features.dtype == torch.float32


def test_a_file_gives_back_every_bit(tmp_path):
    names = ("a", "ü b", "c", "d")
    model = CifarResNet(1, num_classes=4)
    found = extract_features(model, [(images(), LABELS)], class_names=names, origin={"by": "me"})
    path = tmp_path / "new" / "features.safetensors"
    found.save(path)
    again = Features.load(path)
    for name in ("features", "logits", "labels"):
        assert torch.equal(getattr(found, name), getattr(again, name))
    assert again.class_names == names
    assert again.origin == found.origin
    assert [p.name for p in path.parent.iterdir()] == ["features.safetensors"]
    extract_features(model, [(images(), LABELS)]).save(path)
    assert Features.load(path).class_names is None


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"no such thing")
    with pytest.raises(ValueError, match=r"`path` must be a file written by Features.save"):
        Features.load(path)
    save_file({"features": torch.ones(1, 1)}, path)
    with pytest.raises(ValueError, match=r"`path` must be a file written by Features.save"):
        Features.load(path)
    with pytest.raises(FileNotFoundError):
        Features.load(tmp_path / "none")


def test_they_fit_a_linear_probe():
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 30)
    x = torch.from_numpy(np.eye(3)[labels] * 9 + random.normal(size=(90, 3))).float()
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 7))
    found = extract_features(model, DataLoader(TensorDataset(x, torch.from_numpy(labels)), 32))
    sets = (found.features.numpy(), found.labels.numpy()) * 2
    assert linear_probe(*sets, ClassCounts.from_labels(found.labels))["top1_error"] == 0


class Twice(Net):
    def forward(self, x):
        return super().forward(x) + super().forward(x)


class NoLogits(Net):
    def forward(self, x):
        return {"answer": super().forward(x)[0]}


@pytest.mark.parametrize(
    ("model", "batch", "error", "message"),
    [
        (nn.ReLU(), None, ValueError, "classifier can be found"),
        (Net(), (torch.ones(2, 6),), TypeError, r"pairs \(inputs, labels\).*'tuple of 1'"),
        (Net(), torch.ones(2, 6), TypeError, r"pairs \(inputs, labels\).*'Tensor'"),
        (Net(), {"x": torch.ones(2, 6)}, TypeError, r"mappings with `labels`, got \['x'\]"),
        (Net(), (torch.ones(2, 6), torch.ones(2)), TypeError, "`labels` must be integers"),
        (Net(), (torch.ones(2, 6), torch.tensor([0, -1])), ValueError, r"-1 in row 1"),
        (Net(), (torch.ones(2, 6), torch.tensor([0, 5])), ValueError, r"0..4, got '5 in row 1'"),
        (Net(), (torch.full((2, 6), torch.nan), LABELS[:2]), ValueError, "finite.*NaN"),
        (Net(), (torch.ones(3, 6), LABELS[:2]), ValueError, r"model output.*\(2, 5\).*\(3, 5\)"),
        (NoLogits(), (torch.ones(2, 6), LABELS[:2]), ValueError, "model"),
    ],
)
def test_bad_input_is_named(model, batch, error, message):
    mode = model.training
    names = tuple("abcde")
    with pytest.raises(error, match=message):
        extract_features(model, [batch], class_names=names)
    assert model.training == mode
    assert not any(part._forward_hooks for part in model.modules())


@pytest.mark.parametrize("shared", [True, False])
def test_several_heads_stand_side_by_side(shared):
    model, x = Net(heads=2, shared=shared).eval(), torch.randn(3, 6)
    found = extract_features(model, [(x, LABELS[:3])])
    expected = torch.cat([model.body(x), model.other(x)], dim=1).detach()
    torch.testing.assert_close(found.features, expected)
    assert found.origin["head"] == "heads.0, heads.1"


def test_of_a_head_on_all_tokens_it_is_the_token_that_gives_the_logits():
    config = GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2, pad_token_id=0, num_labels=4)
    model = GPT2ForSequenceClassification(config).eval()
    ids = torch.randint(1, 20, (6, 5))
    ids[:3, 3:] = 0  # so that another token is the last
    found = extract_features(model, [{"input_ids": ids, "labels": LABELS}])
    with torch.no_grad():
        torch.testing.assert_close(model.score(found.features), found.logits)
        states = model.transformer(ids).last_hidden_state
    torch.testing.assert_close(found.features[0], states[0, 2])
    torch.testing.assert_close(found.features[5], states[5, 4])


def test_a_head_that_is_called_twice_and_a_loader_without_batches_are_refused():
    model = Twice()
    model.pretrained_cfg = {"classifier": "heads.0"}
    with pytest.raises(ValueError, match=re.escape("`calls of the head for a batch` must be 1")):
        extract_features(model, [(torch.ones(2, 6), LABELS[:2])])
    with pytest.raises(ValueError, match="at least one batch"):
        extract_features(Net(), [])


def test_rows_must_match():
    with pytest.raises(ValueError, match=r"`logits` must be of shape \(2, ...\)"):
        Features(torch.ones(2, 3), torch.ones(1, 3), torch.tensor([0, 1]))
    with pytest.raises(TypeError, match="`features` must be floating-point"):
        Features(torch.ones(2, 3).long(), torch.ones(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="at least one sample"):
        Features(torch.ones(0, 3), torch.ones(0, 3), torch.zeros(0).long())


def same(first, second):
    """Whether two features hold the same bits."""
    names = ("features", "logits", "labels")
    return all(torch.equal(getattr(first, name), getattr(second, name)) for name in names)


def test_they_lie_in_files_that_numpy_reads(tmp_path):
    model, data = samples()
    folder = tmp_path / "new" / "features"
    names = tuple("abcde")
    loader = DataLoader(data, 4)
    found = extract_features(model, loader, class_names=names, memmap_dir=folder)
    plain = extract_features(model, loader, class_names=names)
    assert same(found, plain)
    assert isinstance(np.load(folder / "features.npy", mmap_mode="r"), np.memmap)
    assert np.array_equal(np.load(folder / "features.npy"), plain.features.numpy())
    again = Features.load(folder)
    assert same(again, plain)
    assert (again.class_names, again.origin) == (names, plain.origin)
    again.features.add_(1)  # stays in memory
    assert same(Features.load(folder), plain)
    with pytest.raises(ValueError, match="`memmap_dir` must be a folder that is not there yet"):
        extract_features(model, loader, memmap_dir=folder)
    (folder / "labels.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match="`path` must be a folder of features"):
        Features.load(folder)


def test_no_folder_is_left_of_an_error(tmp_path):
    model = Net()
    good = (torch.ones(2, 6), LABELS[:2])
    bad = (torch.full((2, 6), torch.nan), LABELS[:2])
    for batches in ([good, bad], [good, (torch.ones(3, 6), LABELS[:2])], []):
        with pytest.raises(ValueError, match=r"NaN or infinity in row 2|model output|one batch"):
            extract_features(model, batches, memmap_dir=tmp_path / "features")
        assert not any(tmp_path.iterdir())


def test_the_cache_knows_weights_data_and_precision(tmp_path):
    model, data = samples()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))

    def extract(samples=data, **given):
        calls.clear()
        found = extract_features(model, DataLoader(samples, 4), cache_dir=tmp_path / "c", **given)
        return found, len(calls)

    first, ran = extract()
    assert ran == 3
    again, ran = extract()
    assert ran == 0
    assert same(first, again)
    entries = set((tmp_path / "c").iterdir())
    assert len(entries) == 1
    moved = TensorDataset(data.tensors[0].flip(0), data.tensors[1])
    relabelled = TensorDataset(data.tensors[0], data.tensors[1].flip(0))
    for given in ({"samples": moved}, {"samples": relabelled}, {"autocast": torch.bfloat16}):
        assert extract(**given)[1] == 3
    with torch.no_grad():
        model[0].weight[1, 0] += 1e-3
    changed, ran = extract()
    assert ran == 3
    assert not same(changed, first)
    assert len([*(tmp_path / "c").iterdir()]) == 5
    with torch.no_grad():
        model[0].weight[1, 0] -= 1e-3
        model[1].running_mean += 1  # a buffer
    assert extract()[1] == 3
    assert extract(data_key="v1")[1] == 3
    assert extract(samples=moved, data_key="v1")[1] == 0  # by the user's word
    with pytest.raises(ValueError, match="`data_key` must be left out without `cache_dir`"):
        extract_features(model, DataLoader(data, 4), data_key="v1")
    with pytest.raises(ValueError, match="`memmap_dir` must be left out beside"):
        extract_features(model, DataLoader(data, 4), memmap_dir="a", cache_dir="b")


def test_autocast_is_that_precision():
    model, data = samples()
    lower = extract_features(model, DataLoader(data, 4), autocast=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        around = extract_features(model, DataLoader(data, 4))
    assert same(lower, around)
    assert lower.features.dtype == torch.float32
    assert not same(lower, extract_features(model, DataLoader(data, 4)))


def test_two_processes_share_the_work_and_both_have_all(tmp_path):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", "2", "--main_process_port", "0"]
    command += [str(HELPERS / "feature_run.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    model, data = samples()
    alone = extract_features(model, DataLoader(data, 2))
    for name in ("memory", "files", "cache0", "cache1"):
        for rank in range(2):
            found = Features.load(tmp_path / f"{name}_{rank}.safetensors")
            assert same(found, alone), (name, rank)
    assert len([*(tmp_path / "cache").iterdir()]) == 1
    assert not [*tmp_path.glob("**/*.partial")]
