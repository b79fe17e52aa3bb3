"""How often the printed 90% intervals of a law cover the truth, and which laws are printed: docs/scaling.md's table.

Losses of known laws, on grids of N and D that differ in shape and range, with noise of different size and kind:
Gaussian, Student's t of 2.5 degrees of freedom, and uneven (the noise of a run is itself lognormal, and larger for
short runs). A share is over the trials and the six numbers E, A, B, alpha, beta and a, of those laws that are printed.

examples:
  python benchmarks/law_coverage.py --minutes 5
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nepa_scale.scaling import NotDetermined, fit_parametric
from nepa_scale.scaling.observations import Numbers

# E, A, B, alpha, beta, and the least N and D
TRUTHS = (
    (1.8172, 482.01, 2085.43, 0.3478, 0.3658, 5e7, 1e9),
    (0.3, 8.0, 6.0, 0.25, 0.2, 1e5, 1e5),
    (0.5, 1e3, 1e4, 0.5, 0.6, 1e5, 1e6),
)
SIDES = (3, 4, 5, 6, 8)
RANGES = (4, 16, 30, 100, 1000)
SIGMAS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05)
NUMBERS = ("E", "A", "B", "alpha", "beta", "a")
NOISES: dict[str, Callable[[np.random.Generator, Numbers], Numbers]] = {
    "Gaussian": lambda random, d: random.standard_normal(len(d)),
    "Student's t": lambda random, d: random.standard_t(2.5, len(d)) / 1.35,
    "uneven": lambda random, d: (
        random.standard_normal(len(d)) * np.exp(0.8 * random.standard_normal(len(d))) * (d / d.mean()) ** -0.15
    ),
}


@dataclass(frozen=True)
class Trial:
    """side: of the grid; span: the largest N over the least, and so of D; sigma: noise of log L

    covered: which of `NUMBERS` lie in their intervals; None where the law was refused
    """

    side: int
    span: float
    sigma: float
    noise: str
    covered: list[bool] | None


def trials(seed: int, bootstrap: int = 100) -> Iterator[Trial]:
    """Trials drawn at random from all combinations, without end."""
    random = np.random.default_rng(seed)
    while True:
        side, span, sigma = int(random.choice(SIDES)), float(random.choice(RANGES)), float(random.choice(SIGMAS))
        noise = str(random.choice(list(NOISES)))
        e, a, b, alpha, beta, least_n, least_d = TRUTHS[random.integers(len(TRUTHS))]
        axis = np.geomspace(1, span, side)
        n, d = (values.ravel() for values in np.meshgrid(least_n * axis, least_d * axis))
        loss = (e + a / n**alpha + b / d**beta) * np.exp(sigma * NOISES[noise](random, d))
        truth = (e, a, b, alpha, beta, beta / (alpha + beta))
        try:
            found = fit_parametric(n, d, loss, bootstrap=bootstrap, seed=int(random.integers(1 << 30)))
        except NotDetermined:
            yield Trial(side, span, sigma, noise, None)
            continue
        intervals = [found.intervals[name] for name in NUMBERS]
        covered = [low <= value <= high for value, (low, high) in zip(truth, intervals, strict=True)]
        yield Trial(side, span, sigma, noise, covered)


def coverage(some: Sequence[Trial]) -> dict[str, float]:
    """Share of the printed laws whose interval covers the truth, by number."""
    printed = np.array([trial.covered for trial in some if trial.covered is not None])
    return dict(zip(NUMBERS, printed.mean(0).tolist(), strict=True))


def table(done: Sequence[Trial]) -> str:
    """By grid, range, noise and its kind, as Markdown."""
    groups: list[tuple[str, Callable[[Trial], bool]]] = [("all", lambda _: True)]
    groups += [(f"{side} x {side} runs", lambda trial, side=side: trial.side == side) for side in SIDES]
    groups += [(f"range {span} x {span}", lambda trial, span=span: trial.span == span) for span in RANGES]
    groups += [(f"noise {sigma:.2%}", lambda trial, sigma=sigma: trial.sigma == sigma) for sigma in SIGMAS]
    groups += [(noise, lambda trial, noise=noise: trial.noise == noise) for noise in NOISES]
    lines = ["| | trials | printed | covered, of the printed |", "|---|---:|---:|---:|"]
    for title, belongs in groups:
        some = [trial for trial in done if belongs(trial)]
        printed = [trial for trial in some if trial.covered is not None]
        if printed:
            share = np.mean(list(coverage(printed).values()))
            lines.append(f"| {title} | {len(some)} | {len(printed) / len(some):.0%} | {share:.1%} |")
        elif some:
            lines.append(f"| {title} | {len(some)} | 0% | |")
    by_number = ", ".join(f"{name} {share:.1%}" for name, share in coverage(done).items())
    return "\n".join([*lines, "", f"By number: {by_number}."])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0, help="(default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    done = []
    for trial in trials(arguments.seed):
        done.append(trial)
        if time.monotonic() > end:
            break
    print(table(done))


if __name__ == "__main__":
    main()
