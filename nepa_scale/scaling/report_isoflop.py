"""The parabolas of an IsoFLOP analysis as curves, and how sure their lowest points are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nepa_scale.scaling.isoflop import IsoflopFit, fit_isoflop
from nepa_scale.scaling.observations import NotDetermined, Numbers

Interval = tuple[float, float]
_UNKNOWNS = 3  # of a parabola


@dataclass(frozen=True)
class Parabola:
    """Of one budget. rows: of its runs, from 0; curve: of the loss over log N."""

    rows: list[int]
    curve: np.polynomial.Polynomial


@dataclass(frozen=True)
class Resampled:
    """Bootstrap intervals at `level`.

    optima: of each budget's best size
    fits: the analyses of the resampled losses
    """

    level: float
    exponent: Interval
    optima: list[Interval | None]
    fits: list[IsoflopFit]

    def sizes(self, flops: Numbers) -> tuple[Numbers, Numbers]:
        """Lower and upper bound of the best size for so much compute."""
        drawn = np.array([fit.coefficient * flops**fit.exponent for fit in self.fits])
        low, high = np.quantile(drawn, _tails(self.level), axis=0)
        return low, high


def parabolas(
    fit: IsoflopFit, parameters: Sequence[float], loss: Sequence[float], flops: Sequence[float]
) -> list[Parabola]:
    """Those whose lowest points are `fit.budgets`, in their order; a budget's runs are those nearest to it."""
    log_flops, log_n, y = np.log(flops), np.log(parameters), np.array(loss)
    found = []
    for budget in fit.budgets:
        rows = np.sort(np.argsort(np.abs(log_flops - np.log(budget.flops)), kind="stable")[: budget.runs])
        found.append(Parabola(rows.tolist(), np.polynomial.Polynomial.fit(log_n[rows], y[rows], 2)))
    return found


def resample(
    fit: IsoflopFit, parameters: Sequence[float], samples: Sequence[float], loss: Sequence[float],
    flops: Sequence[float], *, bootstrap: int, level: float = 0.9, seed: int = 0,
) -> Resampled | None:  # fmt: skip
    """The analysis of losses as they might have been: on the parabolas, with residuals drawn anew from all of them.

    Residuals are enlarged for the three numbers that each parabola was fitted with. None where most resamplings have no
    optimum among their sizes.
    """
    random, log_n, y = np.random.default_rng(seed), np.log(parameters), np.array(loss)
    curves = parabolas(fit, parameters, loss, flops)
    residuals = np.concatenate(
        [(y[p.rows] - p.curve(log_n[p.rows])) * np.sqrt(len(p.rows) / max(1, len(p.rows) - _UNKNOWNS)) for p in curves]
    )
    fits = []
    for _ in range(bootstrap):
        again = y.copy()
        for parabola in curves:
            again[parabola.rows] = parabola.curve(log_n[parabola.rows]) + random.choice(residuals, len(parabola.rows))
        try:
            fits.append(fit_isoflop(parameters, samples, np.maximum(again, np.finfo(float).tiny), flops=flops))
        except NotDetermined:
            continue
    if len(fits) <= bootstrap / 2:
        return None
    optima = [
        _interval([same.optimum for one in fits for same in one.budgets if same.flops == budget.flops], level)
        for budget in fit.budgets
    ]
    exponent = _interval([one.exponent for one in fits], level)
    assert exponent is not None
    return Resampled(level, exponent, optima, fits)


def _interval(values: list[float], level: float) -> Interval | None:
    if not values:
        return None
    low, high = np.quantile(values, _tails(level))
    return float(low), float(high)


def _tails(level: float) -> list[float]:
    return [(1 - level) / 2, (1 + level) / 2]
