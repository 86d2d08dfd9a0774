import re

from ldam_plugins.benchmark.plots import PLOTS
from ldam_plugins.benchmark.records import read_records
from ldam_plugins.benchmark.report import write_experiment


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
        [*plots, "report.html", "results.csv", "results.jsonl", "results.md", "results.parquet"]
    )
    tables = (tmp_path / "results.md").read_text()
    assert "## Failed" in tables
    assert "| LDAM-DRW | LDAM " in tables
    assert read_records(tmp_path / "results.jsonl") == sorted(records, key=lambda r: r["name"])
