"""Write the tables of README.md from the results under ``recipes/results``.

    python recipes/results_tables.py            # print them
    python recipes/results_tables.py --write    # put them into README.md

A folder of results is one experiment; each file in it is the ``metrics.json`` of one run.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parents[1] / "README.md"
COLUMNS = {
    "top-1 error %": ("top1_error", 1.0),
    "balanced accuracy %": ("balanced_accuracy", 100.0),
    "worst class %": ("worst_class_accuracy", 100.0),
    "ece": ("ece", 1.0),
}


def load(experiment: str) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Runs of an experiment by (loss, schedule), in order of the seed."""
    runs = defaultdict(list)
    for path in sorted((RESULTS / experiment).glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        runs[run["options"]["loss"], run["options"]["schedule"]].append(run)
    return dict(sorted(runs.items()))


def table(experiment: str) -> str:
    """Markdown table of an experiment: mean (least..largest over the seeds) of each method."""
    rows = []
    for (loss, schedule), runs in load(experiment).items():
        row = {"loss": loss, "schedule": schedule, "seeds": len(runs)}
        for title, (key, factor) in COLUMNS.items():
            row[title] = spread([factor * run["test"][key] for run in runs])
        rows.append(row)
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def spread(values: list[float]) -> str:
    """Mean and range of the values of several seeds."""
    digits = 3 if max(values) < 1 else 1
    mean = f"{np.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} ({min(values):.{digits}f}..{max(values):.{digits}f})"


def fill(text: str) -> str:
    """The text with every table between its markers made anew."""

    def fresh(match: re.Match[str]) -> str:
        return f"{match[1]}\n{table(match[2])}\n{match[3]}"

    pattern = r"(<!-- results: (\w+) -->)\n.*?(<!-- end -->)"
    return re.sub(pattern, fresh, text, flags=re.DOTALL)


def main() -> None:
    """Print the tables, or write them into the README."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write into README.md")
    if parser.parse_args().write:
        README.write_text(fill(README.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        for folder in sorted(RESULTS.iterdir()):
            print(f"{folder.name}\n\n{table(folder.name)}\n")


if __name__ == "__main__":
    main()
