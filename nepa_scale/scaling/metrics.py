"""What is measured of a run's quality, the lower the better: what laws are sought in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nepa_scale.config import ConfigError, nearest
from nepa_scale.scaling.recorded_runs import RecordedRun, is_number
from nepa_scale.training.weights import weights_of

_END = 0.1  # of a run, over which what a few steps' images said is averaged


@dataclass(frozen=True)
class Metric:
    """
    name: in the JSON and in figures, and what --loss calls it
    key: of metrics.jsonl
    definition: on the axis, after the title
    complement: 1 - value is shown: of an accuracy the error rate
    law: whether scaling laws are sought in it
    noisy: a row tells of the images of a few steps, not of the validation set
    """

    name: str
    key: str
    title: str
    definition: str = ""
    complement: bool = False
    law: bool = True
    noisy: bool = False

    @property
    def axis(self) -> str:
        return f"{self.title}: {self.definition}" if self.definition else self.title

    def of(self, value: float) -> float:
        return 1 - value if self.complement else value

    def final(self, run: RecordedRun) -> float | None:
        """The run's last value; of a noisy metric the mean over its last tenth."""
        logged = [(row["step"], self.of(row[self.key])) for row in run.rows if is_number(row.get(self.key))]
        if not logged:
            return None
        if not self.noisy:
            return float(logged[-1][1])
        return float(np.mean([value for step, value in logged if step >= (1 - _END) * logged[-1][0]]))

    def weights(self, run: RecordedRun) -> str | None:
        """Of which weights the run's last value is, "raw" or "ema"; None where it has none, or training logs it."""
        rows = [] if self.noisy else [row for row in run.rows if is_number(row.get(self.key))]
        return weights_of(rows[-1], run.config) if rows else None


METRICS = (
    Metric("loss", "loss", "training loss", law=False, noisy=True),
    Metric("one_plus_loss", "one_plus_loss", "1 + loss", noisy=True),
    Metric("centred_loss", "centred_cosine", "centred loss", "1 - cosine about the mean", complement=True, noisy=True),
    Metric("reference_error", "reference_cosine", "error of told pixels", "1 - cosine", complement=True),
    Metric("knn_error", "knn_top1", "kNN error rate", complement=True),
    Metric("probe_error", "probe_top1", "linear-probe error rate", complement=True),
    Metric("top1_error", "top1", "top-1 error rate", complement=True),
)


def logged_metrics(runs: Sequence[RecordedRun]) -> list[Metric]:
    """Those of `METRICS` that a run has."""
    return [metric for metric in METRICS if any(run.values(metric.key) for run in runs)]


def list_metrics(runs: Sequence[RecordedRun]) -> str:
    """What laws may be fitted to: the metrics that runs have, and how many have each."""
    counts = {metric.name: sum(bool(run.values(metric.key)) for run in runs) for metric in METRICS if metric.law}
    found = ", ".join(f"{name} ({count})" for name, count in counts.items() if count)
    return f"of {len(runs)} runs there are {found}" if found else f"none of {', '.join(counts)} is in {len(runs)} runs"


def find_metric(name: str, runs: Sequence[RecordedRun]) -> Metric:
    """The one called `name`: of `METRICS`, or anything else that the runs log, as it is.

    Raises:
        ConfigError: no run has it; what they have is listed.
    """
    known = {metric.name: metric for metric in logged_metrics(runs)}
    logged = {key for run in runs for row in run.rows for key in row}
    if name in known:
        return known[name]
    if name not in logged:
        close = nearest(name, sorted({*known, *logged}))
        raise ConfigError(f"the metrics of these runs have no '{name}'{close}: {list_metrics(runs)}")
    return Metric(name, name, name)
