"""One image's predictions as a page: where in the image the next patch's embedding is found."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from nepa_scale.analysis.drawing import (
    NEAREST,
    NEXT,
    QUERY,
    Colour,
    Map,
    Picture,
    Sheet,
    colour_bar,
    enlarged,
    heated,
    line_width,
    outlined,
    patch_pixels,
)
from nepa_scale.analysis.queries import Grid, place_of

_LONGEST, _GAP, _LINE = 330, 20, 20  # pixels


@dataclass(frozen=True)
class SimilarityMap:
    """Cosines [R, C] of one vector with the embeddings of all patches, and the rank of the next patch among them."""

    cosines: Map
    rank: float

    def nearest(self) -> int:
        """The number of the patch that is nearest."""
        return int(self.cosines.argmax())


@dataclass(frozen=True)
class Query:
    """A patch that is asked about, by its number, and the maps of its prediction and of its own embedding."""

    patch: int
    prediction: SimilarityMap
    own: SimilarityMap


def draw_similarity(path: Path, title: str, pixels: Tensor, grid: Grid, queries: list[Query]) -> None:
    """Writes the page of one image: for each query a row with the image, the map of the prediction, and that of the
    patch's own embedding, which copying would give.

    pixels: uint8 [3, h, w]
    """
    sheet = Sheet()
    sheet.text(Sheet.MARGIN, Sheet.MARGIN, title, 17)
    side = patch_pixels(grid, _LONGEST)
    image = enlarged(pixels, grid, side)
    y = Sheet.MARGIN + 32
    for query in queries:
        patch, prediction, own = query.patch, query.prediction, query.own
        row, column = place_of(patch, grid)
        panels = (
            (f"patch {patch + 1} of {grid[0] * grid[1]}: row {row}, column {column}", image, patch),
            (f"prediction: next {_found(prediction, patch)}", _shown(image, prediction), prediction.nearest()),
            (f"own embedding: next {_found(own, patch)}", _shown(image, own), own.nearest()),
        )
        for number, (words, picture, nearest) in enumerate(panels):
            x = Sheet.MARGIN + number * (image.shape[1] + _GAP)
            sheet.text(x, y, words)
            sheet.picture(x, y + _LINE, _marked(picture, grid, patch, nearest))
        for number, one in ((1, prediction), (2, own)):
            _scale(sheet, Sheet.MARGIN + number * (image.shape[1] + _GAP), y + _LINE + image.shape[0] + 6, one)
        y += 2 * _LINE + image.shape[0] + _GAP
    _legend(sheet, y)
    sheet.save(path)


def _found(one: SimilarityMap, patch: int) -> str:
    return f"{one.cosines.flat[patch + 1]:.3f}, rank {one.rank:g}"


def _shown(image: Picture, one: SimilarityMap) -> Picture:
    low, high = one.cosines.min(), one.cosines.max()
    scaled = (one.cosines - low) / max(high - low, 1e-6)
    return heated(image, scaled, np.ones(scaled.shape, dtype=bool))


def _marked(picture: Picture, grid: Grid, patch: int, nearest: int) -> Picture:
    inset = line_width(picture.shape[0] // grid[0])
    picture = outlined(picture, grid, place_of(patch, grid), QUERY)
    picture = outlined(picture, grid, place_of(patch + 1, grid), NEXT)
    return picture if nearest == patch else outlined(picture, grid, place_of(nearest, grid), NEAREST, inset)


def _scale(sheet: Sheet, x: int, y: int, one: SimilarityMap) -> None:
    low, high = f"{one.cosines.min():.2f}", f"{one.cosines.max():.2f}"
    sheet.text(x, y - 2, low, 12)
    sheet.picture(x + 40, y, colour_bar(160))
    sheet.text(x + 208, y - 2, f"{high}  cosine", 12)


def _legend(sheet: Sheet, y: int) -> None:
    marks: tuple[tuple[str, Colour], ...] = (
        ("the patch", QUERY), ("the next patch, which is to be predicted", NEXT), ("the nearest of all", NEAREST),
    )  # fmt: skip
    x = Sheet.MARGIN
    for words, colour in marks:
        box = np.full((13, 13, 3), 255, dtype=np.uint8)
        sheet.picture(x, y, outlined(box, (1, 1), (0, 0), colour))
        x = sheet.text(x + 20, y - 1, words) + 24
