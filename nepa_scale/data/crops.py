"""Where an image is cut: pure functions of its size and, in training, of the sample's key."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from nepa_scale.counter_random import hash_array, hash_words

CROP_SHARE = 224 / 256  # of the resized shorter side, in evaluation


class Box(NamedTuple):
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
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for attempt in range(10):
        first, second = _two_uniforms("crop size", key, attempt)
        area = width * height * (scale[0] + (scale[1] - scale[0]) * first)
        aspect = math.exp(low + (high - low) * second)
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            first, second = _two_uniforms("crop place", key, attempt)
            return Box(int(first * (width - w + 1)), int(second * (height - h + 1)), w, h)
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = (width, round(width / aspect)) if width / height < aspect else (round(height * aspect), height)
    w, h = max(1, min(w, width)), max(1, min(h, height))
    return Box((width - w) // 2, (height - h) // 2, w, h)


def _two_uniforms(*words: int | str) -> tuple[float, float]:
    """Two numbers in [0, 1) of 32 bits each: a pixel's place needs no more, and hashing costs time."""
    high, low = divmod(hash_words(*words), 1 << 32)
    return high * 2.0**-32, low * 2.0**-32


def flipped(keys: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether the samples of these keys, int64 [N], are mirrored: every other one, bool [N]."""
    return hash_array(keys, "flip") >= 0


def middle(width: int, height: int, aspect: int = 8) -> Box:
    """The image, or of a strip the middle: a strip's shorter side, resized, would make the other absurdly long."""
    w, h = min(width, aspect * height), min(height, aspect * width)
    return Box((width - w) // 2, (height - h) // 2, w, h)


class Centre(NamedTuple):
    """The whole image resized to `height` x `width`, of which a crop begins at `top`, `left`."""

    height: int
    width: int
    top: int
    left: int


def centre(
    width: int, height: int, size: tuple[int, int], crop_share: float = CROP_SHARE, *, squash: bool = False
) -> Centre:
    """The evaluation crop of torchvision and timm: Resize(int(size / crop_share)), then CenterCrop(size).

    size: height and width of the crop. Where it is not square, the image is resized, as timm does, to the smallest size
        that suffices on both sides
    squash: resize to that size without keeping the aspect (timm's crop_mode "squash")
    """
    least = int(size[0] / crop_share), int(size[1] / crop_share)
    if squash:
        resized = least
    elif least[0] == least[1]:
        shorter = min(width, height)
        resized = int(least[0] * height / shorter), int(least[0] * width / shorter)
    else:
        ratio = min(height / least[0], width / least[1])
        resized = round(height / ratio), round(width / ratio)
    return Centre(*resized, round((resized[0] - size[0]) / 2), round((resized[1] - size[1]) / 2))
