"""The demo's data: crops of photographs that ship inside well-kept packages, under free licences.

A crop's label is the photograph it was cut from. Training crops come from the left part of each photograph, validation
crops from the right part, with a gap between them, so that no validation pixel was ever trained on. A crop varies in
place, scale and mirroring only; its colours are the photograph's.

The sources and terms, as the packages state them (scikit-image's docstrings):

| photograph | package | source | terms |
|---|---|---|---|
| astronaut | scikit-image | NASA: Eileen Collins | public domain |
| brick, gravel (grey) | scikit-image | CC0Textures: Bricks25, Gravel04 | CC0 |
| chelsea | scikit-image | Stefan van der Walt | CC0 |
| coffee | scikit-image | Rachel Michetti, Pikolo Espresso Bar | CC0 |
| grass (grey) | scikit-image | linolafett | CC0 |
| hubble_deep_field | scikit-image | NASA | public domain |
| ihc (stained tissue under a microscope) | scikit-image | Center for Microscopy and Molecular Imaging | no known restrictions |
| retina | scikit-image | Mikael Häggström | CC0 |
| rocket | scikit-image | SpaceX | public domain |
| grace_hopper | matplotlib | US Navy portrait, a work of the US government | public domain |
"""  # noqa: E501

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from nepa_scale.config import ConfigError
from nepa_scale.data.description import FILE_NAME, Description
from nepa_scale.data.parallel import in_parallel

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
    """`count` square crops of random place and scale from the part of the split (train | val), half of them mirrored.

    Each is RGB, SIDE x SIDE; equal arguments give equal crops.
    """
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
    """Writes `output`/{train,val}/<photograph>/*.jpg, `train` and `val` crops of each photograph, with progress.

    Raises:
        ConfigError: as `load_photographs`.
    """
    jobs = [
        _Job(photograph, split, count, seed + number, output / split / name)
        for number, (name, photograph) in enumerate(load_photographs().items())
        for split, count in (("train", train), ("val", val))
    ]
    in_parallel(_write, jobs, 1, "cutting crops", size=lambda job: job.wanted)


def shards_are_there(folder: Path) -> bool:
    """Whether `folder` holds a described set of shards, each of its full length.

    Raises:
        ConfigError: there is a description, but it cannot be understood.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        return False
    shards = Description.from_json(path.read_bytes(), str(path)).shards
    return all((file := folder / s.name).is_file() and file.stat().st_size == s.bytes for s in shards)


class _Job(NamedTuple):
    """The crops of one photograph for one split."""

    photograph: Image.Image
    split: str
    wanted: int
    seed: int
    folder: Path


def _write(job: _Job) -> None:
    job.folder.mkdir(parents=True)
    for number, crop in enumerate(crops(job.photograph, job.split, job.wanted, job.seed)):
        crop.save(job.folder / f"{number:05d}.jpg", quality=90)
