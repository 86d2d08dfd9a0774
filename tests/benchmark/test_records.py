import copy
import csv
import io
import json
import re

import numpy as np
import pytest
from PIL import Image
from pyarrow import parquet
from scipy import stats

from ldam_plugins.benchmark.plots import PLOTS, digest, heat_map
from ldam_plugins.benchmark.records import (
    by_setting,
    collect_records,
    error_matrices,
    heads_of_losses,
    read_records,
    tidy_rows,
    to_csv,
    to_parquet,
    varying_options,
    write_record,
)
from ldam_plugins.benchmark.report import write_experiment
from ldam_plugins.benchmark.tables import (
    comparison_rows,
    comparisons,
    interval_rows,
    matrix_rows,
    range_rows,
    spread,
)

COUNTS = [300, 100, 30, 5]


def record(loss, schedule, seed, error, **options):
    accuracy = 1 - error / 100
    test = {
        "top1_error": error,
        "balanced_accuracy": accuracy,
        "worst_class_accuracy": accuracy / 2,
        "per_class_accuracy": [accuracy] * 3 + [None],
        **{"many": accuracy, "medium": accuracy, "few": None, "nll": 1.0, "ece": 0.1},
    }
    base = {"dataset": "digits", "ratio": 100.0, "max_margin": None, "mixup": 0.0}
    base |= {"loss": loss, "schedule": schedule, "seed": seed, "output_dir": f"runs/{seed}"}
    return {
        "name": f"{loss}_{schedule}_{'_'.join(map(str, options.values()))}_s{seed}",
        "command": f"python recipes/vision_lt.py --seed {seed}",
        "options": {**base, **options},
        "versions": {"torch": "2.6", "timm": None},
        "class_counts": COUNTS,
        "device": "cpu",
        "train_seconds": 60.0,
        "examples_per_second": 100.0,
        "test": test,
    }


def method(loss, schedule, errors, **options):
    return [record(loss, schedule, seed, e, **options) for seed, e in enumerate(errors)]


@pytest.fixture
def records():
    return [
        *method("ce", "none", [30.0, 31.0, 29.5]),
        *method("ce", "drw", [27.0, 28.4, 26.1]),
        *method("ldam", "none", [29.0, 32.0, 29.7]),
        *method("ldam", "drw", [20.0, 20.8, 19.9]),
    ]


def test_varying_options_are_what_tells_the_methods_apart(records):
    assert varying_options(records) == ["loss", "schedule"]
    records += method("ldam", "drw", [22.0], max_margin=0.3, mixup=0.2)
    assert varying_options(records) == ["loss", "schedule", "max_margin", "mixup"]
    runs = by_setting(records)
    assert [len(group) for group in runs.values()] == [3, 3, 3, 3, 1]
    assert ("ldam", "drw", 0.3, 0.2) in runs


def test_a_default_that_is_written_out_is_the_same_method():
    records = [record("ldam", "drw", 0, 20.0), record("ldam", "drw", 1, 21.0, max_margin=0.5)]
    assert len(by_setting(records)) == 1


def test_options_that_not_all_versions_know_do_not_tell_methods_apart(records):
    records[0]["options"]["new"] = True
    assert varying_options(records) == ["loss", "schedule"]


def test_the_same_run_twice_is_refused(records):
    with pytest.raises(ValueError, match=r"different runs, got .*'copy'.*Remove one"):
        by_setting([*records, {**records[0], "name": "copy"}])


def test_tables(records):
    row = next(r for r in range_rows(records) if (r["loss"], r["schedule"]) == ("ce", "none"))
    assert (row["seeds"], row["top-1 error %"]) == ("3", "30.2 (29.5..31.0)")
    row = next(r for r in interval_rows(records) if (r["loss"], r["schedule"]) == ("ce", "none"))
    assert row["top-1 error %"] == "30.2 ± 1.9"  # 4.3027 * 0.7638 / sqrt(3) = 1.897
    ((title, cells),) = error_matrices(records).items()
    assert title == ""
    assert matrix_rows(cells)[1]["drw"] == "20.2 ± 1.2 (n = 3)"
    assert spread([30.0, 32.04]) == "31.0 (30.0..32.0)"
    assert spread([0.1234], 3) == "0.123"
    for r in records:
        r["test"]["worst_class_accuracy"] = 0.0
    assert {row["worst class %"] for row in range_rows(records)} == {"0.0 (0.0..0.0)"}
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


def test_comparison_with_a_method_and_with_none_of_the_same_loss(records):
    found = {c.method: c for c in comparisons(records, "erm")}
    assert list(found) == ["CE-DRW", "LDAM", "LDAM-DRW"]
    assert found["LDAM-DRW"].paired.difference.mean == pytest.approx(-9.9333, abs=1e-3)
    assert (found["LDAM-DRW"].verdict, found["LDAM"].verdict) == (
        "less error",
        "not told from noise",
    )
    for r in records:
        r["test"]["top1_error"] = 50.0  # of a test set that is long-tailed itself
    found = {c.method: c for c in comparisons(records, "erm")}
    assert found["LDAM-DRW"].paired.difference.mean == pytest.approx(-9.9333, abs=1e-3)
    pairs = [(c.baseline, c.method) for c in comparisons(records, "*/none")]
    assert pairs == [("ERM", "CE-DRW"), ("LDAM", "LDAM-DRW")]
    pairs = [(c.baseline, c.method) for c in comparisons(records, "ldam/drw")]
    assert ("LDAM-DRW", "ERM") in pairs
    worse = comparisons(records, "ldam_drw")[0]
    assert (worse.method, worse.verdict) == ("ERM", "more error")
    for baseline, message in {
        "emr": "`baseline`.*Did you mean 'erm'",
        "lda/none": "`loss in baseline`.*Did you mean 'ldam'",
        "*/nonne": "`schedule in baseline`.*Did you mean 'none'",
    }.items():
        with pytest.raises(ValueError, match=message):
            comparisons(records, baseline)


def test_what_a_table_calls_detectable_is_after_the_correction_for_its_tests(records):
    one_pair = [record("focal", "none", 0, 25.0)]
    found = comparisons(records + one_pair, "erm")
    assert [entry.corrected is None for entry in found] == [False, True, False, False]
    for entry in (entry for entry in found if entry.corrected is not None):
        error = entry.paired.difference.half_width / 4.302653  # t of 2 degrees, 97.5 %
        critical = stats.t.isf(0.025 / 3, 2)
        power = stats.nct.sf(critical, 2, entry.paired.detectable / error)
        assert power == pytest.approx(0.8, abs=1e-3)


def test_only_equal_seeds_and_long_tails_are_paired(records):
    other_tail = method("ldam", "drw", [5.0, 5.0, 5.0], ratio=10.0)
    other_seeds = [record("focal", "none", seed, 25.0 + seed) for seed in (2, 3)]
    rows = comparison_rows(records + other_tail + other_seeds, "erm")
    found = {row["method"]: row for row in rows}
    assert "LDAM-DRW, ratio 10" not in found
    assert found["Focal, ratio 100"]["pairs"] == "1"
    assert found["Focal, ratio 100"]["difference in balanced error, points"] == "-2.5"
    assert found["Focal, ratio 100"]["says"] == "no test: one pair"


def test_runs_on_other_samples_of_one_set_are_not_paired(records):
    """The same options may have cut the classes in another order."""
    other = [{**r, "class_counts": COUNTS[::-1]} for r in method("focal", "none", [9.0, 9.5, 9.1])]
    assert "Focal" not in {c.method for c in comparisons(records + other, "erm")}
    assert len(comparisons(records + other, "erm")) == 3


def test_baseline_with_the_same_other_options_is_taken_where_there_is_one(records):
    mixed = [
        *method("ce", "none", [28.0, 28.5, 29.0], mixup=0.2),
        *method("ldam", "drw", [18.0, 19.0, 18.2], mixup=0.2),
        *method("ldam", "drw", [18.0, 18.5, 18.3], mixup=0.4),
    ]
    pairs = [(c.baseline, c.method) for c in comparisons(records + mixed, "erm")]
    assert ("ERM, mixup 0.2", "LDAM-DRW, mixup 0.2") in pairs
    assert ("ERM, mixup 0", "LDAM-DRW, mixup 0.2") not in pairs
    assert sum(method == "LDAM-DRW, mixup 0.4" for _, method in pairs) == 2


def test_options_choose_among_the_settings_of_a_baseline(records):
    margins = [0.1, 0.3]
    for margin in margins:
        records += method("ldam", "drw", [22.0 + margin, 22.5, 21.8], max_margin=margin)
    assert not [c for c in comparisons(records, "ldam_drw") if c.method.startswith("LDAM-DRW")]
    pairs = {(c.baseline, c.method) for c in comparisons(records, "ldam_drw:max_margin=-:mixup=0")}
    titles = ["LDAM-DRW, max_margin 0.1", "LDAM-DRW, max_margin 0.3", "ERM", "CE-DRW", "LDAM"]
    assert pairs == {("LDAM-DRW", title) for title in titles}
    with pytest.raises(ValueError, match=r"option in baseline.*Did you mean 'max_margin'"):
        comparisons(records, "ldam_drw:max_margn=0.1")


def test_csv_has_a_row_a_run(records):
    rows = list(csv.DictReader(io.StringIO(to_csv(tidy_rows(records)))))
    assert len(rows) == 12
    row = next(row for row in rows if row["name"] == "ldam_drw__s1")
    assert (float(row["top1_error"]), row["seed"], row["few"]) == (20.8, "1", "")
    assert (row["version_torch"], row["version_timm"]) == ("2.6", "")
    assert row["command"] == "python recipes/vision_lt.py --seed 1"
    assert float(row["train_seconds"]) == 60.0


def test_a_run_that_did_not_record_its_precision_is_of_unknown_precision(records, tmp_path):
    for name, precision in (("old", {}), ("new", {"mixed_precision": "no"})):
        (tmp_path / name).mkdir()
        metrics = {
            key: value for key, value in records[0].items() if key not in ("name", "command")
        }
        (tmp_path / name / "metrics.json").write_text(json.dumps({**metrics, **precision}))
    new, old = collect_records(tmp_path)
    assert (new["mixed_precision"], old["mixed_precision"]) == ("no", "unknown")
    old["options"]["seed"] = 7
    for kept in ([new, old], [new, {k: v for k, v in old.items() if k != "mixed_precision"}]):
        assert [row["mixed_precision"] for row in tidy_rows(kept)] == ["no", "unknown"]
    page = write_experiment(tmp_path / "page", kept).read_text()
    assert re.search(r"mixed precision.{1,99}no, unknown", page, re.DOTALL)


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
    ((_, cells),) = error_matrices(records[:12]).items()
    rows = matrix_rows(cells, heads_of_losses(records[:12]))
    assert [(row["loss"], row["head"]) for row in rows] == [("ce", "linear"), ("ldam", "cosine")]
    assert heads_of_losses(records) == {"ce": "cosine, linear", "ldam": "cosine"}


def test_parquet_holds_numbers_as_numbers(records):
    other = record("ldam", "drw", 7, 20.0, mixup=0.2, max_margin=0.3)
    other["versions"] = {"torch": "2.6", "peft": "0.17"}
    tidy = tidy_rows([*records, other])
    table = parquet.read_table(io.BytesIO(to_parquet(tidy))).to_pylist()
    rows = {row["name"]: row for row in table}
    assert len(rows) == 13
    found = rows["ldam_drw_0.2_0.3_s7"]
    assert (found["top1_error"], found["mixup"], found["max_margin"]) == (20.0, 0.2, 0.3)
    assert (found["version_peft"], found["few"], found["seed"]) == ("0.17", None, 7)
    assert (rows["ce_none__s1"]["max_margin"], rows["ce_none__s1"]["version_peft"]) == (None, None)
    assert list(csv.DictReader(io.StringIO(to_csv(tidy)))) == [
        {name: "" if value is None else str(value) for name, value in row.items()} for row in table
    ]


def test_records_are_read_as_they_were_written(records, tmp_path):
    for entry in records:
        write_record(tmp_path, entry)
    assert read_records(tmp_path) == sorted(records, key=lambda r: r["name"])
    assert len((tmp_path / "ce_none__s0.json").read_text().splitlines()) == 11
    (tmp_path / "torn.json").write_text(json.dumps({"options": {}}))
    with pytest.raises(ValueError, match=r"torn\.json.*whole record.*'test'"):
        read_records(tmp_path)
    with pytest.raises(ValueError, match="folder with results"):
        read_records(tmp_path / "none")


def test_report_holds_everything_and_needs_nothing(records, tmp_path):
    page = write_experiment(
        tmp_path, records, failed={"bad_s0": "exit code 1\n<b>boom</b>"}, baseline="*/none"
    )
    text = page.read_text()
    assert "&lt;b&gt;boom&lt;/b&gt;" in text
    assert "<b>boom" not in text
    assert not re.search(r"<script|src=\"http|href=", text)
    assert text.count("data:image/png;base64,") == 6
    assert "30.2 ± 1.9" in text
    left = sorted(path.name for path in tmp_path.iterdir())
    plots = [f"{name}.png" for name in PLOTS]
    assert left == sorted(
        [*plots, "report.html", "results", "results.csv", "results.md", "results.parquet"]
    )
    tables = (tmp_path / "results.md").read_text()
    assert "## Failed" in tables
    assert "| LDAM-DRW | LDAM " in tables
    assert read_records(tmp_path / "results") == sorted(records, key=lambda r: r["name"])


def test_plots_tell_what_they_were_drawn_from(records):
    for _, draw in PLOTS.values():
        light, dark = draw(records), draw(records, dark=True)
        with Image.open(io.BytesIO(light)) as plot:
            assert plot.info["Results"] == digest(records)
            assert plot.size[0] == 1200
        assert light != dark
    changed = copy.deepcopy(records)
    changed[0]["test"]["top1_error"] += 1
    assert digest(changed) != digest(records)
    assert digest(records[::-1]) == digest(records)
    with pytest.raises(ValueError, match="two losses"):
        heat_map(records[:3])


def test_curve_goes_from_head_to_tail_whatever_the_order_of_classes(records):
    from ldam_plugins.benchmark.plots import _curve

    run = copy.deepcopy(records[0])
    run["class_counts"] = [5, 300, 30]
    run["test"]["per_class_accuracy"] = [0.1, 0.9, None]
    places, accuracy = _curve([run])
    assert (places.tolist(), accuracy.tolist()) == ([0, 2], [90.0, 10.0])
    run["class_counts"] = list(range(100, 0, -1))
    run["test"]["per_class_accuracy"] = np.linspace(1, 0, 100).tolist()
    places, accuracy = _curve([run])
    assert len(places) == 25
    assert accuracy[0] == pytest.approx(100 * np.linspace(1, 0, 100)[:4].mean())
