"""Remote shards, fetched before they are needed."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Callable, Iterable

from nepa_scale.config import ConfigError
from nepa_scale.data.remote import RemoteError


class ShardFetcher:
    """Fetches shards one after the other in a thread of its own; whoever needs one sooner fetches it himself.

    A shard that cannot be fetched is passed over: who reads it will meet the error and report it.
    """

    def __init__(self, fetch: Callable[[int], object]) -> None:
        self._fetch = fetch
        self._wanted: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._closed = False
        threading.Thread(target=self._work, daemon=True, name="shard fetcher").start()

    def want(self, shards: Iterable[int]) -> None:
        """Fetches these too, after those wanted before."""
        for shard in shards:
            self._wanted.put(shard)

    def close(self) -> None:
        """Fetches no more; does not wait for a transfer that is under way."""
        self._closed = True
        self._wanted.put(None)

    def _work(self) -> None:
        while (shard := self._wanted.get()) is not None and not self._closed:
            with contextlib.suppress(RemoteError, ConfigError, OSError):
                self._fetch(shard)
