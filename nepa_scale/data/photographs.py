"""The demo's data: crops of photographs that ship inside well-kept packages, under free licences.

A crop's label is the photograph it was cut from. Training and validation crops come from disjoint parts of each
photograph, with a gap between them, so that no validation pixel was ever trained on.

| photograph | package | licence |
|---|---|---|
| astronaut (E. Collins, NASA), hubble_deep_field (NASA/ESA) | scikit-image | public domain |
| chelsea (S. van der Walt), coffee (R. Michel), rocket (SpaceX), ihc and retina (microscopy, ophthalmoscopy) | scikit-image | CC0 |
| brick, grass, gravel (grey, from ambientCG and others) | scikit-image | CC0 |
| grace_hopper (US Navy) | matplotlib | public domain |
"""  # noqa: E501

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from nepa_scale.config import ConfigError

# package, file inside it
PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "brick": ("skimage", "data/brick.png"),
    "chelsea": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "grace_hopper": ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    "grass": ("skimage", "data/grass.png"),
    "gravel": ("skimage", "data/gravel.png"),
    "hubble_deep_field": ("skimage", "data/hubble_deep_field.jpg"),
    "ihc": ("skimage", "data/ihc.png"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
}
SIDE = 64  # of the crops, pixels
TRAIN_SHARE, GAP = 0.6, 0.04  # of a photograph's width: left for training, then a gap, the rest for validation
LARGEST_CROP = 0.35  # of the shorter side, or of the validation part where that is narrower


def load_photographs() -> dict[str, Image.Image]:
    """All photographs, RGB.

    Raises:
        ConfigError: a package is not installed, or ships the file no more.
    """
    found = {}
    for name, (package, file) in PHOTOGRAPHS.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ConfigError(f"the demo's photographs are part of {package}: pip install 'nepa_scale[demo]'")
        path = Path(spec.origin).parent / file
        if not path.is_file():
            raise ConfigError(f"{path} is missing: pip install --force-reinstall 'nepa_scale[demo]'")
        found[name] = Image.open(path).convert("RGB")
    return found


def crops(photograph: Image.Image, split: str, count: int, seed: int) -> Iterator[Image.Image]:
    """`count` square crops of random place and scale, mirrored at random, from the split's part; SIDE x SIDE."""
    width, height = photograph.size
    left, right = (0.0, TRAIN_SHARE) if split == "train" else (TRAIN_SHARE + GAP, 1.0)
    start, stop = round(left * width), round(right * width)
    largest = min(LARGEST_CROP * min(width, height), stop - start, height)
    random = np.random.default_rng([seed, split == "train"])
    for _ in range(count):
        side = round(random.uniform(min(SIDE, largest) * 0.75, largest))
        x = start + int(random.integers(0, max(stop - start - side, 0) + 1))
        y = int(random.integers(0, max(height - side, 0) + 1))
        part = photograph.crop((x, y, x + side, y + side)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        yield part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else part


def write_class_folders(output: Path, train: int, val: int, seed: int = 0) -> None:
    """`output`/{train,val}/<photograph>/*.jpg: `train` and `val` crops of each photograph."""
    for number, (name, photograph) in enumerate(load_photographs().items()):
        for split, count in (("train", train), ("val", val)):
            folder = output / split / name
            folder.mkdir(parents=True)
            for i, crop in enumerate(crops(photograph, split, count, seed + number)):
                crop.save(folder / f"{i:05d}.jpg", quality=90)
