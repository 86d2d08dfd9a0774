"""Small images decoded once and held in memory, augmented as whole batches of tensors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from ldam_plugins._validation import check_int, check_real, invalid
from ldam_plugins.data.images import LabelledImages, map_in_threads


class InMemoryImages(Dataset[tuple[Tensor, Any]]):
    """Decoded images as one tensor, fetched a batch at a time.

    A ``DataLoader(dataset, batch_size=128, collate_fn=InMemoryImages.collate)`` reads a whole
    batch with one indexing operation; workers would only add copies.

    Args:
        pixels: uint8 (N, 3, H, W).
        labels: class index of each image, int64 (N,).
        class_names: the name of each class.

    Raises:
        TypeError: ``pixels`` are not uint8 or ``labels`` not int64.
        ValueError: the shapes do not fit.
    """

    def __init__(self, pixels: Tensor, labels: Tensor, class_names: Sequence[str] = ()) -> None:
        _check_images("pixels", pixels)
        if labels.dtype != torch.int64:
            raise invalid("labels", "an int64 tensor", labels.dtype, error=TypeError)
        if pixels.shape[1] != 3 or labels.shape != pixels.shape[:1]:
            expected = f"of shape (N, 3, H, W) with labels (N,) = {tuple(labels.shape)}"
            raise invalid("pixels", expected, tuple(pixels.shape))
        self.pixels = pixels
        self.labels = labels
        self.class_names = tuple(class_names)

    @classmethod
    def from_images(
        cls,
        images: LabelledImages,
        size: int | None = None,
        *,
        path: str | os.PathLike[str] | None = None,
        progress: bool = False,
    ) -> InMemoryImages:
        """Decode every image once, in threads.

        Args:
            images: what to decode. Their transform, if they have one, must give uint8 tensors
                (3, H, W) of one size, the same each time.
            size: without a transform, resize each image to ``size`` x ``size`` (bicubic, aspect
                ratio not kept); by default all must have one size already.
            path: a new ``.npy`` file that holds the pixels, mapped instead of read into memory.
            progress: show a progress bar.

        Raises:
            FileExistsError: ``path`` is there already.
            TypeError: the transform gives something else.
            ValueError: sizes differ, an image is corrupt (it is named), or both a transform and a
                ``size`` are given.
        """
        if size is not None:
            check_int("size", size, low=1)
            if images.transform is not None:
                raise invalid("size", "None where images have a transform", size)
        shape = _decode(images, 0, size).shape
        pixels = _allocate((len(images), *shape), path)

        def decode(indices: range) -> None:
            for index in indices:
                image = _decode(images, index, size)
                if image.shape != shape:
                    first, this = (size[:0:-1] for size in (shape, image.shape))
                    hint = f"All must be as the first one, {first}; resize them."
                    raise invalid(images.describe(index), "of one size", this, hint=hint)
                pixels[index] = image

        try:
            for _ in map_in_threads(len(images), decode, progress=progress):
                pass
        except BaseException:
            if path is not None:
                os.unlink(path)
            raise
        labels = torch.from_numpy(images.labels.copy())
        return cls(torch.from_numpy(pixels), labels, images.class_names)

    def to(self, device: torch.device | str) -> InMemoryImages:
        """Hold the set on a device; batches are then indexed there."""
        return InMemoryImages(self.pixels.to(device), self.labels.to(device), self.class_names)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels[index], int(self.labels[index])

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        rows = _sent(torch.as_tensor(indices), self.pixels.device)
        return self.pixels.index_select(0, rows), self.labels.index_select(0, rows)

    @staticmethod
    def collate(batch: Any) -> Any:
        """Pass a batch of ``__getitems__`` on as it is; stack single items."""
        return batch if isinstance(batch, tuple) else default_collate(batch)


def crop_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, *, padding: int) -> Tensor:
    """Cut each image at its own offset out of the zero-padded image, then mirror it or not.

    Row for row equal to ``pad(image, padding)``, ``crop(image, top, left, H, W)`` and, where
    ``flip``, ``hflip`` of torchvision; black is added before any normalisation. One gather does
    it for the whole batch, with static shapes.

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
        _check_images("images", images)
        if len(images) != len(self):
            raise invalid("images", f"as many as the {len(self)} draws", len(images))
        top, left, flip = (_sent(draw, images.device) for draw in (self.top, self.left, self.flip))
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
        if generator.device.type != "cpu":
            raise invalid("generator", "on the CPU", str(generator.device))
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
    _check_images("images", images)
    if not dtype.is_floating_point:
        raise invalid("dtype", "a floating dtype", dtype, error=TypeError)
    if not isinstance(std, Tensor):
        std = [check_real("std", value, low=0, low_open=True) for value in std]
    shift = 255 * _per_channel("mean", mean, images)
    scale = 1 / (255 * _per_channel("std", std, images))
    values = images.to(torch.float32).sub_(shift).mul_(scale)
    return values.to(dtype).contiguous(memory_format=memory_format)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on the device, to a GPU without waiting for what that is doing."""
    pinned = tensor.pin_memory() if device.type == "cuda" and tensor.is_cpu else tensor
    return pinned.to(device, non_blocking=True)


def _per_channel(name: str, values: Sequence[float] | Tensor, images: Tensor) -> Tensor:
    column = torch.as_tensor(values, dtype=torch.float32, device=images.device)
    if column.shape != images.shape[1:2]:
        expected = f"one value for each of {images.shape[1]} channels"
        raise invalid(name, expected, tuple(column.shape))
    return column[:, None, None]


def _check_images(name: str, images: Tensor) -> None:
    if images.dtype != torch.uint8:
        raise invalid(name, "a uint8 tensor", images.dtype, error=TypeError)
    if images.ndim != 4:
        raise invalid(name, "of shape (N, C, H, W)", tuple(images.shape))


def _allocate(shape: tuple[int, ...], path: str | os.PathLike[str] | None) -> np.ndarray:
    if path is None:
        return np.empty(shape, dtype=np.uint8)
    if os.path.exists(path):
        expected = "a file that is not there yet"
        raise invalid("path", expected, os.fspath(path), error=FileExistsError)
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)


def _decode(images: LabelledImages, index: int, size: int | None) -> np.ndarray:
    from PIL import Image

    image, _ = images[index]
    if images.transform is not None:
        if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3:
            got = (image.dtype, tuple(image.shape)) if isinstance(image, Tensor) else type(image)
            hint = "Augment batches with RandomCropFlip and normalize instead."
            expected = "one that gives uint8 tensors (3, H, W)"
            raise invalid("images.transform", expected, got, hint=hint, error=TypeError)
        return image.numpy()
    if size is not None:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)
