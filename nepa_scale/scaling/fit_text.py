"""What tools/fit_scaling.py says of its fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nepa_scale.scaling.isoflop import IsoflopFit
from nepa_scale.scaling.parametric import ParametricFit
from nepa_scale.scaling.points import Points

_NUMBERS = ("E", "A", "B", "alpha", "beta", "a", "b")


def law_lines(law: ParametricFit, projected: ParametricFit | None, no_projection: str | None) -> list[str]:
    """The numbers with their intervals; beside them variable projection's, and those of all rows where these differ."""
    columns: list[tuple[str, ParametricFit]] = [] if projected is None else [("variable projection", projected)]
    if law.with_outliers is not None:
        columns.insert(0, ("with the outliers", law.with_outliers))
    lines = [
        f"{'':<8}{'Huber on log L':>16}{f'{law.level:.0%} interval':>28}" + "".join(f"{t:>22}" for t, _ in columns)
    ]
    for name in _NUMBERS:
        interval = law.intervals.get(name)
        between = f"{interval[0]:.5g} - {interval[1]:.5g}" if interval else ""
        value = law.floor if name == "E" else f"{getattr(law, name):.5g}"
        lines.append(
            f"{name:<8}{value:>16}{between:>28}" + "".join(f"{getattr(fit, name):>22.5g}" for _, fit in columns)
        )
    lines += [""] if projected else ["", f"variable projection: {no_projection}"]
    lines.append(f"N* ~ C^a, D* ~ C^b; residuals of log L: {law.residual_std:.2%}")
    return lines


def weights_line(weights: dict[str, list[str]], metric: str) -> str:
    """Of which weights the runs' values are; where they are not all of the same, which runs' are of which."""
    if len(weights) == 1:
        return f"{metric} is of {next(iter(weights))} weights in all runs"
    told = "; ".join(f"of {kind} weights in {', '.join(runs)}" for kind, runs in sorted(weights.items()))
    return f"warning: {metric} is {told}: these are not measured alike"


def outlier_lines(law: ParametricFit, points: Points) -> list[str]:
    """The rows that lie off the law, and those that another, smaller one beats."""
    lines = []
    if law.outliers:
        off = {row: _off(law, points, row) for row in law.outliers}
        above = [f"{points.label(row)} ({far:+.1%})" for row, far in off.items() if far > 0]
        below = [f"{points.label(row)} ({far:+.1%})" for row, far in off.items() if far <= 0]
        if above:
            lines.append(f"outliers far above the law (trained badly?): {', '.join(above)}")
        if below:
            lines.append(f"outliers far below the law: {', '.join(below)}")
        if law.with_outliers is None:
            lines.append("  they hardly move the law and are part of it")
        else:
            lines.append(
                "  they move the law by more than its intervals allow: shown are the laws without and with them"
            )
    lines += [
        f"{points.label(row)} has a clearly higher loss than {points.label(better)}, which has no more parameters and "
        "samples: is its learning rate tuned?"
        for row, better in law.beaten
    ]
    return lines


def isoflop_line(fit: IsoflopFit) -> str:
    between = ""
    if fit.intervals:
        low, high = fit.intervals["exponent"]
        between = f" ({fit.level:.0%}: {low:.4f} - {high:.4f})"
    bias = "" if fit.bias is None else f"; on this grid the method is off by {fit.bias:+.4f}"
    return f"IsoFLOP: N* ~ C^{fit.exponent:.4f}{between} from {len(fit.budgets)} budgets{bias}"


def envelope_line(envelope: dict[str, Any]) -> str:
    between = envelope["intervals"].get("a")
    told = " ({:.3f} - {:.3f})".format(*between) if between else ""
    return f"envelope of the training curves: N* ~ C^{envelope['a']:.4f}{told}"


def form_lines(title: str, forms: Sequence[dict[str, Any]]) -> list[str]:
    """How forms of law compare."""
    if not forms:
        return []
    lines = ["", f"{title:<36}{'AICc above the best':>20}{'residuals':>12}{'largest fifth':>15}"]
    for form in forms:
        told = "" if form["extrapolation_error"] is None else f"{form['extrapolation_error']:.2%}"
        lines.append(f"  {form['formula']:<34}{form['aicc']:>20.1f}{form['residual_std']:>12.2%}{told:>15}")
    return lines


def _off(law: ParametricFit, points: Points, row: int) -> float:
    """By how much of the law's loss a row lies above it."""
    predicted = law.predict(np.array(points.parameters[row]), np.array(points.samples[row]))
    return float(points.loss[row] / predicted - 1)
