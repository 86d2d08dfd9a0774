"""Tables in parts, against the same tables as a whole."""

import json

import numpy as np
import pandas as pd
import pytest

from ldam_plugins.data.readers.base import TextRequest
from ldam_plugins.data.readers.table_parts import UNREADABLE, table_parts
from ldam_plugins.data.readers.tables import read_table

ROWS = [("a", "one, two"), ("b", 'a "word"'), ("", ""), ("c", "lines\nand more"), ("d", "é")]
PLAIN = "\n".join(["id,text", '1,"x, y"', "2,z", "", "3, w", "4,v"]) + "\n"
FILES = {
    "plain.csv": PLAIN.encode(),
    "windows.csv": PLAIN.replace("\n", "\r\n").encode("utf-8-sig"),
    "macintosh.csv": PLAIN.replace("\n", "\r").encode(),
    "excel.csv": PLAIN.replace("x, y", "x; y").replace(",", ";").encode(),
    "told.csv": b"sep=|\nid|text\n1|a,b\n2|c,d\n",
    "tabs.tsv": b"id\ttext\n1\ta\n\n2\tb\n",
    "short.csv": b"id,text,more\n1,a\n2,b,c\n",
    "twice.csv": b"text,text,\na,b,0\nc,d,1\n",
    "no_header.csv": b"1.png,a\n2.png,b\n3.png,c\n",
    "no_header_texts.csv": b"spam,the words of the first row\nham,b\nspam,c\n",
    "lines.jsonl": b'{"id": 1, "text": "a"}\n{"id": 2, "text": null}\n{"text": "c"}\n',
    "list.json": json.dumps([{"id": row, "text": f"t{row}"} for row in range(5)]).encode(),
}


def parts_of(file, rows=2, **given):
    return [*table_parts(file, TextRequest(str(file), **given), rows)]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("rows", [1, 2, 100])
def test_parts_are_the_rows_of_the_whole(name, rows, tmp_path):
    file = tmp_path / name
    file.write_bytes(FILES[name])
    whole, parts = read_table(file, TextRequest(str(file))), parts_of(file, rows)
    assert max(map(len, parts)) <= rows
    numbers = np.concatenate([part.numbers for part in parts])
    assert numbers.tolist() == whole.numbers.tolist()
    for column, values in whole.columns.items():
        found = [value for part in parts for value in part.columns[column]]
        assert [v or None for v in found] == [None if v != v else v or None for v in values]


def test_parquet_in_parts(tmp_path):
    file = tmp_path / "t.parquet"
    pd.DataFrame(ROWS, columns=["id", "text"]).to_parquet(file, row_group_size=3)
    parts = parts_of(file)
    assert [row for part in parts for row in zip(*part.columns.values(), strict=True)] == [
        row for row in ROWS if any(row)
    ]
    file.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=r"t\.parquet cannot be read"):
        parts_of(file)


def test_damaged_rows_stand_in_their_place(tmp_path):
    file = tmp_path / "t.jsonl"
    file.write_text('{"text": "a"}\n{"text": \n[1]\n{"text": "d"}\n')
    (part,) = parts_of(file, 10)
    assert part.columns["text"] == ["a", UNREADABLE, UNREADABLE, "d"]
    assert part.numbers.tolist() == [1, 2, 3, 4]
    file = tmp_path / "t.csv"
    file.write_text("id,text\n1,a\n2,b,c\n3,d,\n4,e\n")
    (part,) = parts_of(file, 10)
    assert part.columns["text"] == ["a", UNREADABLE, "d", "e"]
    file.write_text("id,text\n1,a\n2,b,c\n3,d,e\n4,e,f\n")
    with pytest.raises(ValueError, match=r"row 3 has 3 fields, the first 2.*the delimiter is ','"):
        parts_of(file, 10, delimiter=",")


@pytest.mark.parametrize(
    ("content", "given", "message"),
    [
        (b"", {}, "is empty"),
        (b"\n \n", {}, "is empty"),
        ("text\ncafé\n".encode("cp1252"), {}, "--encoding cp1252"),
        ("text\na\n".encode("utf-16-le"), {}, "--encoding utf-16-le"),
        (b"text\na\n", {"encoding": "utf-99"}, "`encoding` must be an encoding"),
    ],
)
def test_what_is_no_text_is_named(content, given, message, tmp_path):
    file = tmp_path / "t.csv"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        parts_of(file, **given)
    if content:
        file.write_text("text\n" + "a\n" * 50_000 + "b\n")
        with file.open("ab") as opened:
            opened.write("é\n".encode("cp1252"))
        with pytest.raises(ValueError, match=r"line 50003|`encoding`"):
            parts_of(file, **given)


def test_a_text_may_be_long(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text(f'id,text\n1,"{"a" * 300_000}"\n')
    assert len(parts_of(file)[0].columns["text"][0]) == 300_000
