"""What losses must show before a law is said to be theirs: an effect of N and of D, told well enough from the noise."""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.stats import chi2

from nepa_scale.scaling.observations import UNKNOWNS, NotDetermined, Numbers, Values
from nepa_scale.scaling.resampling import PRECISION, Interval
from nepa_scale.scaling.solver import EXPONENTS

LOGARITHMS = (2.0, 40.0)  # between which the logarithms of all counts lie, to base 10 or e
_NARROW = 3.0  # largest over smallest: all logarithms have less, runs that tell an exponent have more
_AS_GOOD = 2.0  # of AICc
_WIDEST = 6.0  # largest over smallest exponent of an interval
_NONE = 1e9  # of a criterion: larger than any
USUAL = 0.35  # an exponent as published laws have them
_REACH = 0.7  # of its value: to what an exponent must be known; chosen by the coverage in docs/scaling.md
_SURE = 0.95  # that the noise is not larger than is assumed of it
_NORMAL = 1.645  # quantile of a 90% interval
_ABSOLUTE = np.pi / 2  # variance of a fit of absolute deviations over that of least squares
_POWERS = np.geomspace(*EXPONENTS, 40)
_OTHERS = {"alpha": ("N", "parameters", "sizes"), "beta": ("D", "samples", "numbers of samples")}


def look_like_logarithms(values: Values) -> bool:
    """Whether numbers of parameters or samples are so small and so close together as only their logarithms are."""
    low, high = min(values), max(values)
    return bool(LOGARITHMS[0] <= low and high <= LOGARITHMS[1] and high < _NARROW * low)


def require_counts(parameters: Numbers, samples: Numbers) -> None:
    """
    Raises:
        NotDetermined: a column looks like logarithms of counts.
    """
    for name, values in (("parameters", parameters), ("samples", samples)):
        if look_like_logarithms(values):
            raise NotDetermined(
                f"{name} lie between {values.min():g} and {values.max():g}, as logarithms of counts do: give the "
                f"counts themselves, of runs that differ by more than {_NARROW:g} times"
            )


def require_differences(y: Numbers) -> None:
    """
    Raises:
        NotDetermined: the loss is constant.
    """
    if np.ptp(np.log(y)) <= PRECISION:
        raise NotDetermined(
            f"the loss is {y[0]:g} in all runs, which determines no law: fit a metric that differs between runs"
        )


def require_effects(n: Numbers, d: Numbers, y: Numbers, residuals: Numbers) -> None:
    """
    residuals: of log L, by the law's least squares

    Raises:
        NotDetermined: the loss is told as well without N, or without D, by AICc.
    """
    law = aicc(residuals, 5)
    for exponent, values, other in (("alpha", d, "B/D^beta"), ("beta", n, "A/N^alpha")):
        if least_aicc(values, y) <= law + _AS_GOOD:
            what, plural = _OTHERS[exponent][0], _OTHERS[exponent][2]
            raise NotDetermined(
                f"the data do not determine {exponent}: E + {other}, without {what}, is as good by AICc; add runs of "
                f"{plural} further apart, or more runs between these"
            )


def require_range(residuals: Numbers, usual_slopes: Numbers, n: Numbers, d: Numbers) -> None:
    """Holds the range of N and D against the noise, by how well these runs would tell exponents of a usual law.

    By that and not by the fitted exponents: those laws whose exponents happen to come out large would be printed, and
    their intervals would be off more often than they say. The noise is the largest that the residuals allow, since of
    few runs some lie close to a law by chance.

    residuals: of log L, by the law's least squares; usual_slopes: of log L by the usual law's numbers, [5, rows]

    Raises:
        NotDetermined: the exponents would not be told.
    """
    freedom = max(1, len(residuals) - UNKNOWNS)
    noise = max(float(np.sqrt((residuals**2).sum() / chi2.ppf(1 - _SURE, freedom))), PRECISION)
    spread = np.sqrt(_ABSOLUTE * np.diag(np.linalg.pinv(usual_slopes @ usual_slopes.T))[3:])
    for name, values, each in zip(("alpha", "beta"), (n, d), spread, strict=True):
        reach = _NORMAL * noise * float(each) / USUAL
        if reach > _REACH:
            _, column, plural = _OTHERS[name]
            raise NotDetermined(
                f"{len(n)} runs over a range of {values.max() / values.min():.3g} times in {column} do not determine "
                f"{name} where the noise may be {noise:.2%} of the loss: an exponent of {USUAL:g} would be known to "
                f"{reach:.0%}; add runs of {plural} further apart, more runs between these, or other seeds of each"
            )


def require_inside(name: str, exponent: float) -> None:
    """
    Raises:
        NotDetermined: an exponent is at a bound of the search.
    """
    if not 1.01 * EXPONENTS[0] < exponent < 0.99 * EXPONENTS[1]:
        _, _, plural = _OTHERS[name]
        raise NotDetermined(
            f"the data do not determine {name}, which fits best at {exponent:.2g}, the bound of the search; add runs "
            f"of {plural} further apart, or more runs between these"
        )


def require_narrow(intervals: dict[str, Interval], n: Numbers, d: Numbers, noise: float) -> None:
    """
    intervals: of alpha and beta at 90%
    noise: standard deviation of log L about the law

    Raises:
        NotDetermined: one has no width, reaches the bounds of the search (0 lies beyond the lower), or is too wide.
    """
    for name, values in (("alpha", n), ("beta", d)):
        low, high = intervals[name]
        _, column, plural = _OTHERS[name]
        if not high > low:
            why = f"its interval has no width at {low:.3g}"
        elif low <= 1.05 * EXPONENTS[0]:
            why = f"its 90% interval, {low:.3g} to {high:.3g}, reaches the bound of the search, so that it may be 0"
        elif high >= 0.98 * EXPONENTS[1]:
            why = f"its 90% interval, {low:.3g} to {high:.3g}, reaches the bound of the search"
        elif high > _WIDEST * low:
            why = f"its 90% interval is {low:.3g} to {high:.3g}"
        else:
            continue
        raise NotDetermined(
            f"a range of {values.max() / values.min():.3g} times in {column}, at residuals of {noise:.2%} of the loss, "
            f"does not determine {name}: {why}; add runs of {plural} further apart, or more runs between these"
        )


def aicc(residuals: Numbers, numbers: int) -> float:
    """Akaike's criterion for small samples; residuals below `PRECISION` are as good as none."""
    rows, unknowns = len(residuals), numbers + 1  # and the variance
    variance = max(float((residuals**2).mean()), PRECISION**2)
    return float(rows * np.log(variance) + 2 * unknowns + 2 * unknowns * (unknowns + 1) / max(rows - unknowns - 1, 0.5))


def least_aicc(values: Numbers, y: Numbers) -> float:
    """Of a power of `values` with or without a floor, and of a constant."""
    x, log_y = np.log(values) - np.log(values).mean(), np.log(y)
    best = aicc(log_y - log_y.mean(), 1)
    if np.ptp(x) == 0:
        return best
    slope, level = np.polyfit(x, log_y, 1)
    best = min(best, aicc(log_y - level - slope * x, 2))

    def criterion(power: float) -> float:
        columns = np.stack([np.ones_like(x), np.exp(-power * x)], axis=1) / y[:, None]
        floor, factor = np.linalg.lstsq(columns, np.ones_like(y), rcond=None)[0]
        return aicc(np.log(columns @ [floor, factor]), 3) if floor > 0 and factor > 0 else _NONE

    at = int(np.argmin([criterion(power) for power in _POWERS]))
    near = _POWERS[max(at - 1, 0)], _POWERS[min(at + 1, len(_POWERS) - 1)]
    return min(best, float(minimize_scalar(criterion, bounds=near, method="bounded", options={"xatol": 1e-9}).fun))
