"""The cosine head on real timm and transformers architectures, and back into their loaders."""

import copy

import pytest
import timm
import torch
import transformers
from host_models import COMMON, IMAGE, TEXT, hugging_face, make_real, random_features, used_by_head
from safetensors.torch import load_file, save_file
from timm.utils import ModelEmaV3
from torch.utils._pytree import tree_map_only
from transformers import AutoConfig

from ldam_plugins.heads import (
    CosineLinear,
    cosine_heads,
    find_head,
    fold_cosine_head,
    folded_state_dict,
    use_cosine_head,
)

# One architecture or two of each timm module, with every way timm names a classifier.
LISTED = """
    test_vit test_byobnet test_coatnet test_convnext test_nfnet test_resnet test_efficientnet
    test_mambaout test_vit_relpos halonet26t caformer_s18 coat_lite_tiny convit_tiny
    convmixer_768_32 cpubone_b0_bfrobust crossvit_9_240 darknet17 cspresnet50 davit_tiny
    deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 densenet121 dla34 ese_vovnet19b_slim
    edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientvim_m1 efficientvim_m1_dist
    efficientvit_b0 efficientvit_m0 fasternet_t0 fastvit_t8 mobilenetv3_small_050 ghostnet_050
    gmlp_s16_224 hardcorenas_a hgnetv2_b0 hiera_tiny_224 repvit_m1 iformer_t inception_next_atto
    inception_resnet_v2 inception_v3 legacy_seresnet18 legacy_xception levit_128s levit_512
    mobilevit_xxs mvitv2_tiny nest_tiny pit_ti_distilled_224 poolformer_s12 pvt_v2_b0 regnety_002
    repghostnet_050 res2net50d resnest14d resnet50_clip resnetv2_18 rexnet_100 samvit_base_patch16
    selecsls42 shvit_s1 skresnet18 starnet_s1 swiftformer_xs swin_tiny_patch4_window7_224
    tiny_vit_5m_224 twins_svt_small visformer_tiny volo_d1_224 xception41 xcit_nano_12_p8_224
    dpn48b tresnet_m
"""
ARCHITECTURES = LISTED.split()

# Models that average heads which read different features (see `fold_cosine_head`).
SEPARATE = ("crossvit", "deit_tiny_dist", "efficientvim", "levit_128", "pit_", "repvit", "volo")


def classifier_path(arch):
    path = timm.get_pretrained_cfg(arch).classifier
    return (path,) if isinstance(path, str) else tuple(path)


def shapes(model):
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def head_outputs(model, names, features):
    """Return what each head gave, and last what the model made of it."""
    outputs = []
    layers = [model.get_submodule(name) for name in names]
    hooks = [m.register_forward_hook(lambda m, x, y: outputs.append(y)) for m in layers]
    outputs.append(model.forward_head(features))
    for hook in hooks:
        hook.remove()
    return outputs


def test_the_architectures_cover_timm():
    modules = {timm.models._registry._model_to_module[arch] for arch in ARCHITECTURES}
    assert len(set(ARCHITECTURES)) >= 60
    assert len(modules) >= 40
    assert len({classifier_path(arch) for arch in ARCHITECTURES}) >= 21


@torch.no_grad()
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_timm_heads_fold_back_to_the_same_class(arch):
    """Body on the meta device, for its shapes; the head in full, on features of any length."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = timm.create_model(arch, num_classes=7).eval()
        stock = shapes(model)
        empty = model.forward_features(torch.empty(4, *model.pretrained_cfg["input_size"]))
    names = find_head(model)
    assert names == classifier_path(arch)
    use_cosine_head(model)
    assert set(cosine_heads(model)) == set(names)
    for module in used_by_head(model, empty):
        make_real(module)
    features = tree_map_only(torch.Tensor, random_features, empty)
    cosine = head_outputs(model, names, features)
    fold_cosine_head(model)
    linear = head_outputs(model, names, features)
    assert shapes(model) == stock
    assert cosine[-1].shape == (4, 7)
    checked = len(names) if arch.startswith(SEPARATE) else len(names) + 1
    for before, after in list(zip(cosine, linear, strict=True))[:checked]:
        assert before.abs().max() <= 30.001
        dim = 1 if before.ndim == 4 else -1
        assert after.argmax(dim).equal(before.argmax(dim))


@torch.no_grad()
@pytest.mark.parametrize(
    "arch", ["test_vit", "test_resnet", "test_efficientnet", "dla46_c", "efficientformerv2_s0"]
)
def test_timm_loads_the_folded_model_itself(arch, tmp_path):
    torch.manual_seed(0)
    size = {"img_size": 64} if arch in ("test_vit", "efficientformerv2_s0") else {}
    model = use_cosine_head(timm.create_model(arch, num_classes=7, **size))
    images = torch.randn(8, 3, 64, 64)
    model.train()(images)
    cosine = model.eval()(images)
    linear = fold_cosine_head(model)(images)
    path = str(tmp_path / "model.safetensors")
    save_file(model.state_dict(), path)
    stock = timm.create_model(arch, num_classes=7, checkpoint_path=path, **size).eval()
    assert stock(images).equal(linear)
    assert linear.argmax(1).equal(cosine.argmax(1))


def test_timm_averages_of_the_model_fold_like_the_model():
    model = use_cosine_head(timm.create_model("test_resnet", num_classes=7))
    average = ModelEmaV3(model, decay=0.5)
    for _ in range(4):
        model(torch.randn(4, 3, 32, 32))
        average.update(model)
    unknown = 30 / model.fc.in_features**0.5
    layers = [fold_cosine_head(part).get_classifier() for part in (model, average.module)]
    scale, other = (layer.weight.norm(dim=1)[0].item() for layer in layers)
    assert scale == pytest.approx(other, rel=0.1)
    assert scale != pytest.approx(unknown, rel=0.1)


@torch.no_grad()
@pytest.mark.parametrize(
    ("arch", "own"), [("repvit_m1", True), ("repvit_m1", False), ("levit_128s", False)]
)
def test_what_fuses_layers_for_inference_folds_the_head_first(arch, own):
    """RepViT and LeViT read the head's weight as that of an ordinary layer."""
    torch.manual_seed(0)
    model = use_cosine_head(timm.create_model(arch, num_classes=7))
    size = 224 if arch == "levit_128s" else 64
    images = torch.randn(8, 3, size, size)
    model.train()(images)
    expected = fold_cosine_head(copy.deepcopy(model)).eval()(images)
    if not own:
        fused = timm.utils.reparameterize_model(model.eval())
        assert cosine_heads(model)
    else:
        fused = copy.deepcopy(model.eval())
        fused.fuse()
    assert cosine_heads(fused) == {}
    torch.testing.assert_close(fused(images), expected, rtol=1e-3, atol=1e-3)
    with torch.enable_grad(), pytest.raises(ValueError, match=r"with the cosine head 'head"):
        fused.train()(images)


def test_a_reset_classifier_stops_the_training():
    model = use_cosine_head(timm.create_model("test_vit", num_classes=7, img_size=32))
    images = torch.randn(2, 3, 32, 32)
    model(images)
    model.reset_classifier(7)
    with pytest.raises(ValueError, match=r"cosine head 'head'.*got 'Linear'.*reset_classifier"):
        model(images)
    model.eval()(images)
    use_cosine_head(model).train()(images)


def test_timm_models_without_a_classifier_say_so():
    with torch.device("meta"):
        model = timm.create_model("test_resnet", num_classes=0)
        with pytest.raises(ValueError, match=r"num_classes=0"):
            use_cosine_head(model)
        swapped = use_cosine_head(timm.create_model("test_vit", num_classes=5))
    swapped.reset_classifier(3)
    assert use_cosine_head(swapped).head.out_features == 3


HEADS = {
    "roberta": "classifier.out_proj",
    "xlnet": "logits_proj",
    "electra": "classifier.out_proj",
    "gpt2": "score",
    "llama": "score",
    "t5": "classification_head.out_proj",
    "xlm": "sequence_summary.summary",
    "funnel": "classifier.linear_out",
    "resnet": "classifier.1",
    "timm_wrapper": "timm_model.fc",
}


@torch.no_grad()
@pytest.mark.parametrize("kind", [*TEXT, *IMAGE])
def test_transformers_load_the_folded_model_themselves(kind, tmp_path):
    model, batch = hugging_face(kind)
    again = use_cosine_head(copy.deepcopy(model))
    name = HEADS.get(kind, "classifier")
    assert find_head(model) == (name,)
    use_cosine_head(model).train()(**batch)
    cosine = model.eval()(**batch).logits
    state = folded_state_dict(model)
    model.save_pretrained(tmp_path / "checkpoint", state_dict=dict(state))
    linear = fold_cosine_head(model)(**batch).logits
    model.save_pretrained(tmp_path / "model")
    assert cosine.shape == (8, 5)
    assert linear.argmax(1).equal(cosine.argmax(1))
    stock, report = type(model).from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(report.values()), report
    torch.testing.assert_close(stock.eval()(**batch).logits, linear)
    stock = type(model).from_pretrained(tmp_path / "checkpoint").eval()
    torch.testing.assert_close(stock(**batch).logits, linear)
    again.load_state_dict(state)
    assert again.eval()(**batch).logits.equal(cosine)


@torch.no_grad()
def test_a_checkpoint_file_gives_the_exact_head_back(tmp_path):
    model, batch = hugging_face("bert")
    again = use_cosine_head(copy.deepcopy(model))
    use_cosine_head(model).train()(**batch)
    model.save_pretrained(tmp_path, state_dict=folded_state_dict(model))
    again.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert all(again.state_dict()[key].equal(value) for key, value in model.state_dict().items())


def test_transformers_with_two_heads_are_found():
    with torch.device("meta"):
        config = AutoConfig.for_model("deit", num_labels=5, **IMAGE["vit"])
        model = transformers.DeiTForImageClassificationWithTeacher(config)
        assert find_head(model) == ("cls_classifier", "distillation_classifier")
        with pytest.raises(ValueError, match=r"pooler.*`head=`|`head=`.*pooler"):
            use_cosine_head(transformers.BertModel(AutoConfig.for_model("bert", **COMMON)))


def test_a_cosine_layer_inside_a_transformers_class_gets_its_initial_weights(tmp_path):
    class Classifier(transformers.BertPreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.bert = transformers.BertModel(config)
            self.classifier = CosineLinear(config.hidden_size, config.num_labels)
            self.post_init()

    config = AutoConfig.for_model("bert", vocab_size=64, num_labels=5, **COMMON)
    transformers.BertModel(config).save_pretrained(tmp_path)
    weight = Classifier.from_pretrained(tmp_path).classifier.weight
    assert 0.01 < weight.std() < 0.04


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_trains_the_head_in_full_and_folds_after_merging():
    peft = pytest.importorskip("peft")
    model, batch = hugging_face("bert")
    config = peft.LoraConfig(target_modules=["query"], modules_to_save=["classifier"], r=2)
    model = peft.get_peft_model(use_cosine_head(model), config)
    assert use_cosine_head(model) is model
    (name,) = find_head(model)
    assert model.get_submodule(name).weight.requires_grad
    model.train()(**batch)
    cosine = model.eval()(**batch).logits
    linear = fold_cosine_head(model.merge_and_unload())(**batch).logits
    assert linear.argmax(1).equal(cosine.argmax(1))
    config = peft.LoraConfig(target_modules=["query", "classifier"], r=2)
    lora = peft.get_peft_model(use_cosine_head(hugging_face("bert")[0]), config)
    for function in (use_cosine_head, fold_cosine_head):
        with pytest.raises(ValueError, match=r"without an adapter on its head"):
            function(lora)
