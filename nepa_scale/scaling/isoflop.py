"""IsoFLOP analysis (Chinchilla, 2203.15556, approach 2): at each budget, a parabola of loss over log size.

The parabola's vertex is a biased estimate of the optimum even without noise, since the true curve is no parabola
(2603.22339). The bias of the grid at hand is therefore measured, by the same analysis of a known law on the same runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nepa_scale.scaling.observations import NotDetermined, Numbers, Values, checked
from nepa_scale.scaling.parametric import ParametricFit

SIZES = 4  # of one budget: a parabola through three is no fit
BUDGETS = 2
_SAME = 0.1  # of log10 compute: runs closer than that to their neighbour share a budget


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
    """

    exponent: float
    coefficient: float
    budgets: list[Budget]
    bias: float | None
    left_out: int


def fit_isoflop(
    parameters: Values,
    samples: Values,
    loss: Values,
    *,
    flops: Values | None = None,
    law: ParametricFit | None = None,
) -> IsoflopFit:
    """flops: compute of each run; None: 6 N D. law: for the measurement of the bias.

    Raises:
        ConfigError: a number is not positive.
        NotDetermined: fewer than two budgets have runs of four sizes with an optimum among them.
    """
    n, d, y = checked(parameters, samples, loss)
    c = 6 * n * d if flops is None else checked(flops, d, y)[0]
    budgets, left_out = _budgets(n, c, y)
    if len(budgets) < BUDGETS:
        raise NotDetermined(
            f"{len(budgets)} budgets have runs of {SIZES} sizes with the best among them: add runs of equal compute, "
            "on both sides of the best size, at two budgets or more"
        )
    exponent, coefficient = _power(budgets)
    bias = None
    if law is not None:
        exact, _ = _budgets(n, c, law.predict(n, d))
        bias = _power(exact)[0] - law.a if len(exact) >= BUDGETS else None
    return IsoflopFit(exponent, coefficient, budgets, bias, left_out)


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
