"""Image classifiers of transformers, trained and saved with the image processor they come with."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
from transformers.image_utils import PILImageResampling

from ldam_plugins._validation import invalid
from ldam_plugins.counts import ClassCounts
from ldam_plugins.heads import cosine_heads, find_head, fold_cosine_head
from ldam_plugins.integrations.transformers.layer_decay import layer_depths
from ldam_plugins.reports.model_card import write_card
from ldam_plugins.training.environment import without_hub
from ldam_plugins.training.files import disk_errors

_README = """\
# {title}

A {kind} of transformers for {classes} classes: {some}.
Trained on from the weights of `{pretrained}`. It needs transformers alone.

```python
from transformers import pipeline

classify = pipeline("image-classification", model="PATH/OF/THIS/FOLDER")
print(classify("IMAGE"))
```

`metrics.json` of the run was measured so, in float32: this model, this image processor.
"""


class ImageClassifier(nn.Module):
    """A classifier of transformers that gives the logits of a batch of images, as timm's do.

    Args:
        model: Of ``AutoModelForImageClassification``.
        processor: The image processor that it was trained with.

    Attributes:
        num_classes: Number of logits.
        pixels: What resizes and crops an image to the uint8 pixels of the model's input.
        pretrained_cfg: What timm knows of the input of its models: ``input_size``, ``mean``,
            ``std`` and ``interpolation``, of RGB images.

    Raises:
        ValueError: the processor does not give square images of one size, whose values are those of
            the pixels but for a factor and an offset for each channel.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        super().__init__()
        self.model: Any = model
        self.num_classes: int = model.config.num_labels
        self.pixels = Pixels(processor)
        resample = PILImageResampling(getattr(processor, "resample", PILImageResampling.BICUBIC))
        self.pretrained_cfg = {
            "input_size": (3, self.pixels.size, self.pixels.size),
            "mean": self.pixels.mean,
            "std": self.pixels.std,
            "interpolation": resample.name.lower(),
        }

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, C) of normalised RGB images (N, 3, H, W)."""
        given = images.flip(1) if self.pixels.is_bgr else images
        return self.model(pixel_values=given).logits

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Depth of a parameter by its name, as timm asks for it: see :func:`.layer_depths`."""
        return layer_depths(self).__getitem__

    def save(self, folder: str | os.PathLike[str], *, title: str, pretrained: str) -> None:
        """Write model, image processor and a README for ``from_pretrained`` and ``pipeline``.

        A cosine head is folded, in place.

        Args:
            folder: Where to write them.
            title: Heading of the README.
            pretrained: What the model was trained on from.

        Raises:
            OSError: the folder cannot be written.
        """
        if cosine_heads(self):
            fold_cosine_head(self)
        self.to(memory_format=torch.contiguous_format)
        names = [self.model.config.id2label[index] for index in range(self.num_classes)]
        readme = _README.format(
            title=title,
            kind=type(self.model).__name__,
            classes=len(names),
            some=", ".join(names[:10]) + (", ..." if len(names) > 10 else ""),
            pretrained=pretrained,
        )
        with disk_errors(Path(folder).parent):
            self.model.save_pretrained(folder)
            self.pixels.processor.save_pretrained(folder)
            write_card(
                folder,
                readme,
                library="transformers",
                task="image-classification",
                base_model=pretrained,
            )


class Pixels:
    """``pixels(image)``: what a model sees of a PIL image, as uint8 RGB pixels (3, S, S).

    Args:
        processor: An image processor, which resizes, crops and normalises.

    Attributes:
        processor: That one.
        size: S.
        mean: Of each channel, of pixels from 0 to 1: ``(pixel / 255 - mean) / std`` is what the
            processor makes of a pixel.
        std: Likewise.
        is_bgr: Whether the model gets blue first.

    Raises:
        ValueError: see :class:`ImageClassifier`.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        black, white, red = (
            self._processed(_plain(c)) for c in ((0,) * 3, (255,) * 3, (255, 0, 0))
        )
        shape = tuple(black.shape)
        if black.ndim != 3 or shape[0] != 3 or shape[1] != shape[2]:
            expected = "one whose image processor gives square images of one size"
            raise invalid("model", expected, f"{type(processor).__name__}: {shape}")
        self.size = shape[1]
        center = self.size // 2
        low, high = (each[:, center, center].double() for each in (black, white))
        self.is_bgr = bool((red - black)[2, center, center] != 0)
        scale = 1 / (high - low)
        order = [2, 1, 0] if self.is_bgr else [0, 1, 2]
        self.mean = tuple((-low * scale)[order].tolist())
        self.std = tuple(scale[order].tolist())
        self._check()

    def __call__(self, image: Image.Image) -> Tensor:
        """Resize and crop an image."""
        return self._exact(image).round().to(torch.uint8)

    def __repr__(self) -> str:
        """Name the processor; its options are in its own file."""
        return type(self.processor).__name__

    def _exact(self, image: Image.Image) -> Tensor:
        values = self._processed(image).double()
        values = values.flip(0) if self.is_bgr else values
        mean, std = (torch.tensor(each).view(3, 1, 1).double() for each in (self.mean, self.std))
        return 255 * (values * std + mean)

    def _processed(self, image: Image.Image) -> Tensor:
        return Processed(self.processor)(image)

    def _check(self) -> None:
        """Check that the pixels of a picture are whole numbers."""
        values = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
        found = self._exact(Image.fromarray(values))
        if not ((found - found.round()).abs() < 0.1).all() or found.min() < -1 or found.max() > 256:
            expected = "one whose image processor resizes, crops and normalises, and no more"
            raise invalid("model", expected, type(self.processor).__name__)


def _plain(colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (56, 40), colour)


def create_image_classifier(
    name: str, class_counts: ClassCounts, *, image_size: int | None = None
) -> ImageClassifier:
    """A pretrained image classifier of transformers with an output for each class.

    The names of the classes are in its config. If its head is of exactly these classes by name, it
    is kept and its rows are brought into the order of ``class_counts``. Position embeddings are
    interpolated to another image size, once, so that the saved model takes it by itself. Parameters
    that have no part in the logits are frozen: processes that train together would wait for their
    gradients.

    Args:
        name: A folder or hub id, as ``from_pretrained`` takes it.
        class_counts: Training samples per class.
        image_size: Side of the images; None: that of the image processor.

    Raises:
        ValueError: it cannot be loaded, holds no image classifier or image processor, is one of
            timm, or takes images of its own size only.
    """
    config = _config(name)
    names = list(class_counts.class_names or map(str, range(len(class_counts))))
    trained = [config.id2label[index] for index in range(config.num_labels)]
    try:
        model = AutoModelForImageClassification.from_pretrained(
            name,
            id2label=dict(enumerate(names)),
            label2id={label: index for index, label in enumerate(names)},
            problem_type="single_label_classification",
            trust_remote_code=False,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
        )
    except (OSError, ValueError) as error:
        expected = "one that transformers knows as an image classifier, with its weights"
        raise invalid("model", expected, name, hint=f"It says: {error}") from error
    if sorted(trained) == sorted(names):
        _order_classes(model, [trained.index(label) for label in names])
    model = ImageClassifier(model, _processor(name))
    if image_size is not None:
        model = _resized(model, name, image_size)
    _freeze_unused(model)
    return model


def load_image_classifier(
    folder: str | os.PathLike[str],
) -> tuple[nn.Module, Callable[[Image.Image], Tensor]]:
    """What :meth:`ImageClassifier.save` has left: a model that gives logits, and its transform.

    The transform is the image processor itself.
    """
    model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32)
    processor = AutoImageProcessor.from_pretrained(folder)
    return _Logits(model), Processed(processor)


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


class Processed:
    """An image processor as a transform of one image.

    Args:
        processor: The image processor.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, image: Image.Image) -> Tensor:
        """What the model gets of an image, (3, H, W)."""
        return self.processor(image, return_tensors="pt")["pixel_values"][0]


def _config(name: str) -> Any:
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        if _is_of_timm(name):
            raise _other_library(name) from error
        expected = "a name of timm, or a folder or hub id of transformers that can be reached"
        hint = "transformers says: " + str(error).partition("\n")[0]
        is_path = name.startswith((".", "/", "~"))
        if is_path and not os.path.isdir(name):
            hint = "There is no such folder."
        elif not is_path:
            hint += f" {without_hub('efficientnet_lite0_imagenet')}"
        raise invalid("model", expected, name, hint=hint) from error
    if config.model_type == "timm_wrapper":
        raise _other_library(name)
    return config


def _is_of_timm(name: str) -> bool:
    path = Path(name, "config.json")
    return path.is_file() and "architecture" in json.loads(path.read_text(encoding="utf-8"))


def _other_library(name: str) -> Exception:
    source = "local-dir" if os.path.isdir(name) else "hf-hub"
    hint = f"It is a model of timm: write --model {source}:{name} --pretrained."
    return invalid("model", "one of transformers where it is named with a slash", name, hint=hint)


def _processor(name: str, **sizes: Any) -> Any:
    try:
        return AutoImageProcessor.from_pretrained(name, trust_remote_code=False, **sizes)
    except (OSError, ValueError) as error:
        expected = "one with its image processor (preprocessor_config.json)"
        hint = "Save that of the model it comes from beside it, or any that suits it, such as"
        hint += " `ViTImageProcessor(size={'height': 224, 'width': 224}).save_pretrained(FOLDER)`."
        raise invalid("model", expected, name, hint=hint) from error


def _order_classes(model: nn.Module, order: Sequence[int]) -> None:
    for name in find_head(model):
        for parameter in model.get_submodule(name).parameters(recurse=False):
            parameter.data = parameter.data[order]


def _resized(classifier: ImageClassifier, name: str, side: int) -> ImageClassifier:
    """The classifier and its processor for images of another size."""
    old = classifier.pixels
    given = old.processor.to_dict()
    sizes = {
        key: {edge: round(n * side / old.size) for edge, n in given[key].items() if n}
        for key in ("size", "crop_size")
        if given.get(key)
    }
    resized = ImageClassifier(classifier.model, _processor(name, **sizes))
    if resized.pixels.size != side:
        expected = f"left out, or {old.size}, for a processor of a fixed size"
        raise invalid("image_size", expected, side)
    if _takes(resized):
        return resized
    model = _with_positions(classifier.model, side)
    if model is not None:
        interpolated = ImageClassifier(model, resized.pixels.processor)
        if _takes(interpolated):
            return interpolated
    expected = f"left out, or {old.size}, for this model"
    hint = f"{name} takes images of its own size only."
    raise invalid("image_size", expected, side, hint=hint)


def _takes(classifier: ImageClassifier) -> bool:
    """Whether the model takes images of its processor's size."""
    mode = classifier.training
    try:
        with torch.no_grad():
            classifier.eval()(torch.zeros(1, 3, classifier.pixels.size, classifier.pixels.size))
    except Exception:  # models answer a wrong size with nearly any exception
        return False
    finally:
        classifier.train(mode)
    return True


def _with_positions(model: Any, side: int) -> Any:
    """The model with position embeddings interpolated by itself, None where it cannot do so."""
    config = copy.deepcopy(model.config)
    part = config if hasattr(config, "image_size") else getattr(config, "vision_config", None)
    if part is None:
        return None
    part.image_size = side
    new = type(model)(config)
    expected, state = new.state_dict(), model.state_dict()
    for key in [
        key for key in state if key in expected and state[key].shape != expected[key].shape
    ]:
        owner = model.get_submodule(key.rpartition(".")[0])
        if isinstance(owner, nn.Embedding):
            owner = model.get_submodule(key.rpartition(".")[0].rpartition(".")[0])
        if not hasattr(owner, "interpolate_pos_encoding"):
            return None
        tokens = torch.zeros(1, *expected[key].shape[-2:])
        with torch.no_grad():
            state[key] = owner.interpolate_pos_encoding(tokens, side, side).view_as(expected[key])
    new.load_state_dict(state)
    return new.train(model.training)


def _freeze_unused(classifier: ImageClassifier) -> None:
    """Freeze what has no part in the logits, such as the mask token of DINOv2."""
    mode, parameters = classifier.training, list(classifier.parameters())
    size = classifier.pixels.size
    try:
        logits = classifier.eval()(torch.zeros(1, 3, size, size))
    except Exception:  # which the check of the model's training explains
        return
    finally:
        classifier.train(mode)
    gradients = torch.autograd.grad(logits.sum(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.requires_grad_(gradient is not None)
