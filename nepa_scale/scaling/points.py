"""The runs that laws are fitted to: rows of a CSV file, or run folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nepa_scale.config import ConfigError, nearest
from nepa_scale.scaling.csv_file import read_csv_file
from nepa_scale.scaling.metrics import Metric
from nepa_scale.scaling.observations import NotDetermined
from nepa_scale.scaling.recorded_runs import RecordedRun, collapse
from nepa_scale.scaling.refusals import look_like_logarithms

SAMPLES_FROM_FLOPS = "6ND"  # the rule by which D may be had from N and C, where it is asked for: C = 6 N D
_POSITIVE_LOSS = ": fit 1 + loss, or an error rate"


@dataclass(frozen=True)
class Points:
    """What is fitted, row by row.

    names: of parameters, samples and loss, for figures and messages
    flops: None where the data have none
    runs: whose these are; empty for rows of a file
    left_out: runs or rows that are not fitted, and why
    rows: where each stands among all, from 0; None: as here
    """

    parameters: list[float]
    samples: list[float]
    loss: list[float]
    flops: list[float] | None
    names: tuple[str, str, str] = ("parameters", "samples", "loss")
    runs: list[RecordedRun] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    rows: list[int] | None = None

    def row(self, at: int) -> int:
        """Where the one at `at` stands among all, from 0."""
        return at if self.rows is None else self.rows[at]

    def label(self, at: int) -> str:
        """The run's name, or its row from 1."""
        return self.runs[at].name if self.runs else f"row {self.row(at) + 1}"

    def without(self, rows: Sequence[int]) -> Points:
        """Those but for `rows`, which are named in `left_out`.

        Raises:
            ConfigError: there is no such row.
        """
        beyond = [row + 1 for row in rows if row >= len(self.loss)]
        if beyond:
            raise ConfigError(f"--leave-out names row {beyond[0]}, and there are {len(self.loss)}")
        kept = [row for row in range(len(self.loss)) if row not in set(rows)]
        left_out = self.left_out | {self.label(row): "left out by --leave-out" for row in rows}
        flops = [self.flops[row] for row in kept] if self.flops else self.flops
        runs = [self.runs[row] for row in kept] if self.runs else []
        n, d, y = ([values[row] for row in kept] for values in (self.parameters, self.samples, self.loss))
        return Points(n, d, y, flops, self.names, runs, left_out, kept)


def weights_of_points(points: Points, metric: Metric) -> dict[str, list[str]]:
    """The names of the runs whose value of `metric` is of raw weights, and of those where it is of the average."""
    found: dict[str, list[str]] = {}
    for run in points.runs:
        if weights := metric.weights(run):
            found.setdefault(weights, []).append(run.name)
    return found


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


@dataclass(frozen=True)
class Columns:
    """Which columns of a CSV file are which.

    samples: None where they follow from the FLOPs, D = C / (6 N)
    flops: None where none are needed
    log10: those that hold logarithms
    """

    parameters: str
    samples: str | None
    loss: str
    flops: str | None = None
    log10: tuple[str, ...] = ()

    @property
    def options(self) -> dict[str, str]:
        """The columns that are read, and the option that names each."""
        options = ("--loss", self.loss), ("--parameters", self.parameters)
        others = ("--samples", self.samples), ("--flops", self.flops)
        return dict(options) | {option: column for option, column in others if column}


def read_csv(path: Path, columns: Columns) -> Points:
    """The named columns of a file with a header.

    Raises:
        ConfigError: it cannot be read, a column is missing, or a cell is not a positive number (row and column are
            named), rows repeat each other, or a column holds logarithms and is not in `columns.log10`.
    """
    file = read_csv_file(path)
    options = columns.options
    for option, column in options.items():
        derived = f"; or have D = C / (6 N) with --samples-from-flops {SAMPLES_FROM_FLOPS}" if columns.flops else ""
        file.require(column, option, derived if option == "--samples" else "")
    _require_different(columns)
    read = {
        option: file.numbers(column, log10=column in columns.log10, hint=_POSITIVE_LOSS if option == "--loss" else "")
        for option, column in options.items()
    }
    for option, column in options.items():
        if option != "--loss" and column not in columns.log10:
            _require_counts(path, column, read[option])
    file.require_different_rows()
    n, loss, flops = read["--parameters"], read["--loss"], read.get("--flops")
    if columns.samples is None:
        assert flops is not None
        samples = [c / (6 * size) for size, c in zip(n, flops, strict=True)]
    else:
        samples = read["--samples"]
    d = columns.samples or f"{columns.flops} / (6 {columns.parameters})"
    return Points(n, samples, loss, flops, (columns.parameters, d, columns.loss))


def _require_different(columns: Columns) -> None:
    """
    Raises:
        ConfigError: a column is read as two things, or logarithms of one that is not read.
    """
    options = columns.options
    named: dict[str, str] = {}
    for option, column in options.items():
        other = named.setdefault(column, option)
        if other != option:
            raise ConfigError(f"{option} and {other} both name the column {column}")
    for column in columns.log10:
        if column not in named:
            close = nearest(column, list(named))
            raise ConfigError(f"--log10 {column} is none of the columns that are read{close}: {', '.join(named)}")


def _require_counts(path: Path, column: str, values: Sequence[float]) -> None:
    """
    Raises:
        ConfigError: the values are such that they must be logarithms: small, and close to each other.
    """
    if look_like_logarithms(values):
        raise ConfigError(
            f"{path}: {column} holds {min(values):g} to {max(values):g}, which look like logarithms: read those of "
            f"base ten with --log10 {column}, or write the counts in full"
        )


def points_of_runs(runs: Sequence[RecordedRun], metric: Metric, with_changed: bool = False) -> Points:
    """Size, images seen, FLOPs and final value of those runs that have finished, have the metric and are sound.

    with_changed: also of those whose settings changed under way, which are of no one recipe
    """
    points = Points([], [], [], [], ("parameters", "samples", metric.name))
    for run in runs:
        value, seen, flops = metric.final(run), run.last("samples_seen"), run.last("flops_seen")
        why = "" if run.status == "finished" else f"{run.status}: {run.said}".rstrip(": ")
        why = why or collapse(run) or ("" if with_changed else run.mixed)
        why = why or ("" if value is not None else f"has no {metric.key}")
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
