import base64
import csv
import html
import io
import re
from html.parser import HTMLParser

import matplotlib as mpl
import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from ldam_plugins import ClassCounts
from ldam_plugins.metrics import Predictions, long_tail_metrics
from ldam_plugins.reports import plots, write_report
from ldam_plugins.reports import run_report as reports
from ldam_plugins.reports.class_table import ClassRow, class_rows
from ldam_plugins.training.history import HistoryWriter, read_metrics, write_metrics
from ldam_plugins.training.run_dir import HOLDER_FILE, LOCK_FILE

NASTY = ["<script>alert(1)</script>", "$x_{$ \\frac", "猫", '"><img src=x onerror=y>', "a\nb & c"]


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.sources, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "srcset", "href")]

    def handle_data(self, data):
        self.words.append(data)


def history(epochs=4, switch=3, **changed):
    for epoch in range(epochs):
        stage = "uniform" if epoch < switch else "reweighted"
        row = {"epoch": epoch, "lr": 0.1, "stage": stage, "train_loss": 2.0 - epoch / 10}
        yield {**row, "val_error": None, "test_error": 50.0 - epoch, "seconds": 1.0, **changed}


def make_run(folder, counts, rows=(), missing=(), **options):
    labels = np.setdiff1d(np.arange(len(counts)), missing)
    test = long_tail_metrics(np.eye(len(counts), dtype=np.float32)[labels], labels, counts)
    writer = HistoryWriter(folder, test_error=True)
    for row in rows:
        writer.append(**row)
    metrics = {
        "options": {"model": "resnet", "dataset": "digits", "loss": "ldam", **options},
        "versions": {"torch": "2.0", "timm": None},
        "class_counts": counts.counts,
        "class_names": counts.class_names,
        "device": "cpu",
        "train_seconds": 125.4,
        "examples_per_second": 1234.5,
        "test": test,
    }
    write_metrics(folder, metrics)
    return folder


def read_page(folder):
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def pixels(png):
    return mpl.image.imread(io.BytesIO(png), format="png")


@pytest.fixture
def _no_drawing(monkeypatch):
    monkeypatch.setattr(plots, "training_curve", lambda _history, **_: b"curve")
    monkeypatch.setattr(plots, "class_profile", lambda _rows, _titles, dark: b"profile")


def test_report_and_plots_of_a_run(tmp_path):
    counts = ClassCounts([500, 50, 5], class_names=["cat", "fox", "lynx"])
    options = {"schedule": "drw", "start": "0.8", "epochs": 4, "seed": 7, "train_list": None}
    make_run(tmp_path, counts, history(), **options)
    assert write_report(tmp_path) == tmp_path / "report.html"
    files = {"report.html", "training_curve.png", "class_profile.png", "classes.csv"}
    left = {path.name for path in tmp_path.iterdir()} - {LOCK_FILE, HOLDER_FILE}
    assert left == files | {"history.csv", "metrics.json"}
    page = read_page(tmp_path)
    text = " ".join(page.words)
    assert "resnet on digits" in text
    assert "loss ldam, schedule drw from 0.8, 4 epochs, seed 7, 555 training samples in 3" in text
    assert all(word in page.words for word in ("cat", "fox", "lynx", "100.00 %", "2 min 5 s"))
    assert page.words[page.words.index("timm") + 1] == "not installed"
    assert page.words[page.words.index("train_list") + 1] == "-"


def test_page_needs_nothing_from_outside(tmp_path):
    make_run(tmp_path, ClassCounts([500, 5]), history())
    write_report(tmp_path)
    page = read_page(tmp_path)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert len(page.sources) == 4
    for source, file in zip(page.sources[1::2], ("training_curve", "class_profile"), strict=True):
        kind, content = source.split(",")
        assert kind == "data:image/png;base64"
        assert base64.b64decode(content) == (tmp_path / f"{file}.png").read_bytes()
    assert not re.search(r"https?:|url\(|@import", (tmp_path / "report.html").read_text())


def test_class_names_and_options_are_escaped(tmp_path):
    counts = ClassCounts([500, 400, 30, 20, 5], class_names=NASTY)
    make_run(tmp_path, counts, history(), model="<b>m</b>", note="</td><script>")
    write_report(tmp_path)
    page = read_page(tmp_path)
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert page.tags.count("img") == 2
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(name in html.unescape(text) for name in NASTY)
    assert "<title>&lt;b&gt;m&lt;/b&gt; on digits</title>" in text


def test_report_is_a_pure_function_of_the_two_files(tmp_path):
    make_run(tmp_path, ClassCounts([500, 5]), history())
    write_report(tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "report.html").unlink()
    write_report(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


@pytest.mark.usefixtures("_no_drawing")
@pytest.mark.parametrize("epochs", [0, 1])
def test_short_runs(tmp_path, epochs):
    make_run(tmp_path, ClassCounts([500, 5]), history(epochs))
    write_report(tmp_path)
    assert (tmp_path / "training_curve.png").exists() == bool(epochs)
    assert read_page(tmp_path).tags.count("img") == 1 + epochs


@pytest.mark.usefixtures("_no_drawing")
def test_class_without_test_sample(tmp_path):
    make_run(tmp_path, ClassCounts([500, 50, 5]), history(), missing=[2])
    write_report(tmp_path)
    words = [word for word in read_page(tmp_path).words if word.strip()]
    start = words.index("5")
    assert words[start : start + 3] == ["5", "few", "-"]


@pytest.mark.usefixtures("_no_drawing")
def test_page_of_very_many_classes_shows_both_ends(tmp_path):
    classes = 8142
    counts = ClassCounts(np.linspace(1000, 2, classes).astype(int))
    make_run(tmp_path, ClassCounts([500, 5]), history())
    metrics = read_metrics(tmp_path)
    metrics["class_counts"], metrics["class_names"] = counts.counts, None
    accuracies = {"per_class_accuracy": [0.5, None, 1.0] * (classes // 3)}
    test = {k: v for k, v in metrics["test"].items() if not k.startswith(("per_class", "worst"))}
    metrics["test"] = {**test, "worst_class_accuracy": 0.5, **accuracies}
    write_metrics(tmp_path, metrics)
    write_report(tmp_path)
    text = (tmp_path / "report.html").read_text()
    shown = re.findall(r'<td class="name half">(\d+)</td>', text)
    assert shown == [str(row) for row in (*range(500), *range(classes - 500, classes))]
    assert "7142 more classes" in text
    assert len(text) < 2_000_000


def test_table_at_the_limit_is_whole():
    rows = [ClassRow(row, "c", 5, "few", 0.5) for row in range(1001)]
    assert reports._shortened(rows[:1000]) == rows[:1000]
    assert reports._shortened(rows) == [*rows[:500], None, *rows[501:]]


@pytest.mark.usefixtures("_no_drawing")
@pytest.mark.parametrize("missing", ["metrics.json", "history.csv"])
def test_missing_file_is_named(tmp_path, missing):
    make_run(tmp_path, ClassCounts([500, 5]), history())
    (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_plots_leave_settings_alone_and_heed_none():
    before = mpl.rcParams.copy()
    rows = class_rows({"per_class_accuracy": [1.0, 0.5]}, ClassCounts([5, 3]))
    with mpl.rc_context({"text.usetex": True, "font.size": 40}):
        changed = plots.class_profile(rows)
    # Reading "backend" would choose one.
    assert [key for key in before if key != "backend" and mpl.rcParams[key] != before[key]] == []
    assert changed == plots.class_profile(rows)


def drawn(monkeypatch, draw):
    figures = []
    with monkeypatch.context() as patch:
        patch.setattr(Figure, "savefig", lambda figure, *_args, **_options: figures.append(figure))
        draw()
    return figures[0]


def test_training_curve_shows_values_and_marks_the_switch(monkeypatch):
    rows = list(history(10, 8))
    rows[3]["test_error"] = None
    figure = drawn(monkeypatch, lambda: plots.training_curve(rows))
    loss, error = figure.axes
    assert loss.lines[0].get_xydata().tolist() == [[e, 2.0 - e / 10] for e in range(10)]
    assert error.lines[0].get_xydata().tolist() == [[e, 50.0 - e] for e in range(10) if e != 3]
    assert loss.lines[1].get_xdata() == error.lines[1].get_xdata() == [7.5, 7.5]
    assert loss.get_title("right") == "dashed: reweighted from epoch 8"
    assert error.get_title("left") == "Test error, % (last value: 41)"


def test_training_curve_names_the_validation_error(monkeypatch):
    rows = [{**row, "val_error": row["test_error"], "test_error": None} for row in history(3)]
    loss, error = drawn(monkeypatch, lambda: plots.training_curve(rows, selected=1)).axes
    assert error.get_title("left") == "Validation error, % (last value: 48)"
    assert loss.lines[-1].get_xdata() == error.lines[-1].get_xdata() == [1, 1]
    assert loss.get_title("right") == "all epochs: uniform; dotted: selected, epoch 1"
    rows[0]["test_error"] = 3.0
    _, _, test = drawn(monkeypatch, lambda: plots.training_curve(rows)).axes
    assert test.get_title("left") == "Test error, % (last value: 3)"


def test_training_curve_of_one_epoch(monkeypatch):
    loss, error = drawn(monkeypatch, lambda: plots.training_curve(list(history(1)))).axes
    assert (loss.lines[0].get_marker(), error.lines[0].get_marker()) == ("o", "o")
    assert error.get_xlabel() == "epoch, counted from 0"


def test_training_curve_without_a_switch_or_an_error(monkeypatch):
    rows = list(history(3, 9, test_error=None))
    (loss,) = drawn(monkeypatch, lambda: plots.training_curve(rows)).axes
    assert len(loss.lines) == 1
    assert loss.get_title("right") == "all epochs: uniform"
    assert loss.get_xlabel() == "epoch, counted from 0"


def test_profile_names_up_to_a_hundred_classes(monkeypatch):
    counts = ClassCounts([5, 400, 60], class_names=["猫", "$a_{$", "y" * 50])
    rows = class_rows({"per_class_accuracy": [None, 0.5, 0.123]}, counts)
    left, right = drawn(monkeypatch, lambda: plots.class_profile(rows)).axes
    names = [label.get_text() for label in left.get_yticklabels()]
    assert names == ["$a_{$", "y" * 29 + "...", "class 0"]
    assert [bar.get_width() for bar in left.patches] == [50.0, pytest.approx(12.3), 0.0]
    assert [text.get_text() for text in left.texts] == ["50", "12", "no test sample"]
    assert [bar.get_width() for bar in right.patches] == [400, 60, 5]
    assert right.get_xscale() == "log"
    assert left.yaxis_inverted()


def test_profile_of_more_classes_is_by_rank_with_local_means(monkeypatch):
    counts = ClassCounts(range(201, 0, -1))
    accuracy = np.linspace(1, 0, 201).tolist()
    accuracy[100] = None
    rows = class_rows({"per_class_accuracy": accuracy}, counts)
    top, bottom = drawn(monkeypatch, lambda: plots.class_profile(rows)).axes
    assert [len(line.get_xdata()) for line in top.lines] == [101, 81, 19, 40]
    ranks, means = top.lines[-1].get_data()
    assert np.allclose(means, 100 - np.asarray(ranks) / 2)
    assert bottom.get_yscale() == "log"


@pytest.mark.parametrize("classes", [100, 101])
def test_profile_at_the_limit_of_names(monkeypatch, classes):
    rows = class_rows({"per_class_accuracy": [0.5] * classes}, ClassCounts([9] * classes))
    figure = drawn(monkeypatch, lambda: plots.class_profile(rows))
    assert len(figure.axes[0].patches) == (classes if classes == 100 else 0)


def test_dark_plots_are_dark():
    for dark, low, high in ((False, 0.99, 1.01), (True, 0.0, 0.2)):
        corner = pixels(plots.training_curve(list(history()), dark=dark))[0, 0, :3]
        assert low < corner.max() < high


def test_history_file_is_the_documented_table(tmp_path):
    make_run(tmp_path, ClassCounts([500, 5]), history(2))
    with (tmp_path / "history.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["epoch", "lr", "stage", "train_loss", "val_error", "test_error", "seconds"]
    assert rows[1] == ["0", "0.1", "uniform", "2.0", "", "50.0", "1.0"]


@pytest.mark.usefixtures("_no_drawing")
def test_figures_of_a_held_out_part_are_shown(tmp_path):
    names = ["cat", "<lynx>"]
    make_run(tmp_path, ClassCounts([9, 1], class_names=names), history())
    write_report(tmp_path)
    assert "held out" not in " ".join(read_page(tmp_path).words)
    metrics = read_metrics(tmp_path)
    found = {"top1_error": 12.34, "per_class_accuracy": [0.8766, None], "few": 0.8766}
    metrics["validation"] = {**metrics["test"], **found}
    metrics["held_out"] = {"samples": 3, "class_counts": [3, 0], "classes_without": names[1:]}
    write_metrics(tmp_path, metrics)
    write_report(tmp_path)
    words = read_page(tmp_path).words
    errors = [words[at + 1] for at, word in enumerate(words) if word == "top-1 error"]
    assert errors == ["0.00 %", "12.34 %"]
    text = " ".join(words)
    assert "Measured on 3 of 13 training samples that were held out." in text
    assert "Classes of which none is held out: 1 (<lynx>)." in text
    assert "accuracy after the last epoch." in text


@pytest.mark.usefixtures("_no_drawing")
def test_the_selected_epoch_is_told_and_a_better_one_before_the_switch(tmp_path):
    make_run(tmp_path, ClassCounts([9, 3]), history())
    selection = {"metric": "macro_f1", "epoch": 3, "score": 0.5, "first_candidate": 3}
    for earlier in (None, {"epoch": 1, "score": 0.75}):
        selection["better_before"] = earlier
        write_metrics(tmp_path, read_metrics(tmp_path) | {"selection": selection})
        write_report(tmp_path)
        text = " ".join(read_page(tmp_path).words)
        assert "accuracy after epoch 3 (counted from 0), which had the best macro f1 on" in text
        assert ("; epoch 1, before the switch, had 0.75." in text) == (earlier is not None)


@pytest.mark.usefixtures("_no_drawing")
def test_augmentation_and_preprocessing_are_shown(tmp_path):
    make_run(tmp_path, ClassCounts([9, 3]), history())
    metrics = read_metrics(tmp_path)
    evaluation = {"input_size": [3, 8, 8], "crop_mode": "center", "crop_pct": 1.0}
    metrics["images"] = {
        "augmentation": {"kind": "crop_flip", "hflip": 0.5, "padding": 1},
        "evaluation": {**evaluation, "interpolation": "bicubic"},
    }
    write_metrics(tmp_path, metrics)
    write_report(tmp_path)
    words = read_page(tmp_path).words
    assert words[words.index("augmentation") + 1] == "crop_flip (hflip 0.5, padding 1)"
    assert words[words.index("evaluated images") + 1] == "3 x 8 x 8, center crop 1, bicubic"


def test_page_of_a_detailed_run(tmp_path):
    counts = ClassCounts(
        [500, 50, 5], class_names=["<cat>", "fox", "lynx"], many_above=60, few_below=6
    )
    make_run(tmp_path, counts, history())
    labels, groups = np.repeat(range(3), [30, 25, 19]), ["<left>", "right"] * 37
    logits = np.eye(3)[labels]
    logits[:5] = [0, 1, 0]  # five cats are taken for foxes
    metrics = read_metrics(tmp_path)
    metrics["group_limits"] = counts.limits
    test = long_tail_metrics(logits, labels, counts, groups=groups, detailed=True)
    write_metrics(tmp_path, {**metrics, "test": test})
    write_report(tmp_path)
    page = read_page(tmp_path)
    text = " ".join(page.words)
    assert {"many (> 60), 1 class", "medium (6..60), 1 class", "few (< 6), 1 class"} <= {
        *page.words
    }
    low, high = test["intervals"]["top1_error"]
    at = page.words.index("top-1 error")
    shown = [word.strip() for word in page.words[at + 1 : at + 6] if word.strip()]
    assert shown[:2] == ["6.76 %", f"({low:.1f}..{high:.1f})"]
    low, high = test["intervals"]["macro_f1"]
    assert f"({100 * low:.1f}..{100 * high:.1f}, few examples: too narrow)" in text
    assert "too narrow for classes with fewer than 20 test samples" in text
    at = page.words.index("Taken for another class most often")
    cells = [word for word in page.words[at:] if word.strip()]
    assert cells[5:9] == ["<cat>", "fox", "5", "16.67 %"]
    assert text.count("confusion.csv") == 1
    at = page.words.index("By group of samples")
    assert "<left>" in page.words[at:]
    assert page.tags.count("img") == 3
    assert matplotlib.image.imread(tmp_path / "confusion.png").ndim == 3


def test_what_the_page_shows_is_in_tables_beside_it(tmp_path):
    counts = ClassCounts([500, 50, 5], class_names=["cat", "NA", "lynx"])
    make_run(tmp_path, counts, history())
    metrics = read_metrics(tmp_path)
    labels = np.repeat(range(3), [30, 25, 19])
    logits = np.eye(3)[labels] * 2
    logits[:5] = [0, 1, 0]
    test = long_tail_metrics(logits, labels, counts, detailed=True)
    found = Predictions(3)
    found.update(range(len(labels)), torch.tensor(logits), labels)
    test["predictions"] = found.columns([f"{row}.jpg" for row in range(len(labels))])
    write_metrics(tmp_path, {**metrics, "test": test})
    write_report(tmp_path)
    classes = pd.read_csv(tmp_path / "classes.csv", keep_default_na=False)
    assert classes["class"].tolist() == ["cat", "NA", "lynx"]
    assert classes["accuracy"].tolist() == pytest.approx(test["per_class_accuracy"])
    low, high = test["intervals"]["per_class_f1"][1]
    assert (classes["f1_low"][1], classes["f1_high"][1]) == pytest.approx((low, high))
    bins = pd.read_csv(tmp_path / "reliability.csv")
    seen = bins[bins["samples"] > 0]
    assert seen["samples"].tolist() == [5, 69]
    assert seen["right"].tolist() == [0, 1]
    # e^2 / (e^2 + 2) is 0.79, e / (e + 2) is 0.58
    assert ((seen["above"] < [0.576, 0.787]) & (seen["up_to"] >= [0.576, 0.787])).all()


def test_a_baseline_is_told_of_and_kept(tmp_path):
    counts = ClassCounts([500, 50, 5], class_names=["cat", "fox", "lynx"])
    labels = np.repeat(range(3), 20)
    for name, wrong in (("erm", slice(40, 60)), ("ldam", slice(0, 1))):
        (tmp_path / name).mkdir()
        make_run(tmp_path / name, counts, history())
        logits = np.eye(3)[labels]
        logits[wrong] = [0, 1, 0]
        found = Predictions(3)
        found.update(range(len(labels)), torch.tensor(logits), labels)
        metrics = read_metrics(tmp_path / name)
        columns = {"predictions": found.columns([f"{row}.jpg" for row in range(len(labels))])}
        write_metrics(tmp_path / name, {**metrics, "test": metrics["test"] | columns})
    write_report(tmp_path / "ldam", baseline=tmp_path / "erm")
    write_report(tmp_path / "ldam")
    text = " ".join(read_page(tmp_path / "ldam").words)
    assert f"Against {tmp_path / 'erm'}" in text
    assert "Better: +31.7 points of balanced accuracy" in text
    rows = pd.read_csv(tmp_path / "ldam" / "baseline.csv").set_index("part")
    assert rows.loc["few (< 20)", ["gained", "lost", "difference"]].tolist() == [20, 0, 1.0]
    assert rows.loc["many (> 100)", ["gained", "lost"]].tolist() == [0, 1]
    write_report(tmp_path / "erm")
    assert "Against" not in " ".join(read_page(tmp_path / "erm").words)
    with pytest.raises(FileNotFoundError, match="There are no predictions in"):
        write_report(tmp_path / "erm", baseline=tmp_path / "nothing")


def test_rows_that_become_blocks_on_a_phone_name_every_value(tmp_path):
    counts = ClassCounts([500, 5], class_names=["cat", "lynx"])
    make_run(tmp_path, counts, history())
    test = long_tail_metrics(np.eye(2), [0, 1], counts, detailed=True)
    write_metrics(tmp_path, {**read_metrics(tmp_path), "test": test})
    write_report(tmp_path)
    (table,) = re.findall(r'<table class="dense stack">(.*?)</table>', text_of(tmp_path), re.DOTALL)
    cells = re.findall(r"<td [^>]*>", table)
    assert len(cells) == 2 * 10
    unnamed = [cell for cell in cells if "data-label" not in cell]
    assert {*unnamed} == {'<td class="name half">', '<td class="group">'}


def text_of(folder):
    return (folder / "report.html").read_text(encoding="utf-8")


def test_confusion_plot_has_a_cell_a_pair_in_the_order_of_the_rows(monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "png", lambda draw, dark: drawn.append(draw()))
    confusion = {"true": [0, 0, 1, 2], "predicted": [0, 2, 1, 2], "samples": [3, 1, 2, 7]}
    rows = class_rows({"per_class_accuracy": [0.75, 1.0, 1.0]}, ClassCounts([5, 50, 9]))
    assert [row.class_id for row in rows] == [1, 2, 0]
    plots.confusion_plot(rows, confusion)
    (axis,) = drawn[0].axes
    cells = {(int(t.get_position()[1]), int(t.get_position()[0])): t.get_text() for t in axis.texts}
    assert cells == {(2, 2): "3", (2, 1): "1", (0, 0): "2", (1, 1): "7"}
    shares = axis.images[0].get_array().tolist()
    assert shares == [[1, None, None], [None, 1, None], [None, 0.25, 0.75]]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["1", "2", "0"]


def test_the_verdict_names_head_tail_and_the_worst_class():
    counts = ClassCounts([300, 50, 5], ["cat", "dog", "<eel>"])
    test = {
        **{"per_class_accuracy": [0.9, 0.8, 0.1], "balanced_accuracy": 0.6, "many": 0.9},
        **{"few": 0.1, "worst_class": 2, "worst_class_accuracy": 0.1},
    }
    assert reports.verdict(test, counts) == (
        "60.00 % of the test samples are classified right, each class counting once: 90.00 % in "
        "classes with more than 100 training samples, 10.00 % in those with fewer than 20. The "
        "worst class is <eel>, 10.00 %."
    )
    known = {"intervals": {"balanced_accuracy": [0.5, 0.7]}}
    none = {**test, **known, "per_class_accuracy": [0.9, 0.9, 0.0], "few": None}
    assert reports.verdict(none, counts) == (
        "60.00 % of the test samples are classified right, each class counting once (95 % interval "
        "50.0..70.0). Of 1 class none is right."
    )
