"""Tables as people have them: beside images, or with texts in them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from image_sets import CLASSES, TRAIN, png, write

from ldam_plugins.data import load_images, load_texts
from ldam_plugins.data.notes import DataNotes
from ldam_plugins.data.splits import save_split

HALF = {"test_split": 0.3}


def told(load, *given, **options):
    notes = DataNotes()
    return *load(*given, **options, notes=notes), notes


def names_of(train, test):
    """File name and class of every example of both parts."""
    found = []
    for part in (train, test):
        labels = [part.class_names[label] for label in part.labels]
        found += [(Path(part.describe(row)).name, name) for row, name in enumerate(labels)]
        assert part.find_corrupt() == []
    return sorted(found)


def pictures(root, names, folder="images"):
    for row, name in enumerate(names):
        write(root / folder / name, png("train", row % len(TRAIN)))
    return root


SIX = [f"{row}.png" for row in range(6)]
WORDS = [CLASSES[label] for label in TRAIN]
EXPECTED = sorted(zip(SIX, WORDS, strict=True))


def lines(*rows, header="file,label"):
    return "\n".join([header, *rows]) + "\n"


def rows_of(files=SIX, labels=WORDS, sep=","):
    return [f"{file}{sep}{label}" for file, label in zip(files, labels, strict=True)]


TABLES = {
    "labels.csv": lines(*rows_of()),
    "labels.tsv": lines(*rows_of(sep="\t"), header="name\tkind"),
    "macintosh.csv": lines(*rows_of()).replace("\n", "\r"),
    "excel.csv": "sep=;\r\n" + "\r\n".join(["Datei;Klasse", *rows_of(sep=";"), ";", ""]),
    "bom.csv": b"\xef\xbb\xbf" + lines(*rows_of(), header="label_of,label").encode(),
    "index.csv": lines(*(f"{n},{r}" for n, r in enumerate(rows_of())), header=",file,label"),
    "no_header.csv": "\n".join(rows_of()),
    "ids.csv": lines(*rows_of([n[:-4] for n in SIX]), header="id,breed"),
    "paths.csv": lines(*rows_of([f"C:\\photos\\{n}" for n in SIX])),
    "web.csv": lines(*rows_of([f"https://x.org/a/{n}?w=2&id={n}" for n in SIX])),
    "quoted.csv": lines(*rows_of([f'"images/{n}"' for n in SIX])),
    "capitals.csv": lines(*rows_of([n.upper() for n in SIX])),
    "two_labels.csv": lines(
        *(f"{r},{c}" for r, c in zip(rows_of(), TRAIN, strict=True)), header="file,class_name,label"
    ),
    "_classes.csv": lines(
        *(
            f"{n}, {int(c == 0)}, {int(c == 1)}, {int(c == 2)}"
            for n, c in zip(SIX, TRAIN, strict=True)
        ),
        header="filename, ant, bee, cat",
    ),
    "rows.jsonl": "\n".join(
        json.dumps({"image": n, "label": w}) for n, w in zip(SIX, WORDS, strict=True)
    ),
    "studio.json": json.dumps(
        [
            {"image": f"/data/upload/1/{n}", "id": i, "choice": w, "annotator": 1}
            for i, (n, w) in enumerate(zip(SIX, WORDS, strict=True))
        ]
    ),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("as_file", [False, True])
def test_tables_beside_images(name, as_file, tmp_path):
    pictures(tmp_path, SIX)
    file = write(tmp_path / name, TABLES[name])
    train, test, notes = told(load_images, file if as_file else tmp_path, **HALF)
    assert names_of(train, test) == EXPECTED
    assert (len(train), len(test)) == (4, 2)
    assert sum(said.startswith(("Columns read", "Labels are the")) for said in notes.said) >= 1


def test_parquet_beside_images(tmp_path):
    pictures(tmp_path, SIX)
    pd.DataFrame({"file": SIX, "label": TRAIN}).to_parquet(tmp_path / "labels.parquet")
    train, test = load_images(tmp_path, **HALF)
    assert names_of(train, test) == sorted(zip(SIX, map(str, TRAIN), strict=True))


def test_numbers_of_files_beside_numbers_of_classes(tmp_path):
    names = [str(n) for n in range(60)]
    pictures(tmp_path, [f"{name}.png" for name in names])
    write(tmp_path / "t.csv", lines(*rows_of(names, [str(n % 25) for n in range(60)])))
    train, _, notes = told(load_images, tmp_path, **HALF)
    assert len(train.class_names) == 25
    assert notes.columns == {"image_column": "file", "label_column": "label"}


def test_tables_of_a_competition(tmp_path):
    """train.csv with ids, test.csv without labels, images of both in folders of their own."""
    pictures(tmp_path, SIX, "train_images")
    pictures(tmp_path, SIX, "test_images")
    write(tmp_path / "train.csv", lines(*rows_of([n[:-4] for n in SIX]), header="id,label"))
    write(tmp_path / "test.csv", "id\n" + "\n".join(n[:-4] for n in SIX))
    write(tmp_path / "sample_submission.csv", lines(*rows_of([n[:-4] for n in SIX])))
    train, test = load_images(tmp_path, **HALF)
    assert names_of(train, test) == EXPECTED
    assert "train_images" in train.describe(0)
    with pytest.raises(ValueError, match=r"test\.csv, which is to be tested on.*--test_split 0.2"):
        load_images(tmp_path)


def test_a_table_in_the_folder_of_each_split(tmp_path):
    for split in ("train", "valid"):
        pictures(tmp_path, SIX, split)
        write(tmp_path / split / "_classes.csv", lines(*rows_of()))
    train, test = load_images(tmp_path)
    assert len(train) == len(test) == 6
    assert "/train/" in train.describe(0)
    assert "/valid/" in test.describe(0)


def test_a_column_of_splits(tmp_path):
    pictures(tmp_path, SIX)
    splits = ["train"] * 4 + ["val", "Test"]
    rows = (f"{row},{split}" for row, split in zip(rows_of(labels="aabbab"), splits, strict=True))
    write(tmp_path / "data.csv", lines(*rows, header="file,label,split"))
    train, test, notes = told(load_images, tmp_path)
    assert (len(train), test.describe(0)[-5:]) == (4, "5.png")
    assert notes.parts == {"train_split": "train", "test_split": "Test"}
    assert len(load_images(tmp_path, test_split=0.25, seed=1)[1]) == 2  # of all rows


def test_groups_stay_together(tmp_path):
    pictures(tmp_path, SIX)
    groups = ["p", "p", "q", "q", "r", "r"]
    rows = [f"{row},{g}" for row, g in zip(rows_of(labels="aaaabb"), groups, strict=True)]
    write(tmp_path / "data.csv", lines(*rows, header="file,label,patient"))
    train, test, notes = told(load_images, tmp_path, **HALF, group_column="patient")
    assert set(train.groups) | set(test.groups) == {"p", "q", "r"}
    assert not set(train.groups) & set(test.groups)
    assert "Classes of which the only group is trained on, 1: 'b'." in notes.said
    assert notes.divided["test"].groups.tolist() == test.groups.tolist()
    frame = pd.read_csv(tmp_path / "data.csv").rename(columns={"file": "text"})
    frame.to_csv(tmp_path / "train.csv", index=False)
    frame[:3].assign(text="new", patient=["q", "q", "z"]).to_csv(tmp_path / "test.csv", index=False)
    (tmp_path / "data.csv").unlink()
    train, test, notes = told(load_texts, tmp_path, group_column="patient")
    assert (train["group"][:], test["group"][:]) == (groups, ["q", "q", "z"])
    message = "Groups both in training and in split test, of which they are 2 examples, 1: 'q'."
    assert message in notes.said
    train, test = load_texts(tmp_path, group_column="patient", test_split=0.3)
    assert not set(train["group"][:]) & set(test["group"][:])
    with pytest.raises(ValueError, match=r"`group_column` must be a column of train.csv, got 'x'"):
        load_texts(tmp_path, group_column="x")


def test_a_split_of_a_run_is_used_again(tmp_path):
    file = text_csv(tmp_path, texts=["the same text"] * 4 + TEXTS[4:])
    train, test, notes = told(load_texts, file, test_split=0.5, seed=3)
    save_split(tmp_path / "split.csv", notes.divided)
    again = load_texts(file, split_file=tmp_path / "split.csv")
    for part, other in zip((train, test), again, strict=True):
        assert part["text"][:] == other["text"][:]
        assert part["label"][:] == other["label"][:]
    with pytest.raises(ValueError, match="`test_split` must be left out beside `split_file`"):
        load_texts(file, split_file=tmp_path / "split.csv", test_split=0.5)
    pictures(tmp_path / "set", SIX)
    write(tmp_path / "set" / "t.csv", lines(*rows_of()))
    train, test, notes = told(load_images, tmp_path / "set", test_split=0.5, seed=3)
    save_split(tmp_path / "images.csv", notes.divided)
    other = load_images(tmp_path / "set", split_file=str(tmp_path / "images.csv"))[1]
    assert other.examples().names == test.examples().names


def test_names_as_the_web_leaves_them(tmp_path):
    disk = ["a%20b.jpg", "c.jpg?id=1&w=2", "c.jpg?id=2&w=2", "d.jpg.1", "e.tar.jpg", "\u732b 1.jpg"]
    table = ["a b.jpg", "c.jpg?id=1&w=2", "c.jpg?id=2&w=2", "d.jpg", "e.tar", "%E7%8C%AB%201.jpg"]
    pictures(tmp_path, disk)
    write(tmp_path / "t.csv", lines(*rows_of(table)))
    assert names_of(*load_images(tmp_path, **HALF)) == sorted(zip(disk, WORDS, strict=True))


def test_a_missing_file_is_never_that_of_another_folder(tmp_path):
    pictures(tmp_path, SIX[1:], "train")
    pictures(tmp_path, SIX, "test")
    write(tmp_path / "t.csv", lines(*rows_of([f"train/{name}" for name in SIX])))
    with pytest.raises(
        ValueError, match=r"1 of the 6 files .*'train/0.png' in row 2.*--skip_empty"
    ):
        load_images(tmp_path, **HALF)
    train, test, notes = told(load_images, tmp_path, **HALF, skip_empty=True)
    assert len(train) + len(test) == 5
    assert notes.left_out == {"rows of t.csv without file": 1}
    write(tmp_path / "t.csv", lines(*rows_of()))
    (tmp_path / "train").rename(tmp_path / "a")
    (tmp_path / "test").rename(tmp_path / "b")
    with pytest.raises(ValueError, match=r"row 3: '1.png' may be each of 'a/1.png', 'b/1.png'"):
        load_images(tmp_path, **HALF)


def test_a_table_cannot_name_files_elsewhere(tmp_path):
    write(tmp_path / "secret.png", png("train", 0))
    pictures(tmp_path / "set", SIX)
    for name in ("../secret.png", str(tmp_path / "secret.png")):
        write(tmp_path / "set" / "t.csv", lines(*rows_of([name, *SIX[1:]])))
        with pytest.raises(ValueError, match=r"1 of the 6 files"):
            load_images(tmp_path / "set", **HALF)
    (tmp_path / "set" / "images" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match=r"link\.png leads out of"):
        load_images(tmp_path / "set", **HALF)


def test_files_that_are_given_again(tmp_path):
    pictures(tmp_path, SIX)
    write(tmp_path / "t.csv", lines(*rows_of(), "0.png,ant"))
    train, test, notes = told(load_images, tmp_path, **HALF)
    assert (len(train) + len(test), notes.left_out) == (
        6,
        {"rows of t.csv that name a file again": 1},
    )
    write(tmp_path / "t.csv", lines(*rows_of(), "0.png,bee"))
    with pytest.raises(
        ValueError, match=r"'images/0.png' has in .*row 2 the label 'ant' and in .*row 8"
    ):
        load_images(tmp_path, **HALF)


def test_a_table_of_folders_is_preferred_to_their_names(tmp_path):
    for part in ("part_1", "part_2"):
        pictures(tmp_path, [f"{part}_{name}" for name in SIX[:3]], part)
    files = [f"part_1_{n[:-4]}" for n in SIX[:3]] + [f"part_2_{n[:-4]}" for n in SIX[:3]]
    write(tmp_path / "metadata.csv", lines(*rows_of(files), header="image_id,dx"))
    train, _, notes = told(load_images, tmp_path, **HALF)
    assert train.class_names == CLASSES
    assert "Labels are read from metadata.csv, not from the names of folders." in notes.said
    write(tmp_path / "metadata.csv", "a,b\n1,2\n")
    assert load_images(tmp_path, **HALF)[0].class_names == ("part_1", "part_2")


LABELS = {
    "one to five": (["1", "2", "5", "4", "3", "10"] * 2, ("1", "2", "3", "4", "5", "10")),
    "sparse": (["7", "-1", "7", "40", "0", "40"], ("-1", "0", "7", "40")),
    "whole": (["1.0", "2.0", "1.0", "2", "1", "2"], ("1", "2")),
    "zip codes": (["007", "01", "01", "007", "01", "12"], ("007", "01", "12")),
    "truths": (["True", "False"] * 3, ("False", "True")),
    "missing?": (["NA", "None", "nan"] * 2, ("NA", "None", "nan")),
    "blanks": (["x ", "x", "y", "y", "x ", "y "], ("x", "y")),
    "blanks alone": (["x ", "y"] * 3, ("x", "y")),
    "capitals": (["Cat", "cat"] * 3, ("Cat", "cat")),
    "scripts": (["\u732b \u72ac", "\u041a\u043e\u0442", "\u0642\u0637"] * 2, None),
    "normal forms": (["caf\xe9", "cafe\u0301", "tea"] * 2, ("caf\xe9", "tea")),
}


@pytest.mark.parametrize("case", LABELS)
def test_labels(case, tmp_path):
    labels, names = LABELS[case]
    rows = [f"text number {n}\t{label}" for n, label in enumerate(labels)]
    write(tmp_path / "t.tsv", lines(*rows, header="text\tlabel"))
    train, test, notes = told(load_texts, tmp_path / "t.tsv", test_split=0.5)
    names = names or sorted(set(labels))
    assert train.features["label"].names == list(names)
    of_text = {}
    for part in (train, test):
        for row in part:
            of_text[row["text"]] = names[row["label"]]
    if case in ("one to five", "sparse", "zip codes", "truths", "capitals", "scripts"):
        assert of_text == {f"text number {n}": label for n, label in enumerate(labels)}
    hints = {
        "missing?": "not as missing labels: 'NA', 'None', 'nan'.",
        "blanks": "'x' (1), 'x ' (2)",
        "capitals": "'Cat' and 'cat'",
    }
    assert hints.get(case, "") in " ".join(notes.said)


def test_numbers_and_truths_of_json(tmp_path):
    for labels, names in (([3, 1.0, 3, 1], ["1", "3"]), ([True, False] * 2, ["False", "True"])):
        rows = (json.dumps({"text": f"t {n}", "label": v}) for n, v in enumerate(labels))
        write(tmp_path / "t.jsonl", "\n".join(rows))
        train, _ = load_texts(tmp_path / "t.jsonl", test_split=0.5)
        assert train.features["label"].names == names


TEXTS = [f"text, number {n}" for n in range(8)]
KINDS = ["spam", "ham"] * 4


def text_csv(root, texts=TEXTS, kinds=KINDS, header=("v1", "v2"), **options):
    options = {"index": False, **options}
    frame = pd.DataFrame(dict(zip(header, (kinds, texts), strict=True)))
    write(root / "spam.csv", frame.to_csv(**options))
    return root / "spam.csv"


def test_columns_that_are_certain(tmp_path):
    train, test, notes = told(load_texts, text_csv(tmp_path), test_split=0.25)
    assert sorted(train["text"][:] + test["text"][:]) == TEXTS
    assert train.features["label"].names == ["ham", "spam"]
    assert notes.columns == {"label_column": "v1", "text_column": "v2"}
    shown = "Columns read from spam.csv: 'v1' as --label_column, 'v2' as --text_column."
    assert shown in notes.said
    given = told(load_texts, text_csv(tmp_path), test_split=0.25, text_column="v2")[2]
    assert "Columns read from spam.csv: 'v1' as --label_column." in given.said
    for options in ({"sep": ";"}, {"sep": "|"}, {"sep": "\t"}, {"index": True}):
        assert (
            load_texts(text_csv(tmp_path, **options), test_split=0.25)[0]["text"][:]
            == train["text"][:]
        )


def test_two_tables(tmp_path):
    kinds = [*KINDS[:6], "eggs", "eggs"]
    text_csv(tmp_path, kinds=kinds).rename(tmp_path / "train.csv")
    text_csv(tmp_path, texts=TEXTS[:3], kinds=["ham", "ham", "new"]).rename(tmp_path / "test.csv")
    for given, options in (
        (tmp_path, {}),
        (tmp_path / "train.csv", {"test_split": "test.csv"}),
        (tmp_path / "train.csv", {"test_split": str(tmp_path / "test.csv")}),
    ):
        train, test, notes = told(load_texts, given, **options)
        assert (len(train), test["text"][:], test["label"][:]) == (8, TEXTS[:2], [1, 1])
        assert train.features["label"].names == ["eggs", "ham", "spam"]
        assert sum(notes.left_out.values()) == 1
        assert any("no example of 2 classes: 'eggs', 'spam'" in said for said in notes.said)


def test_rows_that_lack_something(tmp_path):
    texts = ["a text", "", "  ", "a text", "more text", "text"] * 2
    kinds = ["x", "x", "y", "", "y", "y"] * 2
    file = text_csv(tmp_path, texts, kinds)
    message = r"4 have no text, the first is row 3; 2 have no label, the first is row 5"
    with pytest.raises(ValueError, match=rf"Of 12 rows of .*spam.csv {message}.*--skip_empty"):
        load_texts(file, test_split=0.3, label_column="v1")
    train, test, notes = told(load_texts, file, test_split=0.3, skip_empty=True, label_column="v1")
    assert len(train) + len(test) == 6
    assert notes.record()["data"]["left_out"] == {
        "rows of spam.csv without text": 4,
        "rows of spam.csv without label": 2,
    }


def test_encodings_are_named(tmp_path):
    content = text_csv(tmp_path, texts=[f"caf\xe9 \u2019 {n}" for n in range(8)]).read_text("utf-8")
    file = tmp_path / "spam.csv"
    write(tmp_path / "unicode.txt", content.replace(",", "\t").encode("utf-16"))
    train, _ = load_texts(tmp_path / "unicode.txt", test_split=0.25, encoding="utf-16")
    assert train.features["label"].names == ["ham", "spam"]
    for encoding in ("cp1252", "utf-16"):
        write(file, content.encode(encoding))
        with pytest.raises(ValueError, match=rf"spam.csv, line .*--encoding {encoding}"):
            load_texts(file, test_split=0.25)
        assert load_texts(file, test_split=0.25, encoding=encoding)[0]["text"][0].startswith(
            "caf\xe9"
        )
    write(file, content.encode("utf-8-sig"))
    assert load_texts(file, test_split=0.25)[0].features["label"].names == ["ham", "spam"]
    with pytest.raises(
        ValueError, match="`encoding` must be an encoding that Python knows, got 'x'"
    ):
        load_texts(file, test_split=0.25, encoding="x")


def columns(**more):
    def build(root):
        frame = pd.DataFrame({"text": TEXTS, "label": KINDS} | more)
        write(
            root / "t.csv",
            frame.drop(columns=[n for n in more if more[n] is None]).to_csv(index=False),
        )
        return {"dataset": root / "t.csv"}

    return build


def text(content, name="t.csv"):
    return lambda root: {"dataset": write(root / name, content)}


BAD_TEXTS = {
    "no test": (
        columns(),
        {"test_split": None},
        r"`test_split` must be given.*one table.*--test_split 0\.2",
    ),
    "no column": (
        columns(),
        {"text_column": "x"},
        r"`text_column` must be one of 'text', 'label', got 'x'",
    ),
    "two texts": (
        columns(text=None, title=TEXTS, body=[t.upper() for t in TEXTS]),
        {},
        r"each of 'title', 'body' could be the `text_column`; give --text_column.*'title' \('",
    ),
    "two labels": (
        columns(label=None, mood=KINDS, kind=KINDS[::-1]),
        {},
        r"each of 'mood', 'kind' could be the `label_column`; give .*'mood' \('spam'\)",
    ),
    "fractions": (
        columns(label=[n / 4 for n in range(8)]),
        {},
        r"`label_column` must be a column of one .*'label \(0\.25\)'. Cut the numbers",
    ),
    "lists": (text('{"text": "a", "label": [1, 2]}', "t.jsonl"), {}, "Several labels an example"),
    "empty": (text(" \n"), {}, "t.csv is empty"),
    "header only": (text("text,label\n"), {}, "t.csv has no row"),
    "one column": (
        text("text\na\nb\n"),
        {},
        r"no column for certain.*The only column of t.csv is 'text' \('a'\). Another delimiter",
    ),
    "ragged": (
        text("text,label\na,b\nc,d,e\n"),
        {},
        r"t.csv cannot be read: Expected 2 fields in line 3, saw 3. A text .*--delimiter",
    ),
    "two delimiters": (
        text("a;b\t1|c\nd;e\t2|f\n"),
        {},
        r"`delimiter` must be known of t.csv.*got \"each of ';', '\\\\t', '\|'\"",
    ),
    "open quote": (
        text('text,label\n"a,b\nc,d\n'),
        {},
        "t.csv cannot be read: .*EOF inside string",
    ),
    "json": (text('{"text": "a"\n', "t.jsonl"), {}, r"t.jsonl, line 1: no JSON"),
    "json words": (text('"a"\n', "t.jsonl"), {}, r"t.jsonl must hold a row of named values"),
    "excel": (
        text("PK", "t.xlsx"),
        {},
        r"`dataset` must be a CSV file, not a spreadsheet.*Save it as",
    ),
    "archive": (text("PK", "t.zip"), {}, "not an archive, .*Unpack it, and give the folder"),
    "packed": (text("PK", "t.csv.gz"), {}, "not an archive, .*Unpack it, and give t.csv"),
    "pickle": (text("x", "t.pkl"), {}, r"a folder, or a table \(\.csv .*got .*t.pkl.*Write it as"),
    "json parts": (text('{"a": [["x", 1]], "b": []}', "t.json"), {}, "list of rows.*'a', 'b'"),
    "no share": (columns(), {"test_split": "20%"}, r"a share in \(0, 1\): .*one table.*got '20%'"),
    "gone": (lambda r: {"dataset": r / "t.csv"}, {}, r"`dataset` must be a file that is there"),
    "unlabelled": (columns(label=[None] * 8), {}, "Of 8 rows of .* 8 have no label"),
    "nothing left": (
        columns(label=[None] * 8),
        {"skip_empty": True},
        "no row of .* has a text and a label",
    ),
}


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_bad_tables_of_texts_are_told(case, tmp_path):
    build, options, message = BAD_TEXTS[case]
    with pytest.raises(ValueError, match=message):
        load_texts(**build(tmp_path), **({"test_split": 0.25} | options))


def several_tables(root):
    for name in ("a.csv", "b.csv"):
        write(pictures(root, SIX) / name, lines(*rows_of()))


def no_images(root):
    write(root / "t.csv", lines(*rows_of()))


def several_labels(root):
    rows = (f"{n},1,{n[0] if n[0] in '01' else 0}" for n in SIX)
    write(pictures(root, SIX) / "t.csv", lines(*rows, header="file,cat,dog"))


def other_names(root):
    write(pictures(root, SIX) / "t.csv", lines(*rows_of([f"x{name}" for name in SIX])))


BAD_IMAGES = {
    "other names": (
        other_names,
        r"no column of .*t.csv names images below .* there are 6, such as 'images/0.png'.*'x0.png'",
    ),
    "several tables": (several_tables, r"one table a split, got .*a.csv.*--dataset .*a.csv"),
    "no images": (no_images, "there is no image below"),
    "several labels": (
        several_labels,
        "1 of 6 rows have none or several of the classes 'cat', 'dog'",
    ),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_bad_tables_of_images_are_told(case, tmp_path):
    build, message = BAD_IMAGES[case]
    build(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_images(tmp_path, **HALF)


def test_existing_text_layouts_keep_their_order(tmp_path):
    """Tables that `datasets` read before give the same classes in the same order."""
    frame = pd.DataFrame({"text": TEXTS, "label": [2, 0, 1, 1, 0, 2, 0, 1]})
    for split in ("train", "test"):
        write(tmp_path / f"{split}.csv", frame.to_csv(index=False))
    train, test = load_texts(tmp_path)
    assert train["label"][:] == test["label"][:] == frame["label"].tolist()
    assert train.features["label"].names == ["0", "1", "2"]
    assert np.array_equal(train["text"][:], TEXTS)


def test_columns_of_one_name_are_told(tmp_path):
    file = write(tmp_path / "a.csv", "text,label,label\na,x,1\nb,y,2\nc,x,1\nd,y,2\n")
    train, _, notes = told(load_texts, file, **HALF)
    assert train.features["label"].names == ["x", "y"]
    assert any("several columns of one name" in said and "label.1" in said for said in notes.said)
    train, _ = load_texts(file, label_column="label.1", **HALF)
    assert train.features["label"].names == ["1", "2"]


def test_long_ids_stay_apart(tmp_path):
    ids = ["12345678901234567890", "12345678901234567891"]
    text = "".join(f"t{row},{ids[row % 2]}\n" for row in range(6))
    train, _ = load_texts(write(tmp_path / "a.csv", f"text,label\n{text}"), **HALF)
    assert train.features["label"].names == ids


@pytest.mark.parametrize("asked", [None, "data"])
def test_values_inside_others_are_no_texts(asked, tmp_path):
    rows = [{"data": {"text": f"t{row}"}, "label": row % 2} for row in range(6)]
    file = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match="text_column"):
        load_texts(file, text_column=asked, **HALF)


def test_infinite_labels_are_told(tmp_path):
    text = "".join(
        f'{{"text": "t{row}", "label": {"Infinity" if row % 2 else 1}}}\n' for row in range(6)
    )
    with pytest.raises(ValueError, match="label \\(inf\\)"):
        load_texts(write(tmp_path / "a.jsonl", text), **HALF)


SENTENCES = [f"these are the words of number {n}" for n in range(8)]


@pytest.mark.parametrize(
    ("labels", "asked"), [(KINDS, {}), (["3", "4"] * 4, {}), (["y", "n"] * 4, {"text_column": "2"})]
)
def test_a_first_row_that_is_an_example_is_one(labels, asked, tmp_path):
    file = write(tmp_path / "a.csv", "\n".join(rows_of(labels, SENTENCES)))
    train, test, notes = told(load_texts, file, **HALF, **asked)
    assert sorted(train["text"][:] + test["text"][:]) == SENTENCES
    assert "a.csv has no header, so that its columns are called 1, 2, ..." in notes.said


def test_a_first_row_that_may_be_a_header(tmp_path):
    """A column `spam` of `spam` and `ham`, or a text of one word: who has the file has to say."""
    words = ["offer", *(f"word{n}" for n in range(7))]
    file = write(tmp_path / "a.csv", "\n".join(rows_of(words, KINDS)))
    with pytest.raises(ValueError, match=r"may be a header or an example.*'spam'.*--text_column 1"):
        load_texts(file, **HALF)
    for asked, names in (("offer", words[1:]), ("1", words)):
        train, test = load_texts(file, text_column=asked, **HALF)
        assert sorted(train["text"][:] + test["text"][:]) == sorted(names)


@pytest.mark.parametrize("header", ["0,1", "text,1", "text,spam", "offer,spam"])
def test_a_header_like_its_rows_is_one(header, tmp_path):
    """Numbers as pandas writes them, a known name beside it, or the header again in the file."""
    again = [header] if header == "offer,spam" else []
    rows = [*again, *rows_of(SENTENCES, KINDS)]
    train, test = load_texts(write(tmp_path / "a.csv", lines(*rows, header=header)), **HALF)
    assert len(train) + len(test) == len(rows)


def json_forms():
    frame = pd.DataFrame({"text": TEXTS, "label": KINDS})
    rows = frame.to_dict("records")
    return {
        "columns": frame.to_dict("list"),
        "pandas": json.loads(frame.to_json()),
        "rows inside": {"version": 1, "data": rows},
    }


@pytest.mark.parametrize("form", json_forms())
def test_a_table_that_is_one_object(form, tmp_path):
    file = write(tmp_path / "t.json", json.dumps(json_forms()[form]))
    train, test = load_texts(file, test_split=0.25)
    assert sorted(train["text"][:] + test["text"][:]) == TEXTS
    assert train.features["label"].names == ["ham", "spam"]


def test_labels_by_the_names_of_images(tmp_path):
    file = write(pictures(tmp_path, SIX) / "t.json", json.dumps(dict(EXPECTED)))
    assert names_of(*load_images(file, **HALF)) == EXPECTED


def test_classes_in_columns_beside_texts(tmp_path):
    hot = {name: [int(kind == name) for kind in KINDS] for name in ("spam", "ham")}
    frame = pd.DataFrame({"id": range(8), "review": TEXTS, **hot})
    train, _, notes = told(load_texts, write(tmp_path / "a.csv", frame.to_csv(index=False)), **HALF)
    assert train.features["label"].names == ["ham", "spam"]
    assert notes.said[0] == "Labels are the columns of 0 and 1: 'spam', 'ham'."
    for more in ({"eggs": [1, 0] * 4}, {"kind": ["a", "b", "b", "b"] * 2}):
        file = write(tmp_path / "b.csv", frame.assign(**more).to_csv(index=False))
        with pytest.raises(ValueError, match=r"each of 'spam', 'ham'.* could be"):
            load_texts(file, **HALF)


def test_what_is_there_and_not_used_is_told(tmp_path):
    write(pictures(tmp_path, [*SIX, "x.png"]) / "train.csv", lines(*rows_of()))
    write(tmp_path / "test.csv", "id\nx\n")
    notes = told(load_images, tmp_path, **HALF)[2]
    unnamed = f"1 of the 7 images below {tmp_path} are in no row of train.csv"
    assert f"{unnamed}, such as 'images/x.png'." in notes.said
    assert any(said.startswith("Split test is there and is not what is") for said in notes.said)
    frame = pd.DataFrame({"text": TEXTS, "label": KINDS, "split": ["train", "test"] * 4})
    notes = told(load_texts, write(tmp_path / "a.csv", frame.to_csv(index=False)), **HALF)[2]
    assert any(said.startswith("Column 'split' tells which rows are") for said in notes.said)


def test_utf_16_without_a_mark(tmp_path):
    content = text_csv(tmp_path).read_text("utf-8")
    for encoding in ("utf-16-le", "utf-16-be"):
        file = write(tmp_path / "a.csv", content.encode(encoding))
        with pytest.raises(ValueError, match=rf"line 1: not UTF-8.*--encoding {encoding} "):
            load_texts(file, **HALF)
        assert load_texts(file, encoding=encoding, **HALF)[0].features["label"].names == [
            "ham",
            "spam",
        ]


def test_a_number_in_two_spellings_is_told(tmp_path):
    text = "".join(f"t{row},{['1', '1.0', 'x'][row % 3]}\n" for row in range(9))
    notes = told(load_texts, write(tmp_path / "a.csv", f"text,label\n{text}"), **HALF)[2]
    assert "Kept apart, though they look like one class: '1' and '1.0'." in notes.said


def test_classes_of_one_example_cannot_be_divided(tmp_path):
    file = write(tmp_path / "a.csv", "text,label\na b,x\nc d,y\n")
    with pytest.raises(ValueError, match=r"`test_split` must be the name of a part.*got 0\.3"):
        load_texts(file, **HALF)


def test_rows_that_hold_nothing_are_counted(tmp_path):
    """Those at the end are what editors leave."""
    file = write(tmp_path / "a.csv", "text,label\na,x\n,\nb,y\n\nc,x\nd,y\n,\n\n")
    train, test, notes = told(load_texts, file, **HALF)
    assert len(train) + len(test) == 4
    assert notes.left_out == {"rows of a.csv that hold nothing": 2}
