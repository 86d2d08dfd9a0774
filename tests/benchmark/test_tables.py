import copy
import csv
import io

from made_records import method, record
from pyarrow import parquet

from ldam_plugins.benchmark.captions import row_caption
from ldam_plugins.benchmark.settings import heads_of_losses
from ldam_plugins.benchmark.tables import (
    comparison_rows,
    error_matrices,
    grid_rows,
    interval_rows,
    matrix_heads,
    matrix_rows,
    range_rows,
    spread,
    tidy_table,
)


def test_tables(records):
    row = next(r for r in range_rows(records) if (r["loss"], r["schedule"]) == ("ce", "none"))
    assert (row["seeds"], row["balanced error % (= top-1)"]) == ("3", "30.2 (29.5..31.0)")
    row = next(r for r in interval_rows(records) if (r["loss"], r["schedule"]) == ("ce", "none"))
    assert row["balanced error % (= top-1)"] == "30.2 ± 1.9"  # 4.3027 * 0.7638 / sqrt(3) = 1.897
    ((title, matrix),) = error_matrices(records).items()
    assert title == ""
    assert matrix_rows(matrix)[1]["drw"] == "20.2 ± 1.2 (n = 3)"
    assert spread([30.0, 32.04]) == "31.0 (30.0..32.0)"
    assert spread([0.1234], 3) == "0.123"
    for r in records:
        r["test"]["worst_class_accuracy"] = 0.0
    assert {row["worst class: accuracy %"] for row in range_rows(records)} == {"0.0 (0.0..0.0)"}
    assert {row["ece"] for row in interval_rows(records)} == {"0.100 ± 0.000"}


def test_schedules_come_in_their_own_order(records):
    records += method("ce", "rs", [28.0]) + method("ce", "rw", [28.0])
    found = [row["schedule"] for row in range_rows(records)]
    assert found == ["none", "rw", "rs", "drw", "none", "drw"]


def test_matrices_are_where_there_is_something_to_compare(records):
    assert error_matrices([r for r in records if r["options"]["loss"] == "ce"]) == {}
    assert error_matrices(method("ce", "none", [1.0]) + method("ldam", "drw", [2.0])) == {}
    mixed = [copy.deepcopy(r) for r in records]
    for r in mixed:
        r["options"]["mixup"] = 0.2
    assert list(error_matrices(records + mixed)) == ["mixup 0", "mixup 0.2"]


def test_every_table_names_the_heads(records):
    records += method("ce", "none", [25.0, 25.5, 26.0], head="cosine")
    for other in records[:12]:
        other["options"]["head"] = "auto"
    found = [(row["loss"], row["schedule"], row["head"]) for row in range_rows(records)]
    assert found == [
        ("ce", "none", "linear"),
        ("ce", "none", "cosine"),
        ("ce", "drw", "linear"),
        ("ldam", "none", "cosine"),
        ("ldam", "drw", "cosine"),
    ]
    rows = {row["method"]: row["head"] for row in comparison_rows(records[:12], "erm")}
    assert rows == {
        "CE-DRW": "linear",
        "LDAM": "cosine against linear",
        "LDAM-DRW": "cosine against linear",
    }
    ((_, matrix),) = error_matrices(records[:12]).items()
    rows = matrix_rows(matrix, heads_of_losses(records[:12]))
    assert [(row["loss"], row["head"]) for row in rows] == [("ce", "linear"), ("ldam", "cosine")]
    assert heads_of_losses(records) == {"ce": "cosine, linear", "ldam": "cosine"}


def test_a_matrix_has_one_head_where_losses_were_run_under_both():
    records = []
    for loss in ("ce", "ldam"):
        for kind in ("none", "drw"):
            for head in ("linear", "cosine"):
                records += method(loss, kind, [20.0, 21.0], head=head)
    matrices, heads = error_matrices(records), matrix_heads(records)
    assert list(matrices) == ["head linear", "head cosine"]
    for title, matrix in matrices.items():
        rows = matrix_rows(matrix, heads[title])
        assert [row["loss"] for row in rows] == ["ce", "ldam"]
        assert {row["head"] for row in rows} == {title.removeprefix("head ")}


def test_csv_has_a_row_a_run(records):
    rows = list(csv.DictReader(io.StringIO(tidy_table(records).to_csv(index=False))))
    assert len(rows) == 12
    row = next(row for row in rows if row["name"] == "ldam_drw__s1")
    assert (float(row["top1_error"]), row["seed"], row["few"]) == (20.8, "1", "")
    assert (row["version_torch"], row["version_timm"]) == ("2.6", "")
    assert row["command"] == "python recipes/vision_lt.py --seed 1"
    assert float(row["train_seconds"]) == 60.0


def test_parquet_holds_numbers_as_numbers(records):
    other = record("ldam", "drw", 7, 20.0, mixup=0.2, max_margin=0.3)
    other["versions"] = {"torch": "2.6", "peft": "0.17"}
    tidy = tidy_table([*records, other])
    table = parquet.read_table(io.BytesIO(tidy.to_parquet(index=False))).to_pylist()
    rows = {row["name"]: row for row in table}
    assert len(rows) == 13
    found = rows["ldam_drw_0.2_0.3_s7"]
    assert (found["top1_error"], found["mixup"], found["max_margin"]) == (20.0, 0.2, 0.3)
    assert (found["version_peft"], found["few"], found["seed"]) == ("0.17", None, 7)
    assert (rows["ce_none__s1"]["max_margin"], rows["ce_none__s1"]["version_peft"]) == (None, None)
    assert list(csv.DictReader(io.StringIO(tidy.to_csv(index=False)))) == [
        {name: "" if value is None else str(value) for name, value in row.items()} for row in table
    ]


def test_tables_show_what_was_tuned_and_keep_a_method_in_one_row():
    rates = {0: 0.1, 1: 0.3}
    records = [record("ce", "none", seed, 20.0, lr=rate) for seed, rate in rates.items()]
    for r in records:
        r["tuned"] = {"trials": 6, "values": {"lr": r["options"]["lr"]}}
    (row,) = interval_rows(records)
    assert row["tuned to"] == "lr 0.1; lr 0.3"
    assert "lr" not in row
    assert tidy_table(records)["tuned_lr"].tolist() == [0.1, 0.3]
    records += [record("ce", "none", 0, 21.0, lr=0.5)]
    rows = interval_rows(records)
    assert [(row["tuned"], row["seeds"], row["tuned to"]) for row in rows] == [
        ("6 trials", "2", "lr 0.1; lr 0.3"),
        ("-", "1", "-"),
    ]


def test_an_option_that_one_method_was_tuned_for_and_another_does_not_use_is_no_column():
    records = [record("ce", "none", 0, 20.0, lr=0.1, beta=0.9999)]
    records += [record("ce", "drw", 0, 19.0, lr=0.3, beta=0.9)]
    for r, values in zip(records, ({"lr": 0.1}, {"lr": 0.3, "beta": 0.9}), strict=True):
        given = {"lr": 0.1, "beta": 0.9999}
        given = {name: given[name] for name in values}
        r["tuned"] = {"trials": 6, "values": values, "given": given}
    for row in interval_rows(records):
        assert not {"beta", "lr"} & set(row)
    assert [entry["against"] for entry in comparison_rows(records)] == ["ERM"]
    assert not row_caption(records).warning


def test_a_column_of_a_group_without_a_class_is_left_out_and_top1_where_it_says_no_more(records):
    titles = list(range_rows(records)[0])
    assert titles[4:] == [
        "balanced error % (= top-1)",
        "train-prior error %",
        "many: accuracy %",
        "medium: accuracy %",
        "worst class: accuracy %",
        "ece",
    ]
    records[0]["test"]["top1_error"] += 1
    assert list(range_rows(records)[0])[4:7] == [
        "balanced error %",
        "train-prior error %",
        "top-1 error %",
    ]
    assert {"balanced_error", "train_prior_error"} < set(tidy_table(records))


def test_metrics_that_older_records_lack_are_shown_where_a_row_has_them(records):
    assert not {"macro_f1", "auroc"} & set(tidy_table(records))
    for r in records[:4]:
        r["test"] |= {"macro_f1": 0.5, "auroc": 0.75}
    rows = {(row["loss"], row["schedule"]): row for row in range_rows(records)}
    first, second = rows["ce", "none"], rows["ce", "drw"]
    assert (first["macro F1 %"], first["AUROC %"]) == ("50.0 (50.0..50.0)", "75.0 (75.0..75.0)")
    assert (second["macro F1 %"], second["AUROC %"]) == ("-", "-")
    assert "average precision %" not in first
    assert tidy_table(records)["macro_f1"].notna().sum() == 4


def test_matrices_are_of_either_error(records):
    for r in records:
        r["test"]["per_class_accuracy"] = [1.0, 0.0, 0.0, 0.0]
    for view, error in {"balanced_error": 75.0, "train_prior_error": 100 * (1 - 300 / 435)}.items():
        ((_, matrix),) = error_matrices(records, view).items()
        assert round(matrix.loc["ce", "drw"].mean, 9) == round(error, 9)


def test_a_grid_is_one_table_with_what_was_adjusted_afterwards_beside_it():
    records = [
        *method("ldam", "rw", [12.0], head="cosine", max_margin=0.3, posthoc_tau=0.0),
        *method("ldam", "rw", [14.0], head="cosine", max_margin=0.5, posthoc_tau=0.0),
        *method("ce", "none", [20.0, 22.0], head="cosine", posthoc_tau=0.0),
        *method("ce", "none", [13.0, 15.0], head="cosine", posthoc_tau=1.0),
        *method("ce", "none", [25.0], head="linear", posthoc_tau=0.0),
    ]
    rows = grid_rows(records)
    titles = ["head", "loss", "max_margin", "none", "none, adjusted afterwards", "rw"]
    assert [list(row) for row in rows] == [titles] * 4
    assert [tuple(row.values()) for row in rows] == [
        ("linear", "ce", "-", "25.0", "-", "-"),
        ("cosine", "ce", "-", "21.0 ± 12.7", "14.0 ± 12.7", "-"),
        ("cosine", "ldam", "0.3", "-", "-", "12.0"),
        ("cosine", "ldam", "0.5", "-", "-", "14.0"),
    ]
