"""The report's figures of laws: the fitted L(N, D), IsoFLOP parabolas, and the best size for the compute."""

from __future__ import annotations

from typing import Any

import altair as alt
import numpy as np

from nepa_scale.scaling.isoflop import parabolas
from nepa_scale.scaling.observations import Numbers
from nepa_scale.scaling.recorded_runs import Row
from nepa_scale.scaling.report_figures import (
    COUNT_AXIS,
    FLOPS_AXIS,
    LOG,
    Figure,
    parameters_axis,
    rounded,
    samples_axis,
    value_axis,
)
from nepa_scale.scaling.report_laws import MetricLaw

Data = dict[str, list[Row]]
_FINE = 60  # points of a drawn curve
_SIZES = 8  # lines of a law; all sizes have their points


def law_figures(found: MetricLaw) -> tuple[list[Figure], Data]:
    """The figures that the laws of a metric allow, and the data they read."""
    figures: list[Figure] = []
    data: Data = {}
    for draw in (_law, _parabolas, _best_sizes):
        drawn = draw(found)
        if drawn is not None:
            figures.append(drawn[0])
            data |= drawn[1]
    return figures, data


def _law(found: MetricLaw) -> tuple[Figure, Data] | None:
    law, name = found.law, found.metric.name
    if law is None:
        return None
    sizes = dict(sorted({run.parameters or 0: run.size for run in found.points.runs}.items()))
    predicted = law.predict(np.array(found.points.parameters), np.array(found.points.samples))
    points = [
        {"run": run.name, "size": run.size, "samples_seen": d, "measured": rounded(loss), "law": rounded(float(value))}
        for run, d, loss, value in zip(
            found.points.runs, found.points.samples, found.points.loss, predicted, strict=True
        )
    ]
    span = np.geomspace(min(found.points.samples), max(found.points.samples), _FINE)
    chosen = np.unique(np.linspace(0, len(sizes) - 1, _SIZES).round().astype(int))
    lines = [
        {"size": sizes[n], "samples_seen": rounded(float(d)), "law": rounded(float(value))}
        for n in np.array(list(sizes))[chosen].tolist()
        for d, value in zip(span, law.predict(np.full_like(span, n), span), strict=True)
    ]
    colour = _ordinal("size", "model", list(dict.fromkeys(sizes.values())))
    tooltip = ["run:N", "samples_seen:Q", "measured:Q", alt.Tooltip("law:Q", title="by the law")]
    chart = alt.layer(
        _named(f"law_{name}_lines").mark_line().encode(
            x=samples_axis(), y=value_axis("law", found.metric.axis), color=colour
        ),
        _named(f"law_{name}_points").mark_point(filled=True, size=55, opacity=1).encode(
            x=samples_axis(), y=value_axis("measured", found.metric.axis), color=colour, tooltip=tooltip
        ),
    )  # fmt: skip
    figure = Figure(
        f"law_{name}", f"Fitted law: {found.metric.title}",
        "Points are finished runs, lines the fitted law of their size: points off their line are what it does not say.",
        chart, log="xy",
    )  # fmt: skip
    return figure, {f"law_{name}_lines": lines, f"law_{name}_points": points}


def _parabolas(found: MetricLaw) -> tuple[Figure, Data] | None:
    if found.isoflop is None:
        return None
    name, title, budgets = found.metric.name, found.metric.title, found.isoflop.budgets
    points, lines, vertices = [], [], []
    for budget, parabola in zip(
        budgets,
        parabolas(found.isoflop, found.points.parameters, found.points.loss, found.points.flops or []),
        strict=True,
    ):
        label = _flops(budget.flops)
        n = [found.points.parameters[row] for row in parabola.rows]
        lines += [
            {"budget": label, "parameters": rounded(float(at)), "value": rounded(float(parabola.curve(np.log(at))))}
            for at in np.geomspace(min(n), max(n), _FINE)
        ]
        points += [
            {"budget": label, "run": found.points.runs[row].name, "parameters": found.points.runs[row].parameters,
             "value": rounded(found.points.loss[row])} for row in parabola.rows
        ]  # fmt: skip
        vertices.append({"budget": label, "parameters": rounded(budget.optimum), "value": rounded(budget.loss)})
    labels = [_flops(budget.flops) for budget in budgets]
    encoding: dict[str, Any] = {
        "x": parameters_axis(),
        "y": value_axis("value", found.metric.axis),
        "color": _ordinal("budget", "FLOPs of a run", labels),
    }
    tooltip = ["budget:N", alt.Tooltip("parameters:Q", format=",.0f"), alt.Tooltip("value:Q", title=title)]
    dots: dict[str, Any] = {"filled": True, "size": 45, "opacity": 1}
    diamonds: dict[str, Any] = {"shape": "diamond", "size": 130, "strokeWidth": 2, "opacity": 1, "fillOpacity": 0}
    chart = alt.layer(
        _named(f"isoflop_{name}_lines").mark_line().encode(**encoding),
        _named(f"isoflop_{name}_points").mark_point(**dots).encode(**encoding, tooltip=["run:N", *tooltip]),
        _named(f"isoflop_{name}_best").mark_point(**diamonds).encode(**encoding, tooltip=tooltip),
    )
    figure = Figure(
        f"isoflop_{name}", f"IsoFLOP parabolas: {title}",
        "Runs of equal compute and the parabola through them; the diamond at its lowest point is the best size.",
        chart, log="xy",
    )  # fmt: skip
    parts = {"lines": lines, "points": points, "best": vertices}
    return figure, {f"isoflop_{name}_{part}": rows for part, rows in parts.items()}


def _best_sizes(found: MetricLaw) -> tuple[Figure, Data] | None:
    fit = found.isoflop
    if fit is None:
        return None
    name = f"best_size_{found.metric.name}"
    span = np.geomspace(fit.budgets[0].flops, fit.budgets[-1].flops, _FINE)
    intervals = fit.optima or [None] * len(fit.budgets)
    data = {
        f"{name}_points": [
            {"flops": rounded(b.flops), "best": rounded(b.optimum), **_bounds(interval)}
            for b, interval in zip(fit.budgets, intervals, strict=True)
        ],
        f"{name}_lines": [
            {"flops": rounded(float(flops)), "best": rounded(float(size)), "method": method}
            for method, sizes in _size_laws(found, span).items()
            for flops, size in zip(span, sizes, strict=True)
        ],
        f"{name}_band": [
            {"flops": rounded(float(flops)), **_bounds((float(low), float(high)))}
            for flops, low, high in (zip(span, *fit.sizes(span), strict=True) if fit.drawn else ())
        ],
    }
    x = alt.X("flops:Q", title="training FLOPs of a run", scale=LOG, axis=FLOPS_AXIS)
    y, low = (
        alt.Y(f"{field}:Q", title="best number of parameters, N*", scale=LOG, axis=COUNT_AXIS)
        for field in ("best", "low")
    )
    tooltip = [alt.Tooltip("flops:Q", title="FLOPs", format=".3~g")]
    tooltip += [alt.Tooltip(f"{field}:Q", format=".4~s") for field in ("best", "low", "high")]
    by = {"color": alt.Color("method:N", title="by"), "strokeDash": alt.StrokeDash("method:N", title="by")}
    chart = alt.layer(
        _named(f"{name}_band").mark_area(opacity=0.15).encode(x=x, y=low, y2="high:Q"),
        _named(f"{name}_lines").mark_line().encode(x=x, y=y, **by),
        _named(f"{name}_points").transform_filter("isValid(datum.low)").mark_rule().encode(x=x, y=low, y2="high:Q"),
        _named(f"{name}_points").mark_point(filled=True, size=70, opacity=1).encode(x=x, y=y, tooltip=tooltip),
    )
    sure = f", with their {fit.level:.0%} bootstrap intervals" if fit.drawn else ""
    figure = Figure(
        name, f"Best size for the compute: {found.metric.title}",
        f"Points are the parabolas' lowest points{sure}; the line through them is N* ~ C^{fit.exponent:.3f}.",
        chart, log="xy",
    )  # fmt: skip
    return figure, data


def _bounds(interval: tuple[float, float] | None) -> Row:
    return {"low": rounded(interval[0]), "high": rounded(interval[1])} if interval else {}


def _size_laws(found: MetricLaw, flops: Numbers) -> dict[str, Numbers]:
    """N* for the compute, by the parabolas' lowest points and by the law, where there is one."""
    assert found.isoflop is not None
    laws = {"IsoFLOP": found.isoflop.coefficient * flops**found.isoflop.exponent}
    if found.law is not None:
        # the law needs the FLOPs of a parameter and image: the runs' own, since 6 N D takes an image for one token
        each = float(
            np.median(
                np.array(found.points.flops or [])
                / (np.array(found.points.parameters) * np.array(found.points.samples))
            )
        )
        laws["fitted law"] = np.array([found.law.optimum(one / each)[0] for one in flops])
    return laws


def _named(name: str) -> alt.Chart:
    return alt.Chart(alt.NamedData(name))


def _ordinal(field: str, title: str, names: list[str]) -> alt.Color:
    return alt.Color(field, type="ordinal", title=title, sort=names, scale=alt.Scale(domain=names))


def _flops(value: float) -> str:
    return f"{value:.2g}".replace("e+", "e")
