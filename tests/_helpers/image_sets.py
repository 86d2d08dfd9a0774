"""Small sets of ten images in every layout; all hold the same pictures and labels."""

from __future__ import annotations

import io
import json
from pathlib import Path

import datasets
import pytest
from PIL import Image

CLASSES = ("ant", "bee", "cat")
TRAIN = (0, 0, 0, 1, 1, 2)
TEST = (0, 1, 2, 2)


def picture(split: str, row: int) -> Image.Image:
    """A colour that tells the example: label, row in its split, split."""
    label = (TRAIN if split == "train" else TEST)[row]
    return Image.new("RGB", (6, 5), (80 * label, 10 * row, 200 * (split == "train")))


def png(split: str, row: int) -> bytes:
    buffer = io.BytesIO()
    picture(split, row).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows_of(split: str) -> list[tuple[int, int]]:
    return list(enumerate(TRAIN if split == "train" else TEST))


def class_folders(root: Path, test: str = "val") -> dict:
    for split, folder in (("train", "train"), ("test", test)):
        for row, label in reversed(rows_of(split)):
            write(root / folder / CLASSES[label] / f"{row}.png", png(split, row))
    return {"dataset": root}


def lists(root: Path) -> dict:
    class_folders(root)
    for split, folder in (("train", "train"), ("test", "val")):
        lines = [f"{folder}/{CLASSES[c]}/{row}.png {c}" for row, c in rows_of(split)]
        write(root / f"{split}.txt", "\n".join(lines) + "\n")
    return {
        "dataset": root,
        "train_list": root / "train.txt",
        "test_list": str(root / "test.txt"),
    }


def annotations(split: str, categories: bool = True) -> dict:
    folder = "train" if split == "train" else "val"
    content = {
        "images": [
            {"id": 100 + row, "file_name": f"{folder}/{CLASSES[c]}/{row}.png"}
            for row, c in rows_of(split)
        ],
        "annotations": [
            {"id": row, "image_id": 100 + row, "category_id": 7 * c + 3}
            for row, c in reversed(rows_of(split))
        ],
    }
    if categories:
        content["categories"] = [{"id": 7 * c + 3, "name": CLASSES[c]} for c in (2, 0, 1)]
    return content


def inaturalist(root: Path, categories: bool = True) -> dict:
    class_folders(root)
    for split, name in (("train", "train2018.json"), ("test", "val2018.json")):
        write(root / name, json.dumps(annotations(split, categories)))
    return {"dataset": root}


def inaturalist_named(root: Path) -> dict:
    inaturalist(root / "images")
    for name in ("train2018.json", "val2018.json"):
        (root / "images" / name).rename(root / name)
    return {
        "dataset": root / "images",
        "train_list": root / "train2018.json",
        "test_list": root / "val2018.json",
    }


def tiny_imagenet(root: Path) -> dict:
    ids = ("n01", "n02", "n03")
    for row, label in rows_of("train"):
        write(root / "train" / ids[label] / "images" / f"{row}.JPEG", png("train", row))
        write(root / "train" / ids[label] / f"{ids[label]}_boxes.txt", "0\t1\t2\n")
    for row, _ in rows_of("test"):
        write(root / "val" / "images" / f"val_{row}.JPEG", png("test", row))
    lines = [f"val_{row}.JPEG\t{ids[label]}\t0\t0\t9\t9" for row, label in rows_of("test")]
    write(root / "val" / "val_annotations.txt", "\n".join(lines))
    write(root / "wnids.txt", "n02\nn03\nn01\n")
    write(root / "words.txt", "n01\tant, pismire\nn02\tbee\nn03\tcat, true cat\nn99\tdog\n")
    return {"dataset": root}


def table(split: str, image: str = "img", label: str = "label", feature=None) -> datasets.Dataset:
    rows = rows_of(split)
    feature = feature or datasets.ClassLabel(names=list(CLASSES))
    return datasets.Dataset.from_dict(
        {
            image: [{"bytes": png(split, row), "path": None} for row, _ in rows],
            label: [CLASSES[c] if feature.dtype == "string" else c for _, c in rows],
        },
        features=datasets.Features({image: datasets.Image(), label: feature}),
    )


def hub_layout(root: Path, test: str = "test", **columns) -> dict:
    (root / "plain_text").mkdir(parents=True)
    for split, name in (("train", "train"), ("test", test)):
        file = root / "plain_text" / f"{name}-00000-of-00001.parquet"
        table(split, **columns).to_parquet(file)
    return {"dataset": root, "cache_dir": root / ".cache"}


def saved_to_disk(root: Path, test: str = "valid", labels=None, **columns) -> dict:
    train = table("train", **columns)
    if labels is not None:
        feature = train.features["label"]
        train = train.remove_columns("label").add_column("label", labels, feature=feature)
    datasets.DatasetDict({"train": train, test: table("test", **columns)}).save_to_disk(str(root))
    return {"dataset": root}


def then(build, **more):
    """The set of ``build`` with other arguments to load it by."""
    return lambda root: build(root) | more


def linked(target: str, link: str, source=lists):
    """Put a link to something outside of the root where a file or folder was."""

    def build(root):
        given = source(root / "root")
        write(root / "secret" / "0.png", png("train", 0))
        path = root / "root" / link
        path.rename(root / "moved")
        path.symlink_to(root / target)
        return given

    return build


def check_is_refused(build, message: str, root: Path) -> None:
    """``load_images`` refuses the set of ``build`` with a message that matches."""
    from ldam_plugins.data import load_images

    given = build(root)
    with pytest.raises(ValueError, match=message):
        load_images(**given)
