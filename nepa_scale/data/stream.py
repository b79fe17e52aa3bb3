"""The stream: a rank's batches, in the order that `nepa_scale.data.order` gives, read by processes that start once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from nepa_scale.config import DataConfig
from nepa_scale.data.bad_samples import BadSampleLog, DataError
from nepa_scale.data.batch import Batch
from nepa_scale.data.crops import CROP_SHARE
from nepa_scale.data.order import EvaluationOrder, TrainOrder
from nepa_scale.data.rand_augment import RandAugment
from nepa_scale.data.sample_reader import Failure, Rest, SampleReader, centre_crop, random_crop
from nepa_scale.data.shard_fetcher import ShardFetcher
from nepa_scale.data.shard_set import ShardSet
from nepa_scale.data.shared_slots import Pixels
from nepa_scale.data.workers import WorkerDied, Workers


class TrainStream:
    """This rank's micro-batches from `start_step` on, without end. One iterator at a time.

    image_size: height and width
    rand_augment: a policy of timm's RandAugment
    classes: labels are needed, and must be below this; None: they are not needed
    bad_samples_file: where bad samples are listed; see `BadSampleLog`
    Raises:
        ConfigError: the batch does not divide, or the set is too small for it.
    """

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
        rand_augment: str | None = None,
        classes: int | None = None,
        bad_samples_file: Path | None = None,
    ) -> None:
        self._order = TrainOrder(
            shards.shard_sizes,
            open_shards=data.open_shards if shards.remote else None,
            seed=seed,
            ragged=data.ragged,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            rank=rank,
            world_size=world_size,
        )
        self.steps_per_epoch = self._order.steps_per_epoch
        self._shards, self._start, self._share = shards, start_step, rank / world_size
        scale, ratio = data.crop_scale, data.crop_ratio
        augment = RandAugment(rand_augment, image_size, data.interpolation) if rand_augment else None
        self.reader = SampleReader(  # what the workers do, for those who measure it
            shards,
            self._order,
            size=image_size,
            crop=partial(random_crop, scale=(scale[0], scale[1]), ratio=(ratio[0], ratio[1]), augment=augment),
            interpolation=data.interpolation,
            flip=data.flip,
            seed=seed,
            classes=shards.classes if classes is None else classes,
            need_labels=classes is not None,
        )
        self._batches = _Batches(self.reader, data.workers, BadSampleLog(bad_samples_file, data.max_bad_fraction))
        self._fetcher: ShardFetcher | None = None

    def __iter__(self) -> Iterator[Batch]:
        """Starts again at `start_step`.

        `next` raises:
            DataError: too many samples are bad, a server fails, or a worker was killed.
        """
        self.close()
        if self._shards.remote:
            self._fetcher = ShardFetcher(self._shards.ensure_local)
        return self._batches.start(self._numbers())

    def close(self) -> None:
        """Ends the worker processes; the iterator is then at its end."""
        self._batches.close()
        if self._fetcher is not None:
            self._fetcher.close()
            self._fetcher = None

    def _numbers(self) -> Iterator[int]:
        """The numbers of the micro-batches; remote shards are fetched one window ahead of them."""
        order = self._order
        fetched: tuple[int, int] | None = None
        for number in itertools.count(self._start * order.accumulation):
            if self._fetcher is not None:
                window = order.window(number)
                while fetched is None or fetched < order.following(*window):
                    fetched = window if fetched is None else order.following(*fetched)
                    self._fetcher.want(self._rotated(order.shards(*fetched)))
            yield number

    def _rotated(self, shards: list[int]) -> list[int]:
        """Ranks of one machine begin at different shards, and so fetch several at a time."""
        start = int(self._share * len(shards))
        return shards[start:] + shards[:start]


class EvaluationStream:
    """One ordered pass over a shard set: each sample once over all ranks, centre crop, no flip.

    Every rank gets the same number of batches of `batch_size`; the last ones are padded, and samples that cannot be
    used are left out: in both cases `Batch.samples` is -1.
    limit: use only this many samples, evenly spread over the set
    crop_share: of the resized image's shorter side that the crop takes
    squash: resize without keeping the aspect
    classes, bad_samples_file: as for `TrainStream`
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
        crop_share: float = CROP_SHARE,
        squash: bool = False,
        classes: int | None = None,
        bad_samples_file: Path | None = None,
    ) -> None:
        order = EvaluationOrder(len(shards), batch_size=batch_size, rank=rank, world_size=world_size, limit=limit)
        self._count = order.batches
        reader = SampleReader(
            shards,
            order,
            size=image_size,
            crop=partial(centre_crop, share=crop_share, squash=squash),
            interpolation=data.interpolation,
            flip=False,
            seed=0,
            classes=shards.classes if classes is None else classes,
            need_labels=classes is not None,
        )
        self._batches = _Batches(reader, data.workers, BadSampleLog(bad_samples_file, data.max_bad_fraction))

    def __len__(self) -> int:
        """Batches of each rank."""
        return self._count

    def __iter__(self) -> Iterator[Batch]:
        """Begins the pass; the workers end with it. `next` raises as that of `TrainStream` does."""
        return self._batches.start(iter(range(self._count)))

    def close(self) -> None:
        """Ends the worker processes of a pass that was not finished."""
        self._batches.close()


class _Batches(Iterator[Batch]):
    """The batches `numbers` that a reader fills, in this process or in workers, with bad samples accounted for."""

    def __init__(self, reader: SampleReader, workers: int, log: BadSampleLog) -> None:
        self._reader, self._count, self._log = reader, workers, log
        self._numbers: Iterator[int] = iter(())
        self._workers: Workers[Rest | Failure] | None = None

    def start(self, numbers: Iterator[int]) -> Iterator[Batch]:
        self.close()
        self._numbers = numbers
        self._workers = Workers(self._reader, numbers, self._count) if self._count else None
        return self

    def __next__(self) -> Batch:
        pixels, rest = self._from_worker() if self._count else self._in_process()
        if isinstance(rest, Failure):
            self._log.add(0, rest.bad)
            raise rest.error
        self._log.add(len(rest.keys), rest.bad)
        return rest.batch(pixels)

    def close(self) -> None:
        self._numbers = iter(())
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def _from_worker(self) -> tuple[Pixels, Rest | Failure]:
        if self._workers is None:
            raise StopIteration
        try:
            return next(self._workers)
        except WorkerDied as error:
            raise DataError(f"reading the data failed: {error} (was memory short? then lower data.workers)") from error

    def _in_process(self) -> tuple[Pixels, Rest | Failure]:
        pixels = np.empty(self._reader.shape, dtype=np.uint8)
        return pixels, self._reader.fill(next(self._numbers), pixels)
