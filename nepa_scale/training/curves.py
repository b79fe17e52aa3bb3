"""The curves of a run as one picture: is it learning, is it stable, is the target collapsing, is it fast."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nepa_scale.training.run_folder import read_json_lines

Row = dict[str, Any]

COLUMNS = 4
COLOURS = ("#1f5fa8", "#d1661c")
REFERENCE, INK, FAINT = "#6b7078", "#24292f", "#e4e7eb"


@dataclass(frozen=True)
class Panel:
    """One small plot over the steps.

    curves: key of metrics.jsonl -> its name where there are several
    references: key of the first row that has it -> name of its horizontal line
    percent: the values are fractions of 1, shown as percent
    from_zero: the axis starts at 0, so that noise looks as small as it is
    """

    title: str
    curves: dict[str, str]
    references: dict[str, str] | None = None
    percent: bool = False
    from_zero: bool = False


PANELS = (
    Panel("loss", {"loss": "loss"}),
    Panel(
        "kNN top-1, %",
        {"knn_top1": "trained"},
        {"knn_top1_untrained": "untrained network", "knn_top1_pixels": "raw pixels"},
        percent=True,
    ),
    Panel("validation accuracy, %", {"top1": "top-1", "top5": "top-5"}, percent=True),
    Panel("prediction", {"centred_cosine": "centred cosine", "copy_win": "copying wins"}),
    Panel("effective rank of the targets", {"effective_rank": "effective rank"}),
    Panel("standard deviation of the targets", {"embedding_std": "standard deviation"}),
    Panel("gradient norm", {"grad_norm": "gradient norm"}),
    Panel("learning rate", {"lr": "learning rate"}),
    Panel("images / s", {"images_per_second": "images / s"}, from_zero=True),
)


def plot_curves(run: Path) -> Path:
    """Draws RUN/metrics.jsonl as RUN/figures/curves.png and returns that path; what the run did not log is left out."""
    rows = read_json_lines(run / "metrics.jsonl")
    path = run / "figures" / "curves.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(rows, title=run.name).savefig(path, dpi=150, facecolor="white")
    return path


def draw(rows: list[Row], title: str) -> Figure:
    """The figure of a run's rows: a grid of the panels that have something to show."""
    panels = [panel for panel in PANELS if any(_points(rows, key)[0] for key in panel.curves)]
    columns = max(min(COLUMNS, len(panels)), 1)
    lines = max(math.ceil(len(panels) / columns), 1)
    # figures made directly, not by pyplot, need no display and leave no global state
    figure = Figure(figsize=(3.3 * columns, 2.5 * lines + 0.4), layout="constrained")
    figure.suptitle(title if panels else f"{title}: nothing logged yet", fontsize=11, color=INK, x=0.01, ha="left")
    for number, panel in enumerate(panels):
        _draw_panel(figure.add_subplot(lines, columns, number + 1), panel, rows)
    return figure


def _draw_panel(axes: Axes, panel: Panel, rows: list[Row]) -> None:
    scale = 100.0 if panel.percent else 1.0
    for (key, name), colour in zip(panel.curves.items(), COLOURS, strict=False):
        steps, values = _points(rows, key)
        marker = "o" if len(steps) <= 12 else None  # a single point has no line
        weights = _weights(rows, key)
        label = f"{name} ({'ema' if 'ema' in weights else 'raw'} weights)" if weights else name
        axes.plot(steps, [scale * v for v in values], color=colour, lw=1.4, marker=marker, ms=3, label=label)
        if len(set(weights)) > 1:
            raw = [(s, scale * v) for s, v, kind in zip(steps, values, weights, strict=True) if kind == "raw"]
            axes.plot(*zip(*raw, strict=True), color=colour, ls="", marker="o", ms=4, mfc="white", label="raw weights")
    for (key, name), style in zip((panel.references or {}).items(), ("--", ":"), strict=False):
        _, values = _points(rows, key)
        if values:
            label = f"{name} {scale * values[0]:.1f}"
            axes.axhline(scale * values[0], color=REFERENCE, lw=1.2, ls=style, label=label)
    axes.set_title(panel.title, fontsize=9, color=INK, loc="left")
    _decorate(axes)
    if panel.from_zero:
        axes.set_ylim(bottom=0)
    if len(axes.get_lines()) > 1 or any(_weights(rows, key) for key in panel.curves):
        axes.legend(fontsize=7, frameon=False, loc="best", handlelength=1.6)


def _decorate(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(REFERENCE)
    axes.grid(color=FAINT, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=7, color=REFERENCE, labelcolor=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    axes.ticklabel_format(axis="y", scilimits=(-3, 5))
    axes.yaxis.get_offset_text().set_fontsize(7)
    axes.set_xlabel("step", fontsize=7, color=INK)


def _weights(rows: list[Row], key: str) -> list[str]:
    """Of which weights the values of `_points` are, one by one; empty where that is not logged with all of them."""
    steps, _ = _points(rows, key)
    named = {row["step"]: row["weights"] for row in rows if row.get(key) is not None and "weights" in row}
    return [named[step] for step in steps] if set(steps) <= named.keys() else []


def _points(rows: list[Row], key: str) -> tuple[list[float], list[float]]:
    """The steps that logged a finite `key`, and its values."""
    found = [
        (row["step"], row[key])
        for row in rows
        if "step" in row and row.get(key) is not None and math.isfinite(row[key])
    ]
    return [step for step, _ in found], [value for _, value in found]
