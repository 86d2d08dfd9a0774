import numpy as np
import pytest
import torch
from torch import nn

from ldam_plugins import ClassCounts, use_cosine_head
from ldam_plugins.integrations.timm import CifarResNet
from ldam_plugins.metrics import head_inputs, linear_probe


def blobs(samples, spread, seed=0):
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(len(samples)), samples)
    centres = np.eye(len(samples))[labels] * 10
    return centres + random.normal(0, spread, centres.shape), labels


def test_probe_finds_what_is_linearly_there_and_no_more():
    counts = ClassCounts([500, 50, 5])
    train, test = blobs([60, 60, 60], 1.0), blobs([40, 40, 40], 1.0, seed=1)
    result = linear_probe(*train, *test, counts)
    assert result["top1_error"] == 0
    assert (result["many"], result["medium"], result["few"]) == (1.0, 1.0, 1.0)
    noise = np.random.default_rng(2).normal(size=train[0].shape)
    blind = linear_probe(noise, train[1], *test, counts)
    assert blind["balanced_accuracy"] < 0.6


def test_probe_does_not_learn_the_frequencies():
    # Two Gaussians at distance 2: the best boundary of balanced classes errs in 15.9 % of both.
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1], [20_000, 400])
    features = random.normal(size=(len(labels), 1)) + 2 * labels[:, None]
    test_labels = np.repeat([0, 1], 20_000)
    test = random.normal(size=(40_000, 1)) + 2 * test_labels[:, None]
    result = linear_probe(features, labels, test, test_labels, ClassCounts([20_000, 400]))
    assert result["per_class_accuracy"] == pytest.approx([0.841, 0.841], abs=0.02)


def test_probe_wants_every_class():
    features, labels = blobs([5, 5, 5], 1.0)
    with pytest.raises(ValueError, match=r"of all 4 classes, got 'none of \[3\]'"):
        linear_probe(features, labels, features, labels, ClassCounts([4, 3, 2, 1]))


@pytest.mark.parametrize("cosine", [False, True])
def test_features_are_what_the_head_gets(cosine):
    model = CifarResNet(1, num_classes=4).train()
    model = use_cosine_head(model) if cosine else model
    images = torch.randn(6, 3, 8, 8)
    model.layer1.eval()
    found = head_inputs(model, images.split(4), lambda model, batch: model(batch))
    assert model.training
    assert not model.layer1.training
    assert not model.fc._forward_pre_hooks
    model.eval()
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(images), pre_logits=True)
    assert torch.allclose(torch.from_numpy(found), expected, atol=1e-5)


def test_models_whose_features_are_not_one_vector_a_sample_are_refused():
    head = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="calls of the head for a batch"):
        head_inputs(head, [torch.ones(1, 3)], lambda model, batch: (model(batch), model(batch)))
    assert not head._forward_pre_hooks
    with pytest.raises(ValueError, match=r"\(samples, features\), got \(1, 5, 3\)"):
        head_inputs(head, [torch.ones(1, 5, 3)], lambda model, batch: model(batch))
