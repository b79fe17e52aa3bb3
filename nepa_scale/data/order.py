"""The order of an epoch by arithmetic: a permutation that is computed where it is asked, never stored.

A keyed Feistel network permutes [0, 2^2b); walking along its cycles until the value falls under n makes that a
permutation of [0, n) (Black and Rogaway, CT-RSA 2002, "cycle walking"). Any position of any epoch costs the same few
operations, so that a restart in the middle of an epoch costs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from nepa_scale.counter_random import hash_words

Indices = NDArray[np.int64]
ROUNDS = 6


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
        and samples only within each run of that many shards: what remote shards need, each of which is fetched once
    """

    def __init__(self, shard_sizes: Sequence[int], seed: int, epoch: int, open_shards: int | None = None) -> None:
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.size = int(sizes.sum())
        if open_shards is None:
            order, open_shards = np.arange(len(sizes)), len(sizes)
        else:
            order = Permutation(len(sizes), hash_words("shards", seed, epoch))(np.arange(len(sizes)))
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self._sample_starts = starts[order]  # first sample of each shard, in the order of the epoch
        self._shard_ends = np.cumsum(sizes[order])  # in positions of the epoch
        bounds = np.arange(0, len(sizes), open_shards)
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


def steps_per_epoch(samples: int, global_batch_size: int, ragged: str) -> int:
    """Global batches of an epoch: the last, short one is dropped or padded from the epoch's start."""
    full, rest = divmod(samples, global_batch_size)
    return full + (1 if rest and ragged == "pad" else 0)
