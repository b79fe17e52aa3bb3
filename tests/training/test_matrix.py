"""A covering part of the any-to-any matrix (docs/checkpoints.md has all of it)."""

from __future__ import annotations

from tests.training.matrix import LAYOUTS, STRATEGIES, WORLDS, Layout, Pair, failures, measure

# every strategy writes and reads, every change of world size occurs, and some go on as they were
PAIRS: list[Pair] = [
    (Layout("single", 1), Layout("zero3", 4)),
    (Layout("ddp", 2), Layout("zero3", 4)),  # loaded into an engine that has trained already
    (Layout("ddp", 2), Layout("fsdp", 4)),
    (Layout("fsdp", 4), Layout("zero1", 2)),
    (Layout("zero1", 2), Layout("single", 1)),
    (Layout("zero3", 4), Layout("zero2", 1)),
    (Layout("zero2", 1), Layout("zero3_offload", 2)),
    (Layout("zero3_offload", 2), Layout("ddp", 2)),
    (Layout("fsdp", 4), Layout("fsdp", 4)),
    (Layout("zero1", 2), Layout("zero1", 2)),
]


def test_the_part_covers_the_matrix() -> None:
    assert {pair[0].strategy for pair in PAIRS} == {pair[1].strategy for pair in PAIRS} == set(STRATEGIES)
    changes = {(pair[0].ranks, pair[1].ranks) for pair in PAIRS}
    assert {(a, b) for a in WORLDS for b in WORLDS if a != b} <= changes
    assert {layout for pair in PAIRS for layout in pair} <= set(LAYOUTS)


def test_any_layout_goes_on_from_any_other() -> None:
    rows = measure(PAIRS)
    assert len(rows) == len(PAIRS)
    assert failures(rows) == []
