"""Losses as they might have been, for bootstrap intervals that hold for uneven and heavy-tailed noise.

A wild bootstrap: each run keeps its own residual and draws the sign, so that noisy runs stay noisy and precise ones
precise (for a fit of absolute deviations: Feng, He and Hu, 2011, Biometrika 98). Residuals are enlarged by the run's
leverage, since a fit is drawn to its runs. A fit so robust passes exactly through as many runs as it has numbers, and
these would never move: each run therefore draws part of its noise from the residuals' common, robust scale. And the
fewer runs there are, the less that scale is known, for which all is enlarged a little more.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nepa_scale.scaling.observations import Numbers

Interval = tuple[float, float]
PRECISION = 1e-6  # of log L: no loss is known better, and no interval is narrower
_COMMON = 0.3  # share of the variance drawn from the common scale; chosen by the coverage in docs/scaling.md
_LEVERAGE = 0.95  # at most


def robust_scale(residuals: Numbers, unknowns: int) -> float:
    """Standard deviation by the median of the residuals, less those that the fit passes through."""
    size = np.sort(np.abs(residuals))
    beyond = size[min(unknowns, max(len(size) - 3, 0)) :]
    return float(max(1.4826 * np.median(beyond), PRECISION))


def leverage(slopes: Numbers) -> Numbers:
    """Diagonal of the hat matrix, of slopes [numbers, rows]: [rows]."""
    used = slopes[np.abs(slopes).max(axis=1) > 0]
    q, _ = np.linalg.qr((used / np.abs(used).max(axis=1, keepdims=True)).T)
    return np.asarray(np.minimum((q**2).sum(1), _LEVERAGE))


def wild_noise(residuals: Numbers, slopes: Numbers, count: int, random: np.random.Generator) -> Numbers:
    """Noise of `count` resamplings, in the units of the residuals: [count, rows].

    slopes: of the fitted values by the fit's numbers, [numbers, rows]
    """
    few = 1 + 0.5 / max(1, len(residuals) - len(slopes))
    own = few * np.abs(residuals) / (1 - leverage(slopes))
    common = few * robust_scale(residuals, len(slopes))
    signs = random.choice([-1.0, 1.0], (count, len(residuals)))
    return np.asarray(
        np.sqrt(1 - _COMMON) * signs * own + np.sqrt(_COMMON) * common * random.standard_normal(signs.shape)
    )


def quantile_intervals(drawn: Mapping[str, Numbers], level: float) -> dict[str, Interval]:
    """The central `level` of each."""
    found = {}
    for name, values in drawn.items():
        low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
        found[name] = (float(low), float(high))
    return found
