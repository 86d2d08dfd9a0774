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
    "a table's titles": (edit_list("path,label\n" + LINE), "line 1: must be a path and a label"),
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
