"""Fits scaling laws: L(N, D) = E + A / N^alpha + B / D^beta, and IsoFLOP parabolas, with intervals.

DATA is one CSV file, or run folders. N: parameters, D: samples (or tokens), each in any unit; L must be positive: of
NEPA fit one_plus_loss, or an error rate, not the loss itself. Fits by a Huber loss on log L and by variable projection;
reports 90% bootstrap intervals, the error of predicting the largest runs from the others, and outliers. What the data
cannot determine is refused, with the runs to add.

examples:
  python tools/fit_scaling.py points.csv --parameters params --samples tokens --loss loss --plot law.png
  python tools/fit_scaling.py runs/sweep/* --loss one_plus_loss --json law.json
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np

from nepa_scale.config import ConfigError
from nepa_scale.profiling.arguments import Parser, add_result_options, deliver, run
from nepa_scale.scaling import IsoflopFit, NotDetermined, ParametricFit, fit_isoflop, fit_parametric, project_variables
from nepa_scale.scaling.observations import checked
from nepa_scale.scaling.plots import plot_law
from nepa_scale.scaling.runs import Columns, read_csv, read_runs

HELD_OUT = 0.2  # of the runs, those with the most compute, predicted from the others


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
    columns = read(arguments)
    law = fit_parametric(
        columns.parameters, columns.samples, columns.loss, bootstrap=arguments.bootstrap, level=arguments.level
    )
    projected = project_variables(columns.parameters, columns.samples, columns.loss)
    isoflop: IsoflopFit | None = None
    reason = None
    try:
        isoflop = fit_isoflop(columns.parameters, columns.samples, columns.loss, flops=columns.flops, law=law)
    except NotDetermined as error:
        reason = str(error)
    facts = {
        "runs": len(columns.loss),
        "parametric": dataclasses.asdict(law) | {"a": law.a, "b": law.b},
        "variable_projection": dataclasses.asdict(projected) | {"a": projected.a, "b": projected.b},
        "isoflop": dataclasses.asdict(isoflop) if isoflop else None,
        "isoflop_reason": reason,
        "extrapolation_error": extrapolation_error(columns),
    }
    if arguments.plot:
        n, d, loss = checked(columns.parameters, columns.samples, columns.loss)
        plot_law(arguments.plot, n, d, loss, law, (arguments.parameters, arguments.samples, arguments.loss))
    deliver(facts, describe(facts, law, isoflop), arguments.json)
    return 0


def read(arguments: argparse.Namespace) -> Columns:
    if all(path.is_dir() for path in arguments.data):
        return read_runs(arguments.data, arguments.loss)
    if len(arguments.data) > 1:
        raise ConfigError("give one CSV file, or run folders only")
    return read_csv(arguments.data[0], arguments.parameters, arguments.samples, arguments.loss, arguments.flops)


def extrapolation_error(columns: Columns) -> float | None:
    """Median relative error of the runs with the most compute, predicted from the others; None if these are too few."""
    n, d, loss = checked(columns.parameters, columns.samples, columns.loss)
    order = np.argsort(n * d)
    kept = order[: len(order) - max(1, round(HELD_OUT * len(order)))]
    held = order[len(kept) :]
    try:
        law = fit_parametric(n[kept], d[kept], loss[kept], bootstrap=0)
    except NotDetermined:
        return None
    return float(np.median(np.abs(law.predict(n[held], d[held]) / loss[held] - 1)))


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
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(main))
