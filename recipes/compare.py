"""Which of two or more classifiers is better, where, and is it more than noise?

    python recipes/compare.py runs/erm runs/ldam_drw
    python recipes/compare.py runs/erm runs/ldam_drw mine.csv --output_dir runs/compared

Each is the folder of a run, whose ``predictions.csv`` is read, or such a file of your own: CSV with
the columns ``example`` and ``predicted``; ``label``, too, in one of them at least. All must have
the same examples. The first one is what the others are compared with.

Printed, and left in ``--output_dir`` as ``report.html``; beside it ``comparison.csv`` (a row a
classifier and part of the classes), ``classes.csv`` (a row a classifier and class) and
``changed.csv`` (the examples that one gets right and the other wrong). Intervals and tests are
paired and tell how far other test samples would move the difference. Another training would move
it, too: that is what the seeds of ``recipes/benchmark.py`` tell.
"""

from __future__ import annotations

from trained_options import CompareOptions, parse_compare

from ldam_plugins.training.command_line import begin_study

if __name__ == "__main__":  # --help and a misspelt flag are answered before torch is imported
    chosen = begin_study(parse_compare)

from tabulate import tabulate

from ldam_plugins.reports.comparison import (
    class_table,
    compare,
    read_classifier,
    worded_class,
    worded_parts,
    write_comparison,
)

SHOWN = 10


def main(options: CompareOptions) -> None:
    """Compare, print and write."""
    classifiers = [read_classifier(path, options.part) for path in options.classifiers]
    table, comparisons = compare(classifiers)
    for found in comparisons:
        print(f"\n{found.name} against {classifiers[0].name}. {found.verdict}\n")
        print(tabulate(worded_parts(found), headers="keys", disable_numparse=True))
        rows = [worded_class(row) for row in class_table([found]) if row["difference"]]
        rows.sort(key=lambda row: -abs(float(row["accuracy, points"])))
        if rows:
            print(f"\nClasses that change most, {min(SHOWN, len(rows))} of {len(rows)}:\n")
            print(tabulate(rows[:SHOWN], headers="keys", disable_numparse=True))
    page = write_comparison(options.output_dir, classifiers[0], table, comparisons)
    print(f"\nThe same as a page, with all tables beside it: {page}")


if __name__ == "__main__":
    main(chosen)
