import copy

import pytest
import timm
import torch
from head_models import Net
from torch import nn

from ldam_plugins.heads import freeze_backbone, use_cosine_head
from ldam_plugins.heads.freezing import evaluate_frozen

MODELS = ["test_resnet", "test_efficientnet", "test_vit2", "test_byobnet", "test_mambaout"]


def made(name, cosine, **options):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **options).train()
    if cosine:
        use_cosine_head(model)
    return model


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_nothing_but_the_head_of_a_model_of_timm_moves(name, cosine):
    model = freeze_backbone(made(name, cosine))
    before = state(model)
    head = model.pretrained_cfg["classifier"]
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1)
    for _ in range(2):
        model.train()
        loss = model(torch.randn(4, 3, 64, 64)).logsumexp(1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = {key for key, value in model.state_dict().items() if not value.equal(before[key])}
    own = {f"{head}.weight", f"{head}.cosine_moments" if cosine else f"{head}.bias"}
    assert moved == own


def test_batch_statistics_would_move_in_a_model_that_only_has_no_gradients():
    """What the test above would miss if these models had none."""
    model = made("test_resnet", cosine=True).requires_grad_(False)
    before = state(model)
    model(torch.randn(4, 3, 64, 64))
    assert not model.bn1.running_mean.equal(before["bn1.running_mean"])


def test_every_head_of_several_is_trained():
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=3, img_size=32)
    freeze_backbone(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


def test_frozen_features_are_those_of_evaluation():
    model = freeze_backbone(made("test_vit", cosine=False, proj_drop_rate=0.5)).train()
    images = torch.randn(2, 3, 160, 160)
    assert model(images).equal(model(images))
    assert (model.training, model.head.training) == (True, True)
    assert not any(block.training for block in model.blocks)


def test_a_copy_is_frozen_by_itself_and_evaluation_mode_is_left_alone():
    model = freeze_backbone(made("test_resnet", cosine=True))
    other = copy.deepcopy(model)
    model.eval()
    assert not model.fc.training
    other.train()
    assert (other.fc.training, other.bn1.training, model.fc.training) == (True, False, False)
    for parameter in other.parameters():
        parameter.requires_grad_(True)
    assert other.train().bn1.training
    assert freeze_backbone(model) is model


def test_parts_inside_a_wrapper_stay_in_evaluation_mode():
    model = nn.Sequential(freeze_backbone(made("test_resnet", cosine=False))).train()
    assert (model[0].training, model[0].bn1.training) == (True, False)


def test_new_parameters_are_trained_with_the_head():
    model = Net(dropout=0.5)
    freeze_backbone(model, new=["body.0.bias", "no.such"])
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"body.0.bias", "heads.0.weight", "heads.0.bias"}
    model.train()
    assert (model.drop.training, model.body[0].training) == (True, True)


def test_parameters_of_another_use_stay_trained_only_if_they_need_it():
    model = evaluate_frozen(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)))
    assert model.train()[0].training
    model[0].requires_grad_(False)
    assert not model.train()[0].training


def test_a_model_without_a_backbone_is_refused():
    with pytest.raises(ValueError, match="`model` must be one with pretrained layers before"):
        freeze_backbone(nn.Linear(3, 2))
