"""Fits of L = E + A / N^alpha + B / D^beta to many sets of losses at once, as a bootstrap needs them.

Starts come from a grid of exponents, at each of which E, A and B are linear (variable projection, 2603.22339); from the
best ones a Huber loss of log L (2203.15556) is brought down by Levenberg-Marquardt steps. E is fitted itself, not its
logarithm, so that it can reach 0 and leave it again; a number at a bound rests there only while its gradient points
outwards.
"""

from __future__ import annotations

import numpy as np

from nepa_scale.scaling.observations import Numbers

EXPONENTS = (0.02, 3.0)  # between which alpha and beta are sought
DELTA = 1e-3  # of the Huber loss, in log L
_GRID = np.geomspace(0.03, 2.5, 13)
_PAIRS = np.stack(np.meshgrid(_GRID, _GRID), axis=-1).reshape(-1, 2)
_FREE = ([0, 1, 2], [1, 2])  # E >= 0: with it, or without
_ENTRIES = 1_000_000  # of the largest arrays
_GRID_ROWS = 1000  # that are enough for a start
_LOWER = np.array([0.0, -np.inf, -np.inf, EXPONENTS[0], EXPONENTS[0]])
_UPPER = np.array([np.inf, np.inf, np.inf, EXPONENTS[1], EXPONENTS[1]])
_LARGEST_STEP = np.array([np.inf, 2.0, 2.0, 0.5, 0.5])
_QUIET = 3  # steps without a gain end a fit


class Solver:
    """For runs of sizes n and sample counts d, [rows].

    theta, [sets, 5], is (E, log A, log B, alpha, beta) in units of the geometric means of N, D and L, in which all
    numbers are near 1. Losses and weights are [sets, rows].
    """

    def __init__(self, n: Numbers, d: Numbers, y: Numbers) -> None:
        self._log_n, self._log_d, self._log_y = (float(np.log(values).mean()) for values in (n, d, y))
        self.x, self.z = np.log(n) - self._log_n, np.log(d) - self._log_d

    def log_losses(self, y: Numbers) -> Numbers:
        """log L in the solver's units."""
        return np.asarray(np.log(y) - self._log_y)

    def in_units(self, theta: Numbers) -> Numbers:
        """(E, A, B, alpha, beta) in the units of the data: [sets, 5]."""
        e, a, b, alpha, beta = theta.T
        y = self._log_y
        return np.stack(
            [e * np.exp(y), np.exp(y + a + alpha * self._log_n), np.exp(y + b + beta * self._log_d), alpha, beta],
            axis=1,
        )

    def predict(self, theta: Numbers) -> Numbers:
        """log L by the law: [sets, rows]."""
        return np.asarray(np.log(sum(self._terms(theta))))

    def jacobian(self, theta: Numbers) -> Numbers:
        """Of log L by theta: [sets, 5, rows]."""
        e, a, b = self._terms(theta)
        total = e + a + b
        return np.stack([1 / total, a / total, b / total, -a * self.x / total, -b * self.z / total], axis=1)

    def fit(
        self, log_y: Numbers, weights: Numbers, *, also: Numbers | None = None, starts: int = 2, steps: int = 40,
        tolerance: float = 1e-7, delta: float = DELTA,
    ) -> tuple[Numbers, Numbers]:  # fmt: skip
        """The best theta of each set and its cost, from the best `starts` of the grid and from `also` ([5]).

        tolerance: relative gain in the cost below which a step counts as none
        """
        each = max(1, _ENTRIES // max(log_y.shape[1] * 5, len(_PAIRS) * 9))
        parts = [
            self._fit(log_y[low : low + each], weights[low : low + each], also, starts, steps, tolerance, delta)
            for low in range(0, len(log_y), each)
        ]
        return np.concatenate([theta for theta, _ in parts]), np.concatenate([cost for _, cost in parts])

    def _fit(
        self, log_y: Numbers, weights: Numbers, also: Numbers | None, starts: int, steps: int, tolerance: float,
        delta: float,
    ) -> tuple[Numbers, Numbers]:  # fmt: skip
        sets = len(log_y)
        tried = list(self._starts(log_y, weights, starts)) if starts else []
        tried += [] if also is None else [np.broadcast_to(also, (sets, 5))]
        many = len(tried)
        theta, cost = self._descend(
            np.concatenate(tried), np.tile(log_y, (many, 1)), np.tile(weights, (many, 1)), steps, tolerance, delta
        )
        best = cost.reshape(many, sets).argmin(0) * sets + np.arange(sets)
        return theta[best], cost[best]

    def _terms(self, theta: Numbers) -> tuple[Numbers, Numbers, Numbers]:
        e, a, b, alpha, beta = (column[:, None] for column in theta.T)
        return e, np.exp(a - alpha * self.x), np.exp(b - beta * self.z)

    def _cost(self, theta: Numbers, log_y: Numbers, weights: Numbers, delta: float) -> Numbers:
        size = np.abs(self.predict(theta) - log_y)
        huber = np.where(size <= delta, 0.5 * size**2, delta * (size - 0.5 * delta))
        return np.asarray((weights * huber).sum(1))

    def _starts(self, log_y: Numbers, weights: Numbers, count: int) -> Numbers:
        """The best exponents of the grid for each set, by least squares of relative errors: [count, sets, 5]."""
        some = np.linspace(0, len(self.x) - 1, min(len(self.x), _GRID_ROWS)).astype(int)
        x, z, inverse, weights = self.x[some], self.z[some], np.exp(-log_y[:, some]), weights[:, some]
        columns = np.stack(
            [np.ones((len(_PAIRS), len(x))), np.exp(-_PAIRS[:, :1] * x), np.exp(-_PAIRS[:, 1:] * z)], axis=1
        )
        products = np.einsum("pir,pjr->pijr", columns, columns)
        sets, pairs = len(log_y), len(_PAIRS)
        gram = ((weights * inverse**2) @ products.reshape(-1, len(x)).T).reshape(sets, pairs, 3, 3)
        right = ((weights * inverse) @ columns.reshape(-1, len(x)).T).reshape(sets, pairs, 3)
        least = np.full((sets, pairs), np.inf)
        linear = np.tile(np.array([0.5, 0.25, 0.25]), (sets, pairs, 1))
        for free in _FREE:
            part = gram[:, :, free][:, :, :, free]
            ridge = 1e-12 * np.einsum("...ii->...", part)[..., None, None] * np.eye(len(free))
            found = np.linalg.solve(part + ridge, right[:, :, free, None])[..., 0]
            cost = -(right[:, :, free] * found).sum(-1)
            better = (found > 0).all(-1) & (cost < least)
            full = np.zeros_like(linear)
            full[:, :, free] = found
            least, linear = np.where(better, cost, least), np.where(better[..., None], full, linear)
        order = np.argsort(least, axis=1)[:, :count]
        chosen = linear[np.arange(sets)[:, None], order]
        theta = np.concatenate([chosen[..., :1], np.log(chosen[..., 1:]), _PAIRS[order]], axis=-1)
        return np.asarray(np.moveaxis(theta, 1, 0))

    def _descend(
        self, theta: Numbers, log_y: Numbers, weights: Numbers, steps: int, tolerance: float, delta: float
    ) -> tuple[Numbers, Numbers]:
        cost = self._cost(theta, log_y, weights, delta)
        damping, quiet = np.full(len(theta), 1e-2), np.zeros(len(theta), int)
        at = np.arange(len(theta))  # the sets still under way
        for _ in range(steps):
            move = self._step(theta[at], log_y[at], weights[at], damping[at], delta)
            tried = np.clip(theta[at] + move, _LOWER, _UPPER)
            new = self._cost(tried, log_y[at], weights[at], delta)
            better = new <= cost[at]
            still = np.where(better, cost[at] - new <= tolerance * cost[at], damping[at] > 1e6)
            theta[at[better]], cost[at[better]] = tried[better], new[better]
            damping[at] = np.clip(np.where(better, damping[at] / 4, damping[at] * 5), 1e-10, 1e8)
            quiet[at] = np.where(still, quiet[at] + 1, 0)
            at = at[quiet[at] < _QUIET]
            if not len(at):
                break
        return theta, cost

    def _step(self, theta: Numbers, log_y: Numbers, weights: Numbers, damping: Numbers, delta: float) -> Numbers:
        """The Levenberg-Marquardt step of the least squares that have the Huber loss's gradient, within bounds."""
        slopes, residuals = self.jacobian(theta), self.predict(theta) - log_y
        weighted = slopes * (weights / np.maximum(1, np.abs(residuals) / delta))[:, None]
        gradient = np.einsum("skr,sr->sk", weighted, residuals)
        bound = ((theta <= _LOWER) & (gradient > 0)) | ((theta >= _UPPER) & (gradient < 0))
        hessian = np.where(bound[:, :, None] | bound[:, None], 0, np.einsum("skr,slr->skl", weighted, slopes))
        diagonal = (damping[:, None] + 1e-9) * np.einsum("skk->sk", hessian) + np.where(bound, 1, 1e-14)
        move = np.linalg.solve(hessian + np.eye(5) * diagonal[:, None], -np.where(bound, 0, gradient)[..., None])
        return np.asarray(np.clip(move[..., 0], -_LARGEST_STEP, _LARGEST_STEP))
