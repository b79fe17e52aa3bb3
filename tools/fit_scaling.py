"""Fits scaling laws: L(N, D) = E + A / N^alpha + B / D^beta, and IsoFLOP parabolas, with intervals.

DATA is one CSV file (separated by commas, semicolons or tabs), or run folders. N: parameters, D: samples (or tokens),
each in any unit; L must be positive and fall with both: of NEPA fit one_plus_loss, or an error rate (knn_error,
probe_error, reference_error), not the loss itself or an accuracy. Runs that have not finished, have collapsed, or whose
settings changed under way (another learning rate, a longer schedule) are left out, and named. Fits by a Huber loss on
log L and by variable projection; reports 90% bootstrap intervals, the error of predicting the largest runs from the
others, outliers, and how other forms of law do on the same data. What the data cannot determine is
refused, with the runs to add.

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

from nepa_scale.command_line import Parser, add_result_options, choice, deliver, run
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
from nepa_scale.scaling.direction import require_falling
from nepa_scale.scaling.envelope import EnvelopeFit, fit_envelope
from nepa_scale.scaling.forms import compare_forms, compare_frontiers
from nepa_scale.scaling.metrics import find_metric, list_metrics
from nepa_scale.scaling.plots import plot_law
from nepa_scale.scaling.points import (
    SAMPLES_FROM_FLOPS,
    Columns,
    Points,
    points_of_runs,
    read_csv,
    require_one_objective,
)
from nepa_scale.scaling.recorded_runs import read_recorded_runs

PARAMETERS, SAMPLES, LOSS = "parameters", "samples", "loss"  # what the columns are called unless another is named
RESAMPLINGS = 10  # fewer have no tails to take a 90% interval from


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("data", nargs="+", type=Path, metavar="DATA", help="a CSV file, or run folders")
    parser.add_argument("--parameters", metavar="COL", help=f"column of N (default: {PARAMETERS})")
    parser.add_argument("--samples", metavar="COL", help=f"column of D (default: {SAMPLES})")
    parser.add_argument("--loss", metavar="COL", help=f"column (default: {LOSS}), or metric of the runs (no default)")
    parser.add_argument("--flops", metavar="COL", help="column of compute (default: of runs their own, else 6 N D)")
    parser.add_argument("--samples-from-flops", type=choice("--samples-from-flops", (SAMPLES_FROM_FLOPS,)),
                        metavar=SAMPLES_FROM_FLOPS, help="for want of D: D = C / (6 N), with C of --flops")  # fmt: skip
    parser.add_argument("--log10", action="append", default=[], metavar="COL",
                        help="a column, named above, that holds logarithms to base ten; may be repeated")  # fmt: skip
    parser.add_argument("--bootstrap", type=resamplings, default=200, metavar="N", help="(default: 200; 0: none)")
    parser.add_argument("--level", type=level, default=0.9, metavar="P", help="of the intervals (default: 0.9)")
    parser.add_argument("--with-changed", action="store_true",
                        help="also runs whose settings changed under way, which are of no one recipe")  # fmt: skip
    add_result_options(parser)
    arguments = parser.parse_args()
    if arguments.samples_from_flops and arguments.samples:
        parser.error(
            "--samples names the column of D, so that --samples-from-flops has nothing to do: give one of them"
        )
    if arguments.samples_from_flops and not arguments.flops:
        parser.error("--samples-from-flops needs the column of compute: name it with --flops")
    return arguments


def resamplings(word: str) -> int:
    """An argparse type: 0, or enough for an interval."""
    if not word.isdecimal() or 0 < int(word) < RESAMPLINGS:
        raise argparse.ArgumentTypeError(f"{word} must be 0, for no intervals, or a whole number from {RESAMPLINGS}")
    return int(word)


def level(word: str) -> float:
    """An argparse type: a share between 0 and 1, neither included."""
    try:
        value = float(word)
    except ValueError:
        value = float("nan")
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{word} must lie between 0 and 1: 0.9 for 90%")
    return value


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
        "samples_from_flops": arguments.samples_from_flops,
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
        plot_law(arguments.plot, np.array(n), np.array(d), np.array(loss), law, points.names)
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
    folders = [path.is_dir() for path in arguments.data]
    if len(folders) > 1 and not all(folders):
        raise ConfigError("give one CSV file, or run folders only")
    if all(folders):
        return read_runs(arguments)
    columns = Columns(
        parameters=arguments.parameters or PARAMETERS,
        samples=None if arguments.samples_from_flops else arguments.samples or SAMPLES,
        loss=arguments.loss or LOSS,
        flops=arguments.flops,
        log10=tuple(arguments.log10),
    )
    points = read_csv(arguments.data[0], columns)
    require_falling(points)
    return points


def read_runs(arguments: argparse.Namespace) -> Points:
    for option, given in (
        ("--parameters", arguments.parameters not in (None, PARAMETERS)),
        ("--samples", arguments.samples not in (None, SAMPLES)),
        ("--flops", arguments.flops),
        ("--samples-from-flops", arguments.samples_from_flops),
        ("--log10", arguments.log10),
    ):
        if given:
            raise ConfigError(
                f"{option} is for columns of a CSV file: runs know their sizes, samples and FLOPs themselves"
            )
    runs = read_recorded_runs(arguments.data)
    if arguments.loss is None:
        raise ConfigError(f"name what to fit with --loss: {list_metrics(runs)}")
    points = points_of_runs(runs, find_metric(arguments.loss, runs), arguments.with_changed)
    require_one_objective(points)
    require_falling(points)
    return points


def describe(facts: dict[str, Any], law: ParametricFit, isoflop: IsoflopFit | None) -> str:
    projected = facts["variable_projection"]
    derived = "; D = C / (6 N)" if facts["samples_from_flops"] else ""
    lines = [f"{facts['runs']} runs; L(N, D) = E + A / N^alpha + B / D^beta{derived}", ""]
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
