"""Tiny ImageNet as it is published."""

from __future__ import annotations

import pytest
from image_sets import check_is_refused, tiny_imagenet, write


def edit_tiny(name: str, text: str):
    def build(root):
        tiny_imagenet(root)
        write(root / name, text)
        return {"dataset": root}

    return build


BAD = {
    "tiny unknown id": (edit_tiny("wnids.txt", "n01\nn02\nn04"), "differ: 'n03', 'n04'"),
    "tiny id twice": (edit_tiny("wnids.txt", "n01\nn02\nn03\nn03"), "differ: an id is repeated"),
    "tiny val line": (edit_tiny("val/val_annotations.txt", "val_0.JPEG"), "line 1: must begin"),
    "tiny val id": (edit_tiny("val/val_annotations.txt", "val_0.JPEG\tn99"), "line 1: must begin"),
    "tiny val file": (edit_tiny("val/val_annotations.txt", "../a n01"), "line 1: there is no file"),
    "tiny val out": (edit_tiny("val/val_annotations.txt", "../../../a n01"), "leads out of"),
    "tiny words": (edit_tiny("words.txt", "n01 ant"), "words.txt, line 1: must be an id, a tab"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told(case, tmp_path):
    check_is_refused(*BAD[case], tmp_path / "set")
