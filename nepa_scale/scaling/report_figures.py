"""The report's figures of runs: curves over training, their frontier, and cost by size. Data are named, and shared."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from nepa_scale.scaling.forms import frontier
from nepa_scale.scaling.metrics import Metric
from nepa_scale.scaling.recorded_runs import RecordedRun, Row, is_number

POINTS = 3000  # of all runs' curves together
MOST, LEAST = 200, 30  # of one run's curve
EDGE = 100  # of a frontier
RUNS_NAMED = 8  # more are told apart by size only
DIAGNOSTICS = {
    "embedding_std": ("Standard deviation of the targets", "mean per-dimension std of the normalised targets",
                      "A fall to 0 is a collapse: all targets become the same."),
    "effective_rank": ("Effective rank of the targets", "exp(entropy of the singular values)",
                       "How many directions the targets use; 1 is a collapse."),
    "target_cosine": ("Cosine between different targets", "mean cosine",
                      "Near 1, all targets point the same way, and predicting them is worth nothing."),
    "copy_win": ("Predictions nearer to the present patch than to the next", "share of the positions",
                 "Near 1, the network copies what it sees; it should fall well below."),
    "features_effective_rank": ("Effective rank of the features", "exp(entropy of the singular values)",
                                "How many directions the validation images' features use; the more the better."),
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """One chart.

    name: of its files and its place in the page
    caption: one sentence that says how to read it
    log: the axes that the reader may turn logarithmic and back, "x" and "y"
    over: whether the reader may choose what is along x: images seen or FLOPs
    """

    name: str
    title: str
    caption: str
    chart: alt.LayerChart | alt.FacetChart
    log: str = ""
    over: bool = False


class Series:
    """What a colour means: a run, or a model size where there are many runs."""

    def __init__(self, runs: Sequence[RecordedRun]) -> None:
        self.by_run = len(runs) <= RUNS_NAMED
        self.title = "run" if self.by_run else "model"
        # smallest first, as the runs are
        self.names = list(dict.fromkeys(self.of(run) for run in runs if run.rows and self.of(run)))

    def of(self, run: RecordedRun) -> str:
        return run.name if self.by_run else run.size

    def colour(self) -> alt.Color:
        kind: Any = "nominal" if self.by_run else "ordinal"
        return alt.Color("series", type=kind, title=self.title, sort=self.names, scale=alt.Scale(domain=self.names))


def rounded(value: float | None) -> float | None:
    """To what a chart can show, which keeps the page small."""
    return value if value is None or isinstance(value, int) else float(f"{value:.5g}")


def curve_rows(runs: Sequence[RecordedRun], metrics: Sequence[Metric], series: Series) -> list[Row]:
    """The data of all curves: thinned rows of the runs, with the metrics as they are shown."""
    limit = max(LEAST, min(MOST, POINTS // max(1, len(runs))))
    shown: dict[str, Callable[[float], float]] = dict.fromkeys(DIAGNOSTICS, float)
    keys = {metric.name: metric.key for metric in metrics} | dict(zip(DIAGNOSTICS, DIAGNOSTICS, strict=True))
    shown |= {metric.name: metric.of for metric in metrics}
    rows = []
    for run in runs:
        kept: set[int] = set()
        for key in keys.values():  # each on its own: evaluations are few, and none is lost among the steps
            kept.update(thinned([row["step"] for row in run.rows if is_number(row.get(key))], limit))
        for row in run.rows:
            if row["step"] in kept and row.get("samples_seen", 0) > 0:
                point = {name: rounded(shown[name](row[key])) for name, key in keys.items() if is_number(row.get(key))}
                seen = {key: rounded(row[key]) for key in ("samples_seen", "flops_seen") if is_number(row.get(key))}
                rows.append({"run": run.name, "series": series.of(run), "step": row["step"], **seen, **point})
    return rows


def thinned(steps: Sequence[int], limit: int) -> list[int]:
    """At most `limit` of them, evenly spaced in their logarithm below and evenly above; first and last among them."""
    if len(steps) <= limit:
        return list(steps)
    half, last = limit // 2, len(steps) - 1
    even = {round(at * last / (half - 1)) for at in range(half)}
    early = {round(math.exp(at * math.log(last + 1) / (half - 1))) - 1 for at in range(half)}
    return [steps[at] for at in sorted(even | early)]


def curve_figures(
    metrics: Sequence[Metric], rows: list[Row], series: Series, baselines: dict[str, Any]
) -> list[Figure]:
    """One for each metric."""
    return [
        _curves(
            f"curve_{metric.name}", f"{capital(metric.title)} over training", metric.name, metric.axis, series, rows,
            "Each line is a run, the lower the better; hover for values, click the legend to single one out"
            + (" (dashed: what training has to beat)." if baselines.get(metric.name) else "."),
            baselines.get(metric.name, []),
        )
        for metric in metrics
    ]  # fmt: skip


def diagnostic_figures(rows: list[Row], series: Series) -> list[Figure]:
    return [
        _curves(key, title, key, axis, series, rows, caption)
        for key, (title, axis, caption) in DIAGNOSTICS.items()
        if any(key in row for row in rows)
    ]


def baselines(runs: Sequence[RecordedRun]) -> dict[str, Any]:
    """Error rates of the raw pixels and of untrained networks, by metric: medians over the runs."""
    found = []
    for key, name in (("knn_top1_untrained", "untrained network"), ("knn_top1_pixels", "raw pixels")):
        values = [value for run in runs for value in run.values(key)[:1]]
        if values:
            found.append({"value": rounded(1 - statistics.median(values)), "name": name})
    return {"knn_error": found}


def _curves(
    name: str, title: str, field: str, axis: str, series: Series, rows: list[Row], caption: str,
    references: Iterable[Row] = (),
) -> Figure:  # fmt: skip
    pick = alt.selection_point(name="pick", fields=["series"], bind="legend")
    hover = alt.selection_point(name="hover", on="pointerover", clear="pointerout", nearest=True, empty=False)
    base = alt.Chart(alt.NamedData("curves")).transform_filter(f"isValid(datum.{field})").encode(
        x=samples_axis(), y=value_axis(field, axis), detail="run:N", color=series.colour(),
        opacity=alt.condition(pick, alt.value(0.9), alt.value(0.08)),
    )  # fmt: skip
    # a run of few points, or of one, is seen by its points
    size = alt.when(hover).then(alt.value(90)).when("datum.points <= 15").then(alt.value(36)).otherwise(alt.value(4))
    points = base.transform_joinaggregate(points="count()", groupby=["run"]).mark_point(filled=True, aria=False).encode(
        size=size, tooltip=[*run_tooltip(), _tip(field, axis, ".4~g")]
    )  # fmt: skip
    layers = [base.mark_line().add_params(pick), points.add_params(hover)]
    # named at opposite ends, since they may be near each other
    ends: tuple[tuple[Any, Any], ...] = ((0, "left"), ("width", "right"))
    for reference, (end, align) in zip(references, ends, strict=False):
        mark = alt.Chart(alt.Data(values=[reference])).encode(y=alt.Y("value:Q"))
        layers += [
            mark.mark_rule(strokeDash=[5, 4]),
            mark.mark_text(align=align, baseline="bottom", dy=-2).encode(x=alt.value(end), text="name:N"),
        ]
    positive = all(row[field] > 0 for row in rows if field in row)
    return Figure(name, title, caption, alt.layer(*layers), log="xy" if positive else "x", over=True)


def frontier_rows(metric: Metric, runs: Sequence[RecordedRun], series: Series) -> list[Row]:
    """The lowest value of any run at or below each compute: the points where it falls, thinned."""
    logged = [
        {
            "run": run.name,
            "series": series.of(run),
            "parameters": run.parameters,
            metric.name: metric.of(row[metric.key]),
        }
        | {key: row[key] for key in ("step", "samples_seen", "flops_seen")}
        for run in runs
        for row in run.rows
        if is_number(row.get(metric.key)) and row.get("flops_seen")
    ]
    edge = frontier([row["flops_seen"] for row in logged], [row[metric.name] for row in logged])
    return [
        {key: rounded(value) if isinstance(value, float) else value for key, value in logged[edge[at]].items()}
        for at in thinned(range(len(edge)), EDGE)
    ]


def frontier_figure(metric: Metric, series: Series) -> Figure:
    """Reads the data "curves" and "frontier_<metric>"."""
    y = value_axis(metric.name, metric.axis)
    x = alt.X("flops_seen:Q", title="training FLOPs", scale=alt.Scale(type="log"), axis=FLOPS_AXIS)
    curves = alt.Chart(alt.NamedData("curves")).transform_filter(
        f"isValid(datum.{metric.name}) && isValid(datum.flops_seen)"
    )
    edge = alt.Chart(alt.NamedData(f"frontier_{metric.name}")).encode(x=x, y=y)
    tooltip = [*run_tooltip(), _tip(metric.name, metric.title, ".4~g")]
    chart = alt.layer(
        curves.mark_line(opacity=0.35, strokeWidth=1.2).encode(x=x, y=y, detail="run:N", color=series.colour()),
        edge.mark_line(interpolate="step-after", strokeWidth=2),
        edge.mark_point(filled=True, size=30, opacity=1).encode(color=series.colour(), tooltip=tooltip),
    )
    return Figure(
        f"frontier_{metric.name}", f"Frontier: {metric.title} for the compute spent",
        "The steps are the lowest value that any run had reached with so many FLOPs; a point's colour says which.",
        chart, log="xy",
    )  # fmt: skip


def cost_rows(runs: Sequence[RecordedRun], series: Series) -> list[Row]:
    """What a run costs, one row a run."""
    rows = []
    for run in runs:
        samples, flops = run.last("samples_seen"), run.last("flops_seen")
        memory, rates = run.values("peak_memory_bytes"), run.values("images_per_second")
        if run.parameters is None or not rates:
            continue
        rows.append(
            {
                "run": run.name, "series": series.of(run), "size": run.size, "parameters": run.parameters,
                "flops_per_image": rounded(flops / samples) if flops and samples else None,
                "memory": rounded(max(memory) / 1e9) if memory else None,
                "images_per_second": rounded(statistics.median(rates)),
            }
        )  # fmt: skip
    return rows


COSTS = (
    ("flops_per_image", "Training FLOPs of an image", "forward and backward, FLOPs",
     "What one image costs by model size; parallel to the diagonal where FLOPs grow as the parameters do."),
    ("memory", "Peak memory", "fullest rank, GB",
     "The most memory that a rank of the run held; on a CPU the whole process."),
    ("images_per_second", "Throughput", "whole job, images/s",
     "The median over the run; only runs on the same hardware can be compared."),
)  # fmt: skip


def cost_figures(rows: list[Row], series: Series) -> list[Figure]:
    """Reads the data "costs"."""
    figures = []
    for field, title, axis, caption in COSTS:
        if not any(row[field] for row in rows):
            continue
        axis_format = FLOPS_AXIS if field == "flops_per_image" else alt.Axis()
        tooltip = ["run:N", "size:N", _tip("parameters", "parameters", ","), _tip(field, axis, ".4~g")]
        chart = alt.Chart(alt.NamedData("costs")).transform_filter(f"datum.{field} > 0").mark_point(
            filled=True, size=80, opacity=0.85
        ).encode(
            x=parameters_axis(), y=alt.Y(f"{field}:Q", title=axis, scale=LOG, axis=axis_format),
            color=series.colour(), tooltip=tooltip,
        )  # fmt: skip
        figures.append(Figure(f"cost_{field}", f"{title} by model size", caption, alt.layer(chart), log="xy"))
    return figures


LOG = alt.Scale(type="log", nice=False, padding=12)
FLOPS_AXIS = alt.Axis(labelExpr="replace(format(datum.value, '.1~e'), '+', '')")
COUNT_AXIS = alt.Axis(labelExpr="replace(format(datum.value, '~s'), 'G', 'B')")


def samples_axis() -> alt.X:
    return alt.X("samples_seen:Q", title="images seen", scale=LOG, axis=COUNT_AXIS)


def parameters_axis() -> alt.X:
    return alt.X("parameters:Q", title="parameters", scale=LOG, axis=COUNT_AXIS)


def value_axis(field: str, title: str) -> alt.Y:
    return alt.Y(f"{field}:Q", title=title, scale=alt.Scale(zero=False))


def run_tooltip() -> list[alt.Tooltip]:
    return [
        alt.Tooltip("run:N"),
        _tip("step", "step", ","),
        _tip("samples_seen", "images seen", ","),
        _tip("flops_seen", "FLOPs", ".3~g"),
    ]


def _tip(field: str, title: str, number_format: str) -> alt.Tooltip:
    return alt.Tooltip(f"{field}:Q", title=title, format=number_format)


def capital(text: str) -> str:
    """As a title begins; kNN stays as it is."""
    return text if text[1:2].isupper() else text[:1].upper() + text[1:]
