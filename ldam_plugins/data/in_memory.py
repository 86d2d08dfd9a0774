"""Small images decoded once and held in memory as one tensor."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from ldam_plugins._validation import check_int, invalid
from ldam_plugins.data.augment import check_images, send
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
        check_images("pixels", pixels)
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
        rows = send(torch.as_tensor(indices), self.pixels.device)
        return self.pixels.index_select(0, rows), self.labels.index_select(0, rows)

    @staticmethod
    def collate(batch: Any) -> Any:
        """Pass a batch of ``__getitems__`` on as it is; stack single items."""
        return batch if isinstance(batch, tuple) else default_collate(batch)


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
