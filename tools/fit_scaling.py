"""Fits scaling laws: L(N, D) = E + A / N^alpha + B / D^beta, and IsoFLOP parabolas, with intervals.

DATA is one CSV file, or run folders. N: parameters, D: samples (or tokens), each in any unit; L must be positive: of
NEPA fit one_plus_loss, or an error rate (knn_error, probe_error, reference_error), not the loss itself. Runs that have
not finished or have collapsed are left out, and named. Fits by a Huber loss on log L and by variable projection;
reports 90% bootstrap intervals, the error of predicting the largest runs from the others, outliers, and how other forms
of law do on the same data. What the data
cannot determine is refused, with the runs to add.

examples:
  python tools/fit_scaling.py points.csv --parameters params --samples tokens --loss loss --plot law.png
  python tools/fit_scaling.py runs/sweeps/tiny_imagenet --loss probe_error --json law.json
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np

from nepa_scale.command_line import Parser, add_result_options, deliver, run
from nepa_scale.config import ConfigError
from nepa_scale.scaling import (
    IsoflopFit,
    NotDetermined,
    ParametricFit,
    extrapolation_error,
    fit_isoflop,
    fit_parametric,
    project_variables,
)
from nepa_scale.scaling.envelope import EnvelopeFit, fit_envelope
from nepa_scale.scaling.forms import compare_forms, compare_frontiers
from nepa_scale.scaling.metrics import find_metric
from nepa_scale.scaling.plots import plot_law
from nepa_scale.scaling.points import Points, points_of_runs, read_csv, require_one_objective
from nepa_scale.scaling.recorded_runs import read_recorded_runs


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("data", nargs="+", type=Path, metavar="DATA", help="a CSV file, or run folders")
    parser.add_argument("--parameters", default="parameters", metavar="COL", help="column of N (default: parameters)")
    parser.add_argument("--samples", default="samples", metavar="COL", help="column of D (default: samples)")
    parser.add_argument("--loss", default="loss", metavar="COL", help="column, or metric of the runs (default: loss)")
    parser.add_argument("--flops", metavar="COL", help="column of compute (default: of runs their own, else 6 N D)")
    parser.add_argument("--bootstrap", type=int, default=200, metavar="N", help="resamplings (default: 200; 0: none)")
    parser.add_argument("--level", type=float, default=0.9, metavar="P", help="of the intervals (default: 0.9)")
    add_result_options(parser)
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    points = read(arguments)
    n, d, loss = points.parameters, points.samples, points.loss
    law = fit_parametric(n, d, loss, bootstrap=arguments.bootstrap, level=arguments.level)
    projected = project_variables(n, d, loss)
    isoflop: IsoflopFit | None = None
    reason = None
    try:
        isoflop = fit_isoflop(n, d, loss, flops=points.flops, law=law)
    except NotDetermined as error:
        reason = str(error)
    envelope, no_envelope = envelope_of(points, arguments)
    flops = points.flops or (6 * np.array(n) * np.array(d)).tolist()
    facts = {
        "runs": len(loss),
        "left_out": points.left_out,
        "parametric": dataclasses.asdict(law) | {"a": law.a, "b": law.b},
        "variable_projection": dataclasses.asdict(projected) | {"a": projected.a, "b": projected.b},
        "isoflop": dataclasses.asdict(isoflop) if isoflop else None,
        "isoflop_reason": reason,
        "envelope": dataclasses.asdict(envelope) if envelope else None,
        "envelope_reason": no_envelope,
        "extrapolation_error": extrapolation_error(n, d, loss),
        "forms": [dataclasses.asdict(form) for form in compare_forms(n, d, loss)],
        "frontiers": [dataclasses.asdict(form) for form in compare_frontiers(flops, loss)],
    }
    if arguments.plot:
        names = (arguments.parameters, arguments.samples, arguments.loss)
        plot_law(arguments.plot, np.array(n), np.array(d), np.array(loss), law, names)
    deliver(facts, describe(facts, law, isoflop), arguments.json)
    return 0


def envelope_of(points: Points, arguments: argparse.Namespace) -> tuple[EnvelopeFit | None, str | None]:
    """Of the runs' training curves, or why there is none."""
    if not points.runs:
        return None, "rows of a file have no training curves"
    metric = find_metric(arguments.loss, points.runs)
    try:
        return fit_envelope(points.runs, metric, bootstrap=arguments.bootstrap, level=arguments.level), None
    except NotDetermined as error:
        return None, str(error)


def read(arguments: argparse.Namespace) -> Points:
    if all(path.is_dir() for path in arguments.data):
        runs = read_recorded_runs(arguments.data)
        points = points_of_runs(runs, find_metric(arguments.loss, runs))
        require_one_objective(points)
        return points
    if len(arguments.data) > 1:
        raise ConfigError("give one CSV file, or run folders only")
    return read_csv(arguments.data[0], arguments.parameters, arguments.samples, arguments.loss, arguments.flops)


def describe(facts: dict[str, Any], law: ParametricFit, isoflop: IsoflopFit | None) -> str:
    projected = facts["variable_projection"]
    lines = [f"{facts['runs']} runs; L(N, D) = E + A / N^alpha + B / D^beta", ""]
    lines.append(f"{'':<8}{'Huber on log L':>16}{f'{law.level:.0%} interval':>28}{'variable projection':>22}")
    for name in ("E", "A", "B", "alpha", "beta", "a", "b"):
        interval = law.intervals.get(name)
        between = f"{interval[0]:.5g} - {interval[1]:.5g}" if interval else ""
        lines.append(f"{name:<8}{getattr(law, name):>16.5g}{between:>28}{projected[name]:>22.5g}")
    lines += ["", f"N* ~ C^a, D* ~ C^b; residuals of log L: {law.residual_std:.2%}"]
    if facts["extrapolation_error"] is None:
        lines.append("predicting the largest fifth from the others: too few runs would be left")
    else:
        lines.append(f"predicting the largest fifth from the others: {facts['extrapolation_error']:.2%} median error")
    if law.outliers:
        lines.append(f"outliers, rows from 1: {', '.join(str(row + 1) for row in law.outliers)}")
    if isoflop is None:
        lines.append(f"IsoFLOP: {facts['isoflop_reason']}")
    else:
        bias = "" if isoflop.bias is None else f"; on this grid the method is off by {isoflop.bias:+.4f}"
        lines.append(f"IsoFLOP: N* ~ C^{isoflop.exponent:.4f} from {len(isoflop.budgets)} budgets{bias}")
    if facts["envelope"]:
        between = facts["envelope"]["intervals"].get("a")
        told = " ({:.3f} - {:.3f})".format(*between) if between else ""
        lines.append(f"envelope of the training curves: N* ~ C^{facts['envelope']['a']:.4f}{told}")
    else:
        lines.append(f"envelope: {facts['envelope_reason']}")
    for title, key in (("forms of N and D", "forms"), ("forms of compute, on the frontier", "frontiers")):
        if facts[key]:
            lines += ["", f"{title:<36}{'AICc above the best':>20}{'residuals':>12}{'largest fifth':>15}"]
        for form in facts[key]:
            told = "" if form["extrapolation_error"] is None else f"{form['extrapolation_error']:.2%}"
            lines.append(f"  {form['formula']:<34}{form['aicc']:>20.1f}{form['residual_std']:>12.2%}{told:>15}")
    lines += ["", *(f"left out: {name}: {why}" for name, why in facts["left_out"].items())]
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    sys.exit(run(main))
