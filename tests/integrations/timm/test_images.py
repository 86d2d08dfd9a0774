"""Images are the same wherever they are held, and augmented as was asked for."""

import json

import pytest
import timm
import torch
from timm.data import create_transform
from vision_runs import picture_folder

from ldam_plugins.data import LabelledImages, load_images
from ldam_plugins.data.augment import RandomCropFlip, normalize
from ldam_plugins.data.augment_policies import create_policy
from ldam_plugins.data.erasing import Cutout, RandomErasing
from ldam_plugins.data.in_memory import InMemoryImages
from ldam_plugins.integrations.timm import CifarResNet
from ldam_plugins.integrations.timm.images import (
    ImagePipeline,
    choose_augmentation,
    image_loader,
    on_device,
    transformed,
)


@pytest.fixture
def pictures(tmp_path):
    return load_images(picture_folder(tmp_path / "pictures"))


def pipeline(**options):
    """The pipeline of a model of images of 32 x 32."""
    return ImagePipeline.of_model(timm.create_model("cifar_resnet20"), **options)


def seen(pictures, memory_limit, **options):
    """The first training batch as the model gets it, and all test images."""
    prepared = pipeline(**options)
    to_input = prepared.make_input(torch.device("cpu"))
    sets = prepared.datasets(*pictures, memory_limit=memory_limit)
    batches = [next(iter(image_loader(images, batch_size=19)))[0] for images in sets]
    drawn = torch.Generator().manual_seed(0)
    return sets[0], to_input(batches[0], drawn), to_input(batches[1])


@pytest.mark.parametrize("more", [{}, {"crop_mode": "squash"}, {"crop_pct": 0.8}], ids=str)
def test_memory_changes_nothing_but_where_images_are(pictures, more):
    held, train, test = seen(pictures, 2**31, **more)
    read, train_of_files, test_of_files = seen(pictures, 100_000, **more)
    assert isinstance(held, InMemoryImages)
    assert not isinstance(read, InMemoryImages)
    assert torch.equal(train, train_of_files)
    assert torch.equal(test, test_of_files)
    transform = create_transform(**pipeline(**more).config)
    expected = torch.stack([transform(image) for image, _ in pictures[1]])
    assert (test - expected).abs().max() < 1e-5


def test_the_bound_is_in_bytes_of_all_decoded_images(pictures):
    """19 training and 15 test images of 3 x 32 x 32."""
    for bound, kind in ((34 * 3072, InMemoryImages), (34 * 3072 - 1, LabelledImages)):
        sets = pipeline().datasets(*pictures, memory_limit=bound)
        assert [type(images) for images in sets] == [kind, kind]


@pytest.mark.parametrize("bound", [0, 2**31])
@pytest.mark.parametrize("augment", ["crop_flip", "timm"])
def test_augmentation_is_chosen_and_recorded(pictures, augment, bound):
    prepared = pipeline(augmentation=augment)
    record = prepared.record()
    assert record["augmentation"]["kind"] == augment
    assert ("padding" in record["augmentation"]) == (augment == "crop_flip")
    assert record["evaluation"]["input_size"] == (3, 32, 32)
    json.dumps(record)
    train_set, _ = prepared.datasets(*pictures, memory_limit=bound)
    twice = [train_set[0][0] for _ in range(2)]
    assert torch.equal(*twice) == (augment == "crop_flip")  # which is applied to the batch


def test_crops_and_colours_of_timm_follow_their_options(pictures):
    def steps(**options):
        prepared = pipeline(augmentation="timm", **options)
        train, _ = prepared.datasets(*pictures)
        return prepared.record()["augmentation"], {
            type(step).__name__: step for step in train.transform.transforms
        }

    record, usual = steps()
    assert usual["RandomResizedCropAndInterpolation"].scale == (0.08, 1.0)
    assert usual["ColorJitter"].brightness == (0.6, 1.4)
    assert (record["crop_scale"], record["color_jitter"]) == ((0.08, 1.0), 0.4)
    record, weak = steps(crop_scale=[0.5, 1], color_jitter=0.0)
    assert weak["RandomResizedCropAndInterpolation"].scale == (0.5, 1.0)
    assert "ColorJitter" not in weak or weak["ColorJitter"].brightness is None
    assert (record["crop_scale"], record["color_jitter"]) == ((0.5, 1.0), 0.0)


@pytest.mark.parametrize("given", [{"crop_scale": (0.5, 1.0)}, {"color_jitter": 0.1}])
def test_options_of_another_augmentation_are_refused(given):
    (name,) = given
    with pytest.raises(ValueError, match=f"`{name}` must be left out with augmentation crop_flip"):
        pipeline(augmentation="crop_flip", **given)


POLICIES = ("randaugment", "autoaugment", "trivialaugment")


@pytest.mark.parametrize("policy", POLICIES)
def test_batches_are_moved_then_changed_then_erased(pictures, policy):
    """In the order in which training scripts for CIFAR do it, from one stream of draws."""
    options = {"policy": policy, "cutout": 6, "erasing": 0.5}
    held, train, test = seen(pictures, 2**31, **options)
    drawn = torch.Generator().manual_seed(0)
    expected = create_policy(policy)(RandomCropFlip()(held.pixels, drawn), drawn)
    config = pipeline().config
    expected = normalize(expected, config["mean"], config["std"])
    expected = RandomErasing(0.5)(Cutout(6)(expected, drawn), drawn)
    assert torch.equal(train, expected)
    _, train_of_files, test_of_files = seen(pictures, 0, **options)
    assert torch.equal(train_of_files, train)
    _, plain, plain_test = seen(pictures, 2**31)
    assert not torch.equal(plain, train)
    assert torch.equal(test, plain_test)
    assert torch.equal(test_of_files, plain_test)
    record = pipeline(**options).record()["augmentation"]
    assert {name: record[name] for name in options} == options
    assert not {*options} & {*pipeline().record()["augmentation"]}


@pytest.mark.parametrize("policy", POLICIES)
def test_beside_timm_the_policy_is_timms_if_it_has_one(pictures, policy):
    prepared = pipeline(augmentation="timm", policy=policy, cutout=4)
    train, test = prepared.datasets(*pictures)
    names = [type(step).__name__ for step in train.transform.transforms]
    kind = {"randaugment": "RandAugment", "autoaugment": "AutoAugment"}.get(policy)
    assert [name for name in names if name.endswith("Augment")] == ([kind] if kind else [])
    assert "ColorJitter" not in names or policy == "trivialaugment"
    assert not any(name.endswith("Augment") for name in map(str, test.transform.transforms))
    images = torch.randint(1, 256, (4, 3, 32, 32), dtype=torch.uint8)
    found = prepared.make_input(torch.device("cpu"))(images, torch.Generator().manual_seed(0))
    drawn = torch.Generator().manual_seed(0)
    expected = images if kind else create_policy(policy)(images, drawn)
    expected = normalize(expected, prepared.config["mean"], prepared.config["std"])
    assert torch.equal(found, Cutout(4)(expected, drawn))
    record = prepared.record()["augmentation"]
    words = {"randaugment": "rand-m9-n2", "autoaugment": "original"}
    assert record["policy"] == words.get(policy, policy)
    assert (record["color_jitter"], record["cutout"]) == (0.0, 4)


def test_colours_are_jittered_beside_a_policy_where_they_can_be(pictures):
    options = {"augmentation": "timm", "color_jitter": 0.2}
    prepared = pipeline(policy="trivialaugment", **options)
    train, _ = prepared.datasets(*pictures)
    (jitter,) = [step for step in train.transform.transforms if "ColorJitter" in str(step)]
    assert jitter.brightness == (0.8, 1.2)
    assert prepared.record()["augmentation"]["color_jitter"] == 0.2
    with pytest.raises(ValueError, match=r"`color_jitter` must be left out .* autoaugment of timm"):
        pipeline(policy="autoaugment", **options)


def test_policies_and_squares_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match=r"`policy` must be one of .*Did you mean 'randaugment'"):
        pipeline(policy="randaug")
    with pytest.raises(ValueError, match=r"`cutout` must be at most 32, the shorter side .*got 33"):
        pipeline(cutout=33)
    model = CifarResNet(1)
    model.pretrained_cfg = {"input_size": (1, 32, 32)}
    message = r"`policy` must be 'none' for images that are not RGB, got 'randaugment'\. .*--aug"
    with pytest.raises(ValueError, match=message):
        ImagePipeline.of_model(model, policy="randaugment")
    assert ImagePipeline.of_model(model).policy == "none"


def test_augmentation_follows_the_size_of_the_images():
    assert choose_augmentation("auto", (3, 64, 64)) == "crop_flip"
    assert choose_augmentation("auto", (3, 64, 65)) == "timm"
    with pytest.raises(ValueError, match=r"`augmentation` must be one of .*Did you mean 'timm'"):
        choose_augmentation("tim", (3, 64, 64))


def test_evaluation_sees_images_to_their_edges_where_training_does():
    model = CifarResNet(1)
    model.pretrained_cfg = {"input_size": (3, 32, 32), "crop_pct": 0.875}
    shares = {
        "crop_flip": ImagePipeline.of_model(model).config["crop_pct"],
        "timm": ImagePipeline.of_model(model, augmentation="timm").config["crop_pct"],
        "asked for": ImagePipeline.of_model(model, crop_pct=0.5).config["crop_pct"],
    }
    assert shares == {"crop_flip": 1.0, "timm": 0.875, "asked for": 0.5}


def test_given_images_keep_their_transform(pictures):
    train, _ = pictures
    assert transformed(train, str).transform is str
    assert train.transform is None


def test_images_stay_where_they_are_without_a_gpu(pictures):
    train, _ = pipeline().datasets(*pictures)
    assert on_device(train, torch.device("cpu")) is train
    assert on_device(pictures[1], torch.device("cuda")) is pictures[1]
