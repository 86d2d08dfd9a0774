import json
import re

import pytest

from ldam_plugins.benchmark.records import add_records, collect_records, read_records, write_records
from ldam_plugins.benchmark.report import write_experiment
from ldam_plugins.benchmark.tables import tidy_table


def test_records_are_read_as_they_were_written(records, tmp_path):
    path = tmp_path / "own.jsonl"
    write_records(path, records[::-1])
    assert read_records(path) == sorted(records, key=lambda r: r["name"])
    assert len(path.read_text().splitlines()) == len(records)
    first = json.loads(path.read_text().splitlines()[0])
    assert list(first) == list(records[0])
    assert list(first["options"]) == list(records[0]["options"])


def test_a_line_may_hold_every_sign_and_every_digit(records, tmp_path):
    records[0]["class_names"] = ["a\nb", "c\u2028d", "e\x85f", "猫"]
    records[0]["train_seconds"] = 0.1 + 0.2
    write_records(tmp_path / "own.jsonl", records)
    assert read_records(tmp_path / "own.jsonl") == sorted(records, key=lambda r: r["name"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"options": {}}', r"torn\.jsonl, line 2` must be a whole record.*'test'"),
        ('{"name": "a", "opt', r"torn\.jsonl, line 2 is not JSON"),
    ],
)
def test_lines_that_are_no_records_are_named(records, tmp_path, line, message):
    path = tmp_path / "torn.jsonl"
    write_records(path, records[:1])
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_records(path)


def test_a_table_of_records_must_be_there_and_hold_some(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl"):
        read_records(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match="`experiment` must be a file with a record a line"):
        read_records(tmp_path / "empty.jsonl")


def test_records_are_added_and_those_of_the_same_name_replaced(records, tmp_path):
    path = tmp_path / "own.jsonl"
    add_records(path, records[2:])
    newer = {**records[3], "device": "another"}
    add_records(path, [*records[:3], newer])
    assert read_records(path) == sorted(
        [*records[:3], newer, *records[4:]], key=lambda r: r["name"]
    )


def test_records_are_without_the_intervals_of_single_classes(records, tmp_path):
    metrics = {key: value for key, value in records[0].items() if key not in ("name", "command")}
    intervals = {"top1_error": [1.0, 2.0], "per_class_f1": [[0.1, 0.2]] * 4}
    (tmp_path / "new").mkdir()
    metrics["test"] = {**metrics["test"], "intervals": intervals}
    metrics["validation"] = {"nll": 1.0}
    (tmp_path / "new" / "metrics.json").write_text(json.dumps(metrics))
    (found,) = collect_records(tmp_path)
    assert found["test"] == {**metrics["test"], "intervals": {"top1_error": [1.0, 2.0]}}
    assert found["validation"] == {"nll": 1.0}


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
        assert tidy_table(kept)["mixed_precision"].tolist() == ["no", "unknown"]
    page = write_experiment(tmp_path / "page", kept).read_text()
    assert re.search(r"mixed precision.{1,99}no, unknown", page, re.DOTALL)
