"""JPEGs through simplejpeg (libjpeg-turbo), decoding no more of them than a crop needs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image

from nepa_scale.data.shared_slots import Pixels

ORIENTATION = 0x0112  # EXIF
SHARPNESS = 1.5  # pixels of a reduced image for each of the target's: below this, reducing would show
_BASELINE = (0xC0, 0xC1)
_FRAMES = (*_BASELINE, 0xC2)  # and progressive; the others are lossless, hierarchical or arithmetic
_SCAN, _APP1 = 0xDA, 0xE1
_END = b"\xff\xd9"


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """What the markers before the first scan say.

    height, width: as stored, before the rotation that `orientation` (1 to 8, EXIF) asks for
    row_height: rows that are coded together, where decoding can end early; else 0
    height_at: where in the file the height stands
    """

    height: int
    width: int
    orientation: int
    row_height: int
    height_at: int


def read_header(data: bytes) -> JpegHeader | None:
    """None for what is not a JPEG of 8-bit grey or colour: Pillow knows the rest."""
    if data[:2] != b"\xff\xd8":
        return None
    try:
        return _read_markers(data)
    except IndexError:  # cut short
        return None


def _read_markers(data: bytes) -> JpegHeader | None:
    at, orientation, frame = 2, 1, 0
    while data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
            continue
        length = data[at + 2] << 8 | data[at + 3]
        if marker == _APP1 and data[at + 4 : at + 10] == b"Exif\0\0":
            orientation = _orientation(data[at + 4 : at + 2 + length])
        elif marker in _FRAMES:
            frame = at
        elif marker == _SCAN:
            return _describe(data, frame, orientation, data[at + 4]) if frame else None
        at += 2 + length
    return None


def _describe(data: bytes, frame: int, orientation: int, in_scan: int) -> JpegHeader | None:
    components = data[frame + 9]
    height, width = (data[at] << 8 | data[at + 1] for at in (frame + 5, frame + 7))
    if data[frame + 4] != 8 or not height or not width or components not in (1, 3):
        return None
    whole = data[frame + 1] in _BASELINE and in_scan == components and data.endswith(_END) and orientation == 1
    factor = max(data[frame + 11 + 3 * number] & 15 for number in range(components))
    return JpegHeader(height, width, orientation, 8 * factor if whole else 0, frame + 5)


def _orientation(segment: bytes) -> int:
    exif = Image.Exif()
    try:
        exif.load(segment)
        value = exif.get(ORIENTATION, 1)
    except Exception:  # whatever a damaged segment makes Pillow raise: the image itself is not affected
        return 1
    return value if value in range(1, 9) else 1


def reduction(zoom: float) -> int:
    """By how much a decoder may reduce an image that is to shrink by `zoom`: 8, 4, 2, or 1 (not at all)."""
    return next((factor for factor in (8, 4, 2) if zoom >= SHARPNESS * factor), 1)


def decode(data: bytes, header: JpegHeader, factor: int, rows: int) -> Pixels:
    """The image reduced by `factor`, uint8 [height, width, 3], as stored.

    Only its first `rows` rows (counted before reducing) are needed, and the others need not be there.
    The memory is used again by the next call in this process.
    Raises:
        ValueError: it is damaged.
    """
    source: bytes | bytearray = data
    height, strict = header.height, True
    if header.row_height:
        # one row of blocks more than asked for, because upsampling looks at the rows beside
        needed = (math.ceil(rows / header.row_height) + 1) * header.row_height
        if needed < height:
            source, height, strict = _shortened(data, header, needed), needed, False
    smallest = (math.ceil(height / factor), math.ceil(header.width / factor))
    return simplejpeg.decode_jpeg(
        source,
        "RGB",
        min_height=smallest[0],
        min_width=smallest[1],
        buffer=_scratch(smallest[0] * smallest[1] * 3),
        strict=strict,  # a shortened image has data left over, of which the decoder would complain
    )


def _shortened(data: bytes, header: JpegHeader, height: int) -> bytearray:
    """The file with another height in its header: the decoder then stops there, having decoded the same pixels."""
    changed = bytearray(data)
    changed[header.height_at : header.height_at + 2] = height.to_bytes(2, "big")
    return changed


_KEPT = 1 << 26  # bytes
_buffer = np.empty(0, dtype=np.uint8)


def _scratch(size: int) -> Pixels:
    """Memory that is used again for each image but huge ones: fresh pages would cost a tenth of the decoding."""
    global _buffer
    if size > _KEPT:
        return np.empty(size, dtype=np.uint8)
    if _buffer.size < size:
        _buffer = np.empty(size, dtype=np.uint8)
    return _buffer
