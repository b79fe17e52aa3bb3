"""Scaling laws: quality against parameters, samples and compute, with intervals."""

from nepa_scale.scaling.isoflop import IsoflopFit, fit_isoflop
from nepa_scale.scaling.observations import NotDetermined
from nepa_scale.scaling.parametric import ParametricFit, extrapolation_error, fit_parametric, project_variables

__all__ = [
    "IsoflopFit",
    "NotDetermined",
    "ParametricFit",
    "extrapolation_error",
    "fit_isoflop",
    "fit_parametric",
    "project_variables",
]
