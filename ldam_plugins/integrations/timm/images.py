"""From labelled images to the input of a timm model, in training and in evaluation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ldam_plugins._validation import check_choice, invalid
from ldam_plugins.choices import AUGMENTATIONS, NONE, POLICIES, SMALL
from ldam_plugins.data import LabelledImages
from ldam_plugins.data.augment import RandomCropFlip, normalize
from ldam_plugins.data.augment_policies import create_policy
from ldam_plugins.data.erasing import Cutout, Eraser, RandomErasing
from ldam_plugins.data.in_memory import InMemoryImages
from ldam_plugins.data.streams import StreamedImages

Images = LabelledImages | StreamedImages
_Images = TypeVar("_Images", bound=Images)
_OF_TIMM = {"randaugment": "rand-m9-n2", "autoaugment": "original"}
"""The policies that timm has for single images, by its words; ``"original"`` is ImageNet's."""


@dataclass(frozen=True)
class ImagePipeline:
    """What is done to images before a model gets them.

    Images are decoded to uint8 tensors of the model's size (:meth:`datasets`), held in memory if
    they fit; a batch of them becomes the model's input in one go (:meth:`make_input`).

    Attributes:
        config: timm's data config: ``input_size``, ``crop_pct``, ``crop_mode``, ``interpolation``,
            ``mean``, ``std``. Evaluation follows it, and it is saved with the model.
        augmentation: ``"crop_flip"``: training images are moved and mirrored, as whole batches.
            ``"timm"``: timm cuts random parts of them and jitters their colours, image by image.
        padding: Border of the random crop of ``"crop_flip"``, in pixels.
        hflip: Probability of a horizontal flip.
        crop_scale: Least and largest share of the image's area that the random crop of ``"timm"``
            keeps.
        color_jitter: Largest change of brightness, contrast and saturation by ``"timm"``, as a
            share; 0 for none.
        policy: Random operations after that, one of :data:`~ldam_plugins.choices.POLICIES`.
            ``"randaugment"`` and ``"autoaugment"`` are applied to whole batches, AutoAugment as
            found on CIFAR-10; beside ``"timm"`` they are timm's own, image by image, AutoAugment as
            found on ImageNet. ``"trivialaugment"``, which timm lacks, is applied to batches always.
        cutout: Side of the square that is erased, in pixels; 0 for none.
        erasing: Probability that a random box is erased. It and the square are set to the mean
            colour, after everything else.
        pixels: What resizes and crops images that are not augmented, in place of timm: an image to
            the uint8 tensor of its pixels. That of a model which brings its own.
    """

    config: Mapping[str, Any]
    augmentation: str
    padding: int = 4
    hflip: float = 0.5
    crop_scale: tuple[float, float] = (0.08, 1.0)
    color_jitter: float = 0.4
    policy: str = NONE
    cutout: int = 0
    erasing: float = 0.0
    pixels: Callable[[Any], Tensor] | None = None

    @classmethod
    def of_model(
        cls,
        model: nn.Module,
        *,
        image_size: int | None = None,
        crop_pct: float | None = None,
        crop_mode: str | None = None,
        augmentation: str = "auto",
        padding: int = 4,
        hflip: float = 0.5,
        crop_scale: Sequence[float] | None = None,
        color_jitter: float | None = None,
        policy: str = NONE,
        cutout: int = 0,
        erasing: float = 0.0,
    ) -> ImagePipeline:
        """The pipeline of a model of timm, or of one that has ``pixels`` and timm's config.

        Args:
            model: The model; its own config says what is not given.
            image_size: Side of the images.
            crop_pct: Share of the resized image that evaluation crops. By default 1 with
                ``"crop_flip"``, where training too sees images to their edges.
            crop_mode: timm's crop of images that are not square: center, squash or border.
            augmentation: ``"crop_flip"``, ``"timm"`` or ``"auto"``: ``"crop_flip"`` for images of
                at most :data:`SMALL` pixels a side, else ``"timm"``.
            padding: As in :class:`ImagePipeline`.
            hflip: As in :class:`ImagePipeline`.
            crop_scale: As in :class:`ImagePipeline`; ``"timm"`` only.
            color_jitter: As in :class:`ImagePipeline`; ``"timm"`` only. By default 0.4, beside a
                policy 0: timm does without it beside its own.
            policy: As in :class:`ImagePipeline`.
            cutout: As in :class:`ImagePipeline`.
            erasing: As in :class:`ImagePipeline`.

        Raises:
            ValueError: an unknown augmentation or policy, an option of another one, a policy for
                images that are not RGB, or a square larger than the image.
        """
        given: dict[str, Any] = {"crop_pct": crop_pct, "crop_mode": crop_mode}
        if image_size is not None:
            given["img_size"] = image_size
        config = resolve_data_config(given, model=model)
        augmentation = choose_augmentation(augmentation, config["input_size"])
        if augmentation == "crop_flip" and crop_pct is None:
            config["crop_pct"] = 1.0
        of_timm: dict[str, Any] = {}
        if crop_scale is not None:
            low, high = crop_scale
            of_timm["crop_scale"] = (float(low), float(high))
        if color_jitter is not None:
            of_timm["color_jitter"] = color_jitter
        elif augmentation == "timm" and policy != NONE:
            of_timm["color_jitter"] = 0.0
        if augmentation != "timm":
            for name, value in of_timm.items():
                hint = "--augment timm has it; crop_flip has --padding."
                raise invalid(name, f"left out with augmentation {augmentation}", value, hint=hint)
        if augmentation == "timm" and policy in _OF_TIMM and color_jitter:
            expected = f"left out beside the policy {policy} of timm"
            hint = "It changes the colours itself; trivialaugment goes with both."
            raise invalid("color_jitter", expected, color_jitter, hint=hint)
        _check_policy(policy, cutout, config["input_size"])
        pixels = getattr(model, "pixels", None)
        return cls(
            config,
            augmentation,
            padding,
            hflip,
            policy=policy,
            cutout=cutout,
            erasing=erasing,
            pixels=pixels,
            **of_timm,
        )

    def datasets(
        self,
        train: Images,
        *evaluated: Images,
        memory_limit: int = 2**31,
        progress: bool = False,
    ) -> list[Dataset]:
        """Training images, and others to evaluate on, as uint8 tensors of the model's size.

        They are the same images whether held in memory or decoded each time. timm's augmentation
        needs the files, each time anew.

        Args:
            train: Training images.
            *evaluated: Sets of held-out or test images, which are not augmented.
            memory_limit: Bytes of decoded images to hold in memory, of all sets together. If they
                are more, or a set is streamed, none is held.
            progress: Show a progress bar.
        """
        plain = self.pixels or create_transform(**self.config, normalize=False)
        others = [transformed(images, plain) for images in evaluated]
        if self.augmentation == "timm":
            augment = create_transform(
                is_training=True,
                hflip=self.hflip,
                scale=self.crop_scale,
                color_jitter=self.color_jitter,
                auto_augment=_OF_TIMM.get(self.policy),
                normalize=False,
                **self.config,
            )
            return [transformed(train, augment), *others]
        parts = [transformed(train, plain), *others]
        stored = [part for part in parts if isinstance(part, LabelledImages)]
        size = sum(map(len, parts)) * math.prod(self.config["input_size"])
        if size > memory_limit or len(stored) < len(parts):
            return [*parts]
        return [InMemoryImages.from_images(part, progress=progress) for part in stored]

    def make_input(self, device: torch.device) -> Callable[..., Tensor]:
        """``to_input(images, generator=None)``: a batch of a loader as the model's input.

        With a generator (on the CPU) the batch is augmented by what the loader has not done: moved
        and mirrored, changed by the policy, and after its normalisation boxes are erased.
        """
        mean, std = (torch.tensor(self.config[name], device=device) for name in ("mean", "std"))
        to_float = partial(normalize, mean=mean, std=std, memory_format=torch.channels_last)
        steps: list[Callable[[Tensor, torch.Generator], Tensor]] = []
        if self.augmentation == "crop_flip":
            steps.append(RandomCropFlip(self.padding, self.hflip))
        if self.policy != NONE and not (self.augmentation == "timm" and self.policy in _OF_TIMM):
            steps.append(create_policy(self.policy))
        erasers: list[Eraser] = [Cutout(self.cutout)] if self.cutout else []
        if self.erasing:
            erasers.append(RandomErasing(self.erasing))

        def to_input(images: Tensor, generator: torch.Generator | None = None) -> Tensor:
            if generator is None:
                return to_float(images)
            for step in steps:
                images = step(images, generator)
            values = to_float(images)
            for erase in erasers:
                values = erase(values, generator)
            return values

        return to_input

    def record(self) -> dict[str, Any]:
        """What was done to the images, for ``metrics.json``."""
        own: dict[str, Any] = {"padding": self.padding}
        if self.augmentation == "timm":
            own = {"crop_scale": self.crop_scale, "color_jitter": self.color_jitter}
        augmentation = {"kind": self.augmentation, "hflip": self.hflip, **own}
        chosen = {"policy": self.policy, "cutout": self.cutout, "erasing": self.erasing}
        if self.augmentation == "timm":
            chosen["policy"] = _OF_TIMM.get(self.policy, self.policy)
        augmentation |= {name: value for name, value in chosen.items() if value not in (NONE, 0)}
        evaluation = dict(self.config)
        if self.pixels is not None:
            evaluation |= {"crop_pct": None, "crop_mode": None, "processor": repr(self.pixels)}
        return {"augmentation": augmentation, "evaluation": evaluation}


def choose_augmentation(augmentation: str, input_size: tuple[int, ...]) -> str:
    """What ``"auto"`` stands for on images of (channels, height, width).

    Raises:
        ValueError: an unknown augmentation.
    """
    check_choice("augmentation", augmentation, AUGMENTATIONS)
    small = max(input_size[1:]) <= SMALL
    return ("crop_flip" if small else "timm") if augmentation == "auto" else augmentation


def _check_policy(policy: str, cutout: int, input_size: tuple[int, ...]) -> None:
    """Refuse, before the training, what cannot be done to images of (channels, height, width)."""
    check_choice("policy", policy, POLICIES)
    channels, *sides = input_size
    if policy != NONE and channels != 3:
        hint = f"The model takes images of {channels} channels; leave --aug out for it."
        raise invalid("policy", f"{NONE!r} for images that are not RGB", policy, hint=hint)
    if cutout > min(sides):
        expected = f"at most {min(sides)}, the shorter side of the images"
        raise invalid("cutout", expected, cutout, hint="On CIFAR-10 it is usually 16.")


def transformed(images: _Images, transform: Callable[..., Any] | None) -> _Images:
    """The same images through another transform; the given ones stay unchanged."""
    images = copy.copy(images)
    images.transform = transform
    return images


def image_loader(images: Dataset, *, workers: int = 0, **order: Any) -> DataLoader:
    """A loader of whole batches from memory, or of single images by worker processes.

    Args:
        images: Images of :meth:`ImagePipeline.datasets`.
        workers: Processes that decode images that are not in memory.
        **order: ``batch_size``, ``sampler`` and so on of the ``DataLoader``. Streamed images have a
            sampler of their own.
    """
    if isinstance(images, InMemoryImages):
        return DataLoader(images, collate_fn=InMemoryImages.collate, **order)
    if isinstance(images, StreamedImages):
        order = {"sampler": images.rows, **order}
    pin = torch.accelerator.is_available()
    return DataLoader(images, num_workers=workers, pin_memory=pin, **order)


class InputLoader:
    """A loader whose images are turned into what the model gets.

    Args:
        loader: Of batches (images, labels).
        to_input: As of :meth:`ImagePipeline.make_input`.
    """

    def __init__(self, loader: DataLoader, to_input: Callable[[Tensor], Tensor]) -> None:
        self.loader, self.to_input = loader, to_input

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return ((self.to_input(images), labels) for images, labels in self.loader)


def on_device(images: Dataset, device: torch.device) -> Dataset:
    """Images in memory moved to a CUDA device if it has room for them, all others as they are.

    There is room if they take at most a quarter of the free memory.
    """
    if not isinstance(images, InMemoryImages) or device.type != "cuda":
        return images
    free, _ = torch.cuda.mem_get_info(device)
    return images.to(device) if images.pixels.nbytes <= free / 4 else images
