"""Memory that processes share and use again and again."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import weakref
from multiprocessing.reduction import DupFd
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]


class SharedSlots:
    """Equal uint8 arrays in memory that a process shares with those it hands this object to when it starts them.

    Fresh shared memory costs more than to decode a seventh of the images that go into it, hence slots that are used
    again: `lend` gives an array out and knows when nobody looks at it any more. The memory is a file without a name,
    and not in /dev/shm, which containers keep small.
    """

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self._bytes = math.prod(shape)
        self._file = _nameless_file()
        os.ftruncate(self._file, max(1, count * self._bytes))
        self._map = mmap.mmap(self._file, 0)
        self._free = list(range(count))

    def array(self, slot: int) -> Pixels:
        """The slot's memory."""
        flat = np.frombuffer(self._map, np.uint8, self._bytes, slot * self._bytes)
        return flat.reshape(self.shape)

    def take(self) -> int | None:
        """A slot that is not in use, which then is; None where all are."""
        return self._free.pop() if self._free else None

    def lend(self, slot: int) -> Pixels:
        """The slot's memory; the slot is free again when neither the array nor a view or tensor of it is left."""
        array = self.array(slot)
        weakref.finalize(array, self._free.append, slot).atexit = False
        return array

    def __getstate__(self) -> dict[str, Any]:
        return {"shape": self.shape, "_bytes": self._bytes, "_file": DupFd(self._file)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._file = state["_file"].detach()
        self._map = mmap.mmap(self._file, 0)
        self._free = []

    def __del__(self) -> None:
        if isinstance(file := self.__dict__.get("_file"), int):
            os.close(file)


def _nameless_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("nepa_scale batches")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())
