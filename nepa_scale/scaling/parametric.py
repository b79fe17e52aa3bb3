"""The parametric law L(N, D) = E + A / N^alpha + B / D^beta (Chinchilla, 2203.15556, approach 3).

Fitted as there, by a Huber loss on log L, but from starts that variable projection gives (given the exponents, the law
is linear in E, A and B; 2603.22339), and to convergence: the original's optimiser stopped early (2404.10102).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import least_squares, nnls

from nepa_scale.scaling.observations import (
    HELD_OUT,
    UNKNOWNS,
    NotDetermined,
    Numbers,
    Values,
    checked,
    require_determined,
)

NAMES = ("E", "A", "B", "alpha", "beta")
DELTA = 1e-3  # of the Huber loss, in log L
EXPONENTS = (0.02, 3.0)  # between which alpha and beta are sought
_GRID = np.geomspace(0.05, 1.5, 9)
_STARTS = 4  # of the grid's best, from which the fit is refined
_TINY = 1e-12


@dataclass(frozen=True)
class ParametricFit:
    """A fitted law. N: parameters, D: samples, in the units of the data.

    objective: mean Huber loss of log L
    residual_std: of log L
    intervals: at `level`, of each number and of the optimum's exponents `a` and `b`; empty without bootstrap
    outliers: rows (from 0) whose residual is beyond 5 robust standard deviations
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    objective: float
    residual_std: float
    level: float = 0.9
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    outliers: list[int] = field(default_factory=list)

    def predict(self, parameters: Numbers, samples: Numbers) -> Numbers:
        """The law's L."""
        return self.E + self.A / parameters**self.alpha + self.B / samples**self.beta

    @property
    def a(self) -> float:
        """Exponent of the compute-optimal size: N* ~ C^a, where compute is proportional to N D."""
        return self.beta / (self.alpha + self.beta)

    @property
    def b(self) -> float:
        """Exponent of the compute-optimal number of samples, D* ~ C^b."""
        return self.alpha / (self.alpha + self.beta)

    def optimum(self, product: float) -> tuple[float, float]:
        """N* and D* with N* D* = `product` (compute over the FLOPs of a parameter and sample)."""
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        return ratio * product**self.a, product**self.b / ratio


def fit_parametric(
    parameters: Values,
    samples: Values,
    loss: Values,
    *,
    bootstrap: int = 200,
    level: float = 0.9,
    seed: int = 0,
) -> ParametricFit:
    """The law that fits best, with bootstrap intervals.

    bootstrap: resamplings; 0: no intervals
    Raises:
        ConfigError: a number is not positive.
        NotDetermined: the data do not determine the law.
    """
    n, d, y = checked(parameters, samples, loss)
    require_determined(n, d)
    fit = _fit(n, d, y, _starts(n, d, y))
    residuals = np.log(y) - np.log(fit.predict(n, d))
    spread = 1.4826 * np.median(np.abs(residuals - np.median(residuals)))
    outliers = np.flatnonzero(np.abs(residuals) > 5 * max(spread, 1e-9)).tolist()
    intervals: dict[str, tuple[float, float]] = {}
    if bootstrap > 0:
        drawn = [_fit(n, d, again, [_vector(fit)]) for again in _resamplings(fit, n, d, residuals, bootstrap, seed)]
        for name in (*NAMES, "a", "b"):
            low, high = np.quantile([getattr(one, name) for one in drawn], [(1 - level) / 2, (1 + level) / 2])
            intervals[name] = (float(low), float(high))
    return dataclasses.replace(fit, level=level, intervals=intervals, outliers=outliers)


def extrapolation_error(parameters: Values, samples: Values, loss: Values) -> float | None:
    """Median relative error of the fifth of the runs with the most compute (N D), predicted from the others.

    None where the others do not determine the law.
    Raises:
        ConfigError: a number is not positive.
    """
    n, d, y = checked(parameters, samples, loss)
    order = np.argsort(n * d, kind="stable")
    kept, held = np.split(order, [len(order) - max(1, round(HELD_OUT * len(order)))])
    try:
        law = fit_parametric(n[kept], d[kept], y[kept], bootstrap=0)
    except NotDetermined:
        return None
    return float(np.median(np.abs(law.predict(n[held], d[held]) / y[held] - 1)))


def _resamplings(
    fit: ParametricFit, n: Numbers, d: Numbers, residuals: Numbers, count: int, seed: int
) -> Iterator[Numbers]:
    """Losses that the law might have shown: its own, times residuals drawn anew.

    The residuals of so robust a fit are too small: it passes through about as many runs as it has numbers. They are
    enlarged for that, and smoothed (by Silverman's bandwidth), or the intervals would cover less than they say.
    """
    random = np.random.default_rng(seed)
    runs = len(residuals)
    enlarged = (residuals - residuals.mean()) * np.sqrt(runs / max(1, runs - 2 * UNKNOWNS))
    bandwidth = 1.06 * enlarged.std() * runs**-0.2
    for _ in range(count):
        yield fit.predict(n, d) * np.exp(random.choice(enlarged, runs) + bandwidth * random.standard_normal(runs))


def project_variables(parameters: Values, samples: Values, loss: Values) -> ParametricFit:
    """The law by variable projection: E, A, B >= 0 linearly, inside a search over the exponents; least squares of
    relative errors, hence without the robustness of `fit_parametric`.

    Raises: as `fit_parametric`.
    """
    n, d, y = checked(parameters, samples, loss)
    require_determined(n, d)

    def residuals(exponents: Numbers) -> Numbers:
        linear, _ = _linear(n, d, y, *exponents)
        return _design(n, d, y, *exponents) @ linear - 1

    _, alpha, beta = min((_linear(n, d, y, a, b)[1], a, b) for a in _GRID for b in _GRID)
    with np.errstate(all="ignore"):  # scipy divides by zero where the data leave a number free
        found = least_squares(
            residuals,
            [alpha, beta],
            bounds=([EXPONENTS[0]] * 2, [EXPONENTS[1]] * 2),
            xtol=1e-14,
            ftol=1e-14,
            gtol=1e-14,
        )
    linear, _ = _linear(n, d, y, *found.x)
    return _described(np.concatenate([np.log(_unscaled(n, d, linear, *found.x) + _TINY), found.x]), n, d, y)


def _design(n: Numbers, d: Numbers, y: Numbers, alpha: float, beta: float) -> Numbers:
    """Columns of E, A, B in relative errors, N and D in units of their geometric means: [rows, 3]."""
    return np.stack([np.ones_like(n), (n / _centre(n)) ** -alpha, (d / _centre(d)) ** -beta], axis=1) / y[:, None]


def _linear(n: Numbers, d: Numbers, y: Numbers, alpha: float, beta: float) -> tuple[Numbers, float]:
    return nnls(_design(n, d, y, alpha, beta), np.ones_like(y))


def _unscaled(n: Numbers, d: Numbers, linear: Numbers, alpha: float, beta: float) -> Numbers:
    return linear * np.array([1.0, _centre(n) ** alpha, _centre(d) ** beta])


def _centre(values: Numbers) -> float:
    return float(np.exp(np.log(values).mean()))


def _starts(n: Numbers, d: Numbers, y: Numbers) -> list[Numbers]:
    """(log E, log A, log B, alpha, beta) at the best exponents of the grid."""
    grid = sorted((_linear(n, d, y, a, b)[1], a, b) for a in _GRID for b in _GRID)
    return [
        np.array([*np.log(_unscaled(n, d, _linear(n, d, y, a, b)[0], a, b) + _TINY), a, b])
        for _, a, b in grid[:_STARTS]
    ]


def _fit(n: Numbers, d: Numbers, y: Numbers, starts: list[Numbers]) -> ParametricFit:
    """The best of the refined starts."""
    log_n, log_d, log_l = np.log(n), np.log(d), np.log(y)

    def terms(x: Numbers) -> Numbers:
        return np.stack([np.full_like(log_n, x[0]), x[1] - x[3] * log_n, x[2] - x[4] * log_d])

    def residuals(x: Numbers) -> Numbers:
        return np.logaddexp.reduce(terms(x), axis=0) - log_l

    def jacobian(x: Numbers) -> Numbers:
        exponents = terms(x)
        share = np.exp(exponents - np.logaddexp.reduce(exponents, axis=0))
        return np.stack([*share, -share[1] * log_n, -share[2] * log_d], axis=1)

    bounds = ([-np.inf] * 3 + [EXPONENTS[0]] * 2, [np.inf] * 3 + [EXPONENTS[1]] * 2)
    tight = {"xtol": 1e-13, "ftol": 1e-13, "gtol": 1e-13}
    best = None
    for start in starts:
        start = np.clip(start, [-50.0] * 3 + [EXPONENTS[0]] * 2, [200.0] * 3 + [EXPONENTS[1]] * 2)
        with np.errstate(all="ignore"):
            found = least_squares(
                residuals, start, jacobian, bounds, loss="huber", f_scale=DELTA, x_scale="jac", max_nfev=2000, **tight
            )
        if best is None or found.cost < best.cost:
            best = found
    assert best is not None
    return _described(best.x, n, d, y)


def _described(x: Numbers, n: Numbers, d: Numbers, y: Numbers) -> ParametricFit:
    law = _law(x, 0.0, 0.0)
    residuals = np.log(law.predict(n, d)) - np.log(y)
    size = np.abs(residuals)
    huber = np.where(size <= DELTA, 0.5 * residuals**2, DELTA * (size - 0.5 * DELTA))
    return _law(x, float(huber.mean()), float(residuals.std()))


def _law(x: Numbers, objective: float, residual_std: float) -> ParametricFit:
    e, a, b = np.exp(x[:3]).tolist()
    return ParametricFit(e, a, b, float(x[3]), float(x[4]), objective, residual_std)


def _vector(fit: ParametricFit) -> Numbers:
    return np.array([*np.log([fit.E, fit.A, fit.B]), fit.alpha, fit.beta])
