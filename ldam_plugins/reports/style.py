"""The one look of pages and plots, light and dark: colors, width, font."""

from __future__ import annotations

WIDTH = 8.0
"""Width of a plot in inches."""

FONT = "DejaVu Sans"

# By whether the page is dark. Groups and schedules have Okabe and Ito's palette, which the
# colour-blind can tell apart; it is lighter on a dark page.
PAGE = {
    False: {
        "page": "#f6f8fa",
        "card": "#ffffff",
        "ink": "#1f2328",
        "soft": "#59636e",
        "line": "#d0d7de",
    },
    True: {
        "page": "#0d1117",
        "card": "#161b22",
        "ink": "#e6edf3",
        "soft": "#9198a1",
        "line": "#3d444d",
    },
}
"""Background, background of boxes and plots, text, text of less weight, and thin lines."""

GROUPS = {
    False: {"many": "#0072b2", "medium": "#e69f00", "few": "#cc4e00"},
    True: {"many": "#56b4e9", "medium": "#f0b93a", "few": "#ff8c4a"},
}
"""Colors of the groups of classes."""

CURVE = {False: "#0072b2", True: "#56b4e9"}
"""Color of a curve that is alone in its plot."""

_SCHEDULES = {
    False: {
        "rw": "#e69f00",
        "rs": "#56b4e9",
        "drw": "#0072b2",
        "drs": "#cc79a7",
        "progressive": "#009e73",
    },
    True: {
        "rw": "#f0b93a",
        "rs": "#a5d8ff",
        "drw": "#3f95e0",
        "drs": "#e39cc4",
        "progressive": "#2fc79a",
    },
}


def ink(dark: bool) -> str:
    """Color of text and of what is drawn plain."""
    return PAGE[dark]["ink"]


def schedule_color(schedule: str, dark: bool) -> str:
    """Color of a schedule; ink for ``none`` and for one without a color of its own."""
    return _SCHEDULES[dark].get(schedule, ink(dark))
