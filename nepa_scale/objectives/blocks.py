"""Which patches JEPA predicts, and from which (Assran et al. 2023, arXiv 2301.08243, section 3 and appendix A.1).

Four target blocks of 0.15 to 0.2 of the image and of aspect 0.75 to 1.5; the context is a block of 0.85 to 1 of the
image, without the targets. Places, aspects and the context's size are drawn for each image from its key alone.

Tensors need as many patches in every image. The official code draws one size of target for a whole batch and cuts all
contexts to the batch's smallest, so that an image's patches depend on its batch. Here all target blocks have one number
of patches, that of the most shapes within the published ranges, and contexts are thinned at random to the least number
that can be left.

Shapes: B images, N patches in a grid, M patches of a target block, K of the context.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from nepa_scale.config import ConfigError
from nepa_scale.counter_random import uniform

TARGETS = 4
TARGET_AREA, TARGET_ASPECT, CONTEXT_AREA = (0.15, 0.2), (0.75, 1.5), (0.85, 1.0)

Grid = tuple[int, int]  # rows, columns


@dataclass(frozen=True)
class Blocks:
    """The possible shapes, (rows, columns), of target and context blocks in a grid.

    target_patches, context_patches: M and K
    """

    grid: Grid
    targets: tuple[Grid, ...]
    contexts: tuple[Grid, ...]

    @property
    def target_patches(self) -> int:
        return self.targets[0][0] * self.targets[0][1]

    @property
    def context_patches(self) -> int:
        return min(rows * columns for rows, columns in self.contexts) - TARGETS * self.target_patches


def blocks_of(grid: Grid) -> Blocks:
    """
    Raises:
        ConfigError: no block of the published sizes fits the grid.
    """
    rows, columns = grid
    patches = rows * columns
    shapes: dict[int, list[Grid]] = {}
    for high in range(1, rows + 1):
        for wide in range(1, columns + 1):
            if _within(high * wide / patches, TARGET_AREA) and _within(high / wide, TARGET_ASPECT):
                shapes.setdefault(high * wide, []).append((high, wide))
    contexts = [(high, round(high * columns / rows)) for high in range(1, rows + 1)]
    contexts = [shape for shape in contexts if _within(shape[0] * shape[1] / patches, CONTEXT_AREA)]
    middle = sum(TARGET_AREA) / 2 * patches
    if shapes:
        targets = max(shapes.items(), key=lambda item: (len(item[1]), -abs(item[0] - middle)))[1]
        blocks = Blocks(grid, tuple(targets), tuple(contexts))
        if blocks.context_patches > 0:
            return blocks
    raise ConfigError(
        f"objective.name=jepa finds no target blocks in a grid of {rows} x {columns} patches: take at least 5 x 5, by "
        "a larger model.image_size or a smaller model.patch_size"
    )


def draw_blocks(sample_keys: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """Keys int64 [B] -> the context's patches, int64 [B, K], and the targets', [B, 4, M], counted row by row."""
    rows, columns = blocks.grid
    batch, patches = sample_keys.shape[0], rows * columns
    draws = uniform(sample_keys, "targets", count=3 * TARGETS).view(batch, TARGETS, 3)
    top, left, _, wide = _place(draws, blocks.targets, blocks.grid)
    cells = torch.arange(blocks.target_patches, device=sample_keys.device)
    targets = (top + cells // wide) * columns + left + cells % wide

    draws = uniform(sample_keys, "context", count=3).unsqueeze(1)
    top, left, high, wide = (side.squeeze(1) for side in _place(draws, blocks.contexts, blocks.grid))
    cells = torch.arange(patches, device=sample_keys.device)
    row, column = cells // columns, cells % columns
    inside = (row >= top) & (row < top + high) & (column >= left) & (column < left + wide)
    inside = inside.scatter(1, targets.flatten(1), False)
    order = uniform(sample_keys, "thinning", count=patches).masked_fill(~inside, 1.0).argsort(dim=1, stable=True)
    return order[:, : blocks.context_patches], targets


def _place(draws: Tensor, shapes: tuple[Grid, ...], grid: Grid) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numbers in [0, 1), [B, n, 3] -> of n blocks the top row, left column, height and width, int64 [B, n, 1] each."""
    sides = _on_device(shapes, draws.device)[(draws[..., 0] * len(shapes)).long()]
    room = _on_device((grid,), draws.device) - sides + 1
    corners = (draws[..., 1:] * room).long()
    top, left, high, wide = torch.cat([corners, sides], dim=-1).split(1, dim=-1)
    return top, left, high, wide


@lru_cache(maxsize=16)
def _on_device(shapes: tuple[Grid, ...], device: torch.device) -> Tensor:
    """Int64 [shapes, 2]; kept, since to bring it there makes the host wait."""
    return torch.tensor(shapes, device=device)


def _within(value: float, bounds: tuple[float, float]) -> bool:
    return bounds[0] <= value <= bounds[1]
