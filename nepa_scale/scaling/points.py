"""The runs that laws are fitted to: rows of a CSV file, or run folders."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nepa_scale.config import ConfigError, nearest
from nepa_scale.scaling.metrics import Metric
from nepa_scale.scaling.observations import NotDetermined
from nepa_scale.scaling.recorded_runs import RecordedRun, collapse


@dataclass(frozen=True)
class Points:
    """What is fitted, row by row.

    flops: None where the data have none
    runs: whose these are; empty for rows of a file
    left_out: runs that are not fitted, and why
    """

    parameters: list[float]
    samples: list[float]
    loss: list[float]
    flops: list[float] | None
    runs: list[RecordedRun] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def require_one_objective(points: Points) -> None:
    """
    Raises:
        NotDetermined: the runs were pretrained with different objectives, whose laws are not one.
    """
    objectives = sorted({run.objective for run in points.runs})
    if len(objectives) > 1:
        raise NotDetermined(
            f"the runs are of {', '.join(filter(None, objectives))}, whose laws are not one: give the run folders of "
            "one objective at a time"
        )


def read_csv(path: Path, parameters: str, samples: str, loss: str, flops: str | None) -> Points:
    """The named columns of a file with a header.

    Raises:
        ConfigError: it cannot be read, a column is missing, or a cell is not a number (row and column are named).
    """
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    if not rows:
        raise ConfigError(f"{path} holds no rows below its header")
    wanted = {"parameters": parameters, "samples": samples, "loss": loss} | ({"flops": flops} if flops else {})
    for option, name in wanted.items():
        if name not in rows[0]:
            found = [key for key in rows[0] if key]
            raise ConfigError(
                f"{path} has no column '{name}'{nearest(name, found)}: name one with --{option} ({', '.join(found)})"
            )
    columns = {
        option: [_number(row[name], path, at, name) for at, row in enumerate(rows)] for option, name in wanted.items()
    }
    return Points(columns["parameters"], columns["samples"], columns["loss"], columns.get("flops"))


def points_of_runs(runs: Sequence[RecordedRun], metric: Metric) -> Points:
    """Size, images seen, FLOPs and final value of those runs that have finished, have the metric and are sound."""
    points = Points([], [], [], [])
    for run in runs:
        value, seen, flops = metric.final(run), run.last("samples_seen"), run.last("flops_seen")
        why = "" if run.status == "finished" else f"{run.status}: {run.said}".rstrip(": ")
        why = why or collapse(run) or ("" if value is not None else f"has no {metric.key}")
        if why or value is None or not run.parameters or not seen or not flops:
            points.left_out[run.name] = why or "its metrics do not say how large it is, or how long it trained"
            continue
        points.runs.append(run)
        points.parameters.append(float(run.parameters))
        points.samples.append(seen)
        points.loss.append(value)
        assert points.flops is not None
        points.flops.append(flops)
    return points


def _number(cell: str | None, path: Path, row: int, column: str) -> float:
    try:
        return float(cell or "")
    except ValueError:
        raise ConfigError(f"{path}, row {row + 1}: {column} is '{cell or ''}', not a number") from None
