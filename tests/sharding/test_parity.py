"""The parity matrix: every strategy trains the same model (docs/parity.md has the measured table)."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from tests.sharding.parity import ACCUMULATION, CLIP, PRECISIONS, RECOMPUTE, SHARDED, TOLERANCE, measure


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return measure()


@pytest.mark.slow
def test_every_cell_is_measured(rows: list[dict[str, Any]]) -> None:
    cells = {(r["strategy"], r["precision"], r["recompute"], r["accumulation"]) for r in rows}
    assert cells == set(product(("single", *SHARDED), PRECISIONS, RECOMPUTE, ACCUMULATION))


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_losses_agree_with_one_process(rows: list[dict[str, Any]], precision: str) -> None:
    for row in rows:
        if row["precision"] == precision:
            assert row["difference"] <= TOLERANCE[precision], row


@pytest.mark.slow
def test_the_matrix_trains_and_clips(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["losses"][-1] < row["losses"][0] - 0.05, row
        assert row["smallest_norm"] > CLIP, row
