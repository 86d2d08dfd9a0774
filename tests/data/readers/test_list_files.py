"""Two files of lines, a path and a label each."""

from __future__ import annotations

import pytest
from image_sets import TEST, TRAIN, check_is_refused, linked, lists, png, then, write

from ldam_plugins.data import load_images


def test_byte_order_mark_tabs_and_windows_ends(tmp_path):
    given = lists(tmp_path)
    text = (tmp_path / "train.txt").read_text()
    text = text.replace(" ", "\t").replace("\n", "\r\n") + "\r\n"
    write(tmp_path / "train.txt", b"\xef\xbb\xbf" + text.encode())
    train, _ = load_images(**given)
    assert train.labels.tolist() == list(TRAIN)
    assert train.find_corrupt() == []


def test_one_list_beside_the_images_is_divided(tmp_path):
    lists(tmp_path)
    train, test = load_images(tmp_path / "train.txt", test_split=0.3)
    assert sorted([*train.labels, *test.labels]) == sorted(TRAIN)
    assert train.find_corrupt() == test.find_corrupt() == []
    with pytest.raises(ValueError, match=r"txt is one list of all images.*--test_split 0\.2"):
        load_images(tmp_path / "train.txt")


# What a line of a list becomes: lists are published, and saved by editors, in all these forms.
FORMS = {
    "slash before": lambda path, label, root: f"/{path} {label}",
    "dot before": lambda path, label, root: f"./{path} {label}",
    "slashes twice": lambda path, label, root: f"{path.replace('/', '//')} {label}",
    "backslashes": lambda path, label, root: f"{path.replace('/', chr(92))} {label}",
    "backslash before": lambda path, label, root: f"{chr(92)}{path.replace('/', chr(92))} {label}",
    "quotes": lambda path, label, root: f'"{path}" {label}',
    "single quotes": lambda path, label, root: f"'/{path}'\t{label}",
    "comma": lambda path, label, root: f"{path},{label}",
    "quotes and comma": lambda path, label, root: f'"{path}", {label}',
    "semicolon": lambda path, label, root: f"{path};{label}",
    "blanks around": lambda path, label, root: f"  {path} \t {label}  \r",
    "label of several digits": lambda path, label, root: f"{path} 00{label}",
    "whole path": lambda path, label, root: f"{root}/{path} {label}",
}


@pytest.mark.parametrize("form", FORMS)
def test_lists_are_read_in_the_forms_they_are_published_in(form, tmp_path):
    given = lists(tmp_path)
    for name in ("train.txt", "test.txt"):
        lines = (line.split() for line in (tmp_path / name).read_text().splitlines())
        text = "\n".join(FORMS[form](path, label, tmp_path) for path, label in lines)
        write(tmp_path / name, f"{text}\n\n")
    train, test = load_images(**given)
    assert (train.labels.tolist(), test.labels.tolist()) == (list(TRAIN), list(TEST))
    assert train.describe(3) == str(tmp_path / "train" / "bee" / "3.png")
    assert train.find_corrupt() == test.find_corrupt() == []


@pytest.mark.parametrize("name", ["a b.png", "'a'.png", "a\\b.png", "a,1.png", "a 2.png", '"a"'])
def test_a_name_of_a_list_is_first_of_all_what_it_says(name, tmp_path):
    for path in (tmp_path / "train" / name, tmp_path / "train" / "a" / "b.png"):
        write(path, png("train", 0))
    write(tmp_path / "train.txt", f"train/{name} 0\n")
    train, _ = load_images(
        tmp_path, train_list=tmp_path / "train.txt", test_list=tmp_path / "train.txt"
    )
    assert train.describe(0) == str(tmp_path / "train" / name)


WORDS = ("ant", "bee", "cat")
TABLES = {
    "comma": ("image,label\n", "{path},{label}\n"),
    "semicolon": ("path;class\n", "{path};{label}\n"),
    "tab": ("filename\tlabel\n", "{path}\t{label}\n"),
    "further columns": ("id,file,label,size\n", "{row},{path},{label},{row}.5\n"),
    "quotes": ('"image","label"\n', '"{path}","{label}"\n'),
    "label first": ("label,image\n", "{label},{path}\n"),
}


@pytest.mark.parametrize("form", TABLES)
@pytest.mark.parametrize("labels", ["words", "numbers"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".txt"])
def test_a_list_may_be_a_table(form, labels, suffix, tmp_path):
    lists(tmp_path)
    given = {"dataset": tmp_path}
    for split, folder, rows in (("train", "train", TRAIN), ("test", "val", TEST)):
        text, line = TABLES[form]
        for row, label in enumerate(rows):
            path, word = f"{folder}/{WORDS[label]}/{row}.png", WORDS[label]
            text += line.format(path=path, row=row, label=word if labels == "words" else label)
        given[f"{split}_list"] = write(tmp_path / f"{split}_table{suffix}", text)
    train, test = load_images(**given)
    assert train.class_names == (WORDS if labels == "words" else ("0", "1", "2"))
    assert (train.labels.tolist(), test.labels.tolist()) == (list(TRAIN), list(TEST))
    assert train.describe(3) == str(tmp_path / "train" / "bee" / "3.png")
    assert train.find_corrupt() == test.find_corrupt() == []


def test_labels_that_are_words_need_no_header(tmp_path):
    given = lists(tmp_path)
    for split, folder, rows in (("train", "train", TRAIN), ("test", "val", TEST)):
        lines = [f"{folder}/{WORDS[c]}/{row}.png,{WORDS[c]}\n" for row, c in enumerate(rows)]
        write(tmp_path / f"{split}.txt", "".join(lines))
    train, test = load_images(**given)
    assert train.class_names == test.class_names == WORDS
    assert (train.labels.tolist(), test.labels.tolist()) == (list(TRAIN), list(TEST))


def test_a_list_in_another_encoding_names_the_option_that_reads_it(tmp_path):
    given = lists(tmp_path)
    write(tmp_path / "train" / "bee" / "caf\xe9.png", png("train", 3))
    for text in ("train/bee/caf\xe9.png 0\n", "image,label\ntrain/bee/caf\xe9.png,0\n"):
        for name in ("train.txt", "test.txt"):
            write(tmp_path / name, text.encode("cp1252"))
        with pytest.raises(ValueError, match=r"--encoding cp1252"):
            load_images(**given)
        train, _ = load_images(**given, encoding="cp1252")
        assert train.describe(0).endswith("caf\xe9.png")


def edit_list(text: str, name: str = "train.txt"):
    def build(root):
        given = lists(root)
        write(root / name, text)
        return given

    return build


def accent_out(root):
    given = edit_list("\xe9/0.png 0")(root / "root")
    write(root / "secret" / "0.png", png("train", 0))
    (root / "root" / "e\u0301").symlink_to(root / "secret")
    return given


LINE = "train/ant/0.png 0\n"


BAD = {
    "listed folder out, decomposed": (accent_out, "line 1: there is no file"),
    "one list": (then(lists, test_list=None), "`test_list` must be given"),
    "lists of two kinds": (then(lists, test_list="a.json"), "`test_list` must be of the kind"),
    "list without root": (then(lists, dataset="none"), "`dataset` must be the folder.*'none'"),
    "list missing": (then(lists, train_list="none.txt"), "none.txt cannot be read"),
    "list a folder": (lambda r: lists(r) | {"train_list": r}, "cannot be read"),
    "list empty": (edit_list(" \n\n"), r"train.txt is empty"),
    "list not text": (edit_list(LINE.encode() + b"\xff\xfe 1"), "train.txt, line 2: not UTF-8"),
    "no label": (edit_list(LINE + "train/ant/1.png"), "line 2: must be a path and a label"),
    "blank line": (edit_list(LINE + "\n" + LINE), "line 2: must be a path"),
    "label alone": (edit_list("17"), "line 1: must be a path"),
    "label negative": (edit_list("train/ant/1.png -1"), "line 1: must be .*-1'"),
    "label a fraction": (edit_list("train/ant/1.png 1.5"), "line 1: must be"),
    "label a word": (edit_list("train/ant/1.png ant"), "line 1: must be"),
    "label in other digits": (edit_list("train/ant/1.png ٣"), "line 1: must be"),
    "label beyond the lines": (edit_list("train/ant/1.png 1"), "label 1 is too large for the 1"),
    "label endless": (edit_list("train/ant/1.png " + "9" * 5000), "is too large"),
    "test label new": (
        edit_list("val/ant/0.png 3", "test.txt"),
        "test.txt, line 1: label 3 .*3 cl",
    ),
    "path absolute": (edit_list("/etc/hosts 0"), "line 1: path '/etc/hosts' must be relative"),
    "path absolute and out": (edit_list("/../x.png 0"), "line 1: path '/../x.png' leads out of"),
    "path out by backslashes": (
        edit_list("..\\x.png 0"),
        r"line 1: path '..\\\\x.png' leads out of",
    ),
    "path out in quotes": (edit_list("'/../x.png' 0"), "line 1: .*leads out of"),
    "labels twice": (edit_list("train/ant/0.png 0 0"), "no file 'train/ant/0.png 0'"),
    "titles of other columns": (
        edit_list("path,label\n" + LINE),
        "train.txt cannot be read|names images",
    ),
    "table beside a list": (edit_list("path,label\ntrain/ant/0.png,0\n"), "`image_column` must be"),
    "path out": (edit_list(LINE + "../x.png 0"), "line 2: path '../x.png' leads out of"),
    "path out and in": (edit_list("train/../../a/b.png 0"), "leads out of"),
    "path missing": (edit_list("train/ant/9.png 0"), "line 1: there is no file 'train/ant/9.png'"),
    "path a folder": (edit_list("train/ant 0"), "there is no file 'train/ant'"),
    "path with a null": (edit_list("train/a\0nt/1.png 0"), r"path 'train/a\\x00nt/1.png' cannot"),
    "path endless": (edit_list("a" * 5000 + "/b.png 0"), "line 1: "),
    "path twice": (edit_list(LINE + LINE), "line 2: .*already given in .*line 1"),
    "listed link out": (linked("secret/0.png", "train/ant/0.png"), "line 1: .*leads out of"),
    "listed folder out": (linked("moved", "train/ant"), "line 1: .*leads out of"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_told(case, tmp_path):
    check_is_refused(*BAD[case], tmp_path / "set")
