"""What torchvision does to the images of a batch, one after the other."""

from __future__ import annotations

import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.autoaugment import _apply_op

from ldam_plugins.data.image_operations import OPERATIONS


def one_by_one(images, operations, magnitudes):
    """The operations of its policies, each with its magnitude."""
    rows = zip(images, operations.tolist(), magnitudes.tolist(), strict=True)
    return torch.stack(
        [
            _apply_op(image, OPERATIONS[place], amount, InterpolationMode.NEAREST, None)
            for image, place, amount in rows
        ]
    )
