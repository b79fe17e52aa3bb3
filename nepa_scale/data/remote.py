"""Copies one remote file to this machine: bounded in time whatever the server does, and tried again where that helps.

`http(s)://` is read with the standard library, `s3://`, `gs://`, `hf://` and the like through fsspec, and `pipe:` is a
shell command whose output is the file. A transfer runs in a thread of its own, so that silence is noticed here even
where a library would wait for ever.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import signal
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import fsspec

from nepa_scale.config import ConfigError, DataConfig
from nepa_scale.data.description import ShardDescription
from nepa_scale.data.safe_files import sha256

PIPE = "pipe:"
_CHUNK = 1 << 20
_SLOWEST = 1024  # bytes a second, on average over `timeout`: slower than that is as good as dead
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 30.0  # seconds between attempts
_GONE = (404, 410)
_REFUSED = (400, 401, 403, 405)


class RemoteError(RuntimeError):
    """A remote file cannot be had; the message names it and says why."""


class MissingRemote(RemoteError):
    """There is no such remote file."""


class RefusedRemote(RemoteError):
    """The server refuses access to a remote file, or says so of one that is not there."""


class _Stream(NamedTuple):
    """An open transfer: its chunks, its length where the server states it, and how to end it from another thread."""

    chunks: Iterator[bytes]
    size: int | None
    cancel: Callable[[], None] = lambda: None


def is_remote(location: str) -> bool:
    """Whether `location` is a URL or a pipe rather than a path."""
    return location.startswith(PIPE) or "://" in location


@dataclass(frozen=True)
class Remote:
    """Fetches files; picklable.

    timeout: seconds a server may stay silent
    retries: attempts after the first
    """

    timeout: float
    retries: int
    allow_pipe: bool

    @classmethod
    def from_config(cls, data: DataConfig) -> Remote:
        """With the run's settings."""
        return cls(data.timeout, data.retries, data.allow_pipe)

    def fetch(
        self,
        url: str,
        target: Path,
        reserve: Callable[[int], None] = lambda _: None,
        expected: ShardDescription | None = None,
    ) -> None:
        """Copies `url` to the file `target`, which is complete when this returns; after a failure it is not there.

        reserve: called with the size in bytes, where it is known, before the first byte is written
        expected: the size and the checksum that the file must have

        Raises:
            MissingRemote: there is no such file.
            RemoteError: it cannot be had, after all attempts.
            ConfigError: `pipe:` is not allowed, or no library is installed for the protocol.
            OSError: `target` cannot be written.
        """
        self.check(url)

        def attempt() -> None:
            target.unlink(missing_ok=True)  # an attempt that was given up may write on, to a file without a name
            _Transfer(url, self.timeout, target, reserve).run()
            if expected is not None and sha256(target) != expected.sha256:
                raise _Transient("its content is not what dataset.json describes (checksum)")

        try:
            self._repeat(url, attempt)
        except BaseException:
            target.unlink(missing_ok=True)
            raise

    def matching(self, pattern: str) -> list[str]:
        """The URLs that match a glob pattern, sorted; not for `http(s)://`, which has no listings.

        Raises:
            RemoteError: the server does not answer.
            ConfigError: no library is installed for the protocol.
        """
        found: list[str] = []
        self._repeat(pattern, lambda: found.extend(_Listing(pattern, self.timeout).run()))
        return found

    def _repeat(self, url: str, attempt: Callable[[], None]) -> None:
        """Calls `attempt` until it raises no _Transient, with growing pauses."""
        for number in range(self.retries + 1):
            try:
                return attempt()
            except _Transient as error:
                if number == self.retries:
                    attempts = f"{number + 1} attempts" if number else "one attempt"
                    raise RemoteError(
                        f"cannot read {url}: {error} ({attempts}; see data.timeout and data.retries)"
                    ) from error
                time.sleep(min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**number) * random.uniform(0.5, 1.0))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def read_small(self, url: str) -> bytes:
        """The content of a small file; raises what `fetch` raises."""
        with tempfile.TemporaryDirectory() as folder:
            self.fetch(url, Path(folder, "content"))
            return Path(folder, "content").read_bytes()

    def check(self, url: str) -> None:
        """Raises ConfigError for a `pipe:` that is not allowed."""
        if url.startswith(PIPE) and not self.allow_pipe:
            raise ConfigError(f"'{url}' runs a shell command: set data.allow_pipe=true if you trust it")


class _Transient(Exception):
    """A failure that another attempt may not meet."""


class _Watched:
    """Work in a thread of its own, given up when it shows no progress; `_received` is what counts as progress."""

    def __init__(self, url: str, timeout: float) -> None:
        self._url, self._timeout = url, timeout
        self._received = 0
        self._abandoned = False
        self._done = threading.Event()
        self._error: BaseException | None = None
        self._cancel: Callable[[], None] = lambda: None

    def _work(self) -> None:
        raise NotImplementedError

    def _wait(self) -> None:
        """Runs `_work`; raises what it raised, or _Transient where it stalls."""
        threading.Thread(target=self._guarded, daemon=True, name=f"reading {self._url}").start()
        try:
            self._watch()
        finally:
            self._abandoned = True
            self._cancel()
        if self._error is not None:
            raise self._error

    def _guarded(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error
        finally:
            self._done.set()

    def _watch(self) -> None:
        last_byte = window_start = time.monotonic()
        seen = window_bytes = 0
        while not self._done.wait(min(self._timeout / 20, 1.0)):
            now, received = time.monotonic(), self._received
            if received > seen:
                last_byte, seen = now, received
            if now - last_byte >= self._timeout:
                raise _Transient(f"the server was silent for {self._timeout:g} s after {received} bytes")
            if now - window_start >= self._timeout:
                if received - window_bytes < _SLOWEST * self._timeout:
                    raise _Transient(f"the server sent fewer than {_SLOWEST} bytes a second")
                window_start, window_bytes = now, received


class _Listing(_Watched):
    """One attempt to list the files that match a pattern."""

    def run(self) -> list[str]:
        self._wait()
        return self._found

    def _work(self) -> None:
        file_system, path = file_system_of(self._url)
        try:
            self._found = [file_system.unstrip_protocol(name) for name in sorted(file_system.glob(path))]
        except Exception as error:  # each file system has its own
            raise _Transient(f"{type(error).__name__}: {error}") from error


class _Transfer(_Watched):
    """One attempt to copy `url` to the new file `target`."""

    def __init__(self, url: str, timeout: float, target: Path, reserve: Callable[[int], None]) -> None:
        super().__init__(url, timeout)
        self._file, self._reserve = target.open("xb"), reserve  # here: a late thread must not open the next attempt's

    def run(self) -> None:
        self._wait()

    def _work(self) -> None:
        with self._file as file, _open(self._url, self._timeout) as stream:
            self._cancel = stream.cancel
            if stream.size is not None and not self._abandoned:
                self._reserve(stream.size)
            for chunk in stream.chunks:
                if self._abandoned:
                    return
                file.write(chunk)
                self._received += len(chunk)
        if stream.size is not None and self._received != stream.size:
            raise _Transient(f"the connection ended after {self._received} of {stream.size} bytes")


@contextlib.contextmanager
def _open(url: str, timeout: float) -> Iterator[_Stream]:
    if url.startswith(PIPE):
        opened = _open_pipe(url.removeprefix(PIPE))
    elif urlsplit(url).scheme in ("http", "https"):
        opened = _open_http(url, timeout)
    else:
        opened = _open_fsspec(url)
    with opened as stream:
        yield stream


@contextlib.contextmanager
def _open_http(url: str, timeout: float) -> Iterator[_Stream]:
    request = urllib.request.Request(url, headers={"User-Agent": "nepa_scale", "Accept-Encoding": "identity"})
    try:
        # the transfer's watcher speaks first; the socket's timeout only ends a thread that was abandoned
        response = urllib.request.urlopen(request, timeout=2 * timeout)
    except urllib.error.HTTPError as error:
        if error.code in _GONE:
            raise MissingRemote(f"there is no {url} (HTTP {error.code})") from error
        if error.code in _REFUSED:
            raise RefusedRemote(f"cannot read {url}: HTTP {error.code} {error.reason}") from error
        raise _Transient(f"HTTP {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:  # of the network: nothing else is touched here
        raise _Transient(str(getattr(error, "reason", error)) or type(error).__name__) from error
    with response:
        length = response.headers.get("Content-Length", "")
        yield _Stream(_chunks(response.read1), int(length) if length.isdigit() else None)


@contextlib.contextmanager
def _open_fsspec(url: str) -> Iterator[_Stream]:
    file_system, path = file_system_of(url)
    try:
        file = file_system.open(path, "rb", block_size=_CHUNK, cache_type="readahead")
    except FileNotFoundError as error:
        raise MissingRemote(f"there is no {url}") from error
    except PermissionError as error:
        raise RefusedRemote(f"cannot read {url}: access is refused ({error})") from error
    except Exception as error:
        raise _Transient(f"{type(error).__name__}: {error}") from error
    with file:
        yield _Stream(_chunks(file.read), getattr(file, "size", None))


def _chunks(read: Callable[[int], bytes]) -> Iterator[bytes]:
    while True:
        try:
            chunk = read(_CHUNK)
        except Exception as error:  # each file system has its own, and so has each state of a network
            raise _Transient(f"{type(error).__name__}: {error}") from error
        if not chunk:
            return
        yield chunk


def file_system_of(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url`, and the path in it.

    Raises:
        ConfigError: the protocol is unknown, or its library is not installed.
    """
    try:
        file_system, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"cannot read {url}: {error}") from error
    return file_system, path


@contextlib.contextmanager
def _open_pipe(command: str) -> Iterator[_Stream]:
    with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, start_new_session=True) as process:
        assert process.stdout is not None
        descriptor = process.stdout.fileno()

        def kill() -> None:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)

        try:
            yield _Stream(iter(lambda: os.read(descriptor, _CHUNK), b""), None, kill)
            status = process.wait()
        finally:
            kill()
    if status:
        raise _Transient(f"the command ended with status {status}")
