"""Automatic augmentation of whole batches of small images: RandAugment and its kin."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ldam_plugins._validation import check_choice, check_int
from ldam_plugins.data.augment import check_as_many, check_generator
from ldam_plugins.data.image_operations import OPERATIONS, SIGNED, apply_operations, check_rgb

_PLACES = {name: place for place, name in enumerate(OPERATIONS)}
_DRAWN = len(OPERATIONS) - 1  # RandAugment and TrivialAugment do not invert

CIFAR10_PAIRS = (
    (("Invert", 0.1, 0), ("Contrast", 0.2, 6)),
    (("Rotate", 0.7, 2), ("TranslateX", 0.3, 9)),
    (("Sharpness", 0.8, 1), ("Sharpness", 0.9, 3)),
    (("ShearY", 0.5, 8), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.5, 0), ("Equalize", 0.9, 0)),
    (("ShearY", 0.2, 7), ("Posterize", 0.3, 7)),
    (("Color", 0.4, 3), ("Brightness", 0.6, 7)),
    (("Sharpness", 0.3, 9), ("Brightness", 0.7, 9)),
    (("Equalize", 0.6, 0), ("Equalize", 0.5, 0)),
    (("Contrast", 0.6, 7), ("Sharpness", 0.6, 5)),
    (("Color", 0.7, 7), ("TranslateX", 0.5, 8)),
    (("Equalize", 0.3, 0), ("AutoContrast", 0.4, 0)),
    (("TranslateY", 0.4, 3), ("Sharpness", 0.2, 6)),
    (("Brightness", 0.9, 6), ("Color", 0.2, 8)),
    (("Solarize", 0.5, 2), ("Invert", 0.0, 0)),
    (("Equalize", 0.2, 0), ("AutoContrast", 0.6, 0)),
    (("Equalize", 0.2, 0), ("Equalize", 0.6, 0)),
    (("Color", 0.9, 9), ("Equalize", 0.6, 0)),
    (("AutoContrast", 0.8, 0), ("Solarize", 0.2, 8)),
    (("Brightness", 0.1, 3), ("Color", 0.7, 0)),
    (("Solarize", 0.4, 5), ("AutoContrast", 0.9, 0)),
    (("TranslateY", 0.9, 9), ("TranslateY", 0.7, 9)),
    (("AutoContrast", 0.9, 0), ("Solarize", 0.8, 3)),
    (("Equalize", 0.8, 0), ("Invert", 0.1, 0)),
    (("TranslateY", 0.7, 9), ("AutoContrast", 0.9, 0)),
)
"""Pairs of operations, each with its probability and its level (0 where it takes none).

Source: Cubuk et al., CVPR 2019, arXiv 1805.09501, appendix.
"""


@dataclass(frozen=True)
class Strength:
    """How strong each operation is at the last of so many steps; the first one does nothing.

    Attributes:
        bins: steps of equal length.
        shear: tangent of the angle.
        translate: pixels; None: 150 of 331 parts of the image's side, as AutoAugment was searched.
        rotate: degrees.
        enhance: change of brightness, colour, contrast and sharpness.
        posterize: bits that are taken off.
    """

    bins: int
    shear: float = 0.3
    translate: float | None = None
    rotate: float = 30.0
    enhance: float = 0.9
    posterize: int = 4

    def magnitudes(self, height: int, width: int) -> Tensor:
        """The magnitude of each operation at each step, float32 (len(OPERATIONS), bins).

        It has no sign, and depends on the size of the images where it is in pixels.
        """
        return _magnitudes(self, height, width)


@lru_cache(maxsize=64)
def _magnitudes(strength: Strength, height: int, width: int) -> Tensor:
    bins, shift = strength.bins, strength.translate
    last = dict.fromkeys(SIGNED, strength.enhance)
    last |= dict.fromkeys(("ShearX", "ShearY"), strength.shear)
    last["TranslateX"] = 150 / 331 * width if shift is None else shift
    last["TranslateY"] = 150 / 331 * height if shift is None else shift
    last["Rotate"] = strength.rotate
    table = torch.zeros(len(OPERATIONS), bins)
    for name, value in last.items():
        table[_PLACES[name]] = torch.linspace(0, value, bins)
    taken = (torch.arange(bins) / ((bins - 1) / strength.posterize)).round()
    table[_PLACES["Posterize"]] = 8 - taken
    table[_PLACES["Solarize"]] = torch.linspace(255, 0, bins)
    return table


@dataclass(frozen=True)
class PolicyDraws:
    """What is drawn for a batch: K operations an image, one after the other.

    ``draws[a:b].apply(images[a:b])`` equals ``draws.apply(images)[a:b]``, so a process can draw
    for the global batch and apply its own part.

    Attributes:
        operation: places in :data:`~ldam_plugins.data.image_operations.OPERATIONS`, int64 (N, K).
        level: 0-based steps of the strength, int64 (N, K).
        negative: whether the magnitude of an operation that has a sign is negative, bool (N, K).
        strength: what the steps are.
    """

    operation: Tensor
    level: Tensor
    negative: Tensor
    strength: Strength

    def __len__(self) -> int:
        return len(self.operation)

    def __getitem__(self, rows: slice | Tensor) -> PolicyDraws:
        drawn = (self.operation[rows], self.level[rows], self.negative[rows])
        return PolicyDraws(*drawn, self.strength)

    def magnitude(self, height: int, width: int) -> Tensor:
        """The magnitudes on images of a size, with their signs, float32 (N, K)."""
        amounts = self.strength.magnitudes(height, width)[self.operation, self.level]
        signed = (self.operation >= _PLACES[SIGNED[0]]) & (self.operation <= _PLACES[SIGNED[-1]])
        return torch.where(signed & self.negative, -amounts, amounts)

    def apply(self, images: Tensor) -> Tensor:
        """Apply the operations to uint8 images (N, 3, H, W) on their own device.

        Raises:
            TypeError: ``images`` are not uint8.
            ValueError: they do not have three channels, or are not as many as there are draws.
        """
        check_rgb("images", images)
        check_as_many(images, self)
        magnitude = self.magnitude(*images.shape[2:])
        for operations, amounts in zip(self.operation.unbind(1), magnitude.unbind(1), strict=True):
            images = apply_operations(images, operations, amounts)
        return images


class Policy(ABC):
    """Random operations for whole batches.

    The draws are made on the CPU, so one generator gives the same augmentation on every device.

    Attributes:
        strength: of the operations.
    """

    strength: Strength

    def draw(self, rows: int, generator: torch.Generator) -> PolicyDraws:
        """Draw for ``rows`` images.

        Raises:
            ValueError: ``generator`` is not on the CPU.
        """
        check_generator(generator)
        operation, level = self._draw(rows, generator)
        negative = torch.rand(operation.shape, generator=generator) < 0.5
        return PolicyDraws(operation, level, negative, self.strength)

    @abstractmethod
    def _draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The operations and their levels, as in :class:`PolicyDraws`."""

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Draw for a batch of uint8 images (N, 3, H, W) and apply."""
        check_rgb("images", images)
        return self.draw(len(images), generator).apply(images)


class RandAugment(Policy):
    """So many random operations an image, all of one strength.

    Distributed as torchvision's ``RandAugment`` on single images. timm counts the magnitude up to
    10 and not up to ``num_magnitude_bins - 1``.

    Args:
        num_ops: operations an image.
        magnitude: 0-based step of their strength.
        num_magnitude_bins: steps there are.

    Source: Cubuk et al., NeurIPS 2020, arXiv 1909.13719.

    Example:
        >>> augment = RandAugment()
        >>> images = torch.zeros(128, 3, 32, 32, dtype=torch.uint8)
        >>> augment(images, torch.Generator().manual_seed(0)).shape
        torch.Size([128, 3, 32, 32])
    """

    def __init__(self, num_ops: int = 2, magnitude: int = 9, num_magnitude_bins: int = 31) -> None:
        self.num_ops = check_int("num_ops", num_ops, low=0)
        self.strength = Strength(check_int("num_magnitude_bins", num_magnitude_bins, low=2))
        self.magnitude = check_int("magnitude", magnitude, low=0, high=num_magnitude_bins - 1)

    def _draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        operation = torch.randint(_DRAWN, (rows, self.num_ops), generator=generator)
        return operation, torch.full_like(operation, self.magnitude)


class TrivialAugmentWide(Policy):
    """One random operation an image, of a random strength.

    Distributed as torchvision's ``TrivialAugmentWide`` on single images. Translations are up to 32
    pixels on images of any size: of 32 x 32 a whole image, which leaves it black.

    Args:
        num_magnitude_bins: steps of the strength.

    Source: Müller and Hutter, ICCV 2021, arXiv 2103.10158.
    """

    def __init__(self, num_magnitude_bins: int = 31) -> None:
        bins = check_int("num_magnitude_bins", num_magnitude_bins, low=2)
        self.strength = Strength(
            bins, shear=0.99, translate=32.0, rotate=135.0, enhance=0.99, posterize=6
        )

    def _draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        operation = torch.randint(_DRAWN, (rows, 1), generator=generator)
        return operation, torch.randint(self.strength.bins, (rows, 1), generator=generator)


class AutoAugment(Policy):
    """One of the 25 pairs of operations that were found best on CIFAR-10, each by its probability.

    Distributed as torchvision's ``AutoAugment(AutoAugmentPolicy.CIFAR10)`` on single images.

    Source: Cubuk et al., CVPR 2019, arXiv 1805.09501, appendix.
    """

    def __init__(self) -> None:
        self.strength = Strength(bins=10)
        names, shares, levels = np.array(CIFAR10_PAIRS, dtype=object).transpose(2, 0, 1).tolist()
        self._operation = torch.tensor([[_PLACES[name] for name in pair] for pair in names])
        self._probability, self._level = torch.tensor(shares), torch.tensor(levels)

    def _draw(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        pair = torch.randint(len(CIFAR10_PAIRS), (rows,), generator=generator)
        applied = torch.rand(rows, 2, generator=generator) < self._probability[pair]
        operation = self._operation[pair].where(applied, _PLACES["Identity"])
        return operation, self._level[pair]


POLICIES: dict[str, type[Policy]] = {
    "randaugment": RandAugment,
    "autoaugment": AutoAugment,
    "trivialaugment": TrivialAugmentWide,
}
"""The policies by the words of :data:`ldam_plugins.choices.POLICIES`."""


def create_policy(name: str) -> Policy:
    """A policy with its usual options by its name.

    Raises:
        ValueError: there is none of that name.
    """
    return POLICIES[check_choice("policy", name, POLICIES)]()
