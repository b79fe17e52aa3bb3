"""Random access to the samples of a set of WebDataset tars."""

from __future__ import annotations

import contextlib
import copy
import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from nepa_scale.config import DataConfig
from nepa_scale.data.class_names import numbers_of
from nepa_scale.data.index_files import find_index, make_index
from nepa_scale.data.remote import MissingRemote, Remote, is_remote
from nepa_scale.data.shard_cache import ShardCache
from nepa_scale.data.shard_opening import OpenedShard, open_shards, unreadable
from nepa_scale.data.sources import Source, nothing_found, resolve
from nepa_scale.data.tar_index import NO_LABEL, Entry, ShardIndex

OPEN_FILES = 128  # local shards a process keeps open: far below the usual limit of 1024 descriptors
_MISSING = "the shard is missing"

T = TypeVar("T")


class RawSample(NamedTuple):
    """One sample as it lies in its shard: the encoded image, and the label where there is one."""

    key: str
    image: bytes
    label: int | None
    shard: str


class BadSample(Exception):
    """A sample that cannot be used: which, and why."""

    def __init__(self, shard: str, key: str, why: str) -> None:
        super().__init__(shard, key, why)
        self.shard, self.key, self.why = shard, key, why

    def __str__(self) -> str:
        return f"{self.key or 'a sample'} in {self.shard}: {self.why}"


class ShardSet:
    """Random access to the samples of a set of WebDataset tars, in shard order then tar order.

    Made by `open`. Sample n is a number in [0, len). Pickles small: processes open files as they need them.

    names: path or URL of each shard
    shard_sizes: samples of each shard
    classes: as `dataset.json` states, else the largest label + 1; None without labels
    class_names: in the order of the labels, where `dataset.json` states them
    descriptions: by path or URL, what `dataset.json` says of a shard
    remote: whether shards are fetched, each as a whole when its first sample is read
    """

    def __init__(self, source: Source, shards: list[OpenedShard], cache: ShardCache, open_files: int) -> None:
        self.names = source.locations
        self.shard_sizes = [shard.samples for shard in shards]
        self.remote = any(map(is_remote, self.names))
        self.class_names = source.class_names
        largest = max(shard.largest_label for shard in shards)
        self.classes = source.classes if source.classes is not None or largest == NO_LABEL else largest + 1
        self.descriptions = source.described
        self._numbers = [source.labels.get(name) for name in self.names]
        self._missing = [shard.missing for shard in shards]
        self._index_files = [shard.index for shard in shards]
        self._ends = list(accumulate(self.shard_sizes))
        self._cache, self._open_files = cache, open_files
        self._forget_process_state()

    def with_classes(self, names: list[str], where: str) -> ShardSet:
        """The same samples, with the labels that their classes' names have in `names`.

        where: this set, for messages
        Raises:
            ConfigError: a class is not in `names`.
        """
        if self.class_names is None:
            raise ValueError(f"{where} does not name its classes")
        numbers = numbers_of(self.class_names, names, where)
        other = copy.copy(self)
        other._numbers = [numbers if old is None else [numbers[n] for n in old] for old in self._numbers]
        other.class_names, other.classes = names, len(names)
        return other

    @classmethod
    def open(cls, source: str, data: DataConfig) -> ShardSet:
        """Opens a folder of shards, a tar, a brace or glob pattern, a URL (`http(s)://`, and `s3://`, `gs://`, `hf://`
        and the like through fsspec), a `.txt` file with one of these a line, or several joined by `::`.

        Local shards without a current index are indexed, which reads their headers once. Remote ones are counted by
        the `dataset.json` or the index beside them, and where they have neither, all of them are fetched.

        Raises:
            ConfigError: nothing is found there, or it cannot be read.
            RemoteError: a server does not answer.
        """
        cache = ShardCache.from_config(data)
        found = resolve(source, Remote.from_config(data))
        shards = open_shards(found, cache)
        if all(shard.missing for shard in shards):
            raise nothing_found(source)
        # a copy that is removed from the cache takes up space for as long as it is open
        return cls(found, shards, cache, data.open_shards if any(map(is_remote, found.locations)) else OPEN_FILES)

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, sample: int) -> RawSample:
        """Reads sample number `sample`.

        Raises:
            BadSample: it is damaged, incomplete or missing.
            RemoteError: its shard cannot be fetched.
            IndexError: there is no such number.
        """
        if not 0 <= sample < self._ends[-1]:
            raise IndexError(f"sample {sample} is not in [0, {len(self)})")
        shard = bisect_right(self._ends, sample)
        name = self.names[shard]
        entry = self._entry(shard, sample - self._ends[shard] + self.shard_sizes[shard])
        if entry.flaw is not None:
            raise BadSample(name, entry.key, entry.flaw)
        image = self._bytes(shard, entry)
        return RawSample(entry.key, image, None if entry.label == NO_LABEL else entry.label, name)

    def end_of(self, sample: int, length: int) -> bytes:
        """The last `length` bytes of a sample's image, or all of it where it is shorter.

        Raises:
            BadSample, RemoteError: as `read`.
        """
        shard = bisect_right(self._ends, sample)
        entry = self._entry(shard, sample - self._ends[shard] + self.shard_sizes[shard])
        length = min(length, entry.size)
        return self._bytes(shard, entry._replace(offset=entry.offset + entry.size - length, size=length))

    def known_index(self, shard: int) -> ShardIndex | None:
        """The index of shard number `shard`; None where it is remote, or missing."""
        if self._missing[shard] or is_remote(self.names[shard]):
            return None
        try:
            return self._index(shard)
        except FileNotFoundError:
            return None

    def entries(self, shard: int) -> Iterator[Entry]:
        """What the index of shard number `shard` says of its samples, in tar order."""
        return (self._entry(shard, number) for number in range(self.shard_sizes[shard]))

    def ensure_local(self, shard: int) -> Path:
        """The path of shard number `shard` on this machine; a remote one is fetched as a whole, once for all processes.

        The copy of a remote shard may be removed to make room for others; who has it open can go on reading it.

        Raises:
            MissingRemote: there is no such file.
            RemoteError: it cannot be fetched.
            ConfigError: it does not fit into the cache.
        """
        name = self.names[shard]
        return self._cache.local(name, self.descriptions.get(name)) if is_remote(name) else Path(name)

    def _bytes(self, shard: int, entry: Entry) -> bytes:
        name = self.names[shard]
        try:
            found = os.pread(self._descriptor(shard), entry.size, entry.offset)
        except OSError as error:
            raise BadSample(name, entry.key, f"the shard cannot be read: {error.strerror}") from error
        if len(found) < entry.size:
            raise BadSample(name, entry.key, "the shard has become shorter since it was opened")
        return found

    def _entry(self, shard: int, number: int) -> Entry:
        if self._missing[shard]:
            return _flawed(_MISSING)
        try:
            index = self._index(shard)
        except (MissingRemote, FileNotFoundError):
            self._missing[shard] = True
            return _flawed(_MISSING)
        if number >= len(index):
            return _flawed("the shard holds fewer samples than were counted")
        entry, numbers = index[number], self._numbers[shard]
        if numbers is None or entry.label == NO_LABEL:
            return entry
        return entry._replace(label=numbers[entry.label] if entry.label < len(numbers) else NO_LABEL)

    def _index(self, shard: int) -> ShardIndex:
        index = self._indices.get(shard)
        if index is None:
            index = self._indices[shard] = self._load_index(shard)
        return index

    def _load_index(self, shard: int) -> ShardIndex:
        path = self._index_files[shard]
        try:
            if path is not None:
                with contextlib.suppress(FileNotFoundError):  # a remote shard's goes when its copy does
                    return ShardIndex.load(path)
            return self._with_local(shard, self._find_index)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise unreadable(self.names[shard], error) from error

    def _find_index(self, path: Path) -> ShardIndex:
        return (find_index(path, self._cache.folder) or make_index(path, self._cache.folder))[1]

    def _descriptor(self, shard: int) -> int:
        if shard in self._descriptors:
            self._descriptors.move_to_end(shard)
            return self._descriptors[shard]
        descriptor = self._with_local(shard, lambda path: os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        if len(self._descriptors) >= self._open_files:
            os.close(self._descriptors.popitem(last=False)[1])
        self._descriptors[shard] = descriptor
        return descriptor

    def _with_local(self, shard: int, use: Callable[[Path], T]) -> T:
        """`use` of the shard's path on this machine."""
        name = self.names[shard]
        return self._cache.use(name, self.descriptions.get(name), use) if is_remote(name) else use(Path(name))

    def _forget_process_state(self) -> None:
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._indices: dict[int, ShardIndex] = {}

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        for name in ("_descriptors", "_indices"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_process_state()

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_descriptors", {}).values():
            os.close(descriptor)


def _flawed(why: str) -> Entry:
    return Entry("", 0, 0, NO_LABEL, why)
