import numpy as np
import pytest
from made_records import COUNTS, method, record
from scipy import stats

from ldam_plugins.benchmark.comparisons import comparisons
from ldam_plugins.benchmark.tables import comparison_rows


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


def test_a_method_is_compared_with_the_baseline_under_its_own_head():
    records = [
        *method("ce", "none", [30.0, 31.0], head="auto"),
        *method("ce", "none", [25.0, 26.0], head="cosine"),
        *method("ldam", "drw", [20.0, 20.8], head="auto"),
        *method("ldam", "drw", [28.0, 28.8], head="linear"),
    ]

    def rows(baseline):
        return [
            (row["against"], row["method"], row["head"])
            for row in comparison_rows(records, baseline)
        ]

    alike = [
        ("ERM, head cosine", "LDAM-DRW", "cosine"),
        ("ERM", "LDAM-DRW, head linear", "linear"),
    ]
    assert rows("erm") == alike
    linear = [
        ("ERM", "ERM, head cosine", "cosine against linear"),
        ("ERM", "LDAM-DRW", "cosine against linear"),
        ("ERM", "LDAM-DRW, head linear", "linear"),
    ]
    assert rows("erm:head=linear") == rows("erm:head=-") == linear
    assert rows("erm:head=cosine")[0] == ("ERM, head cosine", "ERM", "linear against cosine")
    del records[2:4]  # where the head was not run, the baseline is the one that there is
    assert rows("erm")[0] == ("ERM", "LDAM-DRW", "cosine against linear")


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


def test_both_errors_and_the_spread_of_the_differences_stand_in_the_table(records):
    for r in records:
        error = r["test"]["top1_error"] / 100
        if r["options"]["schedule"] == "drw":  # the head pays for the tail
            r["test"]["per_class_accuracy"] = [0.5, 1 - error, 1 - error, None]
    found = {c.method: c for c in comparisons(records, "erm")}
    first, second = (
        np.array([r["test"]["top1_error"] for r in records[at : at + 3]]) for at in (0, 9)
    )
    both = (50.0 + 2 * second) / 3 - first
    assert found["LDAM-DRW"].paired.deviation == pytest.approx(np.std(both, ddof=1))
    prior = (300 * 50.0 + 130 * second) / 430 - first
    assert found["LDAM-DRW"].prior.mean == pytest.approx(prior.mean())
    assert found["LDAM-DRW"].prior.half_width == pytest.approx(
        4.302653 * np.std(prior, ddof=1) / 3**0.5
    )
    row = comparison_rows(records, "erm")[-1]
    assert row["sd of differences"] == f"{np.std(both, ddof=1):.1f}"
    assert row["difference in train-prior error"].startswith(f"{prior.mean():+.1f} ± ")
    one = comparison_rows([r for r in records if r["options"]["seed"] == 0], "erm")[0]
    assert one["sd of differences"] == "-"
