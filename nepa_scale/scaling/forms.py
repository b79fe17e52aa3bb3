"""Other forms that a law could have, fitted alike and compared: is what the parametric law adds in the data at all?

Of N and D: the parametric law (2203.15556), the same without a floor, one of N or D alone, and Kaplan's (2001.08361,
equation 1.5). Of compute C, for the frontier: a power, a power with a floor (2010.14701, equation 1.1), and one that
saturates at both ends, as error rates do (2106.04560, section 2.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from scipy.optimize import least_squares

from nepa_scale.scaling.observations import HELD_OUT, Numbers, Values, checked

_EXPONENTS = (0.05, 0.2, 0.5, 1.0)  # starts
_FLOORS = (0.1, 0.5, 0.9)  # starts: of the lowest value
_EVALUATIONS = 150  # of a fit: one that needs more wanders along numbers that the data leave free
_BOUND = 60.0  # of the logarithm of a factor, in units of the geometric means


@dataclass(frozen=True)
class Form:
    """formula: for people; names: of its numbers, all positive; value: of numbers and inputs [inputs, rows]."""

    formula: str
    names: tuple[str, ...]
    value: Callable[[Numbers, Numbers], Numbers]


@dataclass(frozen=True)
class FittedForm:
    """A form at its least squares of log y.

    numbers: by name, in the units of the data
    aicc: Akaike's criterion for small samples, less that of the best form compared; 0 is the best, above 10 hopeless
    residual_std: of log y
    extrapolation_error: median relative error of the fifth of the runs with the most compute, predicted from the
        others; None where too few runs would be left, or the form grows out of range
    """

    formula: str
    numbers: dict[str, float]
    aicc: float
    residual_std: float
    extrapolation_error: float | None


OF_SIZE_AND_SAMPLES = (
    Form("E + A/N^alpha + B/D^beta", ("E", "A", "B", "alpha", "beta"),
         lambda p, x: p[0] + p[1] * x[0] ** -p[3] + p[2] * x[1] ** -p[4]),
    Form("A/N^alpha + B/D^beta", ("A", "B", "alpha", "beta"), lambda p, x: p[0] * x[0] ** -p[2] + p[1] * x[1] ** -p[3]),
    Form("((A/N)^(alpha/beta) + B/D)^beta", ("A", "B", "alpha", "beta"),
         lambda p, x: ((p[0] / x[0]) ** (p[2] / p[3]) + p[1] / x[1]) ** p[3]),
    Form("E + A/N^alpha", ("E", "A", "alpha"), lambda p, x: p[0] + p[1] * x[0] ** -p[2]),
    Form("E + B/D^beta", ("E", "B", "beta"), lambda p, x: p[0] + p[1] * x[1] ** -p[2]),
)  # fmt: skip
OF_COMPUTE = (
    Form("A/C^gamma", ("A", "gamma"), lambda p, x: p[0] * x[0] ** -p[1]),
    Form("E + A/C^gamma", ("E", "A", "gamma"), lambda p, x: p[0] + p[1] * x[0] ** -p[2]),
    Form("E + A/(C + C0)^gamma", ("E", "A", "C0", "gamma"), lambda p, x: p[0] + p[1] * (x[0] + p[2]) ** -p[3]),
)


def compare_forms(parameters: Values, samples: Values, loss: Values) -> list[FittedForm]:
    """Those of N and D that the runs are enough for, the best first.

    Raises:
        ConfigError: a number is not positive.
    """
    n, d, y = checked(parameters, samples, loss)
    return _compare(OF_SIZE_AND_SAMPLES, np.stack([n, d]), y, n * d)


def compare_frontiers(flops: Values, loss: Values) -> list[FittedForm]:
    """Those of C, fitted to the runs that no run of less or equal compute beats; empty where these are too few.

    Raises:
        ConfigError: a number is not positive.
    """
    c, _, y = checked(flops, flops, loss)
    rows = frontier(c, y)
    return _compare(OF_COMPUTE, c[None, rows], y[rows], c[rows])


def frontier(flops: Values, loss: Values) -> list[int]:
    """The rows that no row of less or equal compute beats, by compute."""
    kept: list[int] = []
    for row in np.lexsort((np.asarray(loss), np.asarray(flops))):
        if not kept or loss[row] < loss[kept[-1]]:
            kept.append(int(row))
    return kept


@np.errstate(all="ignore")  # numbers that the data leave free grow out of range, in the fit and in what it predicts
def _compare(forms: Sequence[Form], inputs: Numbers, y: Numbers, compute: Numbers) -> list[FittedForm]:
    found = []
    for form in forms:
        if len(y) < len(form.names) + 3:  # below, the criterion is not defined
            continue
        numbers, residuals = _fit(form, inputs, y)
        found.append((form, numbers, _aicc(residuals, len(form.names)), residuals))
    best = min((aicc for _, _, aicc, _ in found), default=0.0)
    return sorted(
        (
            FittedForm(
                form.formula,
                dict(zip(form.names, numbers.tolist(), strict=True)),
                aicc - best,
                float(residuals.std()),
                _extrapolation_error(form, inputs, y, compute),
            )
            for form, numbers, aicc, residuals in found
        ),
        key=lambda one: one.aicc,
    )


def _fit(form: Form, inputs: Numbers, y: Numbers) -> tuple[Numbers, Numbers]:
    """The numbers and the residuals of log y, from the best of a grid of starts.

    Inputs are taken in units of their geometric means and y in units of its own, so that all factors are near 1.
    """
    centres, scale = np.exp(np.log(inputs).mean(1, keepdims=True)), np.exp(np.log(y).mean())
    x, target = inputs / centres, np.log(y / scale)

    def residuals(logs: Numbers) -> Numbers:
        return np.nan_to_num(np.log(form.value(np.exp(logs), x)), nan=1e3, posinf=1e3, neginf=-1e3) - target

    best = None
    for start in _starts(form, y / scale):
        fitted = least_squares(
            residuals, start, bounds=(-_BOUND, _BOUND), xtol=1e-10, ftol=1e-10, gtol=1e-10, max_nfev=_EVALUATIONS
        )
        if best is None or fitted.cost < best.cost:
            best = fitted
    assert best is not None
    return _in_units(form, np.exp(best.x), centres.ravel(), scale), best.fun


def _starts(form: Form, y: Numbers) -> list[Numbers]:
    floors = _FLOORS if "E" in form.names else (1.0,)
    starts = []
    for exponent, floor in product(_EXPONENTS, floors):
        level = max(1 - floor, 0.1) if "E" in form.names else 1.0
        values = {"E": floor * y.min(), "alpha": exponent, "beta": exponent, "gamma": exponent, "C0": 0.1}
        starts.append(np.log([values.get(name, level) for name in form.names]))
    return starts


def _in_units(form: Form, numbers: Numbers, centres: Numbers, scale: float) -> Numbers:
    """The numbers for inputs and y as they are."""
    p = dict(zip(form.names, numbers, strict=True))
    if form.formula.startswith("(("):  # Kaplan's: y scales as the whole, hence A and B by its roots
        p["A"] *= centres[0] * scale ** (1 / p["alpha"])
        p["B"] *= centres[1] * scale ** (1 / p["beta"])
        return np.array(list(p.values()))
    for factor, exponent, centre in (("A", "alpha", 0), ("B", "beta", -1), ("A", "gamma", 0)):
        if factor in p and exponent in p:
            p[factor] *= scale * centres[centre] ** p[exponent]
    if "E" in p:
        p["E"] *= scale
    if "C0" in p:
        p["C0"] *= centres[0]
    return np.array(list(p.values()))


def _aicc(residuals: Numbers, numbers: int) -> float:
    rows, unknowns = len(residuals), numbers + 1  # and the variance
    variance = max(float((residuals**2).mean()), 1e-24)
    return float(rows * np.log(variance) + 2 * unknowns + 2 * unknowns * (unknowns + 1) / max(rows - unknowns - 1, 0.5))


def _extrapolation_error(form: Form, inputs: Numbers, y: Numbers, compute: Numbers) -> float | None:
    order = np.argsort(compute, kind="stable")
    kept = order[: len(order) - max(1, round(HELD_OUT * len(order)))]
    if len(kept) < len(form.names) + 1:
        return None
    held = order[len(kept) :]
    numbers, _ = _fit(form, inputs[:, kept], y[kept])
    error = float(np.median(np.abs(form.value(numbers, inputs[:, held]) / y[held] - 1)))
    return error if np.isfinite(error) else None
