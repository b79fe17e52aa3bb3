"""Makes images smaller before they go into shards."""

from __future__ import annotations

import io

from PIL import Image

from nepa_scale.data.decode import EncodedImage

QUALITY = 90


def reencode(data: bytes, shorter_side: int | None, quality: int | None) -> bytes:
    """The image as an upright RGB JPEG whose shorter side is at most `shorter_side` pixels.

    An image that is small enough already keeps its bytes, unless `quality` (1 to 100) asks for another encoding.

    Raises:
        UndecodableImage: it cannot be decoded.
    """
    image = EncodedImage(data)
    shrink = max(1.0, min(image.width, image.height) / shorter_side) if shorter_side else 1.0
    if shrink == 1.0 and (quality is None or shorter_side is not None):
        return data
    size = (max(1, round(image.height / shrink)), max(1, round(image.width / shrink)))
    pixels = image.resized(size)
    buffer = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(buffer, "JPEG", quality=quality or QUALITY)
    return buffer.getvalue()
