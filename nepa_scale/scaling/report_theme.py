"""How the report's charts look on white and on dark, and charts as files without a browser."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import altair
import vl_convert

VEGA_LITE = ".".join(altair.SCHEMA_VERSION.lstrip("v").split(".")[:2])
WIDTH, HEIGHT = 760, 380  # of the files, before the scale
SCALE = 2

# colours that are told apart by the colour-blind, and stand out from their background
_RUNS_LIGHT = ["#0b62a4", "#c2500a", "#11795a", "#b3307c", "#6b4fb3", "#8a6100", "#2f7f93", "#a02c2c"]
_RUNS_DARK = ["#6cb6ff", "#f2a65a", "#4fd1a5", "#ff8fcf", "#b9a3ff", "#e6c84c", "#7fd6e8", "#ff8f87"]
# small to large
_SIZES_LIGHT = ["#d98c00", "#c2410c", "#a3195b", "#6d28a8", "#26348f"]
_SIZES_DARK = ["#ffe08a", "#ffab5e", "#ff7f8e", "#d68cff", "#86a8ff"]


def _theme(ink: str, faint: str, runs: list[str], sizes: list[str]) -> dict[str, Any]:
    text = {"labelColor": ink, "titleColor": ink, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"}
    return {
        "font": "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif",
        "view": {"stroke": None},
        "axis": {**text, "gridColor": faint, "domainColor": ink, "tickColor": ink, "titlePadding": 8,
                 "labelOverlap": "greedy", "labelSeparation": 6},
        "axisY": {"tickCount": 6, "domain": False, "ticks": False},
        "axisX": {"tickCount": 6, "labelFlush": True},
        "legend": {**text, "orient": "bottom", "labelLimit": 230, "columns": 3, "symbolStrokeWidth": 3,
                   "rowPadding": 4, "symbolOpacity": 1},
        "title": {"color": ink, "anchor": "start", "fontSize": 15},
        "range": {"category": runs, "ordinal": {"scheme": sizes}},
        "mark": {"color": ink},
        "rule": {"color": ink},
        "text": {"color": ink},
        "line": {"strokeWidth": 2},
    }  # fmt: skip


LIGHT = _theme("#1f2328", "#e3e6ea", _RUNS_LIGHT, _SIZES_LIGHT)
DARK = _theme("#e6e8eb", "#353b44", _RUNS_DARK, _SIZES_DARK)


def standalone(spec: dict[str, Any], title: str, datasets: dict[str, Any]) -> dict[str, Any]:
    """The chart with its data, on white, with its title, at the size of the files."""
    return spec | {
        "title": title,
        "datasets": datasets,
        "width": WIDTH,
        "height": HEIGHT,
        "background": "white",
        "config": LIGHT,
    }


def save(spec: dict[str, Any], stem: Path) -> list[Path]:
    """Draws a `standalone` chart as STEM.png and STEM.svg. Raises OSError: they cannot be written."""
    svg, png = stem.with_suffix(".svg"), stem.with_suffix(".png")
    drawn = vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE)
    svg.write_text(drawn, encoding="utf-8")
    png.write_bytes(vl_convert.svg_to_png(drawn, scale=SCALE))
    return [png, svg]


@functools.cache
def javascript() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script that needs no network and ends no `<script>` early."""
    bundle = str(vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=VEGA_LITE))
    return bundle.replace("</script", r"<\/script")
