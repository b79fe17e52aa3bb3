"""Finds the index of a shard, or makes and keeps it."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from nepa_scale.data.safe_files import locked
from nepa_scale.data.tar_index import SUFFIX, ShardIndex, index_shard


def find_index(shard: Path, cache: Path) -> tuple[Path, ShardIndex] | None:
    """The file and the content of a current index of the tar at `shard`: beside it or in the folder `cache`.

    Raises:
        OSError: the shard cannot be read.
    """
    status = shard.stat()
    for path in (_beside(shard), _kept(shard, cache)):
        with contextlib.suppress(OSError, ValueError):
            index = ShardIndex.load(path)
            same_time = path != _beside(shard) or path.stat().st_mtime_ns == status.st_mtime_ns
            if index.shard_bytes == status.st_size and same_time:
                return path, index
    return None


def make_index(shard: Path, cache: Path) -> tuple[Path, ShardIndex]:
    """Like `find_index`, and where there is none, makes it: beside the shard if that can be written, else in `cache`.

    Any number of processes may do so at once: those on one machine wait for the first, those on others repeat its work.

    Raises:
        OSError: the shard cannot be read, or neither place can be written.
    """
    kept = _kept(shard, cache)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with locked(kept.with_suffix(".lock")):
        if (found := find_index(shard, cache)) is not None:
            return found
        time = shard.stat().st_mtime_ns
        index = index_shard(shard)
        with contextlib.suppress(OSError):
            index.save(_beside(shard), time)
            return _beside(shard), index
        index.save(kept, time)
        return kept, index


def _beside(shard: Path) -> Path:
    return shard.with_name(shard.name + SUFFIX)


def _kept(shard: Path, cache: Path) -> Path:
    """Named for the shard's path, size and time: the times of two file systems need not compare."""
    status = shard.stat()
    identity = f"{shard.resolve()}\n{status.st_size}\n{status.st_mtime_ns}"
    return cache / "indices" / (hashlib.sha256(os.fsencode(identity)).hexdigest()[:32] + SUFFIX)
