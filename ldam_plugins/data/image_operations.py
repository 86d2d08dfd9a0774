"""Operations of automatic augmentation on whole batches, a magnitude for each image.

They are those of torchvision's ``RandAugment``, ``AutoAugment`` and ``TrivialAugmentWide`` on uint8
tensors, pixel for pixel (nearest neighbour, black outside of the image), on images of up to 65,536
pixels; on larger ones the mean that ``Contrast`` keeps may round otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ldam_plugins._validation import invalid
from ldam_plugins.data.augment import check_images, send

SIGNED = (
    *("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate"),
    *("Brightness", "Color", "Contrast", "Sharpness"),
)
"""Operations whose magnitude has a sign."""
OPERATIONS = (
    "Identity",
    *SIGNED,
    *("Posterize", "Solarize", "AutoContrast", "Equalize", "Invert"),
)
"""Names of the operations; their places are the numbers that :func:`apply_operations` takes."""
_MOVES = slice(OPERATIONS.index("ShearX"), OPERATIONS.index("Rotate") + 1)
_CHANNELS = 3


def apply_operations(images: Tensor, operation: Tensor, magnitude: Tensor) -> Tensor:
    """Apply one operation to each image of a batch, on the images' device.

    Images are sorted by operation, so each operation is computed once, for all its images. What is
    sent to a GPU is known on the CPU, which does not wait for it.

    Args:
        images: uint8 (N, 3, H, W).
        operation: place in :data:`OPERATIONS` of the operation of each image, int64 (N,), on the
            CPU.
        magnitude: float32 (N,), on the CPU. ShearX, ShearY: tangent of the angle. TranslateX,
            TranslateY: pixels, cut to a whole number. Rotate: degrees, counter-clockwise.
            Brightness, Color, Contrast, Sharpness: the image is blended with a black one, its grey
            one, its mean grey and its blurred one by the factor 1 + magnitude, at least 0.
            Posterize: bits that are kept, 0 to 8. Solarize: values from this one on are inverted, 0
            to 255. The others take none.

    Returns:
        uint8 (N, 3, H, W).

    Raises:
        TypeError: ``images`` are not uint8.
        ValueError: they do not have three channels, operations or magnitudes are not as many as
            they are, or there is no such operation.
    """
    check_rgb("images", images)
    for name, value in (("operation", operation), ("magnitude", magnitude)):
        if value.shape != images.shape[:1]:
            raise invalid(name, f"one for each of {len(images)} images", tuple(value.shape))
    counts = torch.bincount(operation, minlength=len(OPERATIONS)).tolist()
    if len(counts) > len(OPERATIONS):
        expected = f"a place in OPERATIONS, below {len(OPERATIONS)}"
        raise invalid("operation", expected, len(counts) - 1)
    order = operation.argsort(stable=True)
    amounts = magnitude[order].to(torch.float32)
    rows, sent = send(order, images.device), send(amounts, images.device)
    result = images.index_select(0, rows)
    begin, moved = counts[0], sum(counts[_MOVES])
    if moved:
        part = slice(begin, begin + moved)
        names = [OPERATIONS[place] for place in operation[order[part]].tolist()]
        result[part] = _move(result[part], names, amounts[part].tolist())
    begin += moved
    for name, count in zip(OPERATIONS[_MOVES.stop :], counts[_MOVES.stop :], strict=True):
        if count:
            part = slice(begin, begin + count)
            result[part] = _OF_PIXELS[name](result[part], sent[part])
        begin += count
    return torch.empty_like(result).index_copy_(0, rows, result)


def check_rgb(name: str, images: Tensor) -> None:
    """Check that ``images`` is a uint8 tensor of shape (N, 3, H, W).

    Raises:
        TypeError: another dtype.
        ValueError: another number of dimensions or channels.
    """
    check_images(name, images)
    if images.shape[1] != _CHANNELS:
        hint = "Grey images have to be made RGB first: images.expand(-1, 3, -1, -1)."
        raise invalid(name, "of shape (N, 3, H, W)", tuple(images.shape), hint=hint)


def _move(images: Tensor, names: Sequence[str], amounts: Sequence[float]) -> Tensor:
    """Shear, shift or turn each image: one gather of the nearest pixels."""
    rows, channels, height, width = images.shape
    inverse = [_inverse(*move, height, width) for move in zip(names, amounts, strict=True)]
    # From here on as torchvision and grid_sample round, for pixels halfway between two others:
    # places in -1..1, in float32, one product and one sum at a time.
    matrix = torch.tensor(inverse).view(-1, 2, 3)
    matrix = matrix / torch.tensor([0.5 * width, 0.5 * height])[:, None]
    x_weight, y_weight, shift = send(matrix, images.device)[..., None, None].unbind(2)
    x, y = (torch.arange(side, device=images.device) - (side - 1) / 2 for side in (width, height))
    places = x_weight * x + y_weight * y[:, None] + shift  # (N, 2, H, W)
    column = ((places[:, 0] + 1) * (width / 2) - 0.5).round_()
    line = ((places[:, 1] + 1) * (height / 2) - 0.5).round_()
    inside = (column >= 0) & (column < width) & (line >= 0) & (line < height)
    index = (line * width + column).where(inside, 0).to(torch.int64).view(rows, 1, -1)
    found = images.flatten(2).gather(2, index.expand(-1, channels, -1)).view(images.shape)
    return found.mul_(inside[:, None])


def _inverse(name: str, amount: float, height: int, width: int) -> list[float]:
    """The matrix (2 x 3, row by row) from places of the result to those of the image.

    Places are in pixels from the centre. A shear keeps the upper left corner. Written as
    torchvision computes it, whose rounding decides between two pixels that are equally near.
    """
    if name == "ShearX":
        tangent = math.tan(math.radians(math.degrees(math.atan(amount))))
        return [1, tangent, (width / 2 + tangent * (height / 2)) - width / 2, 0, 1, 0]
    if name == "ShearY":
        angle = math.radians(math.degrees(math.atan(amount)))
        tangent = math.sin(angle) / math.cos(angle)
        return [1, 0, 0, tangent, 1, (tangent * (width / 2) + height / 2) - height / 2]
    if name == "TranslateX":
        return [1, 0, -int(amount), 0, 1, 0]
    if name == "TranslateY":
        return [1, 0, 0, 0, 1, -int(amount)]
    cosine, sine = math.cos(math.radians(amount)), math.sin(math.radians(amount))
    return [cosine, -sine, 0, sine, cosine, 0]


def _blend(images: Tensor, other: Tensor, magnitude: Tensor) -> Tensor:
    """``(1 + magnitude) images - magnitude other``, cut to 0..255 and to whole numbers."""
    magnitude = magnitude[:, None, None, None]
    return (images * (1 + magnitude)).add_(other * -magnitude).clamp_(0, 255).to(torch.uint8)


def _grey(images: Tensor) -> Tensor:
    red, green, blue = images.split(1, dim=1)
    return (0.2989 * red + 0.587 * green + 0.114 * blue).to(torch.uint8)


def _brightness(images: Tensor, magnitude: Tensor) -> Tensor:
    return _blend(images, images.new_zeros(1), magnitude)


def _color(images: Tensor, magnitude: Tensor) -> Tensor:
    return _blend(images, _grey(images), magnitude)


def _contrast(images: Tensor, magnitude: Tensor) -> Tensor:
    total = _grey(images).sum((1, 2, 3), keepdim=True, dtype=torch.float32)
    return _blend(images, total / images[0, 0].numel(), magnitude)


def _sharpness(images: Tensor, magnitude: Tensor) -> Tensor:
    """Blend with the mean of each pixel, five times, and its eight neighbours; borders stay."""
    if min(images.shape[2:]) <= 2:
        return images
    values = images.to(torch.int16)
    lines = values[:, :, :-2] + values[:, :, 1:-1] + values[:, :, 2:]
    sums = lines[..., :-2] + lines[..., 1:-1] + lines[..., 2:] + 4 * values[:, :, 1:-1, 1:-1]
    blurred = images.clone()  # a sum of whole numbers over 13 is never halfway between two
    blurred[:, :, 1:-1, 1:-1] = (sums.to(torch.float32) / 13).round_().to(torch.uint8)
    return _blend(images, blurred, magnitude)


def _posterize(images: Tensor, bits: Tensor) -> Tensor:
    mask = (256 - (1 << (8 - bits.to(torch.int64)))).to(torch.uint8)
    return images & mask[:, None, None, None]


def _solarize(images: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(images >= threshold[:, None, None, None], ~images, images)


def _autocontrast(images: Tensor, _: Tensor) -> Tensor:
    """Stretch each channel to 0..255, unless it has one value only."""
    low = images.amin((2, 3), keepdim=True).to(torch.float32)
    span = images.amax((2, 3), keepdim=True) - low
    stretched = ((images - low) * (255 / span.clamp(min=1))).clamp_(0, 255).to(torch.uint8)
    return torch.where(span > 0, stretched, images)


def _equalize(images: Tensor, _: Tensor) -> Tensor:
    """Spread the values of each channel so that all are about equally frequent."""
    values = images.flatten(2).to(torch.int64)
    counts = values.new_zeros(*values.shape[:2], 256)
    counts.scatter_add_(2, values, torch.ones_like(values))
    last = counts.gather(2, values.amax(2, keepdim=True))
    step = (values.shape[2] - last) // 255
    below = counts.cumsum(2) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(0, 255)
    spread = table.gather(2, values).to(torch.uint8).view(images.shape)
    return torch.where(step[..., None] > 0, spread, images)


def _invert(images: Tensor, _: Tensor) -> Tensor:
    return ~images


_OF_PIXELS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Brightness": _brightness,
    "Color": _color,
    "Contrast": _contrast,
    "Sharpness": _sharpness,
    "Posterize": _posterize,
    "Solarize": _solarize,
    "AutoContrast": _autocontrast,
    "Equalize": _equalize,
    "Invert": _invert,
}
"""Operations that leave pixels where they are, of images and their magnitudes."""
