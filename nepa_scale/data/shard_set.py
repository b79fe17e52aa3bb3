"""Random access to the samples of a set of WebDataset tars."""

from __future__ import annotations

import errno
import glob
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import braceexpand
import numpy as np

from nepa_scale.config import ConfigError, DataConfig
from nepa_scale.data.description import FILE_NAME, Description
from nepa_scale.data.index_files import index_file
from nepa_scale.data.tar_index import NO_LABEL, Entry, ShardIndex

OPEN_FILES = 128  # shards a process keeps open: far below the usual limit of 1024 descriptors


@dataclass(frozen=True)
class RawSample:
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


@dataclass(frozen=True)
class _Shard:
    name: str
    samples: int
    index: Path | None  # None: the shard is missing


class ShardSet:
    """Random access to the samples of a set of WebDataset tars, in shard order then tar order.

    Made by `open`. Sample n is a number in [0, len). Pickles small: processes open files as they need them.
    """

    def __init__(self, shards: list[_Shard], description: Description | None) -> None:
        self.names = [shard.name for shard in shards]
        self.shard_sizes = [shard.samples for shard in shards]
        self.remote = False
        self.class_names = description.class_names if description else None
        self._described_classes = description.classes if description else None
        self._index_files = [shard.index for shard in shards]
        self._ends = np.cumsum(self.shard_sizes, dtype=np.int64)
        self._forget_process_state()

    @classmethod
    def open(cls, source: str, data: DataConfig) -> ShardSet:
        """Opens a folder of shards, a tar, a brace or glob pattern, a `.txt` file with one of these a line, or
        several joined by `::`. Shards without a current index are indexed, which reads their headers once.

        Raises:
            ConfigError: nothing is found there, or it cannot be read.
        """
        cache = cache_folder(data)
        paths, description = _resolve(source)
        described = {shard.name: shard.samples for shard in description.shards} if description else {}
        shards = [_open_shard(path, described.get(path.name, 1), cache) for path in paths]
        if all(shard.index is None for shard in shards):
            raise _nothing_found(source)
        return cls(shards, description)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @cached_property
    def classes(self) -> int | None:
        """The number of classes that `dataset.json` states, else the largest label + 1; None without labels."""
        if self._described_classes is not None:
            return self._described_classes
        labels = [int(self._index(n).labels.max()) for n, path in enumerate(self._index_files) if path is not None]
        largest = max(labels, default=NO_LABEL)
        return None if largest == NO_LABEL else largest + 1

    def read(self, sample: int) -> RawSample:
        """Reads sample number `sample`.

        Raises:
            BadSample: it is damaged, incomplete or missing.
            IndexError: there is no such number.
        """
        if not 0 <= sample < len(self):
            raise IndexError(f"sample {sample} is not in [0, {len(self)})")
        shard = int(np.searchsorted(self._ends, sample, side="right"))
        name = self.names[shard]
        if self._index_files[shard] is None:
            raise BadSample(name, "", "the shard is missing")
        entry = self._index(shard)[sample - int(self._ends[shard]) + self.shard_sizes[shard]]
        if entry.flaw is not None:
            raise BadSample(name, entry.key, entry.flaw)
        try:
            image = os.pread(self._descriptor(shard), entry.size, entry.offset)
        except OSError as error:
            raise BadSample(name, entry.key, f"the shard cannot be read: {error.strerror}") from error
        if len(image) < entry.size:
            raise BadSample(name, entry.key, "the shard has become shorter since it was opened")
        return RawSample(entry.key, image, None if entry.label == NO_LABEL else entry.label, name)

    def entries(self, shard: int) -> Iterator[Entry]:
        """What the index of shard number `shard` says of its samples, in tar order."""
        index = self._index(shard) if self._index_files[shard] is not None else None
        for number in range(self.shard_sizes[shard]):
            yield index[number] if index is not None else Entry("", 0, 0, NO_LABEL, "the shard is missing")

    def ensure_local(self, shard: int) -> Path:
        """The path of shard number `shard` on this machine."""
        return Path(self.names[shard])

    def _index(self, shard: int) -> ShardIndex:
        index = self._indices.get(shard)
        if index is None:
            path = self._index_files[shard]
            assert path is not None
            index = self._indices[shard] = ShardIndex.load(path)
        return index

    def _descriptor(self, shard: int) -> int:
        if os.getpid() != self._process:
            self._forget_process_state()
        descriptor = self._descriptors.get(shard)
        if descriptor is not None:
            self._descriptors.move_to_end(shard)
            return descriptor
        if len(self._descriptors) >= OPEN_FILES:
            os.close(self._descriptors.popitem(last=False)[1])
        descriptor = self._descriptors[shard] = os.open(self.ensure_local(shard), os.O_RDONLY | os.O_CLOEXEC)
        return descriptor

    def _forget_process_state(self) -> None:
        self._process = os.getpid()
        self._descriptors: OrderedDict[int, int] = OrderedDict()
        self._indices: dict[int, ShardIndex] = {}

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        for name in ("_process", "_descriptors", "_indices"):
            del state[name]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_process_state()

    def __del__(self) -> None:
        if self.__dict__.get("_process") == os.getpid():
            for descriptor in self._descriptors.values():
                os.close(descriptor)


def cache_folder(data: DataConfig) -> Path:
    """Where copies of remote shards, and the indices that cannot lie beside their shards, are kept."""
    return Path(data.cache).expanduser() if data.cache else Path.home() / ".cache" / "nepa_scale" / "shards"


def _open_shard(path: Path, samples: int, cache: Path) -> _Shard:
    """samples: how many the shard should hold, which counts where it is missing"""
    try:
        index = index_file(path, cache)
        return _Shard(str(path), len(ShardIndex.load(index)), index)
    except FileNotFoundError:
        return _Shard(str(path), samples, None)
    except OSError as error:
        raise ConfigError(
            f"cannot open the shard {path}: {error.strerror or error}"
            + (f" (its index is kept in {cache}: set data.cache)" if error.errno in (errno.EACCES, errno.EROFS) else "")
        ) from error


def _resolve(source: str) -> tuple[list[Path], Description | None]:
    """The shards that `source` names, and the description of the set where it is one described folder."""
    path = Path(source).expanduser()
    if path.is_dir() and (path / FILE_NAME).is_file():
        description = Description.from_json((path / FILE_NAME).read_bytes(), str(path / FILE_NAME))
        return [path / shard.name for shard in description.shards], description
    parts = [part.strip() for part in source.split("::")]
    if path.suffix == ".txt" and path.is_file():
        lines = path.read_text().splitlines()
        parts = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    paths = [found for part in parts if part for found in _expand(part)]
    if not paths:
        raise _nothing_found(source)
    return paths, None


def _expand(pattern: str) -> list[Path]:
    path = Path(pattern).expanduser()
    if path.is_dir():
        if (path / FILE_NAME).is_file():
            return _resolve(pattern)[0]
        return sorted(path.glob("*.tar"))
    if path.exists():
        return [path]
    found = []
    for name in braceexpand.braceexpand(str(path)):
        found += [Path(match) for match in sorted(glob.glob(name))] if glob.has_magic(name) else [Path(name)]
    return found


def _nothing_found(source: str) -> ConfigError:
    if "data/demo" in source:
        remedy = "make the demo's with `make demo`"
    else:
        remedy = "make them with `python tools/make_shards.py IMAGES FOLDER`"
    return ConfigError(f"no shards are found at '{source}': {remedy}")
