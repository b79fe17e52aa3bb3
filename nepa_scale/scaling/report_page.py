"""The report as one HTML page. Every string from a run is escaped by the template, the data as JSON inside a script."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from nepa_scale.scaling.report_figures import FLOPS_AXIS, Figure
from nepa_scale.scaling.report_theme import DARK, LIGHT, javascript

TEMPLATE = "report_page.html"


@dataclass(frozen=True)
class Cell:
    """Of a table. kind: CSS classes, such as "number"; interval: in small print below; span: columns it takes."""

    text: str
    kind: str = ""
    interval: str = ""
    span: int = 1


@dataclass(frozen=True)
class Table:
    """The first cell of each row is its heading."""

    head: list[Cell]
    body: list[list[Cell]]


@dataclass(frozen=True)
class Commands:
    """A foldable list of (run, command)."""

    title: str
    lines: list[tuple[str, str]]


@dataclass(frozen=True)
class Section:
    """A part of the page: a sentence, a table, figures, commands; left out of the page where it has none of them."""

    id: str
    title: str
    text: str = ""
    table: Table | None = None
    figures: Sequence[Figure] = ()
    commands: Sequence[Commands] = field(default=())

    @property
    def shown(self) -> bool:
        return bool(self.text or self.table or self.figures or self.commands)


def render(title: str, summary: str, sections: Sequence[Section], specs: dict[str, Any], data: dict[str, Any]) -> str:
    """specs: of the charts, by the figures' names; data: what they read, by name."""
    report = {
        "charts": {name: {"spec": spec, "data": sorted(data_names(spec))} for name, spec in specs.items()},
        "data": data,
        "themes": {"light": LIGHT, "dark": DARK},
        "flops_axis": {"field": "flops_seen", "title": "training FLOPs", "axis": FLOPS_AXIS.to_dict()},
    }
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string((files("nepa_scale.scaling") / TEMPLATE).read_text(encoding="utf-8"))
    return template.render(
        title=title, summary=summary, sections=sections, data=_script(report), vega=Markup(javascript())
    )


def data_names(spec: Any) -> set[str]:
    """Of the named data that a chart reads."""
    if isinstance(spec, list):
        return set().union(*map(data_names, spec))
    if not isinstance(spec, dict):
        return set()
    named = spec.get("data")
    own = {str(named["name"])} if isinstance(named, dict) and "name" in named else set()
    return own.union(*map(data_names, spec.values()))


def _script(values: Any) -> Markup:
    """JSON that no string in it can end the script element of."""
    return Markup(json.dumps(values, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))
