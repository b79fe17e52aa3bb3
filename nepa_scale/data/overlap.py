"""How many images of one set are also in another, without decoding any.

Two images are the same where their bytes are. Images that have a name and a size in common are compared first: few by
accident, all where a set was copied or written into other shards. Then those that have a size in common, which finds
copies under other names. Of many, an even sample is compared, and their share is taken for that of all.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from nepa_scale.data.remote import is_remote
from nepa_scale.data.shard_set import BadSample, ShardSet
from nepa_scale.data.tar_index import hash_texts

COMPARED = 256  # images of the one set at most, by name and by size
CANDIDATES = 256  # images of the other at most that one of them is compared with
_END = 64  # bytes that are compared first

Places = NDArray[np.int64]


class Images(Protocol):
    """The images of a set.

    sizes: bytes of each, int64 [N]; 0: not to be compared
    names: a hash of each name, uint64 [N]
    """

    sizes: NDArray[np.int64]
    names: NDArray[np.uint64]

    def end_of(self, number: int, length: int) -> bytes: ...

    def read(self, number: int) -> bytes: ...


def same_images(held_out: Images, training: Images) -> int:
    """How many of `held_out` are in `training`, by their bytes: exact up to `COMPARED` images, else estimated."""
    comparable = held_out.sizes > 0
    ours, theirs = _name_and_size(held_out), _name_and_size(training)
    named = comparable & np.isin(ours, theirs)
    by_name = _count(held_out, training, np.flatnonzero(named), ours, theirs)
    sized = comparable & np.isin(held_out.sizes, training.sizes)
    if by_name:  # else their names were equal by accident, as those of two sets that are numbered from 0
        sized &= ~named
    return by_name + _count(held_out, training, np.flatnonzero(sized), held_out.sizes, training.sizes)


def _name_and_size(images: Images) -> NDArray[np.uint64]:
    return images.names ^ (images.sizes.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))


def _count(
    held_out: Images, training: Images, rows: Places, ours: NDArray[np.generic], theirs: NDArray[np.generic]
) -> int:
    """How many of these rows of `held_out` are in `training`, among the images whose `theirs` equals their `ours`."""
    compared = rows[np.linspace(0, len(rows) - 1, min(len(rows), COMPARED)).astype(np.int64)]
    order = np.argsort(theirs, kind="stable")
    first, last = (np.searchsorted(theirs, ours[compared], side, sorter=order) for side in ("left", "right"))
    found = sum(
        any(_same(held_out, row, training, candidate) for candidate in order[start:end][:CANDIDATES].tolist())
        for row, start, end in zip(compared.tolist(), first.tolist(), last.tolist(), strict=True)
    )
    return -(-found * len(rows) // max(len(compared), 1))


def _same(held_out: Images, row: int, training: Images, candidate: int) -> bool:
    try:
        return held_out.end_of(row, _END) == training.end_of(candidate, _END) and (
            held_out.read(row) == training.read(candidate)
        )
    except (BadSample, OSError):
        return False


class ShardImages:
    """The images of some of a set's shards, as far as their indices are on this machine."""

    def __init__(self, shards: ShardSet, numbers: Sequence[int]) -> None:
        self._shards = shards
        starts = np.cumsum([0, *shards.shard_sizes])
        parts: list[tuple[Places, NDArray[np.int64], NDArray[np.uint64]]] = []
        for number in numbers:
            index = shards.known_index(number)
            if index is not None:
                samples = np.arange(min(len(index), shards.shard_sizes[number]))
                parts.append(
                    (starts[number] + samples, index.sizes[samples].astype(np.int64), index.key_hashes()[samples])
                )
        self._samples = np.concatenate([np.empty(0, np.int64), *(part[0] for part in parts)])
        self.sizes = np.concatenate([np.empty(0, np.int64), *(part[1] for part in parts)])
        self.names = np.concatenate([np.empty(0, np.uint64), *(part[2] for part in parts)])

    def end_of(self, number: int, length: int) -> bytes:
        return self._shards.end_of(int(self._samples[number]), length)

    def read(self, number: int) -> bytes:
        return self._shards.read(int(self._samples[number])).image


class ImageFiles:
    """Images that are files; they are known by their names without folders and extensions."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self.sizes = np.array([path.stat().st_size for path in paths], np.int64)
        names = [os.fsencode(path.stem) for path in paths]
        self.names = hash_texts(np.frombuffer(b"".join(names), np.uint8), np.cumsum([len(name) for name in names]))

    def end_of(self, number: int, length: int) -> bytes:
        with self._paths[number].open("rb") as file:
            file.seek(max(0, int(self.sizes[number]) - length))
            return file.read()

    def read(self, number: int) -> bytes:
        return self._paths[number].read_bytes()


def same_samples(held_out: ShardSet, training: ShardSet) -> int:
    """How many samples of `held_out` are in `training`: whole shards by place or checksum, others by `same_images`.

    Remote shards are not fetched for it: they are told apart by URL and checksum alone.
    """
    known = set().union(*(_marks(training, number) for number in range(len(training.names))))
    whole = [bool(_marks(held_out, number) & known) for number in range(len(held_out.names))]
    same = sum(size for size, is_known in zip(held_out.shard_sizes, whole, strict=True) if is_known)
    rest = ShardImages(held_out, [number for number, is_known in enumerate(whole) if not is_known])
    if not len(rest.sizes):
        return same
    return same + same_images(rest, ShardImages(training, range(len(training.names))))


def _marks(shards: ShardSet, number: int) -> set[object]:
    """By which a shard is known again: where it lies, and what `dataset.json` says of its bytes."""
    name = shards.names[number]
    described = shards.descriptions.get(name)
    marks: set[object] = {name if is_remote(name) else os.path.realpath(name)}
    return marks | {(described.sha256, described.bytes)} if described and described.sha256 else marks
