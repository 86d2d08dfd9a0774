"""Pages of HTML that need no network and no script: what reports of runs and experiments share."""

from __future__ import annotations

import base64
from typing import Any, NamedTuple

import jinja2

from ldam_plugins.reports.style import GROUPS, PAGE


class Plot(NamedTuple):
    """A plot as PNG, for light and for dark pages."""

    file: str
    title: str
    light: bytes
    dark: bytes


def render(template: str, **values: Any) -> bytes:
    """A page from a template of the package; a missing value is an error.

    In HTML every value is escaped.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ldam_plugins.reports"),
        autoescape=jinja2.select_autoescape(["html.jinja"], default=False),
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    colors = {dark: PAGE[dark] | GROUPS[dark] for dark in (False, True)}
    page = environment.get_template(template).render(data_uri=_data_uri, colors=colors, **values)
    return page.encode()


def _data_uri(picture: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(picture).decode('ascii')}"
