"""Which way a quantity goes with the size and the samples of runs: a law describes what falls with both."""

from __future__ import annotations

import numpy as np

from nepa_scale.config import ConfigError
from nepa_scale.scaling.points import Points

_EQUAL = 0.05  # of a count: runs that differ by less than that have as many
_RISING = 0.75  # share of pairs above which a quantity rises; by chance it is a half
_PAIRS = 6  # with fewer, three of four may well be chance


def require_falling(points: Points) -> None:
    """
    Raises:
        ConfigError: of most pairs of runs that differ in size only, or in samples only, or in which one has more of
            both, the larger has the larger `loss`.
    """
    n, d, y = (np.asarray(values) for values in (points.parameters, points.samples, points.loss))
    more_n, equal_n = _compare(n)
    more_d, equal_d = _compare(d)
    of_n, of_d, of_loss = points.names
    rises = y[None, :] > y[:, None]
    for what, pairs in (
        (of_n, more_n & equal_d),
        (of_d, equal_n & more_d),
        (f"{of_n} and {of_d}", more_n & more_d),
    ):
        count = int(pairs.sum())
        share = float(rises[pairs].mean()) if count else 0.0
        if count >= _PAIRS and share > _RISING:
            raise ConfigError(
                f"{of_loss} rises with {what} (in {share:.0%} of {count} pairs of runs), and a law needs what falls: "
                "of an accuracy fit the error, 1 - accuracy"
            )


def _compare(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """bool [N, N]: the second of a pair (i, j) has more, and both have as many."""
    ratio = values[None, :] / values[:, None]
    return ratio > 1 + _EQUAL, (ratio <= 1 + _EQUAL) & (ratio >= 1 / (1 + _EQUAL))
