import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from ldam_plugins import ClassCounts, DeferredSchedule, LongTailTask, create_loss, use_cosine_head
from ldam_plugins.heads import cosine_heads
from ldam_plugins.integrations.timm import CifarResNet
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
