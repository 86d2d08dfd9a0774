import json

import numpy as np
import pytest
import timm
import torch
import transformers
from hf_images import IMAGE_FOLDERS, image_folder
from PIL import Image
from timm.models import save_for_hf
from transformers import (
    AutoModelForImageClassification,
    BertConfig,
    EfficientNetImageProcessor,
    ViTImageProcessor,
    pipeline,
)

from ldam_plugins import ClassCounts
from ldam_plugins.heads import find_head, use_cosine_head
from ldam_plugins.integrations.transformers.images import (
    Pixels,
    create_image_classifier,
    load_image_classifier,
)

COUNTS = ClassCounts([5, 4, 3, 2], class_names=["a", "b", "c", "d"])


def picture(height=40, width=56, seed=0):
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def normalised(model, image):
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    return ((model.pixels(image) / 255 - mean) / std)[None]


@pytest.mark.parametrize("size", [None, 48])
@pytest.mark.parametrize("name", IMAGE_FOLDERS)
def test_any_architecture_is_trained_saved_and_used_by_a_pipeline(name, size, tmp_path):
    folder = image_folder(tmp_path / "given", name)
    model = create_image_classifier(folder, COUNTS, image_size=size)
    side = size or 32
    assert model.pretrained_cfg["input_size"] == (3, side, side)
    assert model.num_classes == 4
    use_cosine_head(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    loss = model.train()(torch.randn(4, 3, side, side)).logsumexp(1).sum()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    optimizer.step()
    model.save(tmp_path / "saved", title="mine", pretrained=folder)

    images = [picture(), picture(64, 33, seed=1)]
    alone, transform = load_image_classifier(tmp_path / "saved")
    with torch.no_grad():
        expected = alone.eval()(torch.stack([transform(image) for image in images]))
        ours = model.eval()(torch.cat([normalised(model, image) for image in images]))
    assert (expected[0] - expected[1]).abs().max() > 1e-2
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    classify = pipeline("image-classification", str(tmp_path / "saved"), device="cpu")
    for row, found in zip(expected.softmax(1), classify(images, top_k=4), strict=True):
        scores = {each["label"]: each["score"] for each in found}
        assert [scores[label] for label in "abcd"] == pytest.approx(row.tolist(), abs=1e-6)
    readme = (tmp_path / "saved" / "README.md").read_text()
    assert f"{name}ForImageClassification of transformers for 4 classes: a, b, c, d." in readme


def test_position_embeddings_are_interpolated_as_the_model_does_it(tmp_path):
    folder = image_folder(tmp_path)
    model = create_image_classifier(folder, COUNTS, image_size=48)
    plain = AutoModelForImageClassification.from_pretrained(folder)
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        expected = plain.vit(images, interpolate_pos_encoding=True).last_hidden_state
        found = model.model.vit(images).last_hidden_state
    torch.testing.assert_close(found, expected)
    assert model.model.config.image_size == 48


def test_a_model_of_another_size_than_its_processor_is_fitted(tmp_path):
    folder = image_folder(tmp_path)
    ViTImageProcessor(size={"height": 64, "width": 64}).save_pretrained(folder)
    model = create_image_classifier(folder, COUNTS, image_size=64)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 4)
    assert create_image_classifier(folder, COUNTS, image_size=32).pixels.size == 32


def test_a_model_that_takes_no_other_size_says_so(tmp_path, monkeypatch):
    folder = image_folder(tmp_path)
    kind = type(create_image_classifier(folder, COUNTS).model.vit.embeddings)
    monkeypatch.delattr(kind, "interpolate_pos_encoding")
    with pytest.raises(ValueError, match=r"`image_size` must be left out, or 32, .*got 48\. "):
        create_image_classifier(folder, COUNTS, image_size=48)


def test_the_head_of_the_same_classes_is_kept_in_their_order(tmp_path):
    folder = image_folder(tmp_path, labels=("d", "b", "a", "c"))
    plain = AutoModelForImageClassification.from_pretrained(folder)
    model = create_image_classifier(folder, COUNTS)
    assert find_head(model) == ("model.classifier",)
    assert model.model.classifier.weight.equal(plain.classifier.weight[[2, 1, 3, 0]])
    assert model.model.config.id2label == dict(enumerate("abcd"))
    assert model.model.config.label2id == {"a": 0, "b": 1, "c": 2, "d": 3}


def test_what_has_no_part_in_the_logits_is_frozen(tmp_path):
    model = create_image_classifier(image_folder(tmp_path, "Dinov2"), COUNTS)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["model.dinov2.embeddings.mask_token"]


def test_channels_and_values_of_any_processor():
    bgr = Pixels(create_processor("MobileViT"))
    assert (bgr.is_bgr, bgr.mean, bgr.std) == (True, (0, 0, 0), pytest.approx((1, 1, 1)))
    twice = Pixels(EfficientNetImageProcessor(size={"height": 32, "width": 32}))  # normalises twice
    assert not twice.is_bgr
    image = picture(32, 32)
    assert twice(image).equal(torch.tensor(np.asarray(image)).permute(2, 0, 1))
    assert (twice(image).dtype, repr(twice)) == (torch.uint8, "EfficientNetImageProcessor")


def create_processor(name):
    _, kind, options = IMAGE_FOLDERS[name]
    return getattr(transformers, kind)(**options)


def test_processors_that_do_something_else_are_refused(tmp_path):
    class Squares(ViTImageProcessor):
        def __call__(self, image, **options):
            given = super().__call__(image, **options)
            return {"pixel_values": given["pixel_values"] ** 2}

    with pytest.raises(ValueError, match="resizes, crops and normalises, and no more, got 'Squar"):
        Pixels(Squares(size={"height": 32, "width": 32}))
    with pytest.raises(ValueError, match=r"square images of one size, got 'ViTImageProcessor: "):
        Pixels(ViTImageProcessor(size={"height": 32, "width": 48}))


def test_what_is_no_image_classifier_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"that can be reached.*There is no such folder"):
        create_image_classifier(str(tmp_path / "none"), COUNTS)
    with pytest.raises(ValueError, match=r"that can be reached.*Without a hub: --model eff"):
        create_image_classifier("someone/nothing", COUNTS)
    BertConfig(vocab_size=10).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=r"transformers knows as an image classifier"):
        create_image_classifier(str(tmp_path / "bert"), COUNTS)
    folder = image_folder(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"with its image processor .preprocessor_config.json"):
        create_image_classifier(folder, COUNTS)
    (tmp_path / "vit" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"with its weights, got .*vit'. It says"):
        create_image_classifier(folder, COUNTS)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_folder_of_timm_is_named(wrapped, tmp_path):
    save_for_hf(timm.create_model("test_vit", num_classes=3), str(tmp_path))
    if wrapped:  # as transformers saves it
        path = tmp_path / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "timm_wrapper"}))
    with pytest.raises(ValueError, match=r"write --model local-dir:.* --pretrained"):
        create_image_classifier(str(tmp_path), COUNTS)
