"""The runs a law is fitted to, checked before anything is fitted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nepa_scale.config import ConfigError

Numbers = NDArray[np.float64]
Values = Sequence[float] | Numbers
HELD_OUT = 0.2  # of the runs, those with the most compute, by which extrapolation is judged
UNKNOWNS = 5  # E, A, B, alpha, beta
LEVELS = 3  # different values of N, and of D, without which an exponent cannot be told from its coefficient


class NotDetermined(ConfigError):
    """The data do not determine the law; the message says which runs would."""


def checked(parameters: Values, samples: Values, loss: Values) -> tuple[Numbers, ...]:
    """The three as float64 [N].

    Raises:
        ConfigError: different lengths, or a number that is not finite and positive; its row is named, from 1.
    """
    arrays = tuple(np.asarray(values, dtype=np.float64).ravel() for values in (parameters, samples, loss))
    if len({len(array) for array in arrays}) != 1:
        raise ConfigError(f"parameters, samples and loss have {', '.join(str(len(a)) for a in arrays)} entries")
    for name, array in zip(("parameters", "samples", "loss"), arrays, strict=True):
        wrong = np.flatnonzero(~(np.isfinite(array) & (array > 0)))
        if len(wrong):
            hint = ": fit 1 + loss, or an error rate" if name == "loss" else ""
            raise ConfigError(f"row {wrong[0] + 1}: {name} is {array[wrong[0]]:g}, and must be positive{hint}")
    return arrays


def require_determined(parameters: Numbers, samples: Numbers) -> None:
    """
    Raises:
        NotDetermined: too few runs, sizes or sample counts for the parametric law, or they do not vary apart.
    """
    sizes, counts = len(np.unique(parameters)), len(np.unique(samples))
    runs = len(np.unique(np.stack([parameters, samples]), axis=1).T)
    if sizes < LEVELS:
        raise NotDetermined(f"{sizes} model sizes do not determine alpha: add runs of {LEVELS - sizes} more sizes")
    if counts < LEVELS:
        raise NotDetermined(
            f"{counts} numbers of samples do not determine beta: add runs of {LEVELS - counts} other lengths"
        )
    if runs <= UNKNOWNS:
        raise NotDetermined(
            f"{runs} different runs do not determine {UNKNOWNS} numbers: add {UNKNOWNS + 1 - runs} or more"
        )
    if abs(np.corrcoef(np.log(parameters), np.log(samples))[0, 1]) > 0.995:
        raise NotDetermined(
            "parameters and samples grow together in all runs, so that their effects cannot be told apart: add runs of "
            "one size with different numbers of samples"
        )
