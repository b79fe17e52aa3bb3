"""Maps over patches laid on their image, and sheets of such pictures, pixel by pixel.

Shapes: R rows and C columns of patches; a picture is uint8 [height, width, 3].
"""

from __future__ import annotations

import functools
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from nepa_scale.analysis.queries import Grid, Place

Picture = NDArray[np.uint8]
Map = NDArray[np.float32]  # [R, C]
Colour = tuple[int, int, int]

INK: Colour = (36, 41, 47)
QUERY: Colour = (0, 200, 255)
NEXT: Colour = (255, 60, 200)
NEAREST: Colour = (0, 225, 110)
_COLOURS = "inferno"
_HEAT = 0.65  # of a visible patch's colour, the rest being the grey image
_FADED = 0.75  # of an invisible patch's colour, white


def patch_pixels(grid: Grid, longest: int) -> int:
    """The side of a patch, in pixels of the picture, for which an image of `grid` is at most about `longest` wide."""
    return max(2, longest // max(grid))


def enlarged(pixels: Tensor, grid: Grid, side: int) -> Picture:
    """The image, uint8 [3, h, w], with patches of `side` pixels."""
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    return np.array(image.resize((grid[1] * side, grid[0] * side), Image.Resampling.BICUBIC))


def heated(image: Picture, values: Map, visible: NDArray[np.bool_]) -> Picture:
    """The image in grey under the colours of `values`, 0 to 1; patches that are not `visible` [R, C] fade to white."""
    side = image.shape[0] // values.shape[0]
    grey = np.repeat(image.mean(-1, keepdims=True), 3, axis=-1)

    def to_pixels(patches: NDArray[np.float32]) -> NDArray[np.float32]:
        return patches.repeat(side, axis=0).repeat(side, axis=1)

    colours = to_pixels(255.0 * colormaps[_COLOURS](values)[..., :3].astype(np.float32))
    shown = np.where(
        to_pixels(visible[..., None].astype(np.float32)) > 0,
        _HEAT * colours + (1 - _HEAT) * grey,
        _FADED * 255 + (1 - _FADED) * grey,
    )
    return shown.round().clip(0, 255).astype(np.uint8)


def outlined(image: Picture, grid: Grid, place: Place, colour: Colour, inset: int = 0) -> Picture:
    """A copy with the border of one patch drawn; `inset` pixels further in, so that several can be seen."""
    side = image.shape[0] // grid[0]
    canvas = Image.fromarray(image)
    top, left = place[0] * side + inset, place[1] * side + inset
    bottom, right = (place[0] + 1) * side - 1 - inset, (place[1] + 1) * side - 1 - inset
    ImageDraw.Draw(canvas).rectangle((left, top, right, bottom), outline=colour, width=line_width(side))
    return np.array(canvas)


def line_width(side: int) -> int:
    """Of a patch's outline, in pixels: to be seen on small patches, and not to hide large ones."""
    return max(1, side // 5 if side < 20 else side // 10)


def colour_bar(width: int, height: int = 12) -> Picture:
    """The colours from 0, at the left, to 1."""
    colours = 255 * colormaps[_COLOURS](np.linspace(0, 1, width))[:, :3]
    return np.broadcast_to(colours.round().astype(np.uint8), (height, width, 3)).copy()


class Sheet:
    """A white page that grows with what is put on it."""

    MARGIN = 16

    def __init__(self) -> None:
        self._pictures: list[tuple[int, int, Picture]] = []
        self._words: list[tuple[int, int, str, int]] = []

    def picture(self, x: int, y: int, picture: Picture) -> None:
        """Puts the picture's upper left corner there."""
        self._pictures.append((x, y, picture))

    def text(self, x: int, y: int, words: str, size: int = 13) -> int:
        """Writes one line whose upper left corner is there; `size` is in pixels. Returns where it ends."""
        self._words.append((x, y, words, size))
        return x + round(_font(size).getlength(words))

    def save(self, path: Path) -> None:
        """Writes the page as a PNG. Raises OSError."""
        right = [x + picture.shape[1] for x, _, picture in self._pictures]
        right += [x + round(_font(size).getlength(words)) for x, _, words, size in self._words]
        below = [y + picture.shape[0] for _, y, picture in self._pictures]
        below += [y + size for _, y, _, size in self._words]
        page = Image.new("RGB", (max(right) + self.MARGIN, max(below) + self.MARGIN), "white")
        for x, y, picture in self._pictures:
            page.paste(Image.fromarray(picture), (x, y))
        draw = ImageDraw.Draw(page)
        for x, y, words, size in self._words:
            draw.text((x, y), words, fill=INK, font=_font(size))
        page.save(path)


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)
