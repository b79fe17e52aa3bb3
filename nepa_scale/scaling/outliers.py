"""Runs that lie off the others: named, never dropped in silence."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from nepa_scale.scaling.observations import UNKNOWNS, Numbers
from nepa_scale.scaling.resampling import robust_scale

_BEYOND = 5.0  # robust standard deviations; more where few runs tell of them
_SHARE = 0.2  # of the runs: where more are off, the law is wrong, or the noise has such tails
_ROUNDS = 10
_TRIMMED_ROUNDS = 4
_FEW = 20  # runs, below which a fifth of them tells nothing
_BEATEN = 4.0  # standard deviations of a difference


def find_outliers(n: Numbers, d: Numbers, residuals_by: Callable[[Numbers], Numbers]) -> list[int]:
    """Rows whose residual from the law of the other rows is too large.

    Outliers hide each other: a few short runs that are all too high bend the law to themselves. It is therefore fitted
    first without the largest residuals, of a first fit and of fits without the smallest and the largest N and D; then
    without the outliers found, and all rows are judged anew, until they stay the same.

    residuals_by: weights, [sets, rows] -> residuals of all rows by the laws of the rows with weight, [sets, rows]
    """
    rows = len(n)
    weights = _trimmed(n, d, residuals_by) if rows >= _FEW else np.ones(rows)
    found: list[int] = []
    for _ in range(_ROUNDS):
        residuals = residuals_by(weights[None])[0]
        size = np.abs(residuals)
        kept = residuals[weights > 0]
        limit = _BEYOND * (1 + 2 * UNKNOWNS / max(1, len(kept) - UNKNOWNS)) * robust_scale(kept, UNKNOWNS)
        worst = np.argsort(size)[::-1][: int(_SHARE * rows)]
        again = sorted(worst[size[worst] > limit].tolist())
        if again == found and int((weights == 0).sum()) == len(found):
            break
        found = again
        weights = np.ones(rows)
        weights[found] = 0
    return found


def _trimmed(n: Numbers, d: Numbers, residuals_by: Callable[[Numbers], Numbers]) -> Numbers:
    """Weights of the rows, all but a share, that one law fits best: 1, and 0 for those left out."""
    rows = len(n)
    many = int(_SHARE * rows)
    weights = np.ones((5, rows))
    for start, order in enumerate((n, -n, d, -d), 1):
        weights[start, np.argsort(order, kind="stable")[:many]] = 0
    for _ in range(_TRIMMED_ROUNDS):
        size = np.abs(residuals_by(weights))
        kept = np.argsort(size, axis=1)[:, : rows - many]
        weights = np.zeros_like(weights)
        np.put_along_axis(weights, kept, 1, axis=1)
    return np.asarray(weights[np.take_along_axis(size, kept, axis=1).sum(1).argmin()])


def beaten_runs(n: Numbers, d: Numbers, y: Numbers, noise: float) -> list[tuple[int, int]]:
    """(row, better row): runs with a clearly higher loss than one of no more parameters and no more samples.

    Such a run was not trained as well as it could have been (its learning rate, mostly). The better row named is the
    one of lowest loss.

    noise: standard deviation of log L
    """
    limit = _BEATEN * np.sqrt(2) * noise
    found = []
    for row in range(len(y)):
        smaller = np.flatnonzero((n <= n[row]) & (d <= d[row]))
        best = int(smaller[y[smaller].argmin()])
        if np.log(y[row] / y[best]) > limit:
            found.append((row, best))
    return found
