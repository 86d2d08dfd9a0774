"""The examples that a model gets wrong and is most sure of, with their pictures or texts."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from ldam_plugins._validation import check_choice
from ldam_plugins.training.files import write_atomic
from ldam_plugins.training.run_dir import MISTAKES_FILE, MISTAKES_FOLDER, PREDICTION_FILES

if TYPE_CHECKING:
    from PIL.Image import Image

MOST, MOST_A_CLASS = 24, 3
PICTURE = 160
"""Longer side of a picture, in pixels."""
_TEXT = 300


class Mistake(NamedTuple):
    """An example with its label, the class predicted, and the probability that was given to it.

    Either ``picture`` (JPEG) or ``text`` says what it is.
    """

    example: str
    label: str
    predicted: str
    probability: float
    text: str
    picture: bytes | None


def read_predictions(folder: str | os.PathLike[str], part: str = "test") -> pd.DataFrame | None:
    """The predictions of a run, names of classes as text; None if it left none."""
    file = Path(folder) / PREDICTION_FILES[check_choice("part", part, PREDICTION_FILES)]
    if not file.exists():
        return None
    names = dict.fromkeys(("example", "label", "predicted"), str)
    return pd.read_csv(file, dtype=names, keep_default_na=False, na_values={"probability": [""]})


def write_mistakes(
    output_dir: str | os.PathLike[str], content: Callable[[int], Image | str], part: str = "test"
) -> None:
    """Write ``mistakes/mistakes.csv`` with the texts, or with the names of pictures beside it.

    Chosen are the wrong predictions with the largest probability, of a class three at most.

    Args:
        output_dir: Folder of a run that has written its predictions; without any it does nothing.
        content: What gives the image or the text of an example, by its row in the predictions.
        part: The part that was predicted, ``"test"`` or ``"validation"``.
    """
    table = read_predictions(output_dir, part)
    if table is None:
        return
    wrong = table[table["label"] != table["predicted"]]
    wrong = wrong.sort_values("probability", ascending=False, kind="stable")
    wrong = wrong.groupby("label", sort=False).head(MOST_A_CLASS).head(MOST)
    kept = wrong[["example", "label", "predicted", "probability"]].assign(text="", picture="")
    folder = Path(output_dir) / MISTAKES_FOLDER
    folder.mkdir(exist_ok=True)
    for place, row in enumerate(wrong.index):
        found = content(row)
        if isinstance(found, str):
            kept.loc[row, "text"] = found
            continue
        kept.loc[row, "picture"] = f"{place}.jpg"
        write_atomic(folder / f"{place}.jpg", thumbnail(found))
    csv = kept.to_csv(index=False, lineterminator="\n")
    write_atomic(Path(output_dir) / MISTAKES_FILE, csv.encode("utf-8", "backslashreplace"))


def thumbnail(image: Image) -> bytes:
    """A small JPEG of an image; a smaller image keeps its size."""
    small = image.convert("RGB")
    small.thumbnail((PICTURE, PICTURE))
    content = io.BytesIO()
    small.save(content, "JPEG", quality=85)
    return content.getvalue()


def read_mistakes(output_dir: str | os.PathLike[str]) -> list[Mistake]:
    """What :func:`write_mistakes` wrote; nothing if it did not."""
    file = Path(output_dir) / MISTAKES_FILE
    if not file.exists():
        return []
    table = pd.read_csv(file, dtype=str, keep_default_na=False)
    return [
        Mistake(
            row["example"],
            row["label"],
            row["predicted"],
            float(row["probability"]),
            row["text"] if len(row["text"]) <= _TEXT else f"{row['text'][:_TEXT]} ...",
            (file.parent / row["picture"]).read_bytes() if row["picture"] else None,
        )
        for row in table.to_dict("records")
    ]
