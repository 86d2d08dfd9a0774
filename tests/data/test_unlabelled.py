"""Examples without labels, in parts."""

import pytest
from datasets import Dataset, Features, Image, Value
from hf_samples import text_hub
from image_sets import png, write

from ldam_plugins.data.unlabelled import UNREAD, unlabelled_images, unlabelled_texts


def texts_of(path, **given):
    parts = [*unlabelled_texts(str(path), rows=2, **given)]
    assert all(len(part.names) <= 2 for part in parts)
    pairs = (zip(part.names, part.texts(), strict=True) for part in parts)
    return [pair for part in pairs for pair in part]


def test_texts_of_a_table_are_called_by_their_id(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("id,message\nx,a b\ny,\nz,c d,e\nw,e f\n")
    assert texts_of(file) == [("x", "a b"), ("y", ""), ("row 4", None), ("w", "e f")]
    file.write_text("id,message\nx,a b\nx,c d\n")
    assert texts_of(file) == [("row 2", "a b"), ("row 3", "c d")]


def test_texts_of_lines_and_of_files(tmp_path):
    file = tmp_path / "t.txt"
    file.write_bytes(b"\xef\xbb\xbfa\r\n\r\nb")
    assert texts_of(file) == [("line 1", "a"), ("line 2", ""), ("line 3", "b")]
    (tmp_path / "folder" / "in").mkdir(parents=True)
    for name, content in {"b.txt": b"b", "a.txt": b"a", "in/c.txt": b"\xff"}.items():
        (tmp_path / "folder" / name).write_bytes(content)
    assert texts_of(tmp_path / "folder") == [("a.txt", "a"), ("b.txt", "b"), ("in/c.txt", None)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"`dataset` must be a folder with \.txt files"):
        texts_of(tmp_path / "empty")


def test_images_in_parts(tmp_path):
    for row in range(5):
        write(tmp_path / f"{row}.png", png("train", row))
    (tmp_path / "3.png").write_bytes(b"no image")
    parts = [*unlabelled_images(str(tmp_path), rows=2)]
    assert [part.names for part in parts] == [["0.png", "1.png"], ["2.png", "3.png"], ["4.png"]]
    assert [parts[1][row][1] == UNREAD for row in range(2)] == [False, True]


def test_a_split_of_a_folder_of_parquet(tmp_path):
    """Texts and images that lie in tables, whose labels are not looked at; beside files, files."""
    hub = text_hub(tmp_path / "hub")
    with pytest.raises(ValueError, match=r"`split` must be one of 'train', 'test', got None"):
        texts_of(hub)
    found = texts_of(hub, split="test")
    assert [name for name, _ in found] == [f"row {row} of split test" for row in range(18)]
    assert found[0][1].startswith("iron")
    (hub / "a.txt").write_text("a")
    assert texts_of(hub) == [("a.txt", "a")]
    files = [{"bytes": png("test", row), "path": None} for row in range(3)]
    table = Dataset.from_dict({"img": [*files, {"bytes": b"", "path": None}]})
    path = tmp_path / "images.parquet"
    table.cast(Features({"img": Image()})).to_parquet(path)
    parts = [*unlabelled_images(str(path), rows=3)]
    assert [len(part) for part in parts] == [3, 1]
    assert parts[1].names == ["row 3 of split train"]
    assert parts[0][2][0].tobytes() == parts[0].source.read(2).tobytes()
    assert parts[1][0][1] == UNREAD
    with pytest.raises(ValueError, match=r"`split` must be one of 'train', got 'trian'"):
        next(unlabelled_images(str(path), split="trian"))
    plain = Dataset.from_dict({"name": ["a.png"]}, features=Features({"name": Value("string")}))
    plain.to_parquet(tmp_path / "names.parquet")
    with pytest.raises(ValueError, match=r"`split` must be left out for .*names\.parquet"):
        next(unlabelled_images(str(tmp_path / "names.parquet"), split="train"))


def test_an_embedded_set_is_known_by_its_name():
    first = next(unlabelled_images("digits", split="test", rows=7))
    assert len(first) == 7
    assert first.names[0] == "row 0 of split test of digits"
    (name, text), *_ = zip(
        *(part := next(unlabelled_texts("stdlib_docstrings", split="test", rows=2)))[:2],
        strict=True,
    )
    assert name == "row 0 of split test"
    assert text
    assert len(part.names) == 2
