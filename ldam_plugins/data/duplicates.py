"""Which examples are equal or nearly so: perceptual hashes of images, MinHash of texts.

Nothing here compares all pairs. Of two hashes that differ in at most d bits, one of d + 1 pieces
is equal (pigeonhole), so only hashes that share a piece are compared, and none is missed. Texts
whose sets of shingles are alike share a band of their MinHash signatures with a known probability.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise, zip_longest
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ldam_plugins._validation import check_int, check_real

if TYPE_CHECKING:
    from PIL import Image

HASH_BITS = 64
THUMBNAIL = 16
"""Side of the RGB thumbnails that are compared beside the hashes."""
MIN_CORRELATION = 0.9
"""Least correlation of the thumbnails of two near duplicates. Tried on CIFAR-10 with hashes 6 bits
apart at most: of 882 pairs 21 have two labels, of the 735 that correlate so none."""
MIN_VARIANCE = 1.0
"""Least variance, of values in 0..255, that counts: less is noise on a single colour."""
SHINGLE = 5
"""Signs of a shingle of a text."""
BANDS, ROWS = 12, 5
"""Of a MinHash signature. A pair of similarity s shares a band with probability
``1 - (1 - s ** ROWS) ** BANDS``: 0.99 at s = 0.8, 0.32 at 0.5."""
WINDOW = 32
"""Of more texts than this in one bucket each is compared with so many neighbours only."""
MAX_PAIRS = 2_000_000
"""Pairs of texts whose similarity is computed exactly, at most."""
_SLACK = 0.15  # two standard deviations of a similarity estimated by 60 hashes
_BLOCK = 1 << 16
_BITS_OF_16 = np.array([bin(value).count("1") for value in range(1 << 16)], dtype=np.uint8)


class NearPairs(NamedTuple):
    """Pairs of contents that are nearly equal.

    Args:
        first: Content of each pair, int64 (P,).
        second: The other one, int64 (P,).
        difference: Bits in which hashes differ, or 1 less the similarity of texts, float64 (P,).
        complete: Whether all candidates were compared. Of more than :data:`WINDOW` contents in one
            bucket only neighbours are candidates: they are connected, though not each pair is met.
    """

    first: np.ndarray
    second: np.ndarray
    difference: np.ndarray
    complete: bool = True


# Images


def image_fingerprint(image: Image.Image) -> tuple[int, np.ndarray]:
    """Perceptual hash of an RGB image, 64 bits, and its thumbnail, uint8 (256, 3).

    The hash is the pHash of imagehash: the signs of the 8 x 8 lowest frequencies of the grey image
    of 32 x 32 pixels, less their median.
    """
    from imagehash import phash
    from PIL.Image import Resampling

    bits = np.packbits(phash(image).hash.ravel())
    small = image.resize((THUMBNAIL, THUMBNAIL), Resampling.BOX)
    return int(bits.view(np.uint64)[0]), np.asarray(small).reshape(-1, 3)


def near_images(hashes: np.ndarray, thumbnails: np.ndarray, max_distance: int) -> NearPairs:
    """Images whose hashes differ in at most ``max_distance`` bits and whose thumbnails are alike.

    Alike are those with a correlation of at least :data:`MIN_CORRELATION` over all pixels, of
    values less the mean of their colour channel. The hash alone takes any dark thing on a light
    ground for any other. Of images that share a hash one stands for the others in comparisons with
    further hashes.

    Args:
        hashes: uint64 (N,).
        thumbnails: uint8 (N, P, 3); one of a single colour is like none.
        max_distance: In bits, 0..16.

    Raises:
        ValueError: ``max_distance`` is out of range.
    """
    check_int("max_distance", max_distance, low=0, high=16)
    distinct, first = np.unique(hashes, return_index=True)
    found = [_alike(thumbnails, *pair, 0) for pair in _neighbours(hashes, WINDOW)]
    pieces = np.linspace(0, HASH_BITS, max_distance + 2).astype(int)
    for place, (low, high) in enumerate(pairwise(pieces) if max_distance else ()):
        piece = _bits(distinct, low, high)
        for one, other in _neighbours(piece, None):
            bits = _distance(distinct[one], distinct[other])
            near = np.flatnonzero(bits <= max_distance)
            one, other, bits = one[near], other[near], bits[near]
            # A pair that shares an earlier piece was met there.
            new = np.ones(len(near), dtype=bool)
            for low_before, high_before in pairwise(pieces[: place + 1]):
                new &= _bits(distinct[one] ^ distinct[other], low_before, high_before) != 0
            found.append(_alike(thumbnails, first[one[new]], first[other[new]], bits[new]))
    return _joined(found)


def _bits(values: np.ndarray, low: int, high: int) -> np.ndarray:
    return (values >> np.uint64(low)) & np.uint64((1 << (high - low)) - 1)


def _distance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Bits in which hashes differ; ``np.bitwise_count`` came with NumPy 2 only."""
    return _BITS_OF_16[(one ^ other).view(np.uint16).reshape(-1, 4)].sum(axis=1)


def _alike(
    thumbnails: np.ndarray, one: np.ndarray, other: np.ndarray, bits: np.ndarray | int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The pairs whose thumbnails correlate."""
    kept = np.zeros(len(one), dtype=bool)
    for start in range(0, len(one), _BLOCK):
        part = slice(start, start + _BLOCK)
        kept[part] = _correlation(thumbnails[one[part]], thumbnails[other[part]]) >= MIN_CORRELATION
    return one[kept], other[kept], np.broadcast_to(bits, len(one))[kept].astype(np.float64)


def _correlation(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    left, right = (x - x.mean(axis=1, keepdims=True) for x in map(np.float32, (one, other)))
    norms = np.sqrt((left * left).sum(axis=(1, 2)) * (right * right).sum(axis=(1, 2)))
    return (left * right).sum(axis=(1, 2)) / np.maximum(norms, MIN_VARIANCE * left[0].size)


# Texts


def normalised(text: str) -> str:
    r"""What two texts are compared by: NFKC, case folded, runs of blanks as one, none at the ends.

    Example:
        >>> normalised("  Where is\n MY card? ")
        'where is my card?'
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def shingles(text: str) -> np.ndarray:
    """Hashes of the runs of :data:`SHINGLE` signs in a text, sorted, each once, uint32 (n,)."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    hashes = np.zeros(max(len(codes) - SHINGLE + 1, 1), dtype=np.uint32)
    for place in range(min(SHINGLE, len(codes))):
        hashes = hashes * np.uint32(0x9E3779B1) + codes[place : place + len(hashes)]
    return _sorted(hashes)


def text_signer() -> Callable[[str], np.ndarray]:
    """The function that gives the MinHash signature of a text's shingles, uint32 (60,)."""
    from datasketch import MinHash

    empty = MinHash(BANDS * ROWS, hashfunc=int)

    def sign(text: str) -> np.ndarray:
        sketch = empty.copy()
        sketch.update_batch(shingles(text))
        return np.asarray(sketch.hashvalues, dtype=np.uint32)

    return sign


def near_texts(
    signatures: np.ndarray, text: Callable[[int], str], min_similarity: float
) -> NearPairs:
    """Texts that share at least ``min_similarity`` of the shingles that either has (Jaccard).

    Args:
        signatures: As :func:`text_signer` gives them, uint32 (N, 60).
        text: Gives the normalised text of a row, where the similarity is computed exactly.
        min_similarity: In (0, 1].

    Raises:
        ValueError: ``min_similarity`` is out of range.
    """
    check_real("min_similarity", min_similarity, low=0, high=1, low_open=True)
    candidates = _candidates(signatures, min_similarity - _SLACK)
    first, second = np.divmod(candidates[:MAX_PAIRS], len(signatures) or 1)
    order = np.lexsort((second, first))
    first, second = first[order], second[order]
    known = lru_cache(maxsize=4096)(lambda row: shingles(text(row)))
    similarity = np.array(
        [_jaccard(known(i), known(j)) for i, j in zip(first.tolist(), second.tolist(), strict=True)]
    )
    kept = np.flatnonzero(similarity >= min_similarity)
    complete = len(candidates) <= MAX_PAIRS
    return NearPairs(first[kept], second[kept], 1 - similarity[kept], complete)


def _candidates(signatures: np.ndarray, least: float) -> np.ndarray:
    """Pairs that share a band and are alike by their signatures, as ``first * N + second``.

    Those that are next to each other in a bucket come first.
    """
    count = len(signatures)
    keys = [_band_keys(signatures, band) for band in range(BANDS)]
    found, met = [], np.zeros(0, dtype=np.int64)
    for pairs in zip_longest(*(_neighbours(key, WINDOW) for key in keys)):
        codes = [np.minimum(*pair) * count + np.maximum(*pair) for pair in pairs if pair]
        new = _sorted(np.concatenate(codes))
        new = new[~_are_among(new, met)]
        met = np.sort(np.concatenate([met, new]), kind="stable")
        found.append(new[_estimated(signatures, new, count) >= least])
        if sum(map(len, found)) > MAX_PAIRS:
            break
    return np.concatenate([met[:0], *found])


def _sorted(values: np.ndarray) -> np.ndarray:
    """Each value once, in order; ``np.unique`` hashes, which takes minutes for codes of pairs."""
    ordered = np.sort(values)
    return ordered[np.diff(ordered, prepend=ordered[:1] - 1) != 0]


def _are_among(values: np.ndarray, ordered: np.ndarray) -> np.ndarray:
    place = np.searchsorted(ordered, values)
    inside = place < len(ordered)
    inside[inside] = ordered[place[inside]] == values[inside]
    return inside


def _band_keys(signatures: np.ndarray, band: int) -> np.ndarray:
    """One number for the rows of a band; equal bands have equal ones."""
    key = np.zeros(len(signatures), dtype=np.uint64)
    for column in range(band * ROWS, (band + 1) * ROWS):
        key = (key ^ signatures[:, column]) * np.uint64(0x9E3779B97F4A7C15)
        key ^= key >> np.uint64(29)
    return key


def _estimated(signatures: np.ndarray, pairs: np.ndarray, count: int) -> np.ndarray:
    shares = np.zeros(len(pairs))
    for start in range(0, len(pairs), _BLOCK):
        first, second = np.divmod(pairs[start : start + _BLOCK], count)
        shares[start : start + _BLOCK] = (signatures[first] == signatures[second]).mean(axis=1)
    return shares


def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


# Both


def _neighbours(keys: np.ndarray, window: int | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows with equal keys, in pairs: first those next to each other, then next but one ...

    Without a window these are all pairs, with one each row and that many of the rows after it.
    """
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    rows, shift = np.arange(len(keys)), 1
    while window is None or shift <= window:
        rows = rows[rows + shift < len(keys)]
        rows = rows[ordered[rows] == ordered[rows + shift]]
        if not len(rows):
            return
        yield order[rows], order[rows + shift]
        shift += 1


def _joined(found: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> NearPairs:
    none = np.zeros(0, dtype=np.int64)
    parts = [(none, none, np.zeros(0)), *found]
    first, second, difference = (np.concatenate(column) for column in zip(*parts, strict=True))
    return NearPairs(first, second, difference)
