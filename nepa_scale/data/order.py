"""The order of an epoch by arithmetic: a permutation that is computed where it is asked, never stored.

A keyed Feistel network permutes [0, 2^2b); walking along its cycles until the value falls under n makes that a
permutation of [0, n) (Black and Rogaway, CT-RSA 2002, "cycle walking"). Any position of any epoch costs the same few
operations, so that a restart in the middle of an epoch costs nothing.

Step s lies in epoch s // steps_per_epoch. The epoch's order is cut into global batches; rank r of W takes the r-th
contiguous part of each and cuts it into micro-batches. Global batches hence do not depend on the ranks, the workers or
the micro-batch, and the whole state of a stream is its step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nepa_scale.config import ConfigError
from nepa_scale.counter_random import hash_words

Indices = NDArray[np.int64]
ROUNDS = 6
PADDING = -1  # the sample number of a place that holds none


@dataclass(frozen=True)
class Permutation:
    """A permutation of [0, size), chosen by a 64-bit key."""

    size: int
    key: int

    def __call__(self, positions: Indices) -> Indices:
        """int64 [N], each in [0, size) -> int64 [N]."""
        half = max(1, ((self.size - 1).bit_length() + 1) // 2)
        keys = [hash_words("round", self.key, number) for number in range(ROUNDS)]
        values = _feistel(positions.astype(np.uint64), half, keys)
        outside = np.flatnonzero(values >= self.size)
        while outside.size:  # fewer than 4 values in the domain for each in [0, size)
            values[outside] = _feistel(values[outside], half, keys)
            outside = outside[values[outside] >= self.size]
        return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], half: int, keys: list[int]) -> NDArray[np.uint64]:
    mask, bits = np.uint64((1 << half) - 1), np.uint64(half)
    left, right = values >> bits, values & mask
    with np.errstate(over="ignore"):
        for key in keys:
            mixed = (right + np.uint64(key)) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(31))) & mask)
    return (left << bits) | right


class EpochOrder:
    """Which sample stands at which position of an epoch; a pure function of (seed, epoch, sizes, open_shards).

    shard_sizes: samples of each shard, in order; a sample's number counts through them
    open_shards: None permutes all samples at once (local shards, read at random). Otherwise the shards are permuted,
        and samples only within each window of that many shards: what remote shards need, each of which is fetched once
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, epoch: int, open_shards: int | None = None) -> None:
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.size = int(sizes.sum())
        self._identity = (seed, epoch)
        if open_shards is None:
            self._shards, self._open = np.arange(len(sizes)), len(sizes)
        else:
            self._shards = Permutation(len(sizes), hash_words("shards", seed, epoch))(np.arange(len(sizes)))
            self._open = open_shards
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self._sample_starts = starts[self._shards]  # first sample of each shard, in the order of the epoch
        self._shard_ends = np.cumsum(sizes[self._shards])  # in positions of the epoch
        bounds = np.arange(0, len(sizes), self._open)
        self._window_starts = np.concatenate([[0], self._shard_ends])[bounds]
        ends = np.append(self._window_starts[1:], self.size)
        self._windows = [
            Permutation(int(end - start), hash_words("window", seed, epoch, number))
            for number, (start, end) in enumerate(zip(self._window_starts, ends, strict=True))
        ]

    def samples(self, positions: Indices) -> Indices:
        """int64 [N] positions in [0, size) -> int64 [N] sample numbers."""
        window = np.searchsorted(self._window_starts, positions, side="right") - 1
        shuffled = np.empty_like(positions)
        for number in np.unique(window):
            inside = window == number
            start = self._window_starts[number]
            shuffled[inside] = start + self._windows[number](positions[inside] - start)
        shard = np.searchsorted(self._shard_ends, shuffled, side="right")
        first = np.where(shard > 0, self._shard_ends[np.maximum(shard - 1, 0)], 0)
        return self._sample_starts[shard] + (shuffled - first)

    def substitute(self, position: int, attempt: int) -> int:
        """A sample number to read in place of a bad one at `position`, from the same window; attempts count from 1."""
        number = self.window(position)
        drawn = hash_words("substitute", *self._identity, position, attempt) % self._windows[number].size
        return int(self.samples(self._window_starts[number : number + 1] + drawn)[0])

    def window(self, position: int) -> int:
        """The number of the window in which the position lies."""
        return int(np.searchsorted(self._window_starts, position, side="right")) - 1

    def shards_of_window(self, number: int) -> list[int]:
        """The shards that are shuffled together there; empty past the epoch's end."""
        return [int(shard) for shard in self._shards[number * self._open : (number + 1) * self._open]]


@dataclass(frozen=True)
class Place:
    """A micro-batch before it is read.

    positions: int64 [B], where in the epoch its samples stand
    samples: int64 [B], their numbers; `PADDING` where there is none
    """

    epoch: int
    positions: Indices
    samples: Indices


class TrainOrder:
    """Which samples each micro-batch of a rank holds, over all epochs.

    ragged: what becomes of an epoch's last, short global batch: "drop" it, or "pad" it from the epoch's beginning
    Raises:
        ConfigError: the set is empty or smaller than one batch, or the batch does not divide.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        *,
        open_shards: int | None,
        seed: int,
        ragged: str,
        global_batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        if global_batch_size % (world_size * micro_batch_size):
            raise ConfigError(
                f"train.global_batch_size={global_batch_size} does not divide into micro-batches of {micro_batch_size} "
                f"on {world_size} ranks"
            )
        samples = sum(shard_sizes)
        self.steps_per_epoch = steps_per_epoch(samples, global_batch_size, ragged)
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"data.train holds {samples} samples, less than one batch of train.global_batch_size="
                f"{global_batch_size}: lower it, or set data.ragged=pad"
            )
        self.batch_size = micro_batch_size
        self.accumulation = global_batch_size // (world_size * micro_batch_size)
        self._sizes, self._open, self._seed = list(shard_sizes), open_shards, seed
        self._global, self._rank = global_batch_size, rank
        self._epoch = -1
        self._order: EpochOrder | None = None

    def place(self, number: int) -> Place:
        """The rank's micro-batch `number`, counted from the start of the run."""
        epoch, first = self._begin(number)
        order = self.epoch(epoch)
        positions = np.arange(first, first + self.batch_size, dtype=np.int64) % order.size
        return Place(epoch, positions, order.samples(positions))

    def substitute(self, epoch: int, position: int, attempt: int) -> int:
        """As `EpochOrder.substitute`."""
        return self.epoch(epoch).substitute(position, attempt)

    def window(self, number: int) -> tuple[int, int]:
        """Epoch, and window in it, in which micro-batch `number` begins."""
        epoch, first = self._begin(number)
        order = self.epoch(epoch)
        return epoch, order.window(first % order.size)

    def shards(self, epoch: int, window: int) -> list[int]:
        """The shards that are shuffled together there."""
        return self.epoch(epoch).shards_of_window(window)

    def following(self, epoch: int, window: int) -> tuple[int, int]:
        """The window after it, which may be the next epoch's first."""
        return (epoch, window + 1) if self.shards(epoch, window + 1) else (epoch + 1, 0)

    def _begin(self, number: int) -> tuple[int, int]:
        """Epoch and first position (before wrapping around) of a micro-batch."""
        step, micro = divmod(number, self.accumulation)
        epoch, step = divmod(step, self.steps_per_epoch)
        return epoch, step * self._global + (self._rank * self.accumulation + micro) * self.batch_size

    def epoch(self, epoch: int) -> EpochOrder:
        """The epoch's order; the last one asked for is kept."""
        if self._order is None or self._epoch != epoch:
            self._order, self._epoch = EpochOrder(self._sizes, self._seed, epoch, self._open), epoch
        return self._order


class EvaluationOrder:
    """One ordered pass: each sample once over all ranks, in as many batches of one size on each, the last ones padded.

    limit: use only this many samples, evenly spread over the set
    """

    def __init__(self, samples: int, *, batch_size: int, rank: int, world_size: int, limit: int | None = None) -> None:
        self._count = min(limit or samples, samples)
        self._samples = samples
        self.batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self.batches = -(-self._count // (batch_size * world_size))

    def place(self, number: int) -> Place:
        """The rank's batch `number`."""
        first = (number * self._world_size + self._rank) * self.batch_size
        positions = np.arange(first, first + self.batch_size, dtype=np.int64)
        inside = positions < self._count
        return Place(0, positions, np.where(inside, positions * self._samples // max(self._count, 1), PADDING))

    def substitute(self, epoch: int, position: int, attempt: int) -> None:
        """None: evaluation leaves a bad sample out rather than count another one twice."""


def steps_per_epoch(samples: int, global_batch_size: int, ragged: str) -> int:
    """Global batches of an epoch: the last, short one is dropped or padded from the epoch's start."""
    full, rest = divmod(samples, global_batch_size)
    return full + (1 if rest and ragged == "pad" else 0)
