"""IsoFLOP analysis (Chinchilla, 2203.15556, approach 2): at each budget, a parabola of loss over log size.

The parabola's vertex is a biased estimate of the optimum even without noise, since the true curve is no parabola
(2603.22339). The bias of the grid at hand is therefore measured, by the same analysis of a known law on the same runs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from nepa_scale.scaling.observations import NotDetermined, Numbers, Values, checked
from nepa_scale.scaling.parametric import ParametricFit
from nepa_scale.scaling.resampling import PRECISION, Interval, wild_noise

SIZES = 4  # of one budget: a parabola through three is no fit
BUDGETS = 3  # a line through two is no fit
RANGE = 10.0  # of compute
_SAME = 0.1  # of log10 compute: runs closer than that to their neighbour share a budget
_LEAST_RANGE = 9.5  # whole steps miss their budget by a little
_JUDGED = 0.9  # level of the interval by which an exponent is refused
_DRAWN = 100  # resamplings for that, where no intervals are asked for
_DETERMINED = 0.8  # of the resamplings must have an exponent, too


@dataclass(frozen=True)
class Budget:
    """One parabola: compute (FLOPs), its runs, and the size and loss at its vertex."""

    flops: float
    runs: int
    optimum: float
    loss: float


@dataclass(frozen=True)
class IsoflopFit:
    """N*(C) = coefficient * C^exponent through the vertices.

    bias: exponent of the same analysis of the parametric law on the same runs, less the law's own; None without a law
    left_out: budgets without a vertex inside their sizes, or with too few sizes
    intervals: at `level`, of the exponent; empty without bootstrap
    optima: at `level`, of each budget's best size
    drawn: exponent and coefficient of each resampling
    """

    exponent: float
    coefficient: float
    budgets: list[Budget]
    bias: float | None
    left_out: int
    level: float = 0.9
    intervals: dict[str, Interval] = field(default_factory=dict)
    optima: list[Interval | None] = field(default_factory=list)
    drawn: list[tuple[float, float]] = field(default_factory=list, repr=False)

    def facts(self) -> dict[str, Any]:
        """For JSON: all but what was drawn."""
        facts = dataclasses.asdict(self)
        del facts["drawn"]
        facts["intervals"]["optima"] = facts.pop("optima")
        return facts

    def sizes(self, flops: Numbers) -> tuple[Numbers, Numbers]:
        """Lower and upper bound of the best size for so much compute."""
        low, high = np.quantile([factor * flops**power for power, factor in self.drawn], _tails(self.level), axis=0)
        return low, high


@dataclass(frozen=True)
class Parabola:
    """Of one budget. rows: of its runs, from 0; curve: of the loss over log N."""

    rows: list[int]
    curve: np.polynomial.Polynomial


def fit_isoflop(
    parameters: Values,
    samples: Values,
    loss: Values,
    *,
    flops: Values | None = None,
    law: ParametricFit | None = None,
    bootstrap: int = 200,
    level: float = 0.9,
    seed: int = 0,
) -> IsoflopFit:
    """The best size for the compute, with bootstrap intervals.

    flops: compute of each run; None: 6 N D. law: for the measurement of the bias. bootstrap: resamplings; 0: no
    intervals, though the exponent is judged by some

    Raises:
        ConfigError: a number is not positive.
        NotDetermined: fewer than three budgets have runs of four sizes with an optimum among them, these span less than
            ten times the compute, the exponent's interval holds 0, or its bias is as large as itself.
    """
    n, d, y = checked(parameters, samples, loss)
    c = 6 * n * d if flops is None else checked(flops, d, y)[0]
    budgets, left_out = _budgets(n, c, y)
    _require_budgets(budgets)
    exponent, coefficient = _power(budgets)
    bias = None
    if law is not None:
        exact, _ = _budgets(n, c, law.predict(n, d))
        bias = _power(exact)[0] - law.a if len(exact) >= 2 else None
    fit = IsoflopFit(exponent, coefficient, budgets, bias, left_out, level)
    resampled = _resample(fit, n, c, y, bootstrap or _DRAWN, seed)
    _require_exponent(fit, resampled)
    if bootstrap == 0:
        return fit
    drawn = [_power(each) for each in resampled]
    low, high = np.quantile([power for power, _ in drawn], _tails(level))
    optima = [
        _interval([same.optimum for each in resampled for same in each if same.flops == budget.flops], level)
        for budget in budgets
    ]
    return dataclasses.replace(fit, intervals={"exponent": (float(low), float(high))}, optima=optima, drawn=drawn)


def parabolas(
    fit: IsoflopFit, parameters: Sequence[float] | Numbers, loss: Sequence[float] | Numbers,
    flops: Sequence[float] | Numbers,
) -> list[Parabola]:  # fmt: skip
    """Those whose lowest points are `fit.budgets`, in their order; a budget's runs are those nearest to it."""
    log_flops, log_n, y = np.log(flops), np.log(parameters), np.array(loss)
    found = []
    for budget in fit.budgets:
        rows = np.sort(np.argsort(np.abs(log_flops - np.log(budget.flops)), kind="stable")[: budget.runs])
        found.append(Parabola(rows.tolist(), np.polynomial.Polynomial.fit(log_n[rows], y[rows], 2)))
    return found


def _require_budgets(budgets: list[Budget]) -> None:
    if len(budgets) < BUDGETS:
        raise NotDetermined(
            f"{len(budgets)} budgets have runs of {SIZES} sizes with the best among them: add runs of equal compute, "
            f"on both sides of the best size, at {BUDGETS} budgets or more"
        )
    span = budgets[-1].flops / budgets[0].flops
    if span < _LEAST_RANGE:
        raise NotDetermined(
            f"the budgets with a best size among theirs span {span:.3g} times the compute, and an exponent needs "
            f"{RANGE:g} times: add runs of equal compute at a larger or a smaller budget"
        )


def _require_exponent(fit: IsoflopFit, resampled: list[list[Budget]]) -> None:
    add = "add budgets further apart, or more sizes on both sides of the best"
    if fit.bias is not None and abs(fit.bias) >= abs(fit.exponent):
        raise NotDetermined(
            f"the method's own bias on this grid, {fit.bias:+.3f}, is as large as the exponent, "
            f"{fit.exponent:.3f}: {add}"
        )
    low, high = np.quantile([_power(each)[0] for each in resampled], _tails(_JUDGED)) if resampled else (0.0, 0.0)
    if low <= 0 <= high:
        raise NotDetermined(f"the exponent may be 0: its 90% interval is {low:.3f} to {high:.3f}; {add}")


def _resample(fit: IsoflopFit, n: Numbers, c: Numbers, y: Numbers, count: int, seed: int) -> list[list[Budget]]:
    """The budgets of losses as they might have been: on the parabolas, with the residuals' signs drawn anew.

    Empty where too many have no optimum among their sizes.
    """
    again = np.tile(y, (count, 1))
    random = np.random.default_rng(seed)
    for parabola in parabolas(fit, n, y, c):
        rows, x = parabola.rows, np.log(n[parabola.rows])
        level = parabola.curve(x)
        slopes = np.stack([np.ones_like(x), x - x.mean(), (x - x.mean()) ** 2])
        again[:, rows] = level * (1 + wild_noise(y[rows] / level - 1, slopes, count, random))
    again = np.maximum(again, PRECISION * y.min())
    found = [_budgets(n, c, each)[0] for each in again]
    found = [budgets for budgets in found if len(budgets) >= 2]
    return found if len(found) >= _DETERMINED * count else []


def _budgets(n: Numbers, c: Numbers, y: Numbers) -> tuple[list[Budget], int]:
    order = np.argsort(c)
    groups = np.split(order, np.flatnonzero(np.diff(np.log10(c[order])) > _SAME) + 1)
    found, left_out = [], 0
    for rows in groups:
        vertex = _vertex(np.log(n[rows]), y[rows])
        if vertex is None:
            left_out += 1
        else:
            found.append(Budget(float(np.exp(np.log(c[rows]).mean())), len(rows), float(np.exp(vertex[0])), vertex[1]))
    return found, left_out


def _vertex(log_n: Numbers, loss: Numbers) -> tuple[float, float] | None:
    """log N and loss at the parabola's lowest point, if that lies among the sizes."""
    if len(np.unique(log_n)) < SIZES:
        return None
    centre = log_n.mean()
    curvature, slope, level = np.polyfit(log_n - centre, loss, 2)
    if curvature <= 0:
        return None
    at = -slope / (2 * curvature)
    if not log_n.min() <= at + centre <= log_n.max():
        return None
    return float(at + centre), float(level - slope**2 / (4 * curvature))


def _power(budgets: list[Budget]) -> tuple[float, float]:
    exponent, intercept = np.polyfit(np.log([b.flops for b in budgets]), np.log([b.optimum for b in budgets]), 1)
    return float(exponent), float(np.exp(intercept))


def _interval(values: list[float], level: float) -> Interval | None:
    if not values:
        return None
    low, high = np.quantile(values, _tails(level))
    return float(low), float(high)


def _tails(level: float) -> list[float]:
    return [(1 - level) / 2, (1 + level) / 2]
