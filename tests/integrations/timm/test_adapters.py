import pytest
import timm
import torch
from timm.models import save_for_hf
from torch import nn

from ldam_plugins.heads import cosine_heads, fold_cosine_head, use_cosine_head
from ldam_plugins.integrations.timm.adapters import adaptable_layers, add_adapters, merged

SIZE = (3, 64, 64)
MODELS = ["test_vit", "test_resnet", "test_efficientnet", "test_convnext", "test_nfnet"]
MODELS += ["test_mambaout", "test_maxvit", "test_byobnet"]


def adapted(name, rank=2, size=SIZE, **options):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **options)
    use_cosine_head(model)
    return add_adapters(model, rank, 16, size)


def size_of(name):
    return (3, 160, 160) if "vit" in name else SIZE


@pytest.mark.parametrize("name", MODELS)
def test_merged_weights_give_what_the_adapters_did(name):
    size = size_of(name)
    model = adapted(name, size=size).train()
    images = torch.randn(2, *size)
    model(images).square().sum().backward()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values())
    heads = [key for key in trained if "lora_" not in key]
    assert heads == [
        f"base_model.model.{key}.weight" for key in cosine_heads(model.base_model.model)
    ]
    before = model.eval()(images).detach()
    with torch.no_grad():
        for key, parameter in trained.items():
            if "lora_B" in key:
                parameter.normal_(0, 0.02)
        expected = model(images)
        alone = merged(model)
        found = alone(images)
    assert type(alone).__module__.startswith("timm.")
    assert not any("lora" in key for key in alone.state_dict())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    if name != "test_nfnet":  # whose blocks begin at zero
        assert (found - before).abs().max() > 1e-4


def test_they_begin_as_the_model_is_and_its_statistics_stay():
    plain = timm.create_model("test_resnet", num_classes=3).eval()
    images = torch.randn(2, *SIZE)
    expected = plain(images).detach()
    statistics = plain.bn1.running_mean.clone()
    model = add_adapters(plain, 4, 8, SIZE)
    torch.testing.assert_close(model.eval()(images), expected)
    model.train()(images)
    assert plain.bn1.running_mean.equal(statistics)
    assert plain.bn1.num_batches_tracked == 0
    assert plain.training


def test_grouped_dilated_and_unused_layers_have_none():
    model = timm.create_model("test_efficientnet", num_classes=3)
    found = adaptable_layers(model, SIZE)
    assert "conv_stem" in found
    assert "classifier" not in found
    assert not any(model.get_submodule(name).groups > 1 for name in found)
    parts = [nn.Conv2d(3, 4, 3, dilation=2), nn.Conv2d(4, 4, 1), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*parts, nn.Flatten(), nn.Linear(4, 2))
    assert adaptable_layers(model, SIZE) == ["1"]

    class WeightAlone(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(192, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(nn.functional.linear(x.flatten(1), self.inner.weight))

    with pytest.raises(ValueError, match=r"`lora_rank` must be 0 .*got 2\. WeightAlone has none"):
        add_adapters(WeightAlone(), 2, 16, (3, 8, 8))


def test_names_that_peft_uses_are_refused():
    model = timm.create_model("dla34", num_classes=3)
    with pytest.raises(ValueError, match=r"a part called `base_layer`.*DLA has one"):
        add_adapters(model, 2, 16, SIZE)


def test_a_model_without_adapters_is_itself():
    model = timm.create_model("test_vit")
    assert merged(model) is model


def test_missing_peft_is_named(monkeypatch):
    monkeypatch.setattr("ldam_plugins.integrations.timm.adapters.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="pip install peft"):
        add_adapters(nn.Linear(2, 2), 2, 16, SIZE)


def test_what_is_saved_is_loaded_by_timm_alone(tmp_path):
    model = adapted("test_resnet")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_(0, 0.02)
    images = torch.randn(2, *SIZE)
    alone = fold_cosine_head(merged(model.eval()))
    save_for_hf(alone, str(tmp_path))
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert loaded(images).equal(alone(images))
