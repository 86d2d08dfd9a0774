"""What the vision recipe makes of its options, without a training."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from timm.data import create_transform
from timm.models import save_for_hf
from vision_runs import parsed, picture_folder, recipe_options, vision_lt, vision_setup

from ldam_plugins import create_loss, register
from ldam_plugins.data import load_images, long_tail_indices
from ldam_plugins.data.in_memory import InMemoryImages

register()


@pytest.fixture
def pictures(tmp_path):
    return picture_folder(tmp_path / "pictures")


def made(*flags):
    """Options, data and model of a command line."""
    options = parsed(*flags)
    train, test, counts = vision_setup.load_data(options, show=True)
    return options, train, test, vision_setup.make_model(options, options.make_loss(counts))


# Which samples are kept


def test_own_data_are_never_cut_unasked(pictures, capsys):
    _, train, _, _ = made("--dataset", pictures, "--model", "cifar_resnet20")
    assert np.bincount(train.labels).tolist() == [9, 4, 6]
    assert capsys.readouterr().out == ""


def test_what_a_profile_leaves_out_is_printed(capsys):
    made("--dataset", "digits", "--profile", "step", "--ratio", 10, "--model", "cifar_resnet20")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0][-4:] == ["--profile", "step", "--ratio", "10:"]
    assert [line[1:] for line in lines[3:13]] == [["120", "0"]] * 5 + [["12", "108"]] * 5
    assert " ".join(lines[14]) == "660 of 1200 training samples are kept, 540 are left out."


PROFILES = {
    "cifar10_lt": ("exp", 100),
    "cifar100_lt": ("exp", 100),
    "digits_lt": ("exp", 100),
    "tiny_imagenet_lt": ("exp", 100),
    "inat2018": ("none", 1),
}


@pytest.mark.parametrize("preset", PROFILES)
def test_presets_of_research_sets_say_their_profile(preset):
    entries = recipe_options.read_file(vision_setup.VisionOptions, preset)
    assert (entries["profile"], entries["ratio"]) == PROFILES[preset]
    assert entries["augment"] == ("timm" if preset == "inat2018" else "crop_flip")


def test_the_preset_keeps_the_samples_it_did():
    train, _, _ = vision_setup.load_data(parsed(), show=False)
    whole, _ = load_images("digits")
    assert train.rows.tolist() == whole.rows[long_tail_indices(whole.labels, 100, "exp")].tolist()


def test_a_ratio_without_a_profile_is_refused_or_told(tmp_path, caplog):
    with pytest.raises(ValueError, match=r"`ratio` must be left out .* got 50.0\. Add --profile"):
        parsed("--dataset", "digits", "--ratio", 50)
    (tmp_path / "own.yaml").write_text("dataset: digits\nratio: 50")
    with pytest.raises(ValueError, match=r"`ratio` must be left out without a profile"):
        parsed(tmp_path / "own.yaml")
    assert parsed("digits_lt", "--profile", "none").profile == "none"
    assert not caplog.records
    parsed("--dataset", "digits", "--profile", "none", "--ratio", 50)
    assert "--ratio 50 has no effect" in caplog.text


def test_images_that_cannot_be_read_are_counted(pictures, tmp_path, capsys):
    (tmp_path / "pictures" / "train" / "10" / "03.png").write_bytes(b"no image")
    parts = ["--dataset", pictures, "--model", "cifar_resnet20", "--skip_corrupt"]
    _, train, _, _ = made(*parts)
    assert np.bincount(train.labels).tolist() == [9, 4, 5]
    out = capsys.readouterr().out
    assert out.startswith("1 of 19 training images cannot be read: ")
    assert out.strip().endswith("03.png")


# Memory and augmentation


def seen(flags, generator=True):
    """The first training batch as the model gets it, and all test images."""
    options, train, test, model = made(*flags)
    to_input = vision_setup.make_input(options, model, torch.device("cpu"))
    sets = vision_setup.make_datasets(options, model, train, test)
    torch.manual_seed(0)
    batches = [
        next(iter(vision_setup.make_loader(options, images, batch_size=19)))[0] for images in sets
    ]
    drawn = torch.Generator().manual_seed(0)
    return sets[0], to_input(batches[0], drawn), to_input(batches[1])


@pytest.mark.parametrize("more", [(), ("--crop_mode", "squash"), ("--crop_pct", 0.8)])
def test_memory_changes_nothing_but_where_images_are(pictures, more):
    flags = ["--dataset", pictures, "--model", "cifar_resnet20", "--workers", 0, *more]
    held, train, test = seen(flags)
    read, train_of_files, test_of_files = seen([*flags, "--memory_limit", 100_000])
    assert isinstance(held, InMemoryImages)
    assert not isinstance(read, InMemoryImages)
    assert torch.equal(train, train_of_files)
    assert torch.equal(test, test_of_files)
    options, _, images, model = made(*flags)
    transform = create_transform(**vision_setup.image_config(options, model))
    expected = torch.stack([transform(image) for image, _ in images])
    assert (test - expected).abs().max() < 1e-5


def test_the_bound_is_in_bytes_of_all_decoded_images(pictures):
    """19 training and 15 test images of 3 x 32 x 32."""
    for bound, kind in ((34 * 3072, InMemoryImages), (34 * 3072 - 1, vision_setup.LabelledImages)):
        flags = ["--dataset", pictures, "--model", "cifar_resnet20", "--memory_limit", bound]
        options, train, test, model = made(*flags)
        sets = vision_setup.make_datasets(options, model, train, test)
        assert [type(images) for images in sets] == [kind, kind]


@pytest.mark.parametrize("bound", [0, 2**31])
@pytest.mark.parametrize("augment", ["crop_flip", "timm"])
def test_augmentation_is_chosen_and_recorded(pictures, augment, bound):
    flags = ["--dataset", pictures, "--model", "cifar_resnet20", "--memory_limit", bound]
    flags += ["--augment", augment, "--workers", 0]
    options, train, test, model = made(*flags)
    record = vision_setup.images_record(options, model)
    assert record["augmentation"]["kind"] == augment
    assert ("padding" in record["augmentation"]) == (augment == "crop_flip")
    assert record["evaluation"]["input_size"] == (3, 32, 32)
    train_set, _ = vision_setup.make_datasets(options, model, train, test)
    twice = [train_set[0][0] for _ in range(2)]
    assert torch.equal(*twice) == (augment == "crop_flip")  # which is applied to the batch


def test_augmentation_follows_the_size_of_the_images():
    options = parsed("--dataset", "digits")
    assert vision_setup.augmentation(options, {"input_size": (3, 64, 64)}) == "crop_flip"
    assert vision_setup.augmentation(options, {"input_size": (3, 64, 65)}) == "timm"


# Updates


@pytest.mark.parametrize("mixup", [0, 0.2])
@pytest.mark.parametrize(("size", "accumulation"), [(500, 1), (500, 3), (400, 2), (1200, 1)])
def test_sampler_and_loop_count_the_same_updates(mixup, size, accumulation):
    flags = ["--dataset", "digits", "--batch_size", size, "--mixup", mixup, "--schedule", "drs"]
    options = parsed(*flags, "--accumulation", accumulation, "--start", 3, "--start_unit", "step")
    accelerator = Accelerator(cpu=True)
    images = InMemoryImages(torch.zeros(1200, 3, 2, 2, dtype=torch.uint8), torch.arange(1200) % 10)
    schedule = options.make_schedule()
    sampler = vision_setup.make_sampler(accelerator, options, schedule, images, 10)
    order = {"sampler": sampler, "drop_last": vision_setup.mixes(options)}
    loader = vision_setup.make_loader(options, images, batch_size=size, **order)
    made_updates = len(list(vision_lt.grouped(accelerator.prepare(loader), accumulation)))
    assert sampler.steps_per_epoch == made_updates
    assert vision_setup.updates_per_epoch(accelerator, options, 1200) == made_updates


def test_an_epoch_without_a_whole_batch_is_refused():
    options = parsed("--dataset", "digits", "--batch_size", 1300, "--mixup", 0.2)
    with pytest.raises(ValueError, match=r"smaller --batch_size; there are 1200 training images"):
        vision_setup.updates_per_epoch(Accelerator(cpu=True), options, 1200)


# Models


def model_of(*flags, loss="ldam", classes=(5, 2)):
    options = parsed("--dataset", "digits", *flags)
    return options, vision_setup.make_model(options, create_loss(loss, list(classes)))


def test_a_last_batch_of_one_image_is_refused_where_the_model_cannot_train_on_it():
    options, model = model_of("--model", "skresnet18", "--image_size", 32, "--batch_size", 109)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    message = (
        r"`batch_size` must be one that leaves no batch of a single image, got 109\..*1200.*as 110"
    )
    with pytest.raises(ValueError, match=message):
        vision_setup.check_images(options, model, 1200, processes=1)
    vision_setup.check_images(options, model, 1201, processes=1)
    vision_setup.check_images(options, model, 1200, processes=2)  # filled up
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    options, _ = model_of("--model", "skresnet18", "--image_size", 32, "--batch_size", 1)
    with pytest.raises(ValueError, match="got 1"):
        vision_setup.check_images(options, model, 1200, processes=2)


def test_a_model_that_trains_on_one_image_is_taken():
    options, model = model_of("--model", "cifar_resnet20", "--batch_size", 109)
    vision_setup.check_images(options, model, 1200, processes=1)


@pytest.mark.parametrize(
    ("flags", "failure"),
    [
        (["--model", "inception_v3", "--image_size", 32], "Kernel size can't be greater"),
        (["--model", "test_vit", "--image_size", 8], "."),
    ],
)
def test_a_model_that_does_not_take_the_images_is_refused(flags, failure):
    with pytest.raises(ValueError, match=rf"`model` must be one.*{flags[1]}.*{failure}"):
        vision_setup.check_images(*model_of(*flags, loss="ce"), images=20, processes=1)


def test_whatever_timm_creates_is_taken(tmp_path):
    _, tagged = model_of("--model", "test_resnet.r160_in1k", loss="ce")
    assert tagged.to(memory_format=torch.contiguous_format).num_classes == 2
    classes = {"label_names": ["a", "b"]}
    save_for_hf(tagged, tmp_path, model_config=classes, safe_serialization=True)
    _, loaded = model_of("--model", f"local-dir:{tmp_path}", "--pretrained", loss="ce")
    for name, value in tagged.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)
    _, other = model_of("--model", f"local-dir:{tmp_path}", "--pretrained", classes=(5, 3, 2))
    assert other.num_classes == 3
    assert torch.equal(other.state_dict()["conv1.0.weight"], tagged.state_dict()["conv1.0.weight"])


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
        model_of("--model", name)


def test_a_vision_transformer_is_made_for_the_size_of_the_images():
    options, model = model_of("--model", "vit_tiny_patch16_224", "--image_size", 32)
    vision_setup.check_images(options, model, images=20, processes=1)
    assert model.pos_embed.shape[1] == 2 * 2 + 1
    assert vision_setup.image_config(options, model)["input_size"] == (3, 32, 32)


def test_record_of_images_is_json(pictures):
    options, _, _, model = made("--dataset", pictures, "--model", "cifar_resnet20")
    json.dumps(vision_setup.images_record(options, model))
    assert timm.is_model("cifar_resnet20")
