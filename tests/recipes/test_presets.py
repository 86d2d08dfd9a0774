"""Which training samples the shipped presets keep, of sets with the classes that theirs have."""

import datasets
import numpy as np
import options as recipe_options
import pytest
import text_lt
import vision_lt

from ldam_plugins.data import LabelledImages, load_images
from ldam_plugins.data.readers.base import ArraySource

PRESETS = sorted(path.stem for path in recipe_options.PRESETS.glob("*.yaml"))
BANKING77 = [
    *[162, 159, 110, 126, 87, 127, 171, 181, 156, 157, 129, 59, 153, 112, 139, 112, 187, 168, 167],
    *[61, 177, 160, 122, 86, 35, 129, 153, 173, 133, 182, 121, 121, 121, 112, 118, 166, 137, 126],
    *[97, 106, 129, 98, 82, 121, 120, 105, 159, 143, 149, 148, 115, 95, 169, 161, 129, 108, 111],
    *[114, 114, 145, 97, 146, 103, 175, 172, 113, 171, 128, 102, 104, 113, 126, 41, 135, 121, 180],
    163,
]
"""Training texts of each intent of Banking77, as published."""
SIZES = {
    "banking77_lt": BANKING77,
    "cifar10_lt": [5000] * 10,
    "cifar10_lt_fast": [5000] * 10,
    "cifar10_lt_strong": [5000] * 10,
    "cifar100_lt": [500] * 100,
    "cifar100_lt_strong": [500] * 100,
    "imdb_lt": [12500] * 2,
    "inat2018": [2, 1000, 30],  # nothing is cut, so any sizes do
    "stdlib_lt": [37, 175, 71],
    "tiny_imagenet_lt": [500] * 200,
}
"""Training samples of each class; those of ``digits_lt`` are at hand."""


def labels_of(preset):
    if preset == "digits_lt":
        return load_images("digits")[0].labels
    sizes = SIZES[preset]
    return np.random.default_rng(7).permutation(np.repeat(np.arange(len(sizes)), sizes))


def first_of_each_class(labels, sizes):
    """As the paper's data set class draws: one shuffle a class, of which the first are kept."""
    random, kept = np.random.RandomState(0), []
    for c, size in enumerate(sizes):
        of_class = np.flatnonzero(labels == c)
        random.shuffle(of_class)
        kept += of_class[:size].tolist()
    return kept


def rows_kept(preset, labels, monkeypatch):
    """Rows of the training set that the recipe keeps: their places are the images, or the texts."""
    names = [f"class {c}" for c in range(int(labels.max()) + 1)]
    names = ["neg", "pos"] if preset == "imdb_lt" else names
    if preset in ("banking77_lt", "imdb_lt", "stdlib_lt"):
        feature = datasets.ClassLabel(names=names)
        features = datasets.Features({"text": datasets.Value("string"), "label": feature})
        rows = {"text": [str(row) for row in range(len(labels))], "label": labels}
        texts = datasets.Dataset.from_dict(rows, features=features)
        monkeypatch.setattr(text_lt, "load_texts", lambda *_, **__: (texts, texts))
        options = recipe_options.parse_options(text_lt.TextOptions, [preset], default="")
        train, _, counts = text_lt.load_data(options)
        kept = [int(text) for text in train["text"]]
    else:
        images = LabelledImages(ArraySource(np.zeros((len(labels), 1, 1)), ""), labels, names)
        monkeypatch.setattr(vision_lt, "load_images", lambda *_, **__: (images, images))
        options = recipe_options.parse_options(vision_lt.VisionOptions, [preset], default="")
        train, _, counts = vision_lt.load_data(options, show=False)
        kept = train.rows.tolist()
    assert counts.counts.tolist() == np.bincount(labels[kept], minlength=len(names)).tolist()
    return options, kept


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_keep_the_samples_they_always_kept(preset, monkeypatch):
    labels = labels_of(preset)
    options, kept = rows_kept(preset, labels, monkeypatch)
    classes = int(labels.max()) + 1
    if preset == "imdb_lt":  # a tenth of the negative reviews, in their own order
        assert kept == sorted(first_of_each_class(labels, [1250, 12500]))
    elif options.profile == "none":
        assert kept == list(range(len(labels)))
    else:
        largest, ratio = len(labels) // classes, options.ratio
        sizes = [int(largest * ratio ** -(c / (classes - 1))) for c in range(classes)]
        assert kept == first_of_each_class(labels, sizes)


# What is taken where nothing is said


def made(kind, *flags):
    return recipe_options.parse_options(kind, ["--dataset", "own", *flags], default="")


VISION_DEFAULTS = {
    "resnet18": (200, 128, "sgd", 0.1, 2e-4),
    "resnet18 --pretrained": (20, 32, "adamw", 1e-4, 0.05),
    "efficientnet_lite0_imagenet": (20, 32, "adamw", 1.5e-3, 0.05),
}
TEXT_DEFAULTS = {
    "bilstm": (10, 3e-3, 0.0, 0.05),
    "minilm": (6, 2e-4, 0.01, 0.1),
    "bert-base-uncased": (4, 5e-5, 0.01, 0.1),
    "bert-base-uncased --lora_rank 8": (4, 3e-4, 0.01, 0.1),
}


@pytest.mark.parametrize("model", VISION_DEFAULTS)
def test_images_are_trained_on_as_the_model_needs(model):
    found = made(vision_lt.VisionOptions, "--model", *model.split())
    names = ("epochs", "batch_size", "opt", "lr", "weight_decay")
    assert tuple(getattr(found, name) for name in names) == VISION_DEFAULTS[model]
    assert set(found.by_model) == set(names)
    told = made(vision_lt.VisionOptions, "--model", *model.split(), "--lr", "0.5", "--epochs", "3")
    assert (told.lr, told.epochs, told.opt) == (0.5, 3, found.opt)
    assert set(told.by_model) == set(names) - {"lr", "epochs"}


@pytest.mark.parametrize("model", TEXT_DEFAULTS)
def test_texts_are_trained_on_as_the_model_needs(model):
    found = made(text_lt.TextOptions, "--model", *model.split())
    names = ("epochs", "lr", "weight_decay", "warmup")
    assert tuple(getattr(found, name) for name in names) == TEXT_DEFAULTS[model]
    assert set(found.by_model) == set(names)


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        (vision_lt.VisionOptions, "efficientnet_lite0_imagenet"),
        (text_lt.TextOptions, "minilm"),
    ],
)
def test_without_a_model_that_in_a_package_is_taken_or_asked_for(kind, model, monkeypatch):
    found = made(kind)
    assert (found.model, found.lr) == (model, made(kind, "--model", model).lr)
    assert "model" in found.by_model
    monkeypatch.setattr(recipe_options, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"`model` must be given.*pip install .* for {model}"):
        made(kind).check_model()
