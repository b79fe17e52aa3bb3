"""The stream: what each rank reads at each step, as arithmetic, and the processes that read it.

Step s lies in epoch s // steps_per_epoch. The epoch's order (`EpochOrder`) is cut into global batches; rank r of W
takes the r-th contiguous part of each and cuts it into micro-batches. Global batches hence do not depend on the ranks, the
workers or the micro-batch, and the stream's whole state is the step.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nepa_scale.config import DataConfig
from nepa_scale.counter_random import hash_uniform, hash_words
from nepa_scale.data.bad_samples import BadSampleLog, DataError
from nepa_scale.data.batch import Batch
from nepa_scale.data.crops import Box, EncodedImage, UndecodableImage, centre_box, random_resized_box
from nepa_scale.data.order import EpochOrder, Indices, steps_per_epoch
from nepa_scale.data.shard_set import BadSample, RawSample, ShardSet

SUBSTITUTES = 100  # tried in place of one bad sample before giving up


@dataclass(frozen=True)
class _Slice:
    """A micro-batch before it is read: sample numbers (-1: padding), their epoch, and their positions in it."""

    epoch: int
    positions: Indices
    samples: Indices


class SampleReader(Dataset[Batch]):
    """Turns a micro-batch's place into its images, in a worker process; holds no state of the run.

    crop: "random" (training: RandomResizedCrop and flip) or "centre" (evaluation)
    classes: labels must be present and below this; None: labels are not needed
    """

    def __init__(
        self, shards: ShardSet, data: DataConfig, size: tuple[int, int], seed: int, crop: str, classes: int | None
    ) -> None:
        self.shards, self.data, self.size, self.seed, self.crop, self.classes = shards, data, size, seed, crop, classes

    def __getitem__(self, place: _Slice) -> Batch:
        count = len(place.samples)
        pixels = torch.empty((count, *self.size, 3), dtype=torch.uint8)
        samples, keys = np.empty(count, dtype=np.int64), np.empty(count, dtype=np.int64)
        labels, names = np.empty(count, dtype=np.int64), []
        bad: list[BadSample] = []
        for i, (position, number) in enumerate(zip(place.positions.tolist(), place.samples.tolist(), strict=True)):
            raw, pixels[i], samples[i], keys[i] = self._read(place.epoch, position, max(number, 0), bad)
            labels[i] = -1 if raw.label is None else raw.label
            names.append(raw.key)
            if number < 0:
                samples[i] = -1
        flip = [self.crop == "random" and self.data.flip and hash_uniform("flip", key) < 0.5 for key in keys.tolist()]
        return Batch(
            images=pixels.permute(0, 3, 1, 2),
            flip=torch.tensor(flip, dtype=torch.bool),
            labels=torch.from_numpy(labels),
            sample_keys=torch.from_numpy(keys),
            samples=torch.from_numpy(samples),
            keys=names,
            bad=bad,
        )

    def _read(self, epoch: int, position: int, number: int, bad: list[BadSample]) -> tuple[RawSample, Tensor, int, int]:
        """The sample, or where it is bad a substitute drawn from (seed, epoch, position): the same on every rank."""
        for attempt in range(1, SUBSTITUTES + 1):
            key = sample_key(self.seed, epoch, number)
            try:
                raw = self.shards.read(number)
                self._check_label(raw)
                return raw, self._pixels(raw, key), number, key
            except BadSample as error:
                bad.append(error)
            if self.crop == "centre":
                break  # evaluation leaves a bad sample out rather than count another one twice
            number = hash_words("substitute", self.seed, epoch, position, attempt) % len(self.shards)
        blank = torch.zeros((*self.size, 3), dtype=torch.uint8)
        return RawSample(key="", image=b"", label=None, shard=""), blank, -1, 0

    def _check_label(self, raw: RawSample) -> None:
        if self.classes is None:
            return
        if raw.label is None:
            raise BadSample(raw.shard, raw.key, "no label")
        if not 0 <= raw.label < self.classes:
            raise BadSample(raw.shard, raw.key, f"label {raw.label} is not below the {self.classes} classes")

    def _pixels(self, raw: RawSample, key: int) -> Tensor:
        try:
            image = EncodedImage(raw.image)
            return image.crop(self._box(image, key), self.size)
        except UndecodableImage as error:
            raise BadSample(raw.shard, raw.key, str(error)) from error

    def _box(self, image: EncodedImage, key: int) -> Box:
        if self.crop == "centre":
            return centre_box(image.width, image.height, self.size)
        scale, ratio = self.data.crop_scale, self.data.crop_ratio
        return random_resized_box(image.width, image.height, key, (scale[0], scale[1]), (ratio[0], ratio[1]))


def sample_key(seed: int, epoch: int, sample: int) -> int:
    """The signed 64-bit hash from which everything random about a sample in an epoch is drawn."""
    value = hash_words("sample", seed, epoch, sample)
    return value - (1 << 64) if value >= 1 << 63 else value


class TrainStream:
    """Iterates over this rank's micro-batches from `start_step` on, without end. One iterator at a time."""

    def __init__(
        self,
        shards: ShardSet,
        data: DataConfig,
        *,
        image_size: tuple[int, int],
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        rank: int,
        world_size: int,
        start_step: int = 0,
        classes: int | None = None,
        bad_samples_file: Path | None = None,
    ) -> None:
        self.steps_per_epoch = steps_per_epoch(len(shards), global_batch_size, data.ragged)
        self._shards, self._data, self._seed = shards, data, seed
        self._global, self._micro = global_batch_size, micro_batch_size
        self._rank, self._world_size, self._start = rank, world_size, start_step
        self._log = BadSampleLog(bad_samples_file, data.max_bad_fraction)
        reader = SampleReader(shards, data, image_size, seed, "random", classes)
        self._loader = make_loader(reader, self.places(), data.workers)
        self._batches: Iterator[Batch] | None = None

    def places(self) -> Iterator[_Slice]:
        """Which samples this rank's micro-batches hold, in order, endlessly."""
        step, epoch, order = self._start, -1, None
        per_rank = self._global // self._world_size
        while True:
            if step // self.steps_per_epoch != epoch or order is None:
                epoch = step // self.steps_per_epoch
                window = self._data.open_shards if self._shards.remote else None
                order = EpochOrder(self._shards.shard_sizes, self._seed, epoch, window)
            first = (step % self.steps_per_epoch) * self._global + self._rank * per_rank
            for micro in range(first, first + per_rank, self._micro):
                positions = np.arange(micro, micro + self._micro, dtype=np.int64) % order.size  # pad: from the start
                yield _Slice(epoch, positions, order.samples(positions))
            step += 1

    def __iter__(self) -> Iterator[Batch]:
        self._batches = iter(self._loader)
        for batch in self._batches:
            self._log.add(len(batch.keys), batch.bad)
            if batch.samples.min() < 0:
                raise DataError(f"no usable sample was found in {SUBSTITUTES} tries; see data.train={self._data.train}")
            yield batch

    def close(self) -> None:
        """Ends the worker processes."""
        self._batches = None


class EvaluationStream:
    """One ordered pass over a shard set: each sample once over all ranks, centre crop, no flip.

    Every rank gets the same number of batches of `batch_size`; the last ones are padded, and samples that cannot be
    used are left out: in both cases `Batch.samples` is -1.
    limit: use only this many samples, evenly spread over the set
    """

    def __init__(
        self,
        shards: ShardSet,
        data: DataConfig,
        *,
        image_size: tuple[int, int],
        batch_size: int,
        rank: int,
        world_size: int,
        limit: int | None = None,
        classes: int | None = None,
    ) -> None:
        count = min(limit or len(shards), len(shards))
        self._samples = np.arange(count, dtype=np.int64) * len(shards) // count
        self._batch, self._rank, self._world_size = batch_size, rank, world_size
        reader = SampleReader(shards, data, image_size, 0, "centre", classes)
        self._loader = make_loader(reader, self._places(), data.workers)

    def _places(self) -> Iterator[_Slice]:
        stride = self._batch * self._world_size
        for first in range(self._rank * self._batch, -(-len(self._samples) // stride) * stride, stride):
            part = self._samples[first : first + self._batch]
            samples = np.concatenate([part, np.full(self._batch - len(part), -1, dtype=np.int64)])
            yield _Slice(0, np.arange(first, first + self._batch), samples)

    def __iter__(self) -> Iterator[Batch]:
        return iter(self._loader)


def make_loader(reader: SampleReader, places: Iterator[_Slice], workers: int) -> DataLoader[Batch]:
    """A DataLoader whose items are whole micro-batches, read in order by `workers` processes (0: in this one).

    Workers come from a fork server: forking the training process itself, with its threads and its CUDA context, can
    leave a worker waiting for a lock that nobody holds.
    """
    return DataLoader(
        reader,
        sampler=places,  # type: ignore[arg-type]
        batch_size=None,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        pin_memory=torch.cuda.is_available(),
        multiprocessing_context=multiprocessing.get_context("forkserver") if workers else None,
    )
