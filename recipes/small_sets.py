"""Cut twenty small long-tailed sets from larger ones, to see how defaults do on data like a user's.

    python recipes/small_sets.py --data path/to/data --output_dir runs/small_sets

``--data`` holds the folders ``cifar10 cifar100 grocery banking77 imdb go_emotions`` as the hub
serves them; digits and docstrings are embedded. Ten sets of images come to ``images/NAME``, ten of
texts to ``texts/NAME``, each a folder that the recipes' ``--dataset`` takes, with ``cut.json``: the
rule and what came of it. What to run on them is in ``recipes/grids/small_images.yaml`` and
``small_texts.yaml``.

The rule. Of a source those classes count that have enough samples; ``classes`` of them are drawn
with the seed. Class c of C gets ``n_max * ratio ** (-c / (C - 1))`` training samples (at least 4,
no more than there are), drawn likewise; ``n_max`` is the largest at which all have no more than
``samples`` together. Tested is on an equal number of each class, no more than 1,000 in all. Of
GoEmotions only texts with one label are taken, of docstrings and of
reviews of IMDB the first 50 words.
"""

from __future__ import annotations

from options import flags_alone
from study_options import SetsOptions

if __name__ == "__main__":  # --help and a misspelt flag are answered before torch is imported
    chosen = flags_alone(SetsOptions)

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value, load_dataset

from ldam_plugins.data import load_images, load_texts

LEAST = 4
TESTED = 1000


@dataclass(frozen=True)
class Cut:
    """One set: what it is cut from, and how."""

    source: str
    classes: int
    samples: int
    ratio: float
    seed: int
    words: int | None = None

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.source}_{self.classes}_{self.samples}"


IMAGES = (
    Cut("digits", 5, 300, 20, 1),
    Cut("digits", 10, 500, 50, 2),
    Cut("cifar10", 3, 300, 10, 3),
    Cut("cifar10", 10, 800, 50, 4),
    Cut("cifar100", 10, 400, 20, 5),
    Cut("cifar100", 20, 600, 10, 6),
    Cut("cifar100", 50, 1200, 20, 7),
    Cut("grocery", 5, 300, 10, 8),
    Cut("grocery", 10, 500, 20, 9),
    Cut("grocery", 20, 700, 10, 10),
)
TEXTS = (
    Cut("stdlib_docstrings", 5, 300, 10, 11, words=50),
    Cut("stdlib_docstrings", 15, 600, 10, 12, words=50),
    Cut("imdb", 2, 300, 10, 13, words=50),
    Cut("imdb", 2, 600, 20, 14, words=50),
    Cut("banking77", 10, 300, 20, 15),
    Cut("banking77", 30, 800, 10, 16),
    Cut("banking77", 50, 1200, 20, 17),
    Cut("go_emotions", 4, 400, 20, 18),
    Cut("go_emotions", 8, 800, 50, 19),
    Cut("go_emotions", 15, 3000, 50, 20),
)


def choose(
    cut: Cut, train: np.ndarray, test: np.ndarray
) -> tuple[list[int], dict[str, np.ndarray]]:
    """The classes of a set, most samples first, and the rows of the source in either part.

    Args:
        cut: The rule.
        train: Labels of the source's training rows (N,).
        test: Labels of its test rows (M,).
    """
    random = np.random.default_rng(cut.seed)
    found = [np.bincount(labels, minlength=train.max() + 1) for labels in (train, test)]
    limit = TESTED // cut.classes
    usable = {n: (found[0] >= LEAST) & (found[1] >= n) for n in range(1, limit + 1)}
    tested = max(n for n, enough in usable.items() if np.count_nonzero(enough) >= cut.classes)
    enough = usable[tested]
    # Head to tail as in the source, so that the head of the set is not cut short.
    drawn = random.choice(np.flatnonzero(enough), cut.classes, replace=False)
    classes = drawn[np.argsort(-found[0][drawn], kind="stable")]
    steps = np.arange(cut.classes) / (cut.classes - 1)

    def counts(largest: int) -> np.ndarray:
        sizes = np.maximum(largest * cut.ratio**-steps, LEAST).astype(int)
        return np.minimum(sizes, found[0][classes])

    largest = max(n for n in range(LEAST, cut.samples) if counts(n).sum() <= cut.samples)
    rows: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for label, count in zip(classes, counts(largest), strict=True):
        rows["train"].append(random.permutation(np.flatnonzero(train == label))[:count])
        rows["test"].append(random.permutation(np.flatnonzero(test == label))[:tested])
    return classes.tolist(), {part: np.concatenate(kept) for part, kept in rows.items()}


def write(cut: Cut, folder: Path, parts: dict[str, Any], names: list[str], content: Any) -> None:
    """Cut a set from its source and write it.

    Args:
        cut: The rule.
        folder: Of all sets of this kind.
        parts: By train and test, the labels of the source and what gives the content of a row.
        names: Of the source's classes.
        content: The feature of ``datasets`` that the content of a row is.
    """
    labels = {part: labels for part, (labels, _) in parts.items()}
    classes, rows = choose(cut, labels["train"], labels["test"])
    kind = "image" if isinstance(content, Image) else "text"
    features = Features({kind: content, "label": ClassLabel(names=[names[c] for c in classes])})
    place = folder / cut.name / "data"
    place.mkdir(parents=True, exist_ok=True)
    for part, (_, row) in parts.items():
        contents = [row(int(index)) for index in rows[part]]
        if cut.words is not None:
            contents = [" ".join(text.split()[: cut.words]) for text in contents]
        made = {
            kind: contents,
            "label": [classes.index(labels[part][index]) for index in rows[part]],
        }
        made_set = Dataset.from_dict(made, features=features)
        made_set.to_parquet(place / f"{part}-00000-of-00001.parquet")
    counts = np.bincount([classes.index(c) for c in labels["train"][rows["train"]]]).tolist()
    record = {**asdict(cut), "class_counts": counts, "tested": len(rows["test"])}
    text = json.dumps(record, indent=2)
    (folder / cut.name / "cut.json").write_text(f"{text}\n", encoding="utf-8")
    print(f"{cut.name}: {sum(counts)} to train on, {counts[0]} to {counts[-1]} a class")


def image_source(name: str, data: Path) -> tuple[dict[str, Any], list[str]]:
    """Labels and images of the parts of a source, and the names of its classes."""
    parts = load_images(name if name == "digits" else data / name)
    return (
        {
            part: (images.labels, images.image)
            for part, images in zip(("train", "test"), parts, strict=True)
        },
        list(parts[0].class_names),
    )


def text_source(name: str, data: Path) -> tuple[dict[str, Any], list[str]]:
    """Labels and texts of the parts of a source, and the names of its classes."""
    if name == "go_emotions":
        loaded = load_dataset(str(data / name))
        single = [loaded[part].filter(lambda row: len(row["labels"]) == 1) for part in PARTS]
        names = single[0].features["labels"].feature.names
        of_parts = [(rows["text"], [label for (label,) in rows["labels"]]) for rows in single]
    else:
        train, test = load_texts(name if name == "stdlib_docstrings" else data / name)
        names = train.features["label"].names
        of_parts = [(rows["text"], rows["label"]) for rows in (train, test)]
    return (
        {
            part: (np.array(labels), list(texts).__getitem__)
            for part, (texts, labels) in zip(PARTS, of_parts, strict=True)
        },
        names,
    )


PARTS = ("train", "test")
KINDS: tuple[tuple[str, tuple[Cut, ...], Callable[..., Any], Any], ...] = (
    ("images", IMAGES, image_source, Image()),
    ("texts", TEXTS, text_source, Value("string")),
)


def main(options: SetsOptions) -> None:
    """Cut all sets."""
    for kind, cuts, source, content in KINDS:
        for cut in cuts:
            parts, names = source(cut.source, Path(options.data))
            write(cut, Path(options.output_dir, kind), parts, names, content)


if __name__ == "__main__":
    main(chosen)
