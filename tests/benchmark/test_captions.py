import copy
import json

import pytest
import results_tables
from made_records import COUNTS, method, record

from ldam_plugins.benchmark.captions import row_caption
from ldam_plugins.benchmark.records import write_records
from ldam_plugins.benchmark.report import write_experiment
from ldam_plugins.benchmark.tables import comparison_caption, comparison_rows, matrix_captions

GRID = [(loss, kind) for loss in ("ce", "ldam") for kind in ("none", "drw")]
START = "differ in more than loss, schedule and head: "


def grid(**options):
    """Two losses under two schedules, two seeds each."""
    return [r for loss, kind in GRID for r in method(loss, kind, [20.0, 21.5], **options)]


def changed(records, loss, **entries):
    """A copy of the records, in which those of a loss have other entries or options."""
    records = copy.deepcopy(records)
    for each in records:
        if each["options"]["loss"] == loss:
            for name, value in entries.items():
                (each if name in each else each["options"])[name] = value
    return records


def warnings_of(records, baseline="erm"):
    """What each kind of table warns of: rows, matrices, comparisons."""
    matrices = {caption.warning for caption in matrix_captions(records).values()}
    return row_caption(records).warning, matrices, comparison_caption(records, baseline).warning


def test_like_rows_have_no_warning(records):
    assert warnings_of(records) == ("", {""}, "")


@pytest.mark.parametrize(
    ("option", "ours", "theirs"),
    [
        ("lr", 0.1, 0.01),
        ("epochs", 100, 200),
        ("model", "cifar_resnet20", "resnet18"),
        ("batch_size", 128, 64),
        ("image_size", None, 64),
        ("subset_seed", 0, 1),
        ("mixup", 0.0, 0.2),
    ],
)
def test_an_option_that_goes_with_the_loss_is_warned_of_though_it_is_a_column(option, ours, theirs):
    records = changed(grid(**{option: ours}), "ldam", **{option: theirs})
    rows, _, _ = warnings_of(records)
    ours = "-" if ours is None else ours
    assert rows.startswith(f"Rows {START}{option} {ours:{'g' * isinstance(ours, float)}} (ERM")
    assert f"{theirs} (LDAM" in rows
    assert rows.count(";") == 2, rows  # of no other option
    if option != "subset_seed":  # other samples are not paired
        pairs = comparison_caption(records, "erm").warning
        assert pairs.startswith(f"Method and baseline {START}{option} ")
        assert "CE-DRW" not in pairs


@pytest.mark.parametrize("option", ["output_dir", "workers", "resume", "memory_limit"])
def test_where_output_goes_and_how_it_is_fetched_is_no_difference(option):
    assert not any(warnings_of(changed(grid(**{option: "a"}), "ldam", **{option: "b"}))[::2])


def test_what_every_method_has_both_of_is_no_difference():
    both = grid(lr=0.1) + grid(lr=0.01)
    assert warnings_of(both) == ("", {""}, "")
    assert warnings_of(both, "*/*:lr=0.01") == ("", {""}, "")
    assert len(comparison_rows(both, "*/*:lr=0.01")) == 4
    some = [r for r in both if r["options"]["loss"] == "ce" or r["options"]["lr"] == 0.1]
    assert row_caption(some).warning == ""


def test_parameters_of_a_method_that_are_shown_are_no_difference():
    records = grid() + method("ldam", "drw", [19.0, 18.0], max_margin=0.3, scale=None)
    for each in records:
        each["options"].setdefault("scale", None)
    assert warnings_of(records) == ("", {""}, "")
    assert not row_caption(changed(grid(head="auto"), "ldam", head="linear")).warning


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"mixed_precision": "bf16"}, "precision float32 (ERM; CE-DRW), bf16 (LDAM; LDAM-DRW)"),
        ({"versions": {"torch": "2.7"}}, "torch 2.6 (ERM; CE-DRW), 2.7 (LDAM; LDAM-DRW)"),
        ({"device": "cpu (arm64, threads: 2)"}, "device cpu (x86) (ERM; CE-DRW), cpu (arm64) "),
        (
            {"group_limits": {"many_above": 9, "few_below": 5}},
            "limits of many and few > 100, < 20 (ERM; CE-DRW), > 9, < 5 (LDAM; LDAM-DRW)",
        ),
        ({"processes": 2}, "processes 1 (ERM; CE-DRW), 2 (LDAM; LDAM-DRW)"),
        ({"padding": 4}, "padding not set (ERM; CE-DRW), 4 (LDAM; LDAM-DRW)"),
    ],
)
def test_what_no_column_names_is_warned_of_in_every_kind_of_table(entries, said):
    records = grid()
    for each in records:
        each |= {"mixed_precision": "no", "device": "cpu (x86, threads: 1)", "processes": 1}
        each |= {"group_limits": {"many_above": 100, "few_below": 20}}
    records = changed(records, "ldam", **entries)
    rows, matrices, pairs = warnings_of(records)
    assert rows.startswith(f"Rows {START}{said}")
    assert matrices == {rows}
    assert pairs.startswith(f"Method and baseline {START}{said.split(' ')[0]} ")
    assert "(LDAM against ERM; LDAM-DRW against ERM)" in pairs


def test_threads_and_options_that_are_off_where_they_are_known_are_no_difference():
    records = changed(grid(), "ldam", device="cpu (threads: 2)", ema_decay=0.0, clip_grad=None)
    for each in records:
        each["device"] = each["device"].replace("cpu (", "cpu (x86, ")
    records = changed(records, "ce", device="cpu (x86, threads: 1)")
    assert warnings_of(records) == ("", {""}, "")


def test_what_an_option_that_is_off_would_have_is_no_difference():
    later = changed(grid(), "ldam", sam=0.0, sam_start="0", sam_every=1)
    assert warnings_of(later) == ("", {""}, "")
    both = [{**r, "options": {**r["options"], "sam": 0.05, "sam_start": "0"}} for r in grid()]
    off = [{**r, "options": {**r["options"], "sam": 0.0, "sam_start": "0"}} for r in grid()]
    assert row_caption([*off, *both]) == ("", "")  # a label
    on = changed(later, "ldam", sam=0.05)
    assert "sam_every" in warnings_of(on)[0]


def tuned(records, trials=6):
    """The records as they are when each method got a learning rate and a scale of its own."""
    records = copy.deepcopy(records)
    for each in records:
        rate = {"ce": 0.1, "ldam": 0.03}[each["options"]["loss"]]
        each["options"] |= {"lr": rate, "scale": 20.0}
        each["tuned"] = {"trials": trials, "values": {"lr": rate, "scale": 20.0}}
    return records


def test_tuned_methods_may_have_other_values_and_the_caption_says_how_many_trials():
    records = tuned(grid(lr=0.5, scale=None, head="cosine"))
    for caption in (
        row_caption(records),
        comparison_caption(records),
        *matrix_captions(records).values(),
    ):
        assert caption == ("Each method tuned: 6 trials.", "")


def test_tuning_of_some_methods_only_or_for_longer_is_warned_of():
    for others, word in (
        (grid(lr=0.5, scale=None), "-"),
        (tuned(grid(lr=0.5, scale=None), 3), "3 trials"),
    ):
        records = [r for r in others if r["options"]["loss"] == "ce"]
        records += [r for r in tuned(grid(lr=0.5, scale=None)) if r["options"]["loss"] == "ldam"]
        caption = row_caption(records)
        assert caption.note == ""
        assert f"tuned {word} (ERM; CE-DRW), 6 trials (LDAM; LDAM-DRW)" in caption.warning
        assert "tuned 6 trials against" in comparison_caption(records).warning


def test_the_warning_stands_in_the_report_and_in_the_documents(monkeypatch, tmp_path):
    records = changed(grid(lr=0.1), "ldam", lr=0.01)
    warning = row_caption(records).warning
    page = write_experiment(tmp_path, records).read_text()
    tables = (tmp_path / "results.md").read_text()
    assert f"**Warning:** {warning}" in tables
    assert f"<strong>Warning:</strong> {warning}" in page
    assert f"**Warning:** Method and baseline {START}lr" in tables
    monkeypatch.setattr(results_tables, "RESULTS", tmp_path)
    write_records(tmp_path / "own.jsonl", records)
    for kind in ([], ["intervals"]):
        assert results_tables.content("own", kind).endswith(f"\n\n**Warning:** {warning}")
    assert results_tables.content("own", ["compare", "erm"]).count("**Warning:**") == 1
    write_records(tmp_path / "own.jsonl", changed(grid(), "ldam", mixed_precision="no"))
    for kind in ("matrix", "matrices"):
        made = results_tables.content("own", [kind])
        assert made.count("**Warning:** Rows differ") == 1 + (kind == "matrices")


def test_older_records_have_both_errors_by_the_same_function(tmp_path):
    records = [record("ce", "none", seed, 20.0) for seed in (0, 1)]
    for each in records:
        each["test"]["per_class_accuracy"] = [1.0, 0.5, 0.5, 0.0]
        each["test"]["balanced_accuracy"] = 0.5
    before = json.dumps(records)
    write_records(tmp_path / "own.jsonl", records)
    write_experiment(tmp_path, records)
    assert json.dumps(records) == before
    prior = 100 * (1 - (COUNTS[0] + 0.5 * (COUNTS[1] + COUNTS[2])) / sum(COUNTS))
    titles, _, row = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (tmp_path / "results.md").read_text().split("\n")
        if line.startswith("|")
    ][:3]
    found = dict(zip(titles, row, strict=True))
    assert found["balanced error %"] == "50.0 ± 0.0"
    assert found["train-prior error %"] == f"{prior:.1f} ± 0.0"
    assert found["top-1 error %"] == "20.0 ± 0.0"
