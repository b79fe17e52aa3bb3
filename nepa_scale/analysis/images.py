"""The images to look at: single files, folders of files, or shards, at a size that patches divide."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nepa_scale.config import ConfigError
from nepa_scale.data.decode import EncodedImage, UndecodableImage
from nepa_scale.data.description import FILE_NAME
from nepa_scale.data.ingest import images_under, list_shards
from nepa_scale.data.listing import Item, safe_key
from nepa_scale.data.tar_index import IMAGE_EXTENSIONS


@dataclass(frozen=True)
class Framing:
    """How an image is brought to the model.

    size: height and width in pixels
    patch: pixels of a patch's side
    whole: keep the whole image: its shorter side becomes that of `size`, the longer the nearest number that patches
        divide. Otherwise the image is resized to cover `size`, and the middle is taken.

    Raises:
        ConfigError: patches do not divide the size.
    """

    size: tuple[int, int]
    patch: int
    whole: bool = False

    def __post_init__(self) -> None:
        if any(side % self.patch for side in self.size):
            near = "x".join(str(max(round(side / self.patch), 1) * self.patch) for side in self.size)
            raise ConfigError(
                f"--image-size {self.size[0]}x{self.size[1]} does not divide into patches of {self.patch}: try {near}"
            )

    def apply(self, image: EncodedImage) -> Tensor:
        """RGB, uint8 [3, h, w]."""
        if self.whole:
            side, shorter = min(self.size), min(image.width, image.height)
            height, width = (
                max(side, round(side * pixels / shorter / self.patch) * self.patch)
                for pixels in (image.height, image.width)
            )
            return image.resized((height, width)).permute(2, 0, 1)
        pixels = torch.empty((*self.size, 3), dtype=torch.uint8)
        image.resized_centre(pixels, crop_share=1.0)
        return pixels.permute(2, 0, 1)


@dataclass(frozen=True)
class ImageSet:
    """Named images in a fixed order; `source` is where they were found."""

    name: str
    source: str
    items: Sequence[Item]

    @classmethod
    def open(cls, words: str) -> ImageSet:
        """Lists the images of `PATH` or `NAME=PATH`: an image file, a folder with images anywhere in it, or shards as
        `ShardSet.open` finds them.

        Raises:
            ConfigError: nothing is there, no image is in it, or a shard is damaged.
        """
        name, separator, source = words.partition("=")
        if not separator or Path(words).exists():
            name = source = words
        items = _list(source)
        if not items:
            kinds = ", ".join(sorted(IMAGE_EXTENSIONS))
            raise ConfigError(f"{source} holds no images: give an image, or a folder or shards with some ({kinds})")
        return cls(name, source, items)

    def spread(self, count: int | None) -> ImageSet:
        """At most `count` of the images, evenly spread; None: all."""
        if count is None or count >= len(self.items):
            return self
        return ImageSet(self.name, self.source, [self.items[n * len(self.items) // count] for n in range(count)])


def load_pixels(item: Item, framing: Framing) -> Tensor:
    """The image as `framing` has it, uint8 [3, h, w].

    Raises:
        ConfigError: it cannot be read, or a side is smaller than a patch.
    """
    where = item.file if item.offset == 0 else f"{item.key} in {item.file}"
    try:
        image = EncodedImage(item.read())
        if min(image.width, image.height) < framing.patch:
            raise ConfigError(f"{where} has {image.width}x{image.height} pixels, less than a patch ({framing.patch})")
        return framing.apply(image)
    except (OSError, UndecodableImage) as error:
        raise ConfigError(f"{where} cannot be read: {error}") from error


def _list(source: str) -> Sequence[Item]:
    path = Path(source).expanduser()
    if path.is_file() and path.suffix[1:].lower() in IMAGE_EXTENSIONS:
        return [Item(safe_key(path.stem), str(path), 0, path.stat().st_size, None)]
    if path.is_dir() and not (path / FILE_NAME).is_file() and not any(path.glob("*.tar")):
        return list(images_under(path, path, None))
    if path.is_file() and path.suffix not in (".tar", ".txt"):
        raise ConfigError(f"{source} is no image ({', '.join(sorted(IMAGE_EXTENSIONS))}) and no shard (.tar)")
    if not path.exists() and not any(mark in source for mark in ("::", "{", "*", "?", "://")):
        raise ConfigError(f"{source} does not exist")
    listing = list_shards(source)
    if listing.left_out:
        key, why = listing.left_out[0]
        raise ConfigError(f"{source} cannot be read in full: {key}: {why}")
    return listing.items
