"""The CIFAR ResNets against what timm asks of a model, by the checks of timm's own test suite."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import resolve_data_config
from timm.models import (
    FeatureInfo,
    FeatureListNet,
    create_feature_extractor,
    get_graph_node_names,
    group_parameters,
)
from timm.optim import create_optimizer_v2
from torch import nn

from ldam_plugins.integrations.timm import CifarResNet

NAME = "cifar_resnet20"
# TorchScript is on its way out of torch; timm's models still promise it.
scripts = pytest.mark.filterwarnings("ignore:.torch.jit.*deprecated")
SHAPES = [(16, 32, 32), (32, 16, 16), (64, 8, 8)]


@pytest.fixture(name="images")
def _images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def make(**options):
    torch.manual_seed(1)
    model = timm.create_model(NAME, **options)
    assert isinstance(model, CifarResNet) != bool(options.get("features_only"))
    return model


def settled(model):
    """The model in evaluation mode, its batch norms with statistics of their own."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return model.eval()


def stages_of(model, images):
    """Feature maps after each stage, written out; BatchNorm by its running statistics."""

    def normed(x, bn):
        scale = (bn.weight / (bn.running_var + bn.eps).sqrt())[:, None, None]
        return (x - bn.running_mean[:, None, None]) * scale + bn.bias[:, None, None]

    x = F.relu(normed(F.conv2d(images, model.conv1.weight, padding=1), model.bn1))
    maps = []
    for stage in (model.layer1, model.layer2, model.layer3):
        for block in stage:
            stride = block.conv1.stride
            y = F.relu(normed(F.conv2d(x, block.conv1.weight, None, stride, 1), block.bn1))
            y = normed(F.conv2d(y, block.conv2.weight, padding=1), block.bn2)
            if stride == (2, 2):
                short = torch.zeros_like(y)
                quarter = x.shape[1] // 2
                short[:, quarter:-quarter] = x[:, :, ::2, ::2]
                x = short
            x = F.relu(y + x)
        maps.append(x)
    return maps


def backbone_of(model, **options):
    """A backbone of ``timm.create_model(..., features_only=True)`` with the model's weights."""
    backbone = timm.create_model(NAME, features_only=True, **options)
    weights = {k: v for k, v in model.state_dict().items() if not k.startswith("fc.")}
    prefix = next(iter(backbone.state_dict())).removesuffix("conv1.weight")
    backbone.load_state_dict(
        {f"{prefix}{k}": v for k, v in weights.items() if f"{prefix}{k}" in backbone.state_dict()}
    )
    return backbone.eval()


class TestFeaturesOnly:
    @pytest.mark.parametrize("kind", ["list", "hook", "getter"])
    @pytest.mark.parametrize(
        ("chosen", "stages"),
        [(None, [0, 1, 2]), ((0, 2), [0, 2]), ((1,), [1]), ((-1,), [2]), ((-2, -1), [1, 2])],
    )
    def test_gives_the_maps_of_the_chosen_stages(self, images, kind, chosen, stages):
        model = settled(make())
        options = {} if chosen is None else {"out_indices": chosen}
        backbone = backbone_of(model, feature_cls=kind, **options)
        maps = backbone(images)
        assert [tuple(f.shape[1:]) for f in maps] == [SHAPES[i] for i in stages]
        assert backbone.feature_info.channels() == [SHAPES[i][0] for i in stages]
        assert backbone.feature_info.reduction() == [(1, 2, 4)[i] for i in stages]
        right = stages_of(model, images)
        for got, stage in zip(maps, stages, strict=True):
            torch.testing.assert_close(got, right[stage], rtol=1e-3, atol=1e-3)

    def test_as_a_dict_and_as_a_traced_graph(self, images):
        right = stages_of(settled(make()), images)
        for kind, options in {"dict": {}, "fx": {}}.items():
            maps = backbone_of(settled(make()), feature_cls=kind, **options)(images)
            maps = list(maps.values()) if isinstance(maps, dict) else maps
            for got, stage in zip(maps, right, strict=True):
                torch.testing.assert_close(got, stage, rtol=1e-3, atol=1e-3)

    def test_takes_the_feature_cfg_of_the_caller(self, images):
        made = make(features_only=True, feature_cfg={"feature_cls": "getter", "out_indices": (2,)})
        assert type(made).__name__ == "FeatureGetterNet"
        assert [tuple(f.shape[1:]) for f in made(images)] == SHAPES[2:]

    @scripts
    def test_other_channels_and_scripting(self):
        backbone = make(features_only=True, in_chans=5).eval()
        assert isinstance(backbone, FeatureListNet)
        images = torch.randn(1, 5, 20, 12)
        scripted = torch.jit.script(backbone)
        for got, right in zip(scripted(images), backbone(images), strict=True):
            torch.testing.assert_close(got, right)
        assert backbone.in_chans == 5

    def test_a_stage_that_is_not_there_is_refused(self):
        with pytest.raises((AssertionError, IndexError)):
            make(features_only=True, out_indices=(3,))


class TestIntermediates:
    def test_are_those_of_forward_features(self, images):
        model = settled(make())
        assert FeatureInfo(model.feature_info, 3).channels() == [16, 32, 64]
        last, maps = model.forward_intermediates(images)
        assert torch.equal(last, model.forward_features(images))
        assert torch.equal(last, maps[2])
        for got, right in zip(maps, stages_of(model, images), strict=True):
            torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-3)
        model.set_grad_checkpointing()
        for got, right in zip(model.forward_intermediates(images)[1], maps, strict=True):
            torch.testing.assert_close(got, right)

    def test_choose_stages_and_stop_early(self, images):
        model = settled(make())
        _, maps = model.forward_intermediates(images)
        for indices, stages in ((2, [1, 2]), ([0], [0]), ([-3, 1], [0, 1])):
            got = model.forward_intermediates(images, indices, intermediates_only=True, norm=True)
            assert [torch.equal(g, maps[i]) for g, i in zip(got, stages, strict=True)]
        early, (first,) = model.forward_intermediates(images, [0], stop_early=True)
        assert torch.equal(early, first)
        assert torch.equal(first, maps[0])

    def test_refuse_another_format(self, images):
        with pytest.raises(ValueError, match=r"`output_fmt` must be one of 'NCHW', got 'NLC'"):
            make().forward_intermediates(images, output_fmt="NLC")

    @pytest.mark.parametrize(("indices", "kept", "width"), [([0], 0, 16), ([0, 1], 1, 32)])
    def test_pruning_drops_what_follows(self, images, indices, kept, width):
        model = settled(make())
        right = model.forward_intermediates(images)[1][kept]
        assert model.prune_intermediate_layers(indices) == indices
        assert (model.num_features, model.head_hidden_size, model.num_classes) == (width, width, 0)
        assert torch.equal(model.forward_features(images), right)
        assert torch.equal(model(images), right)
        model.reset_classifier(4, "avg")
        assert model(images).shape == (2, 4)

    def test_pruning_nothing_may_keep_the_head(self, images):
        model = settled(make(num_classes=3))
        right = model(images)
        assert model.prune_intermediate_layers([2], prune_head=False) == [2]
        assert torch.equal(model(images), right)
        model.prune_intermediate_layers(1)
        assert model(images).shape == (2, 64, 8, 8)


@scripts
class TestTracing:
    @pytest.mark.parametrize("training", [False, True])
    def test_torchscript_gives_the_same(self, images, training):
        model = settled(make(scriptable=True, exportable=True, num_classes=5, drop_path_rate=0.2))
        right = model(images)
        scripted = torch.jit.script(model.train(training))
        scripted.eval()
        torch.testing.assert_close(scripted(images), right)
        traced = torch.jit.trace(model.eval(), images)
        torch.testing.assert_close(traced(images), right)

    def test_fx_gives_the_same_forward_and_backward(self, images):
        model = settled(make(num_classes=5))
        train_nodes, eval_nodes = get_graph_node_names(model)
        assert eval_nodes[-1] == train_nodes[-1] == "fc"
        graph = create_feature_extractor(model, ["fc", "layer2"])
        out = graph(images)
        assert torch.equal(out["fc"], model(images))
        assert torch.equal(out["layer2"], model.forward_intermediates(images)[1][1])
        torch.jit.script(graph)(images)
        graph.train()(images)["fc"].mean().backward()
        assert all(p.grad is not None for p in graph.parameters())

    def test_export_and_full_graph_compilation(self, images):
        model = settled(make(num_classes=5))
        right = model(images)
        exported = torch.export.export(model, (images,)).module()
        torch.testing.assert_close(exported(images), right)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.equal(compiled(images), right)


class TestConstruction:
    def test_weights_of_a_seed_are_those_of_plain_layers(self):
        model = make(num_classes=7)
        torch.manual_seed(1)
        layers = [nn.Conv2d(3, 16, 3, padding=1, bias=False)]
        for before, width in ((16, 16), (16, 32), (32, 64)):
            for block in range(3):
                first = width if block else before
                layers += [nn.Conv2d(first, width, 3, bias=False)]
                layers += [nn.Conv2d(width, width, 3, bias=False)]
        layers += [nn.Linear(64, 7)]
        for layer in layers:
            nn.init.kaiming_normal_(layer.weight)
        made = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        for got, right in zip(made, layers, strict=True):
            assert torch.equal(got.weight, right.weight)
        assert torch.equal(model.fc.bias, layers[-1].bias)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_dtype_is_that_of_all_and_of_a_new_head(self, images, dtype):
        model = make(dtype=dtype)
        model.reset_classifier(3)
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert model.eval()(images.to(dtype)).dtype == dtype
        model.reset_classifier(3, dtype=torch.float32, device="meta")
        assert (model.fc.weight.dtype, model.fc.weight.device.type) == (torch.float32, "meta")

    def test_device_is_that_of_all_and_of_a_new_head(self):
        model = make(device="meta", features_only=False)
        model.reset_classifier(3)
        tensors = [*model.parameters(), *model.buffers()]
        assert {t.device.type for t in tensors} == {"meta"}
        assert model(torch.empty(2, 3, 8, 8, device="meta")).shape == (2, 3)

    def test_a_new_head_has_the_mode_and_the_width_of_the_model(self, images):
        model = make(num_classes=4).eval()
        assert model.get_classifier(name_only=True) == "fc"
        model.reset_classifier(3, "catavgmax")
        assert not model.fc.training
        assert not model.global_pool.training
        features = model.forward_features(images)
        pooled = model.forward_head(features, pre_logits=True)
        assert pooled.shape == (2, model.head_hidden_size) == (2, 128)
        assert model(images).shape == (2, 3)
        model.reset_classifier(0)
        assert torch.equal(model(images), pooled)
        model.reset_classifier(0, "")
        assert torch.equal(model(images), features)

    @pytest.mark.parametrize("pool", ["", "avg", "max", "avgmax", "catavgmax", "fast"])
    def test_pooling_by_the_constructor(self, images, pool):
        model = make(num_classes=0, global_pool=pool).eval()
        features = model.forward_features(images)
        mean, most = features.mean((2, 3)), features.amax((2, 3))
        right = {
            "": features,
            "avg": mean,
            "fast": mean,
            "max": most,
            "avgmax": 0.5 * (mean + most),
            "catavgmax": torch.cat((mean, most), 1),
        }[pool]
        torch.testing.assert_close(model(images), right)
        assert model.head_hidden_size == (128 if pool == "catavgmax" else 64)

    def test_channels_follow_the_configuration(self):
        model = make(pretrained_cfg_overlay={"input_size": (1, 28, 28)})
        assert (model.in_chans, model.conv1.in_channels) == (1, 1)
        assert resolve_data_config(model=model)["input_size"] == (1, 28, 28)

    def test_weights_for_colour_serve_grey_images(self, tmp_path):
        colour = settled(make(num_classes=4))
        torch.save(colour.state_dict(), tmp_path / "weights.pth")
        overlay = {"file": str(tmp_path / "weights.pth"), "num_classes": 4}
        grey = make(pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1, num_classes=4)
        image = torch.randn(1, 1, 16, 16)
        right = colour(image.expand(1, 3, 16, 16))
        torch.testing.assert_close(grey.eval()(image), right, rtol=1e-4, atol=1e-4)
        other = make(pretrained=True, pretrained_cfg_overlay=overlay, num_classes=9)
        assert torch.equal(other.layer3[2].conv2.weight, colour.layer3[2].conv2.weight)
        assert other.fc.out_features == 9

    def test_there_are_no_pretrained_weights(self):
        with pytest.raises(RuntimeError, match=f"No pretrained weights exist for {NAME}"):
            make(pretrained=True)
        assert not timm.list_models("cifar_resnet*", pretrained=True)

    def test_weights_of_a_file(self, tmp_path, images):
        model = settled(make(num_classes=4))
        torch.save({"state_dict": model.state_dict()}, tmp_path / "last.pth.tar")
        loaded = timm.create_model(
            NAME, num_classes=4, checkpoint_path=str(tmp_path / "last.pth.tar")
        )
        assert torch.equal(loaded.eval()(images), model(images))

    def test_options_that_mean_nothing_are_refused(self):
        with pytest.raises(TypeError, match="se_ratio"):
            make(se_ratio=0.25)
        with pytest.raises(ValueError, match=r"`blocks` must be an integer >= 1, got 0"):
            make(blocks=0)

    def test_a_deep_copy_is_whole(self, images):
        model = settled(make())
        assert torch.equal(copy.deepcopy(model)(images), model(images))

    def test_memory_in_channels_last(self, images):
        model = settled(make())
        right = model(images)
        model.to(memory_format=torch.channels_last)
        got = model(images.to(memory_format=torch.channels_last))
        torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-3)


class TestTraining:
    def test_stochastic_depth_grows_with_depth(self, images):
        model = make(drop_path_rate=0.4)
        rates = [getattr(b.drop_path, "drop_prob", 0.0) for b in blocks(model)]
        assert rates == pytest.approx([0.05 * i for i in range(9)])
        model.train()
        assert not torch.equal(model(images), model(images))
        plain = make()
        plain.load_state_dict(model.state_dict())
        assert torch.equal(model.eval()(images), plain.eval()(images))

    def test_a_dropped_block_is_its_shortcut(self, images):
        model = make(drop_path_rate=1.0).train()
        last = model.layer3[-1]
        x = F.relu(torch.randn(64, 64, 4, 4))
        assert torch.equal(last(x), x)

    def test_dropout_before_the_classifier(self, images):
        model = make(num_classes=0, drop_rate=0.5).train()
        pooled = model.forward_head(torch.ones(8, 64, 2, 2))
        assert set(pooled.unique().tolist()) == {0.0, 2.0}

    def test_every_parameter_gets_a_gradient(self, images):
        model = make(num_classes=42).train()
        model(images).mean().backward()
        assert all(p.grad is not None for p in model.parameters())

    def test_layer_decay_and_groups(self):
        model = make(num_classes=4)
        fine = group_parameters(model, model.group_matcher(), reverse=True)
        assert fine["conv1.weight"] == fine["bn1.bias"] == 0
        blocks_in_order = [f"layer{i}.{j}.conv1.weight" for i in (1, 2, 3) for j in range(3)]
        assert [fine[name] for name in blocks_in_order] == list(range(1, 10))
        assert fine["fc.weight"] == 10
        coarse = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
        assert [coarse[f"layer{i}.2.bn2.bias"] for i in (1, 2, 3)] == [1, 2, 3]
        optimizer = create_optimizer_v2(model, opt="sgd", lr=0.1, weight_decay=0.1, layer_decay=0.5)
        scale = {id(p): g["lr_scale"] for g in optimizer.param_groups for p in g["params"]}
        assert scale[id(model.fc.weight)] == 1
        assert scale[id(model.conv1.weight)] == 0.5**10

    def test_the_configuration_names_its_layers(self):
        model = make(num_classes=4)
        state, cfg = model.state_dict(), model.default_cfg
        assert f"{cfg['first_conv']}.weight" in state
        assert f"{cfg['classifier']}.weight" in state
        features = model.forward_features(torch.zeros(1, *cfg["input_size"]))
        assert tuple(features.shape[2:]) == cfg["pool_size"]


def blocks(model):
    return [*model.layer1, *model.layer2, *model.layer3]
