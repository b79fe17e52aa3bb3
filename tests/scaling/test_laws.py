"""Laws recover what made the data, know what they do not know, and refuse what cannot be known."""

from __future__ import annotations

import numpy as np
import pytest

from nepa_scale.config import ConfigError
from nepa_scale.scaling import NotDetermined, ParametricFit, fit_isoflop, fit_parametric, project_variables

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


@pytest.mark.parametrize("row", [0, 19, 39])  # 0 and 39: the smallest and the largest run
def test_one_gross_outlier_moves_no_exponent_by_more_than_its_interval(row: int) -> None:
    n, d = (x.ravel() for x in np.meshgrid(np.geomspace(5e7, 2e10, 8), np.geomspace(1e9, 5e11, 5)))
    loss = TRUTH["E"] + TRUTH["A"] / n ** TRUTH["alpha"] + TRUTH["B"] / d ** TRUTH["beta"]
    loss = loss * np.exp(0.005 * np.random.default_rng(1).standard_normal(40))
    clean = fit_parametric(n, d, loss, bootstrap=100)
    for factor in (0.6, 1.15):
        wrong = loss.copy()
        wrong[row] *= factor
        fit = fit_parametric(n, d, wrong, bootstrap=100)
        assert row in fit.outliers
        for name in ("alpha", "beta"):
            low, high = clean.intervals[name]
            assert low <= getattr(fit, name) <= high


def test_outliers_that_hide_each_other_are_all_named_and_both_laws_kept() -> None:
    """In the shape of Chinchilla's public points, of which five are short runs far above the law; but fewer of them."""
    random = np.random.default_rng(5)
    n, d = np.exp(random.uniform(*np.log([5e7, 1.6e10]), 50)), np.exp(random.uniform(*np.log([1e9, 4e11]), 50))
    loss = TRUTH["E"] + TRUTH["A"] / n ** TRUTH["alpha"] + TRUTH["B"] / d ** TRUTH["beta"]
    loss *= np.exp(0.004 * np.exp(0.5 * random.standard_normal(50)) * random.standard_normal(50))
    shortest = np.argsort(d)[:5]
    right = fit_parametric(np.delete(n, shortest), np.delete(d, shortest), np.delete(loss, shortest), bootstrap=50)
    loss[shortest] *= [1.3, 1.6, 1.25, 1.9, 1.7]
    fit = fit_parametric(n, d, loss, bootstrap=50)
    assert set(shortest.tolist()) <= set(fit.outliers)
    assert len(fit.outliers) < 9
    assert fit.with_outliers is not None
    assert fit.beta == pytest.approx(right.beta, abs=0.005)
    assert fit.with_outliers.beta - right.beta > 0.25 * np.subtract(*fit.intervals["beta"][::-1])
    assert fit.with_outliers.intervals.keys() == fit.intervals.keys()


def test_runs_that_a_smaller_one_beats_are_named() -> None:
    n, d, loss = runs(0.002)
    assert fit_parametric(n, d, loss, bootstrap=0).beaten == []
    loss[24] = 1.05 * loss[23]  # of as many samples, and one size less
    assert fit_parametric(n, d, loss, bootstrap=0).beaten == [(24, 23)]


def test_a_floor_of_nothing_is_an_upper_limit() -> None:
    fit = fit_parametric(*runs(0.002, E=0.0, alpha=0.2, beta=0.25), bootstrap=100)
    low, high = fit.intervals["E"]
    assert low == 0 < high
    assert fit.floor == f"< {high:.4g}"
    assert fit_parametric(*runs(0.002), bootstrap=100).floor.startswith("1.8")


def test_no_interval_is_without_width() -> None:
    for fit in (fit_parametric(*runs(), bootstrap=50), fit_parametric(*runs(0.005), bootstrap=50)):
        for name, (low, high) in fit.intervals.items():
            assert low < getattr(fit, name) < high, name


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


def flat(kind: str) -> tuple[np.ndarray, ...]:
    n, d = (x.ravel() for x in np.meshgrid([1e6, 3e6, 1e7, 3e7], [1e7, 3e7, 1e8, 3e8]))
    of_n, of_d = 1.5 + 300 / n**0.32, 1.5 + 300 / d**0.32
    noise = np.exp(0.01 * np.random.default_rng(0).standard_normal(16))
    return {
        "constant": (n, d, np.full(16, 2.0)),
        "without D": (n, d, of_n),
        "without N": (n, d, of_d),
        "without D, noisy": (n, d, of_n * noise),
        "noise alone": (n, d, 2 * noise),
        "log10": (np.log10(n), np.log10(d), of_n + of_d),
        "ln": (n, np.log(d), of_n + of_d),
    }[kind]


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("constant", "the loss is 2 in all runs"),
        ("without D", "do not determine beta: .* without D, is as good by AICc; add runs of numbers of samples"),
        ("without N", "do not determine alpha: .* without N, is as good by AICc; add runs of sizes"),
        ("without D, noisy", "do not determine beta: .* without D, is as good by AICc"),
        ("noise alone", "as good by AICc"),
        ("log10", "parameters lie between 6 and 7.47712, as logarithms of counts do"),
        ("ln", "samples lie between 16.1181 and 19.5193, as logarithms of counts do"),
    ],
)
@pytest.mark.parametrize("bootstrap", [0, 20])
def test_losses_that_tell_no_law_are_refused(kind: str, why: str, bootstrap: int) -> None:
    with pytest.raises(NotDetermined, match=why):
        fit_parametric(*flat(kind), bootstrap=bootstrap)


def test_the_range_is_held_against_the_noise() -> None:
    for seed in range(4):
        random = np.random.default_rng(seed)
        n, d = (x.ravel() for x in np.meshgrid(1e8 * np.array([1, 2, 4]), 1e9 * np.array([1, 2, 4])))
        loss = TRUTH["E"] + TRUTH["A"] / n ** TRUTH["alpha"] + TRUTH["B"] / d ** TRUTH["beta"]
        for noise in (0.02, 0.05):
            with pytest.raises(NotDetermined, match="add runs of"):
                fit_parametric(n, d, loss * np.exp(noise * random.standard_normal(9)), bootstrap=20)


def test_a_range_that_tells_effects_but_no_exponents_is_refused() -> None:
    n, d = (x.ravel() for x in np.meshgrid(1e8 * np.geomspace(1, 4, 8), 1e9 * np.geomspace(1, 4, 8)))
    loss = TRUTH["E"] + TRUTH["A"] / n ** TRUTH["alpha"] + TRUTH["B"] / d ** TRUTH["beta"]
    noise = np.exp(0.02 * np.random.default_rng(0).standard_normal(64))
    with pytest.raises(
        NotDetermined, match=r"an exponent of 0.35 would be known to .*; add runs of sizes further apart"
    ):
        fit_parametric(n, d, loss * noise, bootstrap=0)


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


def test_isoflop_has_an_interval_that_holds_the_exponent() -> None:
    n, d, loss = isoflop_runs(0.001)
    fit = fit_isoflop(n, d, loss, law=fit_parametric(n, d, loss, bootstrap=0), bootstrap=100)
    low, high = fit.intervals["exponent"]
    assert 0 < low < fit.exponent < high < 1
    assert fit.bias is not None
    assert low < TRUTH["beta"] / (TRUTH["alpha"] + TRUTH["beta"]) + fit.bias < high
    assert "drawn" not in fit.facts()
    wider = fit_isoflop(*isoflop_runs(0.003), bootstrap=100).intervals["exponent"]
    assert wider[1] - wider[0] > 1.5 * (high - low)


def test_isoflop_from_too_little_is_refused() -> None:
    n, d, loss = isoflop_runs()
    budgets = np.repeat(np.arange(4), 9)
    with pytest.raises(NotDetermined, match=r"^2 budgets have runs .* at 3 budgets or more"):
        fit_isoflop(*(x[budgets < 2] for x in (n, d, loss)))
    near = 6 * n * d / 10.0 ** (0.7 * budgets)  # budgets that are 2 times apart
    with pytest.raises(NotDetermined, match=r"span 7.94 times the compute, and an exponent needs 10 times"):
        fit_isoflop(n, d, loss, flops=near)
    random = np.random.default_rng(3)
    noisy = loss * np.exp(0.02 * random.standard_normal(len(loss)))
    level = n / np.tile(np.exp(np.log(n).reshape(4, 9).mean(1))[:, None], 9).ravel()  # the best size does not grow
    with pytest.raises(NotDetermined, match="the exponent may be 0"):
        fit_isoflop(1e8 * level, d, noisy, flops=6 * n * d)


def test_isoflop_with_a_bias_as_large_as_the_exponent_is_refused() -> None:
    n, d, loss = isoflop_runs()
    law = fit_parametric(n, d, loss, bootstrap=0)
    with pytest.raises(NotDetermined, match=r"bias on this grid, .*, is as large as the exponent"):
        fit_isoflop(n, d, loss, law=_law_whose_optimum_does_not_grow(law))


def _law_whose_optimum_does_not_grow(law: ParametricFit) -> ParametricFit:
    class Misled(ParametricFit):
        a = -0.1  # type: ignore[assignment]

    return Misled(law.E, law.A, law.B, law.alpha, law.beta, objective=0.0, residual_std=0.0)
