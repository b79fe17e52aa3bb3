"""Samples that cannot be used: counted, named in a file, and bounded."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from nepa_scale.data.shard_set import BadSample

LEAST = 1000  # samples of which the allowed fraction is forgiven in any case: a fraction of few says nothing
_REASONS = 3  # named in the summary


class DataError(RuntimeError):
    """The data cannot be trained on; the message summarises why."""


class BadSampleLog:
    """Counts this rank's samples and appends the bad ones to a file that all ranks share, each once.

    path: one JSON object {"shard", "key", "why"} a line; None: only count
    max_fraction: of the samples read, above which `add` raises
    """

    def __init__(self, path: Path | None, max_fraction: float) -> None:
        self.path, self.max_fraction = path, max_fraction
        self.read, self.bad = 0, 0
        self._reasons: Counter[str] = Counter()
        self._known: set[tuple[str, str]] = set()
        self._position = 0  # up to where the file has been read

    def add(self, read: int, bad: Iterable[BadSample]) -> None:
        """Accounts for `read` samples, of which `bad` could not be used.

        Raises:
            DataError: too many were bad.
        """
        found = list(bad)
        self.read += read
        self.bad += len(found)
        if not found:
            return
        self._reasons.update(sample.why for sample in found)
        self._append(found)
        if self.bad > self.max_fraction * max(self.read, LEAST):
            raise DataError(
                f"{self.bad} of {self.read} samples could not be used, more than data.max_bad_fraction="
                f"{self.max_fraction:g} allows: {self._summary()}; the last was {found[-1]}"
                + (f"; they are listed in {self.path}" if self.path else "")
            )

    def _summary(self) -> str:
        named = self._reasons.most_common(_REASONS)
        others = self._reasons.total() - sum(count for _, count in named)
        return ", ".join(f"{count} x {why}" for why, count in named) + (f", {others} x other reasons" if others else "")

    def _append(self, found: list[BadSample]) -> None:
        if self.path is None or all((sample.shard, sample.key) in self._known for sample in found):
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                with contextlib.suppress(OSError):  # a file system without locks may list a sample twice
                    fcntl.flock(file, fcntl.LOCK_EX)  # other ranks append too
                whole = self._read_on(file)
                lines = [line for sample in found if (line := self._new_line(sample)) is not None]
                file.write((b"" if whole or not lines else b"\n") + b"".join(lines))
                file.flush()
                self._position = file.tell()
        except OSError as error:
            raise DataError(f"cannot write {self.path}: {error.strerror or error}") from error

    def _read_on(self, file: BinaryIO) -> bool:
        """Learns what has been written since this process looked last; returns whether the last line has its end."""
        file.seek(self._position)
        line = b"\n"
        for line in file:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a killed process left torn
                row = json.loads(line)
                self._known.add((row["shard"], row["key"]))
        return line.endswith(b"\n")

    def _new_line(self, sample: BadSample) -> bytes | None:
        if (sample.shard, sample.key) in self._known:
            return None
        self._known.add((sample.shard, sample.key))
        return json.dumps({"shard": sample.shard, "key": sample.key, "why": sample.why}).encode() + b"\n"
