"""The envelope of training curves (Chinchilla, 2203.15556, approach 1): which size is ahead at each compute.

Runs are compared in the middle of their schedules, where the learning rate has not come down: a run that ends at a
compute is ahead of a longer one that passes it. The exponents are hence those of the runs as they are, and IsoFLOP
grids, whose runs all end at their budget, are to be preferred.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nepa_scale.scaling.metrics import Metric
from nepa_scale.scaling.observations import NotDetermined, Numbers
from nepa_scale.scaling.recorded_runs import RecordedRun, is_number

GRID = 200  # computes at which the runs are compared, evenly spaced in their logarithm
SIZES = 3  # that must be ahead somewhere
_SMOOTHED = 5  # rows of a noisy curve


@dataclass(frozen=True)
class EnvelopeFit:
    """N*(C) ~ C^a and D*(C) ~ C^b through the runs that are ahead.

    sizes: how many different ones are ahead somewhere; intervals: of a and b at `level`, by resampling the runs
    """

    a: float
    b: float
    sizes: int
    level: float
    intervals: dict[str, tuple[float, float]]


def fit_envelope(
    runs: Sequence[RecordedRun], metric: Metric, *, bootstrap: int = 200, level: float = 0.9, seed: int = 0
) -> EnvelopeFit:
    """
    Raises:
        NotDetermined: runs that log the metric once, fewer than three sizes ahead anywhere, or an exponent whose
            interval holds 0.
    """
    curves = [curve for run in runs if (curve := _curve(run, metric)) is not None]
    if not curves:
        raise NotDetermined(
            f"no run logs {metric.name} along its training: set evaluate.every, or train.log_every lower"
        )
    a, b, sizes = _exponents(curves)
    if sizes < SIZES:
        raise NotDetermined(f"only {sizes} sizes are ahead of the others anywhere: add smaller or longer runs")
    random = np.random.default_rng(seed)
    drawn = []
    for _ in range(bootstrap):
        again = _exponents([curves[index] for index in random.integers(len(curves), size=len(curves))])
        if again[2] >= SIZES:
            drawn.append(again[:2])
    intervals = {}
    if len(drawn) > bootstrap / 2:
        for name, values in zip(("a", "b"), np.array(drawn).T, strict=True):
            low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
            intervals[name] = (float(low), float(high))
            if low <= 0 <= high:
                raise NotDetermined(
                    f"the envelope's {name} may be 0: its {level:.0%} interval is {low:.3f} to {high:.3f}; add "
                    "sizes, and longer runs"
                )
    return EnvelopeFit(a, b, sizes, level, intervals)


@dataclass(frozen=True)
class _Curve:
    """log C and the metric along it; log N, and log D at log C = 0: images are proportional to compute within a run."""

    log_flops: Numbers
    values: Numbers
    log_size: float
    log_samples: float


def _curve(run: RecordedRun, metric: Metric) -> _Curve | None:
    rows = [row for row in run.rows if is_number(row.get(metric.key)) and row.get("flops_seen")]
    if len(rows) < 2 or not run.parameters:
        return None
    values = np.array([metric.of(row[metric.key]) for row in rows])
    if metric.noisy and len(rows) > _SMOOTHED:
        values = np.convolve(np.pad(values, _SMOOTHED // 2, mode="edge"), np.full(_SMOOTHED, 1 / _SMOOTHED), "valid")
    last = rows[-1]
    each = float(np.log(last["samples_seen"] / last["flops_seen"]))
    return _Curve(np.log([row["flops_seen"] for row in rows]), values, float(np.log(run.parameters)), each)


def _exponents(curves: Sequence[_Curve]) -> tuple[float, float, int]:
    """a, b, and how many sizes are ahead somewhere."""
    ends = [(curve.log_flops[0], curve.log_flops[-1]) for curve in curves]
    grid = np.linspace(min(first for first, _ in ends), max(last for _, last in ends), GRID)
    values = np.stack([np.interp(grid, c.log_flops, c.values, left=np.inf, right=np.inf) for c in curves])
    ahead = values.argmin(axis=0)
    covered = np.isfinite(values.min(axis=0))
    log_n = np.array([curves[at].log_size for at in ahead])[covered]
    log_d = np.array([curves[at].log_samples for at in ahead])[covered] + grid[covered]
    if len(np.unique(log_n)) < 2:
        return 0.0, 1.0, len(np.unique(log_n))
    a, b = (float(np.polyfit(grid[covered], y, 1)[0]) for y in (log_n, log_d))
    return a, b, len(np.unique(log_n))
