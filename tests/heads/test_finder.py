"""Where `find_head` looks, and what it says when it cannot tell."""

import pytest
import timm
import torch
import torchvision
import transformers
from accelerate import Accelerator
from head_models import mlp
from torch import nn

from ldam_plugins.heads.finder import find_head


class Net(nn.Module):
    """A module that holds the given children, and calls its body and then the layer called last."""

    def __init__(self, last="fc", **children):
        super().__init__()
        self.last = last
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x):
        return getattr(self, self.last)(self.body(x))


def body():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))


CONV = nn.Conv2d(8, 5, 1)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (nn.Linear(4, 3), ("",)),
        (mlp(4, 6, 3), ("2",)),
        (Net(body=mlp(4, 6, 8), fc=nn.Linear(8, 3), act=nn.ReLU()), ("fc",)),
        (Net(fc=nn.Linear(8, 3), body=body()), ("fc",)),
        (Net(fc=nn.Linear(8, 3), body=mlp(4, 6, 8)), ("fc",)),
        (Net("classifier", body=body(), classifier=mlp(8, 6, 3)), ("classifier.2",)),
        (nn.Sequential(Net(body=body(), fc=nn.Linear(8, 3))), ("0.fc",)),
        (nn.DataParallel(Net(body=body(), fc=nn.Linear(8, 3))), ("module.fc",)),
    ],
)
def test_the_last_linear_layer_of_a_plain_module(model, names):
    assert find_head(model) == names


def test_compiled_models_are_looked_through():
    compiled = torch.compile(Net(body=body(), fc=nn.Linear(8, 3)), backend="eager")
    assert find_head(compiled) == ("_orig_mod.fc",)


@pytest.mark.parametrize(
    ("children", "facts", "names"),
    [
        # What timm says wins over get_classifier and the class count.
        (
            {"fc": nn.Linear(8, 5), "out": nn.Linear(8, 5)},
            {"pretrained_cfg": {"classifier": "fc"}, "num_classes": 5},
            ("fc",),
        ),
        ({"fc": CONV, "aux": body()}, {"default_cfg": {"classifier": "fc"}}, ("fc",)),
        (
            {"a": nn.Linear(8, 5), "b": nn.Linear(9, 5), "c": None, "d": body()},
            {"pretrained_cfg": {"classifier": ("a", "b", "c")}},
            ("a", "b"),
        ),
        # A user's own head under timm's name.
        (
            {"fc": mlp(8, 5, 5), "aux": body()},
            {"pretrained_cfg": {"classifier": "fc"}},
            ("fc.2",),
        ),
        ({"fc": mlp(8, 5, 5), "aux": body()}, {"get_classifier": "fc"}, ("fc.2",)),
        (
            {"heads": nn.ModuleList([nn.Linear(8, 5), nn.Linear(9, 5)]), "aux": body()},
            {"get_classifier": "heads"},
            ("heads.0", "heads.1"),
        ),
    ],
)
def test_what_a_model_says_of_itself(children, facts, names):
    model = Net(**children)
    getter = facts.pop("get_classifier", None)
    if getter:
        model.get_classifier = lambda: (getattr(model, getter),)
    for name, value in facts.items():
        setattr(model, name, value)
    assert find_head(model) == names


class Labels:
    num_labels = 4


def test_transformers_heads_are_outside_the_base_model():
    """Where forward() cannot be followed, one layer there with an output a label is certain."""
    inner = Net(small=nn.Linear(8, 4), wide=nn.Linear(8, 8))
    model = Net(bert=inner, dense=nn.Linear(8, 8), out_proj=nn.Linear(8, 4))
    model.config, model.base_model_prefix = Labels(), "bert"
    assert find_head(model) == ("out_proj",)
    for others in ({}, {"out_proj": nn.Linear(8, 4), "auxiliary": nn.Linear(8, 4)}):
        model = Net(bert=inner, **others)
        model.config, model.base_model_prefix = Labels(), "bert"
        with pytest.raises(ValueError, match=r"cannot be followed.*`head=`.*bert\.small"):
            find_head(model)


def test_layers_as_wide_as_the_class_count_are_settled_by_name():
    model = Net(dense=nn.Linear(4, 4), out_proj=nn.Linear(4, 4))
    model.config = Labels()
    with pytest.raises(ValueError, match=r"head=.*out_proj \(Linear, 4 -> 4\).*dense"):
        find_head(model)
    assert find_head(model, "out_proj") == ("out_proj",)
    assert find_head(model, ["dense", "out_proj"]) == ("dense", "out_proj")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            Net(a=nn.Linear(8, 3), b=mlp(4, 2), c=body()),
            r"found, got 'Net'.*`head=`.*b\.0 .*4 -> 2",
        ),
        (Net(fc=CONV), r"fc \(Conv2d, 8 -> 5\)"),
        (body(), "holds no linear layer and no 1x1 convolution"),
        (nn.ReLU(), "holds no linear layer"),
    ],
)
def test_no_head_found_names_the_candidates(model, message):
    with pytest.raises(ValueError, match=message):
        find_head(model)


def test_a_class_count_that_no_layer_has_is_not_guessed_around():
    model = Net(body=body(), pooler=nn.Linear(8, 8))
    model.config = Labels()
    with pytest.raises(ValueError, match=r"`model` must be a model whose classifier.*pooler"):
        find_head(model)
    model = Net(body=body(), fc=nn.Linear(8, 8))
    model.pretrained_cfg = {"classifier": "head"}
    assert find_head(model) == ("fc",)


def test_auxiliary_heads_of_torchvision_are_heads():
    with torch.device("meta"):
        models = torchvision.models
        inception = models.inception_v3(num_classes=3, init_weights=False)
        googlenet = models.googlenet(num_classes=3, init_weights=False, aux_logits=True)
        names = {"resnet18": "fc", "vit_b_16": "heads.head", "mobilenet_v2": "classifier.1"}
        for name, head in names.items():
            assert find_head(models.get_model(name, num_classes=3)) == (head,)
        with pytest.raises(ValueError, match=r"after the classifier.*classifier\.1 \(Conv2d"):
            find_head(models.squeezenet1_0())
    assert find_head(inception) == ("fc", "AuxLogits.fc")
    assert set(find_head(googlenet)) == {"fc", "aux1.fc2", "aux2.fc2"}


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "edgenext_xx_small", "dla34"])
def test_a_backbone_of_features_has_no_classifier(name):
    with torch.device("meta"):
        whole = timm.create_model(name)
        backbone = timm.create_model(name, features_only=True)
    assert find_head(nn.Sequential(whole)) == tuple(f"0.{part}" for part in find_head(whole))
    with pytest.raises(ValueError, match=r"must be a model with a classifier.*features_only=True"):
        find_head(backbone)


def test_a_model_built_for_features_has_its_own_error():
    model = Net(body=mlp(4, 8), fc=nn.Identity())
    model.num_classes, model.pretrained_cfg = 0, {"classifier": "fc"}
    with pytest.raises(ValueError, match=r"num_classes=0"):
        find_head(model)
    assert find_head(model, "body.0") == ("body.0",)
    assert find_head(Net(body=model, fc=nn.Linear(8, 3))) == ("fc",)


@pytest.mark.parametrize(
    ("head", "error", "message"),
    [
        ("fd", ValueError, "`head` must be one of 'body.0', 'fc', got 'fd'. Did you mean 'fc'"),
        ("body", ValueError, "got 'body'"),
        (["fc", "wide"], ValueError, "got 'wide'"),
        ([], ValueError, "at least one dotted module name"),
        ([3], TypeError, "`head` must be a dotted module name"),
    ],
)
def test_head_must_name_layers(head, error, message):
    wide = nn.Conv2d(8, 5, 3)
    model = Net(body=mlp(4, 8), wide=wide, strided=nn.Conv2d(8, 5, 1, stride=2), fc=nn.Linear(8, 3))
    with pytest.raises(error, match=message):
        find_head(model, head)


def test_only_modules_are_searched():
    with pytest.raises(TypeError, match=r"`model` must be a torch.nn.Module, got 'dict'"):
        find_head({})


@pytest.fixture
def lora():
    peft = pytest.importorskip("peft")

    def wrap(**options):
        model = Net(body=mlp(4, 8), fc=nn.Linear(8, 3))
        model.num_classes, model.forward = 3, lambda x: model.fc(model.body(x))
        return peft.get_peft_model(model, peft.LoraConfig(r=3, **options))

    return wrap


def test_peft_trains_a_copy_of_the_head(lora):
    model = lora(target_modules=["body.0"], modules_to_save=["fc"])
    assert find_head(model) == ("base_model.model.fc.modules_to_save.default",)


def test_an_adapter_on_the_head_is_refused(lora):
    model = lora(target_modules=["body.0", "fc"])
    with pytest.raises(ValueError, match=r"base_model\.model\.fc\.base_layer.*modules_to_save"):
        find_head(model)


class Outer(nn.Module):
    """Gives what the model inside gives, as a model under adapters does."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_model_that_accelerate_has_prepared(precision):
    """Its forward is then one that casts the outputs, which are looked at for that."""
    config = transformers.BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    model = Outer(transformers.BertForSequenceClassification(config))
    prepared = Accelerator(cpu=True, mixed_precision=precision).prepare(model)
    assert find_head(prepared) == ("model.classifier",)
