"""Where to cut an image, and how it becomes an array: decode, crop and resize in as little work as quality allows.

JPEGs go through simplejpeg (libjpeg-turbo), everything else, and every JPEG that it does not take, through Pillow.
Where the crop has at least four times the target's side, the JPEG is decoded at a fraction of its size. Crop and resize
are one pass of torch's antialiased bilinear kernel for uint8, which is what torchvision calls: at full decoding the
results are equal bit for bit.
"""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from nepa_scale.counter_random import hash_uniform

MAX_PIXELS = 100_000_000  # larger images are taken for decompression bombs
_ORIENTATION = 0x0112
Image.MAX_IMAGE_PIXELS = None  # checked here, before decoding


class UndecodableImage(Exception):
    """The bytes are not an image that can be used; the message says why."""


@dataclass(frozen=True)
class Box:
    """A crop in pixels of the upright image."""

    left: int
    top: int
    width: int
    height: int


def random_resized_box(
    width: int, height: int, key: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> Box:
    """torchvision's RandomResizedCrop as a pure function of `key`: area share in `scale`, aspect in `ratio`.

    Ten tries, then the largest centred crop whose aspect lies in `ratio`.
    """
    for attempt in range(10):
        area = width * height * (scale[0] + (scale[1] - scale[0]) * hash_uniform("area", key, attempt))
        low, high = math.log(ratio[0]), math.log(ratio[1])
        aspect = math.exp(low + (high - low) * hash_uniform("aspect", key, attempt))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left = int(hash_uniform("left", key, attempt) * (width - w + 1))
            top = int(hash_uniform("top", key, attempt) * (height - h + 1))
            return Box(left, top, w, h)
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = (width, round(width / aspect)) if width / height < aspect else (round(height * aspect), height)
    w, h = max(1, min(w, width)), max(1, min(h, height))
    return Box((width - w) // 2, (height - h) // 2, w, h)


def centre_box(width: int, height: int, size: tuple[int, int], crop_share: float = 224 / 256) -> Box:
    """The crop that evaluation sees: the shorter side resized to size / crop_share, then the centre of `size`.

    size: height and width of the target
    """
    zoom = max(size[0] / height, size[1] / width) / crop_share
    w, h = (max(1, min(round(side / zoom), whole)) for side, whole in ((size[1], width), (size[0], height)))
    return Box((width - w) // 2, (height - h) // 2, w, h)


class EncodedImage:
    """An image's bytes with its upright size known and its pixels not yet decoded.

    Raises:
        UndecodableImage: at construction or on `crop`.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._pillow: Image.Image | None = None
        header = _jpeg_header(data)
        if header is not None:
            self.width, self.height = header
        else:
            self._pillow = _open_upright(data)
            self.width, self.height = self._pillow.size
        if self.width * self.height > MAX_PIXELS:
            raise UndecodableImage(f"{self.width}x{self.height} pixels, more than {MAX_PIXELS} (a decompression bomb?)")

    def crop(self, box: Box, size: tuple[int, int]) -> Tensor:
        """The box resized to `size` (height, width): uint8 [height, width, 3], RGB."""
        pixels = self._decode(box, size)
        # a reduced decode has fewer pixels than the box is counted in
        y, x = pixels.shape[0] / self.height, pixels.shape[1] / self.width
        top, left = round(box.top * y), round(box.left * x)
        bottom, right = (
            max(top + 1, round((box.top + box.height) * y)),
            max(left + 1, round((box.left + box.width) * x)),
        )
        part = torch.from_numpy(pixels)[top:bottom, left:right].permute(2, 0, 1).unsqueeze(0)
        return F.interpolate(part, size, mode="bilinear", antialias=True)[0].permute(1, 2, 0)

    def _decode(self, box: Box, size: tuple[int, int]) -> NDArray[np.uint8]:
        """RGB uint8 [h, w, 3], whole, possibly reduced; valid until the next call in this process."""
        if self._pillow is None:
            # the size of the whole at which the crop has still twice the target's side: whole pixels of the reduced
            # image are then fine enough to cut along
            shrink = min(box.height / size[0], box.width / size[1]) / 2
            lowest = (math.ceil(self.height / shrink), math.ceil(self.width / shrink)) if shrink >= 2 else (0, 0)
            try:
                return simplejpeg.decode_jpeg(
                    self._data,
                    "RGB",
                    min_height=lowest[0],
                    min_width=lowest[1],
                    buffer=_scratch(self.height * self.width * 3),
                )
            except ValueError:  # broken, or something libjpeg warns of and Pillow can still read
                self._pillow = _open_upright(self._data)
        try:
            return np.array(_to_rgb(self._pillow))
        except (OSError, ValueError, SyntaxError) as error:
            raise UndecodableImage(str(error)) from error


_buffer = np.empty(0, dtype=np.uint8)


def _scratch(size: int) -> NDArray[np.uint8]:
    """Memory that is used again for each image: fresh pages would cost a tenth of the decoding."""
    global _buffer
    if _buffer.size < size:
        _buffer = np.empty(size, dtype=np.uint8)
    return _buffer


def _jpeg_header(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG that needs neither rotation nor colour management; None: leave it to Pillow."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        if b"Exif\x00\x00" in data[:65536] and Image.open(io.BytesIO(data)).getexif().get(_ORIENTATION, 1) != 1:
            return None
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except (OSError, ValueError, SyntaxError):
        return None
    return (width, height) if colours in ("YCbCr", "Gray", "RGB") else None


def _open_upright(data: bytes) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            return image  # refused by its size, without decoding it
        if image.getexif().get(_ORIENTATION, 1) != 1:
            image = ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UndecodableImage(str(error) or type(error).__name__) from error
    return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as 8-bit RGB; 16-bit images are scaled, where Pillow would clip them."""
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image).astype(np.float64)
        if values.max(initial=0) > 255:
            values = values / 257.0
        image = Image.fromarray(np.clip(np.rint(values), 0, 255).astype(np.uint8))
    return image.convert("RGBA").convert("RGB") if image.mode == "P" else image.convert("RGB")
