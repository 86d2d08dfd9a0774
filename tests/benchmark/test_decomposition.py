import pytest
from made_records import method

from ldam_plugins.benchmark.decomposition import decompositions
from ldam_plugins.benchmark.tables import decomposition_rows

STEPS = [
    *method("ce", "none", [30.0, 32.0], head="linear"),
    *method("ce", "none", [25.0, 26.0, 1.0], head="cosine"),
    *method("ldam", "none", [22.0, 24.0], head="auto"),
    *method("ldam", "drw", [20.0, 20.0], head="auto"),
]


def test_parts_add_up_over_the_seeds_that_all_steps_have():
    (found,) = decompositions(STEPS)
    parts = (found.head.mean, found.margin.mean, found.deferral.mean)
    assert parts == pytest.approx((-5.5, -2.5, -3.0))
    assert found.first.mean + sum(parts) == pytest.approx(found.last.mean)
    assert found.last.mean == pytest.approx(20.0)
    assert found.first.n == 2
    assert found.from_the_start is None
    # Seeds differ by 0.5 from the mean: t(0.975, 1) * s / sqrt(2) = 12.706 * 0.7071 / 1.4142
    assert found.head.half_width == pytest.approx(6.353, abs=1e-3)


def test_a_row_for_each_margin_and_for_what_else_varies():
    more = [
        *STEPS,
        *method("ldam", "none", [23.0, 23.0], head="auto", max_margin=0.1),
        *method("ldam", "drw", [21.0, 22.0], head="auto", max_margin=0.1),
        *method("ldam", "rw", [19.0, 24.0], head="auto", max_margin=0.1),
    ]
    default, small = decompositions(more)
    assert (default.max_margin, small.max_margin) == (0.5, 0.1)
    assert small.margin.mean == pytest.approx(-2.5)
    assert small.from_the_start is not None
    assert small.from_the_start.mean == pytest.approx(-1.5)
    ratios = [*STEPS, *({**r, "options": {**r["options"], "ratio": 10.0}} for r in STEPS)]
    rows = decomposition_rows({"digits": ratios, "texts": STEPS})
    titles = [row["experiment"] for row in rows]
    assert titles == ["digits, ratio 100", "digits, ratio 10", "texts"]
    assert rows[2]["weights from the start instead"] == "-"


def test_without_one_of_the_steps_there_is_no_row():
    for step in range(4):
        kept = [r for r in STEPS if r["options"] not in [s["options"] for s in _step(step)]]
        assert decompositions(kept) == []


def _step(index):
    starts = [0, 2, 5, 7, 9]
    return STEPS[starts[index] : starts[index + 1]]
