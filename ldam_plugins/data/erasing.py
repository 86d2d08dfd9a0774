"""Boxes that are erased from whole batches: Cutout and Random Erasing.

Both are applied after the normalisation, where 0 is the mean colour of the data: an erased box then
adds nothing to the sums of the first layer, which a mean rounded to a uint8 pixel would.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldam_plugins._validation import check_int, check_real, invalid
from ldam_plugins.data.augment import check_as_many, check_generator, send

_ATTEMPTS = 10
"""Boxes that are drawn until one fits, as in torchvision and timm."""


@dataclass(frozen=True)
class Boxes:
    """What is drawn for a batch: a box an image, an empty one where nothing is erased.

    ``draws[a:b].apply(images[a:b])`` equals ``draws.apply(images)[a:b]``, so a process can draw
    for the global batch and apply its own part.

    Attributes:
        first: upper row and left column, int64 (N, 2).
        last: row below and column to the right, int64 (N, 2).
    """

    first: Tensor
    last: Tensor

    def __len__(self) -> int:
        return len(self.first)

    def __getitem__(self, rows: slice | Tensor) -> Boxes:
        return Boxes(self.first[rows], self.last[rows])

    def apply(self, images: Tensor, value: float = 0.0) -> Tensor:
        """Set the pixels in the boxes of images (N, C, H, W) to a value, on their own device.

        Raises:
            ValueError: ``images`` have another shape, or are not as many as there are boxes.
        """
        if images.ndim != 4:
            raise invalid("images", "of shape (N, C, H, W)", tuple(images.shape))
        check_as_many(images, self)
        ends = send(torch.cat([self.first, self.last], dim=1), images.device)
        top, left, bottom, right = ends[..., None].unbind(1)
        line, column = (torch.arange(side, device=images.device) for side in images.shape[2:])
        lines, columns = (line >= top) & (line < bottom), (column >= left) & (column < right)
        inside = (lines[:, :, None] & columns[:, None, :])[:, None]
        return images.clone().masked_fill_(inside, value)  # the clone keeps channels_last


class Eraser(ABC):
    """Erases a box of each image of a batch.

    The draws are made on the CPU, so one generator gives the same boxes on every device.
    """

    def draw(self, rows: int, size: Sequence[int], generator: torch.Generator) -> Boxes:
        """Draw for ``rows`` images of a size (height, width).

        Raises:
            ValueError: ``generator`` is not on the CPU.
        """
        check_generator(generator)
        return self._draw(rows, size, generator)

    @abstractmethod
    def _draw(self, rows: int, size: Sequence[int], generator: torch.Generator) -> Boxes: ...

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Draw for a batch of normalised images (N, C, H, W) and set the boxes to 0."""
        return self.draw(len(images), images.shape[2:], generator).apply(images)


class Cutout(Eraser):
    """Erases a square whose centre is any pixel, so that a part of it may lie outside.

    Args:
        side: of the square, in pixels.

    Source: DeVries and Taylor 2017, arXiv 1708.04552: 16 on CIFAR-10, 8 on CIFAR-100. Their code
    takes an odd side for the even one below it.

    Example:
        >>> images = torch.ones(2, 3, 8, 8)
        >>> Cutout(4)(images, torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(self, side: int) -> None:
        self.side = check_int("side", side, low=1)

    def _draw(self, rows: int, size: Sequence[int], generator: torch.Generator) -> Boxes:
        centre = [torch.randint(side, (rows,), generator=generator) for side in size]
        first = torch.stack(centre, dim=1) - self.side // 2
        last = torch.minimum(first + self.side, torch.tensor(size))
        return Boxes(first.clamp(min=0), last)


class RandomErasing(Eraser):
    """Erases a box of random area and proportions that lies inside the image.

    Distributed as torchvision's ``RandomErasing(p, scale, ratio, value=0)`` on single images. Where
    none of ten boxes is smaller than the image, nothing is erased.

    Args:
        p: probability that an image loses a box.
        scale: least and largest share of the image's area.
        ratio: least and largest height of the box divided by its width, drawn evenly on a
            logarithmic scale.

    Source: Zhong et al., AAAI 2020, arXiv 1708.04896.
    """

    def __init__(
        self,
        p: float = 0.5,
        scale: Sequence[float] = (0.02, 0.33),
        ratio: Sequence[float] = (0.3, 3.3),
    ) -> None:
        self.p = check_real("p", p, low=0, high=1)
        self.scale = tuple(check_real("scale", end, low=0, high=1) for end in scale)
        self.ratio = tuple(check_real("ratio", end, low=0, low_open=True) for end in ratio)
        for name, ends in (("scale", self.scale), ("ratio", self.ratio)):
            if len(ends) != 2 or ends[0] > ends[1]:
                raise invalid(name, "two numbers, the least and the largest", ends)

    def _draw(self, rows: int, size: Sequence[int], generator: torch.Generator) -> Boxes:
        erased = torch.rand(rows, generator=generator) < self.p
        drawn = torch.rand(2, rows, _ATTEMPTS, dtype=torch.float64, generator=generator)
        place = torch.rand(rows, 2, dtype=torch.float64, generator=generator)
        area = (self.scale[0] + (self.scale[1] - self.scale[0]) * drawn[0]) * math.prod(size)
        ratio = self.ratio[0] * (self.ratio[1] / self.ratio[0]) ** drawn[1]
        sides = torch.tensor(size)
        boxes = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], dim=2).round()
        fits = (boxes < sides).all(2)
        attempt = fits.to(torch.uint8).argmax(1)
        box = boxes[torch.arange(rows), attempt].to(torch.int64)
        first = (place * (sides - box + 1)).to(torch.int64)
        box = box.where((erased & fits.any(1))[:, None], 0)
        return Boxes(first, first + box)
