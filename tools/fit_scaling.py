"""Fits scaling laws: L(N, D) = E + A / N^alpha + B / D^beta, and IsoFLOP parabolas, with intervals.

DATA is one CSV file (separated by commas, semicolons or tabs), or run folders. N: parameters, D: samples (or tokens),
each in any unit; L must be positive and fall with both: of NEPA fit one_plus_loss, or an error rate (knn_error,
probe_error, reference_error), not the loss itself or an accuracy. Runs that have not finished, have collapsed, or whose
settings changed under way (another learning rate, a longer schedule) are left out, and named; --leave-out leaves out
others. Fits by a Huber loss on log L and by variable projection; reports bootstrap intervals, the error of predicting
the largest runs from the others, outliers and what they change, and how other forms of law do on the same data. What
the data do not determine is null, with a sentence that says why and which runs to add.

examples:
  python tools/fit_scaling.py points.csv --parameters params --samples tokens --loss loss --plot law.png
  python tools/fit_scaling.py runs/sweeps/tiny_imagenet --loss probe_error --json law.json
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

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
from nepa_scale.scaling.fit_text import (
    envelope_line,
    form_lines,
    isoflop_line,
    law_lines,
    outlier_lines,
    weights_line,
)
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
    weights_of_points,
)
from nepa_scale.scaling.recorded_runs import read_recorded_runs

Fit = TypeVar("Fit")
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
    parser.add_argument("--leave-out", type=row_numbers, default=[], metavar="ROWS",
                        help="rows, from 1, or runs in their order, that are not fitted: 3,7-9")  # fmt: skip
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


def row_numbers(word: str) -> list[int]:
    """An argparse type: "3,7-9" -> [2, 6, 7, 8]."""
    rows: set[int] = set()
    for part in word.split(","):
        first, _, last = part.strip().partition("-")
        if not (first.isdecimal() and (last or first).isdecimal() and 1 <= int(first) <= int(last or first)):
            raise argparse.ArgumentTypeError(f"{word} must be rows from 1, such as 3,7-9")
        rows |= set(range(int(first) - 1, int(last or first)))
    return sorted(rows)


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
    points = read(arguments).without(arguments.leave_out)
    n, d, loss = points.parameters, points.samples, points.loss
    drawn = {"bootstrap": arguments.bootstrap, "level": arguments.level}
    law, no_law = determined(lambda: fit_parametric(n, d, loss, **drawn))
    projected, no_projection = determined(lambda: project_variables(n, d, loss)) if law else (None, no_law)
    isoflop, no_isoflop = determined(lambda: fit_isoflop(n, d, loss, flops=points.flops, law=law, **drawn))
    envelope, no_envelope = envelope_of(points, arguments)
    flops = points.flops or (6 * np.array(n) * np.array(d)).tolist()
    facts = {
        "runs": len(loss),
        "left_out": points.left_out,
        "weights": weights_of_points(points, find_metric(arguments.loss, points.runs)) if points.runs else {},
        "samples_from_flops": arguments.samples_from_flops,
        "flops": "counted by the runs" if points.runs else arguments.flops or "6 N D",
        "parametric": law_facts(law, points),
        "parametric_reason": no_law,
        "variable_projection": law_facts(projected, points),
        "variable_projection_reason": no_projection,
        "isoflop": isoflop.facts() if isoflop else None,
        "isoflop_reason": no_isoflop,
        "envelope": dataclasses.asdict(envelope) if envelope else None,
        "envelope_reason": no_envelope,
        "extrapolation_error": extrapolation_error(n, d, loss) if law else None,
        "forms": [dataclasses.asdict(form) for form in compare_forms(n, d, loss)],
        "frontiers": [dataclasses.asdict(form) for form in compare_frontiers(flops, loss)],
    }
    if arguments.plot and law is not None:
        plot_law(arguments.plot, np.array(n), np.array(d), np.array(loss), law, points.names)
    elif arguments.plot:
        print(f"warning: {arguments.plot} is not written: there is no law to draw", file=sys.stderr)
    deliver(facts, describe(facts, points, law, projected, isoflop), arguments.json)
    return 0


def determined(fit: Callable[[], Fit]) -> tuple[Fit | None, str | None]:
    """What is fitted, or why the data do not determine it."""
    try:
        return fit(), None
    except NotDetermined as error:
        return None, str(error)


def law_facts(law: ParametricFit | None, points: Points) -> dict[str, Any] | None:
    """For JSON; rows, from 0, are those of the data as given."""
    if law is None:
        return None
    return dataclasses.asdict(law) | {
        "a": law.a,
        "b": law.b,
        "E_is_upper_limit": law.floor.startswith("<"),
        "outliers": [points.row(at) for at in law.outliers],
        "beaten": [[points.row(at) for at in pair] for pair in law.beaten],
        "with_outliers": law_facts(law.with_outliers, points),
    }


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


def describe(
    facts: dict[str, Any], points: Points, law: ParametricFit | None, projected: ParametricFit | None,
    isoflop: IsoflopFit | None,
) -> str:  # fmt: skip
    compute = "D = C / (6 N)" if facts["samples_from_flops"] else f"C: {facts['flops']}"
    lines = [f"{facts['runs']} runs; L(N, D) = E + A / N^alpha + B / D^beta; {compute}", ""]
    if law is None:
        lines.append(f"no law: {facts['parametric_reason']}")
    else:
        lines += law_lines(law, projected, facts["variable_projection_reason"])
        error = facts["extrapolation_error"]
        told = "they do not determine a law" if error is None else f"{error:.2%} median error"
        lines.append(f"predicting the largest fifth from the others: {told}")
        lines += outlier_lines(law, points)
    lines.append(f"IsoFLOP: {facts['isoflop_reason']}" if isoflop is None else isoflop_line(isoflop))
    envelope = facts["envelope"]
    lines.append(envelope_line(envelope) if envelope else f"envelope: {facts['envelope_reason']}")
    lines += form_lines("forms of N and D", facts["forms"])
    lines += form_lines("forms of compute, on the frontier", facts["frontiers"])
    if facts["weights"]:
        lines += ["", weights_line(facts["weights"], points.names[2])]
    lines += ["", *(f"left out: {name}: {why}" for name, why in facts["left_out"].items())]
    return "\n".join(lines).rstrip()


if __name__ == "__main__":
    sys.exit(run(main))
