"""Boxes are erased as torchvision's RandomErasing and the authors' Cutout do it."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision import transforms

from ldam_plugins.data.erasing import Boxes, Cutout, RandomErasing

HEIGHT, WIDTH = 14, 22


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def box_of(image):
    """First and last row and column of the zeros of an image of ones, and whether all are zeros."""
    (lines, columns) = np.nonzero(image[0].numpy() == 0)
    if not len(lines):
        return (0, 0, 0, 0)
    box = (lines.min(), lines.max() + 1, columns.min(), columns.max() + 1)
    assert (box[1] - box[0]) * (box[3] - box[2]) == len(lines)
    return tuple(map(int, box))


def erased(eraser, rows):
    images = torch.ones(rows, 3, HEIGHT, WIDTH)
    return [box_of(image) for image in eraser(images, seeded())]


@pytest.mark.parametrize("rows", [1500, pytest.param(10_000, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"p": 1.0, "scale": (0.1, 0.2), "ratio": (0.5, 0.8)},
        {"p": 0.7, "scale": (0.8, 1.0), "ratio": (0.2, 5.0)},
    ],
    ids=["usual", "certain", "often larger than the image"],
)
def test_random_erasing_is_distributed_as_torchvisions(options, rows):
    theirs, one = transforms.RandomErasing(**options), torch.ones(3, HEIGHT, WIDTH)
    found = np.array(erased(RandomErasing(**options), rows))
    expected = np.array([box_of(theirs(one)) for _ in range(rows)])
    for boxes in (found, expected):
        assert (boxes.max(0) <= [HEIGHT, HEIGHT, WIDTH, WIDTH]).all()
    counts = [int((boxes[:, 1] > 0).sum()) for boxes in (found, expected)]
    if counts != [rows, rows]:
        assert stats.fisher_exact([counts, [rows - count for count in counts]]).pvalue > 1e-3
    for part in (
        lambda box: box[:, 1] - box[:, 0],
        lambda box: box[:, 3] - box[:, 2],
        lambda box: (box[:, 1] - box[:, 0]) * (box[:, 3] - box[:, 2]),
        lambda box: box[:, 0],
        lambda box: box[:, 2],
    ):
        assert stats.ks_2samp(part(found), part(expected), method="asymp").pvalue > 1e-3


@pytest.mark.parametrize("side", [4, 5, 16, 40])
def test_cutout_has_each_centre_as_often_cut_at_the_border(side):
    """Enumerated: rows y - s // 2 to y + s - s // 2, which for an even side are the authors'."""
    half = side // 2
    boxes = {}
    for y, x in itertools.product(range(HEIGHT), range(WIDTH)):
        box = (max(0, y - half), min(HEIGHT, y + side - half))
        box += (max(0, x - half), min(WIDTH, x + side - half))
        boxes[box] = boxes.get(box, 0) + 1
    rows = 6160
    found = erased(Cutout(side), rows)
    assert set(found) == set(boxes)
    if len(boxes) > 1:
        counts = [found.count(box) for box in boxes]
        expected = [rows * ways / (HEIGHT * WIDTH) for ways in boxes.values()]
        assert stats.chisquare(counts, expected).pvalue > 1e-3


@pytest.mark.parametrize("eraser", [Cutout(5), RandomErasing(0.8)], ids=["cutout", "erasing"])
def test_draws_can_be_cut_and_repeat(eraser):
    images = torch.randn(40, 3, HEIGHT, WIDTH).contiguous(memory_format=torch.channels_last)
    before = images.clone()
    draws = eraser.draw(40, (HEIGHT, WIDTH), seeded())
    whole = draws.apply(images)
    assert torch.equal(images, before)
    assert whole.is_contiguous(memory_format=torch.channels_last)
    parts = [draws[rows].apply(images[rows]) for rows in (slice(0, 7), slice(7, 40))]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(eraser(images, seeded()), whole)
    assert not torch.equal(eraser(images, seeded(1)), whole)
    kept = whole != 0
    assert torch.equal(whole[kept], images[kept])
    assert 0 < (~kept).sum() < kept.sum()


def test_a_value_can_be_given():
    boxes = Boxes(torch.tensor([[1, 0], [0, 0]]), torch.tensor([[3, 2], [0, 0]]))
    images = torch.zeros(2, 1, 4, 4, dtype=torch.uint8)
    found = boxes.apply(images, 7)
    assert found[0, 0].tolist() == [[0] * 4, [7, 7, 0, 0], [7, 7, 0, 0], [0] * 4]
    assert not found[1].any()


def test_no_probability_erases_nothing():
    assert set(erased(RandomErasing(0), 100)) == {(0, 0, 0, 0)}


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: Cutout(0), ValueError, "`side` must be an integer >= 1, got 0"),
        (lambda: Cutout(1.5), TypeError, "`side` must be an integer"),
        (lambda: RandomErasing(1.5), ValueError, r"`p` must be in \[0, 1\], got 1.5"),
        (lambda: RandomErasing(scale=(0.3, 0.1)), ValueError, "`scale` must be two numbers"),
        (lambda: RandomErasing(scale=(0.3, 2)), ValueError, r"`scale` must be in \[0, 1\], got 2"),
        (lambda: RandomErasing(ratio=(0, 2)), ValueError, "`ratio` must be a finite number > 0"),
        (lambda: RandomErasing(ratio=(1,)), ValueError, "`ratio` must be two numbers"),
        (
            lambda: Cutout(2)(torch.ones(3, 8, 8), seeded()),
            ValueError,
            r"`images` must be of shape \(N, C, H, W\), got \(3, 8, 8\)",
        ),
        (
            lambda: Cutout(2).draw(3, (8, 8), seeded()).apply(torch.ones(4, 3, 8, 8)),
            ValueError,
            "`images` must be as many as the 3 draws, got 4",
        ),
        (
            lambda: Cutout(2).draw(3, (8, 8), SimpleNamespace(device=torch.device("cuda"))),
            ValueError,
            "`generator` must be on the CPU, got 'cuda'",
        ),
    ],
)
def test_bad_arguments(call, kind, message):
    with pytest.raises(kind, match=message):
        call()
