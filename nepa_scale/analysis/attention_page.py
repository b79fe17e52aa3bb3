"""One image's attention as a page: the query, the mean over heads by layer, and every layer and head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Tensor

from nepa_scale.analysis.attention import CLS
from nepa_scale.analysis.drawing import (
    QUERY,
    Picture,
    Sheet,
    colour_bar,
    enlarged,
    heated,
    outlined,
    patch_pixels,
)
from nepa_scale.analysis.queries import Grid, place_of

_LEAD, _WIDTH = 330, 1150  # pixels: the image, and the page if no line needs more
_MAP = (112, 190)  # pixels: the least and the most of a map
_LABEL, _GAP, _LINE = 64, 8, 20


def draw_attention(
    path: Path, title: str, pixels: Tensor, grid: Grid, patches: list[int], layers: list[Tensor], causal: bool
) -> None:
    """Writes the page of one image, a part for each query.

    pixels: uint8 [3, h, w]
    patches: the Q queries' numbers
    layers: their attention, float32 [1, H, Q, T] each, on the host
    """
    sheet = Sheet()
    sheet.text(Sheet.MARGIN, Sheet.MARGIN, title, 17)
    y = Sheet.MARGIN + 32
    for number, patch in enumerate(patches):
        rows = np.stack([layer[0, :, number].numpy() for layer in layers])  # [L, H, T]
        y = _QueryPart(sheet, pixels, grid, patch, causal).draw(rows, y) + 3 * _GAP
    sheet.picture(Sheet.MARGIN, y, colour_bar(220))
    sheet.text(Sheet.MARGIN + 232, y - 3, _legend(causal))
    sheet.save(path)


def _legend(causal: bool) -> str:
    hidden = "; faded patches come after the query and cannot be seen" if causal else ""
    return f"weight of a patch, from 0 to the largest of its own map; weight on CLS is written above{hidden}"


def _fitting(room: int, count: int) -> int:
    """The size at which `count` maps fill `room` pixels, within limits."""
    return min(max(room // count - _GAP, _MAP[0]), _MAP[1])


class _QueryPart:
    """Draws what belongs to one query."""

    def __init__(self, sheet: Sheet, pixels: Tensor, grid: Grid, patch: int, causal: bool) -> None:
        self._sheet, self._pixels, self._grid = sheet, pixels, grid
        self._patch, self._place = patch, place_of(patch, grid)
        self._visible = (np.arange(grid[0] * grid[1]) <= (patch if causal else grid[0] * grid[1])).reshape(grid)

    def draw(self, rows: np.ndarray, y: int) -> int:
        """From `y` down; returns where it ends. rows: [L, H, T]."""
        row, column = self._place
        words = f"query: row {row}, column {column} (patch {self._patch + 1} of {self._grid[0] * self._grid[1]})"
        self._sheet.text(Sheet.MARGIN, y, words, 15)
        y += _LINE + _GAP
        side = patch_pixels(self._grid, _LEAD)
        lead = self._marked(enlarged(self._pixels, self._grid, side))
        self._sheet.picture(Sheet.MARGIN, y + _LINE, lead)
        below = self._means(rows.mean(1), Sheet.MARGIN + lead.shape[1] + 3 * _GAP, y)
        return self._heads(rows, max(below, y + _LINE + lead.shape[0]) + 2 * _GAP)

    def _means(self, means: np.ndarray, left: int, y: int) -> int:
        """The layers' means [L, T], in lines that end at the page's width."""
        x, size = left, _fitting(_WIDTH - left, len(means))
        for layer, weights in enumerate(means):
            picture = self._map(weights, size)
            if x > left and x + picture.shape[1] > _WIDTH:
                x, y = left, y + picture.shape[0] + _LINE + _GAP
            self._sheet.text(x, y + 4, f"layer {layer + 1}  CLS {weights[0]:.0%}", 11)
            self._sheet.picture(x, y + _LINE, picture)
            x += picture.shape[1] + _GAP
        return y + _LINE + picture.shape[0]

    def _heads(self, rows: np.ndarray, y: int) -> int:
        """A line for each layer, a column for each head."""
        size = _fitting(_WIDTH - _LABEL, rows.shape[1])
        for layer, heads in enumerate(rows):
            x = Sheet.MARGIN + _LABEL
            for head, weights in enumerate(heads):
                picture = self._map(weights, size)
                name = f"head {head + 1}  " if layer == 0 else ""
                self._sheet.text(x, y + 4, f"{name}CLS {weights[0]:.0%}", 11)
                self._sheet.picture(x, y + _LINE, picture)
                x += picture.shape[1] + _GAP
            self._sheet.text(Sheet.MARGIN, y + _LINE + picture.shape[0] // 2 - 8, f"layer {layer + 1}")
            y += _LINE + picture.shape[0] + 2
        return y

    def _map(self, weights: np.ndarray, longest: int) -> Picture:
        patches = weights[CLS:].reshape(self._grid)
        image = enlarged(self._pixels, self._grid, patch_pixels(self._grid, longest))
        return self._marked(heated(image, patches / max(patches.max(), 1e-30), self._visible))

    def _marked(self, image: Picture) -> Picture:
        return outlined(image, self._grid, self._place, QUERY)
