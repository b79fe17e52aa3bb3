"""The laws that a report's runs determine, metric by metric; what they do not determine is a sentence."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from nepa_scale.config import ConfigError
from nepa_scale.scaling.forms import FittedForm, compare_forms, compare_frontiers
from nepa_scale.scaling.isoflop import IsoflopFit, fit_isoflop
from nepa_scale.scaling.metrics import Metric
from nepa_scale.scaling.observations import NotDetermined
from nepa_scale.scaling.parametric import ParametricFit, fit_parametric
from nepa_scale.scaling.points import Points, points_of_runs, require_one_objective
from nepa_scale.scaling.recorded_runs import RecordedRun


@dataclass(frozen=True)
class MetricLaw:
    """The laws of one metric, or why there are none.

    points: the runs that the laws were fitted to
    """

    metric: Metric
    points: Points
    law: ParametricFit | None = None
    refusal: str = ""
    isoflop: IsoflopFit | None = None
    isoflop_refusal: str = ""
    forms: list[FittedForm] = field(default_factory=list)
    frontiers: list[FittedForm] = field(default_factory=list)

    def facts(self) -> dict[str, Any]:
        return {
            "runs": [run.name for run in self.points.runs],
            "left_out": self.points.left_out,
            "parametric": dataclasses.asdict(self.law) | {"a": self.law.a, "b": self.law.b} if self.law else None,
            "parametric_refusal": self.refusal or None,
            "isoflop": self.isoflop.facts() if self.isoflop else None,
            "isoflop_refusal": self.isoflop_refusal or None,
            "forms": [dataclasses.asdict(form) for form in self.forms],
            "frontiers": [dataclasses.asdict(form) for form in self.frontiers],
        }


def fit_metric(metric: Metric, runs: Sequence[RecordedRun], bootstrap: int, with_changed: bool = False) -> MetricLaw:
    """Fits the laws to those of the runs that have finished, did not collapse and have the metric.

    bootstrap: resamplings for the intervals; 0: none
    with_changed: also to those whose settings changed under way
    """
    points = points_of_runs(runs, metric, with_changed)
    n, d, loss = points.parameters, points.samples, points.loss
    found = MetricLaw(metric, points)
    try:
        require_one_objective(points)
    except NotDetermined as error:
        return replace(found, refusal=str(error), isoflop_refusal=str(error))
    try:
        found = replace(found, law=fit_parametric(n, d, loss, bootstrap=bootstrap))
    except ConfigError as error:
        found = replace(found, refusal=str(error))
    try:
        found = replace(found, isoflop=fit_isoflop(n, d, loss, flops=points.flops, law=found.law, bootstrap=bootstrap))
    except ConfigError as error:
        found = replace(found, isoflop_refusal=str(error))
    if len(loss) > 0 and min(loss) > 0:
        found = replace(found, forms=compare_forms(n, d, loss), frontiers=compare_frontiers(points.flops or [], loss))
    return found
