"""Encoded images to crops of one size: decoded, cut and resized in as little work as the quality allows.

JPEGs go through simplejpeg, at a fraction of their size where that does not show, and no further than the crop reaches;
everything else, and every JPEG that simplejpeg does not take, goes through Pillow. Resizing is torch's antialiased
kernels for uint8, bilinear and bicubic, which are what torchvision calls: where a JPEG is decoded in full, the results
are equal to torchvision's bit for bit.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from nepa_scale.data import jpeg
from nepa_scale.data.crops import CROP_SHARE, Box, centre, middle
from nepa_scale.data.shared_slots import Pixels

MAX_PIXELS = 89_478_485  # larger images are taken for decompression bombs; Pillow warns from here on
A = TypeVar("A")
R = TypeVar("R")
_RESIZERS = {  # what F.interpolate calls; that cannot write in place
    "bilinear": torch.ops.aten._upsample_bilinear2d_aa.out,
    "bicubic": torch.ops.aten._upsample_bicubic2d_aa.out,
}


class UndecodableImage(Exception):
    """The bytes are not an image that can be used; the message says why."""


class EncodedImage:
    """An image's bytes with its upright size known and its pixels not yet decoded.

    interpolation: "bilinear" or "bicubic"
    Raises:
        UndecodableImage: at construction, or by the methods.
    """

    def __init__(self, data: bytes, interpolation: str = "bilinear") -> None:
        self._data, self._interpolation = data, interpolation
        self._jpeg = jpeg.read_header(data)
        self._pillow: Image.Image | None = None
        if self._jpeg is not None:
            self.width, self.height = self._jpeg.width, self._jpeg.height
            if self._jpeg.orientation > 4:
                self.width, self.height = self.height, self.width
        else:
            self._pillow = _open(data)
            self.width, self.height = self._pillow.size
        if self.width * self.height > MAX_PIXELS:
            raise UndecodableImage(f"{self.width}x{self.height} pixels, more than {MAX_PIXELS} (a decompression bomb?)")

    def resized_crop(self, box: Box, out: Tensor) -> None:
        """Fills `out`, uint8 [H, W, 3], with the box in RGB, resized to it."""
        resize(self.cut(box, (out.shape[0], out.shape[1])), out, self._interpolation)

    def resized(self, size: tuple[int, int]) -> Tensor:
        """The whole image in RGB at `size` (height, width): uint8 [height, width, 3]."""
        out = torch.empty((*size, 3), dtype=torch.uint8)
        self.resized_crop(Box(0, 0, self.width, self.height), out)
        return out

    def resized_centre(self, out: Tensor, crop_share: float = CROP_SHARE, *, squash: bool = False) -> None:
        """Fills `out`, uint8 [H, W, 3], with the middle of the resized image in RGB, as `crops.centre` describes it."""
        box = Box(0, 0, self.width, self.height) if squash else middle(self.width, self.height)
        place = centre(box.width, box.height, (out.shape[0], out.shape[1]), crop_share, squash=squash)
        whole = torch.empty((place.height, place.width, 3), dtype=torch.uint8)
        resize(self.cut(box, (place.height, place.width)), whole, self._interpolation)
        out.copy_(whole[place.top : place.top + out.shape[0], place.left : place.left + out.shape[1]])

    def cut(self, box: Box, size: tuple[int, int]) -> Pixels:
        """The pixels of the box in RGB, uint8 [h, w, 3], reduced where `size` (height, width) is much smaller.

        They are valid until the next call in this process.
        """
        factor = jpeg.reduction(min(box.height / size[0], box.width / size[1]))
        pixels, factor = self._decode(factor, box.top + box.height)
        top = min(round(box.top / factor), pixels.shape[0] - 1)
        left = min(round(box.left / factor), pixels.shape[1] - 1)
        bottom, right = round((box.top + box.height) / factor), round((box.left + box.width) / factor)
        return pixels[top : max(top + 1, bottom), left : max(left + 1, right)]

    def _decode(self, factor: int, rows: int) -> tuple[Pixels, int]:
        """The upright image in RGB, reduced by at most `factor`, and the reduction; rows from `rows` on may be missing.

        The pixels are valid until the next call in this process.
        """
        if self._jpeg is not None:
            try:
                pixels = jpeg.decode(self._data, self._jpeg, factor, rows)
                return _UPRIGHT[self._jpeg.orientation](pixels), factor
            except ValueError:  # broken, or something that libjpeg warns of and Pillow can still read
                self._pillow = _open(self._data)
        assert self._pillow is not None
        return _guarded(lambda image: np.array(_to_rgb(image)), self._pillow), 1


def resize(pixels: Pixels, out: Tensor, interpolation: str = "bilinear") -> None:
    """Fills `out`, uint8 [H, W, 3], with `pixels`, uint8 [h, w, 3]: "bilinear" or "bicubic", antialiased."""
    source = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).unsqueeze(0)
    into = out.permute(2, 0, 1).unsqueeze(0)
    _RESIZERS[interpolation](source, list(out.shape[:2]), False, None, None, out=into)


# what an EXIF orientation asks for, as views of [h, w, 3]
_UPRIGHT: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


def _open(data: bytes) -> Image.Image:
    """Upright, and decoded only where it has to be turned."""
    image = _guarded(Image.open, io.BytesIO(data))
    if image.width * image.height > MAX_PIXELS:
        return image  # refused by its size, without decoding it
    return _guarded(lambda it: ImageOps.exif_transpose(it) if it.getexif().get(jpeg.ORIENTATION, 1) != 1 else it, image)


def _guarded(work: Callable[[A], R], argument: A) -> R:
    """`work(argument)`; damaged files make Pillow raise almost anything."""
    try:
        return work(argument)
    except MemoryError:
        raise
    except Exception as error:
        raise UndecodableImage(f"{error or type(error).__name__}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """Any mode as 8-bit RGB; 16-bit images are scaled, where Pillow would clip them. Transparency is dropped."""
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_bytes(np.asarray(image).astype(np.float64), image.mode.startswith("I;16")))
    return image.convert("RGBA").convert("RGB") if image.mode == "P" else image.convert("RGB")


def _to_bytes(values: NDArray[np.float64], sixteen_bits: bool) -> Pixels:
    if sixteen_bits or values.max(initial=0) > 255:
        values = values / 257.0
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)
