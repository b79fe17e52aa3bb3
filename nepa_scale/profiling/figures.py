"""Stacked bars, the one kind of picture that FLOPs, memory and step times need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# an order in which neighbours differ in lightness as well as in hue
PALETTE = ("#1b4f72", "#f0a202", "#2e8b78", "#d1495b", "#8d6a9f", "#9fc5d8", "#6b705c", "#e8d5a9", "#33272a", "#b5b5b5")


def stacked_bars(
    path: Path,
    title: str,
    labels: Sequence[str],
    parts: Mapping[str, Sequence[float]],
    unit: str,
    *,
    marks: Mapping[str, Sequence[float | None]] | None = None,
    line: tuple[str, float] | None = None,
    note: str = "",
    value_format: str = "{:.1f}",
) -> None:
    """Draws one horizontal bar for each of `labels`, made of `parts` (values in `unit`), its total written at the end.

    marks: further values of each bar (measured against predicted), drawn as diamonds; None: no mark
    line: a limit to hold the bars against, and its name
    note: what a reader has to know, below the axis
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    height = 1.7 + 0.34 * len(labels) + (0.25 if note else 0)
    figure, axes = plt.subplots(figsize=(10, max(height, 2.8)), layout="constrained")
    rows = range(len(labels))
    left = [0.0] * len(labels)
    shown = {name: values for name, values in parts.items() if any(values)}
    for index, (name, values) in enumerate(shown.items()):
        axes.barh(rows, values, left=left, label=name, color=PALETTE[index % len(PALETTE)], height=0.72)
        left = [a + b for a, b in zip(left, values, strict=True)]
    ends = list(left)
    for name, marked in (marks or {}).items():
        pairs = [(row, value) for row, value in zip(rows, marked, strict=True) if value is not None]
        axes.scatter(
            [value for _, value in pairs], [row for row, _ in pairs], marker="D", s=26, color="white",
            edgecolors="black", linewidths=1.2, label=name, zorder=3,
        )  # fmt: skip
        for row, value in pairs:
            ends[row] = max(ends[row], value)
    span = max([*ends, line[1] if line else 0.0])
    for row, (total, end) in enumerate(zip(left, ends, strict=True)):
        axes.text(end + 0.012 * span, row, value_format.format(total), va="center", fontsize=8.5)
    if line:
        axes.axvline(line[1], color="black", linestyle="--", linewidth=1, label=line[0])
    axes.set_xlim(0, 1.1 * span)
    axes.set_yticks(list(rows), labels)
    axes.invert_yaxis()
    axes.set_xlabel(f"{unit}\n{note}" if note else unit)
    axes.set_title(title, loc="left", fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, fontsize=9)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """Writes the figure and forgets it."""
    from matplotlib import pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
