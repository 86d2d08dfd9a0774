"""The page of a re-balanced model says what the metrics say."""

import re

import pytest
import torch
from frozen import bayes, draw, features_of, gaussians, long_tail

from ldam_plugins import ClassCounts
from ldam_plugins.posthoc import rebalance_head
from ldam_plugins.reports import write_rebalance_report
from ldam_plugins.reports.rebalance_report import metric_rows, points, verdict
from ldam_plugins.training import read_metrics, run_metrics, write_metrics

NASTY = ["<script>alert(1)</script>", "$x_{$ \\frac", "猫", '"><img src=x onerror=y>']


def write_run(folder, method, classes=4, names=None, **options):
    counts = long_tail(60 * classes, classes, 50)
    counts = ClassCounts(counts.counts, names)
    generator = torch.Generator().manual_seed(0)
    means = 0.7 * gaussians(classes, 8, generator)
    model = bayes(means, counts.prior(dtype=torch.float64).log())
    held_out = features_of(model, *draw(means, counts.counts, generator))
    test = features_of(model, *draw(means, [25] * classes, generator))
    done = rebalance_head(model, held_out, counts, method, test=test, **options)
    before = {name: value for name, value in done.before.items() if name != "confusion"}
    metrics = run_metrics(
        options={"model": "a model", "dataset": "some data"},
        class_counts=counts,
        device="cpu",
        rebalance=done.to_dict(),
        before=before,
        train_seconds=1.0,
        examples_per_second=1.0,
        test=done.after,
    )
    write_metrics(folder, metrics)
    return done, counts


def test_the_page_says_what_was_measured(tmp_path):
    done, counts = write_run(tmp_path, "auto", names=NASTY, folds=3)
    page = write_rebalance_report(tmp_path).read_text(encoding="utf-8")
    metrics = read_metrics(tmp_path)
    rows = {row.name: row for row in metric_rows(metrics, counts)}
    before, after = (100 * each["balanced_accuracy"] for each in (done.before, done.after))
    row = rows["balanced accuracy"]
    assert row.before.startswith(f"{before:.2f} %")
    assert row.after.startswith(f"{after:.2f} %")
    assert row.difference == points(list(done.differences["balanced_accuracy"]))
    assert row.difference.startswith(f"{after - before:+.1f} (")
    ece = rows["calibration error (ece), target mix"]
    assert ece.after.startswith(f"{done.after['calibration']['ece']:.4f} (")
    plain = re.sub("<[^>]*>", " ", page)
    for text in (row.before, row.after, row.difference):
        assert all(part.strip() in plain for part in text.split(" ("))
    assert done.method in plain
    assert "What was tried" in plain
    told = verdict(metrics)
    assert told[0].startswith(f"The head was changed by {done.method}")
    assert done.choice.verdict() in told
    assert sum("more than noise" in sentence for sentence in told) >= 1
    assert "<script" not in page
    assert "<img src=x" not in page
    assert not re.search(r"https?://", page)
    assert (tmp_path / "class_change.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "reliability.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("classes", [2, 120])
def test_few_and_many_classes(tmp_path, classes):
    done, _ = write_run(tmp_path, "logit_adjustment", classes, strength=1.0)
    page = write_rebalance_report(tmp_path).read_text(encoding="utf-8")
    assert "What was tried" not in page
    assert page.count('<td class="group">') == classes
    assert done.choice is None


def test_a_head_that_is_left_alone(tmp_path):
    write_run(tmp_path, "none")
    told = verdict(read_metrics(tmp_path))
    assert told == ["The head is left as it is."]
    assert told[0] in write_rebalance_report(tmp_path).read_text(encoding="utf-8")
