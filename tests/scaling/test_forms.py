"""The form that made the data wins the comparison, with its own numbers."""

from __future__ import annotations

import numpy as np
import pytest

from nepa_scale.scaling.forms import compare_forms, compare_frontiers, frontier

N, D = (x.ravel() for x in np.meshgrid(np.geomspace(1e5, 1e8, 6), np.geomspace(1e4, 1e8, 6)))
NOISE = np.exp(0.002 * np.random.default_rng(0).standard_normal(36))
TRUTHS = {
    "E + A/N^alpha + B/D^beta": (
        0.4 + 20 / N**0.3 + 30 / D**0.4, {"E": 0.4, "A": 20, "B": 30, "alpha": 0.3, "beta": 0.4}),
    "A/N^alpha + B/D^beta": (20 / N**0.3 + 30 / D**0.4, {"A": 20, "B": 30, "alpha": 0.3, "beta": 0.4}),
    "((A/N)^(alpha/beta) + B/D)^beta": (
        ((3e6 / N) ** (0.1 / 0.3) + 5e6 / D) ** 0.3, {"A": 3e6, "B": 5e6, "alpha": 0.1, "beta": 0.3}),
    "E + A/N^alpha": (0.4 + 20 / N**0.3, {"E": 0.4, "A": 20, "alpha": 0.3}),
    "E + B/D^beta": (0.4 + 30 / D**0.4, {"E": 0.4, "B": 30, "beta": 0.4}),
}  # fmt: skip


@pytest.mark.parametrize(
    "formula",
    [
        formula if formula.startswith("E + A/N^alpha +") else pytest.param(formula, marks=pytest.mark.slow)
        for formula in TRUTHS
    ],
)
def test_the_true_form_of_size_and_samples_wins(formula: str) -> None:
    loss, truth = TRUTHS[formula]
    exact = next(one for one in compare_forms(N, D, loss) if one.formula == formula)
    assert exact.numbers == pytest.approx(truth, rel=5e-3)
    assert exact.residual_std < 1e-6
    assert exact.extrapolation_error == pytest.approx(0, abs=1e-4)
    found = compare_forms(N, D, loss * NOISE)
    assert found[0].aicc == 0
    assert next(one for one in found if one.formula == formula).aicc < 4  # a form that holds it may be as near
    simpler = [one for one in found if len(one.numbers) < len(truth)]
    assert all(one.aicc > 10 for one in simpler)


C = np.geomspace(1e11, 1e17, 13)
FRONTIERS = {
    "A/C^gamma": (30 / C**0.1, {"A": 30, "gamma": 0.1}),
    "E + A/C^gamma": (0.1 + 30 / C**0.15, {"E": 0.1, "A": 30, "gamma": 0.15}),
    "E + A/(C + C0)^gamma": (
        0.12 + 60 / (C + 3e13) ** 0.14, {"E": 0.12, "A": 60, "C0": 3e13, "gamma": 0.14}),
}  # fmt: skip


@pytest.mark.parametrize("formula", FRONTIERS)
def test_the_true_form_of_the_frontier_wins(formula: str) -> None:
    error, truth = FRONTIERS[formula]
    found = compare_frontiers(C, error)
    exact = next(one for one in found if one.formula == formula)
    assert exact.numbers == pytest.approx(truth, rel=5e-3)
    assert exact.aicc < 6 or exact.residual_std < 1e-9
    assert all(one.residual_std > 1e-4 for one in found if len(one.numbers) < len(truth))


def test_the_frontier_is_what_no_cheaper_run_beats() -> None:
    assert frontier([3, 1, 2, 1, 4], [0.5, 0.9, 0.7, 0.8, 0.6]) == [3, 2, 0]


def test_too_few_runs_leave_the_simpler_forms() -> None:
    assert {len(one.numbers) for one in compare_frontiers(C[:5], 30 / C[:5] ** 0.1)} == {2}
    assert compare_frontiers(C[:3], 30 / C[:3] ** 0.1) == []
