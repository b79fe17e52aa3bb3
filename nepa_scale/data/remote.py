"""Files behind URLs, fetched whole: with retries, and never waiting for a server that has gone silent.

`http(s)://` is read by the standard library; `s3://`, `gs://`, `hf://` and whatever else fsspec knows by fsspec;
`pipe:COMMAND` is the output of a shell command.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import io
import logging
import os
import random
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

PIPE = "pipe:"
CHUNK = 1 << 20
ENOUGH = 1 << 16  # bytes within the timeout: a server that sends fewer counts as silent
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0  # seconds between two tries, doubled each time
_TRY_AGAIN = {408, 425, 429}  # HTTP statuses below 500 that may pass

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Patience:
    """timeout: seconds a server may stay silent; retries: tries after the first"""

    timeout: float
    retries: int


class RemoteError(Exception):
    """A remote file cannot be had; the message names it and says why. lasting: another try would not help"""

    def __init__(self, message: str, lasting: bool = False) -> None:
        super().__init__(message, lasting)
        self.message, self.lasting = message, lasting

    def __str__(self) -> str:
        return self.message


class RemoteFileMissing(RemoteError):
    """The server answers that there is no such file."""

    def __init__(self, message: str, lasting: bool = True) -> None:
        super().__init__(message, lasting)


class Fetched(NamedTuple):
    """What was received: its size in bytes and SHA-256 in hexadecimal."""

    bytes: int
    sha256: str


def is_remote(source: str) -> bool:
    """Whether `source` is a URL or a `pipe:`, rather than a path."""
    return source.startswith(PIPE) or "://" in source


def fetch(url: str, patience: Patience) -> bytes:
    """The content of a small file.

    Raises:
        RemoteError: it cannot be had within `patience`.
    """

    def attempt() -> bytes:
        content = io.BytesIO()
        _receive(url, lambda: contextlib.nullcontext(content), patience.timeout)
        return content.getvalue()

    return _patiently(url, attempt, patience)


def download(url: str, path: Path, patience: Patience, expected: Fetched | None = None) -> Fetched:
    """Writes the file behind `url` to `path`, overwriting it at each try; verifies it where `expected` is given.

    Raises:
        RemoteError: it cannot be had within `patience`, or differs from `expected`; `path` is then removed.
    """

    def attempt() -> Fetched:
        path.unlink(missing_ok=True)  # a try that was given up may still write to the old one
        fetched = _receive(url, lambda: path.open("xb"), patience.timeout)
        if expected is not None and fetched != expected:
            raise RemoteError(f"its {fetched.bytes} bytes are not the {expected.bytes} that dataset.json describes")
        return fetched

    try:
        return _patiently(url, attempt, patience)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def list_tars(folder: str, patience: Patience) -> list[str]:
    """The URLs of the tars right under the URL `folder`, sorted; for stores that fsspec can list.

    Raises:
        RemoteError: it cannot be listed.
    """

    def attempt() -> list[str]:
        found: list[str] = []
        _within(lambda _: found.extend(_glob(folder)), patience.timeout)
        return sorted(found)

    return _patiently(folder, attempt, patience)


def _glob(folder: str) -> list[str]:
    filesystem, path = _filesystem(folder)
    return [str(filesystem.unstrip_protocol(name)) for name in filesystem.glob(f"{path.rstrip('/')}/*.tar")]


def _patiently(url: str, attempt: Callable[[], T], patience: Patience) -> T:
    for tried in range(1, patience.retries + 2):
        try:
            return attempt()
        except RemoteError as error:
            if error.lasting or tried > patience.retries:
                times = f" (tried {tried} times)" if tried > 1 else ""
                raise type(error)(f"{url}: {error}{times}", error.lasting) from error
            pause = min(FIRST_PAUSE * 2 ** (tried - 1), LONGEST_PAUSE) * random.uniform(0.7, 1.0)
            log.warning("%s: %s; trying again in %.1f s (%d of %d)", url, error, pause, tried, patience.retries)
            time.sleep(pause)
    raise AssertionError("unreachable")


def _receive(url: str, target: Callable[[], contextlib.AbstractContextManager[BinaryIO]], timeout: float) -> Fetched:
    """One try. `target` is opened, written and closed by the receiving thread alone."""
    digest, result = hashlib.sha256(), []

    def work(transfer: _Transfer) -> None:
        with _open(url, timeout, transfer) as (chunks, size), _writable(target) as write:
            for chunk in chunks:
                if transfer.given_up:
                    return
                write(chunk)
                digest.update(chunk)
                transfer.received += len(chunk)
        if size is not None and transfer.received != size:
            raise RemoteError(f"the connection ended after {transfer.received} of {size} bytes")
        result.append(Fetched(transfer.received, digest.hexdigest()))

    _within(work, timeout)
    return result[0]


class _Transfer:
    """What the receiving thread and the one that waits for it tell each other."""

    def __init__(self) -> None:
        self.received = 0
        self.given_up = False
        self.finished = threading.Event()
        self.error: BaseException | None = None
        self.on_give_up: Callable[[], None] = lambda: None


def _within(work: Callable[[_Transfer], None], timeout: float) -> None:
    """Runs `work` in a thread of its own and waits as long as bytes arrive; name lookups, TLS handshakes and stores'
    own libraries have no timeout that could be relied on, so silence is judged from outside.

    Raises:
        RemoteError: whatever went wrong, or fewer than `ENOUGH` bytes came within `timeout` seconds.
    """
    transfer = _Transfer()

    def run() -> None:
        try:
            work(transfer)
        except BaseException as error:
            transfer.error = error
        finally:
            transfer.finished.set()

    threading.Thread(target=run, daemon=True, name="remote file").start()
    seen, since = 0, time.monotonic()
    while not transfer.finished.wait(min(0.5, timeout / 10)):
        if transfer.received - seen >= ENOUGH:
            seen, since = transfer.received, time.monotonic()
        elif time.monotonic() - since > timeout:
            transfer.given_up = True
            transfer.on_give_up()
            came = transfer.received - seen
            raise RemoteError(f"only {came} bytes came in {timeout:g} s" if came else f"no answer for {timeout:g} s")
    if transfer.error is not None:
        raise _as_remote_error(transfer.error) from transfer.error


def _as_remote_error(error: BaseException) -> RemoteError:
    if isinstance(error, RemoteError):
        return error
    if isinstance(error, urllib.error.HTTPError):
        kind = RemoteFileMissing if error.code in (404, 410) else RemoteError
        return kind(f"HTTP {error.code} {error.reason}", error.code < 500 and error.code not in _TRY_AGAIN)
    if isinstance(error, FileNotFoundError):
        return RemoteFileMissing("there is no such file")
    if isinstance(error, urllib.error.URLError):
        return RemoteError(f"{error.reason}")
    if isinstance(error, (PermissionError, ValueError)):
        return RemoteError(f"{error}", lasting=True)
    return RemoteError(f"{error}" or type(error).__name__)


@contextlib.contextmanager
def _writable(target: Callable[[], contextlib.AbstractContextManager[BinaryIO]]) -> Iterator[Callable[[bytes], None]]:
    """A `write` whose failures (a full disk) are not taken for the server's."""

    def write(chunk: bytes) -> None:
        try:
            file.write(chunk)
        except OSError as error:
            raise RemoteError(f"it cannot be written to disk: {error.strerror}", lasting=True) from error

    with target() as file:
        yield write


def _open(
    url: str, timeout: float, transfer: _Transfer
) -> contextlib.AbstractContextManager[tuple[Iterator[bytes], int | None]]:
    """The chunks of the file behind `url`, and its size where it is known."""
    if url.startswith(PIPE):
        return _open_pipe(url.removeprefix(PIPE).strip(), transfer)
    return _open_http(url, timeout) if url.startswith(("http://", "https://")) else _open_fsspec(url)


@contextlib.contextmanager
def _open_http(url: str, timeout: float) -> Iterator[tuple[Iterator[bytes], int | None]]:
    headers = {"User-Agent": "nepa_scale", "Accept-Encoding": "identity"}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout) as response:
        length = response.headers.get("Content-Length")
        try:
            yield iter(lambda: response.read1(CHUNK), b""), int(length) if length else None
        except http.client.IncompleteRead as error:
            raise RemoteError("the connection ended too early") from error


@contextlib.contextmanager
def _open_fsspec(url: str) -> Iterator[tuple[Iterator[bytes], int | None]]:
    filesystem, path = _filesystem(url)
    with filesystem.open(path, "rb", block_size=8 * CHUNK) as file:
        yield iter(lambda: file.read(CHUNK), b""), getattr(file, "size", None)


def _filesystem(url: str) -> tuple[Any, str]:
    import fsspec

    try:
        filesystem, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub"}.get(url.partition(":")[0])
        raise RemoteError(f"needs {f'`pip install {package}`' if package else error}", lasting=True) from error
    return filesystem, path


@contextlib.contextmanager
def _open_pipe(command: str, transfer: _Transfer) -> Iterator[tuple[Iterator[bytes], int | None]]:
    process = subprocess.Popen(
        ["/bin/sh", "-c", command], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, start_new_session=True
    )

    def stop() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    transfer.on_give_up = stop
    output = process.stdout
    assert output is not None
    try:
        yield iter(lambda: output.read1(CHUNK), b""), None  # type: ignore[attr-defined]
        if process.wait() != 0:
            raise RemoteError(f"the command ended with status {process.returncode}")
    finally:
        output.close()
        if process.poll() is None:
            stop()
        process.wait()
