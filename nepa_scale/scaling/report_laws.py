"""The laws that a report's runs determine, metric by metric; what they do not determine is a sentence."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nepa_scale.config import ConfigError
from nepa_scale.scaling.isoflop import IsoflopFit, fit_isoflop
from nepa_scale.scaling.parametric import ParametricFit, fit_parametric
from nepa_scale.scaling.report_isoflop import Resampled, resample
from nepa_scale.scaling.report_runs import ReportedRun


@dataclass(frozen=True)
class Metric:
    """What is measured of quality, the lower the better.

    name: in the JSON and in figures
    key: of metrics.jsonl
    definition: on the axis, after the title
    complement: 1 - value is shown: of an accuracy the error rate
    law: whether scaling laws are sought in it
    """

    name: str
    key: str
    title: str
    definition: str = ""
    complement: bool = False
    law: bool = True

    @property
    def axis(self) -> str:
        return f"{self.title}: {self.definition}" if self.definition else self.title

    def of(self, value: float) -> float:
        return 1 - value if self.complement else value


METRICS = (
    Metric("loss", "loss", "training loss", law=False),
    Metric("one_plus_loss", "one_plus_loss", "1 + loss"),
    Metric("centred_loss", "centred_cosine", "centred loss", "1 - cosine about the mean", complement=True),
    Metric("knn_error", "knn_top1", "kNN error rate", complement=True),
    Metric("probe_error", "probe_top1", "linear-probe error rate", complement=True),
    Metric("top1_error", "top1", "top-1 error rate", complement=True),
)


@dataclass(frozen=True)
class MetricLaw:
    """The laws of one metric, or why there are none.

    runs: that the laws were fitted to
    loss: their last values of the metric
    """

    metric: Metric
    runs: list[ReportedRun]
    loss: list[float]
    law: ParametricFit | None
    refusal: str
    isoflop: IsoflopFit | None
    isoflop_refusal: str
    resampled: Resampled | None

    @property
    def parameters(self) -> list[float]:
        return [float(run.parameters or 0) for run in self.runs]

    @property
    def samples(self) -> list[float]:
        return [run.last("samples_seen") or 0.0 for run in self.runs]

    @property
    def flops(self) -> list[float]:
        return [run.last("flops_seen") or 0.0 for run in self.runs]

    def facts(self) -> dict[str, Any]:
        return {
            "runs": [run.name for run in self.runs],
            "parametric": dataclasses.asdict(self.law) | {"a": self.law.a, "b": self.law.b} if self.law else None,
            "parametric_refusal": self.refusal or None,
            "isoflop": dataclasses.asdict(self.isoflop) | {"intervals": self._intervals()} if self.isoflop else None,
            "isoflop_refusal": self.isoflop_refusal or None,
        }

    def _intervals(self) -> dict[str, Any] | None:
        return {"exponent": self.resampled.exponent, "optima": self.resampled.optima} if self.resampled else None


def logged_metrics(runs: Sequence[ReportedRun]) -> list[Metric]:
    """Those that a run has."""
    return [metric for metric in METRICS if any(run.values(metric.key) for run in runs)]


def fit_metric(metric: Metric, runs: Sequence[ReportedRun], bootstrap: int) -> MetricLaw:
    """Fits the laws to those of the runs that have finished and have the metric.

    bootstrap: resamplings for the intervals; 0: none
    """
    used = [run for run in runs if run.status == "finished" and run.parameters and run.values(metric.key)]
    loss = [metric.of(run.values(metric.key)[-1]) for run in used]
    found = MetricLaw(metric, used, loss, None, "", None, "", None)
    law: ParametricFit | None = None
    isoflop: IsoflopFit | None = None
    resampled: Resampled | None = None
    refusal = isoflop_refusal = ""
    try:
        law = fit_parametric(found.parameters, found.samples, loss, bootstrap=bootstrap)
    except ConfigError as error:
        refusal = str(error)
    try:
        isoflop = fit_isoflop(found.parameters, found.samples, loss, flops=found.flops, law=law)
    except ConfigError as error:
        isoflop_refusal = str(error)
    if isoflop is not None and bootstrap > 0:
        resampled = resample(isoflop, found.parameters, found.samples, loss, found.flops, bootstrap=bootstrap)
    return dataclasses.replace(
        found, law=law, refusal=refusal, isoflop=isoflop, isoflop_refusal=isoflop_refusal, resampled=resampled
    )
