"""From a micro-batch's place to its images: the work of one of the stream's processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nepa_scale.config import ConfigError
from nepa_scale.counter_random import hash_array
from nepa_scale.data.bad_samples import DataError
from nepa_scale.data.batch import Batch
from nepa_scale.data.crops import flipped, random_resized_box
from nepa_scale.data.decode import EncodedImage, UndecodableImage
from nepa_scale.data.order import PADDING, Indices, Place
from nepa_scale.data.rand_augment import RandAugment
from nepa_scale.data.remote import RemoteError
from nepa_scale.data.shard_set import BadSample, RawSample, ShardSet
from nepa_scale.data.shared_slots import Pixels

NO_LABEL = -1  # in a batch
SUBSTITUTES = 100  # tried in place of one bad sample before giving up

Crop = Callable[[EncodedImage, int, Tensor], None]
"""Fills a uint8 tensor [H, W, 3] from an image, as a pure function of the sample's key."""


def random_crop(
    image: EncodedImage,
    key: int,
    out: Tensor,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    augment: RandAugment | None = None,
) -> None:
    """RandomResizedCrop, and what follows it: training's `Crop`."""
    image.resized_crop(random_resized_box(image.width, image.height, key, scale, ratio), out)
    if augment is not None:
        augment(out, key)


def centre_crop(image: EncodedImage, key: int, out: Tensor, *, share: float, squash: bool) -> None:  # noqa: ARG001
    """The middle of the resized image: evaluation's `Crop`."""
    image.resized_centre(out, share, squash=squash)


class Order(Protocol):
    """Where a rank's micro-batches lie: `TrainOrder`, `EvaluationOrder`."""

    batch_size: int

    def place(self, number: int) -> Place: ...

    def substitute(self, epoch: int, position: int, attempt: int) -> int | None: ...


@dataclass(frozen=True)
class Rest:
    """A batch without its images: the fields of `Batch` as arrays, which travel between processes by value."""

    flip: NDArray[np.bool_]
    labels: NDArray[np.int64]
    sample_keys: NDArray[np.int64]
    samples: NDArray[np.int64]
    keys: list[str]
    bad: list[BadSample]

    def batch(self, pixels: Pixels) -> Batch:
        """With its images, uint8 [B, H, W, 3]; all share memory with what they are made from."""
        return Batch(
            images=torch.from_numpy(pixels).permute(0, 3, 1, 2),
            flip=torch.from_numpy(self.flip),
            labels=torch.from_numpy(self.labels),
            sample_keys=torch.from_numpy(self.sample_keys),
            samples=torch.from_numpy(self.samples),
            host_keys=self.sample_keys,
            keys=self.keys,
            bad=self.bad,
        )


@dataclass(frozen=True)
class Failure:
    """In place of a batch, where none can be made."""

    error: ConfigError | DataError
    bad: list[BadSample]


class SampleReader:
    """Micro-batch number -> its images. Picklable, and without any state of the run.

    size: height and width of the images
    interpolation: "bilinear" or "bicubic"
    flip: mirror every other sample
    classes: labels must be below this; None: any will do
    need_labels: a sample without a label is bad
    """

    def __init__(
        self,
        shards: ShardSet,
        order: Order,
        *,
        size: tuple[int, int],
        crop: Crop,
        interpolation: str,
        flip: bool,
        seed: int,
        classes: int | None,
        need_labels: bool,
    ) -> None:
        self.shards, self.order, self.size, self.crop = shards, order, size, crop
        self.interpolation, self.flip = interpolation, flip
        self.seed, self.classes, self.need_labels = seed, classes, need_labels

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Of a batch's pixels: [B, H, W, 3]."""
        return (self.order.batch_size, *self.size, 3)

    def fill(self, number: int, pixels: Pixels) -> Rest | Failure:
        """Fills the images of micro-batch `number` and returns the rest of it."""
        bad: list[BadSample] = []
        try:
            return self._fill(self.order.place(number), torch.from_numpy(pixels), bad)
        except (ConfigError, DataError) as error:
            return Failure(error, bad)
        except RemoteError as error:
            return Failure(DataError(str(error)), bad)

    def _fill(self, place: Place, pixels: Tensor, bad: list[BadSample]) -> Rest:
        samples, keys = place.samples.tolist(), sample_keys(self.seed, place.epoch, place.samples)
        labels, names = [NO_LABEL] * len(samples), [""] * len(samples)
        for row, (key, out) in enumerate(zip(keys.tolist(), pixels.unbind(0), strict=True)):
            position = int(place.positions[row])
            usable = self._usable(place.epoch, position, samples[row], key, out, bad)
            if usable is None:
                samples[row] = PADDING
                out.zero_()
                continue
            samples[row], raw = usable
            names[row], labels[row] = raw.key, NO_LABEL if raw.label is None else raw.label
        used = np.array(samples, dtype=np.int64)
        keys = np.where(used == PADDING, 0, sample_keys(self.seed, place.epoch, used))
        flip = flipped(keys) & (used != PADDING) & self.flip
        return Rest(flip, np.array(labels, dtype=np.int64), keys, used, names, bad)

    def _usable(
        self, epoch: int, position: int, first: int, key: int, out: Tensor, bad: list[BadSample]
    ) -> tuple[int, RawSample] | None:
        """Fills `out` from the sample of that key or from its first usable substitute: its number and content.

        None where the order has no substitute.
        """
        sample: int | None = None if first == PADDING else first
        attempt = 0
        while sample is not None:
            try:
                return sample, self._prepare(sample, key, out)
            except BadSample as error:
                bad.append(error)
            attempt += 1
            if attempt > SUBSTITUTES:
                raise DataError(f"no usable sample was found in {attempt} tries; the last was {bad[-1]}")
            sample = self.order.substitute(epoch, position, attempt)
            if sample is not None:
                key = int(sample_keys(self.seed, epoch, np.array([sample]))[0])
        return None

    def _prepare(self, sample: int, key: int, out: Tensor) -> RawSample:
        raw = self.shards.read(sample)
        if raw.label is None:
            if self.need_labels:
                raise BadSample(raw.shard, raw.key, "no label")
        elif self.classes is not None and not 0 <= raw.label < self.classes:
            raise BadSample(raw.shard, raw.key, f"label {raw.label} is not one of {self.classes} classes")
        try:
            self.crop(EncodedImage(raw.image, self.interpolation), key, out)
        except UndecodableImage as error:
            raise BadSample(raw.shard, raw.key, str(error)) from error
        return raw


def sample_keys(seed: int, epoch: int, samples: Indices) -> NDArray[np.int64]:
    """The hashes, int64 [N], from which everything random about these samples in an epoch is drawn."""
    return hash_array(samples, "sample", seed, epoch)
