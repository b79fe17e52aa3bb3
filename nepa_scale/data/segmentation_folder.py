"""A folder of images with a class for every pixel, laid out as ADE20K is (ADEChallengeData2016).

`images/SPLIT/NAME.jpg` and `annotations/SPLIT/NAME.png`, SPLIT being training or validation. An annotation is an 8-bit
PNG with one channel, grey or palette, that holds class numbers; 255 marks pixels that do not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from nepa_scale.config import ConfigError
from nepa_scale.counter_random import hash_array, hash_uniform
from nepa_scale.data.crops import Box
from nepa_scale.data.decode import EncodedImage, UndecodableImage

IGNORED = 255
_IMAGES = {".jpg", ".jpeg", ".png"}


@dataclass(frozen=True)
class Split:
    """The pairs of image and annotation of one split, by name.

    zero_is_ignored: class numbers are 1, 2, ... and 0 does not count (ADE20K); else they are 0, 1, ...
    """

    pairs: tuple[tuple[Path, Path], ...]
    zero_is_ignored: bool

    @classmethod
    def open(cls, folder: Path, name: str, zero_is_ignored: bool) -> Split:
        """Lists `folder`'s split `name`; nothing of the files is read yet.

        Raises:
            ConfigError: a folder or all images are missing, or an image has no annotation.
        """
        images, annotations = folder / "images" / name, folder / "annotations" / name
        for place in (images, annotations):
            if not place.is_dir():
                raise ConfigError(f"{place} is not there: {folder} needs images/{name} and annotations/{name}")
        labels = {path.stem: path for path in annotations.iterdir() if path.suffix.lower() == ".png"}
        found = sorted(path for path in images.iterdir() if path.suffix.lower() in _IMAGES)
        if not found:
            raise ConfigError(f"{images} holds no images (.jpg, .jpeg, .png)")
        missing = [path for path in found if path.stem not in labels]
        if missing:
            raise ConfigError(f"{missing[0]} has no annotation: {annotations / missing[0].stem}.png is not there")
        return cls(tuple((path, labels[path.stem]) for path in found), zero_is_ignored)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[EncodedImage, Tensor]:
        """An image, and its labels from 0: uint8 [H, W], `IGNORED` where they do not count.

        Raises:
            ConfigError: a file that cannot be used, or two sizes.
        """
        image_path, label_path = self.pairs[index]
        try:
            image = EncodedImage(image_path.read_bytes())
        except (OSError, UndecodableImage) as error:
            raise ConfigError(f"{image_path} cannot be read: {error}") from error
        label = _read_classes(label_path)
        if label.shape != (image.height, image.width):
            sizes = f"{label.shape[1]}x{label.shape[0]} pixels and its image {image.width}x{image.height}"
            raise ConfigError(f"{label_path} has {sizes}: they must be the same")
        if self.zero_is_ignored:
            label = np.where(label == IGNORED, IGNORED, label - np.uint8(1))  # 0 wraps around to 255
        return image, torch.from_numpy(label)


def _read_classes(path: Path) -> NDArray[np.uint8]:
    try:
        with Image.open(path) as image:
            stored = image.tile[0].args if image.tile else ""  # Pillow stretches grey of 4 bits to 0..255 in silence
            if image.format != "PNG" or image.mode not in ("L", "P") or stored in ("L;2", "L;4"):
                raise ConfigError(f"{path} is not an 8-bit PNG with one channel of class numbers ({image.mode})")
            return np.array(image, dtype=np.uint8)
    except ConfigError:
        raise
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise ConfigError(f"{path} cannot be read: {error}") from error


@dataclass(frozen=True)
class Survey(Dataset[tuple[int, str]]):
    """Reads every pair in full: (its highest class or -1, what is wrong with it or "").

    patch: pixels that an image must have on each side
    """

    split: Split
    patch: int

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[int, str]:
        path = self.split.pairs[index][0]
        try:
            image, label = self.split[index]
            if min(image.width, image.height) < self.patch:
                return -1, f"{path} has {image.width}x{image.height} pixels, less than a patch ({self.patch})"
            image.resized((8, 8))
        except ConfigError as error:
            return -1, str(error)
        except UndecodableImage as error:
            return -1, f"{path} cannot be read: {error}"
        counted = label[label != IGNORED]
        return int(counted.max()) if len(counted) else -1, ""


@dataclass(frozen=True)
class RandomCrops(Dataset[tuple[Tensor, Tensor]]):
    """Endless crops for training, each a pure function of (seed, its number); every epoch has an order of its own.

    A crop is a square whose side is 1/2 to 1 of the image's shorter side, anywhere in it, resized to `side` pixels and
    mirrored half of the time: uint8 [3, side, side] and labels uint8 [side, side].
    """

    split: Split
    side: int
    seed: int = 0

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        epoch, place = divmod(number, len(self.split))
        image, label = self.split[int(_order(len(self.split), self.seed, epoch)[place])]
        share, across, down, mirrored = (
            hash_uniform("segmentation crop", purpose, self.seed, number) for purpose in ("side", "left", "top", "flip")
        )
        size = max(1, round(min(image.width, image.height) * (1 - share / 2)))
        box = Box(int(across * (image.width - size + 1)), int(down * (image.height - size + 1)), size, size)
        pixels = torch.empty(self.side, self.side, 3, dtype=torch.uint8)
        image.resized_crop(box, pixels)
        nearest = ((torch.arange(self.side) + 0.5) * size / self.side).long()
        cut = label[(box.top + nearest)[:, None], box.left + nearest]
        if mirrored < 0.5:
            pixels, cut = pixels.flip(1), cut.flip(1)
        return pixels.permute(2, 0, 1), cut


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    return np.argsort(hash_array(np.arange(count), "segmentation order", seed, epoch))


@dataclass(frozen=True)
class WholeImages(Dataset[tuple[Tensor, Tensor]]):
    """Whole images, the shorter side resized to `side` pixels and the longer to the nearest number that patches divide.

    uint8 [3, h, w], and the labels at the size they are stored in, uint8 [H, W].
    """

    split: Split
    side: int
    patch: int

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.split[index]
        shorter = min(image.width, image.height)
        height, width = (
            max(self.side, round(self.side * pixels / shorter / self.patch) * self.patch)
            for pixels in (image.height, image.width)
        )
        return image.resized((height, width)).permute(2, 0, 1), label
