"""Local copies of remote shards: whole files, at most so many bytes of them, shared by all processes of a machine."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from nepa_scale.config import ConfigError, DataConfig
from nepa_scale.data.description import ShardDescription
from nepa_scale.data.remote import Remote, RemoteError
from nepa_scale.data.safe_files import locked, write_atomically
from nepa_scale.data.tar_index import SUFFIX

_ATTEMPTS = 10  # to use a copy before another process removes it

T = TypeVar("T")


def cache_folder(data: DataConfig) -> Path:
    """Where copies of remote shards, and the indices that cannot lie beside their shards, are kept."""
    return Path(data.cache).expanduser() if data.cache else Path.home() / ".cache" / "nepa_scale" / "shards"


@dataclass(frozen=True)
class ShardCache:
    """A folder of copies; picklable. The least recently opened copies make room for new ones.

    A copy that is open in some process stays readable there after it was removed.
    """

    folder: Path
    limit: int  # bytes
    remote: Remote

    @classmethod
    def from_config(cls, data: DataConfig) -> ShardCache:
        """With the run's settings."""
        return cls(cache_folder(data) / "copies", int(data.cache_gigabytes * 1e9), Remote.from_config(data))

    def local(self, url: str, expected: ShardDescription | None = None) -> Path:
        """The local copy of `url`, fetched if need be: by one process, while the others that want it wait.

        expected: its checksum, where it is known; a copy of other content does not count

        Raises:
            MissingRemote, RemoteError: it cannot be had.
            ConfigError: it does not fit, or the cache cannot be written.
        """
        copy = self.folder / _copy_name(url, expected)
        if _touch(copy):
            return copy
        self.remote.check(url)
        asked = time.time()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(_beside(copy, ".lock")):
                if not _touch(copy):
                    self._fetch(url, copy, expected, asked)
        except OSError as error:
            hint = "lower data.cache_gigabytes" if error.errno == errno.ENOSPC else "set data.cache"
            raise ConfigError(f"cannot write to the cache {self.folder}: {error.strerror or error}; {hint}") from error
        return copy

    def use(self, url: str, expected: ShardDescription | None, work: Callable[[Path], T]) -> T:
        """`work` of the local copy; once more where another process removed the copy meanwhile.

        Raises:
            What `local` and `work` raise; RemoteError where the copy does not stay long enough.
        """
        for _ in range(_ATTEMPTS):
            with contextlib.suppress(FileNotFoundError):
                return work(self.local(url, expected))
        raise RemoteError(f"the cache has no room for {url}: raise data.cache_gigabytes")

    def _fetch(self, url: str, copy: Path, expected: ShardDescription | None, asked: float) -> None:
        failure = _beside(copy, ".failed")
        with contextlib.suppress(FileNotFoundError):
            if failure.stat().st_mtime >= asked:  # while this process waited: trying again would only take as long
                raise RemoteError(failure.read_text())
        part = _beside(copy, f".{uuid.uuid4().hex}.part")
        try:
            self.remote.fetch(url, part, lambda size: self._make_room(size, part), expected)
            self._make_room(0, part)  # where its size was not known
            os.replace(part, copy)
        except RemoteError as error:
            write_atomically(failure, str(error).encode(), time.time_ns())
            raise
        finally:
            part.unlink(missing_ok=True)
        failure.unlink(missing_ok=True)

    def _make_room(self, size: int, part: Path) -> None:
        """Removes copies, the least recently opened first, until `size` more bytes fit; `part` then takes them up."""
        if size > self.limit:
            raise ConfigError(
                f"a shard of {size / 1e9:.3g} GB does not fit into the cache: raise data.cache_gigabytes="
                f"{self.limit / 1e9:g}"
            )
        with locked(self.folder / "lock"):
            self._remove_abandoned_parts()
            files = sorted(_copies_and_parts(self.folder), key=lambda entry: entry[1].st_atime_ns)
            used = sum(status.st_size for _, status in files)
            for path, status in files:
                if used + size <= self.limit:
                    break
                if path.suffix == ".tar":
                    path.unlink(missing_ok=True)
                    path.with_name(path.name + SUFFIX).unlink(missing_ok=True)
                    used -= status.st_size
            if size:
                os.truncate(part, size)

    def _remove_abandoned_parts(self) -> None:
        """Those of processes that were killed: nobody holds the lock."""
        for part in self.folder.glob(".*.part"):
            lock = part.with_name(part.name[: -len(".part") - 33] + ".lock")
            with contextlib.suppress(OSError), lock.open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                part.unlink(missing_ok=True)


def _copies_and_parts(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.iterdir():
        if path.suffix in (".part", ".tar"):
            with contextlib.suppress(FileNotFoundError):  # a part that has just become a copy, or failed
                yield path, path.stat()


def _copy_name(url: str, expected: ShardDescription | None) -> str:
    """Readable, and different for different URLs and, where it is known, content."""
    identity = hashlib.sha256(f"{url}\n{expected.sha256 if expected else ''}".encode()).hexdigest()[:16]
    last = re.sub(r"[^\w.-]", "_", url.split("?")[0].rstrip("/").rpartition("/")[2])[-80:]
    return f"{identity}-{last.removesuffix('.tar')}.tar"


def _beside(copy: Path, suffix: str) -> Path:
    return copy.with_name(f".{copy.name}{suffix}")


def _touch(copy: Path) -> bool:
    """Whether the copy is there; if so, it counts as just used."""
    try:
        os.utime(copy, ns=(time.time_ns(), copy.stat().st_mtime_ns))
    except OSError:
        return False
    return True
