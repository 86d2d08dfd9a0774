"""Tables of the timings of ``recipes/speed.py``: seconds of ours, of another's, and their ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from ldam_plugins.benchmark.tables import Row


def ratio_rows(timings: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row a timing: seconds, or megabytes of a section on memory, and their ratio."""
    return [
        {
            "section": timing["section"],
            "what": timing["what"],
            "peer": timing["peer"],
            "ours": _amount(timing, "ours"),
            "theirs": _amount(timing, "peer"),
            "ratio": _ratio(timing),
            "note": timing["note"],
        }
        for timing in timings
    ]


def ratio_matrix(timings: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Ratios of timings named ``"what, size, dtype"``: a row a size and dtype, a column a what."""
    cells = {}
    for timing in timings:
        what, _, place = timing["what"].partition(", ")
        cells[place, what] = _ratio(timing)
    matrix = pd.Series(cells).unstack(fill_value="", sort=False)
    return matrix.rename_axis(index="").reset_index().to_dict("records")


def _amount(timing: Mapping[str, Any], whose: str) -> str:
    if f"{whose}_megabytes" in timing:
        return f"{timing[f'{whose}_megabytes']:.0f} MB"
    return f"{timing[f'{whose}_seconds']:.3g} s"


def _ratio(timing: Mapping[str, Any]) -> str:
    """Median, least and largest ratio over the turns."""
    return "{ratio_median:.2f} ({ratio_min:.2f}..{ratio_max:.2f})".format_map(timing)
