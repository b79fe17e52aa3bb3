"""The parametric law L(N, D) = E + A / N^alpha + B / D^beta (Chinchilla, 2203.15556, approach 3).

Fitted as there, by a Huber loss on log L, but from starts that variable projection gives (given the exponents, the law
is linear in E, A and B; 2603.22339), and to convergence: the original's optimiser stopped early (2404.10102).
"""

from __future__ import annotations

import dataclasses
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
from nepa_scale.scaling.outliers import beaten_runs, find_outliers
from nepa_scale.scaling.refusals import (
    USUAL,
    require_counts,
    require_differences,
    require_effects,
    require_inside,
    require_narrow,
    require_range,
)
from nepa_scale.scaling.resampling import PRECISION, Interval, quantile_intervals, robust_scale, wild_noise
from nepa_scale.scaling.solver import DELTA, EXPONENTS, Solver

NAMES = ("E", "A", "B", "alpha", "beta")
_GRID = np.geomspace(0.05, 1.5, 9)
_STARTS = 4  # of the grid's best, from which the fit is refined
_STEPS = 100  # from each
_LAST_STEPS, _TOLERANCE = 400, 1e-12  # from the best; resamplings need less
_LEAST_SQUARES = 1e6  # a Huber loss whose delta no residual reaches
_MOVED = 0.25  # of an interval's width: what outliers may move a number before they are left out
_JUDGED = 0.9  # level of the intervals by which a law is refused
_DRAWN = 100  # resamplings that tell whether outliers move a law, where no intervals are asked for
_TINY = 1e-9


@dataclass(frozen=True)
class ParametricFit:
    """A fitted law. N: parameters, D: samples, in the units of the data.

    objective: mean Huber loss of log L
    residual_std: of log L
    intervals: at `level`, of each number and of the optimum's exponents `a` and `b`; empty without bootstrap. Where
        that of E begins at 0, E has an upper limit only
    outliers: rows (from 0) far off the law of the others
    beaten: (row, better row) of runs with a clearly higher loss than one of no more parameters and no more samples
    with_outliers: the law of all rows, where the outliers move it by more than the intervals allow, and this law is
        hence that of the other rows; else None, and this law is that of all rows
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    objective: float
    residual_std: float
    level: float = 0.9
    intervals: dict[str, Interval] = field(default_factory=dict)
    outliers: list[int] = field(default_factory=list)
    beaten: list[tuple[int, int]] = field(default_factory=list)
    with_outliers: ParametricFit | None = None

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

    @property
    def floor(self) -> str:
        """E for people: a number, or "< " its upper limit."""
        low, high = self.intervals.get("E", (self.E, self.E))
        return f"< {high:.4g}" if low <= 0 < high else f"{self.E:.5g}"

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

    bootstrap: resamplings; 0: no intervals, and no refusal by their width

    Raises:
        ConfigError: a number is not positive.
        NotDetermined: the data do not determine the law; the message says why, and which runs would.
    """
    n, d, y = checked(parameters, samples, loss)
    _require_design(n, d, y)
    every = _Runs(n, d, y)
    outliers = find_outliers(n, d, every.residuals_by)
    kept = np.setdiff1d(np.arange(len(y)), outliers)
    runs = _Runs(n[kept], d[kept], y[kept]) if outliers else every
    runs.require_determined()
    drawn = runs.draw(bootstrap, seed)
    if bootstrap:
        require_narrow(_exponents(drawn), n, d, runs.noise)
    law = runs.law(drawn, level)
    with_outliers = None
    if outliers:
        judged = _exponents(drawn or runs.draw(_DRAWN, seed))
        all_rows = every.law(every.draw(bootstrap, seed), level)
        moved = any(
            abs(getattr(all_rows, name) - getattr(law, name)) > _MOVED * (high - low)
            for name, (low, high) in judged.items()
        )
        law, with_outliers = (law, all_rows) if moved else (all_rows, None)
    beaten = beaten_runs(n, d, y, runs.noise)
    return dataclasses.replace(law, outliers=outliers, beaten=beaten, with_outliers=with_outliers)


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


def project_variables(parameters: Values, samples: Values, loss: Values) -> ParametricFit:
    """The law by variable projection: E, A, B >= 0 linearly, inside a search over the exponents; least squares of
    relative errors, hence without the robustness of `fit_parametric`.

    Raises: as `fit_parametric` without bootstrap.
    """
    n, d, y = checked(parameters, samples, loss)
    _require_design(n, d, y)

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
    law = _described(
        np.concatenate([linear * [1, _centre(n) ** found.x[0], _centre(d) ** found.x[1]], found.x]), n, d, y
    )
    require_inside("alpha", law.alpha if law.A > 0 else 0)
    require_inside("beta", law.beta if law.B > 0 else 0)
    return law


class _Runs:
    """Runs that one law is fitted to."""

    def __init__(self, n: Numbers, d: Numbers, y: Numbers) -> None:
        self.n, self.d, self.y = n, d, y
        self.solver = Solver(n, d, y)
        self.log_y = self.solver.log_losses(y)
        self.theta = self._fit(np.ones(len(y)))
        self.noise = robust_scale(self._residuals(self.theta), UNKNOWNS)

    def _fit(self, weights: Numbers, delta: float = DELTA) -> Numbers:
        log_y = self.log_y[None]
        theta, _ = self.solver.fit(log_y, weights[None], starts=_STARTS, steps=_STEPS, delta=delta)
        theta, _ = self.solver.fit(
            log_y, weights[None], also=theta[0], starts=0, steps=_LAST_STEPS, tolerance=_TOLERANCE, delta=delta
        )
        return np.asarray(theta[0])

    def _residuals(self, theta: Numbers) -> Numbers:
        return np.asarray(self.log_y - self.solver.predict(theta[None])[0])

    def residuals_by(self, weights: Numbers) -> Numbers:
        """Of log L, of all rows by the laws of those with weight: [sets, rows] -> [sets, rows]."""
        theta, _ = self.solver.fit(np.tile(self.log_y, (len(weights), 1)), weights, also=self.theta)
        return np.asarray(self.log_y - self.solver.predict(theta))

    def require_determined(self) -> None:
        """
        Raises:
            NotDetermined: the losses do not tell N's and D's effects, or not well enough from the noise.
        """
        residuals = self._residuals(self._fit(np.ones(len(self.y)), _LEAST_SQUARES))
        require_effects(self.n, self.d, self.y, residuals)
        require_range(residuals, self._usual_slopes(), self.n, self.d)
        for name, exponent in zip(("alpha", "beta"), self.theta[3:], strict=True):
            require_inside(name, float(exponent))

    def _usual_slopes(self) -> Numbers:
        """Of log L, [5, rows], by the numbers of a law of usual exponents with effects as large as these runs show."""
        terms = np.stack([np.ones_like(self.y), *(np.exp(-USUAL * x) for x in (self.solver.x, self.solver.z))], axis=1)
        (e, a, b), _ = nnls(terms / np.exp(self.log_y)[:, None], np.ones_like(self.y))
        theta = np.array([e, np.log(max(a, _TINY)), np.log(max(b, _TINY)), USUAL, USUAL])
        return np.asarray(self.solver.jacobian(theta[None])[0])

    def draw(self, count: int, seed: int) -> dict[str, Numbers]:
        """The numbers of the laws of `count` resamplings, and their optima's exponents."""
        if count == 0:
            return {}
        noise = wild_noise(
            self._residuals(self.theta), self.solver.jacobian(self.theta[None])[0], count, np.random.default_rng(seed)
        )
        theta, _ = self.solver.fit(self.solver.predict(self.theta[None]) + noise, np.ones_like(noise), also=self.theta)
        drawn = dict(zip(NAMES, self.solver.in_units(theta).T, strict=True))
        total = drawn["alpha"] + drawn["beta"]
        return drawn | {"a": drawn["beta"] / total, "b": drawn["alpha"] / total}

    def law(self, drawn: dict[str, Numbers], level: float) -> ParametricFit:
        numbers = self.solver.in_units(self.theta[None])[0]
        intervals = quantile_intervals(drawn, level)
        if drawn and intervals["E"][1] <= 0:  # no resampling has a floor to speak of
            intervals["E"] = (0.0, float(max(drawn["E"].max(), PRECISION * self.y.min())))
        return dataclasses.replace(_described(numbers, self.n, self.d, self.y), level=level, intervals=intervals)


def _exponents(drawn: dict[str, Numbers]) -> dict[str, Interval]:
    return quantile_intervals({name: drawn[name] for name in ("alpha", "beta")}, _JUDGED)


def _require_design(n: Numbers, d: Numbers, y: Numbers) -> None:
    require_determined(n, d)
    require_counts(n, d)
    require_differences(y)


def _design(n: Numbers, d: Numbers, y: Numbers, alpha: float, beta: float) -> Numbers:
    """Columns of E, A, B in relative errors, N and D in units of their geometric means: [rows, 3]."""
    return np.stack([np.ones_like(n), (n / _centre(n)) ** -alpha, (d / _centre(d)) ** -beta], axis=1) / y[:, None]


def _linear(n: Numbers, d: Numbers, y: Numbers, alpha: float, beta: float) -> tuple[Numbers, float]:
    return nnls(_design(n, d, y, alpha, beta), np.ones_like(y))


def _centre(values: Numbers) -> float:
    return float(np.exp(np.log(values).mean()))


def _described(numbers: Numbers, n: Numbers, d: Numbers, y: Numbers) -> ParametricFit:
    e, a, b, alpha, beta = numbers.tolist()
    law = ParametricFit(e, a, b, alpha, beta, objective=0.0, residual_std=0.0)
    residuals = np.log(law.predict(n, d)) - np.log(y)
    size = np.abs(residuals)
    huber = np.where(size <= DELTA, 0.5 * residuals**2, DELTA * (size - 0.5 * DELTA))
    return dataclasses.replace(law, objective=float(huber.mean()), residual_std=float(residuals.std()))
