"""Laws recover what made the data, know what they do not know, and refuse what cannot be known."""

from __future__ import annotations

import numpy as np
import pytest

from nepa_scale.config import ConfigError
from nepa_scale.scaling import NotDetermined, fit_isoflop, fit_parametric, project_variables

TRUTH = {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658}  # of 2404.10102


def runs(noise: float = 0.0, seed: int = 0, count: int | None = None, **law: float) -> tuple[np.ndarray, ...]:
    t = TRUTH | law
    if count is None:
        n, d = (x.ravel() for x in np.meshgrid(np.geomspace(5e7, 2e10, 7), np.geomspace(1e9, 5e11, 6)))
    else:
        random = np.random.default_rng(seed + 1)
        n, d = np.exp(random.uniform(*np.log([5e7, 2e10]), count)), np.exp(random.uniform(*np.log([1e9, 5e11]), count))
    loss = t["E"] + t["A"] / n ** t["alpha"] + t["B"] / d ** t["beta"]
    return n, d, loss * np.exp(noise * np.random.default_rng(seed).standard_normal(len(n)))


@pytest.mark.parametrize(
    "law",
    [
        {},
        {"E": 0.02, "A": 3.0, "B": 5.0, "alpha": 0.12, "beta": 0.2},
        {"E": 0.5, "A": 1e6, "B": 1e7, "alpha": 0.8, "beta": 0.75},
    ],
)  # fmt: skip
def test_truth_without_noise_is_recovered(law: dict[str, float]) -> None:
    for fit in (fit_parametric(*runs(**law), bootstrap=0), project_variables(*runs(**law))):
        for name, value in (TRUTH | law).items():
            assert getattr(fit, name) == pytest.approx(value, rel=5e-3), name


def test_units_do_not_matter() -> None:
    n, d, loss = runs(0.01)
    one, other = fit_parametric(n, d, loss, bootstrap=0), fit_parametric(n / 1e6, d / 1e9, loss, bootstrap=0)
    assert other.alpha == pytest.approx(one.alpha, rel=1e-4)
    assert pytest.approx(one.E, rel=1e-4) == other.E


def test_one_outlier_does_not_move_it_and_is_named() -> None:
    n, d, loss = runs(0.002)
    clean = fit_parametric(n, d, loss, bootstrap=0)
    loss[10] *= 1.5
    fit = fit_parametric(n, d, loss, bootstrap=0)
    assert fit.outliers == [10]
    assert fit.alpha == pytest.approx(clean.alpha, rel=0.05)
    assert fit.beta == pytest.approx(clean.beta, rel=0.05)


@pytest.mark.slow
def test_intervals_cover_what_they_say() -> None:
    hits, count = dict.fromkeys((*TRUTH, "a"), 0), 120
    true_a = TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"])
    for seed in range(count):
        fit = fit_parametric(*runs(0.005, seed), bootstrap=120, seed=seed)
        for name, value in (TRUTH | {"a": true_a}).items():
            low, high = fit.intervals[name]
            hits[name] += low <= value <= high
    shares = {name: hit / count for name, hit in hits.items()}
    assert all(0.82 <= share <= 0.97 for share in shares.values()), shares  # nominal 0.9, 120 trials
    assert 0.85 <= np.mean(list(shares.values())) <= 0.95, shares


def test_the_optimum_is_where_the_law_is_lowest() -> None:
    fit = fit_parametric(*runs(), bootstrap=0)
    n, d = fit.optimum(1e20)
    assert n * d == pytest.approx(1e20)
    best = fit.predict(np.array(n), np.array(d))
    for factor in (0.9, 1.1):
        assert fit.predict(np.array(n * factor), np.array(d / factor)) > best


def test_many_runs_and_repeated_ones() -> None:
    n, d, loss = runs(0.01, count=10_000)
    assert fit_parametric(n, d, loss, bootstrap=0).alpha == pytest.approx(TRUTH["alpha"], rel=0.03)
    n, d, loss = (np.tile(x, 2) for x in runs())
    assert fit_parametric(n, d, loss, bootstrap=0).beta == pytest.approx(TRUTH["beta"], rel=5e-3)


def test_what_cannot_be_determined_is_refused_with_what_to_add() -> None:
    n, d, loss = runs()
    two = n <= np.unique(n)[1]
    with pytest.raises(NotDetermined, match="2 model sizes do not determine alpha: add runs of 1 more sizes"):
        fit_parametric(n[two], d[two], loss[two])
    with pytest.raises(NotDetermined, match="5 different runs do not determine 5 numbers: add 1 or more"):
        fit_parametric(n[[0, 8, 16, 24, 32]], d[[0, 8, 16, 24, 32]], loss[[0, 8, 16, 24, 32]])
    with pytest.raises(NotDetermined, match="grow together"):
        fit_parametric(np.unique(n), 20 * np.unique(n), np.linspace(3, 2, 7))
    cases = ((2, "loss", -0.9, "fit 1 . loss"), (0, "parameters", 0, ""), (1, "samples", np.nan, ""))
    for index, name, value, why in cases:
        columns = [n.copy(), d.copy(), loss.copy()]
        columns[index][3] = value
        with pytest.raises(ConfigError, match=rf"row 4: {name} is .*must be positive.*{why}"):
            fit_parametric(*columns)


def isoflop_runs(noise: float = 0.0) -> tuple[np.ndarray, ...]:
    budgets = np.repeat(np.geomspace(1e19, 1e22, 4), 9)
    best = 0.1 * (budgets / 6) ** (TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"]))
    n = best * np.tile(np.geomspace(0.2, 5, 9), 4) * 1.3
    d = budgets / (6 * n)
    loss = TRUTH["E"] + TRUTH["A"] / n ** TRUTH["alpha"] + TRUTH["B"] / d ** TRUTH["beta"]
    return n, d, loss * np.exp(noise * np.random.default_rng(0).standard_normal(len(n)))


def test_isoflop_exponent_and_its_measured_bias() -> None:
    n, d, loss = isoflop_runs()
    law = fit_parametric(n, d, loss, bootstrap=0)
    fit = fit_isoflop(n, d, loss, law=law)
    assert [budget.runs for budget in fit.budgets] == [9] * 4
    assert fit.bias is not None
    assert fit.exponent - fit.bias == pytest.approx(law.a, abs=1e-6)
    assert fit.exponent == pytest.approx(law.a, abs=0.03)
    for budget in fit.budgets:
        assert budget.optimum == pytest.approx(law.optimum(budget.flops / 6)[0], rel=0.3)


def test_isoflop_without_equal_budgets_is_refused() -> None:
    with pytest.raises(NotDetermined, match="add runs of equal compute"):
        fit_isoflop(*runs(count=8))
