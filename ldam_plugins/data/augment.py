"""Random crops, mirroring and normalisation of whole batches of small images."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass

import torch
from torch import Tensor

from ldam_plugins._validation import check_int, check_real, invalid


def crop_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, *, padding: int) -> Tensor:
    """Cut each image at its own offset out of the zero-padded image, then mirror it or not.

    Row for row equal to ``pad(image, padding)``, ``crop(image, top, left, H, W)`` and, where
    ``flip``, ``hflip`` of torchvision, whose own transforms draw once for a whole batch. Black is
    added before any normalisation. One gather does the whole batch, with static shapes.

    Args:
        images: uint8 (N, C, H, W), on any device.
        top: first row of the crop in the padded image, int64 (N,) in ``0..2 * padding``.
        left: first column, likewise.
        flip: which images are mirrored left to right, bool (N,).
        padding: black pixels added on each side.

    Returns:
        uint8 (N, C, H, W), contiguous.
    """
    rows, channels, height, width = images.shape
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    column = torch.arange(width, device=images.device)
    columns = left[:, None] + torch.where(flip[:, None], width - 1 - column, column)
    lines = top[:, None] + torch.arange(height, device=images.device)
    index = lines[:, :, None] * padded.shape[3] + columns[:, None, :]
    index = index.view(rows, 1, -1).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, index).view(images.shape)


@dataclass(frozen=True)
class CropFlip:
    """What is drawn for a batch: crop offsets and flips, one of each an image.

    ``draws[a:b].apply(images[a:b])`` equals ``draws.apply(images)[a:b]``, so a process can draw
    for the global batch and apply its own part.

    Attributes:
        top: int64 (N,) in ``0..2 * padding``.
        left: int64 (N,) in ``0..2 * padding``.
        flip: bool (N,).
        padding: black pixels added on each side.
    """

    top: Tensor
    left: Tensor
    flip: Tensor
    padding: int

    def __len__(self) -> int:
        return len(self.top)

    def __getitem__(self, rows: slice | Tensor) -> CropFlip:
        return CropFlip(self.top[rows], self.left[rows], self.flip[rows], self.padding)

    def apply(self, images: Tensor) -> Tensor:
        """Crop and flip uint8 images (N, C, H, W) on their own device.

        Raises:
            TypeError: ``images`` are not uint8.
            ValueError: they are not as many as there are draws.
        """
        check_images("images", images)
        check_as_many(images, self)
        top, left, flip = (send(draw, images.device) for draw in (self.top, self.left, self.flip))
        return crop_flip(images, top, left, flip, padding=self.padding)


class RandomCropFlip:
    """Random crop out of the padded image and random mirroring, for whole batches.

    Distributed as torchvision's ``RandomCrop(size, padding=padding)`` followed by
    ``RandomHorizontalFlip(flip_probability)`` on single images. The draws are made on the CPU,
    so one generator gives the same augmentation on every device.

    Args:
        padding: black pixels added on each side, 0 for no crop.
        flip_probability: probability that an image is mirrored left to right.

    Example:
        >>> augment = RandomCropFlip(padding=4)
        >>> images = torch.zeros(128, 3, 32, 32, dtype=torch.uint8)
        >>> augment(images, torch.Generator().manual_seed(0)).shape
        torch.Size([128, 3, 32, 32])
    """

    def __init__(self, padding: int = 4, flip_probability: float = 0.5) -> None:
        self.padding = check_int("padding", padding, low=0)
        self.flip_probability = check_real("flip_probability", flip_probability, low=0, high=1)

    def draw(self, rows: int, generator: torch.Generator) -> CropFlip:
        """Draw for ``rows`` images.

        Raises:
            ValueError: ``generator`` is not on the CPU.
        """
        check_generator(generator)
        places = 2 * self.padding + 1
        top = torch.randint(places, (rows,), generator=generator)
        left = torch.randint(places, (rows,), generator=generator)
        flip = torch.rand(rows, generator=generator) < self.flip_probability
        return CropFlip(top, left, flip, self.padding)

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Draw for a batch of uint8 images (N, C, H, W) and apply."""
        return self.draw(len(images), generator).apply(images)


def normalize(
    images: Tensor,
    mean: Sequence[float] | Tensor,
    std: Sequence[float] | Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Turn uint8 images into ``(x / 255 - mean) / std``, one subtraction and one product.

    Computed in float32 and rounded once to ``dtype``.

    Args:
        images: uint8 (N, C, H, W).
        mean: one value a channel, on the scale 0..1.
        std: one positive value a channel. Tensors are taken as they are: on the images' device
            they spare a copy a batch.
        dtype: floating dtype of the result.
        memory_format: ``torch.channels_last`` for convolutions that prefer it.

    Raises:
        TypeError: ``images`` are not uint8 or ``dtype`` is not floating.
        ValueError: not one value a channel, or a ``std`` that is not positive.
    """
    check_images("images", images)
    if not dtype.is_floating_point:
        raise invalid("dtype", "a floating dtype", dtype, error=TypeError)
    if not isinstance(std, Tensor):
        std = [check_real("std", value, low=0, low_open=True) for value in std]
    shift = 255 * _per_channel("mean", mean, images)
    scale = 1 / (255 * _per_channel("std", std, images))
    values = images.to(torch.float32).sub_(shift).mul_(scale)
    return values.to(dtype).contiguous(memory_format=memory_format)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device. To a GPU it goes without waiting for the work that runs there."""
    pinned = tensor.pin_memory() if device.type == "cuda" and tensor.is_cpu else tensor
    return pinned.to(device, non_blocking=True)


def check_images(name: str, images: Tensor) -> None:
    """Check that ``images`` is a uint8 tensor of shape (N, C, H, W).

    Raises:
        TypeError: another dtype.
        ValueError: another number of dimensions.
    """
    if images.dtype != torch.uint8:
        raise invalid(name, "a uint8 tensor", images.dtype, error=TypeError)
    if images.ndim != 4:
        raise invalid(name, "of shape (N, C, H, W)", tuple(images.shape))


def check_as_many(images: Tensor, draws: Sized) -> None:
    """Check that there are as many images as draws.

    Raises:
        ValueError: there are not.
    """
    if len(images) != len(draws):
        raise invalid("images", f"as many as the {len(draws)} draws", len(images))


def check_generator(generator: torch.Generator) -> None:
    """Check that random numbers are drawn on the CPU: they are then the same for every device.

    Raises:
        ValueError: ``generator`` is on another device.
    """
    if generator.device.type != "cpu":
        raise invalid("generator", "on the CPU", str(generator.device))


def _per_channel(name: str, values: Sequence[float] | Tensor, images: Tensor) -> Tensor:
    column = torch.as_tensor(values, dtype=torch.float32, device=images.device)
    if column.shape != images.shape[1:2]:
        expected = f"one value for each of {images.shape[1]} channels"
        raise invalid(name, expected, tuple(column.shape))
    return column[:, None, None]
