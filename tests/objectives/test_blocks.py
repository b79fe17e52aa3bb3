"""JEPA's blocks: their shapes, their places, and that they are an image's own."""

from __future__ import annotations

import pytest
import torch

from nepa_scale.config import ConfigError
from nepa_scale.objectives.blocks import CONTEXT_AREA, TARGET_AREA, TARGET_ASPECT, TARGETS, blocks_of, draw_blocks

GRIDS = [(5, 5), (6, 6), (8, 8), (14, 14), (16, 16), (32, 32), (8, 12)]


@pytest.mark.parametrize("grid", GRIDS)
def test_shapes_are_within_the_published_ranges(grid: tuple[int, int]) -> None:
    blocks, patches = blocks_of(grid), grid[0] * grid[1]
    for high, wide in blocks.targets:
        assert TARGET_AREA[0] <= high * wide / patches <= TARGET_AREA[1]
        assert TARGET_ASPECT[0] <= high / wide <= TARGET_ASPECT[1]
        assert high * wide == blocks.target_patches
    for high, wide in blocks.contexts:
        assert CONTEXT_AREA[0] <= high * wide / patches <= CONTEXT_AREA[1]
    assert 0.1 < blocks.context_patches / patches < 0.4


@pytest.mark.parametrize("grid", GRIDS)
def test_targets_are_whole_blocks_and_contexts_lie_beside_them(grid: tuple[int, int]) -> None:
    blocks = blocks_of(grid)
    context, targets = draw_blocks(torch.arange(200), blocks)
    assert context.shape == (200, blocks.context_patches)
    assert targets.shape == (200, TARGETS, blocks.target_patches)
    shapes = set()
    for cells in targets.flatten(0, 1).tolist():
        rows, columns = ({cell // grid[1] for cell in cells}, {cell % grid[1] for cell in cells})
        for lines, side in ((rows, grid[0]), (columns, grid[1])):
            assert max(lines) - min(lines) == len(lines) - 1
            assert min(lines) >= 0
            assert max(lines) < side
        assert len(set(cells)) == len(rows) * len(columns)  # every cell of the rectangle
        shapes.add((len(rows), len(columns)))
    assert shapes == set(blocks.targets)
    for seen, told in zip(context.tolist(), targets.flatten(1).tolist(), strict=True):
        assert len(set(seen)) == blocks.context_patches
        assert not set(seen) & set(told)
        assert set(seen) <= set(range(grid[0] * grid[1]))


def test_blocks_are_a_function_of_the_key_alone() -> None:
    blocks = blocks_of((16, 16))
    keys = torch.randint(-(2**62), 2**62, (64,), generator=torch.Generator().manual_seed(0))
    whole, some = draw_blocks(keys, blocks), draw_blocks(keys[10:20], blocks)
    for of_all, of_some in zip(whole, some, strict=True):
        assert torch.equal(of_some, of_all[10:20])
    assert (draw_blocks(keys + 1, blocks)[1] != whole[1]).any((1, 2)).float().mean() > 0.99


def test_blocks_reach_every_place_and_contexts_favour_no_side() -> None:
    context, targets = draw_blocks(torch.arange(4000), blocks_of((8, 8)))
    possible = {
        row * 8 + column for high, wide in ((3, 4), (4, 3)) for row in range(9 - high) for column in range(9 - wide)
    }
    assert set(targets[..., 0].flatten().tolist()) == possible  # their first patches
    seen = torch.zeros(64).scatter_add(0, context.flatten(), torch.ones(context.numel())).view(8, 8) / 4000
    for mirrored in (seen.flip(0), seen.flip(1)):
        assert (seen - mirrored).abs().max() < 0.05


@pytest.mark.parametrize("grid", [(1, 1), (4, 4), (2, 20)])
def test_a_grid_without_such_blocks_is_refused(grid: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=r"no target blocks in a grid of .*at least 5 x 5"):
        blocks_of(grid)
