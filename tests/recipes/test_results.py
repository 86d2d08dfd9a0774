import json
import re
from collections import Counter

import numpy as np
import pytest
import results_tables
from PIL import Image
from study_options import TablesOptions

from ldam_plugins.benchmark.grid import METHODS
from ldam_plugins.benchmark.plots import digest
from ldam_plugins.benchmark.records import read_records, write_records
from ldam_plugins.benchmark.statistics import paired_comparison
from ldam_plugins.losses import list_losses, loss_class
from ldam_plugins.training.command_line import parse_flags

EXPERIMENTS = results_tables.experiments()
TEXTS = {path: path.read_text() for path in results_tables.DOCUMENTS}
TEXT = "\n".join(TEXTS.values())


@pytest.mark.parametrize("document", TEXTS)
def test_documents_hold_the_committed_results(document):
    assert results_tables.fill(TEXTS[document], document.parent) == TEXTS[document]


@pytest.mark.parametrize("document", TEXTS)
def test_documents_point_to_what_is_there(document):
    for place, _, anchor in re.findall(r"\]\((?!http)([^)#]+)(#([^)]+))?\)", TEXTS[document]):
        path = document.parent / place
        assert path.exists(), place
        headings = re.findall(r"^#+ (.*)", path.read_text(), re.M) if anchor else []
        slugs = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]
        assert not anchor or anchor in slugs, anchor


def test_documents_show_every_experiment():
    assert set(re.findall(r"<!-- results: (\w+)", TEXT)) == set(EXPERIMENTS)


@pytest.mark.parametrize("kind", ["timings", "probes"])
def test_documents_show_every_file(kind):
    shown = set(re.findall(rf"<!-- {kind}: (\w+)", TEXT))
    assert shown == {path.stem for path in (results_tables.RESULTS.parent / kind).iterdir()}


def test_probes_are_before_the_switch_and_at_the_end(monkeypatch, tmp_path):
    lines = ["loss,schedule,epochs,when,top1_error,few,top1_error_of_run"]
    lines += ["ce,drw,8,before,5,0.5,20", "ce,drw,9,after,4,0.6,20", "ce,drw,10,after,3,0.7,20"]
    lines += ["ce,drw,8,before,7,0.5,22", "ce,drw,10,after,3.5,0.9,22", "ce,rw,10,after,9,0.1,30"]
    lines += ["ce,rw,8,before,8,0.2,30"]
    (tmp_path / "own.csv").write_text("\n".join(lines))
    monkeypatch.setattr(results_tables, "PROBES", tmp_path)
    reweighted, deferred = results_tables.probe_table("own").split("\n")[2:]
    cells = [cell.strip() for cell in deferred.split("|")[1:-1]]
    numbers = ["6.0 (5.0..7.0)", "50.0 (50.0..50.0)", "3.2 (3.0..3.5)", "80.0 (70.0..90.0)"]
    assert cells == ["ce", "drw", *numbers, "21.0 (20.0..22.0)"]
    assert [c.strip() for c in reweighted.split("|")[3:-1]] == [
        "8.0",
        "20.0",
        "9.0",
        "10.0",
        "30.0",
    ]
    assert "| rw " not in results_tables.probe_table("own", ["drw"])


def test_timings_are_chosen_by_section(monkeypatch, tmp_path):
    row = {"peer": "theirs", "ours_seconds": 0.5, "peer_seconds": 1.0, "note": "5 MB"}
    row |= {"ratio_median": 0.5, "ratio_min": 0.4, "ratio_max": 0.625}
    losses = [
        {"section": "loss", "what": f"LDAM {kind}, 8 x {classes}, float32", **row}
        for classes in (2, 3)
        for kind in ("plain", "soft")
    ]
    head = {"section": "head", "what": "a head", **row}
    (tmp_path / "own.json").write_text(json.dumps({"rows": [*losses, head]}))
    monkeypatch.setattr(results_tables, "TIMINGS", tmp_path)

    def filled(marker):
        lines = results_tables.fill(f"<!-- timings: {marker} -->\nold\n<!-- end -->\n").split("\n")
        return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[1:-2]]

    half = "0.50 (0.40..0.62)"
    assert filled("own head")[2:] == [["head", "a head", "theirs", "0.5 s", "1 s", half, "5 MB"]]
    titles, _, *rows = filled("own loss")
    assert titles == ["", "LDAM plain", "LDAM soft"]
    assert rows == [[f"8 x {classes}, float32", half, half] for classes in (2, 3)]
    assert len(filled("own head loss")) == 7
    with pytest.raises(ValueError, match=r"`section` must be.*Did you mean 'head'"):
        filled("own heads")


def check_plot(path, experiment):
    with Image.open(path) as plot:
        drawn_from = plot.info["Results"]
    records = read_records(results_tables.records_path(experiment))
    assert drawn_from == digest(records), f"{path} is of other results: run --write"


def test_plots_of_the_documents_are_of_the_committed_results():
    for experiment, kind in results_tables.plots_of(TEXT):
        check_plot(results_tables.plot_path(experiment, kind), experiment)


def tables_of(kind):
    """Experiment, words and rows of each table of the documents that is made from results."""
    marked = re.findall(rf"<!-- {kind}: (\w+)(.*?) -->\n(.*?)<!-- end -->", TEXT, re.DOTALL)
    for experiment, words, body in marked:
        for part in body.strip().split("\n\n"):
            rows = [re.split(r"\s+\|\s+", line.strip("| ")) for line in part.split("\n")]
            if len(rows) > 1:
                yield experiment, words, [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


MARGINS = {name for name in list_losses() if loss_class(name).needs_cosine_head}
"""The losses that are of cosines; the others are trained with a linear head unless told."""


def test_every_row_of_results_names_its_head():
    seen = set()
    for experiment, words, rows in tables_of("results"):
        records = read_records(results_tables.records_path(experiment))
        for row in rows:
            if "experiment" in row:  # a row goes from the one head to the other
                continue
            if "set" in row:  # all rows are of one method
                continue
            if "loss" in row:
                alike = [run for run in records if run["options"]["loss"] == row["loss"]]
                if "schedule" in row:
                    kind = row["schedule"]
                    alike = [run for run in alike if run["options"]["schedule"] == kind]
                assert row["head"] in set(map(head_told, alike)), (experiment, words, row)
            else:
                heads = [head_by_title(row[column]) for column in ("method", "against")]
                expected = " against ".join(dict.fromkeys(heads))
                assert row["head"] == expected, (experiment, words, row)
            seen.add(row["head"])
    assert seen >= {"cosine", "linear", "cosine against linear"}


def head_told(run):
    """The head that the options of a run say, by what ``auto`` means for its loss."""
    word = run["options"].get("head", "auto")
    return ("cosine" if run["options"]["loss"] in MARGINS else "linear") if word == "auto" else word


def head_by_title(title):
    """The head that the title of a method names, else that of its loss."""
    named = re.search(r", head (linear|cosine)", title)
    if named:
        return named[1]
    name = title.split(",")[0]
    losses = {method.title: method.loss for method in METHODS.values()}
    return "cosine" if losses.get(name, name.split(" / ")[0]) in MARGINS else "linear"


def test_the_readme_says_that_head_and_loss_are_not_told_apart():
    readme, measurements = (" ".join(text.split()) for text in TEXTS.values())
    assert "Rows with different heads do not compare losses" in readme
    assert (
        "Of rows with different heads the difference is that of loss and head together"
        in measurements
    )
    words = " ".join(TEXT.split())
    assert not re.search(r"LDAM-DRW is (nearly|far)", words)


def test_every_record_holds_its_precision_or_that_it_is_unknown():
    found = Counter(
        record["mixed_precision"]
        for experiment in EXPERIMENTS
        for record in read_records(results_tables.records_path(experiment))
    )
    assert set(found) <= {"bf16", "fp16", "no", "unknown"}
    counted = f"bf16 autocast in {found['bf16']} of {sum(found.values()):,}, full precision in "
    counted += f"{found['no']}, and `unknown` in the other {found['unknown']},"
    assert counted in " ".join(TEXT.split())


def test_no_figure_is_of_the_jpeg_copy_of_cifar10():
    for experiment in EXPERIMENTS:
        for record in read_records(results_tables.records_path(experiment)):
            if "cifar10" in record["options"]["dataset"]:  # those of the copy knew no precision
                assert record["mixed_precision"] != "unknown"
    for path in results_tables.TIMINGS.glob("*.json"):
        kept = json.loads(path.read_text())
        assert kept.get("options", {}).get("only") != ["vision"]


def test_the_papers_run_is_told_as_it_came_out():
    (run,) = read_records(results_tables.records_path("cifar10_paper"))
    assert (run["options"]["epochs"], run["options"]["start"]) == (200, "160")
    error = run["test"]["top1_error"]
    readme, measurements = (" ".join(text.split()) for text in TEXTS.values())
    assert f"errs {error:.1f} % here (one run) and 22.97 % in the paper" in readme
    assert f"The paper has 22.97 for it (table 2): {error - 22.97:.1f} points less" in measurements


def test_the_two_ways_of_dropout_are_compared_as_the_package_compares():
    def errors(way):
        records = read_records(results_tables.records_path(f"banking77_{way}_dropout"))
        runs = {run["options"]["seed"]: run for run in records}
        return [100 * (1 - runs[seed]["test"]["balanced_accuracy"]) for seed in range(5)]

    found = paired_comparison(errors("own"), errors("fast"))
    mean, half, _ = found.difference
    said = f"has {mean:+.1f} ± {half:.1f} points of balanced error more, p = {found.p_value:.2f}: "
    said += f"not told from noise; {found.detectable:.1f} points would have been"
    assert found.p_value > 0.05
    assert said in " ".join(TEXT.split())
    assert "Welch" not in TEXT


def test_what_the_loss_is_divided_by_is_said_of_each_recipe():
    words = " ".join((results_tables.RESULTS.parent / "README.md").read_text().split())
    assert (
        "the vision recipe divides the loss by the sum of the weights of the whole batch" in words
    )
    assert (
        "`Trainer` by the number of its items times the mean weight of a training sample" in words
    )


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_results_are_whole_runs(experiment):
    for run in read_records(results_tables.records_path(experiment)):
        accuracy = run["test"]["per_class_accuracy"]
        assert run["test"]["balanced_accuracy"] == pytest.approx(np.mean(accuracy))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_kept_records_are_in_the_order_in_which_they_are_written(experiment, tmp_path):
    path = results_tables.records_path(experiment)
    write_records(tmp_path / path.name, read_records(path))
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()


def test_markers_choose_what_is_shown(monkeypatch, tmp_path):
    def filled(marker):
        return results_tables.fill(f"<!-- results: {marker} -->\nold\n<!-- end -->\n")

    assert "27.2 (22.4..30.0)" in filled("digits_lt")
    assert "27.2 ± 10.4" in filled("digits_lt intervals")
    assert "| LDAM-DRW | ERM " in filled("digits_lt compare")
    assert "| ERM      | LDAM-DRW " in filled("digits_lt compare ldam_drw")
    assert "](digits_lt/errors.png)" in filled("digits_lt errors")
    assert "| ldam " not in filled("digits_lt schedule=none")
    assert filled("digits_lt intervals seed=0,2 loss=ce").count("| 2 ") == 1
    compared = filled("digits_lt compare loss=ldam,ce ldam_drw:beta=0.9999 seed=0,1")
    assert re.search(r"\| ERM +\| LDAM-DRW +\| 2 ", compared)
    for marker, message in {
        "digits_lt interval": "Did you mean 'intervals'",
        "digits_lt intervals erm": "those of 'intervals'",
        "digits_lt sed=1": "Did you mean 'seed'",
        "digits_lt seed=7": "options that some runs have",
    }.items():
        with pytest.raises(ValueError, match=message):
            filled(marker)


def run_main(*arguments):
    results_tables.main(parse_flags(TablesOptions, [*map(str, arguments)]))


def test_write_draws_the_plots_a_text_shows(monkeypatch, tmp_path):
    results, readme = tmp_path / "recipes" / "results", tmp_path / "README.md"
    results.mkdir(parents=True)
    kept = read_records(results_tables.records_path("digits_lt"))
    readme.write_text("<!-- results: digits_lt errors -->\n<!-- end -->\n")
    monkeypatch.setattr(results_tables, "RESULTS", results)
    monkeypatch.setattr(results_tables, "DOCUMENTS", [readme])
    write_records(results / "digits_lt.jsonl", kept)
    run_main("--write")
    assert "(recipes/results/digits_lt/errors.png)" in readme.read_text()
    plot = results / "digits_lt" / "errors.png"
    check_plot(plot, "digits_lt")
    write_records(results / "digits_lt.jsonl", kept[1:])
    with pytest.raises(AssertionError, match="of other results"):
        check_plot(plot, "digits_lt")


def test_records_of_a_grid_are_added_to_an_experiment(monkeypatch, tmp_path, capsys):
    kept = read_records(results_tables.records_path("digits_lt"))
    monkeypatch.setattr(results_tables, "RESULTS", tmp_path)
    write_records(tmp_path / "results.jsonl", kept[:4])
    run_main("--add", "own", tmp_path / "results.jsonl")
    write_records(tmp_path / "results.jsonl", kept[3:])
    run_main("--add", "own", tmp_path / "results.jsonl")
    assert read_records(tmp_path / "own.jsonl") == kept
    assert capsys.readouterr().out == ""
    (tmp_path / "results.jsonl").unlink()
    run_main()
    assert capsys.readouterr().out.startswith("own\n\n| loss ")
