import pytest
from made_records import method, record

from ldam_plugins.benchmark.settings import by_setting, varying_options


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
