"""What torchvision does to the images of a batch, one after the other."""

from __future__ import annotations

from unittest.mock import patch

import torch
from torchvision.transforms import InterpolationMode, _functional_tensor
from torchvision.transforms.autoaugment import _apply_op

from ldam_plugins.data.image_operations import OPERATIONS


def one_by_one(images, operations, magnitudes):
    """The operations of its policies, each with its magnitude, on every CPU alike."""
    with patch.object(_functional_tensor, "_gen_affine_grid", grid_of):
        return as_it_is(images, operations, magnitudes)


def as_it_is(images, operations, magnitudes):
    """The same; which of two pixels that are equally near is taken depends on the CPU."""
    rows = zip(images, operations.tolist(), magnitudes.tolist(), strict=True)
    return torch.stack(
        [
            _apply_op(image, OPERATIONS[place], amount, InterpolationMode.NEAREST, None)
            for image, place, amount in rows
        ]
    )


def grid_of(theta, w, h, ow, oh):
    """Its places without a matrix product, whose order and rounding are the library's choice."""
    scaled = theta.transpose(1, 2) / torch.tensor([0.5 * w, 0.5 * h])
    x = torch.linspace(-ow * 0.5 + 0.5, ow * 0.5 - 0.5, steps=ow)[None, None, :, None]
    y = torch.linspace(-oh * 0.5 + 0.5, oh * 0.5 - 0.5, steps=oh)[None, :, None, None]
    return x * scaled[:, None, :1] + y * scaled[:, None, 1:2] + scaled[:, None, 2:]
