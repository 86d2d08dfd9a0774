"""What is in a data set and what is wrong with it, before anything is trained on it."""

from __future__ import annotations

import errno
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ldam_plugins._validation import check_int, check_real, invalid
from ldam_plugins.choices import FEW_BELOW, MANY_ABOVE, NEAR_DISTANCE, NEAR_SIMILARITY
from ldam_plugins.data.audit_classes import Prior, compare_priors, look_alikes
from ldam_plugins.data.audit_tables import (
    TEST,
    TRAIN,
    duplicate_tables,
    find_contents,
    name_examples,
)
from ldam_plugins.data.duplicates import (
    MIN_CORRELATION,
    image_fingerprint,
    near_images,
    near_texts,
    normalised,
    text_signer,
)
from ldam_plugins.data.readers.base import LABEL, TEXT, open_image, to_rgb

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL import Image

    from ldam_plugins.data.images import LabelledImages

MIN_SIDE = 32
"""Pixels of a side from which images are compared for near duplicates: the hash is made of so many,
and of smaller ones different things look alike (of scikit-learn's digits, of 8, one in five)."""
TABLES = ("duplicates", "leaks", "conflicts", "unreadable")
"""The lists of an :class:`Audit`, each a CSV file of its name."""
_ORIENTATION = 0x0112  # EXIF
_SHOWN = 200  # signs of a text in the lists
_TEXTS, _IMAGES = 1000, 64  # that are looked at together
_DECODED = (128, 128)  # JPEGs are decoded at a fraction of their size, but not below this
_FLAT = 4  # brightest less darkest value of a picture of one colour


@dataclass(frozen=True)
class ImageFacts:
    """What the images of both splits are like; the unreadable ones are not among them.

    Args:
        width: Pixels: least, 5th percentile, median, 95th percentile, greatest.
        height: The same.
        sizes: The most frequent sizes, ``"640 x 480"``, and how many images have them.
        modes: Images by mode: RGB, L, RGBA, ...
        formats: Images by format of the file.
        rotated: Images whose EXIF entry says that they are to be shown rotated or mirrored.
        animated: Images of several frames.
        elongated: Images that are over three times as long as wide, or the other way round.
        one_colour: Images of one colour.
    """

    width: Mapping[str, float]
    height: Mapping[str, float]
    sizes: Mapping[str, int]
    modes: Mapping[str, int]
    formats: Mapping[str, int]
    rotated: int
    animated: int
    elongated: int
    one_colour: int


@dataclass(frozen=True)
class TextFacts:
    """What the texts of both splits are like.

    Args:
        characters: Per text: least, 5th percentile, median, 95th percentile, greatest.
        words: The same, of runs without blanks.
        empty: Texts without a letter or digit.
        tokens: Tokens per text, as the words; None without a tokenizer.
        max_length: Tokens that a text is cut to.
        cut_texts: Texts of more tokens than that.
        cut_tokens: Tokens of all texts that are cut off, as a share in 0..1.
    """

    characters: Mapping[str, float]
    words: Mapping[str, float]
    empty: int
    tokens: Mapping[str, float] | None = None
    max_length: int | None = None
    cut_texts: int | None = None
    cut_tokens: float | None = None


@dataclass(frozen=True)
class Audit:
    """What :func:`audit_images` and :func:`audit_texts` find.

    The lists are tables with a row an example, or a row a pair. Examples are named by ``split``
    (train or test), ``index`` (of that split as it was given), ``label`` (the class's name) and
    ``example`` (path, or beginning of the text). A pair has the same of the ``other_`` one, says
    whether it is a ``match`` that is ``equal`` or ``near``, and the ``difference``: bits of the
    hash (images), or the share of the shingles that only one of them has (texts).

    Args:
        kind: ``"images"`` or ``"texts"``.
        class_names: Name of each class.
        counts: Examples of each class, by split.
        look_alikes: Classes whose names are one name in other spellings.
        duplicates: All examples that have a duplicate. Those of one ``content`` are equal, those of
            one ``group`` are equal or connected by near duplicates.
        leaks: Each test example that is in the training set too, and the nearest one there.
        conflicts: Pairs of equal or near examples with different labels.
        unreadable: Images that cannot be read, with the reason.
        equal: Examples that repeat an earlier one, training split first.
        near: Pairs of contents that are nearly equal.
        near_complete: Whether all candidates for near duplicates were looked at.
        criterion: What counts as equal and what as near, in words.
        images: Facts of images, or None.
        texts: Facts of texts, or None.
        prior: Test against training classes; None without a test set.
    """

    kind: str
    class_names: tuple[str, ...]
    counts: Mapping[str, Sequence[int]]
    look_alikes: Sequence[Sequence[str]]
    duplicates: pd.DataFrame
    leaks: pd.DataFrame
    conflicts: pd.DataFrame
    unreadable: pd.DataFrame
    equal: int
    near: int
    near_complete: bool
    criterion: str
    images: ImageFacts | None = None
    texts: TextFacts | None = None
    prior: Prior | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Examples of each split."""
        return {split: int(sum(counts)) for split, counts in self.counts.items()}

    @property
    def imbalance_ratio(self) -> float:
        """n_max / n_min of the training set, over the classes that it has."""
        counts = [count for count in self.counts[TRAIN] if count]
        return max(counts) / min(counts)

    def groups(self) -> dict[str, list[int]]:
        """Class indices by training examples: many (> 100), medium, few (< 20), absent (0)."""
        found: dict[str, list[int]] = {"many": [], "medium": [], "few": [], "absent": []}
        for index, count in enumerate(self.counts[TRAIN]):
            found[group_of(count)].append(index)
        return found

    def absent(self, split: str) -> list[str]:
        """Names of the classes without an example in a split."""
        if split not in self.counts:
            return []
        return [
            n for n, count in zip(self.class_names, self.counts[split], strict=True) if not count
        ]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the lists, of which it has the lengths, ready for JSON."""
        kept = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in TABLES}
        for name in ("images", "texts", "prior"):
            kept[name] = None if kept[name] is None else asdict(kept[name])
        kept["counts"] = {split: list(map(int, found)) for split, found in self.counts.items()}
        kept["rows"] = {name: len(getattr(self, name)) for name in TABLES}
        kept |= {"imbalance_ratio": self.imbalance_ratio, "groups": self.groups()}
        return kept | {"absent": {split: self.absent(split) for split in self.counts}}


def group_of(count: int) -> str:
    """many, medium, few or absent, by the number of training examples."""
    if count == 0:
        return "absent"
    return "many" if count > MANY_ABOVE else "few" if count < FEW_BELOW else "medium"


def audit_images(
    train: LabelledImages,
    test: LabelledImages | None = None,
    *,
    near_distance: int = NEAR_DISTANCE,
    progress: bool = False,
) -> Audit:
    """Look at every image once: duplicates, leaks, conflicts, unreadable files, sizes, classes.

    Equal are files of the same bytes (BLAKE2b), near those whose perceptual hashes (pHash, 64 bits)
    differ in at most ``near_distance`` and whose thumbnails correlate by 0.9. Images of one colour,
    or of fewer than 32 pixels a side, are near to none. JPEGs are decoded at a fraction of their
    size. Needs imagehash (``pip install "ldam-plugins[inspect]"``).

    Args:
        train: As :func:`.load_images` gives it.
        test: The test set, or None.
        near_distance: In bits, 0..16; a number that is odd finds what the even one below it does.
        progress: Show a bar.

    Raises:
        ImportError: imagehash is not installed.
        ValueError: an argument out of range, other classes in ``test`` than in ``train``, or no
            image that can be read.

    Example:
        >>> from ldam_plugins.data import load_images
        >>> audit = audit_images(*load_images("digits"))
        >>> audit.sizes, audit.equal, audit.images.sizes
        ({'train': 1200, 'test': 540}, 0, {'8 x 8': 1740})
    """
    _require("imagehash")
    check_int("near_distance", near_distance, low=0, high=16)
    parts = {TRAIN: train} if test is None else {TRAIN: train, TEST: test}
    names = _common_classes({split: part.class_names for split, part in parts.items()})
    looked = pd.concat(
        [_look_at_images(part, split, progress) for split, part in parts.items()],
        ignore_index=True,
    )
    readable = looked[looked["reason"] == ""].reset_index(drop=True)
    if readable.empty:
        reason = looked["reason"].iloc[0]
        raise invalid("train", "a set of images of which one can be read", reason)
    contents = find_contents(readable)
    hashes = readable["hash"].to_numpy(np.uint64)[contents.first]
    thumbnails = np.stack(readable["thumbnail"].to_list())[contents.first]
    sides = readable[["width", "height"]].min(axis=1).to_numpy()[contents.first]
    large = np.flatnonzero(sides >= MIN_SIDE)
    near = near_images(hashes[large], thumbnails[large], near_distance)
    near = near._replace(first=large[near.first], second=large[near.second])

    def example(split: str, indices: np.ndarray) -> list[str]:
        return [parts[split].describe(index) for index in indices.tolist()]

    criterion = (
        "equal: files of the same bytes; near: perceptual hashes (pHash, 64 bits) that differ in "
        f"at most {near_distance} bits, and thumbnails that correlate by {MIN_CORRELATION:g}, of "
        f"images of {MIN_SIDE} pixels and more a side"
    )
    unreadable = name_examples(looked[looked["reason"] != ""], names, example)
    return Audit(
        kind="images",
        class_names=names,
        unreadable=unreadable.assign(
            reason=looked.loc[looked["reason"] != "", "reason"].to_numpy()
        ),
        criterion=criterion,
        images=_image_facts(readable),
        **_class_facts({split: part.labels for split, part in parts.items()}, names),
        **duplicate_tables(readable, contents, near, names, example),
    )


def audit_texts(
    train: Dataset,
    test: Dataset | None = None,
    *,
    near_similarity: float = NEAR_SIMILARITY,
    tokenizer: Callable[[list[str]], Mapping[str, Any]] | None = None,
    max_length: int = 256,
    progress: bool = False,
) -> Audit:
    """Look at every text once: duplicates, leaks, conflicts, lengths, classes.

    Equal are texts that are the same after NFKC, case folding and the joining of blanks
    (:func:`.normalised`). Near are those that share at least ``near_similarity`` of the runs of 5
    signs that either has (Jaccard, exact); candidates come from MinHash, which misses one in a
    hundred of the pairs at 0.8 and fewer above. Needs datasketch
    (``pip install "ldam-plugins[inspect]"``).

    Args:
        train: Table with the columns ``text`` and ``label``, as :func:`.load_texts` gives it.
        test: The test set, or None.
        near_similarity: In [0.5, 1]; below 0.8 more of the pairs are missed.
        tokenizer: Gives ``input_ids`` of a list of texts, as those of transformers do; to count
            tokens.
        max_length: Tokens that a text is cut to, special ones included.
        progress: Show a bar.

    Raises:
        ImportError: datasketch is not installed.
        ValueError: an argument out of range, or other classes in ``test`` than in ``train``.

    Example:
        >>> from ldam_plugins.data.readers.base import text_table
        >>> train = text_table(["Where is my card?", "where is  my card?"], [0, 1], ["a", "b"])
        >>> audit = audit_texts(train)
        >>> audit.equal, audit.conflicts[["label", "other_label"]].values.tolist()
        (1, [['a', 'b']])
    """
    _require("datasketch")
    check_real("near_similarity", near_similarity, low=0.5, high=1)
    check_int("max_length", max_length, low=1)
    parts = {TRAIN: train} if test is None else {TRAIN: train, TEST: test}
    names = _common_classes({s: tuple(p.features[LABEL].names) for s, p in parts.items()})
    tables, signatures = zip(*_look_at_texts(parts, tokenizer, progress=progress), strict=True)
    looked = pd.concat(tables, ignore_index=True)
    contents = find_contents(looked)
    signed = np.concatenate(signatures)[contents.first]
    split, index = looked["split"].to_numpy(), looked["index"].to_numpy()

    def text(content: int) -> str:
        row = contents.first[content]
        return normalised(parts[split[row]][int(index[row])][TEXT])

    def example(split: str, indices: np.ndarray) -> list[str]:
        texts = parts[split].select(indices)[TEXT][:]
        return [" ".join(text[: 2 * _SHOWN].split())[:_SHOWN] for text in texts]

    near = near_texts(signed, text, near_similarity)
    criterion = (
        "equal: the same after Unicode NFKC, case folding and joining of blanks; near: at least "
        f"{near_similarity:.0%} of the runs of 5 signs in common (Jaccard; candidates by MinHash)"
    )
    return Audit(
        kind="texts",
        class_names=names,
        unreadable=name_examples(looked[:0], names, example).assign(reason=""),
        criterion=criterion,
        texts=_text_facts(looked, max_length),
        **_class_facts({s: np.asarray(p[LABEL]) for s, p in parts.items()}, names),
        **duplicate_tables(looked, contents, near, names, example),
    )


def _require(library: str) -> None:
    if find_spec(library) is None:
        message = (
            f'{library} is not installed, which finds near duplicates: pip install "{library}"'
        )
        raise ImportError(f'{message}, or pip install -e ".[inspect]"')


def _common_classes(names: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    first, *others = names.values()
    for other in others:
        if tuple(other) != tuple(first):
            odd = sorted(set(first) ^ set(other)) or "their order"
            raise invalid("test", "a set with the classes of `train`", odd)
    return tuple(first)


def _class_facts(labels: Mapping[str, np.ndarray], names: tuple[str, ...]) -> dict[str, Any]:
    counts = {s: np.bincount(found, minlength=len(names)) for s, found in labels.items()}
    prior = compare_priors(counts[TRAIN], counts[TEST], names) if TEST in counts else None
    lists = {split: found.tolist() for split, found in counts.items()}
    return {"counts": lists, "look_alikes": look_alikes(names), "prior": prior}


# Examples


def _look_at_images(images: LabelledImages, split: str, progress: bool) -> pd.DataFrame:
    """A row an image: what :func:`_look_at_image` finds, or the reason why it cannot be read.

    In threads, as decoding and hashing of bytes leave Python's lock: one a core.
    """
    from tqdm import tqdm

    starts = range(0, len(images), _IMAGES)

    def look(start: int) -> list[dict[str, Any]]:
        stop = min(start + _IMAGES, len(images))
        return [_look_at_image(images, index) for index in range(start, stop)]

    rows: list[dict[str, Any]] = []
    with (
        tqdm(total=len(images), unit="image", desc=f"{split} images", disable=not progress) as bar,
        ThreadPoolExecutor(os.cpu_count()) as pool,
    ):
        for block in pool.map(look, starts):
            rows += block
            bar.update(len(block))
    return pd.DataFrame(rows).assign(split=split, index=np.arange(len(rows)), label=images.labels)


def _look_at_image(images: LabelledImages, index: int) -> dict[str, Any]:
    row = int(images.rows[index])
    facts: dict[str, Any] = {"reason": ""}
    try:
        content = images.source.stored(row)
        if content is None:
            image = images.source.read(row)
            content = image.tobytes()
            facts |= _stored_as(image)
        else:
            with open_image(io.BytesIO(content)) as opened:
                facts |= _opened(opened)
                image = to_rgb(opened)
        fingerprint, thumbnail = image_fingerprint(image)
    except Exception as error:  # decoders raise nearly any exception for damaged bytes
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        return {"reason": str(error) or type(error).__name__}
    flat = bool(np.ptp(np.asarray(image.getextrema()), axis=1).max() < _FLAT)
    shared = {"content": _digest(content), "hash": fingerprint, "thumbnail": thumbnail}
    return facts | shared | {"one_colour": flat}


def _opened(image: Image.Image) -> dict[str, Any]:
    """What a file says of itself; a JPEG will be decoded at a fraction of its size."""
    facts = _stored_as(image)
    facts["rotated"] = image.getexif().get(_ORIENTATION, 1) not in (0, 1)
    facts["animated"] = getattr(image, "n_frames", 1) > 1
    image.draft(None, _DECODED)
    return facts


def _stored_as(image: Image.Image) -> dict[str, Any]:
    width, height = image.size
    facts = {"width": width, "height": height, "mode": image.mode}
    return facts | {"format": image.format or "pixels", "rotated": False, "animated": False}


def _digest(content: bytes) -> int:
    """64 bits: among a million different contents two share it with a probability of 3e-8."""
    from hashlib import blake2b

    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def _look_at_texts(
    parts: Mapping[str, Dataset], tokenizer: Any, *, progress: bool
) -> Iterator[tuple[pd.DataFrame, np.ndarray]]:
    """By split: a row a text, and the signatures; those of repeated texts are left zero."""
    from tqdm import tqdm

    sign, met = text_signer(), set()
    for split, table in parts.items():
        columns: dict[str, list[Any]] = {"content": [], "characters": [], "words": [], "empty": []}
        columns |= {"tokens": []} if tokenizer else {}
        signatures = np.zeros((len(table), len(sign(""))), dtype=np.uint32)
        bar = tqdm(total=len(table), unit="text", desc=f"{split} texts", disable=not progress)
        with bar:
            for start in range(0, len(table), _TEXTS):
                texts = table[start : start + _TEXTS][TEXT]
                for row, text in enumerate(texts, start):
                    plain = normalised(text)
                    content = _digest(plain.encode("utf-8", "surrogatepass"))
                    columns["content"].append(content)
                    columns["characters"].append(len(text))
                    columns["words"].append(plain.count(" ") + bool(plain))
                    columns["empty"].append(not any(map(str.isalnum, plain)))
                    if content not in met:
                        met.add(content)
                        signatures[row] = sign(plain)
                if tokenizer:
                    columns["tokens"] += map(len, tokenizer(texts)["input_ids"])
                bar.update(len(texts))
        frame = pd.DataFrame(columns).assign(index=np.arange(len(table)))
        yield frame.assign(split=split, label=np.asarray(table[LABEL])), signatures


def _quantiles(values: Any) -> dict[str, float]:
    shares = {"least": 0, "5 %": 0.05, "median": 0.5, "95 %": 0.95, "greatest": 1}
    found = np.quantile(np.asarray(values), list(shares.values()), method="nearest")
    return dict(zip(shares, found.tolist(), strict=True))


def _image_facts(seen: pd.DataFrame) -> ImageFacts:
    width, height = seen["width"].astype(int), seen["height"].astype(int)
    sizes = Counter(zip(width.tolist(), height.tolist(), strict=True)).most_common(5)
    longest = np.maximum(width, height) / np.minimum(width, height)
    return ImageFacts(
        width=_quantiles(width),
        height=_quantiles(height),
        sizes={f"{w} x {h}": count for (w, h), count in sizes},
        modes=dict(Counter(seen["mode"]).most_common()),
        formats=dict(Counter(seen["format"]).most_common()),
        rotated=int(seen["rotated"].sum()),
        animated=int(seen["animated"].sum()),
        elongated=int((longest > 3).sum()),
        one_colour=int(seen["one_colour"].sum()),
    )


def _text_facts(seen: pd.DataFrame, max_length: int) -> TextFacts:
    facts = TextFacts(
        characters=_quantiles(seen["characters"]),
        words=_quantiles(seen["words"]),
        empty=int(seen["empty"].sum()),
    )
    if "tokens" not in seen:
        return facts
    tokens = seen["tokens"].to_numpy()
    cut = np.maximum(tokens - max_length, 0)
    return replace(
        facts,
        tokens=_quantiles(tokens),
        max_length=max_length,
        cut_texts=int((cut > 0).sum()),
        cut_tokens=float(cut.sum() / max(tokens.sum(), 1)),
    )
