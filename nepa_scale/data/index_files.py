"""Finds the index of a shard, or makes and keeps it."""

from __future__ import annotations

import contextlib
import hashlib
import os
from pathlib import Path

from nepa_scale.data.safe_files import locked
from nepa_scale.data.tar_index import SUFFIX, index_shard, peek


def index_file(shard: Path, cache: Path) -> Path:
    """The index of the tar at `shard`: beside it where it is current or can be written, else in the folder `cache`.

    Any number of processes may ask at once: those on one machine wait for the first, those on others repeat its work.

    Raises:
        OSError: the shard cannot be read, or neither place can be written.
    """
    beside, kept = shard.with_name(shard.name + SUFFIX), cache / "indices" / _kept_name(shard)
    found = _current(shard, beside, kept)
    if found is not None:
        return found
    kept.parent.mkdir(parents=True, exist_ok=True)
    with locked(kept.with_suffix(".lock")):
        found = _current(shard, beside, kept)
        if found is not None:
            return found
        mtime = shard.stat().st_mtime_ns
        index = index_shard(shard)
        with contextlib.suppress(OSError):
            index.save(beside, mtime)
            return beside
        index.save(kept, mtime)
        return kept


def _kept_name(shard: Path) -> str:
    """Names the shard's content by its path, size and time: the times of two file systems need not compare."""
    status = shard.stat()
    identity = f"{shard.resolve()}\n{status.st_size}\n{status.st_mtime_ns}"
    return hashlib.sha256(os.fsencode(identity)).hexdigest()[:32] + SUFFIX


def _current(shard: Path, beside: Path, kept: Path) -> Path | None:
    status = shard.stat()
    for path in (beside, kept):
        header = peek(path)
        if header is None or header[1] != status.st_size:
            continue
        if path is kept or path.stat().st_mtime_ns == status.st_mtime_ns:
            return path
    return None
