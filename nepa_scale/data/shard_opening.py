"""Learns how many samples each shard of a source holds, reading and fetching no more than that takes."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from nepa_scale.config import ConfigError
from nepa_scale.data.index_files import find_index, make_index
from nepa_scale.data.parallel import in_threads
from nepa_scale.data.remote import PIPE, MissingRemote, RefusedRemote, is_remote
from nepa_scale.data.shard_cache import ShardCache
from nepa_scale.data.sources import Source
from nepa_scale.data.tar_index import NO_LABEL, SUFFIX, ShardIndex


@dataclass(frozen=True)
class OpenedShard:
    """What is known of a shard before a sample is read.

    index: the index file; None where it will be made when the shard is fetched
    largest_label: NO_LABEL where there is none, or it is not known
    """

    samples: int
    index: Path | None = None
    largest_label: int = NO_LABEL
    missing: bool = False


def open_shards(source: Source, cache: ShardCache) -> list[OpenedShard]:
    """One for each location, in order. Shards that are not there count as they are described, or as one sample.

    Raises:
        ConfigError: a shard or its index cannot be read or written.
        RemoteError: a server does not answer.
    """
    opened = [_open_at_once(location, source, cache) for location in source.locations]
    if unknown := [location for location, shard in zip(source.locations, opened, strict=True) if shard is None]:
        beside = _has_remote_index(unknown, cache)
        work = partial(_open_slowly, source=source, cache=cache, index_beside=beside)
        found = iter(in_threads(work, unknown, "indexing shards"))
        return [shard if shard is not None else next(found) for shard in opened]
    return [shard for shard in opened if shard is not None]


def _open_at_once(location: str, source: Source, cache: ShardCache) -> OpenedShard | None:
    """From an index or a description that is there; None where there is neither."""
    described = source.described.get(location)
    if is_remote(location):
        return OpenedShard(described.samples) if described else None
    try:
        found = find_index(Path(location), cache.folder)
    except FileNotFoundError:
        return OpenedShard(described.samples if described else 1, missing=True)
    except OSError as error:
        raise unreadable(location, error) from error
    return _from_index(*found, source) if found else None


def _open_slowly(location: str, source: Source, cache: ShardCache, index_beside: bool) -> OpenedShard:
    """Reads the shard's headers, after fetching the shard or, where it has one, only its index."""

    def make(path: Path) -> OpenedShard:
        return _from_index(*make_index(path, cache.folder), source)

    try:
        if index_beside and is_remote(location):
            index = _remote_index(location, cache)
            if index is not None:
                return OpenedShard(len(index), largest_label=int(index.labels.max()))
        if is_remote(location):
            return cache.use(location, None, make)
        return make(Path(location))
    except MissingRemote:
        return OpenedShard(1, missing=True)
    except OSError as error:
        raise unreadable(location, error) from error


def _from_index(path: Path, index: ShardIndex, source: Source) -> OpenedShard:
    largest = int(index.labels.max()) if source.classes is None else NO_LABEL
    return OpenedShard(len(index), path, largest)


def _has_remote_index(locations: list[str], cache: ShardCache) -> bool:
    """Whether shards lie beside their indices, told from the first: asking for each could be a thousand requests."""
    first = next((location for location in locations if is_remote(location)), None)
    return first is not None and _remote_index(first, cache) is not None


def _remote_index(url: str, cache: ShardCache) -> ShardIndex | None:
    if url.startswith(PIPE) or "?" in url:
        return None
    try:
        return ShardIndex(memoryview(cache.remote.read_small(url + SUFFIX)))
    except (MissingRemote, RefusedRemote, ValueError):
        return None


def unreadable(location: str, error: OSError) -> ConfigError:
    """The error for a shard that is there and cannot be used."""
    refused = error.errno in (errno.EACCES, errno.EROFS, errno.EPERM)
    hint = " (its index could be kept elsewhere: set data.cache)" if refused else ""
    return ConfigError(f"cannot open the shard {location}: {error.strerror or error}{hint}")
