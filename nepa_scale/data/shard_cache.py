"""Local copies of remote shards: complete or absent, at most so many bytes, shared by all processes of a machine."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nepa_scale.data.remote import PIPE, Fetched, Patience, RemoteError, RemoteFileMissing, download
from nepa_scale.data.safe_files import locked

REMEMBER_FAILURE = 300.0  # seconds in which the processes that saw a shard fail do not ask for it again
_PART = ".part"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RemoteShard:
    """Where a shard is; `described` is its size and checksum where a dataset.json gives them."""

    url: str
    described: Fetched | None = None

    @property
    def file_name(self) -> str:
        """The local copy's: another for another URL, and for another content where that is known."""
        identity = self.url if self.described is None else f"{self.url}\n{self.described.sha256}"
        last = "pipe.tar" if self.url.startswith(PIPE) else self.url.partition("?")[0].rpartition("/")[2]
        return f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}-{last[-100:]}"


class ShardCache:
    """A folder of copies. Pickles small.

    Any number of processes may ask for a shard: one downloads it, the others wait and share it. A copy that any
    process has open (`open`) stays; of the others, those unused for longest make room for new ones.
    """

    def __init__(self, folder: Path, limit_bytes: int, patience: Patience) -> None:
        self.folder, self.limit_bytes, self.patience = folder, limit_bytes, patience
        self._born = time.time()

    def get(self, shard: RemoteShard) -> Path:
        """The path of the local copy, downloaded first where there is none. It may be evicted once it is not open.

        Raises:
            RemoteError: it cannot be had; for some minutes it then fails at once.
        """
        path = self.folder / shard.file_name
        if _use(path):
            return path
        locks = self.folder / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with locked(locks / f"{path.name}.lock"):
            if not _use(path):
                with self._failures_remembered(locks / f"{path.name}.failed"):
                    self._download(shard, path)
        return path

    def open(self, shard: RemoteShard) -> int:
        """A descriptor of the local copy, which is not evicted until the descriptor is closed.

        Raises:
            RemoteError: it cannot be had.
        """
        while True:
            with contextlib.suppress(FileNotFoundError):  # evicted between the two lines: get it again
                descriptor = os.open(self.get(shard), os.O_RDONLY | os.O_CLOEXEC)
                with contextlib.suppress(OSError):  # a file system without locks: evicted, it still can be read
                    fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
                return descriptor

    def _download(self, shard: RemoteShard, path: Path) -> None:
        part = path.with_name(path.name + _PART)
        if shard.described is not None:
            self._make_room(shard.described.bytes)
        fetched = download(shard.url, part, self.patience, shard.described)
        try:
            self._make_room(0)
            if fetched.bytes > self.limit_bytes:
                raise _too_large(fetched.bytes, self.limit_bytes)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Removes copies, the least recently used first, until `size` more bytes fit."""
        if size > self.limit_bytes:
            raise _too_large(size, self.limit_bytes)
        with locked(self.folder / "locks" / "eviction.lock"):
            copies = sorted(_copies(self.folder), key=lambda copy: copy[1].st_atime_ns)
            excess = sum(status.st_size for _, status in copies) + size - self.limit_bytes
            for path, status in copies:
                if excess <= 0:
                    return
                if path.suffix != _PART and _remove_unused(path):
                    excess -= status.st_size
        if excess > 0:
            log.warning(
                "%s holds %.1f GB more than data.cache_gigabytes: all of it is in use (raise it, or lower "
                "data.open_shards)",
                self.folder,
                excess / 1e9,
            )

    @contextlib.contextmanager
    def _failures_remembered(self, marker: Path) -> Iterator[None]:
        """A failure costs all processes one wait together, not one each in turn."""
        with contextlib.suppress(FileNotFoundError):
            failed = marker.stat().st_mtime
            if failed > self._born and time.time() - failed < REMEMBER_FAILURE:
                kind, _, message = marker.read_text().partition("\n")
                raise (RemoteFileMissing if kind == "missing" else RemoteError)(message)
        try:
            yield
        except RemoteError as error:
            marker.write_text(f"{'missing' if isinstance(error, RemoteFileMissing) else 'failed'}\n{error}")
            raise
        marker.unlink(missing_ok=True)


def _use(path: Path) -> bool:
    """Whether the copy is there; notes that it was used (the access time of itself may be off or coarse)."""
    try:
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))
    except FileNotFoundError:
        return False
    return True


def _copies(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for entry in os.scandir(folder):
        if entry.name.endswith((".tar", _PART)):
            with contextlib.suppress(FileNotFoundError):
                yield Path(entry.path), entry.stat()


def _remove_unused(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
    except BlockingIOError:
        return False
    except FileNotFoundError:
        return True
    return True


def _too_large(size: int, limit: int) -> RemoteError:
    return RemoteError(
        f"the shard's {size / 1e9:.3g} GB exceed the cache's {limit / 1e9:.3g} GB: raise data.cache_gigabytes", True
    )
