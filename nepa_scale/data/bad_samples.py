"""Samples that cannot be used: counted, named in a file, and bounded."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterable
from pathlib import Path

from nepa_scale.data.shard_set import BadSample

FREE = 10  # bad samples that are forgiven whatever the fraction: a fraction of few samples says nothing


class DataError(RuntimeError):
    """The data cannot be trained on; the message summarises why."""


class BadSampleLog:
    """Counts this rank's samples and appends the bad ones to a file that all ranks share, each once.

    max_fraction: of the samples read, above which `add` raises
    """

    def __init__(self, path: Path | None, max_fraction: float) -> None:
        self.path, self.max_fraction = path, max_fraction
        self.read, self.bad = 0, 0
        self._last: BadSample | None = None

    def add(self, read: int, bad: Iterable[BadSample]) -> None:
        """Accounts for `read` samples, of which `bad` were replaced.

        Raises:
            DataError: too many were bad.
        """
        found = list(bad)
        self.read += read
        self.bad += len(found)
        if not found:
            return
        self._last = found[-1]
        if self.path is not None:
            self._append(found)
        if self.bad > FREE + self.max_fraction * self.read:
            listed = f"; they are listed in {self.path}" if self.path else ""
            raise DataError(
                f"{self.bad} of {self.read} samples could not be used, more than data.max_bad_fraction="
                f"{self.max_fraction:g} allows, the last of them {self._last.key} in {self._last.shard}: "
                f"{self._last.why}{listed}"
            )

    def _append(self, found: list[BadSample]) -> None:
        assert self.path is not None
        with self.path.open("a+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # other ranks append too
            file.seek(0)
            known = {(row["shard"], row["key"]) for row in map(json.loads, file) if row}
            for sample in found:
                if (sample.shard, sample.key) not in known:
                    known.add((sample.shard, sample.key))
                    file.write(json.dumps({"shard": sample.shard, "key": sample.key, "why": sample.why}) + "\n")
