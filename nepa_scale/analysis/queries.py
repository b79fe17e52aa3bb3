"""Which patches are asked about. Patches are numbered row by row from 0; token 0 is CLS, so patch n is token n + 1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from nepa_scale.config import ConfigError
from nepa_scale.counter_random import hash_array

Grid = tuple[int, int]  # rows and columns of patches
Place = tuple[int, int]  # row and column of a patch


def grid_of(pixels: Tensor, patch: int) -> Grid:
    """The patches of an image [..., h, w]."""
    return pixels.shape[-2] // patch, pixels.shape[-1] // patch


def place_of(patch: int, grid: Grid) -> Place:
    """Row and column of patch number `patch`."""
    return patch // grid[1], patch % grid[1]


def patch_at(place: Place, grid: Grid) -> int:
    """The number of the patch at `place`."""
    return place[0] * grid[1] + place[1]


def chosen_patches(places: Sequence[Place], default: Sequence[int], grid: Grid, stop: int, image: str) -> list[int]:
    """The patches at `places`, or of `default` where none are given, each once, in order.

    stop: patches from this number on cannot be asked about (all of the grid, or all but the last)
    image: its name, for errors
    Raises:
        ConfigError: a place is outside the grid, or from `stop` on.
    """
    rows, columns = grid
    for row, column in places:
        if row >= rows or column >= columns:
            raise ConfigError(
                f"--query {row},{column} is outside the {rows} x {columns} patches of {image}: rows are 0 to "
                f"{rows - 1}, columns 0 to {columns - 1}"
            )
        if patch_at((row, column), grid) >= stop:
            raise ConfigError(f"--query {row},{column} is the last patch of {image}: it has no next one to predict")
    patches = [patch_at(place, grid) for place in places] or [patch for patch in default if 0 <= patch < stop]
    return list(dict.fromkeys(patches))


def centre_patch(grid: Grid) -> int:
    """The patch in the middle of an image."""
    return patch_at((grid[0] // 2, grid[1] // 2), grid)


def sampled_patches(count: int, patches: int, image: int) -> Tensor:
    """`count` of `patches` patches (all, where there are fewer), int64, in order: a function of the image's number."""
    order = np.argsort(hash_array(np.arange(patches), "attention queries", image), kind="stable")
    return torch.from_numpy(np.sort(order[:count]))
