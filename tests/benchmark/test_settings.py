import pytest
from made_records import method, record

from ldam_plugins.benchmark.settings import by_setting, head_of, shown, varying_options


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


def test_the_head_of_a_run_is_what_its_options_and_its_loss_say():
    for loss, own in (("ce", "linear"), ("ldam", "cosine")):
        for word, head in (("auto", own), ("linear", "linear"), ("cosine", "cosine")):
            assert head_of(record(loss, "none", 0, 9.0, head=word)) == head
    assert head_of(record("ldam", "none", 0, 9.0)) == "cosine"  # of before the option


def test_a_head_and_scale_that_are_written_out_are_the_same_method():
    def alike(loss, first, second):
        pair = [record(loss, "drw", 0, 20.0, **first), record(loss, "drw", 1, 21.0, **second)]
        return len(by_setting(pair)) == 1

    auto, linear, cosine = ({"head": word, "scale": None} for word in ("auto", "linear", "cosine"))
    assert alike("ldam", auto, cosine)
    assert alike("ce", auto, linear)
    assert not alike("ldam", auto, linear)
    assert not alike("ce", auto, cosine)
    assert alike("ldam", linear, {**linear, "scale": 1.0})
    assert not alike("ldam", linear, {**linear, "scale": 30.0})
    assert alike("ce", cosine, {**cosine, "scale": 30.0})
    assert not alike("ce", cosine, {**cosine, "scale": 20.0})


def test_a_precision_is_the_one_that_auto_stood_for():
    given = record("ldam", "drw", 0, 20.0, mixed_precision="bf16") | {"mixed_precision": "bf16"}
    chosen = record("ldam", "drw", 1, 21.0, mixed_precision="auto") | {"mixed_precision": "bf16"}
    other = record("ldam", "drw", 1, 22.0, mixed_precision="auto") | {"mixed_precision": "no"}
    before = record("ldam", "drw", 2, 23.0, mixed_precision="auto")
    assert len(by_setting([given, chosen])) == 1
    assert len(by_setting([given, other])) == 2
    assert len(by_setting([given, before])) == 2
    assert len(by_setting([chosen, {**other, "options": chosen["options"] | {"seed": 2}}])) == 1


def test_options_that_not_all_versions_know_do_not_tell_methods_apart(records):
    records[0]["options"]["new"] = True
    assert varying_options(records) == ["loss", "schedule"]


def test_the_same_run_twice_is_refused(records):
    with pytest.raises(ValueError, match=r"different runs, got .*'copy'.*Remove one"):
        by_setting([*records, {**records[0], "name": "copy"}])


def test_values_are_shown_for_people():
    values = (None, [], (), 0, 0.1, [32, 36], "auto")
    assert [shown(value) for value in values] == ["-", "-", "-", "0", "0.1", "32 36", "auto"]
