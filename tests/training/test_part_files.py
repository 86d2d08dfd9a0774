"""Tables that are written in parts: what is there stays, what differs is named."""

import pandas as pd
import pytest

from ldam_plugins.training.part_files import PartFiles, file_stamps

PARTS = [["a", "b"], ["c"], ["d, e"]]


def begun(path, made=None, **given):
    table = PartFiles(path, ["name", "share", "flag"], {"share": "double", "flag": "bool"})
    return table, table.begin(made or {"top": 1}, PARTS, **given)


def rows(part):
    return [(name, "" if name == "c" else 0.5, "yes" if name == "a" else "no") for name in part]


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_parts_in_any_order_make_the_table(suffix, tmp_path):
    path = tmp_path / "new" / f"t{suffix}"
    table, sizes = begun(path)
    assert sizes == [2, 1, 1]
    for index in (2, 0, 1):
        table.write(index, rows(PARTS[index]))
        assert not path.exists()
    table.finish(3)
    found = pd.read_csv(path) if suffix == ".csv" else pd.read_parquet(path)
    assert found["name"].tolist() == ["a", "b", "c", "d, e"]
    assert found["share"].isna().tolist() == [False, False, True, False]
    flags = found["flag"].eq("yes") if suffix == ".csv" else found["flag"]
    assert flags.tolist() == [True, False, False, False]
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_what_was_begun_goes_on_or_is_refused(tmp_path):
    path = tmp_path / "t.csv"
    table, _ = begun(path)
    table.write(1, rows(PARTS[1]))
    again, _ = begun(path)
    assert [again.is_done(index) for index in range(3)] == [False, True, False]
    with pytest.raises(ValueError, match="was begun with another top"):
        begun(path, {"top": 2})
    table.write(1, rows(["other"]))
    with pytest.raises(ValueError, match="is of other rows, in part 1"):
        begun(path)
    again, _ = begun(path, anew=True)
    assert not again.is_done(1)


def test_another_kind_of_file_is_refused_before_anything_is_there(tmp_path):
    with pytest.raises(ValueError, match=r"ends in \.csv or \.parquet"):
        PartFiles(tmp_path / "t.txt", ["name"])


def test_files_are_known_by_size_and_time(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"1")
    (tmp_path / "b.txt").write_bytes(b"2")
    before = file_stamps(tmp_path, suffixes=[".bin"])
    assert [stamp[:2] for stamp in before] == [["a.bin", 1]]
    (tmp_path / "b.txt").write_bytes(b"22")
    assert file_stamps(tmp_path, suffixes=[".bin"]) == before
    (tmp_path / "a.bin").write_bytes(b"11")
    assert file_stamps(tmp_path / "a.bin", tmp_path / "none") != before
