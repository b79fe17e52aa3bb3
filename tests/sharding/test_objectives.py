"""Masked autoencoding and joint embedding train the same model under every strategy, as next embedding does."""

from __future__ import annotations

from itertools import product

import pytest

from tests.sharding.parity import CLIP, PRECISIONS, RANKS, SHARDED, TOLERANCE, Cell, launch

OBJECTIVES = ("mae", "jepa")
# largest relative difference of a gradient's norm in the first steps: later ones tell how rounding grows
NORM_TOLERANCE, FIRST = {"fp32": 1e-5, "bf16": 1e-2}, 8


def check(cells: list[Cell], sharded: list[Cell]) -> None:
    """Losses of 20 steps, and gradient norms, against one process in the same precision, on the whole batch at once."""
    references = launch(cells, 1)
    for cell, found in launch(sharded, RANKS).items():
        precision, objective = cell[1], cell[4]
        reference = references["single", precision, "none", 1, objective]
        assert found["losses"] == pytest.approx(reference["losses"], rel=TOLERANCE[precision]), cell
        assert found["norms"][:FIRST] == pytest.approx(reference["norms"][:FIRST], rel=NORM_TOLERANCE[precision]), cell
        assert min(found["norms"]) > CLIP


def test_sharded_losses_and_gradients_are_those_of_one_process() -> None:
    """Where most can go wrong: weights gathered, recomputed and, for the teacher, exchanged in every micro-step."""
    reference: list[Cell] = [("single", "fp32", "none", 1, objective) for objective in OBJECTIVES]
    check(
        reference, [(name, "fp32", "full", 2, objective) for name, objective in product(("fsdp", "zero3"), OBJECTIVES)]
    )


@pytest.mark.slow
def test_every_strategy_precision_and_accumulation() -> None:
    cells: list[Cell] = [
        (name, precision, recompute, accumulation, objective)
        for name, precision, (recompute, accumulation), objective in product(
            SHARDED, PRECISIONS, (("none", 1), ("selective", 2)), OBJECTIVES
        )
    ]
    check(
        [("single", precision, "none", 1, objective) for precision, objective in product(PRECISIONS, OBJECTIVES)], cells
    )
